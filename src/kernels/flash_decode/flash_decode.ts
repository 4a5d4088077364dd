import {
  distinct,
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
  type BlockSearch,
  blockSearch,
  keptBySelection,
  selectionCounts,
  subgroupBlockSearch,
} from "../block_selection/block_selection.ts";
import {
  aligned,
  blockListsHelper,
  type HeadRange,
  keptByAll,
  type KeptInHeads,
  KV_BLOCK,
  MAX_SPLITS,
  partialBytes,
  sequenceStruct,
  splitsHelper,
  subgroupRowSum,
  tripsHelper,
  unrollConst,
} from "../shared/shared.ts";
import allBlocksText from "./all_blocks.wgsl" with { type: "text" };
import bindingsText from "./bindings.wgsl" with { type: "text" };
import choosingBlocksText from "./choosing_blocks.wgsl" with { type: "text" };
import laneKeysText from "./lane_keys.wgsl" with { type: "text" };
import listedBlocksText from "./listed_blocks.wgsl" with { type: "text" };
import selectedBlocksText from "./selected_blocks.wgsl" with { type: "text" };
import splitText from "./split_kv.wgsl" with { type: "text" };
import storedKeysText from "./stored_keys.wgsl" with { type: "text" };
import subgroupText from "./subgroup_split_kv.wgsl" with { type: "text" };
import tablePlacesText from "./table_places.wgsl" with { type: "text" };

interface CommonVariant {
  readonly elem: Elem;
  readonly heads: number;
  readonly headDim4: number;
  /** Lanes that hold a row; divides `headDim4`. */
  readonly rowLanes: number;
  /** Lanes of a workgroup, at least `rowLanes`. */
  readonly lanes: number;
  /** Slices that a sequence has at most. */
  readonly maxSplits: number;
}

export interface SplitKvVariant extends CommonVariant {
  /** See `shared/trips.wgsl`. */
  readonly unroll: boolean;
}

/** `rowLanes` is a power of two, `lanes` whole subgroups and at most `KV_BLOCK` times `rowLanes`. */
export interface SubgroupSplitKvVariant extends CommonVariant {
  /** Lanes of the device's subgroups. */
  readonly subgroup: number;
  /** Keys that `rowLanes` lanes load at a time; those of the whole workgroup divide `KV_BLOCK`. */
  readonly keys: number;
}

/** What attention that chooses its blocks itself varies in besides. */
interface Choosing {
  /** Blocks that a sequence's table lists at most, up to 65,535. */
  readonly capacity: number;
  /** See `shared/trips.wgsl`. */
  readonly unroll: boolean;
}

export interface ChoosingSplitKvVariant extends SplitKvVariant, Choosing {}

export interface ChoosingSubgroupSplitKvVariant extends SubgroupSplitKvVariant, Choosing {}

export interface SplitKvProblem {
  readonly sequences: number;
  /** Blocks that each head has room for, those of all sequences together. */
  readonly blocks: number;
  /** Blocks that the table lists for each sequence. */
  readonly tableBlocks: number;
  /** Factor on the scores, 1/√headDim for GPT-2. */
  readonly scale: number;
  /** The heads in the bound buffers; no others are computed. */
  readonly range: HeadRange;
  /** What is listed or selected, for `work`, which counts no keys of such kernels without it. */
  readonly kept?: KeptInHeads | undefined;
}

export interface TopkSplitKvProblem extends SplitKvProblem {
  /** As `SelectProblem` of `block_selection` has them. */
  readonly keep: number;
  readonly leastBlocks: number;
}

/** Which blocks of keys a new token attends to: all, those of a block mask, or those chosen for it in this step. */
export type DecodeBlocks = "all" | "listed" | "selected";

const file = (name: string, text: string): ShaderFile => ({ file: `flash_decode/${name}.wgsl`, text });

const bindings = file("bindings", bindingsText);

const tablePlaces = file("table_places", tablePlacesText);

/** What the kernels differ in by the blocks that they walk over. */
const BLOCKS = {
  all: {
    prefix: "",
    sources: [file("all_blocks", allBlocksText)],
    bindings: {},
    kept: ({ range }: SplitKvProblem) => keptByAll(range.heads),
  },
  listed: {
    prefix: "sparse_",
    sources: [file("listed_blocks", listedBlocksText), blockListsHelper],
    bindings: { block_lists: "read" },
    kept: keptAsTold,
  },
  selected: {
    prefix: "topk_",
    sources: [file("selected_blocks", selectedBlocksText)],
    bindings: { selected: "read" },
    kept: keptAsTold,
  },
} as const satisfies Record<
  DecodeBlocks,
  {
    prefix: string;
    sources: readonly ShaderFile[];
    bindings: Kernel<never, never>["bindings"];
    kept(p: SplitKvProblem): KeptInHeads;
  }
