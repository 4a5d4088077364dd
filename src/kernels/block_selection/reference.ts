import { KV_BLOCK } from "../shared/shared.ts";

/**
 * Summaries of the complete blocks of keys `[tokens, heads, headDim]`: `[heads, complete blocks, 2,
 * headDim]`, the mean and the standard deviation (population) of each column.
 */
export function blockSummaries(keys: ArrayLike<number>, heads: number, headDim: number): Float64Array {
  const blocks = Math.floor(keys.length / (heads * headDim * KV_BLOCK));
  const out = new Float64Array(heads * blocks * 2 * headDim);
  for (let h = 0; h < heads; h++) {
    for (let b = 0; b < blocks; b++) {
      for (let d = 0; d < headDim; d++) {
        const key = (i: number) => keys[((b * KV_BLOCK + i) * heads + h) * headDim + d]!;
        let mean = 0;
        for (let i = 0; i < KV_BLOCK; i++) mean += key(i) / KV_BLOCK;
        let variance = 0;
        for (let i = 0; i < KV_BLOCK; i++) variance += (key(i) - mean) ** 2 / KV_BLOCK;
        const to = (h * blocks + b) * 2 * headDim + d;
        out[to] = mean;
        out[to + headDim] = Math.sqrt(variance);
      }
    }
  }
  return out;
}

/** How many blocks a step attends to. */
export interface SelectionRule {
  /** Tokens in the cache, without the one of this step. */
  readonly length: number;
  /** Blocks that are kept, at least `LEAST_KEPT`. */
  readonly keep: number;
  /** Sequences of fewer blocks keep all. */
  readonly leastBlocks: number;
}

export interface Selection {
  /** Of every block; those that are not chosen by their score, the first and the two last, have infinity. */
  readonly scores: Float64Array;
  /** Numbers of the blocks that are kept, ascending. */
  readonly chosen: readonly number[];
}

/** The blocks that one head's query `[headDim]` attends to, by that head's `summaries[blocks, 2, headDim]`. */
export function selectReference(
  query: ArrayLike<number>,
  summaries: ArrayLike<number>,
  { length, keep, leastBlocks }: SelectionRule,
): Selection {
  const headDim = query.length;
  const row = Math.floor(length / KV_BLOCK);
  const scores = new Float64Array(row + 1).fill(Infinity);
  for (let block = 1; block < row - 1; block++) {
    let score = 0;
    for (let d = 0; d < headDim; d++) {
      const at = block * 2 * headDim + d;
      score += query[d]! * summaries[at]! + Math.abs(query[d]!) * summaries[at + headDim]!;
    }
    scores[block] = score;
  }
  const all = Array.from(scores, (_, block) => block);
  if (all.length <= keep || all.length < leastBlocks) return { scores, chosen: all };
  // Not a difference: that of two infinities is NaN.
  const byScore = all.sort((a, b) => scores[a] === scores[b] ? b - a : scores[a]! > scores[b]! ? -1 : 1);
  return { scores, chosen: byScore.slice(0, keep).sort((a, b) => a - b) };
}
