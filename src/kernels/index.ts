/**
 * The registry: every kernel with its variants, in order of preference, and the choice for a model on a device.
 * The model never sees a variant: it calls the operations at the end of this file.
 */
import type { GpuBuffer } from "../runtime/buffers.ts";
import type { Capabilities, Gpu } from "../runtime/device.ts";
import { DoesNotFitError, UsageError } from "../runtime/errors.ts";
import { type Elem, firstSupported, type Op, op, supports } from "../runtime/kernel.ts";
import type { Dispatcher } from "../runtime/pass.ts";
import {
  keptBySelection,
  selectCandidates,
  type SelectProblem,
  summarizeCandidates,
  type SummarizeProblem,
} from "./block_selection/block_selection.ts";
import { divergenceCandidates, type DivergenceProblem } from "./divergence/divergence.ts";
import { type EmbeddingProblem, positionRows, type RowRange, tokenRows } from "./embedding/embedding.ts";
import {
  type AttendedKeys,
  attentionCandidates,
  type FlashAttentionProblem,
} from "./flash_attention/flash_attention.ts";
import {
  type DecodeBlocks,
  splitKvCandidates,
  type SplitKvProblem,
  topkSplitKvCandidates,
  type TopkSplitKvProblem,
} from "./flash_decode/flash_decode.ts";
import {
  gemvCandidates,
  layerNormGemv,
  type LayerNormGemvProblem,
  mergeGemv,
  type MergeGemvProblem,
  plainGemv,
} from "./gemv/gemv.ts";
import { kvAppend, type KvAppendProblem } from "./kv_append/kv_append.ts";
import { layerNorm, type LayerNormProblem } from "./layer_norm/layer_norm.ts";
import { type LmHeadProblem, manyRowsCandidates, oneRowCandidates } from "./lm_head/lm_head.ts";
import {
  type Epilogue,
  EPILOGUES,
  matmulCandidates,
  type MatmulProblem,
  smallMatmulCandidates,
} from "./matmul/matmul.ts";
import { nllCandidates, type NllProblem } from "./nll/nll.ts";
import {
  drawCandidates,
  type DrawProblem,
  greedyCandidates,
  logprobsCandidates,
  type LogprobsProblem,
} from "./sampling/sampling.ts";
import { segmentSum, type SegmentSumProblem } from "./segment_sum/segment_sum.ts";
import { type HeadRange, type KeptBlocks, type KeptInHeads, mostSplits } from "./shared/shared.ts";

/** What a model's size means for its kernels; `width` counts the columns that exist, the rest are padded to four. */
export interface KernelShape {
  readonly elem: Elem;
  readonly width: number;
  readonly heads: number;
  readonly headDim4: number;
  /** Width of the MLP's hidden layer, padding included. */
  readonly inner: number;
  /** Sequences that are decoded together. */
  readonly sequences: number;
  /** Blocks of each sequence that block selection has to choose among; 0 where it is not used. */
  readonly selectableBlocks: number;
  /** Constant trip counts in hot loops: true but for software adapters (`shared/trips.wgsl`). */
  readonly unroll: boolean;
}

export type Role = keyof RoleProblems;

