import {
  type Elem,
  type Grid,
  type Kernel,
  type Op,
  op,
  type ShaderFile,
  sizeOf,
  type Work,
} from "../../runtime/kernel.ts";
import {
  aligned,
  type HeadRange,
  type KeptBlocks,
  type KeptInHeads,
  KV_BLOCK,
  sequenceStruct,
  subgroupRowSum,
  tripsHelper,
  unrollConst,
} from "../shared/shared.ts";
import summaryText from "./block_summary.wgsl" with { type: "text" };
import ruleText from "./rule.wgsl" with { type: "text" };
import scoreText from "./score.wgsl" with { type: "text" };
import scoreSubgroupText from "./score_subgroup.wgsl" with { type: "text" };
import scoreWorkgroupText from "./score_workgroup.wgsl" with { type: "text" };
import scoresText from "./scores.wgsl" with { type: "text" };
import searchText from "./search.wgsl" with { type: "text" };
import searchSubgroupText from "./search_subgroup.wgsl" with { type: "text" };
import searchWorkgroupText from "./search_workgroup.wgsl" with { type: "text" };
import selectText from "./select.wgsl" with { type: "text" };
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
  /** Blocks that a sequence's table lists at most, up to 65,535; lanes are a multiple of 16. */
  readonly capacity: number;
}

export interface ScoreVariant extends SummarizeVariant {
  readonly heads: number;
  /** Lanes that share a block, a power of two that divides `lanes`. */
  readonly rowLanes: number;
  /** Vectors of a row that a lane loads at a time. */
  readonly vectors: number;
  /** Blocks that a lane loads them of: a workgroup has `batch · lanes / rowLanes` blocks. */
  readonly batch: number;
}

