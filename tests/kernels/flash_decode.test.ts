import { afterAll, describe, expect, test } from "bun:test";
import {
  scoreBlocks,
  scoreVariant,
  selectBlocks,
  type SelectProblem,
} from "../../src/kernels/block_selection/block_selection.ts";
import { type SelectionRule, selectReference } from "../../src/kernels/block_selection/reference.ts";
import { attentionReference } from "../../src/kernels/flash_attention/reference.ts";
import {
  choosingSplitKvAttention,
  choosingSubgroupSplitKvAttention,
  type DecodeBlocks,
  splitKvAttention,
  splitKvCandidates,
  type SplitKvProblem,
  splitKvVariants,
  subgroupSplitKvAttention,
  subgroupSplitKvVariants,
  topkSplitKvCandidates,
  type TopkSplitKvProblem,
} from "../../src/kernels/flash_decode/flash_decode.ts";
import {
  combineReference,
  type PartialAttention,
  partialAttentionReference,
} from "../../src/kernels/flash_decode/reference.ts";
import {
  blocksPerSplit,
  type HeadRange,
  KV_BLOCK,
  MAX_SPLITS,
  packSequence,
  splitCount,
} from "../../src/kernels/shared/shared.ts";
import { packLists } from "../../src/kvcache/block_lists.ts";
import type { BlockLists } from "../../src/kvcache/patterns.ts";
import { openDevice } from "../../src/runtime/device.ts";
import { type Elem, type Op, op, supports } from "../../src/runtime/kernel.ts";
import {
  type AttentionInputs,
  attentionMagnitude,
  type AttentionShape,
  headRanges,
  listsWhere,
  packCache,
  packQueries,
  plainAttention,
  randomInputs,
  scrambledTable,
  seenBy,
  shapeOf,
} from "../support/attention.ts";
import { expectClose, expectSame, expectTenIdenticalRuns, reportErrors } from "../support/compare.ts";
import {
  attentionOps,
  eachElem,
  poison,
  rounded,
  runnable,
  runSteps,
  type Step,
  step,
  type Tensor,
  tensor,
  testDevice,
  titleOf,
} from "../support/device.ts";
import { normalArray, uniformArray } from "../support/random.ts";

const gpu = await testDevice();

type Decode = Op<SplitKvProblem>;

function elemOf({ variant }: Decode): Elem {
  return (variant as { elem: Elem }).elem;
}

/** One query that sees `kvLen` keys, the last of them its own. */
function decodeShape(heads: number, headDim: number, kvLen: number): AttentionShape {
  return shapeOf(heads, headDim, 1, kvLen - 1);
}

function keysOf({ firstPosition }: AttentionShape): number {
  return firstPosition + 1;
}

/** Lists of the heads for so many blocks of queries. */
type Lists = (heads: number, rows: number) => BlockLists[];

const everyBlock: Lists = (heads, rows) => listsWhere(heads, rows, () => true);

function blocksOf(shape: AttentionShape): number {
  return Math.ceil(keysOf(shape) / KV_BLOCK);
}

/** The blocks that a head's new token attends to, ascending. */
function keptBlocks(shape: AttentionShape, lists: Lists, head: number): number[] {
  const rows = blocksOf(shape);
  const { full, partial } = lists(shape.heads, rows)[head]!;
  return [full, partial].flatMap(({ indptr, indices }) => [
    ...indices.subarray(indptr[rows - 1]!, indptr[rows]!),
  ]);
}

/** One sequence of a step. */
interface Decoded {
  readonly given: AttentionInputs;
  readonly shape: AttentionShape;
}

/** A line of `qkv` with keys and values: the last rows of `k` and `v`, which are not in the cache yet. */
function packStep({ given: { q, k, v }, shape }: Decoded): Float64Array {
  const { heads, headDim, firstPosition } = shape;
  const qkv = packQueries(q, shape);
  for (const [third, rows] of [[1, k], [2, v]] as const) {
    const last = { ...shape, firstPosition: 0 };
    const row = Array.from(rows).slice(firstPosition * heads * headDim);
    const packed = packQueries(row, last);
    qkv.set(packed.subarray(0, packed.length / 3), third * packed.length / 3);
  }
  return qkv;
}

/** Each sequence's blocks of a pool that they share, scrambled, and with two blocks that are nobody's. */
function scrambledLines(decoded: readonly Decoded[]): { lines: Uint32Array[]; blocks: number } {
  const counts = decoded.map(({ shape }) => Math.ceil(keysOf(shape) / KV_BLOCK));
  const pool = scrambledTable(counts.reduce((a, b) => a + b) * KV_BLOCK);
  let taken = 0;
  const lines = counts.map((count) => pool.slice(taken, taken += count));
  return { lines, blocks: pool.length };
}