/** What the graph asks for, and the problem each role is given. */
interface RoleProblems {
  readonly tokenRows: EmbeddingProblem;
  readonly positionRows: EmbeddingProblem;
  readonly layerNorm: LayerNormProblem;
  readonly finalNorm: LayerNormProblem;
  readonly matmulBias: MatmulProblem;
  readonly matmulBiasGelu: MatmulProblem;
  readonly matmulResidual: MatmulProblem;
  readonly smallMatmulBias: MatmulProblem;
  readonly smallMatmulBiasGelu: MatmulProblem;
  readonly smallMatmulResidual: MatmulProblem;
  readonly kvAppend: KvAppendProblem;
  readonly attention: FlashAttentionProblem;
  readonly sparseAttention: FlashAttentionProblem;
  readonly packedAttention: FlashAttentionProblem;
  readonly decodeQkv: LayerNormGemvProblem;
  readonly decodeAttention: SplitKvProblem;
  readonly sparseDecodeAttention: SplitKvProblem;
  readonly topkDecodeAttention: TopkSplitKvProblem;
  readonly summarizeBlocks: SummarizeProblem;
  readonly selectBlocks: SelectProblem;
  readonly decodeProjection: MergeGemvProblem;
  readonly decodeHidden: LayerNormGemvProblem;
  readonly decodeOutput: MatmulProblem;
  readonly greedy: DrawProblem;
  readonly draw: DrawProblem;
  readonly logprobs: LogprobsProblem;
  readonly lmHeadOne: LmHeadProblem;
  readonly lmHeadMany: LmHeadProblem;
  readonly nll: NllProblem;
  readonly divergence: DivergenceProblem;
  readonly segmentSum: SegmentSumProblem;
}

/** Blocks that block selection has room for at least: one kernel serves all contexts up to 64K. */
const LEAST_CAPACITY = 1024;

/** For every role the kernels with their variants that could fill it, in order of preference. */
export function candidates(shape: KernelShape): { readonly [R in Role]: readonly Op<RoleProblems[R]>[] } {
  const { elem, width, heads, headDim4, inner, sequences, selectableBlocks, unroll } = shape;
  const width4 = Math.ceil(width / 4);
  // What tensor-core kernels take.
  const isWide = [4 * width4, 4 * heads * headDim4, inner].every((columns) => columns % 32 === 0);
  const matmuls = (epilogue: Epilogue) => matmulCandidates(elem, epilogue, unroll, isWide);
  const rows = { rows: sequences, unroll };
  // Every subgroup reads the whole row to normalise it: with many of them that takes longer than the product.
  const fromStream = (epilogue: Epilogue) =>
    gemvCandidates(layerNormGemv, { elem, epilogue, inner: 4 * width4, width }, { ...rows, mostLanes: 256 });
  const toStream = { elem, epilogue: "residual" } as const;
  const merging = { heads, headDim4, maxSplits: mostSplits(sequences) };
  const splitKv = (blocks: DecodeBlocks) =>
    splitKvCandidates(elem, heads, headDim4, unroll, merging.maxSplits, blocks);
  const capacity = 2 ** Math.ceil(Math.log2(Math.max(LEAST_CAPACITY, selectableBlocks)));
  return {
    tokenRows: [op(tokenRows, { elem, width4 })],
    positionRows: [op(positionRows, { elem, width4 })],
    layerNorm: [op(layerNorm, { outElem: elem, width })],
    finalNorm: [op(layerNorm, { outElem: "f32", width })],
    matmulBias: matmuls("bias"),
    matmulBiasGelu: matmuls("bias_gelu"),
    matmulResidual: matmuls("residual"),
    smallMatmulBias: smallMatmulCandidates(elem, "bias", unroll),
    smallMatmulBiasGelu: smallMatmulCandidates(elem, "bias_gelu", unroll),
    smallMatmulResidual: smallMatmulCandidates(elem, "residual", unroll),
    kvAppend: [op(kvAppend, { elem, heads, headDim4 })],
    attention: attentionCandidates(elem, heads, headDim4, unroll),
    sparseAttention: attentionCandidates(elem, heads, headDim4, unroll, "lists"),
    packedAttention: attentionCandidates(elem, heads, headDim4, unroll, "segments"),
    decodeQkv: fromStream("bias"),
    decodeAttention: splitKv("all"),
    sparseDecodeAttention: splitKv("listed"),
    topkDecodeAttention: topkSplitKvCandidates(
      elem,
      heads,
      headDim4,
      unroll,
      merging.maxSplits,
      capacity,
    ),
    summarizeBlocks: summarizeCandidates(elem, headDim4, unroll),
    selectBlocks: selectCandidates(elem, heads, headDim4, capacity, unroll),
    decodeProjection: gemvCandidates(
      mergeGemv,
      { ...toStream, inner: 4 * heads * headDim4, ...merging },
      rows,
    ),
    decodeHidden: fromStream("bias_gelu"),
    decodeOutput: gemvCandidates(plainGemv, { ...toStream, inner }, rows),
    greedy: greedyCandidates(unroll),
    draw: drawCandidates(unroll),
    logprobs: logprobsCandidates(unroll),
    lmHeadOne: oneRowCandidates(elem),
    lmHeadMany: manyRowsCandidates(elem, unroll),
    nll: nllCandidates(unroll),
    divergence: divergenceCandidates(unroll),
    segmentSum: [op(segmentSum, {})],
  };
}

