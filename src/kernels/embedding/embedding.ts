import { type Elem, type Kernel, type ShaderFile, sizeOf, type Work } from "../../runtime/kernel.ts";
import { foldedGrid, foldGrid, GRID_FOLD } from "../shared/shared.ts";
import bindingsText from "./bindings.wgsl" with { type: "text" };
import positionRowsText from "./position_rows.wgsl" with { type: "text" };
import tokenRowsText from "./token_rows.wgsl" with { type: "text" };

export interface EmbeddingVariant {
  readonly elem: Elem;
  /** Columns of the tables divided by four, padding included. */
  readonly width4: number;
}

/** Which rows of a table a piece holds. */
export interface RowRange {
  readonly first: number;
  readonly rows: number;
}

export interface EmbeddingProblem {
  readonly tokens: number;
  readonly piece: RowRange;
  /** Rows of all pieces, for `work`; those of this one when left out. */
  readonly tableRows?: number;
}

/** Where a token's position lies in the table of position embeddings. */
export interface PositionPlace {
  /** Row of `wpe`. */
  readonly place: number;
  /** How far towards the next row, from 0 to below 1; at 0 that row need not exist. */
  readonly weight: number;
}

/** Bytes of one entry of `tokens`: id, place and weight. */
export const TOKEN_BYTES = 12;

/** Entry `t` of what the kernels read as `tokens`. */
export function packToken(into: DataView, t: number, id: number, { place, weight }: PositionPlace): void {
  into.setUint32(TOKEN_BYTES * t, id, true);
  into.setUint32(TOKEN_BYTES * t + 4, place, true);
  into.setFloat32(TOKEN_BYTES * t + 8, weight, true);
}

const bindings: ShaderFile = { file: "embedding/bindings.wgsl", text: bindingsText };

const common = {
  bindings: { tokens: "read", rows: "read", x: "read_write" },
  params: { token_count: "u32", first_row: "u32", piece_rows: "u32" },
  header: (v: EmbeddingVariant) => ({ aliases: { elem: v.elem }, consts: { WIDTH4: v.width4, GRID_FOLD } }),
  workgroupBytes: () => 0,
  workgroupInvocations: () => 64,
  values: (_: unknown, p: EmbeddingProblem) => ({
    token_count: p.tokens,
    first_row: p.piece.first,
    piece_rows: p.piece.rows,
  }),
  grid: (_: unknown, p: EmbeddingProblem) => foldGrid(p.tokens),
} as const;

/**
 * Which rows tokens take is not in the problem: they count as different ones, though never more than there are, and
 * as spread evenly over the pieces of a table.
 * @param accesses how often a row of `x` is read or written
 */
function rowsWork(
  { elem, width4 }: EmbeddingVariant,
  { tokens, piece, tableRows = piece.rows }: EmbeddingProblem,
  accesses: number,
): Work {
  const here = tokens * piece.rows / tableRows;
  return { bytes: 4 * width4 * (Math.min(here, piece.rows) * sizeOf(elem) + accesses * 4 * here), flops: 0 };
}

/** `x[tokens, width] = wte[ids]` in f32, for the ids in one piece of the table. */
export const tokenRows: Kernel<EmbeddingVariant, EmbeddingProblem> = {
  name: "embedding/token_rows",
  sources: [bindings, { file: "embedding/token_rows.wgsl", text: tokenRowsText }, foldedGrid],
  ...common,
  work: (v, p) => rowsWork(v, p, 1),
};

/** Adds the position embeddings to `x`, for the rows in one piece of the table. */
export const positionRows: Kernel<EmbeddingVariant, EmbeddingProblem> = {
  name: "embedding/position_rows",
  sources: [bindings, { file: "embedding/position_rows.wgsl", text: positionRowsText }, foldedGrid],
  ...common,
  work: (v, p) => rowsWork(v, p, 2),
};
