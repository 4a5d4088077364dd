/**
 * Textbook attention (Vaswani et al. 2017), which writes all scores to memory: what flash attention is measured against.
 * No model runs it. Three kernels in order, over the same tensors as `flash_attention`; the reference is that one's.
 */
import { type Elem, type Kernel, sizeOf, type Work } from "../../runtime/kernel.ts";
import {
  causalPairs,
  foldedGrid,
  foldGrid,
  GRID_FOLD,
  type HeadRange,
  KV_BLOCK,
  kvBlocks,
  tripsHelper,
  unrollConst,
} from "../shared/shared.ts";
import scoresText from "./scores.wgsl" with { type: "text" };
import softmaxText from "./softmax.wgsl" with { type: "text" };
import valuesText from "./values.wgsl" with { type: "text" };

export interface StandardAttentionVariant {
  readonly elem: Elem;
  readonly heads: number;
  readonly headDim4: number;
  /** See `shared/trips.wgsl`. */
  readonly unroll: boolean;
}

export interface StandardAttentionProblem {
  /** Queries, and keys: the whole context at once. */
  readonly tokens: number;
  /** Blocks that the cache has room for, a head. */
  readonly blocks: number;
  /** The heads in the bound buffer of scores; no others are computed. */
  readonly range: HeadRange;
  /** The heads in the bound keys and values, `range` among them. */
  readonly cached: HeadRange;
  /** Factor on the scores, 1/√headDim for GPT-2. */
  readonly scale: number;
}

/** Queries and keys of a tile; a block of the cache, so that no tile crosses one. */
const TILE = KV_BLOCK;
const THREAD_ROWS = 4;
const LANES = TILE / 4 * (TILE / THREAD_ROWS);
/** Vectors of four that are staged of each row at a time. */
const TILE_INNER4 = 4;

const common = {
  params: {
    tokens: "u32",
    tokens4: "u32",
    blocks: "u32",
    first_head: "u32",
    first_cached: "u32",
    scale: "f32",
    one: "u32",
  },
  workgroupInvocations: () => LANES,
  values: (_: unknown, p: StandardAttentionProblem) => ({
    tokens: p.tokens,
    tokens4: Math.ceil(p.tokens / 4),
    blocks: p.blocks,
    first_head: p.range.first,
    first_cached: p.range.first - p.cached.first,
    scale: p.scale,
    one: 1,
  }),
} as const;

function tileHeader(v: StandardAttentionVariant) {
  return {
    aliases: { elem: v.elem },
    consts: {
      HEADS: v.heads,
      HEAD_DIM4: v.headDim4,
      KV_BLOCK,
      TILE,
      TILE_INNER4,
      THREAD_ROWS,
      LANES,
      ...unrollConst(v.unroll),
    },
  };
}

/** Of a product that has the visible scores as result or factor, and two tensors of heads' rows besides. */
function visibleWork(v: StandardAttentionVariant, { tokens, range }: StandardAttentionProblem): Work {
  const { heads } = range;
  const headDim = 4 * v.headDim4;
  const pairs = heads * causalPairs(tokens);
  return {
    bytes: (pairs + 2 * heads * tokens * headDim) * sizeOf(v.elem),
    flops: 2 * headDim * pairs,
  };
}

/** `scores[heads, tokens, tokens] = q kᵀ · scale`, as far as they are visible. */
export const attentionScores: Kernel<StandardAttentionVariant, StandardAttentionProblem> = {
  name: "standard_attention/scores",
  sources: [{ file: "standard_attention/scores.wgsl", text: scoresText }, kvBlocks, tripsHelper],
  ...common,
  bindings: { qkv: "read", k: "read", block_table: "read", scores: "read_write" },
  header: tileHeader,
  workgroupBytes: () => 2 * 16 * TILE * (TILE_INNER4 + 1), // q_tile + k_tile
  grid: (_, p) => [Math.ceil(p.tokens / TILE), Math.ceil(p.tokens / TILE), p.range.heads],
  work: visibleWork,
};

/** `scores = softmax(scores)` by rows, in place. */
export const attentionSoftmax: Kernel<StandardAttentionVariant, StandardAttentionProblem> = {
  name: "standard_attention/softmax",
  sources: [{ file: "standard_attention/softmax.wgsl", text: softmaxText }, foldedGrid],
  ...common,
  bindings: { scores: "read_write" },
  header: (v) => ({ aliases: { elem: v.elem }, consts: { TILE, LANES, GRID_FOLD } }),
  workgroupBytes: () => 2 * 4 * LANES, // lane_max + lane_sum
  grid(_, p) {
    const [x, y] = foldGrid(p.tokens);
    return [x, y, p.range.heads];
  },
  work: (v, p) => ({ bytes: 2 * p.range.heads * causalPairs(p.tokens) * sizeOf(v.elem), flops: 0 }),
};

/** `out[tokens, heads, headDim] = scores · v`. */
export const attentionValues: Kernel<StandardAttentionVariant, StandardAttentionProblem> = {
  name: "standard_attention/values",
  sources: [{ file: "standard_attention/values.wgsl", text: valuesText }, kvBlocks, tripsHelper],
  ...common,
  bindings: { scores: "read", v: "read", block_table: "read", out: "read_write" },
  header: tileHeader,
  workgroupBytes: () => 16 * (TILE * TILE_INNER4 + 4 * TILE_INNER4 * TILE / 4), // p_tile + v_tile
  grid: (v, p) => [Math.ceil(p.tokens / TILE), Math.ceil(4 * v.headDim4 / TILE), p.range.heads],
  work: visibleWork,
};

/** In the order in which they run. */
export const STANDARD_ATTENTION = [attentionScores, attentionSoftmax, attentionValues] as const;

/** Bytes of one head's scores; rows are padded to four. */
export function scoreBytes(tokens: number, elem: Elem): number {
  return tokens * 4 * Math.ceil(tokens / 4) * sizeOf(elem);
}

/**
 * The heads of a buffer of keys by the buffer that their scores share, as few and as even as `maxBytes` allows; a single
 * head may still exceed it.
 */
export function scoreRanges(cached: HeadRange, tokens: number, elem: Elem, maxBytes: number): HeadRange[] {
  const most = Math.min(cached.heads, Math.max(1, Math.floor(maxBytes / scoreBytes(tokens, elem))));
  const heads = Math.ceil(cached.heads / Math.ceil(cached.heads / most));
  return Array.from({ length: Math.ceil(cached.heads / heads) }, (_, i) => ({
    first: cached.first + i * heads,
    heads: Math.min(heads, cached.heads - i * heads),
  }));
}
