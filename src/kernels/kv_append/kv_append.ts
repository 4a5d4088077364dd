import type { Elem, Kernel } from "../../runtime/kernel.ts";
import { foldedGrid, foldGrid, GRID_FOLD } from "../shared/shared.ts";
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
  /** Tokens that the cache has room for. */
  readonly capacity: number;
}

/** Writes the K and V thirds of `qkv[tokens, 3, heads, headDim]` into the cache, in place. */
export const kvAppend: Kernel<KvAppendVariant, KvAppendProblem> = {
  name: "kv_append",
  sources: [{ file: "kv_append/kv_append.wgsl", text }, foldedGrid],
  bindings: { qkv: "read", k: "read_write", v: "read_write" },
  params: { tokens: "u32", first_position: "u32", capacity: "u32" },
  header: (v) => ({
    aliases: { elem: v.elem },
    consts: { HEADS: v.heads, HEAD_DIM4: v.headDim4, GRID_FOLD },
  }),
  workgroupBytes: () => 0,
  workgroupInvocations: () => 64,
  values: (_, p) => ({ tokens: p.tokens, first_position: p.firstPosition, capacity: p.capacity }),
  grid: (_, p) => foldGrid(p.tokens),
};
