/** What one slice of keys gives: output not yet divided by `l`, maximum `m` and sum `l` of its exponentials. */
export interface PartialAttention {
  readonly out: Float64Array;
  readonly m: number;
  readonly l: number;
}

/** Attention of a single head's query over one slice of keys and values, `[keys, headDim]`, natural exponentials. */
export function partialAttentionReference(
  q: ArrayLike<number>,
  k: ArrayLike<number>,
  v: ArrayLike<number>,
  scale: number,
): PartialAttention {
  const headDim = q.length;
  const keys = k.length / headDim;
  const scores = Float64Array.from({ length: keys }, (_, j) => {
    let dot = 0;
    for (let d = 0; d < headDim; d++) dot += q[d]! * k[j * headDim + d]!;
    return dot * scale;
  });
  const m = scores.reduce((a, b) => Math.max(a, b), -Infinity);
  const out = new Float64Array(headDim);
  let l = 0;
  for (let j = 0; j < keys; j++) {
    const p = Math.exp(scores[j]! - m);
    l += p;
    for (let d = 0; d < headDim; d++) out[d]! += p * v[j * headDim + d]!;
  }
  return { out, m, l };
}

/** Merges slices; associative, so any split of the keys gives the same result to rounding. */
export function combineReference(parts: readonly PartialAttention[]): Float64Array {
  const m = Math.max(...parts.map((part) => part.m));
  const out = new Float64Array(parts[0]?.out.length ?? 0);
  let l = 0;
  for (const part of parts) {
    const weight = Math.exp(part.m - m);
    l += weight * part.l;
    for (let d = 0; d < out.length; d++) out[d]! += weight * part.out[d]!;
  }
  return out.map((value) => value / l);
}
