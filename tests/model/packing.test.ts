/** Where the documents of a pack lie, and what its rows attend to. */
import { describe, expect, test } from "bun:test";
import { segmentSumReference } from "../../src/kernels/segment_sum/reference.ts";
import { KV_BLOCK } from "../../src/kernels/shared/shared.ts";
import {
  branchRows,
  documentPlaces,
  documentSegments,
  meanSums,
  packedRows,
} from "../../src/model/packing.ts";
import { normalArray, uniformArray } from "../support/random.ts";

/** Lengths around the end of a block, and a few blocks. */
const LENGTHS = [1, 63, 64, 65, 127, 128, 129, 300];

/** `count` whole numbers from `least` to `most`. */
function randomInts(seed: number, count: number, least: number, most: number): number[] {
  return Array.from(uniformArray(seed, count, least, most + 1), Math.floor);
}

/** What a row of a pack attends to, as `flash_attention/walk_segments.wgsl` reads it. */
interface Segment {
  readonly sharedFirst: number;
  readonly sharedEnd: number;
  readonly ownFirst: number;
  readonly start: number;
}

function segmentOf(segments: Uint32Array, row: number): Segment {
  const [sharedFirst, sharedEnd, ownFirst, start] = segments.subarray(4 * row, 4 * row + 4);
  return { sharedFirst: sharedFirst!, sharedEnd: sharedEnd!, ownFirst: ownFirst!, start: start! };
}

/** The places that a row at place `p` sees. */
function seenFrom({ sharedFirst, sharedEnd, start }: Segment, p: number): number[] {
  const range = (from: number, end: number) => Array.from({ length: end - from }, (_, i) => from + i);
  return [...range(sharedFirst, sharedEnd), ...range(start, p + 1)];
}

/**
 * The rules of `flash_attention/walk_segments.wgsl` for rows at the places from `first` on: throws what breaks one, as a
 * matcher for each word of each row takes seconds.
 */
function checkRules(segments: Uint32Array, first: number): void {
  const rows = segments.length / 4;
  const check = (row: number, rule: string, isKept: boolean) => {
    if (isKept) return;
    throw new Error(
      `row ${row} at place ${first + row}: ${JSON.stringify(segmentOf(segments, row))}, ${rule}`,
    );
  };
  check(0, "rows begin and end with blocks", first % KV_BLOCK === 0 && rows % KV_BLOCK === 0);
  for (let row = 0; row < rows; row++) {
    const { sharedFirst, sharedEnd, ownFirst, start } = segmentOf(segments, row);
    const group = segmentOf(segments, row - row % KV_BLOCK);
    check(row, "one shared_first a group", sharedFirst === group.sharedFirst);
    check(row, "one shared_end a group", sharedEnd === group.sharedEnd);
    check(row, "one own_first a group", ownFirst === group.ownFirst);
    check(row, "shared_first begins a block", sharedFirst % KV_BLOCK === 0);
    check(row, "own_first begins a block", ownFirst % KV_BLOCK === 0);
    check(row, "shared_first <= shared_end <= own_first", sharedFirst <= sharedEnd && sharedEnd <= ownFirst);
    check(row, "own_first <= start <= p", ownFirst <= start && start <= first + row);
    check(row, "start is own_first where nothing is shared", sharedEnd > sharedFirst || start === ownFirst);
  }
}

test("documents begin with blocks of the cache, one behind the other", () => {
  expect([0, 1, 63, 64, 65, 128, 129].map(packedRows)).toEqual([0, 64, 64, 64, 128, 128, 192]);
  expect(documentPlaces([])).toEqual([0]);
  expect(documentPlaces([1])).toEqual([0, 64]);
  expect(documentPlaces([64, 65, 1, 300])).toEqual([0, 64, 192, 256, 576]);
});