/** Kernels by the role that they must fill, in place of the first that the device supports. */
export type ForcedKernels = ReadonlyMap<string, string>;

/**
 * The candidates that are left for each role.
 * @throws UsageError when a kernel is forced that no candidate is, or for a role that there is not
 */
function allowedCandidates(
  shape: KernelShape,
  forced: ForcedKernels,
): (readonly [role: string, ops: readonly Op<never>[]])[] {
  const all: Readonly<Record<string, readonly Op<never>[]>> = candidates(shape);
  for (const role of forced.keys()) {
    if (Object.hasOwn(all, role)) continue;
    throw new UsageError(`There is no role \`${role}\` for a kernel`, {
      hint: `the roles are ${Object.keys(all).join(", ")}; \`info\` shows what fills them`,
    });
  }
  return Object.entries(all).map(([role, ops]) => {
    const name = forced.get(role);
    const named = ops.filter(({ kernel }) => name === undefined || kernel.name === name);
    if (named.length === 0 && name !== undefined) {
      throw new UsageError(`There is no kernel \`${name}\` for ${role} in ${shape.elem}`, {
        hint: `there is ${kernelNames(ops)}`,
      });
    }
    return [role, named] as const;
  });
}

function kernelNames(ops: readonly Op<never>[]): string {
  return [...new Set(ops.map(({ kernel }) => kernel.name))].join(", ") || "none for this model";
}

/** What runs on a device, by role. */
export type ChosenKernels = { readonly [R in Role]: Op<RoleProblems[R]> };

/**
 * The first candidate of each role that the device supports, of those that are allowed.
 * @throws UsageError for what `forced` names and is not there, DoesNotFitError when the device can run none for a role
 */
export function chooseKernels(
  shape: KernelShape,
  caps: Capabilities,
  forced: ForcedKernels = new Map(),
): ChosenKernels {
  const chosen = allowedCandidates(shape, forced).map(([role, ops]) => {
    if (forced.has(role)) requireForced(shape, caps, role as Role, ops);
    return [role, firstSupported(ops, caps)] as const;
  });
  return Object.fromEntries(chosen) as unknown as ChosenKernels;
}

/** @throws DoesNotFitError naming the kernels that could fill the role, when the device runs none of `ops` */
function requireForced(
  shape: KernelShape,
  caps: Capabilities,
  role: Role,
  ops: readonly Op<never>[],
): void {
  const verdicts = ops.map(({ kernel, variant }) => supports(kernel, variant, caps));
  if (verdicts.includes(true)) return;
  const all: readonly Op<never>[] = candidates(shape)[role];
  const runnable = all.filter(({ kernel, variant }) => supports(kernel, variant, caps) === true);
  throw new DoesNotFitError(`${ops[0]!.kernel.name} does not run on ${caps.name}: it ${verdicts[0]}`, {
    hint: `for ${role} there is ${kernelNames(runnable)}`,
  });
}

/** For `info` and `-v`: what would run on a device, and why better candidates would not. */
export interface Choice {
  readonly role: string;
  /** Undefined when nothing runs there. */
  readonly chosen: { readonly kernel: string; readonly variant: object } | undefined;
  readonly rejected: readonly {
    readonly kernel: string;
    readonly variant: object;
    readonly reason: string;
  }[];
}

