/** Matrix products for tests: inputs, the exact result, and the plain algorithms that kernels are judged by. */
import { type Epilogue, EPILOGUES, type MatmulProblem } from "../../src/kernels/matmul/matmul.ts";
import { geluNewReference, matmulReference } from "../../src/kernels/matmul/reference.ts";
import type { Elem } from "../../src/runtime/kernel.ts";
import { rounded } from "./device.ts";
import { normalArray } from "./random.ts";

export const epilogues = Object.keys(EPILOGUES) as Epilogue[];

export interface Inputs extends MatmulProblem {
  readonly x: ArrayLike<number>;
  readonly w: Float32Array;
  readonly bias: Float32Array;
  /** What a residual is added to. */
  readonly before: Float32Array;
}

/** All of a product's inputs but `x`. */
export function randomWeights(elem: Elem, { rows, inner, columns }: MatmulProblem) {
  return {
    w: rounded(normalArray(2, inner * columns, 0, 0.3), elem),
    bias: rounded(normalArray(3, columns), "f32"),
    before: rounded(normalArray(4, rows * columns, 0, 3), "f32"),
  };
}

/** f32 sums in order of `inner`, each product rounded; the tanh form of GELU, operation by operation. */
export function plainMatmul(
  { x, w, bias, before, rows, inner, columns }: Inputs,
  epilogue: Epilogue,
): Float32Array {
  const { fround } = Math;
  const out = new Float32Array(rows * columns);
  for (let r = 0; r < rows; r++) {
    const sums = out.subarray(r * columns, (r + 1) * columns);
    for (let k = 0; k < inner; k++) {
      const a = x[r * inner + k]!;
      for (let c = 0; c < columns; c++) sums[c] = sums[c]! + fround(a * w[k * columns + c]!);
    }
    for (let c = 0; c < columns; c++) {
      const sum = fround(sums[c]! + bias[c]!);
      if (epilogue === "bias") sums[c] = sum;
      else if (epilogue === "residual") sums[c] = before[r * columns + c]! + sum;
      else {
        const cube = fround(fround(sum * sum) * sum);
        const u = fround(fround(0.7978845608028654) * fround(sum + fround(fround(0.044715) * cube)));
        sums[c] = fround(fround(0.5) * sum) * fround(1 + fround(Math.tanh(u)));
      }
    }
  }
  return out;
}

/** The product with its epilogue in f64. */
export function exactMatmul({ x, w, bias, before, inner }: Inputs, epilogue: Epilogue): Float64Array {
  const sums = matmulReference(x, w, bias, inner);
  if (epilogue === "bias") return sums;
  return sums.map(epilogue === "residual" ? (sum, i) => before[i]! + sum : geluNewReference);
}

/** Largest Σ|x||w| + |bias| of any element, the residual included. */
export function matmulMagnitude({ x, w, bias, before, inner }: Inputs, epilogue: Epilogue): number {
  const sums = matmulReference(Float64Array.from(x, Math.abs), w.map(Math.abs), bias.map(Math.abs), inner);
  let largest = 0;
  sums.forEach((sum, i) => {
    largest = Math.max(largest, sum + (epilogue === "residual" ? Math.abs(before[i]!) : 0));
  });
  return largest;
}

/** The textbook's layer norm: two passes over a row with running f32 sums. */
export function plainLayerNorm(
  x: ArrayLike<number>,
  gain: ArrayLike<number>,
  shift: ArrayLike<number>,
  width: number,
  epsilon: number,
): Float32Array {
  const { fround } = Math;
  const out = new Float32Array(x.length);
  for (let base = 0; base < x.length; base += width) {
    let sum = 0;
    for (let c = 0; c < width; c++) sum = fround(sum + x[base + c]!);
    const mean = fround(sum / width);
    let squares = 0;
    for (let c = 0; c < width; c++) {
      const centred = fround(x[base + c]! - mean);
      squares = fround(squares + fround(centred * centred));
    }
    const deviation = fround(Math.sqrt(fround(fround(squares / width) + fround(epsilon))));
    for (let c = 0; c < width; c++) {
      const normed = fround(fround(x[base + c]! - mean) / deviation);
      out[base + c] = fround(normed * gain[c]!) + shift[c]!;
    }
  }
  return out;
}