/** The pool with all rows of `which` but the last `held` of each sequence; NaN where there is none. */
function packPool(
  decoded: readonly Decoded[],
  which: "k" | "v",
  { lines, blocks }: { lines: readonly Uint32Array[]; blocks: number },
  range: { first: number; heads: number },
  held: number,
): Float64Array {
  const pools = decoded.map(({ given, shape }, s) => {
    // As long as the pool, because that is how far apart heads are.
    const line = new Uint32Array(blocks);
    line.set(lines[s]!);
    const rows = Array.from(given[which]).slice(0, (keysOf(shape) - held) * shape.heads * shape.headDim);
    return packCache(rows, shape, line, range);
  });
  const all = pools[0]!;
  for (const pool of pools) pool.forEach((x, i) => Number.isNaN(x) || (all[i] = x));
  return all;
}

interface Slices {
  /** `[MAX_SPLITS, heads, headDim4 · 4]`, unnormalised; NaN where no kernel wrote. */
  readonly out: Float32Array;
  /** `[MAX_SPLITS, heads, 2]`: maximum in base 2, sum. */
  readonly ml: Float32Array;
}

/**
 * Runs one step of all sequences, with NaN wherever the kernel has no business: rows of the cache from the
 * new token's on. Checks that the new rows land in the cache and that nothing else of it changes.
 * @param lists what kernels that do not attend to every block do
 * @returns the slices of each sequence
 */
async function runDecode(
  decode: Decode,
  decoded: readonly Decoded[],
  splitHeads = false,
  lists = everyBlock,
): Promise<Slices[]> {
  const elem = elemOf(decode);
  const { heads, headDim, scale } = decoded[0]!.shape;
  const stride = 4 * Math.ceil(headDim / 4);
  const sequences = decoded.length;
  const pool = scrambledLines(decoded);
  const { lines, blocks } = pool;
  const tableBlocks = Math.max(...lines.map((line) => line.length)) + 1;
  const tensors: Record<string, Tensor> = {
    qkv: tensor(elem, decoded.flatMap((one) => Array.from(packStep(one)))),
    block_table: tensor(
      "u32",
      // What is behind a sequence's last block is no block.
      lines.flatMap((line) => Array.from({ length: tableBlocks }, (_, i) => line[i] ?? 0xffffffff)),
    ),
    sequences: tensor(
      "u32",
      decoded.flatMap(({ shape }) =>
        Array.from(packSequence({ length: keysOf(shape) - 1, step: 3, seed: -1 }))
      ),
    ),
    block_lists: tensor("u32", packLists(lists(heads, tableBlocks))),
    selected: tensor(
      "u32",
      decoded.flatMap(({ shape }) =>
        Array.from({ length: heads }, (_, head) => {
          const kept = keptBlocks(shape, lists, head);
          return Array.from({ length: 1 + tableBlocks }, (_, i) =>
            i === 0 ? kept.length : kept[i - 1] ?? 0xffffffff);
        }).flat()
      ),
    ),
    partial_out: poison("f32", sequences * MAX_SPLITS * heads * stride),
    partial_ml: poison("f32", sequences * MAX_SPLITS * heads * 2),
  };
  const wanted: Record<string, Float64Array> = {};
  const steps = headRanges(heads, splitHeads).map((range) => {
    const names = { k: `k${range.first}`, v: `v${range.first}` };
    for (const which of ["k", "v"] as const) {
      tensors[names[which]] = tensor(elem, packPool(decoded, which, pool, range, 1));
      wanted[names[which]] = packPool(decoded, which, pool, range, 0);
    }
    return step(decode, { sequences, blocks, tableBlocks, scale, range }, names);
  });
  const results = await runSteps(gpu, steps, tensors, ["partial_out", "partial_ml", ...Object.keys(wanted)]);
  for (const [name, cache] of Object.entries(wanted)) expectSame(results[name]!, cache);
  return decoded.map(({ shape }, s) => {
    const part = (all: Float32Array) =>
      all.slice(s * all.length / sequences, (s + 1) * all.length / sequences);
    const slices = { out: part(results["partial_out"]!), ml: part(results["partial_ml"]!) };
    expectUntouched(slices, shape, lists);
    return slices;
  });
}

/** The slices that there are were written, of the others only that their sum is 0. */
function expectUntouched({ out, ml }: Slices, shape: AttentionShape, lists: Lists): void {
  const stride = 4 * Math.ceil(shape.headDim / 4);
  for (let head = 0; head < shape.heads; head++) {
    const splits = splitCount(keptBlocks(shape, lists, head).length);
    for (let split = 0; split < MAX_SPLITS; split++) {
      const row = split * shape.heads + head;
      const values = out.subarray(row * stride, (row + 1) * stride);
      const [m, l] = ml.subarray(2 * row, 2 * row + 2);
      const what = `slice ${split} of ${splits}, head ${head}`;
      if (split < splits) expect([what, values.some(Number.isNaN), l! > 0]).toEqual([what, false, true]);
      // One that attends to nothing may write the zeros that it has added up.
      else if (split > 0) {
        expect([what, values.every(Number.isNaN), l, m! < -1e38]).toEqual([what, true, 0, true]);
      } else expect([what, l]).toEqual([what, 0]);
    }
  }
}

