import type { Elem, Kernel } from "../../runtime/kernel.ts";
import { foldedGrid, foldGrid, GRID_FOLD } from "../shared/shared.ts";
import text from "./embedding.wgsl" with { type: "text" };

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
  readonly firstPosition: number;
  readonly wte: RowRange;
  readonly wpe: RowRange;
}

/** Token plus position embedding, `x[tokens, width]` in f32; one dispatch a pair of table pieces. */
export const embedding: Kernel<EmbeddingVariant, EmbeddingProblem> = {
  name: "embedding",
  sources: [{ file: "embedding/embedding.wgsl", text }, foldedGrid],
  bindings: { ids: "read", wte: "read", wpe: "read", x: "read_write" },
  params: {
    tokens: "u32",
    first_position: "u32",
    wte_first: "u32",
    wte_rows: "u32",
    wpe_first: "u32",
    wpe_rows: "u32",
  },
  header: (v) => ({ aliases: { elem: v.elem }, consts: { WIDTH4: v.width4, GRID_FOLD } }),
  workgroupBytes: () => 0,
  workgroupInvocations: () => 64,
  values: (_, p) => ({
    tokens: p.tokens,
    first_position: p.firstPosition,
    wte_first: p.wte.first,
    wte_rows: p.wte.rows,
    wpe_first: p.wpe.first,
    wpe_rows: p.wpe.rows,
  }),
  grid: (_, p) => foldGrid(p.tokens),
};
