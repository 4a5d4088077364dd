import { type Elem, type Kernel, type Op, op, type ShaderFile } from "../../runtime/kernel.ts";
import {
  type HeadRange,
  KV_BLOCK,
  kvBlocks,
  subgroupRows,
  tripsHelper,
  unrollConst,
} from "../shared/shared.ts";
import bindingsText from "./bindings.wgsl" with { type: "text" };
import registerTiledText from "./register_tiled.wgsl" with { type: "text" };
import subgroupMatrixBindingsText from "./subgroup_matrix_bindings.wgsl" with { type: "text" };
import subgroupMatrixText from "./subgroup_matrix.wgsl" with { type: "text" };
import subgroupText from "./subgroup.wgsl" with { type: "text" };
import tiledText from "./tiled.wgsl" with { type: "text" };

export interface FlashAttentionVariant {
  readonly elem: Elem;
  readonly heads: number;
  readonly headDim4: number;
  /** Queries of one workgroup, one an invocation. */
  readonly tileQ: number;
  /** Keys and values staged at a time; a multiple of `keys` that divides a block of the cache. */
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
  /** Blocks that the cache has room for, a head. */
  readonly blocks: number;
  /** The heads in the bound buffers; no others are computed. */
  readonly range: HeadRange;
  /** Factor on the scores, 1/√headDim for GPT-2. */
  readonly scale: number;
}

export interface RegisterTiledVariant {
  readonly elem: Elem;
  readonly heads: number;
  /** Divides `lanes`. */
  readonly headDim4: number;
  /** Queries of one workgroup. */
  readonly tileQ: number;
  /** Keys and values staged at a time; divides a block of the cache. */
  readonly tileKv: number;
  readonly lanes: number;
  /** See `shared/trips.wgsl`. */
  readonly unroll: boolean;
}

export interface SubgroupMatrixAttentionVariant {
  readonly heads: number;
  /** Subgroups of a workgroup, each with 32 queries. */
  readonly subgroups: number;
}

export interface SubgroupAttentionVariant {
  readonly elem: Elem;
  readonly heads: number;
  readonly headDim4: number;
  /** Lanes of the device's subgroups, 4 or 8: half the queries of a workgroup, and half the keys of a group. */
  readonly subgroup: number;
  /** See `shared/trips.wgsl`. */
  readonly unroll: boolean;
}

const bindings: ShaderFile = { file: "flash_attention/bindings.wgsl", text: bindingsText };

const common = {
  bindings: { qkv: "read", k: "read", v: "read", block_table: "read", out: "read_write" },
  params: {
    q_len: "u32",
    first_position: "u32",
    blocks: "u32",
    first_head: "u32",
    scale_log2: "f32",
    one: "u32",
  },
  values: (_: unknown, p: FlashAttentionProblem) => ({
    q_len: p.qLen,
    first_position: p.firstPosition,
    blocks: p.blocks,
    first_head: p.range.first,
    scale_log2: p.scale * Math.LOG2E,
    one: 1,
  }),
} as const;

/** Causal attention of `qLen` queries over the cache, whose last keys are the queries' own. */
export const tiledAttention: Kernel<FlashAttentionVariant, FlashAttentionProblem> = {
  name: "flash_attention/tiled",
  sources: [bindings, { file: "flash_attention/tiled.wgsl", text: tiledText }, kvBlocks, tripsHelper],
  ...common,
  header: (v) => ({
    aliases: { elem: v.elem },
    consts: {
      HEADS: v.heads,
      HEAD_DIM4: v.headDim4,
      KV_BLOCK,
      TILE_Q: v.tileQ,
      TILE_KV: v.tileKv,
      KEYS: v.keys,
      ...unrollConst(v.unroll),
    },
  }),
  workgroupBytes: (v) => 2 * 16 * v.headDim4 * v.tileKv, // k_tile + v_tile
  workgroupInvocations: (v) => v.tileQ,
  grid: (v, p) => [Math.ceil(p.qLen / v.tileQ), p.range.heads, 1],
};

