import {
  type Elem,
  type Grid,
  type Kernel,
  type Op,
  op,
  type ShaderFile,
  type ShaderHeader,
  sizeOf,
} from "../../runtime/kernel.ts";
import {
  blockListsHelper,
  causalPairs,
  type HeadRange,
  KV_BLOCK,
  kvBlocks,
  subgroupRows,
  tripsHelper,
  unrollConst,
} from "../shared/shared.ts";
import bindingsText from "./bindings.wgsl" with { type: "text" };
import causalText from "./causal.wgsl" with { type: "text" };
import listBindingsText from "./list_bindings.wgsl" with { type: "text" };
import normalizedText from "./normalized.wgsl" with { type: "text" };
import queryTilesText from "./query_tiles.wgsl" with { type: "text" };
import registerTiledShader from "./register_tiled.wgsl" with { type: "text" };
import segmentBindingsText from "./segment_bindings.wgsl" with { type: "text" };
import subgroupMatrixBindingsText from "./subgroup_matrix_bindings.wgsl" with { type: "text" };
import subgroupMatrixShader from "./subgroup_matrix.wgsl" with { type: "text" };
import subgroupShader from "./subgroup.wgsl" with { type: "text" };
import tiledShader from "./tiled.wgsl" with { type: "text" };
import walkAllText from "./walk_all.wgsl" with { type: "text" };
import walkListsText from "./walk_lists.wgsl" with { type: "text" };
import walkSegmentsText from "./walk_segments.wgsl" with { type: "text" };

/** What a tile of queries attends to: all keys before it, those of a block mask, or those of its segment of a pack. */
export type AttentionWalk = "all" | "lists" | "segments";

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
  /** Position of the first query, in a pack a multiple of `KV_BLOCK`; queries see no keys behind their own position. */
  readonly firstPosition: number;
  /** Blocks that the cache has room for, a head. */
  readonly blocks: number;
  /** The heads in the bound buffers; no others are computed. */
  readonly range: HeadRange;
  /** Factor on the scores, 1/√headDim for GPT-2. */
  readonly scale: number;
  /** What lists or segments leave, for `work`, which counts no keys without it. */
  readonly attended?: (() => AttendedKeys) | undefined;
}

/** What the queries of a dispatch attend to, over all of its heads. */
export interface AttendedKeys {
  /** Pairs of a query and a key that it attends to. */
  readonly pairs: number;
  /** Keys that some query attends to. */
  readonly keys: number;
}

/**
 * What the queries of a pack attend to, those of rows that only fill up a block too.
 * @param segments `[qLen, 4]`, as `walk_segments.wgsl` describes them
 */
