import { afterAll, describe, expect, test } from "bun:test";
import {
  LEAST_KEPT,
  scoreBlocks,
  scoreVariant,
  selectCandidates,
  selectedBytes,
  type SelectProblem,
  subgroupScoreBlocks,
  summarizeCandidates,
  type SummarizeProblem,
  summaryBytes,
} from "../../src/kernels/block_selection/block_selection.ts";
import {
  blockSummaries,
  type SelectionRule,
  selectReference,
} from "../../src/kernels/block_selection/reference.ts";
import { type HeadRange, KV_BLOCK, packSequence } from "../../src/kernels/shared/shared.ts";
import { openDevice } from "../../src/runtime/device.ts";
import { type Elem, type Op, op, sizeOf, supports } from "../../src/runtime/kernel.ts";
import { headRanges, packCache, scrambledTable } from "../support/attention.ts";
import { expectClose, expectSame, expectTenIdenticalRuns, maxAbs, reportErrors } from "../support/compare.ts";
import {
  attentionOps,
  eachElem,
  padRows,
  poison,
  rounded,
  runnable,
  runSteps,
  step,
  type Tensor,
  tensor,
  testDevice,
  titleOf,
} from "../support/device.ts";
import { normalArray, uniformArray } from "../support/random.ts";

const gpu = await testDevice();

interface Heads {
  readonly heads: number;
  readonly headDim: number;
}

function elemOf({ variant }: Op<never>): Elem {
  return (variant as { elem: Elem }).elem;
}

function strideOf({ headDim }: Heads): number {
  return 4 * Math.ceil(headDim / 4);
}

/** Lines of a table for sequences of so many blocks: a scrambled pool that they share, two blocks nobody's. */
function scrambledLines(counts: readonly number[]): { lines: Uint32Array[]; blocks: number } {
  const pool = scrambledTable(counts.reduce((a, b) => a + b) * KV_BLOCK);
  let taken = 0;
  return { lines: counts.map((count) => pool.slice(taken, taken += count)), blocks: pool.length };
}

/** The lines, each as long as the longest and one more; what is behind a sequence's last block is no block. */
function tableOf(lines: readonly Uint32Array[]): { table: Tensor; tableBlocks: number } {
  const tableBlocks = Math.max(...lines.map((line) => line.length)) + 1;
  const entries = lines.flatMap((line) =>
    Array.from({ length: tableBlocks }, (_, i) => line[i] ?? 0xffffffff)
  );
  return { table: tensor("u32", entries), tableBlocks };
}

/** Copies `[heads, count, width]` of a range of heads to blocks of `[heads of the range, blocks, width]`. */
function placeBlocks(
  to: Float64Array | number[],
  from: ArrayLike<number>,
  range: HeadRange,
  { places, blocks, width }: { places: ArrayLike<number>; blocks: number; width: number },
): void {
  for (let h = 0; h < range.heads; h++) {
    for (let b = 0; b < places.length; b++) {
      for (let i = 0; i < width; i++) {
        to[(h * blocks + places[b]!) * width + i] =
          from[((range.first + h) * places.length + b) * width + i]!;
      }
    }
  }
}

/** The same back. */
function blocksAt(
  all: ArrayLike<number>,
  heads: number,
  { places, blocks, width }: { places: ArrayLike<number>; blocks: number; width: number },
): Float64Array {
  const out = new Float64Array(heads * places.length * width);
  for (let h = 0; h < heads; h++) {
    for (let b = 0; b < places.length; b++) {
      for (let i = 0; i < width; i++) {
        out[(h * places.length + b) * width + i] = all[(h * blocks + places[b]!) * width + i]!;
      }
    }
  }
  return out;
}

/** The textbook's two passes over the rows of a column, every operation in f32. */
function plainSummaries(keys: ArrayLike<number>, { heads, headDim }: Heads): Float32Array {
  const { fround } = Math;
  const blocks = keys.length / (heads * headDim * KV_BLOCK);
  const out = new Float32Array(heads * blocks * 2 * headDim);
  for (let h = 0; h < heads; h++) {
    for (let b = 0; b < blocks; b++) {
      for (let d = 0; d < headDim; d++) {
        const key = (i: number) => keys[((b * KV_BLOCK + i) * heads + h) * headDim + d]!;
        let sum = 0;
        for (let i = 0; i < KV_BLOCK; i++) sum = fround(sum + key(i));
        const mean = fround(sum / KV_BLOCK);
        let squares = 0;
        for (let i = 0; i < KV_BLOCK; i++) {
          const deviation = fround(key(i) - mean);
          squares = fround(squares + fround(deviation * deviation));
        }
        const to = (h * blocks + b) * 2 * headDim + d;
        out[to] = mean;
        out[to + headDim] = Math.sqrt(fround(squares / KV_BLOCK));
      }
    }
  }
  return out;
}

/**
 * Judges summaries `[heads, blocks, 2, stride]` of keys `[64 · blocks, heads, headDim]`. Means and spreads
 * are of different sizes. What is added up to a mean is no larger than the largest key, and the root of what
 * is added up to a spread no larger than the largest distance from a mean.
 */
