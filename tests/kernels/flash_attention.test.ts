import { afterAll, describe, test } from "bun:test";
import {
  ATTENTION_ROWS,
  attentionCandidates,
  type AttentionWalk,
  type FlashAttentionProblem,
} from "../../src/kernels/flash_attention/flash_attention.ts";
import { attentionReference } from "../../src/kernels/flash_attention/reference.ts";
import { KV_BLOCK } from "../../src/kernels/shared/shared.ts";
import { packLists } from "../../src/kvcache/block_lists.ts";
import type { BlockLists } from "../../src/kvcache/patterns.ts";
import type { Elem, Op } from "../../src/runtime/kernel.ts";
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
  padRows,
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
  readonly attention: Op<FlashAttentionProblem>;
  readonly elem: Elem;
  /** For kernels that walk lists: those of the heads for so many blocks of queries; every block when left out. */
  readonly lists?: (heads: number, rows: number) => readonly BlockLists[];
}

/** The lists of a case over a shape, which sees every block unless the case says otherwise. */
function listsOf({ lists }: Case, { heads, qLen, firstPosition }: AttentionShape): readonly BlockLists[] {
  const rows = Math.ceil((firstPosition + qLen) / KV_BLOCK);
  return lists ? lists(heads, rows) : listsWhere(heads, rows, () => true);
}

/** Runs with NaN wherever the kernel has no business: keys past the last, rows past `qLen`, the K and V of `qkv`. */
async function runAttention(
  c: Case,
  { q, k, v }: AttentionInputs,
  shape: AttentionShape,
  splitHeads = false,
): Promise<Float32Array> {
  const { attention, elem } = c;
  const { heads, headDim, qLen, firstPosition, scale } = shape;
  const stride = 4 * Math.ceil(headDim / 4);
  const table = scrambledTable(firstPosition + qLen);
  const tensors: Record<string, Tensor> = {
    qkv: tensor(elem, thenNan(packQueries(q, shape), ATTENTION_ROWS * 3 * heads * stride)),
    block_table: tensor("u32", table),
    block_lists: tensor("u32", packLists(listsOf(c, shape))),
    out: poison(elem, qLen * heads * stride),
  };
  const steps = headRanges(heads, splitHeads).map((range) => {
    const names = { k: `k${range.first}`, v: `v${range.first}` };
    tensors[names.k] = tensor(elem, packCache(k, shape, table, range));
    tensors[names.v] = tensor(elem, packCache(v, shape, table, range));
    return step(attention, { qLen, firstPosition, blocks: table.length, range, scale }, names);
  });
  const { out } = await runSteps(gpu, steps, tensors, ["out"]);
  return out;
}

/** @param hard whether scores are so large that their rounding decides the weights */
async function checkAttention(
  c: Case,
  shape: AttentionShape,
  given = randomInputs(shape, c.elem, shape.qLen),
  hard = false,
): Promise<void> {
  const { heads, headDim } = shape;
  const sees = seenBy(listsOf(c, shape));
  const wanted = padRows(attentionReference(given.q, given.k, given.v, shape, sees), headDim);
  const plain = padRows(plainAttention(given, shape, sees), headDim);
  expectClose(await runAttention(c, given, shape), wanted, plain, {
    kernel: c.attention.kernel.name + (hard ? ", large scores" : ""),
    elem: c.elem,
    stored: c.elem,
    magnitude: attentionMagnitude(given, shape, hard),
    rowLength: heads * 4 * Math.ceil(headDim / 4),
  });
}

