import type { Elem, Kernel } from "../../runtime/kernel.ts";
import {
  type HeadRange,
  KV_BLOCK,
  kvBlocks,
  tripsHelper,
  unrollConst,
  workgroupSum,
} from "../shared/shared.ts";
import combineText from "./combine.wgsl" with { type: "text" };
import splitText from "./split_kv.wgsl" with { type: "text" };

export interface FlashDecodeVariant {
  readonly elem: Elem;
  readonly heads: number;
  readonly headDim4: number;
  /** Keys of one workgroup. */
  readonly split: number;
  readonly lanes: number;
  /** See `shared/trips.wgsl`. */
  readonly unroll: boolean;
}

export interface FlashDecodeProblem {
  /** Keys in the cache, the query's own included. */
  readonly kvLen: number;
  /** Blocks that the cache has room for, a head. */
  readonly blocks: number;
  readonly scale: number;
}

/** A problem for the heads in one pair of cache buffers. */
export interface SplitKvProblem extends FlashDecodeProblem {
  readonly range: HeadRange;
}

/** Slices that `kvLen` keys are cut into. */
export function splitCount(v: FlashDecodeVariant, kvLen: number): number {
  return Math.ceil(kvLen / v.split);
}

function header(v: FlashDecodeVariant) {
  return {
    aliases: { elem: v.elem },
    consts: {
      HEADS: v.heads,
      HEAD_DIM4: v.headDim4,
      KV_BLOCK,
      SPLIT: v.split,
      LANES: v.lanes,
      ...unrollConst(v.unroll),
    },
  };
}

/** Attention of one query over slices of the cache, unnormalised: `[splits, heads, headDim]` with maxima and sums. */
export const splitKvAttention: Kernel<FlashDecodeVariant, SplitKvProblem> = {
  name: "flash_decode/split_kv",
  sources: [{ file: "flash_decode/split_kv.wgsl", text: splitText }, kvBlocks, workgroupSum, tripsHelper],
  bindings: {
    qkv: "read",
    k: "read",
    v: "read",
    block_table: "read",
    partial_out: "read_write",
    partial_ml: "read_write",
  },
  params: { kv_len: "u32", blocks: "u32", first_head: "u32", scale_log2: "f32", one: "u32" },
  header,
  workgroupBytes: (v) =>
    16 * v.headDim4 + // q
    4 * v.split + // scores
    2 * 4 * v.lanes + // lane_max, lane_values
    16 * Math.floor(v.lanes / v.headDim4) * v.headDim4, // sums
  workgroupInvocations: (v) => v.lanes,
  values: (_, p) => ({
    kv_len: p.kvLen,
    blocks: p.blocks,
    first_head: p.range.first,
    scale_log2: p.scale * Math.LOG2E,
    one: 1,
  }),
  grid: (v, p) => [splitCount(v, p.kvLen), p.range.heads, 1],
};

/** Merges the slices into `out[heads, headDim]`. */
export const combineSplits: Kernel<FlashDecodeVariant, FlashDecodeProblem> = {
  name: "flash_decode/combine",
  sources: [{ file: "flash_decode/combine.wgsl", text: combineText }],
  bindings: { partial_out: "read", partial_ml: "read", out: "read_write" },
  params: { splits: "u32" },
  header,
  workgroupBytes: () => 0,
  workgroupInvocations: () => 64,
  values: (v, p) => ({ splits: splitCount(v, p.kvLen) }),
  grid: (v) => [v.heads, 1, 1],
};

/** Keys of a slice: the same for every variant, so that any of them goes with any `combine`. */
const SPLIT = 256;

/** Slices of every variant that runs in a model: the size of its scratch buffers. */
export function decodeSplits(kvLen: number): number {
  return Math.ceil(kvLen / SPLIT);
}

/** The variant for a head's width: a lane for every four columns, at least 128 to share the keys. */
export function flashDecodeVariants(
  elem: Elem,
  heads: number,
  headDim4: number,
  unroll: boolean,
): FlashDecodeVariant[] {
  const lanes = [128, 256, 1024].find((n) => n >= headDim4);
  return lanes === undefined ? [] : [{ elem, heads, headDim4, split: SPLIT, lanes, unroll }];
}
