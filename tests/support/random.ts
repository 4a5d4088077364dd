/** Seeded arrays: the same numbers in every run, on every machine. */
import { philox4x32 } from "../../src/model/sampling.ts";

/** `count` numbers, uniform in `[low, high)` on a grid of 2^32 steps. */
export function uniformArray(seed: number, count: number, low = -1, high = 1): Float64Array {
  const out = new Float64Array(count);
  for (let i = 0; i < count; i += 4) {
    const words = philox4x32([i / 4, 0, 0, 0], [seed >>> 0, 0]);
    for (let j = 0; j < 4 && i + j < count; j++) out[i + j] = low + (high - low) * words[j]! / 2 ** 32;
  }
  return out;
}

/** `count` numbers from a normal distribution (Box and Muller 1958). */
export function normalArray(seed: number, count: number, mean = 0, deviation = 1): Float64Array {
  const u = uniformArray(seed, 2 * count, 0, 1);
  return Float64Array.from({ length: count }, (_, i) => {
    const radius = Math.sqrt(-2 * Math.log(1 - u[2 * i]!));
    return mean + deviation * radius * Math.cos(2 * Math.PI * u[2 * i + 1]!);
  });
}