function expectSummaries(got: ArrayLike<number>, keys: ArrayLike<number>, shape: Heads, elem: Elem): void {
  const { heads, headDim } = shape;
  const stride = strideOf(shape);
  const wanted = blockSummaries(keys, heads, headDim);
  const plain = plainSummaries(keys, shape);
  const columns = Array.from(got).filter((_, i) => i % stride < headDim);
  // What pads a row is zeros, and so are their mean and spread.
  expect(Array.from(got).some((x, i) => i % stride >= headDim && x !== 0)).toBe(false);
  const blocks = wanted.length / (heads * 2 * headDim);
  const distance = Float64Array.from(keys, (key, i) => {
    const block = Math.floor(i / (KV_BLOCK * heads * headDim));
    const head = Math.floor(i / headDim) % heads;
    return key - wanted[(head * blocks + block) * 2 * headDim + i % headDim]!;
  });
  for (const [which, name] of ["mean", "spread"].entries()) {
    const part = (all: ArrayLike<number>) =>
      Float64Array.from(all).filter((_, i) => Math.floor(i / headDim) % 2 === which);
    expectClose(part(columns), part(wanted), part(plain), {
      kernel: `block_selection ${name}`,
      elem,
      stored: elem,
      magnitude: maxAbs(which === 0 ? keys : distance),
    });
  }
}

/** Which blocks of each sequence are summarised. */
interface Pieces {
  /** Keys `[tokens, heads, headDim]`. */
  readonly keys: Float32Array;
  readonly pieces: readonly { readonly first: number; readonly count: number }[];
}

/**
 * Summarises, in one dispatch a piece, with NaN for all keys that are not asked for, and checks that nothing
 * else is written.
 * @returns for each sequence the summaries `[heads, blocks asked for, 2, stride]`
 */
async function runSummarize(
  summarize: Op<SummarizeProblem>,
  shape: Heads,
  sequences: readonly Pieces[],
  splitHeads = false,
): Promise<Float64Array[]> {
  const { heads, headDim } = shape;
  const elem = elemOf(summarize);
  const width = 2 * strideOf(shape);
  const rowLength = heads * headDim;
  const { lines, blocks } = scrambledLines(
    sequences.map(({ keys }) => Math.ceil(keys.length / rowLength / KV_BLOCK)),
  );
  const { table, tableBlocks } = tableOf(lines);
  const asked = sequences.map(({ pieces }, s) =>
    pieces.flatMap(({ first, count }) => Array.from(lines[s]!.slice(first, first + count)))
  );
  const tensors: Record<string, Tensor> = { block_table: table };
  const ranges = headRanges(heads, splitHeads);
  const steps = ranges.flatMap((range) => {
    const names = { k: `k${range.first}`, summaries: `summaries${range.first}` };
    const cache = new Float64Array(range.heads * blocks * KV_BLOCK * strideOf(shape)).fill(NaN);
    sequences.forEach(({ keys }, s) => {
      const line = new Uint32Array(blocks);
      line.set(lines[s]!);
      const own = packCache(keys, { ...shape, qLen: 0, firstPosition: 0, scale: 1 }, line, range);
      const blockLength = KV_BLOCK * strideOf(shape);
      for (let h = 0; h < range.heads; h++) {
        for (const block of asked[s]!) {
          const at = (h * blocks + block) * blockLength;
          cache.set(own.subarray(at, at + blockLength), at);
        }
      }
    });
    tensors[names.k] = tensor(elem, cache);
    tensors[names.summaries] = poison(elem, range.heads * blocks * width);
    return sequences.flatMap(({ pieces }, sequence) =>
      pieces.map(({ first: firstBlock, count }) =>
        step(summarize, { blocks, tableBlocks, sequence, firstBlock, count, range }, names)
      )
    );
  });
  const results = await runSteps(gpu, steps, tensors, ranges.map(({ first }) => `summaries${first}`));
  const all = ranges.flatMap(({ first }) => Array.from(results[`summaries${first}`]!));
  const written = new Set(asked.flat());
  const around = all.filter((_, i) => !written.has(Math.floor(i / width) % blocks));
  expectSame(around, new Array<number>(around.length).fill(NaN));
  return asked.map((places) => blocksAt(all, heads, { places, blocks, width }));
}

function randomKeys(seed: number, { heads, headDim }: Heads, tokens: number, elem: Elem): Float32Array {
  return rounded(normalArray(seed, tokens * heads * headDim, 0, 1.5), elem);
}

/** Keys with the same random means in every block, and so much around them. */
function keysAround(seed: number, shape: Heads, mean: number, spread: number, elem: Elem): Float32Array {
  const width = shape.heads * shape.headDim;
  return rounded(normalArray(seed, 3 * KV_BLOCK * width, mean, spread), elem);
}

function wholePiece(keys: Float32Array, { heads, headDim }: Heads): Pieces {
  return { keys, pieces: [{ first: 0, count: Math.floor(keys.length / (heads * headDim * KV_BLOCK)) }] };
}

async function checkSummaries(
  summarize: Op<SummarizeProblem>,
  shape: Heads,
  keys: Float32Array,
): Promise<void> {
  const [got] = await runSummarize(summarize, shape, [wholePiece(keys, shape)]);
  expectSummaries(got!, keys, shape, elemOf(summarize));
}