/** What the kernel says of one head's slice, with the maximum as a natural exponent. */
function sliceOf({ out, ml }: Slices, { heads, headDim }: AttentionShape, split: number, head: number) {
  const stride = 4 * Math.ceil(headDim / 4);
  const row = split * heads + head;
  return {
    out: Float64Array.from(out.subarray(stride * row, stride * row + headDim)),
    m: ml[2 * row]! * Math.LN2,
    l: ml[2 * row + 1]!,
  };
}

/** The attention `[heads, headDim]` that the slices add up to. */
function merged(slices: Slices, shape: AttentionShape, lists = everyBlock): number[] {
  return Array.from({ length: shape.heads }, (_, head) => {
    const parts = Array.from(
      { length: splitCount(keptBlocks(shape, lists, head).length) },
      (_, split): PartialAttention => sliceOf(slices, shape, split, head),
    );
    return parts.length === 0
      ? new Array<number>(shape.headDim).fill(0)
      : Array.from(combineReference(parts));
  }).flat();
}

/** The result is merged in f64 from slices in f32, so it is never rounded to the stored type. */
function judgedBy({ given, shape }: Decoded, decode: Decode, hard = false) {
  return {
    kernel: decode.kernel.name + (hard ? ", large scores" : ""),
    elem: elemOf(decode),
    stored: "f32",
    magnitude: attentionMagnitude(given, shape, hard)(0),
  } as const;
}

async function checkDecode(
  decode: Decode,
  shape: AttentionShape,
  given = randomInputs(shape, elemOf(decode), shape.firstPosition),
  hard = false,
  lists = everyBlock,
): Promise<void> {
  const one = { given, shape };
  const [slices] = await runDecode(decode, [one], false, lists);
  const sees = seenBy(lists(shape.heads, blocksOf(shape)));
  const wanted = attentionReference(given.q, given.k, given.v, shape, sees);
  const plain = plainAttention(given, shape, sees);
  expectClose(merged(slices!, shape, lists), wanted, plain, judgedBy(one, decode, hard));
}

/**
 * The kernel for subgroups as GPUs run it, in workgroups of several and with several keys a lane, for
 * whatever subgroups the device has.
 */
function severalSubgroups(elem: Elem, heads: number, headDim4: number, blocks: DecodeBlocks): Decode[] {
  const { subgroupMaxSize: subgroup } = gpu.caps;
  if (subgroup === 0) return [];
  const size = { subgroup, maxLanes: 4 * subgroup, maxKeys: 8 };
  const variants = subgroupSplitKvVariants(elem, heads, headDim4, size);
  return runnable(gpu, variants.map((v) => op(subgroupSplitKvAttention[blocks], v)));
}

/** One head's rows of `[rows, heads, headDim]`. */
function headRows(all: ArrayLike<number>, { heads, headDim }: AttentionShape, head: number): Float64Array {
  return Float64Array.from(all).filter((_, i) => Math.floor(i / headDim) % heads === head);
}

