import type { Elem, Kernel } from "../../runtime/kernel.ts";
import type { RowRange } from "../embedding/embedding.ts";
import text from "./lm_head.wgsl" with { type: "text" };

export interface LmHeadVariant {
  readonly elem: Elem;
  /** Rows of `x` that share one reading of the head. */
  readonly rows: number;
  /** Tokens of one workgroup. */
  readonly vocabTile: number;
  readonly lanesPerToken: number;
}

export interface LmHeadProblem {
  readonly rows: number;
  /** Columns of `x` and the head, a multiple of four. */
  readonly inner: number;
  readonly vocab: number;
  /** The tokens whose rows the bound piece holds. */
  readonly piece: RowRange;
}

/** `logits[rows, vocab] = x · headᵀ` in f32, for one piece of the head. */
export const lmHead: Kernel<LmHeadVariant, LmHeadProblem> = {
  name: "lm_head",
  sources: [{ file: "lm_head/lm_head.wgsl", text }],
  bindings: { x: "read", w: "read", logits: "read_write" },
  params: { rows: "u32", inner4: "u32", vocab: "u32", first_token: "u32", piece_rows: "u32" },
  header: (v) => ({
    aliases: { elem: v.elem },
    consts: { ROWS: v.rows, VOCAB_TILE: v.vocabTile, LANES_PER_TOKEN: v.lanesPerToken },
  }),
  workgroupBytes: (v) => 4 * v.rows * v.vocabTile * v.lanesPerToken, // partial
  workgroupInvocations: (v) => v.vocabTile * v.lanesPerToken,
  values: (_, p) => ({
    rows: p.rows,
    inner4: p.inner / 4,
    vocab: p.vocab,
    first_token: p.piece.first,
    piece_rows: p.piece.rows,
  }),
  grid: (v, p) => [Math.ceil(p.piece.rows / v.vocabTile), Math.ceil(p.rows / v.rows), 1],
};

/** One row, as in decoding, or several that share the reading of the head, as in scoring. */
export function lmHeadVariant(elem: Elem, rows: number): LmHeadVariant {
  return { elem, rows: rows === 1 ? 1 : 8, vocabTile: 8, lanesPerToken: 16 };
}