const HEAD_SHAPES = ([[1, 3], [3, 8], [5, 6], [3, 64], [1, 80], [1, 128], [1, 520]] as const)
  .map(([heads, headDim]): Heads => ({ heads, headDim }));

describe("block_selection/summarize", () => {
  afterAll(reportErrors);
  eachElem(gpu, (elem) => {
    for (const shape of HEAD_SHAPES) {
      const headDim4 = Math.ceil(shape.headDim / 4);
      const candidates = (unroll: boolean) => summarizeCandidates(elem, headDim4, unroll);
      for (const summarize of attentionOps(gpu, candidates, headDim4)) {
        test(`${titleOf(summarize)} heads=${shape.heads} matches the f64 reference`, () =>
          checkSummaries(summarize, shape, randomKeys(1, shape, 3 * KV_BLOCK, elem)));
      }
    }

    const small: Heads = { heads: 3, headDim: 8 };
    for (const summarize of runnable(gpu, summarizeCandidates(elem, 2, false))) {
      const title = titleOf(summarize);
      test(`${title}: means far above the spread, and far below`, async () => {
        for (const [mean, spread] of [[100, 0.01], [100, 1], [-3000, 5], [0.01, 100]] as const) {
          await checkSummaries(summarize, small, keysAround(3, small, mean, spread, elem));
        }
      });

      test(`${title}: a first key, or a last, far from the others`, async () => {
        for (const outlier of [0, KV_BLOCK - 1]) {
          const keys = keysAround(4, small, 10, 0.1, elem);
          for (let i = 0; i < keys.length; i++) {
            if (Math.floor(i / 24) % KV_BLOCK === outlier) keys[i] = -2000;
          }
          await checkSummaries(summarize, small, keys);
        }
      });

      test(`${title}: equal keys have that mean and no spread, exactly`, async () => {
        for (const value of [0, -0.1, 1 / 3, 1000.3]) {
          const keys = rounded(new Float32Array(2 * KV_BLOCK * 24).fill(value), elem);
          const [got] = await runSummarize(summarize, small, [wholePiece(keys, small)]);
          expectSame(got!, Array.from(got!, (_, i) => Math.floor(i / 8) % 2 === 0 ? keys[0]! : 0));
        }
      });

      test(`${title}: nothing but the blocks asked for is read or written`, async () => {
        const sequences = [
          { tokens: 7 * KV_BLOCK, pieces: [{ first: 0, count: 2 }, { first: 4, count: 3 }] },
          { tokens: KV_BLOCK, pieces: [{ first: 0, count: 1 }] },
          { tokens: 5 * KV_BLOCK + 1, pieces: [{ first: 3, count: 1 }] },
          { tokens: 63, pieces: [] },
        ].map(({ tokens, pieces }, s): Pieces => ({ keys: randomKeys(10 + s, small, tokens, elem), pieces }));
        const results = await runSummarize(summarize, small, sequences);
        sequences.forEach(({ keys, pieces }, s) => {
          const blockLength = KV_BLOCK * 24;
          const asked = pieces.flatMap(({ first, count }) =>
            Array.from(keys.subarray(first * blockLength, (first + count) * blockLength))
          );
          expectSummaries(results[s]!, asked, small, elem);
        });
        const apart = await runSummarize(summarize, small, sequences, true);
        apart.forEach((result, s) => expectSame(result, results[s]!));
      });

      test(`${title}: ten runs are bit-identical`, () =>
        expectTenIdenticalRuns(async () => {
          const keys = randomKeys(5, small, 4 * KV_BLOCK, elem);
          return Float32Array.from((await runSummarize(summarize, small, [wholePiece(keys, small)]))[0]!);
        }));
    }
  });
});

/** One sequence of a step. */
interface Given {
  /** Tokens in the cache. */
  readonly length: number;
  /** `[heads, headDim]` */
  readonly query: Float32Array;
  /** Of all blocks but the last, `[heads, blocks, 2, headDim]`. */
  readonly summaries: Float32Array;
  /** Keys of the block before the last, `[64, heads, headDim]`, if that has just become complete. */
  readonly completed: Float32Array | undefined;
}

function randomGiven(
  shape: Heads,
  length: number,
  seed: number,
  elem: Elem,
  { mean = 0, size = 1 }: { readonly mean?: number; readonly size?: number } = {},
): Given {
  const width = shape.heads * shape.headDim;
  const row = Math.floor(length / KV_BLOCK);
  const means = normalArray(seed + 1, row * width * 2, mean, size);
  const spreads = uniformArray(seed + 2, row * width * 2, 0.1 * size, size);
  return {
    length,
    query: rounded(normalArray(seed, width, 0, 1.5), elem),
    summaries: rounded(means.map((x, i) => Math.floor(i / shape.headDim) % 2 === 0 ? x : spreads[i]!), elem),
    completed: length > 0 && length % KV_BLOCK === 0
      ? randomKeys(seed + 3, shape, KV_BLOCK, elem)
      : undefined,
  };
}

