/** WGSL and host helpers that several kernels join to their own text. */
import type { Grid, ShaderFile } from "../../runtime/kernel.ts";
import blockListsText from "./block_lists.wgsl" with { type: "text" };
import existingText from "./existing.wgsl" with { type: "text" };
import foldedGridText from "./folded_grid.wgsl" with { type: "text" };
import kvBlocksText from "./kv_blocks.wgsl" with { type: "text" };
import mergeLanesText from "./merge_lanes.wgsl" with { type: "text" };
import sequencesText from "./sequences.wgsl" with { type: "text" };
import splitsText from "./splits.wgsl" with { type: "text" };
import subgroupRowSumText from "./subgroup_row_sum.wgsl" with { type: "text" };
import subgroupRowsText from "./subgroup_rows.wgsl" with { type: "text" };
import tripsText from "./trips.wgsl" with { type: "text" };
import workgroupSumText from "./workgroup_sum.wgsl" with { type: "text" };

export const foldedGrid: ShaderFile = { file: "shared/folded_grid.wgsl", text: foldedGridText };
export const existingColumns: ShaderFile = { file: "shared/existing.wgsl", text: existingText };
export const workgroupSum: ShaderFile = { file: "shared/workgroup_sum.wgsl", text: workgroupSumText };

/** `row_list`: which blocks of keys the queries of a block attend to. */
export const blockListsHelper: ShaderFile = { file: "shared/block_lists.wgsl", text: blockListsText };

export const kvBlocks: ShaderFile = { file: "shared/kv_blocks.wgsl", text: kvBlocksText };

/** What kernels over rows of logits merge their lanes' sums of exponentials with. */
export const mergeLanes: ShaderFile = { file: "shared/merge_lanes.wgsl", text: mergeLanesText };

/** `struct Sequence`, of which every decoded sequence has one; `packSequence` writes it. */
export const sequenceStruct: ShaderFile = { file: "shared/sequences.wgsl", text: sequencesText };

export const splitsHelper: ShaderFile = { file: "shared/splits.wgsl", text: splitsText };

export const subgroupRowSum: ShaderFile = {
  file: "shared/subgroup_row_sum.wgsl",
  text: subgroupRowSumText,
};

export const subgroupRows: ShaderFile = { file: "shared/subgroup_rows.wgsl", text: subgroupRowsText };

export const tripsHelper: ShaderFile = { file: "shared/trips.wgsl", text: tripsText };

/** The header constant that `trips` reads: unrolled everywhere but on software adapters. */
export function unrollConst(unroll: boolean): { readonly UNROLL: number } {
  return { UNROLL: unroll ? 1 : 0 };
}

/**
 * Tokens of a block of the KV cache. A tile of keys must not cross blocks, so tiles divide it; a context is rounded up to
 * whole blocks, which wastes at most 63 tokens.
 */
export const KV_BLOCK = 64;

/** `bytes` as they count in workgroup memory. */
export function aligned(bytes: number): number {
  return 16 * Math.ceil(bytes / 16);
}

/** Bytes of one `Sequence`. */
export const SEQUENCE_BYTES = 16;

/** What a sequence's decoding begins with. */
export interface SequenceState {
  /** Tokens in the cache, without the one that the next step runs. */
  readonly length: number;
  /** Tokens drawn so far. */
  readonly step: number;
  /** Any integer that a number holds exactly; its low 64 bits are the key of the random numbers. */
  readonly seed: number;
}

/** A `Sequence` as `shared/sequences.wgsl` reads it. */
export function packSequence({ length, step, seed }: SequenceState): Uint32Array<ArrayBuffer> {
  return Uint32Array.of(length, step, seed >>> 0, Math.floor(seed / 2 ** 32) >>> 0);
}

/**
 * Slices that the keys of one decoded query are cut into, at most: with a dozen heads three or more workgroups for each
 * multiprocessor of the largest GPUs, and few enough to be merged by everyone who needs the result.
 */
export const MAX_SPLITS = 32;

/** The same where several sequences fill a device together: never fewer than four, for long sequences among short ones. */
export function mostSplits(sequences: number): number {
  return Math.max(4, MAX_SPLITS / 2 ** Math.ceil(Math.log2(sequences)));
}

/** Blocks of a slice of `blocks` blocks, as in `shared/splits.wgsl`. */
export function blocksPerSplit(blocks: number, maxSplits = MAX_SPLITS): number {
  return Math.ceil(blocks / maxSplits);
}

/** Slices of `blocks` blocks, as in `shared/splits.wgsl`. */
export function splitCount(blocks: number, maxSplits = MAX_SPLITS): number {
  return blocks === 0 ? 0 : Math.ceil(blocks / blocksPerSplit(blocks, maxSplits));
}

/** Pairs of a query and a key up to its position, of `queries` queries from `firstPosition` on. */
export function causalPairs(queries: number, firstPosition = 0): number {
  return queries * firstPosition + queries * (queries + 1) / 2;
}

/** Blocks of keys that the newest token of a sequence attends to in one head. */
export interface KeptBlocks {
  /** Those before its own, which are complete. */
  readonly before: number;
  /** Whether its own is among them. */
  readonly own: boolean;
}

/** What the newest token of a sequence of `length` tokens attends to, in each head that a dispatch is for. */
export type KeptInHeads = (length: number) => readonly KeptBlocks[];

/** All blocks, in each of so many heads. */
export function keptByAll(heads: number): KeptInHeads {
  return (length) =>
    new Array<KeptBlocks>(heads).fill({ before: Math.ceil(length / KV_BLOCK) - 1, own: true });
}

/**
 * Bytes of what attention leaves of a step of decoding: for each head of each sequence `maxSplits` maxima and sums,
 * and the output of each slice that there is, one at least.
 * @param heads of all sequences together
 * @param kept of each of them, as far as it is known
 */
export function partialBytes(
  { headDim4, maxSplits }: { readonly headDim4: number; readonly maxSplits: number },
  heads: number,
  kept: readonly KeptBlocks[],
): number {
  const slices = kept.reduce(
    (sum, { before, own }) => sum + Math.max(1, splitCount(before + Number(own), maxSplits)),
    0,
  );
  return 8 * maxSplits * heads + 16 * headDim4 * slices;
}

/** The part of a layer's heads that one pair of cache buffers holds. */
export interface HeadRange {
  readonly first: number;
  readonly heads: number;
}

/** Workgroups along x of a folded grid; a grid dimension holds at most 65,535. */
export const GRID_FOLD = 32768;

/** The grid of `rows` workgroups that `folded_row` unfolds; x times y may be larger than `rows`. */
export function foldGrid(rows: number): Grid {
  return [Math.min(rows, GRID_FOLD), Math.max(1, Math.ceil(rows / GRID_FOLD)), 1];
}