export function packAttended(
  segments: Uint32Array,
  { range, firstPosition }: Pick<FlashAttentionProblem, "range" | "firstPosition">,
): AttendedKeys {
  const isSeen = new Uint8Array(firstPosition + segments.length / 4);
  let pairs = 0;
  for (let at = 0; at < segments.length; at += 4) {
    const sharedFirst = segments[at]!;
    const sharedEnd = segments[at + 1]!;
    const start = segments[at + 3]!;
    const place = firstPosition + at / 4;
    pairs += sharedEnd - sharedFirst + place + 1 - start;
    // Most queries see what the one before does, and themselves.
    const isAsBefore = (i: number) => at > 0 && segments[at + i] === segments[at + i - 4];
    if (!isAsBefore(0) || !isAsBefore(1)) isSeen.fill(1, sharedFirst, sharedEnd);
    isSeen.fill(1, isAsBefore(3) ? place : start, place + 1);
  }
  const keys = isSeen.reduce((sum, seen) => sum + seen, 0);
  return { pairs: range.heads * pairs, keys: range.heads * keys };
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

const file = (name: string, text: string): ShaderFile => ({ file: `flash_attention/${name}.wgsl`, text });

const bindings = file("bindings", bindingsText);
const causal = file("causal", causalText);
const queryTiles = file("query_tiles", queryTilesText);

/** What the kernels of one walk have in common, whatever their text. */
const WALKS: Readonly<
  Record<AttentionWalk, {
    /** Of their names. */
    readonly prefix: string;
    readonly sources: readonly ShaderFile[];
    /** Behind those of all texts. */
    readonly bindings: Readonly<Record<string, "read">>;
    /** Over all heads of a dispatch. */
    attended(p: FlashAttentionProblem): AttendedKeys;
  }>
> = {
  all: {
    prefix: "",
    sources: [file("walk_all", walkAllText), queryTiles, causal],
    bindings: {},
    attended: ({ qLen, firstPosition, range: { heads } }) => ({
      pairs: heads * causalPairs(qLen, firstPosition),
      keys: heads * (firstPosition + qLen),
    }),
  },
  lists: {
    prefix: "sparse_",
    sources: [
      file("list_bindings", listBindingsText),
      file("walk_lists", walkListsText),
      blockListsHelper,
      causal,
    ],
    bindings: { block_lists: "read" },
    attended: attendedAsTold,
  },
  segments: {
    prefix: "packed_",
    sources: [
      file("segment_bindings", segmentBindingsText),
      file("walk_segments", walkSegmentsText),
      queryTiles,
    ],
    bindings: { segments: "read" },
    attended: attendedAsTold,
  },
};

function attendedAsTold({ attended }: FlashAttentionProblem): AttendedKeys {
  return attended?.() ?? { pairs: 0, keys: 0 };
}

/** What the kernels of one text differ in, whatever they walk over. */
interface AttentionText<V> {
  readonly name: string;
  readonly sources: readonly ShaderFile[];
  /** Queries of a workgroup; divides a block of the cache where lists or segments are walked. */
  tileQ(v: V): number;
  /** How the heads of queries, keys and values are stored. */
  head(v: V): { readonly elem: Elem; readonly headDim4: number };
  header(v: V): ShaderHeader;
  workgroupBytes(v: V): number;
  workgroupInvocations(v: V): number;
  /** @param tiles of queries */
  grid(v: V, heads: number, tiles: number): Grid;
}

function attentionKernel<V>(
  text: AttentionText<V>,
  walk: AttentionWalk,
): Kernel<V, FlashAttentionProblem> {
  const { prefix, sources, bindings, attended } = WALKS[walk];
  return {
    name: `flash_attention/${prefix}${text.name}`,
    sources: [...text.sources, ...sources, file("normalized", normalizedText), kvBlocks],
    bindings: {
      qkv: "read",
      k: "read",
      v: "read",
      block_table: "read",
      out: "read_write",
      ...bindings,
    },
    params: {
      q_len: "u32",
      first_position: "u32",
      blocks: "u32",
      first_head: "u32",
      scale_log2: "f32",
      one: "u32",
    },
    header: (v) => text.header(v),
    workgroupBytes: (v) => text.workgroupBytes(v),
    workgroupInvocations: (v) => text.workgroupInvocations(v),
    values: (_, p) => ({
      q_len: p.qLen,
      first_position: p.firstPosition,
      blocks: p.blocks,
      first_head: p.range.first,
      scale_log2: p.scale * Math.LOG2E,
      one: 1,
    }),
    grid(v, { qLen, firstPosition, range }) {
      const tile = text.tileQ(v);
      // Tiles that follow lists begin at positions that are multiples of their size.
      const before = walk === "lists" ? firstPosition % tile : 0;
      return text.grid(v, range.heads, Math.ceil((before + qLen) / tile));
    },
    work(v, p) {
      const { elem, headDim4 } = text.head(v);
      const { pairs, keys } = attended(p);
      const rows = 2 * p.range.heads * p.qLen + 2 * keys; // q, out; k, v
      return { bytes: rows * 4 * headDim4 * sizeOf(elem), flops: 2 * 2 * 4 * headDim4 * pairs };
    },
  };
}

/** A text's kernels, one for each walk. */
function attentionKernels<V>(
  text: AttentionText<V>,
): Readonly<Record<AttentionWalk, Kernel<V, FlashAttentionProblem>>> {
  return {
    all: attentionKernel(text, "all"),
    lists: attentionKernel(text, "lists"),
    segments: attentionKernel(text, "segments"),
  };
}

const tiledText: AttentionText<FlashAttentionVariant> = {
  name: "tiled",
  sources: [bindings, file("tiled", tiledShader), tripsHelper],
  tileQ: (v) => v.tileQ,
  head: (v) => v,
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
  grid: (_, heads, tiles) => [tiles, heads, 1],
};

const tiled = attentionKernels(tiledText);
/** Causal attention of `qLen` queries over the cache, whose last keys are the queries' own. */
export const tiledAttention = tiled.all;

const registerTiledText: AttentionText<RegisterTiledVariant> = {
  name: "register_tiled",
  sources: [bindings, file("register_tiled", registerTiledShader), tripsHelper],
  tileQ: (v) => v.tileQ,
  head: (v) => v,
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
  grid: (_, heads, tiles) => [heads, tiles, 1],
};

/** The same with both products tiled in registers, for the heads of published models. */
const registerTiled = attentionKernels(registerTiledText);

/** Subgroups that share a tile of keys: 23 KiB of workgroup memory, so that two workgroups share a multiprocessor. */
const ATTENTION_SUBGROUPS = 4;
/** The same where a tile of queries must not be longer than a block of the cache: with lists and segments. */
const BLOCK_SUBGROUPS = KV_BLOCK / 32;

/** Rows of `qkv` that attention may read, past the last query too; what is there is not used. */
export const ATTENTION_ROWS = 32 * ATTENTION_SUBGROUPS;

/** Whether the kernel for tensor cores is made for such heads. */
export function takesMatrices(elem: Elem, headDim4: number): boolean {
  return elem === "f16" && headDim4 === 16;
}

const subgroupMatrixText: AttentionText<SubgroupMatrixAttentionVariant> = {
  name: "subgroup_matrix",
  sources: [
    file("subgroup_matrix_bindings", subgroupMatrixBindingsText),
    file("subgroup_matrix", subgroupMatrixShader),
  ],
  tileQ: (v) => 32 * v.subgroups,
  head: () => ({ elem: "f16", headDim4: 16 }),
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
  grid: (_, heads, tiles) => [heads, tiles, 1],
};

/**
 * The same on tensor cores, for heads of 64 columns; `qkv` has a multiple of `32 · subgroups` rows, and with lists as many
 * more as the first tile of queries lacks.
 */
const subgroupMatrix = attentionKernels(subgroupMatrixText);

const subgroupText: AttentionText<SubgroupAttentionVariant> = {
  name: "subgroup",
  sources: [bindings, file("subgroup", subgroupShader), subgroupRows, tripsHelper],
  tileQ: (v) => 2 * v.subgroup,
  head: (v) => v,
  header: (v) => ({
    aliases: { elem: v.elem },
    subgroup: v.subgroup,
    consts: { HEADS: v.heads, HEAD_DIM4: v.headDim4, KV_BLOCK, ...unrollConst(v.unroll) },
  }),
  workgroupBytes: () => 0,
  workgroupInvocations: (v) => v.subgroup,
  // As many vectors of an output row as queries.
  grid: (v, heads, tiles) => [tiles, heads, Math.ceil(v.headDim4 / (2 * v.subgroup))],
};

const subgroup = attentionKernels(subgroupText);
/** The same on software Vulkan. */
export const subgroupAttention = subgroup.all;

/** Candidates in order of preference; `unroll` is false on software adapters only. */
export function attentionCandidates(
  elem: Elem,
  heads: number,
  headDim4: number,
  unroll: boolean,
  walk: AttentionWalk = "all",
): Op<FlashAttentionProblem>[] {
  const forSoftware = [8, 4].map((lanes) =>
    op(subgroup[walk], { elem, heads, headDim4, subgroup: lanes, unroll })
  );
  const subgroups = walk === "all" ? ATTENTION_SUBGROUPS : BLOCK_SUBGROUPS;
  return [
    ...(unroll ? [] : forSoftware),
    ...(takesMatrices(elem, headDim4) ? [op(subgroupMatrix[walk], { heads, subgroups })] : []),
    ...registerTiledVariants(elem, heads, headDim4, unroll).map((v) => op(registerTiled[walk], v)),
    ...flashAttentionVariants(elem, heads, headDim4, unroll).map((v) => op(tiled[walk], v)),
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
