import {
  type Elem,
  type Grid,
  type Kernel,
  type Op,
  op,
  type ShaderFile,
  sizeOf,
} from "../../runtime/kernel.ts";
import { type HeadRange, KV_BLOCK, sequenceStruct, tripsHelper, unrollConst } from "../shared/shared.ts";
import summaryText from "./block_summary.wgsl" with { type: "text" };
import selectText from "./select.wgsl" with { type: "text" };
import subgroupText from "./select_subgroup.wgsl" with { type: "text" };
import workgroupText from "./select_workgroup.wgsl" with { type: "text" };
import summarizeText from "./summarize.wgsl" with { type: "text" };

/** Blocks that are always kept, the first and the two last, and one that is chosen. */
export const LEAST_KEPT = 4;

export interface SummarizeVariant {
  readonly elem: Elem;
  readonly headDim4: number;
  /** Lanes of a block's workgroup. */
  readonly lanes: number;
  /** See `shared/trips.wgsl`. */
  readonly unroll: boolean;
}

export interface SummarizeProblem {
  /** Blocks that each head has room for, those of all sequences together. */
  readonly blocks: number;
  /** Blocks that the table lists for each sequence. */
  readonly tableBlocks: number;
  /** The sequence whose blocks are summarised: a line of the table. */
  readonly sequence: number;
  /** The first of those blocks, counted from the sequence's beginning. */
  readonly firstBlock: number;
  /** How many they are; all of them are complete. */
  readonly count: number;
  /** The heads in the bound buffers. */
  readonly range: HeadRange;
}

export interface SelectVariant extends SummarizeVariant {
  readonly heads: number;
  /** Lanes that share a block, a power of two that divides `lanes`, which is one from 16 on. */
  readonly rowLanes: number;
  /** Vectors of a row that a lane loads at a time. */
  readonly vectors: number;
  /** Blocks that a lane loads them of at a time. */
  readonly batch: number;
  /** Blocks that a sequence's table lists at most, up to 65,535. */
  readonly capacity: number;
}

export interface SubgroupSelectVariant extends SelectVariant {
  /** Lanes of the device's subgroups; divides `lanes`, and `rowLanes` divides it. */
  readonly subgroup: number;
}

export interface SelectProblem {
  readonly sequences: number;
  /** Blocks that each head has room for, those of all sequences together. */
  readonly blocks: number;
  /** Blocks that the table lists for each sequence, at most the variant's `capacity`. */
  readonly tableBlocks: number;
  /** Blocks that are kept, at least `LEAST_KEPT`. */
  readonly keep: number;
  /** Sequences of fewer blocks, the one of the new token included, keep all of them. */
  readonly leastBlocks: number;
  /** The heads in the bound buffers; no others are chosen for. */
  readonly range: HeadRange;
}

const file = (name: string, text: string): ShaderFile => ({ file: `block_selection/${name}.wgsl`, text });

const summary = file("block_summary", summaryText);

/** Most rows of a block that lanes stand on at a time: more of them add up longer than they load. */
const MAX_ROW_GROUPS = 8;

/** `columns` lanes side by side, and as many rows of them as there are lanes for, a power of two. */
function summaryLanes({ headDim4, lanes }: SummarizeVariant) {
  const columns = Math.min(headDim4, lanes);
  return { columns, rowGroups: Math.min(MAX_ROW_GROUPS, 2 ** Math.floor(Math.log2(lanes / columns))) };
}

function summaryConsts(v: SummarizeVariant) {
  const { columns, rowGroups } = summaryLanes(v);
  return {
    HEAD_DIM4: v.headDim4,
    KV_BLOCK,
    LANES: v.lanes,
    COLUMNS: columns,
    ROW_GROUPS: rowGroups,
    ...unrollConst(v.unroll),
  };
}

/** Bytes of `column_sums`. */
function summaryWorkgroupBytes(v: SummarizeVariant): number {
  const { columns, rowGroups } = summaryLanes(v);
  return 16 * rowGroups * columns;
}

