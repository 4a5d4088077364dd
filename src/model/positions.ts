/**
 * Which row of `wpe` a position takes. GPT-2 learns one embedding a position, so a context beyond `n_positions` needs
 * rows that were never trained; nothing here makes a model good there, `docs/long_context.md` measures how it degrades.
 */
import type { PositionPlace } from "../kernels/embedding/embedding.ts";

/**
 * - `exact`: row p for position p, and no position beyond the table.
 * - `interpolate`: the table is stretched over the context, rows between two are mixed linearly (as the FlashAttention
 *   paper does to go from Path-X to Path-256, after Dosovitskiy et al. 2021). All positions move, so it fits models
 *   that are fine-tuned that way.
 * - `repeat`: the table starts again after its end, as Longformer (Beltagy et al. 2020) initialises its longer one.
 */
export type PositionMode = "exact" | "interpolate" | "repeat";

export interface Positions {
  readonly mode: PositionMode;
  /** Rows of `wpe`. */
  readonly nPositions: number;
  /** Tokens that an interpolated table is stretched over; up to `nPositions` it is not stretched. */
  readonly context: number;
}

export function exactPositions(nPositions: number): Positions {
  return { mode: "exact", nPositions, context: nPositions };
}

/** Positions that exist: no token can be further. */
export function positionLimit({ mode, nPositions, context }: Positions): number {
  return mode === "exact" ? nPositions : mode === "interpolate" ? Math.max(nPositions, context) : Infinity;
}

/** Row and weight of a position below the limit. */
export function positionPlace({ mode, nPositions, context }: Positions, position: number): PositionPlace {
  if (mode === "repeat") return { place: position % nPositions, weight: 0 };
  if (mode === "exact" || context <= nPositions) return { place: position, weight: 0 };
  // First and last position keep the first and last row.
  const at = position * (nPositions - 1) / (context - 1);
  const place = Math.floor(at);
  return { place, weight: at - place };
}

/**
 * The mapping of the first `tokens` positions in words, the same where the places are the same: what a session file
 * remembers.
 */
export function describePositions({ mode, nPositions, context }: Positions, tokens: number): string {
  if (mode === "interpolate" && context > nPositions) return `interpolate ${nPositions} to ${context}`;
  return tokens <= nPositions ? "exact" : `repeat ${nPositions}`;
}
