import { afterAll, describe, test } from "bun:test";
import {
  ATTENTION_ROWS,
  attentionCandidates,
  type FlashAttentionProblem,
  registerTiledAttention,
  registerTiledVariants,
  subgroupMatrixAttention,
} from "../../src/kernels/flash_attention/flash_attention.ts";
import { attentionReference } from "../../src/kernels/flash_attention/reference.ts";
import { type Elem, type Op, op } from "../../src/runtime/kernel.ts";
import {
  type AttentionInputs,
  attentionMagnitude,
  type AttentionShape,
  headRanges,
  packCache,
  packQueries,
  plainAttention,
  randomInputs,
  scrambledTable,
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
}

/** Runs with NaN wherever the kernel has no business: keys past the last, rows past `qLen`, the K and V of `qkv`. */
async function runAttention(
  { attention, elem }: Case,
  { q, k, v }: AttentionInputs,
  shape: AttentionShape,
  splitHeads = false,
): Promise<Float32Array> {
  const { heads, headDim, qLen, firstPosition, scale } = shape;
  const stride = 4 * Math.ceil(headDim / 4);
  const table = scrambledTable(firstPosition + qLen);
  const tensors: Record<string, Tensor> = {
    qkv: tensor(elem, thenNan(packQueries(q, shape), ATTENTION_ROWS * 3 * heads * stride)),
    block_table: tensor("u32", table),
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
  const wanted = padRows(attentionReference(given.q, given.k, given.v, shape), headDim);
  const plain = padRows(plainAttention(given, shape), headDim);
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
      for (const attention of attentionOps(gpu, candidates, headDim4)) {
        test(`${titleOf(attention)} matches the f64 reference`, async () => {
          const c = { attention, elem };
          for (const qLen of [1, 33, 65]) await checkAttention(c, shapeOf(heads, headDim, qLen, 0));
          await checkAttention(c, shapeOf(heads, headDim, 1, 64));
          await checkAttention(c, shapeOf(heads, headDim, 31, 97));
        });
      }
    }

    /** All kernels for one shape: what is not about the size of heads is tested with these. */
    const small: Case[] = runnable(gpu, attentionCandidates(elem, 3, 2, false))
      .map((attention) => ({ attention, elem }));
    /** Those that need larger heads, too. */
    const larger = runnable(
      gpu,
      registerTiledVariants(elem, 3, 8, false).map((v) => op(registerTiledAttention, v)),
    );
    const matrix = runnable(gpu, [op(subgroupMatrixAttention, { heads: 3, subgroups: ATTENTION_ROWS / 32 })]);
    const sized = [
      ...(elem === "f16" ? matrix : []).map((attention) => ({ c: { attention, elem }, headDim: 64 })),
      ...small.map((c) => ({ c, headDim: 8 })),
      ...larger.map((attention) => ({ c: { attention, elem }, headDim: 32 })),
    ];
    for (const { c, headDim } of sized) {
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
            for (const attention of matrix) await checkAttention({ attention, elem }, shape, given, true);
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