type Rule = Omit<SelectionRule, "length">;

/** What no kernel writes to `selected`. */
const UNWRITTEN = 0xfffffff0;

/**
 * Runs one step of all sequences, with NaN wherever the kernel has no business: in summaries of blocks that
 * are not complete, of the one that has just become it, of the first, which needs none, and of nobody's; in
 * keys of all blocks but the one just completed. Checks that nothing is written but `selected` and that one
 * summary, which is judged.
 * @returns for each sequence and head its line of `selected`
 */
async function runStep(
  select: Op<SelectProblem>,
  shape: Heads,
  given: readonly Given[],
  { keep, leastBlocks }: Rule,
  splitHeads = false,
): Promise<Uint32Array[][]> {
  const { heads } = shape;
  const elem = elemOf(select);
  const stride = strideOf(shape);
  const width = 2 * stride;
  const rows = given.map(({ length }) => Math.floor(length / KV_BLOCK));
  const { lines, blocks } = scrambledLines(rows.map((row) => row + 1));
  const { table, tableBlocks } = tableOf(lines);
  const sequences = given.length;
  const lineLength = 1 + tableBlocks;
  const tensors: Record<string, Tensor> = {
    block_table: table,
    qkv: tensor(
      elem,
      given.flatMap(({ query }) => {
        const padded = padRows(query, shape.headDim);
        return [...padded, ...new Array<number>(2 * padded.length).fill(NaN)];
      }),
    ),
    sequences: tensor(
      "u32",
      given.flatMap(({ length }) => Array.from(packSequence({ length, step: 3, seed: -1 }))),
    ),
    selected: tensor("u32", new Uint32Array(sequences * heads * lineLength).fill(UNWRITTEN)),
  };
  const ranges = headRanges(heads, splitHeads);
  const held = new Map<string, Float64Array>();
  const steps = ranges.map((range) => {
    const names = { k: `k${range.first}`, summaries: `summaries${range.first}` };
    const cache = new Float64Array(range.heads * blocks * KV_BLOCK * stride).fill(NaN);
    const summaries = new Float64Array(range.heads * blocks * width).fill(NaN);
    given.forEach((one, s) => {
      const padded = padRows(one.summaries, shape.headDim);
      placeBlocks(summaries, padded, range, { places: lines[s]!.slice(0, -1), blocks, width });
      const missing = [lines[s]![0]!, ...(one.completed ? [lines[s]![rows[s]! - 1]!] : [])];
      for (let h = 0; h < range.heads; h++) {
        for (const block of missing) {
          summaries.fill(NaN, (h * blocks + block) * width, (h * blocks + block + 1) * width);
        }
      }
      if (one.completed) {
        const line = new Uint32Array(blocks).fill(lines[s]![rows[s]! - 1]!);
        const own = packCache(one.completed, { ...shape, qLen: 0, firstPosition: 0, scale: 1 }, line, range);
        own.forEach((x, i) => Number.isNaN(x) || (cache[i] = x));
      }
    });
    held.set(names.summaries, summaries);
    tensors[names.k] = tensor(elem, cache);
    tensors[names.summaries] = tensor(elem, summaries);
    return step(select, { sequences, blocks, tableBlocks, keep, leastBlocks, range }, names);
  });
  const results = await runSteps(gpu, steps, tensors, ["selected", ...held.keys()]);

  const after = ranges.flatMap(({ first }) => Array.from(results[`summaries${first}`]!));
  given.forEach(({ completed }, s) => {
    if (!completed) return;
    const where = { places: lines[s]!.slice(-2, -1), blocks, width };
    expectSummaries(blocksAt(after, heads, where), completed, shape, elem);
    placeBlocks(after, new Array<number>(heads * width).fill(NaN), {
      first: 0,
      heads,
    }, where);
  });
  expectSame(after, ranges.flatMap(({ first }) => Array.from(held.get(`summaries${first}`)!)));

  const words = new Uint32Array(results["selected"]!.slice().buffer);
  return given.map((_, s) =>
    Array.from({ length: heads }, (_, h) => {
      const at = (s * heads + h) * lineLength;
      return words.slice(at, at + lineLength);
    })
  );
}

/**
 * The same for a kernel that lists blocks. Checks that nothing is written behind a list.
 * @returns for each sequence and head the blocks that are listed
 */
async function runSelect(
  select: Op<SelectProblem>,
  shape: Heads,
  given: readonly Given[],
  rule: Rule,
  splitHeads = false,
): Promise<number[][][]> {
  const lines = await runStep(select, shape, given, rule, splitHeads);
  return lines.map((ofHeads) =>
    ofHeads.map((line) => {
      const list = Array.from(line.subarray(1, 1 + line[0]!));
      const behind = Array.from(line.subarray(1 + line[0]!));
      expect(behind).toEqual(new Array<number>(behind.length).fill(UNWRITTEN));
      return list;
    })
  );
}

/** One head's part of what is given, as the reference takes it. */
function headOf({ query, summaries }: Given, { heads, headDim }: Heads, head: number) {
  const length = summaries.length / heads;
  return {
    query: query.subarray(head * headDim, (head + 1) * headDim),
    summaries: summaries.subarray(head * length, (head + 1) * length),
  };
}