>;

function keptAsTold({ kept = () => [] }: SplitKvProblem): KeptInHeads {
  return kept;
}

/** A step over the blocks that are kept: the new token's key and value come with its query, not from the cache. */
function splitKvWork(
  v: CommonVariant,
  p: SplitKvProblem,
  lengths: readonly number[],
  keptIn: KeptInHeads,
): Work {
  const headDim = 4 * v.headDim4;
  const heads = p.sequences * p.range.heads;
  const all = lengths.flatMap((length) => keptIn(length).map((kept) => ({ ...kept, length })));
  const cached = all.reduce(
    (sum, { before, own, length }) => sum + before * KV_BLOCK + (own ? (length - 1) % KV_BLOCK : 0),
    0,
  );
  const keys = cached + all.filter(({ own }) => own).length;
  const rows = (3 + 2) * heads + 2 * cached; // q, the new key and value, which are written too; k, v
  return {
    bytes: rows * headDim * sizeOf(v.elem) + partialBytes(v, heads, all),
    flops: 2 * 2 * headDim * keys,
  };
}

/** What all kernels have, whatever their text and their blocks. */
const splitting = {
  bindings: {
    qkv: "read",
    k: "read_write",
    v: "read_write",
    block_table: "read",
    sequences: "read",
    partial_out: "read_write",
    partial_ml: "read_write",
  },
  paramsIn: "uniform",
  params: { blocks: "u32", table_blocks: "u32", first_head: "u32", scale_log2: "f32", one: "u32" },
  values: (_: unknown, p: SplitKvProblem) => ({
    blocks: p.blocks,
    table_blocks: p.tableBlocks,
    first_head: p.range.first,
    scale_log2: p.scale * Math.LOG2E,
    one: 1,
  }),
  // Whatever the lengths are, which the host need not know: the slices that a sequence does not have end at
  // once.
  grid: (v: CommonVariant, p: SplitKvProblem): Grid => [v.maxSplits, p.range.heads, p.sequences],
  workgroupInvocations: (v: CommonVariant) => v.lanes,
} as const;

/** One text with what it declares, whatever its blocks. */
interface SplitKvText<V> extends Pick<Kernel<V, SplitKvProblem>, "header" | "workgroupBytes"> {
  readonly name: string;
  readonly sources: readonly ShaderFile[];
}

const helpers = [sequenceStruct, splitsHelper];

/** The kernels of one text, by the blocks that they walk over. */
type ByBlocks<V> = Readonly<Record<DecodeBlocks, Kernel<V, SplitKvProblem>>>;

function splitKvKernels<V extends CommonVariant>(text: SplitKvText<V>): ByBlocks<V> {
  const { name, sources, header, workgroupBytes } = text;
  const kernel = (blocks: DecodeBlocks): Kernel<V, SplitKvProblem> => ({
    name: `flash_decode/${BLOCKS[blocks].prefix}${name}`,
    sources: [bindings, ...BLOCKS[blocks].sources, tablePlaces, ...sources, ...helpers],
    ...splitting,
    bindings: { ...splitting.bindings, ...BLOCKS[blocks].bindings },
    header,
    workgroupBytes,
    work: (v, p, lengths) => splitKvWork(v, p, lengths, BLOCKS[blocks].kept(p)),
  });
  return { all: kernel("all"), listed: kernel("listed"), selected: kernel("selected") };
}

