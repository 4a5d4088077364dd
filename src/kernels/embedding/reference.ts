/** `wte[ids[t]] + wpe[firstPosition + t]`, row by row: `[tokens, width]`. */
export function embeddingReference(
  ids: ArrayLike<number>,
  wte: ArrayLike<number>,
  wpe: ArrayLike<number>,
  width: number,
  firstPosition: number,
): Float64Array {
  const x = new Float64Array(ids.length * width);
  for (let t = 0; t < ids.length; t++) {
    for (let c = 0; c < width; c++) {
      x[t * width + c] = wte[ids[t]! * width + c]! + wpe[(firstPosition + t) * width + c]!;
    }
  }
  return x;
}
