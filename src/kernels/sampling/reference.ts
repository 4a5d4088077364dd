import type { DrawProblem } from "./sampling.ts";

/** What decides which tokens are left, and how likely each is. */
export type Filters = Pick<DrawProblem, "temperature" | "topK" | "topP" | "minP" | "repeatPenalty">;

/** A token that the filters leave. */
export interface KeptToken {
  readonly id: number;
  /** After the repetition penalty. */
  readonly score: number;
  /** exp((score - largest) / temperature) */
  readonly weight: number;
}

/** Scores in f64: `seen` tokens have their positive logits divided by the penalty, negative ones multiplied. */
export function penalisedReference(
  logits: ArrayLike<number>,
  seen: ReadonlySet<number>,
  penalty: number,
): Float64Array {
  return Float64Array.from(logits, (x, id) => !seen.has(id) ? x : x > 0 ? x / penalty : x * penalty);
}

/** The id of the largest score, the lowest of equals. */
export function greedyReference(scores: ArrayLike<number>): number {
  let best = 0;
  for (let id = 1; id < scores.length; id++) if (scores[id]! > scores[best]!) best = id;
  return best;
}

/** What temperature, top-k, top-p and min-p leave, in order of ids: by sorting all tokens. */
export function keptReference(scores: Float64Array, filters: Filters): KeptToken[] {
  const { temperature, topK, topP, minP } = filters;
  const largest = scores[greedyReference(scores)]!;
  let kept = Array.from(scores, (score, id): KeptToken => ({
    id,
    score,
    weight: Math.exp((score - largest) / temperature),
  }));
  if (topK > 0 || topP < 1) {
    kept.sort((a, b) => a.score === b.score ? a.id - b.id : b.score - a.score);
    if (topK > 0) kept = kept.slice(0, topK);
    const total = kept.reduce((sum, token) => sum + token.weight, 0);
    let sum = 0;
    // The first with which the sum reaches its goal is the last that is kept.
    const end = kept.findIndex((token) => (sum += token.weight) >= topP * total);
    if (topP < 1) kept.length = end + 1;
    kept.sort((a, b) => a.id - b.id);
  }
  return kept.filter(({ weight }) => weight >= minP);
}

/** The first token, in order of ids, whose cumulative weight exceeds `u` times all of it. */
export function drawReference(kept: readonly KeptToken[], u: number): number {
  const total = kept.reduce((sum, { weight }) => sum + weight, 0);
  let sum = 0;
  return kept.find(({ weight }) => (sum += weight) > u * total)!.id;
}