/**
 * Says whether a selection could be that of the exact scores. A score adds up 2 · headDim products, in
 * whatever order: each term is rounded at most as often, so the sum is off by less than (2 · headDim + 1) ·
 * 2^-24 of their magnitudes (Higham 2002, section 3.1). A block may be kept in place of another only if their
 * scores are closer than both errors.
 * @returns whether it is the reference's selection
 */
function expectValid(
  chosen: readonly number[],
  given: Given,
  shape: Heads,
  head: number,
  rule: Rule,
): boolean {
  const { query, summaries } = headOf(given, shape, head);
  const { length } = given;
  const { scores, chosen: wanted } = selectReference(query, summaries, { ...rule, length });
  expect(chosen.length).toBe(wanted.length);
  const row = scores.length - 1;
  chosen.forEach((block, i) => {
    if (i > 0 && !(block > chosen[i - 1]!)) {
      throw new Error(`block ${block} is listed behind ${chosen[i - 1]}`);
    }
    if (block > row) throw new Error(`block ${block} is listed of ${row + 1}`);
  });
  const kept = new Set(chosen);
  for (const block of [0, row - 1, row]) {
    if (block >= 0 && !kept.has(block)) throw new Error(`block ${block} of ${row + 1} is not kept`);
  }
  const error = (block: number) => {
    const magnitudes = summaries.subarray(block * 2 * shape.headDim, (block + 1) * 2 * shape.headDim)
      .reduce((sum, x, i) => sum + Math.abs(query[i % shape.headDim]! * x), 0);
    return (2 * shape.headDim + 1) * 2 ** -24 * magnitudes;
  };
  const candidates = Array.from({ length: Math.max(row - 2, 0) }, (_, i) => i + 1);
  const leastKept = Math.min(
    Infinity,
    ...candidates.filter((block) => kept.has(block)).map((block) => scores[block]! + error(block)),
  );
  for (const block of candidates) {
    if (kept.has(block) || scores[block]! - error(block) <= leastKept) continue;
    throw new Error(`block ${block} with score ${scores[block]} is not kept; one below ${leastKept} is`);
  }
  return chosen.every((block, i) => block === wanted[i]);
}

async function checkSelect(
  select: Op<SelectProblem>,
  shape: Heads,
  given: Given,
  rule: Rule,
): Promise<{ chosen: number[][]; same: number }> {
  const [chosen] = await runSelect(select, shape, [given], rule);
  const same = chosen!.filter((list, head) => expectValid(list, given, shape, head, rule)).length;
  return { chosen: chosen!, same };
}

/** The lists of every head when they are the same. */
function expectLists(chosen: readonly number[][], wanted: readonly number[]): void {
  for (const list of chosen) expect(list).toEqual([...wanted]);
}

function numbers(first: number, end: number): number[] {
  return Array.from({ length: end - first }, (_, i) => first + i);
}

/** The same in all tests: each takes software Vulkan a second to compile. */
const CAPACITY = 2048;

const ALWAYS_SPARSE = 0;

/** One vector, those that lanes share evenly and unevenly, and several trips: each takes seconds to compile. */
const SCORED_SHAPES = HEAD_SHAPES.filter(({ headDim }) => [3, 64, 80, 520].includes(headDim));