describe("flash_decode", () => {
  afterAll(reportErrors);
  eachElem(gpu, (elem) => {
    for (const [heads, headDim] of [[1, 4], [3, 8], [5, 6], [2, 16], [3, 64], [1, 80], [1, 128]] as const) {
      const headDim4 = Math.ceil(headDim / 4);
      // The size of heads has nothing to do with which blocks are walked: two of them are enough for lists.
      const walks = [6, 64].includes(headDim) ? ["all", "listed", "selected"] as const : ["all"] as const;
      const chosen = walks.flatMap((blocks) => {
        const candidates = (unroll: boolean) =>
          splitKvCandidates(elem, heads, headDim4, unroll, MAX_SPLITS, blocks);
        return [
          ...attentionOps(gpu, candidates, headDim4),
          ...severalSubgroups(elem, heads, headDim4, blocks),
        ];
      });
      for (const decode of chosen) {
        test(`${titleOf(decode)} matches the f64 reference`, async () => {
          for (const kvLen of [1, 65, 257, 600]) {
            await checkDecode(decode, decodeShape(heads, headDim, kvLen));
          }
        });
      }
    }

    // What is not about the size of heads is tested with these.
    const smallOf = (blocks: DecodeBlocks) => [
      ...runnable(gpu, splitKvCandidates(elem, 3, 2, false, MAX_SPLITS, blocks)),
      ...severalSubgroups(elem, 3, 2, blocks),
    ];
    const small = smallOf("all");
    for (const decode of small) {
      const title = titleOf(decode);
      for (const kvLen of [1, 2, 63, 64, 65, 97, 128, 129, 257, 1025, 2048, 2049, 5000]) {
        test(`${title} kvLen=${kvLen} matches the f64 reference`, () =>
          checkDecode(decode, decodeShape(3, 8, kvLen)));
      }

      test(`${title}: growing, falling, equal and very large scores match`, async () => {
        const shape = decodeShape(3, 8, 600);
        const { k, v } = randomInputs(shape, elem, 1);
        const ones = new Float32Array(24).fill(1);
        const check = (query: Float32Array, keys: ArrayLike<number>) =>
          checkDecode(decode, shape, { q: query, k: keys, v }, true);
        for (const slope of [0.02, -0.02, 1, -1]) {
          await check(
            ones,
            rounded(Float64Array.from(k, (x, i) => 0.1 * x + slope * Math.floor(i / 24)), elem),
          );
        }
        await check(new Float32Array(24), k);
        const large = (seed: number, rows: number) => rounded(uniformArray(seed, 24 * rows, -100, 100), elem);
        await check(large(2, 1), large(3, 600));
        const constant = new Float32Array(600 * 24).fill(59.5);
        await check(constant.slice(0, 24), constant);
        await check(constant.slice(0, 24).map((x) => -x), constant);
        // One key far above the others, the new token's among them: what the other slices give underflows
        // when merged.
        for (const top of [300, 599]) {
          await check(
            ones,
            rounded(Float64Array.from(k, (x, i) => x + (Math.floor(i / 24) === top ? 200 : 0)), elem),
          );
        }
      });

      test(`${title}: each slice is what its keys alone give`, async () => {
        for (const kvLen of [600, 2049]) {
          const shape = decodeShape(3, 8, kvLen);
          const given = randomInputs(shape, elem, 7);
          const [slices] = await runDecode(decode, [{ given, shape }]);
          // The log-sum-exp is as large as the scores, and is off by their rounding.
          const hardness = attentionMagnitude(given, shape, true)(0);
          const keysPerSplit = blocksPerSplit(blocksOf(shape)) * KV_BLOCK;
          for (let split = 0; split < splitCount(blocksOf(shape)); split++) {
            for (let head = 0; head < 3; head++) {
              const rows = (all: ArrayLike<number>) =>
                headRows(all, shape, head).subarray(8 * keysPerSplit * split, 8 * keysPerSplit * (split + 1));
              const alone = { q: headRows(given.q, shape, head), k: rows(given.k), v: rows(given.v) };
              const wanted = partialAttentionReference(alone.q, alone.k, alone.v, shape.scale);
              const got = sliceOf(slices!, shape, split, head);
              // Which multiple of 2^m the sums are is the kernel's affair; the output and the log-sum-exp are
              // not.
              const lse = ({ m, l }: PartialAttention) => m + Math.log(l);
              expect(Math.abs(lse(got) - lse(wanted))).toBeLessThan(4 * 2 ** -24 * hardness);
              expectClose(
                got.out.map((x) => x / got.l),
                wanted.out.map((x) => x / wanted.l),
                plainAttention(alone, decodeShape(1, 8, alone.k.length / 8)),
                { ...judgedBy({ given, shape }, decode), kernel: "flash_decode slices" },
              );
            }
          }
        }
      });

      test(`${title}: heads in two buffers give the same bits`, async () => {
        const shape = decodeShape(3, 8, 600);
        const one = { given: randomInputs(shape, elem, 13), shape };
        const [together] = await runDecode(decode, [one]);
        const [apart] = await runDecode(decode, [one], true);
        expectSame(apart!.out, together!.out);
        expectSame(apart!.ml, together!.ml);
      });

      test(`${title}: sequences of different lengths give the bits that each gives alone`, async () => {
        const decoded = [600, 1, 65, 2049, 64].map((kvLen): Decoded => {
          const shape = decodeShape(3, 8, kvLen);
          return { given: randomInputs(shape, elem, kvLen), shape };
        });
        for (const splitHeads of [false, true]) {
          const together = await runDecode(decode, decoded, splitHeads);
          for (const [s, one] of decoded.entries()) {
            const [alone] = await runDecode(decode, [one]);
            expectSame(together[s]!.out, alone!.out);
            expectSame(together[s]!.ml, alone!.ml);
          }
        }
      });

      test(`${title}: ten runs are bit-identical`, async () => {
        const shape = decodeShape(3, 8, 1025);
        const one = { given: randomInputs(shape, elem, 1), shape };
        await expectTenIdenticalRuns(async () => (await runDecode(decode, [one]))[0]!.out);
        await expectTenIdenticalRuns(async () => (await runDecode(decode, [one]))[0]!.ml);
      });
    }

    for (const blocks of ["listed", "selected"] as const) {
      for (const [i, decode] of smallOf(blocks).entries()) {
        const title = titleOf(decode);
        test(`${title}: every block gives the bits of dense attention`, async () => {
          const decoded = [600, 1, 64, 65, 2049, 5000].map((kvLen): Decoded => {
            const shape = decodeShape(3, 8, kvLen);
            return { given: randomInputs(shape, elem, kvLen), shape };
          });
          const dense = await runDecode(small[i]!, decoded);
          const sparse = await runDecode(decode, decoded);
          for (const [s, { out, ml }] of dense.entries()) {
            expectSame(sparse[s]!.out, out);
            expectSame(sparse[s]!.ml, ml);
          }
        });

        test(`${title} matches the f64 reference with random blocks, other ones for each head`, async () => {
          for (const share of [0.7, 0.2]) {
            const kept = uniformArray(100 * share, 3 * 4096, 0, 1);
            // What is selected always has the token's own block.
            const lists: Lists = (heads, rows) =>
              listsWhere(
                heads,
                rows,
                (head, row, block) =>
                  (blocks === "selected" && row === block) || kept[1024 * head + 31 * row + block]! < share,
              );
            for (const kvLen of [1, 64, 65, 300, 1025, 2048, 2500]) {
              await checkDecode(decode, decodeShape(3, 8, kvLen), undefined, false, lists);
            }
          }
        });

        test(`${title}: heads in two buffers, and sequences together, give the bits of each alone`, async () => {
          const lists: Lists = (heads, rows) =>
            listsWhere(heads, rows, (head, row, block) => row === block || (block + head) % 3 === 0);
          const decoded = [600, 1, 65, 2049].map((kvLen): Decoded => {
            const shape = decodeShape(3, 8, kvLen);
            return { given: randomInputs(shape, elem, kvLen), shape };
          });
          for (const splitHeads of [false, true]) {
            const together = await runDecode(decode, decoded, splitHeads, lists);
            for (const [s, one] of decoded.entries()) {
              const [alone] = await runDecode(decode, [one], false, lists);
              expectSame(together[s]!.out, alone!.out);
              expectSame(together[s]!.ml, alone!.ml);
            }
          }
        });

        if (blocks === "selected") continue;
        test(`${title}: a token whose own block is left out is appended all the same`, async () => {
          const others: Lists = (heads, rows) =>
            listsWhere(heads, rows, (head, row, block) => row !== block && (row + head) % 2 === 0);
          const none: Lists = (heads, rows) => listsWhere(heads, rows, () => false);
          for (const kvLen of [1, 64, 65, 700]) {
            for (const lists of [others, none]) {
              await checkDecode(decode, decodeShape(3, 8, kvLen), undefined, false, lists);
            }
          }
        });
      }
    }

    test(`${elem} slices merged by the reference give the same in any grouping`, async () => {
      const shape = decodeShape(3, 8, 1025);
      const [slices] = await runDecode(small[0]!, [{ given: randomInputs(shape, elem, 9), shape }]);
      for (let head = 0; head < 3; head++) {
        const parts = Array.from({ length: 17 }, (_, split) => sliceOf(slices!, shape, split, head));
        const halves = [parts.slice(0, 5), parts.slice(5)].map((half): PartialAttention => {
          const m = Math.max(...half.map((part) => part.m));
          const l = half.reduce((sum, part) => sum + part.l * Math.exp(part.m - m), 0);
          return { out: combineReference(half).map((x) => x * l), m, l };
        });
        const all = combineReference(parts);
        combineReference(halves).forEach((x, d) => expect(x).toBeCloseTo(all[d]!, 12));
      }
    });
  });
});

