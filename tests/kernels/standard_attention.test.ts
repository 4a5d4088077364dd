import { afterAll, describe, expect, test } from "bun:test";
import { copyBytes } from "../../src/kernels/copy/copy.ts";
import { attentionReference } from "../../src/kernels/flash_attention/reference.ts";
import {
  attentionScores,
  attentionSoftmax,
  attentionValues,
  scoreBytes,
  scoreRanges,
} from "../../src/kernels/standard_attention/standard_attention.ts";
import { GRID_FOLD } from "../../src/kernels/shared/shared.ts";
import { type Elem, op } from "../../src/runtime/kernel.ts";
import {
  type AttentionInputs,
  attentionMagnitude,
  type AttentionShape,
  headRanges,
  packCache,
  packQueries,
  randomInputs,
  scrambledTable,
  shapeOf,
} from "../support/attention.ts";
import { expectClose, expectSame, expectTenIdenticalRuns, reportErrors } from "../support/compare.ts";
import {
  eachElem,
  padRows,
  poison,
  rounded,
  roundTo,
  runOp,
  runSteps,
  type Step,
  step,
  type Tensor,
  tensor,
  testDevice,
} from "../support/device.ts";
import { uniformArray } from "../support/random.ts";

const gpu = await testDevice();

interface Case {
  readonly elem: Elem;
  readonly unroll?: boolean;
  /** Keys and values in two buffers. */
  readonly splitHeads?: boolean;
  /** What a buffer of scores may have. */
  readonly maxBytes?: number;
}

/** Runs with NaN wherever the kernels have no business: scores not computed, keys past the last, the K and V of `qkv`. */
async function runAttention(
  { elem, unroll = false, splitHeads = false, maxBytes = Infinity }: Case,
  { q, k, v }: AttentionInputs,
  shape: AttentionShape,
): Promise<Float32Array> {
  const { heads, headDim, qLen: tokens, scale } = shape;
  const headDim4 = Math.ceil(headDim / 4);
  const variant = { elem, heads, headDim4, unroll };
  const table = scrambledTable(tokens);
  const tensors: Record<string, Tensor> = {
    qkv: tensor(elem, packQueries(q, shape)),
    block_table: tensor("u32", table),
    out: poison(elem, tokens * heads * 4 * headDim4),
  };
  const steps: Step[] = [];
  for (const cached of headRanges(heads, splitHeads)) {
    const kv = { k: `k${cached.first}`, v: `v${cached.first}` };
    tensors[kv.k] = tensor(elem, packCache(k, shape, table, cached));
    tensors[kv.v] = tensor(elem, packCache(v, shape, table, cached));
    for (const range of scoreRanges(cached, tokens, elem, maxBytes)) {
      const names = { ...kv, scores: `scores${range.first}` };
      tensors[names.scores] = poison(elem, range.heads * tokens * 4 * Math.ceil(tokens / 4));
      const problem = { tokens, blocks: table.length, range, cached, scale };
      for (const kernel of [attentionScores, attentionSoftmax, attentionValues]) {
        steps.push(step(op(kernel, variant), problem, names));
      }
    }
  }
  const { out } = await runSteps(gpu, steps, tensors, ["out"]);
  return out;
}

/** The textbook's loops in f32, with scores and probabilities stored as the run stores them. */
function plainStandard({ q, k, v }: AttentionInputs, shape: AttentionShape, elem: Elem): Float32Array {
  const { heads, headDim, qLen } = shape;
  const { fround } = Math;
  const width = heads * headDim;
  const out = new Float32Array(qLen * width);
  for (let i = 0; i < qLen; i++) {
    for (let h = 0; h < heads; h++) {
      const query = i * width + h * headDim;
      const scores = Float32Array.from({ length: i + 1 }, (_, j) => {
        let dot = 0;
        const key = j * width + h * headDim;
        for (let d = 0; d < headDim; d++) dot = fround(dot + fround(q[query + d]! * k[key + d]!));
        return roundTo(elem, fround(dot * fround(shape.scale)));
      });
      const m = scores.reduce((a, b) => Math.max(a, b));
      const weights = scores.map((s) => Math.exp(fround(s - m)));
      const sum = weights.reduce((a, b) => fround(a + b));
      weights.forEach((weight, j) => {
        const p = roundTo(elem, fround(weight / sum));
        const value = j * width + h * headDim;
        for (let d = 0; d < headDim; d++) {
          out[query + d] = out[query + d]! + fround(p * v[value + d]!);
        }
      });
    }
  }
  return out;
}