/** @throws UsageError as `chooseKernels` */
export function explainChoices(
  shape: KernelShape,
  caps: Capabilities,
  forced: ForcedKernels = new Map(),
): Choice[] {
  return allowedCandidates(shape, forced).map(([role, ops]) => {
    const rejected: { kernel: string; variant: object; reason: string }[] = [];
    for (const { kernel, variant } of ops) {
      const verdict = supports(kernel, variant, caps);
      if (verdict === true) return { role, chosen: { kernel: kernel.name, variant }, rejected };
      rejected.push({ kernel: kernel.name, variant, reason: verdict });
    }
    return { role, chosen: undefined, rejected };
  });
}

/** Keys and values of some of a layer's heads, `[heads, blocks, KV_BLOCK, headDim]` each. */
export interface KvBuffers {
  readonly range: HeadRange;
  readonly k: GpuBuffer;
  readonly v: GpuBuffer;
  /** `[heads, blocks, 2, headDim]`, where blocks are selected. */
  readonly summaries?: GpuBuffer;
}

/** Keys and values of one layer; whoever owns the cache provides it and says where blocks are (`kvcache/cache.ts`). */
export interface KvView {
  readonly parts: readonly KvBuffers[];
  /** `[blocks]` u32 */
  readonly table: GpuBuffer;
  readonly blocks: number;
  /** Block lists of its heads (`kvcache/block_lists.ts`); undefined where every block is attended to. */
  readonly lists: GpuBuffer | undefined;
  /** What each query of a pack attends to, `[qLen]` of four u32 (`flash_attention/walk_segments.wgsl`). */
  readonly segments?: GpuBuffer | undefined;
  /** What lists or segments leave to queries, for `Kernel.work`; called only when it is asked for. */
  readonly attended?: ((p: AttentionPlace) => AttendedKeys) | undefined;
}

/** Which queries and heads a dispatch of attention is for. */
export type AttentionPlace = Pick<FlashAttentionProblem, "range" | "qLen" | "firstPosition">;

/** The same with the tables of several sequences, `[sequences, tableBlocks]`. */
export interface BatchKvView extends KvView {
  readonly tableBlocks: number;
  /** `[sequences, heads, 1 + tableBlocks]` u32, where blocks are selected. */
  readonly selected: GpuBuffer | undefined;
  /** What lists leave to the newest token of a sequence of that length, head by head, for `Kernel.work`. */
  readonly kept?: ((range: HeadRange, length: number) => readonly KeptBlocks[]) | undefined;
}

/** How many blocks each sequence keeps where they are selected. */
export interface BlockSelection {
  readonly keep: number;
  /** Sequences of fewer blocks keep all of them. */
  readonly leastBlocks: number;
}

/** What each head of a range attends to in decoding; undefined where that is everything. */
function keptIn(kv: BatchKvView, range: HeadRange, selection?: BlockSelection): KeptInHeads | undefined {
  if (selection) return keptBySelection(selection, range.heads);
  const { kept } = kv;
  return kept && ((length) => kept(range, length));
}

/** Rows of a table too large for one binding, in several buffers of whole rows. */
export interface RowPiece extends RowRange {
  readonly buffer: GpuBuffer;
}

/** What the attention of decoding reads and leaves, besides the cache. */
export interface DecodeBuffers {
  /** `[sequences, 3, heads, headDim]` */
  readonly qkv: GpuBuffer;
  /** `[sequences]` of `Sequence` (`shared/sequences.wgsl`) */
  readonly sequences: GpuBuffer;
  /** `[sequences, mostSplits, heads, headDim]`, f32 */
  readonly partialOut: GpuBuffer;
  /** `[sequences, mostSplits, heads, 2]`, f32 */
  readonly partialMl: GpuBuffer;
}

