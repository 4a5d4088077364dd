import { afterAll, describe, expect, test } from "bun:test";
import { nllCandidates, type NllProblem } from "../../src/kernels/nll/nll.ts";
import { nllReference } from "../../src/kernels/nll/reference.ts";
import { GRID_FOLD } from "../../src/kernels/shared/shared.ts";
import type { Op } from "../../src/runtime/kernel.ts";
import { expectClose, expectSame, expectTenIdenticalRuns, reportErrors } from "../support/compare.ts";
import {
  poison,
  rounded,
  runnable,
  runSteps,
  step,
  type Tensor,
  tensor,
  testDevice,
  thenNan,
  titleOf,
} from "../support/device.ts";
import { normalArray, uniformArray } from "../support/random.ts";

const gpu = await testDevice();

interface Case {
  readonly rows: number;
  readonly vocab: number;
  readonly logits: Float32Array;
  readonly targets: Uint32Array;
}

function randomCase(rows: number, vocab: number, mean = 0, deviation = 4): Case {
  return {
    rows,
    vocab,
    logits: rounded(normalArray(1, rows * vocab, mean, deviation), "f32"),
    targets: Uint32Array.from(uniformArray(2, rows, 0, vocab)),
  };
}

/** One row, scored once for each of the targets. */
function sameRow(row: ArrayLike<number>, targets: readonly number[]): Case {
  const logits = Float32Array.from({ length: targets.length * row.length }, (_, i) => row[i % row.length]!);
  return { rows: targets.length, vocab: row.length, logits, targets: Uint32Array.from(targets) };
}

function largestOfRow({ vocab, logits }: Case, row: number): number {
  return logits.subarray(row * vocab, (row + 1) * vocab).reduce((a, b) => Math.max(a, b), -Infinity);
}

/** The textbook's two passes over a row, maximum and running f32 sum. */
function plainNll(c: Case): Float32Array {
  const { fround } = Math;
  return Float32Array.from(c.targets, (target, row) => {
    const max = largestOfRow(c, row);
    let sum = 0;
    for (let i = row * c.vocab; i < (row + 1) * c.vocab; i++) {
      sum = fround(sum + fround(Math.exp(fround(c.logits[i]! - max))));
    }
    return fround(fround(Math.log(sum)) + fround(max - c.logits[row * c.vocab + target]!));
  });
}

/**
 * What is added up to one result: the logarithm of the sum, and the distance of the target from the maximum. The 1 is
 * the sum's own rounding: the logarithm makes an absolute error of what is a relative one there.
 */
function magnitude(c: Case): number {
  const distances = [...c.targets].map((target, row) =>
    largestOfRow(c, row) - c.logits[row * c.vocab + target]!
  );
  return 1 + Math.log(c.vocab) + distances.reduce((a, b) => Math.max(a, b), 0);
}

/** The rows in pieces that end at `cuts`, each with logits of its own; targets and results lie behind `before`. */
async function runNll(
  candidate: Op<NllProblem>,
  c: Case,
  cuts: readonly number[] = [],
  before = 0,
): Promise<Float32Array> {
  const { rows, vocab, logits, targets } = c;
  const edges = [0, ...cuts, rows];
  const tensors: Record<string, Tensor> = {
    targets: tensor("u32", [...new Array<number>(before).fill(vocab), ...targets, vocab]),
    nll: poison("f32", before + rows + 1),
  };
  const steps = edges.slice(1).map((end, i) => {
    const first = edges[i]!;
    const piece = logits.subarray(first * vocab, end * vocab);
    tensors[`logits_${i}`] = tensor("f32", thenNan(piece, 2 * vocab));
    const problem = { rows: end - first, vocab, firstRow: before + first };
    return step(candidate, problem, { logits: `logits_${i}` });
  });
  const all = (await runSteps(gpu, steps, tensors, ["nll"])).nll;
  const around = [...all.subarray(0, before), all[before + rows]!];
  expectSame(around, new Array<number>(before + 1).fill(NaN));
  return all.subarray(before, before + rows);
}

async function checkNll(
  candidate: Op<NllProblem>,
  c: Case,
  cuts: readonly number[] = [],
  before = 0,
): Promise<void> {
  const wanted = nllReference(c.logits, c.targets, c.vocab);
  expectClose(await runNll(candidate, c, cuts, before), wanted, plainNll(c), {
    kernel: "nll",
    elem: "f32",
    stored: "f32",
    magnitude: magnitude(c),
  });
}

async function expectExactly(candidate: Op<NllProblem>, c: Case, wanted: readonly number[]): Promise<void> {
  expectSame(await runNll(candidate, c), wanted);
}