describe("block_selection/select", () => {
  afterAll(reportErrors);
  eachElem(gpu, (elem) => {
    for (const shape of SCORED_SHAPES) {
      const headDim4 = Math.ceil(shape.headDim / 4);
      for (
        const select of runnable(gpu, selectCandidates(elem, shape.heads, headDim4, CAPACITY, false))
      ) {
        test(`${titleOf(select)} chooses what the reference chooses`, async () => {
          for (const length of [20 * KV_BLOCK, 41 * KV_BLOCK + 17]) {
            const given = randomGiven(shape, length, length, elem);
            await checkSelect(select, shape, given, { keep: 9, leastBlocks: ALWAYS_SPARSE });
          }
        });
      }
    }

    // What is not about the size of heads is tested with these.
    const shape: Heads = { heads: 3, headDim: 8 };
    for (const select of runnable(gpu, selectCandidates(elem, 3, 2, CAPACITY, false))) {
      const title = titleOf(select);

      test(`${title}: any length`, async () => {
        const rule = { keep: 6, leastBlocks: ALWAYS_SPARSE };
        const lengths = [
          ...[0, 1, 63, 64, 65],
          ...[5, 6, 7, 8, 63, 64, 65, 66, 67, 128, 300].flatMap((blocks) =>
            [-1, 0, 1].map((n) => blocks * KV_BLOCK + n)
          ),
        ];
        let same = 0;
        for (const length of lengths) {
          same += (await checkSelect(select, shape, randomGiven(shape, length, length, elem), rule)).same;
        }
        // Random scores are well separated.
        expect(same).toBeGreaterThan(0.99 * shape.heads * lengths.length);
      });

      test(`${title}: any number of blocks to keep`, async () => {
        const given = randomGiven(shape, 100 * KV_BLOCK + 5, 8, elem);
        for (const keep of [LEAST_KEPT, 5, 32, 67, 99, 100, 101, 102, 1000]) {
          await checkSelect(select, shape, given, { keep, leastBlocks: ALWAYS_SPARSE });
        }
      });

      test(`${title}: short sequences keep all`, async () => {
        for (const [blocks, keep, leastBlocks] of [[8, 8, 0], [8, 7, 9], [8, 4, 1000], [1, 4, 0]] as const) {
          const given = randomGiven(shape, blocks * KV_BLOCK - 1, 3, elem);
          const { chosen } = await checkSelect(select, shape, given, { keep, leastBlocks });
          expectLists(chosen, numbers(0, blocks));
        }
        const given = randomGiven(shape, 8 * KV_BLOCK - 1, 3, elem);
        const { chosen } = await checkSelect(select, shape, given, { keep: 7, leastBlocks: 8 });
        expect(chosen.map((list) => list.length)).toEqual([7, 7, 7]);
      });

      test(`${title}: of equal scores the later`, async () => {
        for (const blocks of [30, 200]) {
          const given = randomGiven(shape, blocks * KV_BLOCK - 1, 3, elem);
          const none = { ...given, query: new Float32Array(24) };
          for (const keep of [4, 12, blocks - 1]) {
            const { chosen } = await checkSelect(select, shape, none, { keep, leastBlocks: ALWAYS_SPARSE });
            expectLists(chosen, [0, ...numbers(blocks - keep + 1, blocks)]);
          }
        }
      });

      test(`${title}: equal scores among larger and smaller ones`, async () => {
        const blocks = 150;
        const given = randomGiven(shape, blocks * KV_BLOCK - 1, 3, elem);
        // Every fifth block is above the others, every other fifth below; the rest are 0, of either sign.
        const level = (block: number) =>
          block % 5 === 1 ? 1 : block % 5 === 3 ? -1 : block % 2 === 0 ? 0 : -0;
        const summaries = given.summaries.map((_, i) => {
          const block = Math.floor(i / 16) % (blocks - 1);
          return Math.floor(i / 8) % 2 === 0 ? level(block) : 0;
        });
        const levels = { ...given, query: new Float32Array(24).fill(1), summaries };
        const chosenByScore = numbers(1, blocks - 2).sort((a, b) => level(b) - level(a) || b - a);
        for (const keep of [4, 20, 33, 34, 60, 115, 140]) {
          const { chosen } = await checkSelect(select, shape, levels, { keep, leastBlocks: ALWAYS_SPARSE });
          const wanted = [0, blocks - 2, blocks - 1, ...chosenByScore.slice(0, keep - 3)];
          expectLists(chosen, wanted.sort((a, b) => a - b));
        }
      });

      test(`${title}: scores of any size and sign`, async () => {
        const rule = { keep: 20, leastBlocks: ALWAYS_SPARSE };
        const length = 120 * KV_BLOCK + 30;
        const large = elem === "f16" ? 2 ** 14 : 2 ** 100;
        for (const [mean, size] of [[0, 1e-3], [-50, 1], [50, 1], [0, large], [100, 0.01]] as const) {
          const given = randomGiven(shape, length, 21, elem, { mean, size });
          await checkSelect(select, shape, given, rule);
          await checkSelect(select, shape, { ...given, query: given.query.map(Math.abs) }, rule);
          await checkSelect(select, shape, { ...given, query: given.query.map((x) => -Math.abs(x)) }, rule);
        }
        // One score so large that all others are next to each other.
        const given = randomGiven(shape, length, 22, elem);
        const outlier = given.summaries.map((x, i) => Math.floor(i / 16) % 120 === 70 ? large : x);
        const { chosen } = await checkSelect(select, shape, { ...given, summaries: outlier }, rule);
        expect(chosen.every((list) => list.length === 20)).toBe(true);
      });

      test(`${title}: heads in two buffers, and sequences together, choose what each alone does`, async () => {
        const rule = { keep: 10, leastBlocks: 12 };
        const lengths = [100 * KV_BLOCK + 3, 1, 64, 64 * KV_BLOCK, 0, 11 * KV_BLOCK, 300 * KV_BLOCK - 1, 63];
        const given = lengths.map((length) => randomGiven(shape, length, length, elem));
        const together = await runSelect(select, shape, given, rule);
        expect(await runSelect(select, shape, given, rule, true)).toEqual(together);
        for (const [s, one] of given.entries()) {
          const { chosen } = await checkSelect(select, shape, one, rule);
          expect(chosen).toEqual(together[s]!);
        }
      });

      test(`${title}: 1,100 blocks`, async () => {
        for (const [n, keep] of [[-1, 64], [0, 1000], [1, 128]] as const) {
          const given = randomGiven(shape, 1100 * KV_BLOCK + n, keep, elem);
          await checkSelect(select, shape, given, { keep, leastBlocks: ALWAYS_SPARSE });
        }
      });

      test(`${title}: ten runs are identical`, async () => {
        const given = [260 * KV_BLOCK, 70 * KV_BLOCK + 1].map((n) => randomGiven(shape, n, n, elem));
        await expectTenIdenticalRuns(async () =>
          Float32Array.from((await runSelect(select, shape, given, { keep: 31, leastBlocks: 0 })).flat(2))
        );
      });
    }
  });
});