export interface SubgroupScoreVariant extends ScoreVariant {
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

/** How many blocks a sequence keeps: `SelectProblem` says what the two are. */
type SelectionRule = Pick<SelectProblem, "keep" | "leastBlocks">;

/** What a step does with the blocks of a sequence, in each head. */
export interface SelectionCounts {
  /** Blocks that it keeps, and of those that it chooses among for that, all of which it gives a score. */
  readonly kept: number;
  readonly scored: number;
}

/** @param length tokens of the sequence, the new one among them */
export function selectionCounts({ keep, leastBlocks }: SelectionRule, length: number): SelectionCounts {
  const blocks = Math.ceil(length / KV_BLOCK);
  if (blocks <= keep || blocks < leastBlocks) return { kept: blocks, scored: 0 };
  return { kept: keep, scored: blocks - (LEAST_KEPT - 1) };
}

/** The blocks that are selected, in each of so many heads. */
export function keptBySelection(rule: SelectionRule, heads: number): KeptInHeads {
  return (length) =>
    new Array<KeptBlocks>(heads).fill({ before: selectionCounts(rule, length).kept - 1, own: true });
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

/** Bytes of one block's keys in one head, and of its summary. */
function summarizingBytes({ elem, headDim4 }: SummarizeVariant): number {
  return KV_BLOCK * 4 * headDim4 * sizeOf(elem) + summaryBytes(elem, headDim4);
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
  work: (v, p) => ({ bytes: p.count * p.range.heads * summarizingBytes(v), flops: 0 }),
};

const rule = file("rule", ruleText);

const BINS = 256;

/** Text that searches keys for the largest, for kernels that say where these are and where the list goes. */
export interface BlockSearch {
  readonly sources: readonly ShaderFile[];
  /** Bytes of workgroup memory. */
  workgroupBytes(v: { readonly lanes: number; readonly subgroup?: number }): number;
}

const searchBytes = 16 + // extremes
  4 * BINS + // bins
  16; // found

/** For any device; `lanes` is a multiple of 16. */
export const blockSearch: BlockSearch = {
  sources: [file("search", searchText), file("search_workgroup", searchWorkgroupText), rule],
  workgroupBytes: ({ lanes }) =>
    searchBytes +
    4 * lanes + // lane_words
    aligned(4 * lanes / 16), // chunk_sums
};

/** The same for kernels with subgroups, which say how many a workgroup has. */
export const subgroupBlockSearch: BlockSearch = {
  sources: [file("search", searchText), file("search_subgroup", searchSubgroupText), rule],
  workgroupBytes: ({ lanes, subgroup = lanes }) =>
    searchBytes +
    aligned(4 * lanes / subgroup), // subgroup_sums
};

const scores = [file("scores", scoresText), summary, sequenceStruct, tripsHelper];

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
  workgroupInvocations: (v: SummarizeVariant) => v.lanes,
  values: (_: unknown, p: SelectProblem) => ({
    blocks: p.blocks,
    table_blocks: p.tableBlocks,
    first_head: p.range.first,
    keep: p.keep,
    least_blocks: p.leastBlocks,
    one: 1,
  }),
} as const;

/**
 * A step reads the summaries of the blocks that it gives a score, and writes that of the block that has become
 * complete.
 * @param wordsOf words of `selected` that are written for a head
 */
function selectingWork(
  v: SummarizeVariant,
  p: SelectProblem,
  lengths: readonly number[],
  wordsOf: (counts: SelectionCounts) => number,
): Work {
  const { elem, headDim4 } = v;
  let bytes = 0;
  let flops = 0;
  for (const length of lengths) {
    const counts = selectionCounts(p, length);
    const { scored } = counts;
    const query = scored > 0 ? 4 * headDim4 * sizeOf(elem) : 0;
    const hasCompleted = length > 1 && length % KV_BLOCK === 1;
    bytes += query + scored * summaryBytes(elem, headDim4) + 4 * wordsOf(counts) +
      (hasCompleted ? summarizingBytes(v) : 0);
    flops += 2 * 2 * 4 * headDim4 * scored; // with means and with spreads
  }
  return { bytes: p.range.heads * bytes, flops: p.range.heads * flops };
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
  sources: [file("select", selectText), ...blockSearch.sources, ...scores],
  ...selecting,
  header: (v) => ({
    aliases: { elem: v.elem },
    consts: {
      ...summaryConsts(v),
      HEADS: v.heads,
      ROW_LANES: 1,
      VECTORS: 1,
      BATCH: 1,
      CAPACITY: v.capacity,
    },
  }),
  workgroupBytes: (v) =>
    aligned(4 * v.capacity) + // keys
    blockSearch.workgroupBytes(v) +
    summaryWorkgroupBytes(v),
  grid: (_, p) => [p.range.heads, p.sequences, 1],
  work: (v, p, lengths) => selectingWork(v, p, lengths, ({ kept }) => 1 + kept),
};

/** Blocks that a workgroup scores. */
function blocksOfPart({ lanes, rowLanes, batch }: ScoreVariant): number {
  return batch * lanes / rowLanes;
}

const scoring = {
  ...selecting,
  // Whatever the lengths are, which the host need not know: a sequence's last three blocks and its first have
  // no score, and parts that it does not have end at once.
  grid: (v: ScoreVariant, p: SelectProblem): Grid => [
    Math.max(1, Math.ceil((p.tableBlocks - LEAST_KEPT + 1) / blocksOfPart(v))),
    p.range.heads,
    p.sequences,
  ],
  work: (v: ScoreVariant, p: SelectProblem, lengths: readonly number[]) =>
    selectingWork(v, p, lengths, ({ scored }) => scored),
} as const;

function scoreConsts(v: ScoreVariant) {
  return {
    ...summaryConsts(v),
    HEADS: v.heads,
    ROW_LANES: v.rowLanes,
    VECTORS: v.vectors,
    BATCH: v.batch,
  };
}

/**
 * The first half of `selectBlocks`, for an attention that does the other half: of every block that is chosen
 * by its score, that score as a u32 of the same order, where `selected` has the entry for a list's block of
 * that number. Scores and summaries are as there; sequences that keep all of their blocks get none.
 */
export const scoreBlocks: Kernel<ScoreVariant, SelectProblem> = {
  name: "block_selection/score",
  sources: [file("score", scoreText), file("score_workgroup", scoreWorkgroupText), rule, ...scores],
  ...scoring,
  header: (v) => ({ aliases: { elem: v.elem }, consts: scoreConsts(v) }),
  workgroupBytes: (v) =>
    4 * v.lanes + // lane_terms
    summaryWorkgroupBytes(v),
};

/** The same with subgroups. */
export const subgroupScoreBlocks: Kernel<SubgroupScoreVariant, SelectProblem> = {
  name: "block_selection/subgroup_score",
  sources: [
    file("score", scoreText),
    file("score_subgroup", scoreSubgroupText),
    subgroupRowSum,
    rule,
    ...scores,
  ],
  ...scoring,
  header: (v) => ({ aliases: { elem: v.elem }, subgroup: v.subgroup, consts: scoreConsts(v) }),
  workgroupBytes: summaryWorkgroupBytes,
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
 * The variant for so many lanes, with up to `batch` blocks for each: as few lanes share a block as can load a
 * row at a time, because sums between lanes take longest.
 */
export function scoreVariant(
  elem: Elem,
  heads: number,
  headDim4: number,
  { lanes, batch, unroll }: { readonly lanes: number; readonly batch: number; readonly unroll: boolean },
): ScoreVariant {
  const rowLanes = Math.min(MAX_ROW_LANES, 2 ** Math.ceil(Math.log2(Math.max(1, headDim4 / MAX_VECTORS))));
  const vectors = Math.min(MAX_VECTORS, Math.ceil(headDim4 / rowLanes));
  const underWay = Math.floor(UNDER_WAY[elem] / vectors);
  return { elem, heads, headDim4, lanes, rowLanes, vectors, batch: Math.min(batch, underWay), unroll };
}

/**
 * Candidates in order of preference; `unroll` is false on software adapters only. There blocks are chosen and
 * listed by one kernel, on GPUs only scored: attention chooses among them itself (`topkSplitKvCandidates` of
 * `flash_decode`).
 * @param capacity blocks that a sequence's table lists at most
 */
export function selectCandidates(
  elem: Elem,
  heads: number,
  headDim4: number,
  capacity: number,
  unroll: boolean,
): Op<SelectProblem>[] {
  if (!unroll) return [op(selectBlocks, { elem, heads, headDim4, capacity, lanes: 64, unroll })];
  const variant = scoreVariant(elem, heads, headDim4, { lanes: 256, batch: 1, unroll });
  return [op(subgroupScoreBlocks, { ...variant, subgroup: 32 }), op(scoreBlocks, variant)];
}

/** Bytes of the summary of one block of one head. */
export function summaryBytes(elem: Elem, headDim4: number): number {
  return 2 * 4 * headDim4 * sizeOf(elem);
}

/** Bytes of `selected`. */
export function selectedBytes(sequences: number, heads: number, tableBlocks: number): number {
  return 4 * sequences * heads * (1 + tableBlocks);
}
