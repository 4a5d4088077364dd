import { distinct, type Elem, type Kernel, type Op, op, type ShaderFile } from "../../runtime/kernel.ts";
import {
  blockListsHelper,
  type HeadRange,
  KV_BLOCK,
  MAX_SPLITS,
  sequenceStruct,
  splitsHelper,
  tripsHelper,
  unrollConst,
} from "../shared/shared.ts";
import allBlocksText from "./all_blocks.wgsl" with { type: "text" };
import bindingsText from "./bindings.wgsl" with { type: "text" };
import listedBlocksText from "./listed_blocks.wgsl" with { type: "text" };
import selectedBlocksText from "./selected_blocks.wgsl" with { type: "text" };
import splitText from "./split_kv.wgsl" with { type: "text" };
import subgroupText from "./subgroup_split_kv.wgsl" with { type: "text" };

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
}

/** Which blocks of keys a new token attends to: all, those of a block mask, or those chosen for it in this step. */
export type DecodeBlocks = "all" | "listed" | "selected";

const file = (name: string, text: string): ShaderFile => ({ file: `flash_decode/${name}.wgsl`, text });

const bindings = file("bindings", bindingsText);

/** What the kernels differ in by the blocks that they walk over. */
const BLOCKS = {
  all: { prefix: "", sources: [file("all_blocks", allBlocksText)], bindings: {} },
  listed: {
    prefix: "sparse_",
    sources: [file("listed_blocks", listedBlocksText), blockListsHelper],
    bindings: { block_lists: "read" },
  },
  selected: {
    prefix: "topk_",
    sources: [file("selected_blocks", selectedBlocksText)],
    bindings: { selected: "read" },
  },
} as const satisfies Record<
  DecodeBlocks,
  { prefix: string; sources: readonly ShaderFile[]; bindings: Kernel<never, never>["bindings"] }
>;

/** The kernels of one text, by the blocks that they walk over. */
type ByBlocks<V> = Readonly<Record<DecodeBlocks, Kernel<V, SplitKvProblem>>>;

function splitKvKernels<V extends CommonVariant>(
  name: string,
  body: readonly ShaderFile[],
  own: Pick<Kernel<V, SplitKvProblem>, "header" | "workgroupBytes">,
): ByBlocks<V> {
  const kernel = (blocks: DecodeBlocks): Kernel<V, SplitKvProblem> => ({
    name: `flash_decode/${BLOCKS[blocks].prefix}${name}`,
    sources: [bindings, ...BLOCKS[blocks].sources, ...body, sequenceStruct, splitsHelper],
    bindings: {
      qkv: "read",
      k: "read_write",
      v: "read_write",
      block_table: "read",
      sequences: "read",
      partial_out: "read_write",
      partial_ml: "read_write",
      ...BLOCKS[blocks].bindings,
    },
    paramsIn: "uniform",
    params: { blocks: "u32", table_blocks: "u32", first_head: "u32", scale_log2: "f32", one: "u32" },
    values: (_, p) => ({
      blocks: p.blocks,
      table_blocks: p.tableBlocks,
      first_head: p.range.first,
      scale_log2: p.scale * Math.LOG2E,
      one: 1,
    }),
    // Whatever the lengths are, which the host need not know: the slices that a sequence does not have end at
    // once.
    grid: (v, p) => [v.maxSplits, p.range.heads, p.sequences],
    workgroupInvocations: (v) => v.lanes,
    ...own,
  });
  return { all: kernel("all"), listed: kernel("listed"), selected: kernel("selected") };
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

/** `bytes` as they count in workgroup memory. */
function aligned(bytes: number): number {
  return 16 * Math.ceil(bytes / 16);
}

/**
 * One step of decoding, of several sequences at once: appends each one's new key and value to the cache, and
 * leaves the attention of its query over slices of the keys in `partial_out` and `partial_ml`, unnormalised.
 * Of the `maxSplits` slices that there is room for, those that a sequence does not have get the sum 0 in `partial_ml`,
 * and nothing in `partial_out`.
 */
export const splitKvAttention = splitKvKernels<SplitKvVariant>(
  "split_kv",
  [file("split_kv", splitText), tripsHelper],
  {
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
  },
);

/** The same with subgroups, on GPUs and on software Vulkan. */
export const subgroupSplitKvAttention = splitKvKernels<SubgroupSplitKvVariant>(
  "subgroup_split_kv",
  [file("subgroup_split_kv", subgroupText)],
  {
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
  },
);

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

/**
 * Candidates in order of preference; `unroll` is false on software adapters only. There a subgroup is the
 * whole workgroup and loads the fewest vectors at a time: all that is in registers is saved around every
 * load.
 */
export function splitKvCandidates(
  elem: Elem,
  heads: number,
  headDim4: number,
  unroll: boolean,
  maxSplits = MAX_SPLITS,
  blocks: DecodeBlocks = "all",
): Op<SplitKvProblem>[] {
  const sizes = unroll
    ? [512, 256, 128].map((maxLanes) => ({ subgroup: 32, maxLanes, maxKeys: 8 }))
    : [8, 4].map((subgroup) => ({ subgroup, maxLanes: subgroup, maxKeys: 1 }));
  return distinct([
    ...sizes.flatMap((size) => subgroupSplitKvVariants(elem, heads, headDim4, size, maxSplits))
      .map((v) => op(subgroupSplitKvAttention[blocks], v)),
    ...splitKvVariants(elem, heads, headDim4, unroll, maxSplits)
      .map((v) => op(splitKvAttention[blocks], v)),
  ]);
}