/** What drawing tokens reads and writes; the kernels of `sampling` say what each holds. */
export interface DrawBuffers {
  readonly seen: GpuBuffer;
  readonly sequences: GpuBuffer;
  readonly places: GpuBuffer;
  readonly nextTokens: GpuBuffer;
  readonly results: GpuBuffer;
  readonly logprobs: GpuBuffer;
}

export interface Linear {
  /** `[inner, columns]` */
  readonly w: GpuBuffer;
  /** `[columns]`, f32 */
  readonly bias: GpuBuffer;
  readonly inner: number;
  readonly columns: number;
}

export interface Norm {
  readonly gain: GpuBuffer;
  readonly shift: GpuBuffer;
  readonly epsilon: number;
}

/** Rows up to which the small tile wastes less of a workgroup than the large one gains. */
const SMALL_TILE_ROWS = 32;

/** Role of a matmul by how many rows it has. */
const MATMUL_ROLES = {
  bias: { large: "matmulBias", small: "smallMatmulBias" },
  bias_gelu: { large: "matmulBiasGelu", small: "smallMatmulBiasGelu" },
  residual: { large: "matmulResidual", small: "smallMatmulResidual" },
} as const satisfies Record<keyof typeof EPILOGUES, Record<string, Role>>;

/** The role of a matrix product over this many rows. */
export function matmulRole(epilogue: Epilogue, rows: number) {
  const { large, small } = MATMUL_ROLES[epilogue];
  return rows <= SMALL_TILE_ROWS ? small : large;
}

/** Which blocks attention walks over in prefill and in decoding. */
export type AttentionKind = "dense" | "lists" | "topk";

const PREFILL_ATTENTION = {
  dense: "attention",
  lists: "sparseAttention",
  topk: "attention",
  packed: "packedAttention",
} as const satisfies Record<AttentionKind | "packed", Role>;

/** Roles of running chunks of a prompt, or packs of documents, through the layers. */
export function prefillRoles(chunks: Iterable<number>, kind: AttentionKind | "packed"): Role[] {
  const attention = PREFILL_ATTENTION[kind];
  const roles = new Set<Role>(["tokenRows", "positionRows", "layerNorm", "kvAppend", attention]);
  for (const rows of chunks) {
    for (const epilogue of Object.keys(EPILOGUES) as Epilogue[]) roles.add(matmulRole(epilogue, rows));
  }
  return [...roles];
}

/** Roles of what follows a pack of documents: its rows of interest, and a head over them. */
export const PACK_HEAD_ROLES = ["segmentSum", "finalNorm", "lmHeadMany"] as const satisfies readonly Role[];

/** Roles of the output head over this many rows. */
export function headRoles(rows: number): Role[] {
  return ["finalNorm", rows === 1 ? "lmHeadOne" : "lmHeadMany"];
}

const DECODE_ATTENTION = {
  dense: ["decodeAttention"],
  lists: ["sparseDecodeAttention"],
  topk: ["summarizeBlocks", "selectBlocks", "topkDecodeAttention"],
} as const satisfies Record<AttentionKind, readonly Role[]>;

/** Roles of a step of decoding, without those that draw the next token. */
export function decodeRoles(sequences: number, kind: AttentionKind): Role[] {
  const products = ["decodeQkv", "decodeProjection", "decodeHidden", "decodeOutput"] as const;
  return ["tokenRows", "positionRows", ...products, ...DECODE_ATTENTION[kind], ...headRoles(sequences)];
}

/** The kernels of one model on one device: chosen when made, compiled when they are wanted, called by the graph. */
export class ModelKernels {
  readonly #gpu: Gpu;
  readonly #shape: KernelShape;
  readonly #chosen: ChosenKernels;

  /** @throws UsageError and DoesNotFitError as `chooseKernels` */
  constructor(gpu: Gpu, shape: KernelShape, forced?: ForcedKernels) {
    this.#gpu = gpu;
    this.#shape = shape;
    this.#chosen = chooseKernels(shape, gpu.caps, forced);
  }