/** Attention that chooses its blocks itself, and the same text walking a list. */
interface Pair {
  readonly choosing: Op<TopkSplitKvProblem>;
  readonly listing: Decode;
}

/** Slices of 1,024 blocks that are all kept have as many as they have room for, where there are 32. */
const CAPACITY = 1024;
/** GPUs run the kernel with subgroups for heads that fill 512 lanes only. */
const CHOOSING_SHAPE = { heads: 2, headDim: gpu.caps.isSoftware ? 8 : 32 };

function choosingPairs(elem: Elem, maxSplits: number): Pair[] {
  const { isSoftware, subgroupMaxSize } = gpu.caps;
  const { heads, headDim } = CHOOSING_SHAPE;
  const headDim4 = headDim / 4;
  const own = { capacity: CAPACITY, unroll: !isSoftware };
  // On software several subgroups, and few blocks a lane: loops over those are unrolled there too.
  const sizes = isSoftware && subgroupMaxSize > 0
    ? [{ subgroup: subgroupMaxSize, maxLanes: 16 * subgroupMaxSize, maxKeys: 8 }]
    : [{ subgroup: 32, maxLanes: 512, maxKeys: 8 }];
  const pairs = [
    ...splitKvVariants(elem, heads, headDim4, own.unroll, maxSplits).map((v): Pair => ({
      choosing: op(choosingSplitKvAttention, { ...v, ...own }),
      listing: op(splitKvAttention.selected, v),
    })),
    ...sizes.flatMap((size) => subgroupSplitKvVariants(elem, heads, headDim4, size, maxSplits)).map((
      v,
    ): Pair => ({
      choosing: op(choosingSubgroupSplitKvAttention, { ...v, ...own }),
      listing: op(subgroupSplitKvAttention.selected, v),
    })),
  ];
  return pairs.filter(({ choosing }) => runnable(gpu, [choosing]).length > 0);
}