/**
 * Summaries of complete blocks: of the keys of each block and head the mean of every column and its standard
 * deviation (population), in `summaries[heads here, blocks, 2, headDim]`, by where the block is in memory.
 * Sums are f32; equal keys have a spread of exactly 0, and a mean far larger than the spread does not cost it
 * digits.
 */
export const summarizeBlocks: Kernel<SummarizeVariant, SummarizeProblem> = {
  name: "block_selection/summarize",
  sources: [file("summarize", summarizeText), summary, tripsHelper],
  bindings: { k: "read", block_table: "read", summaries: "read_write" },
  params: { blocks: "u32", table_blocks: "u32", sequence: "u32", first_block: "u32", one: "u32" },
  header: (v) => ({ aliases: { elem: v.elem }, consts: summaryConsts(v) }),
  workgroupBytes: summaryWorkgroupBytes,
  workgroupInvocations: (v) => v.lanes,
  values: (_, p) => ({
    blocks: p.blocks,
    table_blocks: p.tableBlocks,
    sequence: p.sequence,
    first_block: p.firstBlock,
    one: 1,
  }),
  grid: (_, p) => [p.count, p.range.heads, 1],
};

const BINS = 256;

const selecting = {
  bindings: {
    qkv: "read",
    k: "read",
    block_table: "read",
    sequences: "read",
    summaries: "read_write",
    selected: "read_write",
  },
  paramsIn: "uniform",
  params: {
    blocks: "u32",
    table_blocks: "u32",
    first_head: "u32",
    keep: "u32",
    least_blocks: "u32",
    one: "u32",
  },
  workgroupInvocations: (v: SelectVariant) => v.lanes,
  values: (_: unknown, p: SelectProblem) => ({
    blocks: p.blocks,
    table_blocks: p.tableBlocks,
    first_head: p.range.first,
    keep: p.keep,
    least_blocks: p.leastBlocks,
    one: 1,
  }),
  grid: (_: unknown, p: SelectProblem): Grid => [p.range.heads, p.sequences, 1],
} as const;

function selectConsts(v: SelectVariant) {
  return {
    ...summaryConsts(v),
    HEADS: v.heads,
    ROW_LANES: v.rowLanes,
    VECTORS: v.vectors,
    BATCH: v.batch,
    CAPACITY: v.capacity,
  };
}

/** `bytes` as they count in workgroup memory. */
function aligned(bytes: number): number {
  return 16 * Math.ceil(bytes / 16);
}

function selectWorkgroupBytes(v: SelectVariant): number {
  const trip4 = v.rowLanes * v.vectors;
  return 16 * trip4 * Math.ceil(v.headDim4 / trip4) + // query
    aligned(4 * v.capacity) + // keys
    16 + // extremes
    4 * BINS + // bins
    16 + // found
    summaryWorkgroupBytes(v);
}

/**
 * The blocks of keys that each sequence and head attends to in one step of decoding, in the spirit of Quest
 * (Tang et al. 2024) with other summaries: `selected[sequences, heads, 1 + tableBlocks]` gets the number of
 * blocks, and then the blocks themselves in ascending order, counted from the sequence's beginning.
 *
 * A sequence of up to `keep` blocks, or of fewer than `leastBlocks`, keeps all. Of others exactly `keep`
 * blocks are kept: the first, the two last, and those with the largest `Σ_d q_d mean_d + |q_d| spread_d` in
 * f32, of equal scores the later. A score is off by no more than `(2 headDim + 1) 2^-24` of the sum of its
 * terms' magnitudes.
 *
 * Summaries must be there of all blocks that are complete, except of the one that the step before has
 * completed: this kernel writes that one, if `length` is a multiple of 64. Those of other blocks are not
 * read.
 */
