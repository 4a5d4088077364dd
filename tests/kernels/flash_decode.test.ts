import { afterAll, describe, expect, test } from "bun:test";
import { attentionReference } from "../../src/kernels/flash_attention/reference.ts";
import {
  combineSplits,
  type FlashDecodeVariant,
  flashDecodeVariants,
  splitCount,
  splitKvAttention,
} from "../../src/kernels/flash_decode/flash_decode.ts";
import {
  combineReference,
  type PartialAttention,
  partialAttentionReference,
} from "../../src/kernels/flash_decode/reference.ts";
import { type Elem, op } from "../../src/runtime/kernel.ts";
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
  titleOf,
} from "../support/device.ts";
import { uniformArray } from "../support/random.ts";

const gpu = await testDevice();

/** One query that sees `kvLen` keys. */
function decodeShape(heads: number, headDim: number, kvLen: number): AttentionShape {
  return shapeOf(heads, headDim, 1, kvLen - 1);
}

/** Runs both kernels with NaN wherever they have no business: keys past the last, the K and V of `qkv`. */
async function runDecode(
  variant: FlashDecodeVariant,
  { q, k, v }: AttentionInputs,
  shape: AttentionShape,
  splitHeads = false,
) {
  const { elem } = variant;
  const { heads, headDim, firstPosition, scale } = shape;
  const stride = 4 * Math.ceil(headDim / 4);
  const kvLen = firstPosition + 1;
  const table = scrambledTable(kvLen);
  const problem = { kvLen, blocks: table.length, scale };
  const splits = splitCount(variant, kvLen);
  const tensors: Record<string, Tensor> = {
    qkv: tensor(elem, packQueries(q, shape)),
    block_table: tensor("u32", table),
    partial_out: poison("f32", splits * heads * stride),
    partial_ml: poison("f32", splits * heads * 2),
    out: poison(elem, heads * stride),
  };
  const steps = headRanges(heads, splitHeads).map((range) => {
    const names = { k: `k${range.first}`, v: `v${range.first}` };
    tensors[names.k] = tensor(elem, packCache(k, shape, table, range));
    tensors[names.v] = tensor(elem, packCache(v, shape, table, range));
    return step(op(splitKvAttention, variant), { ...problem, range }, names);
  });
  const combine = step(op(combineSplits, variant), problem);
  return await runSteps(gpu, [...steps, combine], tensors, ["out", "partial_out", "partial_ml"]);
}

function judgedBy(given: AttentionInputs, shape: AttentionShape, elem: Elem, hard = false) {
  return {
    kernel: hard ? "flash_decode, large scores" : "flash_decode",
    elem,
    stored: elem,
    magnitude: attentionMagnitude(given, shape, hard)(0),
  };
}

async function checkDecode(
  variant: FlashDecodeVariant,
  shape: AttentionShape,
  given = randomInputs(shape, variant.elem, shape.firstPosition),
  hard = false,
): Promise<void> {
  const { headDim } = shape;
  const { out } = await runDecode(variant, given, shape);
  const wanted = padRows(attentionReference(given.q, given.k, given.v, shape), headDim);
  const plain = padRows(plainAttention(given, shape), headDim);
  expectClose(out, wanted, plain, judgedBy(given, shape, variant.elem, hard));
}

/** What is not about the size of heads is tested with these. */
function smallVariants(elem: Elem): FlashDecodeVariant[] {
  return runnable(gpu, flashDecodeVariants(elem, 3, 2, false).map((v) => op(splitKvAttention, v)))
    .map(({ variant }) => variant as FlashDecodeVariant);
}

/** One head's rows of `[rows, heads, headDim]`. */
function headRows(all: ArrayLike<number>, { heads, headDim }: AttentionShape, head: number): Float64Array {
  return Float64Array.from(all).filter((_, i) => Math.floor(i / headDim) % heads === head);
}

