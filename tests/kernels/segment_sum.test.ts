import { afterAll, describe, test } from "bun:test";
import { segmentSumReference } from "../../src/kernels/segment_sum/reference.ts";
import { packSegments, type RowSegment, segmentSum } from "../../src/kernels/segment_sum/segment_sum.ts";
import { GRID_FOLD } from "../../src/kernels/shared/shared.ts";
import { op } from "../../src/runtime/kernel.ts";
import { expectClose, expectSame, expectTenIdenticalRuns, maxAbs, reportErrors } from "../support/compare.ts";
import { poison, rounded, runOp, tensor, testDevice, thenNan } from "../support/device.ts";
import { normalArray, uniformArray } from "../support/random.ts";

const gpu = await testDevice();

interface Case {
  readonly x: Float32Array;
  readonly width: number;
  readonly segments: readonly RowSegment[];
}

/** Segments one behind the other, of these many rows each, whose sums go to rows in reverse order. */
function consecutive(counts: readonly number[], scale = (rows: number) => 1 / rows): RowSegment[] {
  let first = 0;
  return counts.map((rows, i) => {
    const segment = { first, rows, row: counts.length - 1 - i, scale: Math.fround(scale(rows)) };
    first += rows;
    return segment;
  });
}

function caseOf(width: number, segments: readonly RowSegment[], mean = 0): Case {
  const rows = segments.reduce((most, { first, rows }) => Math.max(most, first + rows), 0);
  return { x: rounded(normalArray(1, rows * width, mean, 2), "f32"), width, segments };
}

/** Runs with NaN behind the rows, and `before` segments in front of those that are meant that must not be read. */
async function runSums({ x, width, segments }: Case, before = 0): Promise<Float32Array> {
  const rows = 1 + segments.reduce((most, { row }) => Math.max(most, row), 0);
  const packed = packSegments([
    ...new Array<RowSegment>(before).fill({ first: 0, rows: 1, row: 0, scale: NaN }),
    ...segments,
  ]);
  const { out } = await runOp(gpu, op(segmentSum, {}), {
    segments: segments.length,
    firstSegment: before,
    width,
  }, {
    x: tensor("f32", thenNan(x, width)),
    segments: tensor("u32", new Uint32Array(packed.buffer)),
    out: poison("f32", rows * width),
  });
  return out!;
}

async function checkSums(c: Case, before = 0): Promise<void> {
  const { x, width, segments } = c;
  const got = await runSums(c, before);
  const wanted = new Float64Array(got.length).fill(NaN);
  const plain = new Float32Array(got.length).fill(NaN);
  for (const [row, sum] of segmentSumReference(x, segments, width)) wanted.set(sum, row * width);
  for (const { first, rows, row, scale } of segments) {
    for (let column = 0; column < width; column++) {
      let sum = 0;
      for (let r = first; r < first + rows; r++) sum = Math.fround(sum + x[r * width + column]!);
      plain[row * width + column] = Math.fround(sum * scale);
    }
  }
  const largest = maxAbs(x) * segments.reduce((most, { rows, scale }) => Math.max(most, rows * scale), 0);
  expectClose(got, wanted, plain, { kernel: "segment_sum", elem: "f32", stored: "f32", magnitude: largest });
}

describe("segment_sum", () => {
  afterAll(reportErrors);
  for (const width of [4, 8, 192, 252, 256, 260, 1600]) {
    test(`width=${width} matches the f64 reference`, async () => {
      await checkSums(caseOf(width, consecutive([1])));
      await checkSums(caseOf(width, consecutive([2, 63, 1, 64, 65, 97, 257, 1])));
    });
  }
  test("one row with a scale of 1 is copied bit for bit", async () => {
    const rows = [5, 0, 3, 3, 1];
    const c = caseOf(12, rows.map((first, row) => ({ first, rows: 1, row, scale: 1 })), 1e-3);
    expectSame(
      await runSums(c),
      Float32Array.from(rows.flatMap((r) => [...c.x.subarray(r * 12, r * 12 + 12)])),
    );
  });
  test("segments that overlap, of which only some are run, match", () =>
    checkSums(caseOf(8, [7, 64, 130].map((rows, row) => ({ first: 0, rows, row, scale: 1 / rows }))), 3));
  test("a thousand rows around a large mean match", () => checkSums(caseOf(4, consecutive([1025]), 1e4)));
  test("rows that no segment names may hold anything", async () => {
    const c = caseOf(8, [{ first: 2, rows: 3, row: 0, scale: 1 }, { first: 7, rows: 1, row: 1, scale: 2 }]);
    const clean = await runSums(c);
    const named = (row: number) => (row >= 2 && row < 5) || row === 7;
    expectSame(
      await runSums({ ...c, x: c.x.map((value, i) => named(Math.floor(i / 8)) ? value : NaN) }),
      clean,
    );
  });
  test(`${2 * GRID_FOLD + 1} segments, over a folded grid, match`, () => {
    const firsts = uniformArray(3, 2 * GRID_FOLD + 1, 0, 90);
    return checkSums(
      caseOf(4, Array.from(firsts, (first, row) => ({ first: Math.floor(first), rows: 2, row, scale: 0.5 }))),
    );
  });
  test("ten runs are bit-identical", () =>
    expectTenIdenticalRuns(() => runSums(caseOf(192, consecutive([64, 300, 1, 65])))));
});
