/** WGSL and host helpers that several kernels join to their own text. */
import type { Grid, ShaderFile } from "../../runtime/kernel.ts";
import foldedGridText from "./folded_grid.wgsl" with { type: "text" };
import kvBlocksText from "./kv_blocks.wgsl" with { type: "text" };
import subgroupRowsText from "./subgroup_rows.wgsl" with { type: "text" };
import tripsText from "./trips.wgsl" with { type: "text" };
import workgroupSumText from "./workgroup_sum.wgsl" with { type: "text" };

export const foldedGrid: ShaderFile = { file: "shared/folded_grid.wgsl", text: foldedGridText };
export const workgroupSum: ShaderFile = { file: "shared/workgroup_sum.wgsl", text: workgroupSumText };

export const kvBlocks: ShaderFile = { file: "shared/kv_blocks.wgsl", text: kvBlocksText };

export const subgroupRows: ShaderFile = { file: "shared/subgroup_rows.wgsl", text: subgroupRowsText };

export const tripsHelper: ShaderFile = { file: "shared/trips.wgsl", text: tripsText };

/** The header constant that `trips` reads: unrolled everywhere but on software adapters. */
export function unrollConst(unroll: boolean): { readonly UNROLL: number } {
  return { UNROLL: unroll ? 1 : 0 };
}

/**
 * Tokens of a block of the KV cache. A tile of keys must not cross blocks, so tiles divide it; a context is rounded up to
 * whole blocks, which wastes at most 63 tokens.
 */
export const KV_BLOCK = 64;

/** The part of a layer's heads that one pair of cache buffers holds. */
export interface HeadRange {
  readonly first: number;
  readonly heads: number;
}

/** Workgroups along x of a folded grid; a grid dimension holds at most 65,535. */
export const GRID_FOLD = 32768;

/** The grid of `rows` workgroups that `folded_row` unfolds; x times y may be larger than `rows`. */
export function foldGrid(rows: number): Grid {
  return [Math.min(rows, GRID_FOLD), Math.max(1, Math.ceil(rows / GRID_FOLD)), 1];
}