/** The kernel of one text that chooses its blocks itself, with keys that `keys` says where to find. */
function choosingKernel<C extends V & Choosing, V extends CommonVariant & { readonly subgroup?: number }>(
  text: SplitKvText<V>,
  keys: readonly ShaderFile[],
  search: BlockSearch,
): Kernel<C, TopkSplitKvProblem> {
  const choosing = [file("choosing_blocks", choosingBlocksText), ...keys, ...search.sources];
  return {
    name: `flash_decode/choosing_${text.name}`,
    sources: [bindings, ...choosing, ...text.sources, ...helpers],
    ...splitting,
    bindings: { ...splitting.bindings, selected: "read" },
    params: { ...splitting.params, keep: "u32", least_blocks: "u32" },
    values: (v, p) => ({ ...splitting.values(v, p), keep: p.keep, least_blocks: p.leastBlocks }),
    header(v) {
      const header = text.header(v);
      return { ...header, consts: { ...header.consts, ...unrollConst(v.unroll), CAPACITY: v.capacity } };
    },
    workgroupBytes: (v) =>
      text.workgroupBytes(v) +
      search.workgroupBytes(v) +
      aligned(4 * Math.ceil(v.capacity / v.maxSplits)), // slice_places
    work(v, p, lengths) {
      const { heads } = p.range;
      const { bytes, flops } = splitKvWork(v, p, lengths, keptBySelection(p, heads));
      const scored = lengths.reduce((sum, length) => sum + selectionCounts(p, length).scored, 0);
      return { bytes: bytes + 4 * heads * scored, flops };
    },
  };
}

function commonConsts(v: CommonVariant) {
  return {
    HEADS: v.heads,
    HEAD_DIM4: v.headDim4,
    KV_BLOCK,
    MAX_SPLITS: v.maxSplits,
    LANES: v.lanes,
    ROW_LANES: v.rowLanes,
    VECTORS: v.headDim4 / v.rowLanes,
  };
}

/** Groups of `rowLanes` lanes, a power of two so that they divide a block, and the keys of each at a time. */
function groupsOf({ lanes, rowLanes }: SplitKvVariant): { readonly groups: number; readonly keys: number } {
  const groups = Math.min(KV_BLOCK, 2 ** Math.floor(Math.log2(lanes / rowLanes)));
  return { groups, keys: Math.min(KV_BLOCK / groups, 8) };
}

const splitKvText: SplitKvText<SplitKvVariant> = {
  name: "split_kv",
  sources: [file("split_kv", splitText), tripsHelper],
  header(v) {
    const { groups, keys } = groupsOf(v);
    return {
      aliases: { elem: v.elem },
      consts: {
        ...commonConsts(v),
        GROUPS: groups,
        KEYS: keys,
        ...unrollConst(v.unroll),
      },
    };
  },
  workgroupBytes(v) {
    const { groups, keys } = groupsOf(v);
    return aligned(4 * groups * keys * (v.rowLanes + 1)) + // products
      aligned(4 * groups * keys) + // scores
      16 * groups * v.headDim4 + // outs
      aligned(8 * groups); // maxima_sums
  },
};

const subgroupSplitKvText: SplitKvText<SubgroupSplitKvVariant> = {
  name: "subgroup_split_kv",
  sources: [file("subgroup_split_kv", subgroupText), subgroupRowSum],
  header: (v) => ({
    aliases: { elem: v.elem },
    subgroup: v.subgroup,
    consts: { ...commonConsts(v), KEYS: v.keys },
  }),
  workgroupBytes(v) {
    const subgroups = v.lanes / v.subgroup;
    return 16 * subgroups * v.headDim4 + // outs
      aligned(8 * subgroups); // maxima_sums
  },
};

/**
 * One step of decoding, of several sequences at once: appends each one's new key and value to the cache, and
 * leaves the attention of its query over slices of the keys in `partial_out` and `partial_ml`, unnormalised.
 * Of the `maxSplits` slices that there is room for, those that a sequence does not have get the sum 0 in `partial_ml`,
 * and nothing in `partial_out`.
 */
export const splitKvAttention = splitKvKernels(splitKvText);

/** The same with subgroups, on GPUs and on software Vulkan. */
export const subgroupSplitKvAttention = splitKvKernels(subgroupSplitKvText);

/**
 * The same where blocks are chosen from what `scoreBlocks` of `block_selection` has left in `selected`: the
 * bits that the attention to the blocks of `selectBlocks` has.
 */
export const choosingSplitKvAttention = choosingKernel<ChoosingSplitKvVariant, SplitKvVariant>(
  splitKvText,
  [file("stored_keys", storedKeysText)],
  blockSearch,
);

/** The same with subgroups. */
export const choosingSubgroupSplitKvAttention = choosingKernel<
  ChoosingSubgroupSplitKvVariant,
  SubgroupSplitKvVariant
>(subgroupSplitKvText, [file("lane_keys", laneKeysText), tripsHelper], subgroupBlockSearch);

/** Vectors of keys, and as many of values, that a lane may hold in registers. */
const MAX_VECTORS = 8;