describe("flash_decode", () => {
  afterAll(reportErrors);
  eachElem(gpu, (elem) => {
    for (const [heads, headDim] of [[1, 4], [3, 8], [5, 6], [3, 64], [1, 80], [1, 128]] as const) {
      const headDim4 = Math.ceil(headDim / 4);
      const candidates = (unroll: boolean) =>
        flashDecodeVariants(elem, heads, headDim4, unroll).map((v) => op(splitKvAttention, v));
      for (const decode of attentionOps(gpu, candidates, headDim4)) {
        const variant = decode.variant as FlashDecodeVariant;
        test(`${titleOf(decode)} matches the f64 reference`, async () => {
          for (const kvLen of [1, 65, 257, 600]) {
            await checkDecode(variant, decodeShape(heads, headDim, kvLen));
          }
        });
      }
    }

    const small = smallVariants(elem)[0]!;
    for (const kvLen of [1, 2, 63, 64, 65, 97, 255, 256, 257, 512, 513, 1025, 5000]) {
      test(`${elem} kvLen=${kvLen} matches the f64 reference`, () =>
        checkDecode(small, decodeShape(3, 8, kvLen)));
    }

    test(`${elem} growing, falling, equal and very large scores match`, async () => {
      const shape = decodeShape(3, 8, 600);
      const { k, v } = randomInputs(shape, elem, 1);
      const ones = new Float32Array(24).fill(1);
      const check = (query: Float32Array, keys: ArrayLike<number>) =>
        checkDecode(small, shape, { q: query, k: keys, v }, true);
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
      // One key far above the others: what the other slices give underflows when merged.
      await check(
        ones,
        rounded(Float64Array.from(k, (x, i) => x + (Math.floor(i / 24) === 300 ? 200 : 0)), elem),
      );
    });

    test(`${elem} each slice is what its keys alone give`, async () => {
      const shape = decodeShape(3, 8, 600);
      const given = randomInputs(shape, elem, 7);
      const { partial_out, partial_ml } = await runDecode(small, given, shape);
      const options = {
        ...judgedBy(given, shape, elem),
        kernel: "flash_decode slices",
        stored: "f32",
      } as const;
      // The log-sum-exp is as large as the scores, and is off by their rounding.
      const hardness = attentionMagnitude(given, shape, true)(0);
      for (let s = 0; s < 3; s++) {
        for (let h = 0; h < 3; h++) {
          const row = 3 * s + h;
          const slice = (all: ArrayLike<number>) =>
            headRows(all, shape, h).subarray(8 * 256 * s, 8 * 256 * (s + 1));
          const q = headRows(given.q, shape, h);
          const wanted = partialAttentionReference(q, slice(given.k), slice(given.v), shape.scale);
          const m = partial_ml[2 * row]! * Math.LN2;
          const l = partial_ml[2 * row + 1]!;
          // Which multiple of 2^m the sums are is the kernel's affair; the output and the log-sum-exp are not.
          const lse = (part: { m: number; l: number }) => part.m + Math.log(part.l);
          expect(Math.abs(lse({ m, l }) - lse(wanted))).toBeLessThan(4 * 2 ** -24 * hardness);
          const keys = slice(given.k);
          const alone = {
            heads: 1,
            headDim: 8,
            qLen: 1,
            firstPosition: keys.length / 8 - 1,
            scale: shape.scale,
          };
          const plain = plainAttention({ q, k: keys, v: slice(given.v) }, alone);
          const out = Array.from(partial_out.subarray(8 * row, 8 * row + 8), (x) => x / l);
          expectClose(out, wanted.out.map((x) => x / wanted.l), plain, options);
        }
      }
    });

    test(`${elem} slices merged by the reference, in any grouping, give what the kernel merges`, async () => {
      const shape = decodeShape(3, 8, 1025);
      const given = randomInputs(shape, elem, 9);
      const { out, partial_out, partial_ml } = await runDecode(small, given, shape);
      const plain = plainAttention(given, shape);
      for (let h = 0; h < 3; h++) {
        const parts: PartialAttention[] = Array.from({ length: 5 }, (_, s) => ({
          out: Float64Array.from(partial_out.subarray(8 * (3 * s + h), 8 * (3 * s + h) + 8)),
          m: partial_ml[2 * (3 * s + h)]! * Math.LN2,
          l: partial_ml[2 * (3 * s + h) + 1]!,
        }));
        const merged = combineReference(parts);
        const head = plain.subarray(8 * h, 8 * h + 8);
        expectClose(out.subarray(8 * h, 8 * h + 8), merged, head, judgedBy(given, shape, elem));
        const halves = [parts.slice(0, 2), parts.slice(2)].map((half): PartialAttention => {
          const m = Math.max(...half.map((part) => part.m));
          const l = half.reduce((sum, part) => sum + part.l * Math.exp(part.m - m), 0);
          return { out: combineReference(half).map((x) => x * l), m, l };
        });
        combineReference(halves).forEach((x, d) => expect(x).toBeCloseTo(merged[d]!, 12));
      }
    });

    test(`${elem} where the keys are cut makes no difference beyond rounding`, async () => {
      const shape = decodeShape(3, 8, 1025);
      const given = randomInputs(shape, elem, 11);
      for (const split of [64, 97, 1025]) await checkDecode({ ...small, split }, shape, given);
    });

    test(`${elem} heads in two buffers give the same bits`, async () => {
      const shape = decodeShape(3, 8, 600);
      const given = randomInputs(shape, elem, 13);
      const { out } = await runDecode(small, given, shape);
      expectSame((await runDecode(small, given, shape, true)).out, out);
    });

    test(`${elem} ten runs are bit-identical`, async () => {
      for (const variant of smallVariants(elem)) {
        const shape = decodeShape(3, 8, 1025);
        const given = randomInputs(shape, elem, 1);
        await expectTenIdenticalRuns(async () => (await runDecode(variant, given, shape)).partial_out);
        await expectTenIdenticalRuns(async () => (await runDecode(variant, given, shape)).out);
      }
    });
  });
});