/** The score that a key stands for. */
function scoreOfKey(key: number): number {
  const bits = key >= 2 ** 31 ? key - 2 ** 31 : ~key >>> 0;
  return new Float32Array(Uint32Array.of(bits).buffer)[0]!;
}

/** The sum over columns in order, every operation in f32. */
function plainScore(query: ArrayLike<number>, summary: ArrayLike<number>): number {
  const { fround, abs } = Math;
  const headDim = query.length;
  let sum = 0;
  for (let d = 0; d < headDim; d++) {
    sum = fround(sum + fround(query[d]! * summary[d]!));
    sum = fround(sum + fround(abs(query[d]!) * summary[headDim + d]!));
  }
  return sum;
}

/** Runs one step and judges the scores of all blocks that have one; nothing else may be written. */
async function checkScores(
  score: Op<SelectProblem>,
  shape: Heads,
  given: readonly Given[],
  rule: Rule,
  splitHeads = false,
): Promise<Uint32Array[][]> {
  const lines = await runStep(score, shape, given, rule, splitHeads);
  for (const [s, one] of given.entries()) {
    const row = Math.floor(one.length / KV_BLOCK);
    const isDense = row < rule.keep || row + 1 < rule.leastBlocks;
    const scored = isDense ? [] : numbers(1, row - 1);
    for (const [head, line] of lines[s]!.entries()) {
      const others = Array.from(line).filter((_, i) => !scored.includes(i - 1));
      expect(others).toEqual(new Array<number>(others.length).fill(UNWRITTEN));
      if (scored.length === 0) continue;
      const { query, summaries } = headOf(one, shape, head);
      const { scores } = selectReference(query, summaries, { ...rule, length: one.length });
      const width = 2 * shape.headDim;
      const summary = (block: number) => summaries.subarray(block * width, (block + 1) * width);
      const magnitudes = scored.map((block) =>
        summary(block).reduce((sum, x, i) => sum + Math.abs(query[i % shape.headDim]! * x), 0)
      );
      expectClose(
        scored.map((block) => scoreOfKey(line[1 + block]!)),
        scored.map((block) => scores[block]!),
        scored.map((block) => plainScore(query, summary(block))),
        { kernel: score.kernel.name, elem: elemOf(score), stored: "f32", magnitude: Math.max(...magnitudes) },
      );
    }
  }
  return lines;
}

/**
 * Kernels as GPUs run them, several lanes for a block and several blocks a lane, for workgroups that software
 * Vulkan compiles; the one for subgroups for whatever subgroups the device has.
 */
function severalLanes(elem: Elem, { heads, headDim }: Heads): Op<SelectProblem>[] {
  const { subgroupMaxSize: subgroup } = gpu.caps;
  const headDim4 = Math.ceil(headDim / 4);
  const variant = (lanes: number, mostRowLanes: number) => {
    const v = scoreVariant(elem, heads, headDim4, { lanes, batch: 2, unroll: false });
    return { ...v, rowLanes: Math.min(v.rowLanes, mostRowLanes), vectors: Math.min(v.vectors, 2) };
  };
  return runnable(gpu, [
    op(scoreBlocks, variant(64, 32)),
    ...(subgroup > 0 ? [op(subgroupScoreBlocks, { ...variant(4 * subgroup, subgroup), subgroup })] : []),
  ]);
}