export const selectBlocks: Kernel<SelectVariant, SelectProblem> = {
  name: "block_selection/select",
  sources: [
    file("select", selectText),
    file("select_workgroup", workgroupText),
    summary,
    sequenceStruct,
    tripsHelper,
  ],
  ...selecting,
  header: (v) => ({ aliases: { elem: v.elem }, consts: selectConsts(v) }),
  workgroupBytes: (v) =>
    selectWorkgroupBytes(v) +
    4 * v.lanes + // lane_words
    aligned(4 * v.lanes / 16), // chunk_sums
};

/** The same with subgroups. */
export const subgroupSelectBlocks: Kernel<SubgroupSelectVariant, SelectProblem> = {
  name: "block_selection/subgroup_select",
  sources: [
    file("select", selectText),
    file("select_subgroup", subgroupText),
    summary,
    sequenceStruct,
    tripsHelper,
  ],
  ...selecting,
  header: (v) => ({ aliases: { elem: v.elem }, subgroup: v.subgroup, consts: selectConsts(v) }),
  workgroupBytes: (v) => selectWorkgroupBytes(v) + aligned(4 * v.lanes / v.subgroup), // subgroup_sums
};

/** `unroll` is false on software adapters only, where the cost of a barrier grows with the lanes. */
export function summarizeCandidates(elem: Elem, headDim4: number, unroll: boolean): Op<SummarizeProblem>[] {
  return [op(summarizeBlocks, { elem, headDim4, lanes: unroll ? 128 : 64, unroll })];
}

/** Vectors of means, and as many of spreads, that a lane has under way: in f32 twice the registers. */
const UNDER_WAY: Readonly<Record<Elem, number>> = { f16: 16, f32: 8 };

/** Vectors of a row that a lane loads at a time, at most. */
const MAX_VECTORS = 4;
const MAX_ROW_LANES = 32;

/**
 * The variant for so many lanes. On GPUs as few lanes share a block as can load a row at a time, because sums
 * between lanes take longest; on software a lane has a block to itself.
 */
export function selectVariant(
  elem: Elem,
  heads: number,
  headDim4: number,
  { capacity, lanes, unroll }: {
    readonly capacity: number;
    readonly lanes: number;
    readonly unroll: boolean;
  },
): SelectVariant {
  const common = { elem, heads, headDim4, capacity, lanes, unroll };
  if (!unroll) return { ...common, rowLanes: 1, vectors: 1, batch: 1 };
  const rowLanes = Math.min(MAX_ROW_LANES, 2 ** Math.ceil(Math.log2(Math.max(1, headDim4 / MAX_VECTORS))));
  const vectors = Math.min(MAX_VECTORS, Math.ceil(headDim4 / rowLanes));
  const batch = Math.min(4, Math.floor(UNDER_WAY[elem] / vectors));
  return { ...common, rowLanes, vectors, batch };
}

/**
 * Candidates in order of preference; `unroll` is false on software adapters only.
 * @param capacity blocks that a sequence's table lists at most
 */
export function selectCandidates(
  elem: Elem,
  heads: number,
  headDim4: number,
  capacity: number,
  unroll: boolean,
): Op<SelectProblem>[] {
  const variant = (lanes: number) => selectVariant(elem, heads, headDim4, { capacity, lanes, unroll });
  if (!unroll) return [op(selectBlocks, variant(64))];
  return [
    ...[512, 256].map((lanes) => op(subgroupSelectBlocks, { ...variant(lanes), subgroup: 32 })),
    ...[512, 256, 128].map((lanes) => op(selectBlocks, variant(lanes))),
  ];
}

/** Bytes of the summary of one block of one head. */
export function summaryBytes(elem: Elem, headDim4: number): number {
  return 2 * 4 * headDim4 * sizeOf(elem);
}

/** Bytes of `selected`. */
export function selectedBytes(sequences: number, heads: number, tableBlocks: number): number {
  return 4 * sequences * heads * (1 + tableBlocks);
}
