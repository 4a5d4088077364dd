/** `x[rows, inner] · headᵀ` for `head[vocab, inner]`: `[rows, vocab]`, with f64 sums. */
export function lmHeadReference(
  x: ArrayLike<number>,
  head: ArrayLike<number>,
  inner: number,
): Float64Array {
  const rows = x.length / inner;
  const vocab = head.length / inner;
  const logits = new Float64Array(rows * vocab);
  for (let r = 0; r < rows; r++) {
    for (let v = 0; v < vocab; v++) {
      let sum = 0;
      for (let c = 0; c < inner; c++) sum += x[r * inner + c]! * head[v * inner + c]!;
      logits[r * vocab + v] = sum;
    }
  }
  return logits;
}