interface Cached {
  /** Tokens in the cache. */
  readonly length: number;
  /** Of each head the keys of its blocks for the search; those that have none are not read. */
  readonly keys: readonly (readonly number[])[];
}

type Rule = Omit<SelectionRule, "length">;

function blocksFor(length: number): number {
  return Math.floor(length / KV_BLOCK) + 1;
}

/** By what they are made of: drawing them takes longer than the kernels. */
const drawnRows = new Map<string, Float32Array>();

/** Random rows of some heads, NaN where no sequence has any. */
function randomRows(
  seed: number,
  lengths: readonly number[],
  { lines, blocks }: { lines: readonly Uint32Array[]; blocks: number },
  range: HeadRange,
): Float32Array {
  const { headDim } = CHOOSING_SHAPE;
  const name = `${seed} ${lengths} ${range.first} ${range.heads}`;
  const drawn = drawnRows.get(name);
  if (drawn) return drawn;
  const all = new Float32Array(range.heads * blocks * KV_BLOCK * headDim).fill(NaN);
  for (let h = 0; h < range.heads; h++) {
    const rows = normalArray(seed + range.first + h, blocks * KV_BLOCK * headDim, 0, 1.5);
    for (const [s, line] of lines.entries()) {
      for (const [block, place] of line.entries()) {
        const first = place * KV_BLOCK * headDim;
        const end = first + Math.min(KV_BLOCK, lengths[s]! - block * KV_BLOCK) * headDim;
        all.set(rows.subarray(first, end), h * rows.length + first);
      }
    }
  }
  drawnRows.set(name, all);
  return all;
}

/**
 * Runs both kernels of a pair on caches that hold the same, and checks that they leave the same bits.
 * @param options `keys` and `lists` are what `selected` holds for the one that chooses and the one that walks
 * a list, for so many blocks of the table; `before` are kernels that run before each of them
 * @returns the slices of all sequences
 */
async function expectSamePair(
  { choosing, listing }: Pair,
  lengths: readonly number[],
  rule: Rule,
  { splitHeads = false, lists, keys, before }: {
    readonly splitHeads?: boolean;
    readonly keys: (tableBlocks: number) => ArrayLike<number>;
    readonly lists: (tableBlocks: number) => ArrayLike<number>;
    readonly before?: { readonly choosing: Op<SelectProblem>; readonly listing: Op<SelectProblem> };
  },
): Promise<Float32Array> {
  const { heads, headDim } = CHOOSING_SHAPE;
  const elem = elemOf(listing);
  const { maxSplits } = listing.variant as { maxSplits: number };
  const sequences = lengths.length;
  const counts = lengths.map(blocksFor);
  const table = scrambledTable(counts.reduce((a, b) => a + b) * KV_BLOCK);
  const blocks = table.length;
  const tableBlocks = Math.max(...counts) + 1;
  let taken = 0;
  const lines = counts.map((count) => table.slice(taken, taken += count));
  const tensors: Record<string, Tensor> = {
    // Integers: scores are then exact, in whatever order they are added up.
    qkv: tensor(elem, normalArray(1, sequences * 3 * heads * headDim, 0, 2).map(Math.round)),
    block_table: tensor(
      "u32",
      lines.flatMap((line) => Array.from({ length: tableBlocks }, (_, i) => line[i] ?? 0xffffffff)),
    ),
    sequences: tensor(
      "u32",
      lengths.flatMap((length) => Array.from(packSequence({ length, step: 3, seed: -1 }))),
    ),
  };
  const compared: [string, string][] = [];
  const steps: Step[] = [];
  for (const [who, attend] of [["choosing", choosing], ["listing", listing]] as const) {
    const partials = { partial_out: `partial_out ${who}`, partial_ml: `partial_ml ${who}` };
    const selected = `selected ${who}`;
    tensors[partials.partial_out] = poison("f32", sequences * maxSplits * heads * headDim);
    tensors[partials.partial_ml] = poison("f32", sequences * maxSplits * heads * 2);
    tensors[selected] = tensor("u32", (who === "choosing" ? keys : lists)(tableBlocks));
    for (const range of headRanges(heads, splitHeads)) {
      const names = {
        ...partials,
        selected,
        k: `k${range.first} ${who}`,
        v: `v${range.first} ${who}`,
        summaries: `summaries${range.first} ${who}`,
      };
      const pool = { lines, blocks };
      tensors[names.k] = tensor(elem, randomRows(10, lengths, pool, range));
      tensors[names.v] = tensor(elem, randomRows(20, lengths, pool, range));
      tensors[names.summaries] = tensor(
        elem,
        normalArray(30 + range.first, range.heads * blocks * 2 * headDim, 0, 2).map(Math.round),
      );
      const problem = { sequences, blocks, tableBlocks, range, ...rule };
      if (before) steps.push(step(before[who], problem, names));
      steps.push(step(attend, { ...problem, scale: 0.3 } as TopkSplitKvProblem, names));
      if (who === "choosing") {
        for (const name of ["partial_out", "partial_ml", "k", "v", "summaries"] as const) {
          compared.push([names[name], names[name].replace("choosing", "listing")]);
        }
      }
    }
  }
  const results = await runSteps(gpu, steps, tensors, compared.flat());
  for (const [chosen, listed] of compared) expectSame(results[chosen]!, results[listed]!);
  return results["partial_out choosing"]!;
}

