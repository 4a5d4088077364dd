/** `x[rows, inner] · w[inner, columns] + bias[columns]` (Hugging Face's Conv1D), with f64 sums. */
export function matmulReference(
  x: ArrayLike<number>,
  w: ArrayLike<number>,
  bias: ArrayLike<number>,
  inner: number,
): Float64Array {
  const columns = bias.length;
  const rows = x.length / inner;
  const out = new Float64Array(rows * columns);
  for (let r = 0; r < rows; r++) {
    const sums = out.subarray(r * columns, (r + 1) * columns);
    sums.set(bias);
    for (let k = 0; k < inner; k++) {
      const a = x[r * inner + k]!;
      for (let c = 0; c < columns; c++) sums[c]! += a * w[k * columns + c]!;
    }
  }
  return out;
}

/** GPT-2's GELU with the tanh approximation, element by element (Hendrycks & Gimpel 2016). */
export function geluNewReference(x: number): number {
  return 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3)));
}