describe("segments", () => {
  test("of documents: every row sees its document up to itself, and keeps the rules of the kernel", () => {
    for (const lengths of [LENGTHS, ...packs(1)]) {
      const places = documentPlaces(lengths);
      const segments = documentSegments(places);
      expect(segments).toHaveLength(4 * places.at(-1)!);
      checkRules(segments, 0);
      lengths.forEach((length, i) => {
        const first = places[i]!;
        for (const row of [0, length - 1, packedRows(length) - 1]) {
          const seen = seenFrom(segmentOf(segments, first + row), first + row);
          expect(seen).toEqual(Array.from({ length: row + 1 }, (_, key) => first + key));
        }
      });
    }
    expect(documentSegments([0])).toHaveLength(0);
  });

  test("of branches: every row sees its document and its own branch, and keeps the rules", () => {
    const branchLengths = [[1], [0, 3, 0], [70, 1, 64], [20, 20, 24], [0, 1, 2, 63, 5]];
    for (const branches of [...branchLengths, ...packs(2)]) {
      for (const lengths of [[1], [64, 65], LENGTHS]) {
        const places = documentPlaces(lengths);
        const behind = places.at(-1)!;
        const { rows, segments, firstRows } = branchRows(places, lengths, branches);
        const total = branches.reduce((sum, length) => sum + length, 0);
        expect(rows).toBe(lengths.length * packedRows(total));
        expect(segments).toHaveLength(4 * rows);
        checkRules(segments, behind);
        expect(firstRows).toHaveLength(lengths.length * branches.length);
        const taken = new Set<number>();
        lengths.forEach((length, i) =>
          branches.forEach((branch, l) => {
            const first = firstRows[i * branches.length + l]!;
            for (let j = 0; j < branch; j++) {
              taken.add(first + j);
            }
            for (const j of branch > 0 ? [0, branch - 1] : []) {
              const seen = seenFrom(segmentOf(segments, first + j), behind + first + j);
              expect(seen).toEqual([
                ...Array.from({ length }, (_, key) => places[i]! + key),
                ...Array.from({ length: j + 1 }, (_, key) => behind + first + key),
              ]);
            }
          })
        );
        expect(taken.size).toBe(lengths.length * total);
        // Those that fill a block see no branch.
        for (let row = 0; row < rows; row++) {
          if (!taken.has(row)) expect(segmentOf(segments, row).start).toBe(behind + row);
        }
      }
    }
  });

  test("of branches that have no rows are none", () => {
    expect(branchRows([0, 64, 128], [1, 64], [0, 0])).toEqual({
      rows: 0,
      segments: new Uint32Array(0),
      firstRows: [0, 0, 0, 0],
    });
  });
});

describe("the sums for means", () => {
  const WIDTH = 3;

  test("of sums of blocks are the means of the beginnings", () => {
    for (const lengths of [LENGTHS, ...packs(3)]) {
      const places = documentPlaces(lengths);
      const x = normalArray(places.at(-1)!, places.at(-1)! * WIDTH);
      const beginnings = lengths.map((length, i) => beginningsOf(length, i));
      const { pieces, means } = meanSums(places, beginnings);
      const sums = rowsOf(segmentSumReference(x, pieces, WIDTH));
      const got = segmentSumReference(sums, means, WIDTH);
      const wanted = beginnings.flatMap((own, i) =>
        own.map((length) => {
          const mean = new Float64Array(WIDTH);
          for (let row = places[i]!; row < places[i]! + length; row++) {
            for (let c = 0; c < WIDTH; c++) mean[c]! += x[row * WIDTH + c]! / length;
          }
          return mean;
        })
      );
      expect([...got.keys()]).toEqual(wanted.map((_, row) => row));
      // In f64: as many roundings of numbers of a few units as there are terms.
      wanted.forEach((mean, row) =>
        mean.forEach((value, c) => expect(got.get(row)![c]).toBeCloseTo(value, 12))
      );
    }
  });

  test("are of rows of one block each, in the order in which chunks have them", () => {
    const places = documentPlaces(LENGTHS);
    const { pieces, means } = meanSums(places, LENGTHS.map(beginningsOf));
    for (const { first, rows } of pieces) {
      expect(rows).toBeGreaterThan(0);
      expect(Math.floor((first + rows - 1) / KV_BLOCK)).toBe(Math.floor(first / KV_BLOCK));
    }
    const firsts = pieces.map(({ first }) => first);
    expect(firsts).toEqual(firsts.toSorted((a, b) => a - b));
    expect(pieces.map(({ row }) => row).toSorted((a, b) => a - b)).toEqual(pieces.map((_, row) => row));
    // Each sum of a block is in one mean.
    const used = means.flatMap(({ first, rows }) => Array.from({ length: rows }, (_, i) => first + i));
    expect(used).toEqual(pieces.map((_, row) => row));
  });
});

/** Random packs, of one to twelve documents of up to 400 tokens. */
function packs(seed: number): number[][] {
  return Array.from({ length: 20 }, (_, i) => {
    const [count] = randomInts(100 * seed + i, 1, 1, 12);
    return randomInts(100 * seed + i + 50, count!, 1, i % 2 ? 80 : 400);
  });
}

/** One to three lengths up to that of the document, increasing. */
function beginningsOf(length: number, seed: number): number[] {
  return [...new Set([...randomInts(seed, seed % 3, 1, length), length])].toSorted((a, b) => a - b);
}

/** Rows by number as one array. */
function rowsOf(rows: Map<number, Float64Array>): Float64Array {
  const width = rows.values().next().value?.length ?? 0;
  const all = new Float64Array(rows.size * width).fill(NaN);
  for (const [row, values] of rows) all.set(values, row * width);
  return all;
}
