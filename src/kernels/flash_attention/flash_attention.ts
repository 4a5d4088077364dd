import { type Elem, type Kernel, type Op, op, type ShaderFile } from "../../runtime/kernel.ts";
import { tripsHelper, unrollConst } from "../shared/shared.ts";
import bindingsText from "./bindings.wgsl" with { type: "text" };
import subgroupText from "./subgroup.wgsl" with { type: "text" };
import tiledText from "./tiled.wgsl" with { type: "text" };

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

export interface SubgroupAttentionVariant {
  readonly elem: Elem;
  readonly heads: number;
  readonly headDim4: number;
  /** Lanes of the device's subgroups, 4 or 8: queries of a workgroup, and keys of a group. */
  readonly subgroup: number;
  /** See `shared/trips.wgsl`. */
  readonly unroll: boolean;
}

const bindings: ShaderFile = { file: "flash_attention/bindings.wgsl", text: bindingsText };

const common = {
  bindings: { qkv: "read", k: "read", v: "read", out: "read_write" },
  params: { q_len: "u32", first_position: "u32", capacity: "u32", scale_log2: "f32", one: "u32" },
  values: (_: unknown, p: FlashAttentionProblem) => ({
    q_len: p.qLen,
    first_position: p.firstPosition,
    capacity: p.capacity,
    scale_log2: p.scale * Math.LOG2E,
    one: 1,
  }),
} as const;

/** Causal attention of `qLen` queries over the cache, whose last keys are the queries' own. */
export const tiledAttention: Kernel<FlashAttentionVariant, FlashAttentionProblem> = {
  name: "flash_attention/tiled",
  sources: [bindings, { file: "flash_attention/tiled.wgsl", text: tiledText }, tripsHelper],
  ...common,
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
  grid: (v, p) => [Math.ceil(p.qLen / v.tileQ), v.heads, 1],
};

/** The same on software Vulkan. */
export const subgroupAttention: Kernel<SubgroupAttentionVariant, FlashAttentionProblem> = {
  name: "flash_attention/subgroup",
  sources: [bindings, { file: "flash_attention/subgroup.wgsl", text: subgroupText }, tripsHelper],
  ...common,
  header: (v) => ({
    aliases: { elem: v.elem },
    subgroup: v.subgroup,
    consts: { HEADS: v.heads, HEAD_DIM4: v.headDim4, ...unrollConst(v.unroll) },
  }),
  workgroupBytes: () => 0,
  workgroupInvocations: (v) => v.subgroup,
  grid: (v, p) => [Math.ceil(p.qLen / v.subgroup), v.heads, 1],
};

/** Candidates in order of preference; `unroll` is false on software adapters only. */
export function attentionCandidates(
  elem: Elem,
  heads: number,
  headDim4: number,
  unroll: boolean,
): Op<FlashAttentionProblem>[] {
  const forSoftware = [8, 4].map((subgroup) =>
    op(subgroupAttention, { elem, heads, headDim4, subgroup, unroll })
  );
  return [
    ...(unroll ? [] : forSoftware),
    ...flashAttentionVariants(elem, heads, headDim4, unroll).map((v) => op(tiledAttention, v)),
  ];
}

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
