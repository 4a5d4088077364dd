import type { PositionPlace } from "./embedding.ts";

/** `wte[ids[t]] + (1 - weight) wpe[place] + weight wpe[place + 1]`, row by row: `[tokens, width]`. */
export function embeddingReference(
  ids: ArrayLike<number>,
  places: readonly PositionPlace[],
  wte: ArrayLike<number>,
  wpe: ArrayLike<number>,
  width: number,
): Float64Array {
  const x = new Float64Array(ids.length * width);
  places.forEach(({ place, weight }, t) => {
    for (let c = 0; c < width; c++) {
      const low = wpe[place * width + c]!;
      const high = weight > 0 ? wpe[(place + 1) * width + c]! : 0;
      x[t * width + c] = wte[ids[t]! * width + c]! + (1 - weight) * low + weight * high;
    }
  });
  return x;
}