/** The same with keys that are given, and the lists that the reference selects by them. */
function checkChoosing(
  pair: Pair,
  cached: readonly Cached[],
  rule: Rule,
  splitHeads = false,
): Promise<Float32Array> {
  const unread = 0xfffffff0;
  const inLines = (line: (one: Cached, head: number) => readonly number[]) => (tableBlocks: number) =>
    cached.flatMap((one) =>
      one.keys.flatMap((_, head) => {
        const words = line(one, head);
        return Array.from({ length: 1 + tableBlocks }, (_, i) => words[i] ?? unread);
      })
    );
  return expectSamePair(pair, cached.map(({ length }) => length), rule, {
    splitHeads,
    keys: inLines(({ length, keys }, head) => [
      unread,
      ...keys[head]!.map((key, block) => block === 0 || block >= blocksFor(length) - 2 ? unread : key),
    ]),
    lists: inLines(({ length, keys }, head) => {
      const scores = keys[head]!.flatMap((key) => [key, 0]);
      const { chosen } = selectReference([1], scores, { ...rule, length });
      return [chosen.length, ...chosen];
    }),
  });
}

/** Sequences of so many blocks, with keys that the two heads' functions make of numbers in [0, 1). */
function cachedOf(
  blocks: readonly number[],
  keyOf: readonly ((x: number, block: number) => number)[],
): Cached[] {
  return blocks.map((count, s): Cached => ({
    // The last block has no key yet, or some, or all but one.
    length: (count - 1) * KV_BLOCK + [0, 17, 63][s % 3]!,
    keys: keyOf.map((key, head) => Array.from(uniformArray(100 * s + head, count, 0, 1), key)),
  }));
}

const ALWAYS_SPARSE = 0;