  /** Compiles what fills these roles, all of them at once; at no cost what is compiled already. */
  async prepare(roles: Iterable<Role>): Promise<void> {
    const compiling = Array.from(roles, (role) => {
      const { kernel, variant } = this.#chosen[role] as Op<never>;
      return this.#gpu.pipelines.prepare(kernel, variant);
    });
    await Promise.all(compiling);
  }

  /** `x[count, width] = wte[id] + wpe[place]` of `tokens`, which `packToken` lays out. */
  embed(
    r: Dispatcher,
    tokens: GpuBuffer,
    wte: readonly RowPiece[],
    wpe: readonly RowPiece[],
    x: GpuBuffer,
    count: number,
  ): void {
    for (const [role, pieces] of [["tokenRows", wte], ["positionRows", wpe]] as const) {
      const tableRows = pieces.reduce((sum, { rows }) => sum + rows, 0);
      for (const piece of pieces) {
        this.#run(r, role, { tokens: count, piece, tableRows }, { tokens, rows: piece.buffer, x });
      }
    }
  }

  /** `out[rows, width]`, as wide as the stored elements. */
  layerNorm(r: Dispatcher, x: GpuBuffer, norm: Norm, out: GpuBuffer, rows: number): void {
    const { gain, shift, epsilon } = norm;
    this.#run(r, "layerNorm", { rows, firstRow: 0, epsilon }, { x, gain, shift, out });
  }

  /** The same in f32, from row `firstRow` on: what the output head reads. */
  finalNorm(r: Dispatcher, x: GpuBuffer, norm: Norm, out: GpuBuffer, firstRow: number, rows: number): void {
    const { gain, shift, epsilon } = norm;
    this.#run(r, "finalNorm", { rows, firstRow, epsilon }, { x, gain, shift, out });
  }

  /** `out[rows, columns] = epilogue(x · w + bias)` */
  matmul(r: Dispatcher, x: GpuBuffer, layer: Linear, out: GpuBuffer, rows: number, epilogue: Epilogue): void {
    const { w, bias, inner, columns } = layer;
    const buffers = { x, w, bias, out };
    this.#run(r, matmulRole(epilogue, rows), { rows, inner, columns }, buffers);
  }

  /** Appends the keys and values in `qkv[tokens, 3, heads, headDim]` to the cache. */
  appendKv(r: Dispatcher, qkv: GpuBuffer, kv: KvView, p: { tokens: number; firstPosition: number }): void {
    const { blocks, table } = kv;
    for (const { range, k, v } of kv.parts) {
      this.#run(r, "kvAppend", { ...p, blocks, range }, { qkv, block_table: table, k, v });
    }
  }

  /**
   * Causal attention of `qLen` queries over the cache, whose last `qLen` keys are their own, as far as its lists or the
   * segments of a pack go.
   */
  attention(
    r: Dispatcher,
    qkv: GpuBuffer,
    kv: KvView,
    out: GpuBuffer,
    p: { qLen: number; firstPosition: number; scale: number },
  ): void {
    const { blocks, table, lists, segments, attended } = kv;
    for (const { range, k, v } of kv.parts) {
      const buffers = { qkv, k, v, block_table: table, out };
      const problem = { ...p, blocks, range, attended: attended && (() => attended({ ...p, range })) };
      if (lists) this.#run(r, "sparseAttention", problem, { ...buffers, block_lists: lists });
      else if (segments) this.#run(r, "packedAttention", problem, { ...buffers, segments });
      else this.#run(r, "attention", problem, buffers);
    }
  }

  /** `qkv[rows, 3, heads, headDim]` or `hidden[rows, inner]` of decoded tokens: a product behind a layer norm. */
  normedGemv(
    r: Dispatcher,
    x: GpuBuffer,
    norm: Norm,
    layer: Linear,
    out: GpuBuffer,
    rows: number,
    epilogue: "bias" | "bias_gelu",
  ): void {
    const { gain, shift, epsilon } = norm;
    const { w, bias, inner, columns } = layer;
    const role = epilogue === "bias" ? "decodeQkv" : "decodeHidden";
    this.#run(r, role, { rows, inner, columns, epsilon }, { x, gain, shift, w, bias, out });
  }