/**
 * The variant for a subgroup's size, with up to `maxLanes` lanes and up to `maxKeys` keys a lane at a time;
 * none where too few lanes would hold a row.
 */
export function subgroupSplitKvVariants(
  elem: Elem,
  heads: number,
  headDim4: number,
  { subgroup, maxLanes, maxKeys }: {
    readonly subgroup: number;
    readonly maxLanes: number;
    readonly maxKeys: number;
  },
  maxSplits = MAX_SPLITS,
): SubgroupSplitKvVariant[] {
  let rowLanes = subgroup;
  while (headDim4 % rowLanes !== 0) rowLanes /= 2;
  const vectors = headDim4 / rowLanes;
  if (vectors > MAX_VECTORS) return [];
  const lanes = Math.min(maxLanes, KV_BLOCK * rowLanes);
  const keys = Math.min(
    maxKeys,
    KV_BLOCK * rowLanes / lanes,
    2 ** Math.floor(Math.log2(MAX_VECTORS / vectors)),
  );
  return [{ elem, heads, headDim4, subgroup, rowLanes, lanes, keys, maxSplits }];
}

/** Lanes of the portable kernel: the first that suffice. */
const PORTABLE_LANES = [64, 128, 256];

/** Two vectors a lane where a row has an even number: more take llvmpipe far longer to compile. */
export function splitKvVariants(
  elem: Elem,
  heads: number,
  headDim4: number,
  unroll: boolean,
  maxSplits = MAX_SPLITS,
): SplitKvVariant[] {
  const rowLanes = headDim4 % 2 === 0 ? headDim4 / 2 : headDim4;
  const lanes = PORTABLE_LANES.find((n) => n >= rowLanes);
  return lanes === undefined ? [] : [{ elem, heads, headDim4, rowLanes, lanes, maxSplits, unroll }];
}

/** Sizes of the kernel with subgroups of 32 lanes. */
const GPU_SIZES = [512, 256, 128].map((maxLanes) => ({ subgroup: 32, maxLanes, maxKeys: 8 }));

/**
 * There a subgroup is the whole workgroup and loads the fewest vectors at a time: all that is in registers is
 * saved around every load.
 */
const SOFTWARE_SIZES = [8, 4].map((subgroup) => ({ subgroup, maxLanes: subgroup, maxKeys: 1 }));

/** Candidates in order of preference; `unroll` is false on software adapters only. */
export function splitKvCandidates(
  elem: Elem,
  heads: number,
  headDim4: number,
  unroll: boolean,
  maxSplits = MAX_SPLITS,
  blocks: DecodeBlocks = "all",
): Op<SplitKvProblem>[] {
  const sizes = unroll ? GPU_SIZES : SOFTWARE_SIZES;
  return distinct([
    ...sizes.flatMap((size) => subgroupSplitKvVariants(elem, heads, headDim4, size, maxSplits))
      .map((v) => op(subgroupSplitKvAttention[blocks], v)),
    ...splitKvVariants(elem, heads, headDim4, unroll, maxSplits)
      .map((v) => op(splitKvAttention[blocks], v)),
  ]);
}

/**
 * Blocks that a lane of the kernel with subgroups may have to choose among. With nine it chose wrong ones on an H100, now and
 * then: docs/decisions/0008.
 */
const MOST_LANE_BLOCKS = 2;

/**
 * The same for blocks that are chosen in every step, for what `selectCandidates` of `block_selection` leaves:
 * on GPUs attention chooses them itself, on software, where the search must not be repeated, it walks a list.
 * @param capacity blocks that a sequence's table lists at most
 */
export function topkSplitKvCandidates(
  elem: Elem,
  heads: number,
  headDim4: number,
  unroll: boolean,
  maxSplits: number,
  capacity: number,
): Op<TopkSplitKvProblem>[] {
  if (!unroll) return splitKvCandidates(elem, heads, headDim4, unroll, maxSplits, "selected");
  const choosing = { capacity, unroll };
  return distinct([
    ...GPU_SIZES.flatMap((size) => subgroupSplitKvVariants(elem, heads, headDim4, size, maxSplits))
      .filter(({ lanes }) => capacity <= MOST_LANE_BLOCKS * lanes)
      .map((v) => op(choosingSubgroupSplitKvAttention, { ...v, ...choosing })),
    ...splitKvVariants(elem, heads, headDim4, unroll, maxSplits)
      .map((v) => op(choosingSplitKvAttention, { ...v, ...choosing })),
  ]);
}
