/** LayerNorm of each row of `x[rows, width]` with the biased variance, as GPT-2 and PyTorch define it. */
export function layerNormReference(
  x: ArrayLike<number>,
  gain: ArrayLike<number>,
  shift: ArrayLike<number>,
  width: number,
  epsilon: number,
): Float64Array {
  const out = new Float64Array(x.length);
  for (let base = 0; base < x.length; base += width) {
    let mean = 0;
    for (let c = 0; c < width; c++) mean += x[base + c]! / width;
    let variance = 0;
    for (let c = 0; c < width; c++) variance += (x[base + c]! - mean) ** 2 / width;
    const scale = 1 / Math.sqrt(variance + epsilon);
    for (let c = 0; c < width; c++) out[base + c] = (x[base + c]! - mean) * scale * gain[c]! + shift[c]!;
  }
  return out;
}