describe("flash_attention", () => {
  afterAll(reportErrors);
  eachElem(gpu, (elem) => {
    for (const [heads, headDim] of [[1, 4], [3, 8], [5, 6], [3, 64], [1, 80], [1, 128]] as const) {
      const headDim4 = Math.ceil(headDim / 4);
      const candidates = (unroll: boolean) => attentionCandidates(elem, heads, headDim4, unroll);
      const sparse = (unroll: boolean) => attentionCandidates(elem, heads, headDim4, unroll, "lists");
      // The size of heads has nothing to do with which blocks are walked: two of them are enough for lists.
      const walks = [6, 64].includes(headDim) ? [candidates, sparse] : [candidates];
      const chosen = walks.flatMap((some) => attentionOps(gpu, some, headDim4));
      for (const attention of chosen) {
        test(`${titleOf(attention)} matches the f64 reference`, async () => {
          const c = { attention, elem };
          for (const qLen of [1, 33, 65]) await checkAttention(c, shapeOf(heads, headDim, qLen, 0));
          await checkAttention(c, shapeOf(heads, headDim, 1, 64));
          await checkAttention(c, shapeOf(heads, headDim, 31, 97));
        });
      }
    }

    const casesOf = (headDim: number, walk: AttentionWalk): Case[] =>
      runnable(gpu, attentionCandidates(elem, 3, headDim / 4, false, walk))
        .map((attention) => ({ attention, elem }));
    const matrixOf = (walk: AttentionWalk) =>
      casesOf(64, walk).filter(({ attention }) => attention.kernel.name.endsWith("subgroup_matrix"));
    /** All kernels of a walk, with the size of heads that they are tested with where it is not about that. */
    const sizedOf = (walk: AttentionWalk) => [
      ...matrixOf(walk).map((c) => ({ c, headDim: 64 })),
      ...casesOf(8, walk).map((c) => ({ c, headDim: 8 })),
      ...casesOf(32, walk)
        .filter(({ attention }) => attention.kernel.name.endsWith("register_tiled"))
        .map((c) => ({ c, headDim: 32 })),
    ];
    const small = casesOf(8, "all");
    const matrix = matrixOf("all");
    for (const { c, headDim } of [...sizedOf("all"), ...sizedOf("lists")]) {
      const title = titleOf(c.attention);
      test(`${title} matches the f64 reference for awkward numbers of queries`, async () => {
        for (const qLen of [1, 2, 7, 8, 9, 63, 64, 65, 97, 127, 128, 129, 257]) {
          await checkAttention(c, shapeOf(3, headDim, qLen, 0));
        }
      });
      test(`${title} matches the f64 reference for chunks that continue a cache`, async () => {
        for (const [qLen, first] of [[1, 1], [1, 1024], [63, 64], [64, 63], [65, 1000]] as const) {
          await checkAttention(c, shapeOf(3, headDim, qLen, first));
        }
      });
      test(`${title}: heads in two buffers give the same bits`, async () => {
        const shape = shapeOf(3, headDim, 97, 65);
        const given = randomInputs(shape, elem, 1);
        expectSame(await runAttention(c, given, shape, true), await runAttention(c, given, shape));
      });
      test(`${title}: ten runs are bit-identical`, async () => {
        const shape = shapeOf(3, headDim, 257, 65);
        const given = randomInputs(shape, elem, 1);
        await expectTenIdenticalRuns(() => runAttention(c, given, shape));
      });
    }
    const dense = sizedOf("all");
    for (const [i, { c, headDim }] of sizedOf("lists").entries()) {
      const title = titleOf(c.attention);
      test(`${title}: a list of every block gives the bits of dense attention`, async () => {
        const other = dense[i]!;
        for (const [qLen, first] of [[1, 0], [65, 0], [257, 0], [1, 64], [31, 97], [130, 127]] as const) {
          const shape = shapeOf(3, headDim, qLen, first);
          const given = randomInputs(shape, elem, qLen);
          expectSame(await runAttention(c, given, shape), await runAttention(other.c, given, shape));
        }
      });
      test(`${title} matches the f64 reference with random masks, other ones for each head`, async () => {
        for (const share of [0.8, 0.4, 0.1]) {
          const kept = uniformArray(100 * share, 3 * 64 * 64, 0, 1);
          const lists = (heads: number, rows: number) =>
            listsWhere(heads, rows, (head, row, block) => kept[(head * 64 + row) * 64 + block]! < share);
          for (
            const [qLen, first] of [[1, 0], [63, 0], [65, 0], [129, 0], [400, 0], [1, 640], [64, 64], [
              257,
              97,
            ]] as const
          ) {
            await checkAttention({ ...c, lists }, shapeOf(3, headDim, qLen, first));
          }
        }
      });
      test(`${title}: queries that see nothing get zeros`, async () => {
        const lists = (heads: number, rows: number) =>
          listsWhere(heads, rows, (head, row) => (row + head) % 2 === 0);
        for (const [qLen, first] of [[1, 0], [1, 64], [300, 0], [200, 31]] as const) {
          await checkAttention({ ...c, lists }, shapeOf(3, headDim, qLen, first));
        }
        const shape = shapeOf(3, headDim, 200, 31);
        const none = { ...c, lists: (heads: number, rows: number) => listsWhere(heads, rows, () => false) };
        const out = await runAttention(none, randomInputs(shape, elem, 1), shape);
        expectSame(out, new Float32Array(out.length));
      });
      test(`${title}: a cut into chunks changes no bit`, async () => {
        const shape = shapeOf(3, headDim, 300, 0);
        const given = randomInputs(shape, elem, 5);
        const lists = (heads: number, rows: number) =>
          listsWhere(heads, rows, (head, row, block) => (row + block + head) % 3 !== 0);
        const whole = await runAttention({ ...c, lists }, given, shape);
        for (const cut of [1, 37, 64, 100, 256]) {
          const parts = [[0, cut], [cut, 300]].map(async ([from, to]) => {
            const part = shapeOf(3, headDim, to! - from!, from!);
            const rows = (all: ArrayLike<number>, first: number, end: number) =>
              Array.from(all).slice(first * 3 * headDim, end * 3 * headDim);
            const some = {
              q: rows(given.q, from!, to!),
              k: rows(given.k, 0, to!),
              v: rows(given.v, 0, to!),
            };
            return await runAttention({ ...c, lists }, some, part);
          });
          const [a, b] = await Promise.all(parts);
          expectSame(Float32Array.from([...a!, ...b!]), whole);
        }
      });
    }
    if (elem === "f16") {
      const skipped = matrix.length === 0 ? ": needs subgroup matrices" : "";
      test.skipIf(skipped !== "")(
        `tensor cores rescale their output where scores grow${skipped}`,
        async () => {
          const shape = shapeOf(3, 64, 257, 130);
          const { v } = randomInputs(shape, elem, 3);
          const noise = normalArray(2, 387 * 192, 0, 0.1);
          for (const slope of [0.02, -0.02, 0.5, -0.5, 3, -3]) {
            const along = (rows: number, value: (row: number) => number) =>
              rounded(
                noise.subarray(0, rows * 192).map((x, i) => i % 64 ? x : value(Math.floor(i / 192))),
                elem,
              );
            const given = { q: along(257, () => 8), k: along(387, (j) => j * slope), v };
            for (const c of [...matrix, ...matrixOf("lists")]) await checkAttention(c, shape, given, true);
          }
        },
      );
    }
    test(`${elem} n=1025 matches the f64 reference`, async () => {
      for (const c of small) await checkAttention(c, shapeOf(3, 8, 1025, 0));
    });

    test(`${elem} scores that grow along the keys match: every group of keys rescales the output`, async () => {
      const shape = shapeOf(3, 8, 257, 0);
      const width = 24;
      const { v } = randomInputs(shape, elem, 3);
      const noise = normalArray(2, 257 * width, 0, 0.1);
      for (const slope of [0.01, -0.01, 0.5, -0.5, 3, -3]) {
        // Queries and keys point along the first axis, and the score of key j is j · slope.
        const along = (value: (row: number) => number) =>
          rounded(noise.map((x, i) => i % 8 ? x : value(Math.floor(i / width))), elem);
        const given = { q: along(() => Math.sqrt(8)), k: along((j) => j * slope), v };
        for (const c of small) await checkAttention(c, shape, given, true);
      }
    });

    test(`${elem} scores of 1e4 and -1e4 match, without overflow`, async () => {
      const shape = shapeOf(3, 8, 129, 0);
      const { v } = randomInputs(shape, elem, 1);
      const q = rounded(uniformArray(2, 129 * 24, -100, 100), elem);
      const k = rounded(uniformArray(3, 129 * 24, -100, 100), elem);
      for (const c of small) await checkAttention(c, shape, { q, k, v }, true);
      // All alike and far from zero: the maximum must be subtracted before the exponential.
      for (const sign of [1, -1]) {
        const constant = rounded(new Float64Array(129 * 24).fill(59.5), elem);
        const given = { q: constant.map((x) => sign * x), k: constant, v };
        for (const c of small) await checkAttention(c, shape, given, true);
      }
    });

    test(`${elem} equal scores give the mean of the values`, async () => {
      const shape = shapeOf(3, 8, 257, 0);
      const { k, v } = randomInputs(shape, elem, 1);
      const given = { q: new Float32Array(257 * 24), k, v };
      for (const c of small) await checkAttention(c, shape, given);
    });
  });
});