describe("flash_decode that chooses its blocks", () => {
  afterAll(() => drawnRows.clear());
  eachElem(gpu, (elem) => {
    // The type has nothing to do with what is chosen: it stands for a number of slices here.
    for (const pair of choosingPairs(elem, elem === "f32" ? MAX_SPLITS : 4)) {
      const title = titleOf(pair.choosing);
      const many = [1, 2, 3, 4, 5, 6, 7, 63, 64, 65, 66, 130];
      const anyKey = (x: number) => 1 + Math.floor(x * (2 ** 32 - 2));

      test(`${title}: any number of blocks, and of those to keep`, async () => {
        const narrow = (x: number) => 0xc0000000 + Math.floor(2 ** 20 * x ** 3);
        const cached = cachedOf(many, [anyKey, narrow]);
        for (const keep of [4, 5, 33, 64, 129]) {
          await checkChoosing(pair, cached, { keep, leastBlocks: ALWAYS_SPARSE });
        }
        await checkChoosing(pair, cached, { keep: 4, leastBlocks: 66 });
      });

      test(`${title}: of equal keys the later`, async () => {
        const levels = (x: number) => 2 ** 30 * (1 + Math.floor(3 * x));
        const cached = [
          cachedOf(many, [() => 2 ** 31, levels]),
          cachedOf(many, [() => 1, () => 2 ** 32 - 1]),
        ];
        for (const keep of [4, 20, 64]) {
          for (const one of cached) await checkChoosing(pair, one, { keep, leastBlocks: ALWAYS_SPARSE });
        }
      });

      test(`${title}: 1,024 blocks, with a few keys far from the others and with rising ones`, async () => {
        const outliers = (x: number) =>
          x < 0.01 ? 2 ** 32 - 1 : x < 0.02 ? 1 : 2 ** 31 + Math.floor(1000 * x);
        const cached = cachedOf([1024], [outliers, (_, block) => 2 ** 31 + block]);
        for (const keep of [64, 1000, 1024]) {
          await checkChoosing(pair, cached, { keep, leastBlocks: ALWAYS_SPARSE });
        }
        // Few blocks are far above their neighbours: groups that are too large miss the smallest one kept.
        const rare = (period: number) => (x: number, block: number) =>
          block % period === 1 ? 2 ** 32 - 1 - block : 2 ** 30 + Math.floor(2 ** 20 * x);
        const sparse = cachedOf([1024], [rare(18), rare(36)]);
        for (const keep of [20, 32, 64, 125]) {
          await checkChoosing(pair, sparse, { keep, leastBlocks: ALWAYS_SPARSE });
        }
      });

      test(`${title}: heads in two buffers, sequences alone, and ten runs give the same bits`, async () => {
        const cached = cachedOf([66, 1, 40], [anyKey, anyKey]);
        const rule = { keep: 31, leastBlocks: ALWAYS_SPARSE };
        const together = await checkChoosing(pair, cached, rule);
        expectSame(await checkChoosing(pair, cached, rule, true), together);
        for (const one of cached) await checkChoosing(pair, [one], rule);
        await expectTenIdenticalRuns(() => checkChoosing(pair, cached, rule));
      });

      test(`${title}: with the kernel that scores, the bits of selecting first`, async () => {
        const { heads, headDim } = CHOOSING_SHAPE;
        const headDim4 = headDim / 4;
        const unroll = false;
        const scoring = scoreVariant(elem, heads, headDim4, { lanes: 64, batch: 2, unroll });
        const selecting = { elem, heads, headDim4, lanes: 64, capacity: CAPACITY, unroll };
        const lengths = [200 * KV_BLOCK, 64 * KV_BLOCK - 1, 0, 70 * KV_BLOCK + 1, 5 * KV_BLOCK];
        const nothing = (tableBlocks: number) => new Uint32Array(lengths.length * heads * (1 + tableBlocks));
        for (const splitHeads of [false, true]) {
          await expectSamePair(pair, lengths, { keep: 16, leastBlocks: 20 }, {
            splitHeads,
            keys: nothing,
            lists: nothing,
            before: { choosing: op(scoreBlocks, scoring), listing: op(selectBlocks, selecting) },
          });
        }
      });
    }
  });
});

describe("flash_decode on other devices", () => {
  test("compiles for subgroups of 32 lanes, as GPUs run it", async () => {
    const none = await openDevice({ nullBackend: true });
    const caps = { ...none.caps, subgroupMinSize: 32, subgroupMaxSize: 32 };
    for (const elem of ["f32", "f16"] as const) {
      for (const headDim4 of [1, 2, 4, 8, 16, 20, 32, 64]) {
        const ops = splitKvCandidates(elem, 12, headDim4, true);
        expect(ops[0]!.kernel.name).toBe("flash_decode/subgroup_split_kv");
        const first = ops.find(({ kernel, variant }) => supports(kernel, variant, caps) === true);
        expect(first!.kernel.name).toBe("flash_decode/subgroup_split_kv");
        await none.pipelines.prepare(first!.kernel, first!.variant);
        for (const capacity of [1024, 8192]) {
          const topk = topkSplitKvCandidates(elem, 12, headDim4, true, MAX_SPLITS, capacity);
          const chosen = topk.find(({ kernel, variant }) => supports(kernel, variant, caps) === true);
          // A lane must not have more than two blocks to choose among.
          const { lanes } = first!.variant as { lanes: number };
          expect(chosen!.kernel.name).toBe(
            `flash_decode/choosing_${capacity <= 2 * lanes ? "subgroup_split_kv" : "split_kv"}`,
          );
          await none.pipelines.prepare(chosen!.kernel, chosen!.variant);
        }
      }
    }
    none.destroy();
  });

  test("runs with the default limits and no subgroups, whatever the head", async () => {
    const none = await openDevice({ nullBackend: true });
    const caps = { ...none.caps, subgroupMinSize: 0, subgroupMaxSize: 0, workgroupBytes: 16384 };
    for (let headDim4 = 1; headDim4 <= 256; headDim4++) {
      const last = splitKvCandidates("f32", 1, headDim4, true).at(-1)!;
      expect(last.kernel).toBe(splitKvAttention.all);
      expect([headDim4, supports(last.kernel, last.variant, caps)]).toEqual([headDim4, true]);
      if (headDim4 > 128) continue;
      const topk = topkSplitKvCandidates("f32", 1, headDim4, true, 4, 2048).at(-1)!;
      expect(topk.kernel).toBe(choosingSplitKvAttention);
      expect([headDim4, supports(topk.kernel, topk.variant, caps)]).toEqual([headDim4, true]);
    }
    none.destroy();
  });
});
