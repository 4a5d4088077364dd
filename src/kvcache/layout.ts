/**
 * How the cache divides its keys and values over buffers: pure arithmetic, asked by the memory plan before anything is
 * allocated and by the cache when it allocates. The layout itself is described in `cache.ts`.
 */
import { selectedBytes, summaryBytes } from "../kernels/block_selection/block_selection.ts";
import { type HeadRange, KV_BLOCK } from "../kernels/shared/shared.ts";
import { type Elem, sizeOf } from "../runtime/kernel.ts";
import { DENSE, listGroups, type Sparsity } from "./sparsity.ts";

export interface KvCacheShape {
  readonly layers: number;
  readonly heads: number;
  readonly headDim4: number;
  readonly elem: Elem;
}

export interface KvLayout {
  readonly shape: KvCacheShape;
  /** Sequences that share the cache. */
  readonly sequences: number;
  /** Blocks of `KV_BLOCK` tokens that each sequence has room for. */
  readonly sequenceBlocks: number;
  /** Blocks that each head has room for, those of all sequences. */
  readonly blocks: number;
  /** Heads by the buffer that they share. */
  readonly ranges: readonly HeadRange[];
  readonly sparsity: Sparsity;
}

/** Bytes that one token takes in all layers: keys and values, and for `topk` its share of their summaries. */
export function kvBytesPerToken(shape: KvCacheShape, { pattern }: Sparsity = DENSE): number {
  const { layers, heads, elem, headDim4 } = shape;
  const summaries = pattern.kind === "topk" ? layers * heads * summaryBytes(elem, headDim4) / KV_BLOCK : 0;
  return 2 * layers * heads * headRowBytes(shape) + summaries;
}

/** Bytes of one head's key, or value, of one token. */
export function headRowBytes(shape: KvCacheShape): number {
  return 4 * shape.headDim4 * sizeOf(shape.elem);
}

/** Bytes of the keys, or values, of one head. */
export function headBytes({ shape, blocks }: KvLayout): number {
  return blocks * KV_BLOCK * headRowBytes(shape);
}

/** A buffer of the cache, as planned and as allocated. */
export interface KvBufferSpec {
  readonly label: string;
  readonly bytes: number;
}

/** The buffer of all sequences' block tables, and with several sequences one more for each. */
export function tableSpecs({ sequences, sequenceBlocks, blocks }: KvLayout): KvBufferSpec[] {
  const all = { label: "block table", bytes: 4 * blocks };
  if (sequences === 1) return [all];
  const own = (sequence: number) => ({
    label: `block table of sequence ${sequence}`,
    bytes: 4 * sequenceBlocks,
  });
  return [all, ...Array.from({ length: sequences }, (_, sequence) => own(sequence))];
}

/** The buffers of block lists, with the layers that each is for. */
export function listSpecs(
  { sparsity, shape, sequenceBlocks }: KvLayout,
): (KvBufferSpec & { readonly layers: readonly number[] })[] {
  const groups = listGroups(sparsity, shape, sequenceBlocks);
  return groups.map(({ layers, bytes }) => {
    const of = groups.length > 1 ? ` of layers ${layers.join(", ")}` : "";
    return { label: `block lists${of}`, bytes, layers };
  });
}

/** The buffer of the blocks that `topk` chooses in a layer; none for other patterns. */
export function selectedSpecs({ sparsity, shape, sequences, sequenceBlocks }: KvLayout): KvBufferSpec[] {
  if (sparsity.pattern.kind !== "topk") return [];
  return [{ label: "chosen blocks", bytes: selectedBytes(sequences, shape.heads, sequenceBlocks) }];
}

/** The buffers of a layer's keys and values for a range of heads, and for `topk` of the summaries of its blocks. */
export function partSpecs(
  layout: KvLayout,
  layer: number,
  range: HeadRange,
): { k: KvBufferSpec; v: KvBufferSpec; summaries?: KvBufferSpec } {
  const { first, heads } = range;
  const of = layout.ranges.length > 1 ? ` of heads ${first} to ${first + heads - 1}` : "";
  const spec = (what: string) => ({ label: `layer ${layer} ${what}${of}`, bytes: heads * headBytes(layout) });
  const { sparsity, shape, blocks } = layout;
  if (sparsity.pattern.kind !== "topk") return { k: spec("keys"), v: spec("values") };
  const bytes = heads * blocks * summaryBytes(shape.elem, shape.headDim4);
  const summaries = { label: `layer ${layer} summaries${of}`, bytes };
  return { k: spec("keys"), v: spec("values"), summaries };
}

/**
 * Room for `context` tokens of each sequence with as few, evenly filled buffers a layer as `maxBytes` allows.
 * @param maxBytes the most that one buffer may have; a single head may still exceed it, which the memory plan reports
 */
export function kvLayout(
  shape: KvCacheShape,
  context: number,
  maxBytes: number,
  sequences = 1,
  sparsity = DENSE,
): KvLayout {
  const sequenceBlocks = Math.ceil(context / KV_BLOCK);
  const blocks = sequences * sequenceBlocks;
  const most = Math.max(1, Math.floor(maxBytes / (blocks * KV_BLOCK * headRowBytes(shape))));
  const buffers = Math.ceil(shape.heads / most);
  const heads = Math.ceil(shape.heads / buffers);
  const ranges = Array.from({ length: Math.ceil(shape.heads / heads) }, (_, i): HeadRange => ({
    first: i * heads,
    heads: Math.min(heads, shape.heads - i * heads),
  }));
  return { shape, sequences, sequenceBlocks, blocks, ranges, sparsity };
}