/** The same with both products tiled in registers, for the heads of published models. */
export const registerTiledAttention: Kernel<RegisterTiledVariant, FlashAttentionProblem> = {
  name: "flash_attention/register_tiled",
  sources: [
    bindings,
    { file: "flash_attention/register_tiled.wgsl", text: registerTiledText },
    kvBlocks,
    tripsHelper,
  ],
  ...common,
  header: (v) => ({
    aliases: { elem: v.elem },
    consts: {
      HEADS: v.heads,
      HEAD_DIM4: v.headDim4,
      KV_BLOCK,
      TILE_Q: v.tileQ,
      TILE_KV: v.tileKv,
      LANES: v.lanes,
      ...unrollConst(v.unroll),
    },
  }),
  workgroupBytes: ({ headDim4, tileQ, tileKv }) =>
    16 * (tileQ + tileKv) * (headDim4 + 1) + // q_tile + kv_tile
    16 * tileQ * (tileKv / 4 + 1) + // p_tile
    4 * tileQ * (tileKv / 4 + 1), // row_part + row_scale
  workgroupInvocations: (v) => v.lanes,
  grid: (v, p) => [p.range.heads, Math.ceil(p.qLen / v.tileQ), 1],
};

/** Subgroups that share a tile of keys: 23 KiB of workgroup memory, so that two workgroups share a multiprocessor. */
const ATTENTION_SUBGROUPS = 4;

/** Rows of `qkv` that attention may read, past the last query too; what is there is not used. */
export const ATTENTION_ROWS = 32 * ATTENTION_SUBGROUPS;

/** Whether the kernel for tensor cores is made for such heads. */
export function takesMatrices(elem: Elem, headDim4: number): boolean {
  return elem === "f16" && headDim4 === 16;
}

/** The same on tensor cores, for heads of 64 columns; `qkv` has a multiple of `32 · subgroups` rows. */
export const subgroupMatrixAttention: Kernel<SubgroupMatrixAttentionVariant, FlashAttentionProblem> = {
  name: "flash_attention/subgroup_matrix",
  sources: [
    { file: "flash_attention/subgroup_matrix_bindings.wgsl", text: subgroupMatrixBindingsText },
    { file: "flash_attention/subgroup_matrix.wgsl", text: subgroupMatrixText },
    kvBlocks,
  ],
  ...common,
  header: (v) => ({
    aliases: { elem: "f16" },
    subgroupMatrix: true,
    consts: {
      HEADS: v.heads,
      KV_BLOCK,
      SUBGROUPS: v.subgroups,
    },
  }),
  workgroupBytes: ({ subgroups }) =>
    16 * 32 * subgroups * 9 + // arena
    16 * 32 * 9 + // kv_tile
    16, // grew
  workgroupInvocations: (v) => 32 * v.subgroups,
  grid: (v, p) => [p.range.heads, Math.ceil(p.qLen / (32 * v.subgroups)), 1],
};

/** The same on software Vulkan. */
export const subgroupAttention: Kernel<SubgroupAttentionVariant, FlashAttentionProblem> = {
  name: "flash_attention/subgroup",
  sources: [
    bindings,
    { file: "flash_attention/subgroup.wgsl", text: subgroupText },
    kvBlocks,
    subgroupRows,
    tripsHelper,
  ],
  ...common,
  header: (v) => ({
    aliases: { elem: v.elem },
    subgroup: v.subgroup,
    consts: { HEADS: v.heads, HEAD_DIM4: v.headDim4, KV_BLOCK, ...unrollConst(v.unroll) },
  }),
  workgroupBytes: () => 0,
  workgroupInvocations: (v) => v.subgroup,
  grid(v, p) {
    const tile = 2 * v.subgroup; // queries, and vectors of an output row
    return [Math.ceil(p.qLen / tile), p.range.heads, Math.ceil(v.headDim4 / tile)];
  },
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
    ...(takesMatrices(elem, headDim4)
      ? [op(subgroupMatrixAttention, { heads, subgroups: ATTENTION_SUBGROUPS })]
      : []),
    ...registerTiledVariants(elem, heads, headDim4, unroll).map((v) => op(registerTiledAttention, v)),
    ...flashAttentionVariants(elem, heads, headDim4, unroll).map((v) => op(tiledAttention, v)),
  ];
}

/**
 * Heads of 32, 64 and 128 columns, whose columns divide the lanes. With heads of 64 a workgroup has 23 KiB of memory, so
 * that two share an H100's multiprocessor, and larger tiles were slower (docs/benchmarks.md).
 */
export function registerTiledVariants(
  elem: Elem,
  heads: number,
  headDim4: number,
  unroll: boolean,
): RegisterTiledVariant[] {
  if (![8, 16, 32].includes(headDim4)) return [];
  return [{ elem, heads, headDim4, tileQ: 32, tileKv: 32, lanes: 128, unroll }];
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