describe("nll", () => {
  afterAll(reportErrors);
  const forSoftware = nllCandidates(false);
  for (const candidate of runnable(gpu, [...nllCandidates(true), ...forSoftware])) {
    const title = titleOf(candidate);
    // SwiftShader takes a millisecond for each row with the variant that is not made for it.
    const isSlow = gpu.caps.isSoftware && !forSoftware.includes(candidate);

    for (const vocab of [1, 2, 7, 8, 63, 64, 65, 101, 257, 1025, 2047, 2048, 2049, 8192, 50257]) {
      test(`${title} vocab=${vocab} matches the f64 reference`, async () => {
        for (const rows of [1, 3]) await checkNll(candidate, randomCase(rows, vocab));
      });
    }
    for (const rows of [64, 65, 257]) {
      test(`${title} rows=${rows} matches the f64 reference`, () =>
        checkNll(candidate, randomCase(rows, 101)));
    }
    for (const rows of isSlow ? [] : [GRID_FOLD, GRID_FOLD + 1, 2 * GRID_FOLD + 1]) {
      test(`${title} rows=${rows} matches the f64 reference, over a folded grid`, () =>
        checkNll(candidate, randomCase(rows, 3)));
    }
    test(`${title} pieces of rows land where they belong, what lies around them stays`, async () => {
      await checkNll(candidate, randomCase(65, 101), [], 7);
      await checkNll(candidate, randomCase(65, 101), [1, 33], 7);
    });

    test(`${title} large, distant and equal logits match the f64 reference`, async () => {
      for (const mean of [1e4, -1e4, 1e30]) await checkNll(candidate, randomCase(9, 1025, mean));
      for (const deviation of [0, 1e-3, 100, 1e4, 1e30]) {
        await checkNll(candidate, randomCase(9, 1025, 0, deviation));
      }
    });
    test(`${title} growing and falling logits match the f64 reference`, async () => {
      for (const slope of [0.01, -0.01, 1, -1]) {
        const row = rounded(Float64Array.from({ length: 5000 }, (_, i) => slope * i), "f32");
        await checkNll(candidate, sameRow(row, [0, 1, 2500, 4998, 4999]));
      }
    });
    test(`${title} finds the largest logit wherever it is`, async () => {
      const vocab = 4103;
      const places = [0, 1, 255, 256, 2047, 2048, 4095, 4096, 4102];
      const logits = new Float32Array(places.length * vocab);
      places.forEach((place, row) => logits[row * vocab + place] = 30);
      await checkNll(candidate, { rows: places.length, vocab, logits, targets: Uint32Array.from(places) });
    });
    test(`${title} the largest floats do not overflow`, async () => {
      const largest = 2 ** 127 * (2 - 2 ** -23);
      for (const vocab of [1, 101, 5000]) {
        for (const value of [3e38, -3e38, largest, -largest]) {
          await checkNll(candidate, sameRow(new Float32Array(vocab).fill(value), [0, vocab - 1]));
        }
      }
      const row = new Float32Array(5000).fill(-largest);
      row[4321] = largest;
      await expectExactly(candidate, sameRow(row, [4321, 0]), [0, Infinity]);
      row[4321] = 0;
      await expectExactly(candidate, sameRow(row, [4321, 0]), [0, largest]);
    });

    test(`${title} logits of -inf count for nothing`, async () => {
      for (const vocab of [2, 101, 5000]) {
        const row = new Float32Array(vocab).fill(-Infinity);
        row[vocab >> 1] = -2.5;
        await expectExactly(candidate, sameRow(row, [vocab >> 1, 0]), [0, Infinity]);
        const every = normalArray(3, vocab, 0, 4).map((x, i) => i % 3 === 1 ? -Infinity : x);
        await checkNll(candidate, sameRow(rounded(every, "f32"), [0]));
      }
    });
    test(`${title} a NaN anywhere in a row is that row's result, and no other's`, async () => {
      for (const vocab of [3, 101, 5000]) {
        const c = randomCase(9, vocab);
        for (const at of [0, 1, vocab >> 1, vocab - 1]) {
          const logits = c.logits.slice();
          for (const row of [0, 4, 8]) logits[row * vocab + at] = NaN;
          const clean = await runNll(candidate, c);
          await expectExactly(
            candidate,
            { ...c, logits },
            Array.from(clean, (x, row) => row % 4 === 0 ? NaN : x),
          );
        }
      }
    });
    test(`${title} a row with +inf, or of nothing but -inf, gives nothing finite`, async () => {
      for (const vocab of [3, 101, 5000]) {
        const broken = [0, vocab >> 1, vocab - 1].map((at) => {
          const row = rounded(normalArray(4, vocab), "f32");
          row[at] = Infinity;
          return row;
        });
        for (const row of [...broken, new Float32Array(vocab).fill(-Infinity)]) {
          const values = await runNll(candidate, sameRow(row, [0, vocab >> 1, vocab - 1]));
          for (const value of values) expect(value).not.toBeFinite();
        }
      }
    });
    test(`${title} a target that is no token reads nothing outside its row`, async () => {
      const c = randomCase(3, 101);
      const last = new Uint32Array(3).fill(100);
      const beyond = Uint32Array.of(101, 2 ** 31, 2 ** 32 - 1);
      await expectExactly(candidate, { ...c, targets: beyond }, [
        ...await runNll(candidate, { ...c, targets: last }),
      ]);
    });
    test(`${title}: ten runs are bit-identical`, () => {
      const c = randomCase(9, 50257);
      return expectTenIdenticalRuns(() => runNll(candidate, c));
    });
  }
});
