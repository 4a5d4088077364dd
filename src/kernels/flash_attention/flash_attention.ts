import type { Elem, Kernel } from "../../runtime/kernel.ts";
import { tripsHelper, unrollConst } from "../shared/shared.ts";
import text from "./tiled.wgsl" with { type: "text" };

export interface FlashAttentionVariant {
  readonly elem: Elem;
  readonly heads: number;
  readonly headDim4: number;
  /** Queries of one workgroup, one an invocation. */
  readonly tileQ: number;
  /** Keys and values staged at a time; a multiple of `keys`. */
  readonly tileKv: number;
  /** Scores held at a time by one invocation, and keys between two rescalings of its output. */
  readonly keys: number;
  /** See `shared/trips.wgsl`. */
  readonly unroll: boolean;
}

export interface FlashAttentionProblem {
  readonly qLen: number;
  /** Position of the first query; queries see the keys up to their own position. */
  readonly firstPosition: number;
  readonly capacity: number;
  /** Factor on the scores, 1/√headDim for GPT-2. */
  readonly scale: number;
}

/** Causal attention of `qLen` queries over the cache, whose last keys are the queries' own. */
export const tiledAttention: Kernel<FlashAttentionVariant, FlashAttentionProblem> = {
  name: "flash_attention/tiled",
  sources: [{ file: "flash_attention/tiled.wgsl", text }, tripsHelper],
  bindings: { qkv: "read", k: "read", v: "read", out: "read_write" },
  params: { q_len: "u32", first_position: "u32", capacity: "u32", scale_log2: "f32", one: "u32" },
  header: (v) => ({
    aliases: { elem: v.elem },
    consts: {
      HEADS: v.heads,
      HEAD_DIM4: v.headDim4,
      TILE_Q: v.tileQ,
      TILE_KV: v.tileKv,
      KEYS: v.keys,
      ...unrollConst(v.unroll),
    },
  }),
  workgroupBytes: (v) => 2 * 16 * v.headDim4 * v.tileKv, // k_tile + v_tile
  workgroupInvocations: (v) => v.tileQ,
  values: (_, p) => ({
    q_len: p.qLen,
    first_position: p.firstPosition,
    capacity: p.capacity,
    scale_log2: p.scale * Math.LOG2E,
    one: 1,
  }),
  grid: (v, p) => [Math.ceil(p.qLen / v.tileQ), v.heads, 1],
};

/** In order of preference: smaller tiles are for large heads and little workgroup memory. */
export function flashAttentionVariants(
  elem: Elem,
  heads: number,
  headDim4: number,
  unroll: boolean,
): FlashAttentionVariant[] {
  return [32, 16, 8, 4].map((tileKv) => ({
    elem,
    heads,
    headDim4,
    tileQ: 64,
    tileKv,
    keys: Math.min(tileKv, 8),
    unroll,
  }));
}
