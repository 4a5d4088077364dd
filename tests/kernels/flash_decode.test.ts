import { afterAll, describe, expect, test } from "bun:test";
import { attentionReference } from "../../src/kernels/flash_attention/reference.ts";
import {
  type DecodeBlocks,
  splitKvAttention,
  splitKvCandidates,
  type SplitKvProblem,
  subgroupSplitKvAttention,
  subgroupSplitKvVariants,
} from "../../src/kernels/flash_decode/flash_decode.ts";
import {
  combineReference,
  type PartialAttention,
  partialAttentionReference,
} from "../../src/kernels/flash_decode/reference.ts";
import {
  blocksPerSplit,
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
  step,
  type Tensor,
  tensor,
  testDevice,
  titleOf,
} from "../support/device.ts";
import { uniformArray } from "../support/random.ts";

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
      const chosen = (["all", "listed", "selected"] as const).flatMap((blocks) => {
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
    }
    none.destroy();
  });
});
