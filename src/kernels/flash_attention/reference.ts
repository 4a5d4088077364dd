/**
 * Causal attention with exact softmax in f64, a query and a head at a time.
 * @param q `[qLen, heads, headDim]`; the first query is at `firstPosition`
 * @param k `[kvLen, heads, headDim]`
 * @param v `[kvLen, heads, headDim]`
 * @param sees of the keys up to its own position, those that a head's query attends to; all when left out
 * @returns `[qLen, heads, headDim]`, zeros for a query that attends to nothing
 */
export function attentionReference(
  q: ArrayLike<number>,
  k: ArrayLike<number>,
  v: ArrayLike<number>,
  shape: { heads: number; headDim: number; firstPosition: number; scale: number },
  sees: (head: number, position: number, key: number) => boolean = () => true,
): Float64Array {
  const { heads, headDim, firstPosition, scale } = shape;
  const width = heads * headDim;
  const out = new Float64Array(q.length);
  for (let i = 0; i < q.length / width; i++) {
    for (let h = 0; h < heads; h++) {
      const query = i * width + h * headDim;
      const scores = new Float64Array(firstPosition + i + 1).fill(-Infinity);
      for (let j = 0; j < scores.length; j++) {
        if (!sees(h, firstPosition + i, j)) continue;
        let dot = 0;
        for (let d = 0; d < headDim; d++) dot += q[query + d]! * k[j * width + h * headDim + d]!;
        scores[j] = dot * scale;
      }
      const max = scores.reduce((a, b) => Math.max(a, b), -Infinity);
      if (max === -Infinity) continue;
      const weights = scores.map((s) => Math.exp(s - max));
      const sum = weights.reduce((a, b) => a + b, 0);
      for (let j = 0; j < scores.length; j++) {
        const p = weights[j]! / sum;
        if (p === 0) continue;
        for (let d = 0; d < headDim; d++) out[query + d]! += p * v[j * width + h * headDim + d]!;
      }
    }
  }
  return out;
}