  /** `x[rows, width] += hidden[rows, inner] · w + bias` for decoded tokens. */
  outputGemv(r: Dispatcher, hidden: GpuBuffer, layer: Linear, x: GpuBuffer, rows: number): void {
    const { w, bias, inner, columns } = layer;
    this.#run(r, "decodeOutput", { rows, inner, columns }, { x: hidden, w, bias, out: x });
  }

  /** Summaries of a sequence's first `count` blocks, which are complete, for `selectBlocks`. */
  summarizeBlocks(r: Dispatcher, kv: BatchKvView, p: { sequence: number; count: number }): void {
    const { blocks, tableBlocks, table } = kv;
    for (const { range, k, summaries } of kv.parts) {
      if (!summaries) throw new Error("The cache has no summaries");
      const problem = { ...p, firstBlock: 0, blocks, tableBlocks, range };
      this.#run(r, "summarizeBlocks", problem, { k, block_table: table, summaries });
    }
  }

  /**
   * Chooses the blocks that each sequence's query attends to, from `qkv` and the summaries of the blocks before, as far as
   * `decodeAttention` does not.
   */
  selectBlocks(
    r: Dispatcher,
    { qkv, sequences }: Pick<DecodeBuffers, "qkv" | "sequences">,
    kv: BatchKvView,
    p: { sequences: number } & BlockSelection,
  ): void {
    const { blocks, tableBlocks, table, selected } = kv;
    for (const { range, k, summaries } of kv.parts) {
      if (!summaries || !selected) throw new Error("The cache has no summaries");
      this.#run(r, "selectBlocks", { ...p, blocks, tableBlocks, range }, {
        qkv,
        k,
        block_table: table,
        sequences,
        summaries,
        selected,
      });
    }
  }

  /**
   * Appends a key and a value to each sequence, and attends from its one query to them, as far as lists or the selection
   * go, in slices that `mergedGemv` puts together.
   * @param selection what `selectBlocks` was given, where blocks are selected
   */
  decodeAttention(
    r: Dispatcher,
    buffers: DecodeBuffers,
    kv: BatchKvView,
    p: { sequences: number; scale: number },
    selection?: BlockSelection,
  ): void {
    const { qkv, sequences, partialOut, partialMl } = buffers;
    const { blocks, tableBlocks, table, lists, selected } = kv;
    for (const { range, k, v } of kv.parts) {
      const problem = { ...p, blocks, tableBlocks, range, kept: keptIn(kv, range, selection) };
      const bound = {
        qkv,
        k,
        v,
        block_table: table,
        sequences,
        partial_out: partialOut,
        partial_ml: partialMl,
      };
      if (lists) this.#run(r, "sparseDecodeAttention", problem, { ...bound, block_lists: lists });
      else if (selected) {
        if (!selection) throw new Error("Nobody says how many blocks to select");
        this.#run(r, "topkDecodeAttention", { ...problem, ...selection }, { ...bound, selected });
      } else this.#run(r, "decodeAttention", problem, bound);
    }
  }

  /**
   * `x[rows, width] += attention · w + bias`, of the slices that `decodeAttention` left.
   * @param kv with `selection`, what that was given: `Kernel.work` counts the slices of all blocks without
   */
  mergedGemv(
    r: Dispatcher,
    buffers: DecodeBuffers,
    layer: Linear,
    x: GpuBuffer,
    rows: number,
    kv?: BatchKvView,
    selection?: BlockSelection,
  ): void {
    const { w, bias, inner, columns } = layer;
    const { sequences, partialOut, partialMl } = buffers;
    const kept = kv && keptIn(kv, { first: 0, heads: this.#shape.heads }, selection);
    this.#run(r, "decodeProjection", { rows, inner, columns, kept }, {
      partial_out: partialOut,
      partial_ml: partialMl,
      sequences,
      w,
      bias,
      out: x,
    });
  }

  /** Draws the next token of some sequences from their rows of logits, and makes everything ready for it to run. */
  draw(r: Dispatcher, logits: GpuBuffer, buffers: DrawBuffers, p: DrawProblem): void {
    const { seen, sequences, places, nextTokens, results } = buffers;
    const role = p.temperature === 0 ? "greedy" : "draw";
    this.#run(r, role, p, { logits, seen, sequences, places, tokens: nextTokens, results });
  }

  /** The log-probabilities of the tokens that `draw` has drawn and of the likeliest ones. */
  logprobs(
    r: Dispatcher,
    logits: GpuBuffer,
    { results, logprobs }: Pick<DrawBuffers, "results" | "logprobs">,
    p: LogprobsProblem,
  ): void {
    this.#run(r, "logprobs", p, { logits, results, logprobs });
  }

  /** `logits[rows, vocab] = x[rows, width] · headᵀ` */
  lmHead(
    r: Dispatcher,
    x: GpuBuffer,
    head: readonly RowPiece[],
    logits: GpuBuffer,
    p: { rows: number; vocab: number },
  ): void {
    this.#applyHead(r, p.rows === 1 ? "lmHeadOne" : "lmHeadMany", x, head, logits, p);
  }

  /** `logits[rows, classes] = x[rows, width] · headᵀ`, each row by itself: how many there are changes no bit of it. */
  scoreHead(
    r: Dispatcher,
    x: GpuBuffer,
    head: readonly RowPiece[],
    logits: GpuBuffer,
    p: { rows: number; classes: number },
  ): void {
    this.#applyHead(r, "lmHeadMany", x, head, logits, { rows: p.rows, vocab: p.classes });
  }

  #applyHead(
    r: Dispatcher,
    role: "lmHeadOne" | "lmHeadMany",
    x: GpuBuffer,
    head: readonly RowPiece[],
    logits: GpuBuffer,
    p: { rows: number; vocab: number },
  ): void {
    const inner = 4 * Math.ceil(this.#shape.width / 4);
    for (const piece of head) this.#run(r, role, { ...p, inner, piece }, { x, w: piece.buffer, logits });
  }

  /** `out[row, width] = scale · Σ x[first … first + rows - 1, width]` for the segments from `firstSegment` on. */
  segmentSum(
    r: Dispatcher,
    x: GpuBuffer,
    segments: GpuBuffer,
    out: GpuBuffer,
    p: { segments: number; firstSegment: number; summedRows?: () => number },
  ): void {
    if (p.segments === 0) return;
    const width = 4 * Math.ceil(this.#shape.width / 4);
    this.#run(r, "segmentSum", { ...p, width }, { x, segments, out });
  }

  /** `nll[firstRow + r] = log Σ exp(logits[r]) - logits[r, targets[firstRow + r]]` for `rows` rows of logits. */
  nll(
    r: Dispatcher,
    logits: GpuBuffer,
    targets: GpuBuffer,
    nll: GpuBuffer,
    p: { rows: number; vocab: number; firstRow: number },
  ): void {
    this.#run(r, "nll", p, { logits, targets, nll });
  }

  /**
   * How far the rows of `other` are from those of `logits`, and the likelihoods of the targets in both, from
   * `results[firstRow]` on.
   */
  divergence(
    r: Dispatcher,
    buffers: Readonly<Record<"logits" | "other" | "targets" | "results", GpuBuffer>>,
    p: { rows: number; vocab: number; firstRow: number },
  ): void {
    this.#run(r, "divergence", p, buffers);
  }

  #run<R extends Role>(
    r: Dispatcher,
    role: R,
    problem: RoleProblems[R],
    buffers: Readonly<Record<string, GpuBuffer>>,
  ): void {
    const { kernel, variant } = this.#chosen[role];
    r.dispatch(kernel, variant, problem, buffers);
  }
}