describe("block_selection/score", () => {
  afterAll(reportErrors);
  eachElem(gpu, (elem) => {
    const gpuCandidates = ({ heads, headDim }: Heads) =>
      gpu.caps.isSoftware
        ? []
        : runnable(gpu, selectCandidates(elem, heads, Math.ceil(headDim / 4), CAPACITY, true));
    for (const shape of SCORED_SHAPES) {
      for (const score of [...severalLanes(elem, shape), ...gpuCandidates(shape)]) {
        test(`${titleOf(score)} heads=${shape.heads} matches the f64 reference`, async () => {
          const given = [20 * KV_BLOCK, 41 * KV_BLOCK + 17].map((n) => randomGiven(shape, n, n, elem));
          await checkScores(score, shape, given, { keep: 9, leastBlocks: ALWAYS_SPARSE });
        });
      }
    }

    const shape: Heads = { heads: 3, headDim: 8 };
    for (const score of [...severalLanes(elem, shape), ...gpuCandidates(shape)]) {
      const title = titleOf(score);

      test(`${title}: any length`, async () => {
        const lengths = [
          ...[0, 1, 63, 64, 65],
          ...[4, 5, 6, 31, 32, 33, 63, 64, 65, 66, 67, 128, 300].flatMap((blocks) =>
            [-1, 0, 1].map((n) => blocks * KV_BLOCK + n)
          ),
        ];
        for (const length of lengths) {
          const given = randomGiven(shape, length, length, elem);
          await checkScores(score, shape, [given], { keep: LEAST_KEPT, leastBlocks: ALWAYS_SPARSE });
        }
      });

      test(`${title}: short sequences get no scores`, async () => {
        for (const [blocks, keep, leastBlocks] of [[8, 8, 0], [8, 7, 9], [8, 4, 1000], [8, 7, 8]] as const) {
          const given = randomGiven(shape, blocks * KV_BLOCK - 1, 3, elem);
          await checkScores(score, shape, [given], { keep, leastBlocks });
        }
      });

      test(`${title}: scores of any size and sign, and one key for both zeros`, async () => {
        const rule = { keep: 20, leastBlocks: ALWAYS_SPARSE };
        const large = elem === "f16" ? 2 ** 14 : 2 ** 100;
        for (const [mean, size] of [[0, 1e-3], [-50, 1], [50, 1], [0, large], [100, 0.01]] as const) {
          const given = randomGiven(shape, 50 * KV_BLOCK + 30, 21, elem, { mean, size });
          await checkScores(score, shape, [given], rule);
        }
        const given = randomGiven(shape, 50 * KV_BLOCK + 30, 22, elem);
        const zeros = given.summaries.map((_, i) => Math.floor(i / 16) % 2 === 0 ? 0 : -0);
        const lines = await checkScores(score, shape, [{ ...given, summaries: zeros }], rule);
        expect(new Set(lines[0]![0]!.subarray(2, 50))).toEqual(new Set([2 ** 31]));
      });

      test(`${title}: heads in two buffers, and sequences together, give the bits of each alone`, async () => {
        const rule = { keep: 10, leastBlocks: 12 };
        const lengths = [100 * KV_BLOCK + 3, 1, 64, 64 * KV_BLOCK, 0, 11 * KV_BLOCK, 300 * KV_BLOCK - 1, 63];
        const given = lengths.map((length) => randomGiven(shape, length, length, elem));
        const together = await checkScores(score, shape, given, rule);
        expect(await checkScores(score, shape, given, rule, true)).toEqual(together);
        for (const [s, one] of given.entries()) {
          const [alone] = await checkScores(score, shape, [one], rule);
          alone!.forEach((line, head) => expect(line).toEqual(together[s]![head]!.slice(0, line.length)));
        }
      });

      test(`${title}: 1,100 blocks, ten times with the same bits`, async () => {
        const given = [1100 * KV_BLOCK, 70 * KV_BLOCK + 1].map((n) => randomGiven(shape, n, n, elem));
        const rule = { keep: 31, leastBlocks: ALWAYS_SPARSE };
        await checkScores(score, shape, given, rule);
        await expectTenIdenticalRuns(async () =>
          Float32Array.from((await runStep(score, shape, given, rule)).flat().flatMap((line) => [...line]))
        );
      });
    }
  });
});

describe("block_selection on other devices", () => {
  const headDims4 = [1, 2, 3, 4, 5, 16, 20, 32, 64, 128];

  test("all variants compile, as GPUs run them too", async () => {
    const none = await openDevice({ nullBackend: true });
    const caps = { ...none.caps, subgroupMinSize: 32, subgroupMaxSize: 32 };
    const problems: string[] = [];
    for (const elem of ["f32", "f16"] as const) {
      for (const headDim4 of headDims4) {
        for (const unroll of [true, false]) {
          const ops: Op<never>[] = [16, 1024, 8192].flatMap((capacity) =>
            selectCandidates(elem, 12, headDim4, capacity, unroll)
          );
          ops.push(...summarizeCandidates(elem, headDim4, unroll));
          for (const one of ops) {
            const verdict = supports(one.kernel, one.variant, caps);
            const error = await none.pipelines.prepare(one.kernel, one.variant)
              .then(() => undefined, (e: unknown) => e);
            if ((verdict === true) !== (error === undefined)) {
              problems.push(`${titleOf(one)}: supports() says ${verdict}, compiling says ${error}`);
            }
          }
          const first = ops.find(({ kernel, variant }) => supports(kernel, variant, caps) === true)!;
          expect(first.kernel.name).toBe(`block_selection/${unroll ? "subgroup_score" : "select"}`);
        }
      }
    }
    expect(problems).toEqual([]);
    none.destroy();
  });

  test("run with the default limits and no subgroups, whatever the head", async () => {
    const none = await openDevice({ nullBackend: true });
    const caps = {
      ...none.caps,
      subgroupMinSize: 0,
      subgroupMaxSize: 0,
      workgroupBytes: 16384,
      workgroupInvocations: 256,
    };
    for (let headDim4 = 1; headDim4 <= 128; headDim4++) {
      const last = [
        selectCandidates("f32", 1, headDim4, 1024, true).at(-1)!,
        selectCandidates("f32", 1, headDim4, 1024, false).at(-1)!,
        summarizeCandidates("f32", headDim4, true).at(-1)!,
      ] as Op<never>[];
      for (const { kernel, variant } of last) {
        expect([headDim4, supports(kernel, variant, caps)]).toEqual([headDim4, true]);
      }
    }
    none.destroy();
  });

  test("say how many bytes they need", () => {
    for (const elem of ["f32", "f16"] as const) expect(summaryBytes(elem, 16)).toBe(2 * 64 * sizeOf(elem));
    expect(selectedBytes(2, 3, 10)).toBe(4 * 2 * 3 * 11);
  });
});