async function checkAttention(
  c: Case,
  shape: AttentionShape,
  given = randomInputs(shape, c.elem, shape.qLen),
  hard = false,
): Promise<void> {
  const { heads, headDim } = shape;
  const wanted = padRows(attentionReference(given.q, given.k, given.v, shape), headDim);
  expectClose(
    await runAttention(c, given, shape),
    wanted,
    padRows(plainStandard(given, shape, c.elem), headDim),
    {
      kernel: `standard_attention${hard ? ", large scores" : ""}`,
      elem: c.elem,
      stored: c.elem,
      magnitude: attentionMagnitude(given, shape, hard),
      rowLength: heads * 4 * Math.ceil(headDim / 4),
    },
  );
}

describe("standard_attention", () => {
  afterAll(reportErrors);
  eachElem(gpu, (elem) => {
    for (const [heads, headDim] of [[1, 4], [3, 6], [3, 64], [1, 80], [1, 128]] as const) {
      test(`${elem} heads=${heads} headDim=${headDim} matches the f64 reference`, async () => {
        for (const tokens of [1, 33, 65]) await checkAttention({ elem }, shapeOf(heads, headDim, tokens, 0));
      });
    }
    test(`${elem} matches the f64 reference for awkward numbers of tokens`, async () => {
      for (const tokens of [1, 2, 3, 5, 63, 64, 65, 97, 127, 128, 129, 257]) {
        await checkAttention({ elem }, shapeOf(3, 8, tokens, 0));
      }
    });
    test(`${elem} unrolled matches the f64 reference`, async () => {
      await checkAttention({ elem, unroll: true }, shapeOf(1, 4, 97, 0));
    });
    test(`${elem} scores of 100 and -100 match, without overflow`, async () => {
      const shape = shapeOf(3, 8, 129, 0);
      const { v } = randomInputs(shape, elem, 1);
      const q = rounded(uniformArray(2, 129 * 24, -10, 10), elem);
      const k = rounded(uniformArray(3, 129 * 24, -10, 10), elem);
      await checkAttention({ elem }, shape, { q, k, v }, true);
      // All alike and far from zero: the maximum must be subtracted before the exponential.
      for (const sign of [1, -1]) {
        const constant = rounded(new Float64Array(129 * 24).fill(59.5), elem);
        await checkAttention({ elem }, shape, { q: constant.map((x) => sign * x), k: constant, v }, true);
      }
    });
    test(`${elem} heads in several buffers, of keys and of scores, give the same bits`, async () => {
      const shape = shapeOf(5, 8, 97, 0);
      const given = randomInputs(shape, elem, 1);
      const whole = await runAttention({ elem }, given, shape);
      expectSame(await runAttention({ elem, splitHeads: true }, given, shape), whole);
      const maxBytes = 2 * scoreBytes(97, elem);
      expectSame(await runAttention({ elem, maxBytes }, given, shape), whole);
      expectSame(await runAttention({ elem, maxBytes, splitHeads: true }, given, shape), whole);
    });
    test(`${elem} ten runs are bit-identical`, async () => {
      const shape = shapeOf(3, 8, 257, 0);
      const given = randomInputs(shape, elem, 1);
      await expectTenIdenticalRuns(() => runAttention({ elem }, given, shape));
    });
  });
});

describe("scoreRanges", () => {
  test("divides the heads of a buffer as evenly as the limit allows", () => {
    const bytes = scoreBytes(100, "f16");
    expect(bytes).toBe(100 * 100 * 2);
    expect(scoreBytes(97, "f32")).toBe(97 * 100 * 4);
    const cached = { first: 3, heads: 7 };
    expect(scoreRanges(cached, 100, "f16", Infinity)).toEqual([cached]);
    expect(scoreRanges(cached, 100, "f16", 4 * bytes)).toEqual([{ first: 3, heads: 4 }, {
      first: 7,
      heads: 3,
    }]);
    // Seven by five are four and three, not five and two; and a head is never divided.
    expect(scoreRanges(cached, 100, "f16", 5 * bytes).map(({ heads }) => heads)).toEqual([4, 3]);
    expect(scoreRanges(cached, 100, "f16", 1).map(({ heads }) => heads)).toEqual([1, 1, 1, 1, 1, 1, 1]);
  });
});

test("copy copies every vector, beyond one row of the grid too, and none behind", async () => {
  const lanes = copyBytes.workgroupInvocations({});
  for (const vectors of [1, lanes - 1, lanes + 1]) {
    const source = Float32Array.from({ length: 4 * vectors }, (_, i) => i);
    const { out } = await runOp(gpu, op(copyBytes, {}), { bytes: 16 * vectors }, {
      source: tensor("f32", source),
      out: poison("f32", source.length),
    });
    expectSame(out!, source);
  }
  expect(copyBytes.grid({}, { bytes: 16 * lanes * (GRID_FOLD + 1) })).toEqual([GRID_FOLD, 2, 1]);
});
