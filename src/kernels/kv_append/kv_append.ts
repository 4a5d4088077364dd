import { type Elem, type Kernel, sizeOf } from "../../runtime/kernel.ts";
import { foldedGrid, foldGrid, GRID_FOLD, type HeadRange, KV_BLOCK, kvBlocks } from "../shared/shared.ts";
import text from "./kv_append.wgsl" with { type: "text" };

export interface KvAppendVariant {
  readonly elem: Elem;
  readonly heads: number;
  readonly headDim4: number;
}

export interface KvAppendProblem {
  readonly tokens: number;
  /** Position of the first new token in the cache. */
  readonly firstPosition: number;
  /** Blocks that the cache has room for, a head. */
  readonly blocks: number;
  /** The heads in the bound buffers. */
  readonly range: HeadRange;
}

/** Writes the K and V thirds of `qkv[tokens, 3, heads, headDim]` into the cache, in place. */
export const kvAppend: Kernel<KvAppendVariant, KvAppendProblem> = {
  name: "kv_append",
  sources: [{ file: "kv_append/kv_append.wgsl", text }, kvBlocks, foldedGrid],
  bindings: { qkv: "read", block_table: "read", k: "read_write", v: "read_write" },
  params: { tokens: "u32", first_position: "u32", blocks: "u32", first_head: "u32", range_heads: "u32" },
  header: (v) => ({
    aliases: { elem: v.elem },
    consts: { HEADS: v.heads, HEAD_DIM4: v.headDim4, KV_BLOCK, GRID_FOLD },
  }),
  workgroupBytes: () => 0,
  workgroupInvocations: () => 64,
  values: (_, p) => ({
    tokens: p.tokens,
    first_position: p.firstPosition,
    blocks: p.blocks,
    first_head: p.range.first,
    range_heads: p.range.heads,
  }),
  grid: (_, p) => foldGrid(p.tokens),
  work: (v, p) => ({ bytes: 2 * 2 * p.tokens * p.range.heads * 4 * v.headDim4 * sizeOf(v.elem), flops: 0 }),
};
