/** What the two attention kernels' tests share: inputs, their layouts on the GPU, the plain algorithm, its conditioning. */
import type { Elem } from "../../src/runtime/kernel.ts";
import { maxAbs } from "./compare.ts";
import { rounded } from "./device.ts";
import { normalArray } from "./random.ts";

export interface AttentionShape {
  readonly heads: number;
  readonly headDim: number;
  /** Queries; the last of them sees all keys. */
  readonly qLen: number;
  readonly firstPosition: number;
  readonly scale: number;
}

/** `q [qLen, heads, headDim]`, `k` and `v [kvLen, heads, headDim]`, rounded to the stored type. */
export interface AttentionInputs {
  readonly q: ArrayLike<number>;
  readonly k: ArrayLike<number>;
  readonly v: ArrayLike<number>;
}

export function shapeOf(heads: number, headDim: number, qLen: number, firstPosition: number): AttentionShape {
  return { heads, headDim, qLen, firstPosition, scale: 1 / Math.sqrt(headDim) };
}

export function randomInputs(shape: AttentionShape, elem: Elem, seed: number): AttentionInputs {
  const width = shape.heads * shape.headDim;
  const kvLen = shape.firstPosition + shape.qLen;
  return {
    q: rounded(normalArray(seed, shape.qLen * width, 0, 1.5), elem),
    k: rounded(normalArray(seed + 1, kvLen * width, 0, 1.5), elem),
    v: rounded(normalArray(seed + 2, kvLen * width), elem),
  };
}

/** QKV rows `[qLen, 3, heads, headDim4 · 4]` with NaN for keys and values, which attention reads from the cache. */
export function packQueries(q: ArrayLike<number>, { heads, headDim, qLen }: AttentionShape): Float64Array {
  const stride = 4 * Math.ceil(headDim / 4);
  const out = new Float64Array(qLen * 3 * heads * stride).fill(NaN);
  for (let i = 0; i < qLen; i++) {
    for (let h = 0; h < heads; h++) {
      for (let d = 0; d < stride; d++) {
        const value = d < headDim ? q[(i * heads + h) * headDim + d]! : 0;
        out[(3 * i * heads + h) * stride + d] = value;
      }
    }
  }
  return out;
}

/** Keys or values `[kvLen, heads, headDim]` as the cache holds them, `[heads, capacity, headDim4 · 4]`; NaN past kvLen. */
export function packCache(
  rows: ArrayLike<number>,
  { heads, headDim }: AttentionShape,
  capacity: number,
): Float64Array {
  const stride = 4 * Math.ceil(headDim / 4);
  const kvLen = rows.length / (heads * headDim);
  const out = new Float64Array(heads * capacity * stride).fill(NaN);
  for (let h = 0; h < heads; h++) {
    for (let j = 0; j < kvLen; j++) {
      for (let d = 0; d < stride; d++) {
        const value = d < headDim ? rows[(j * heads + h) * headDim + d]! : 0;
        out[(h * capacity + j) * stride + d] = value;
      }
    }
  }
  return out;
}

/** Textbook causal attention, every operation in f32: dot products, scale, maximum, exp, sum, weighted sum, division. */
export function plainAttention({ q, k, v }: AttentionInputs, shape: AttentionShape): Float32Array {
  const { heads, headDim, qLen, firstPosition } = shape;
  const { fround } = Math;
  const scale = fround(shape.scale);
  const width = heads * headDim;
  const out = new Float32Array(qLen * width);
  const sums = new Float32Array(headDim);
  for (let i = 0; i < qLen; i++) {
    for (let h = 0; h < heads; h++) {
      const query = i * width + h * headDim;
      const scores = new Float32Array(firstPosition + i + 1);
      let m = -Infinity;
      for (let j = 0; j < scores.length; j++) {
        let dot = 0;
        const key = j * width + h * headDim;
        for (let d = 0; d < headDim; d++) dot = fround(dot + fround(q[query + d]! * k[key + d]!));
        scores[j] = dot * scale;
        m = Math.max(m, scores[j]!);
      }
      let l = 0;
      sums.fill(0);
      for (let j = 0; j < scores.length; j++) {
        const p = fround(Math.exp(fround(scores[j]! - m)));
        const value = j * width + h * headDim;
        l = fround(l + p);
        for (let d = 0; d < headDim; d++) sums[d] = sums[d]! + fround(p * v[value + d]!);
      }
      for (let d = 0; d < headDim; d++) out[query + d] = sums[d]! / l;
    }
  }
  return out;
}

/**
 * Size of the intermediates of each row, for the floor of the tolerance. Weights are positive and add up to one, so the
 * output adds up terms no larger than the largest value. Where scores are so large that their own rounding decides the
 * weights (`hard`), that comes on top: scores off by δ move weights by at most δ/2 in all, and δ is relative to
 * Σ|q||k| · scale, however small their difference.
 */
export function attentionMagnitude(
  { q, k, v }: AttentionInputs,
  shape: AttentionShape,
  hard = false,
): (row: number) => number {
  const { heads, headDim, firstPosition, scale } = shape;
  const largestValue = maxAbs(v);
  return (row) => {
    let score = 0;
    for (let j = 0; hard && j <= firstPosition + row; j++) {
      for (let h = 0; h < heads; h++) {
        let sum = 0;
        for (let d = 0; d < headDim; d++) {
          sum += Math.abs(q[(row * heads + h) * headDim + d]! * k[(j * heads + h) * headDim + d]!);
        }
        score = Math.max(score, sum * scale);
      }
    }
    return largestValue * (1 + score);
  };
}
