/**
 * Where keys and values live. This is the only description of the layout; `shared/kv_blocks.wgsl` indexes it.
 *
 * For every layer there are buffers of keys and buffers of values in the run's element type. A buffer holds a range of
 * heads, all of them unless the device cannot bind that much (`layout.ts`): `[heads, blocks, KV_BLOCK, headDim]`, with
 * `headDim` padded to a multiple of four. The keys of 64 tokens of a head are one run of memory.
 *
 * Position p is row `p % KV_BLOCK` of block `table[floor(p / KV_BLOCK)]`; one table serves all layers and heads. The
 * kernels accept any table; a new cache takes its blocks in order, so that neighbours in position are neighbours in
 * memory. Rows at `length` and beyond are undefined. Several sequences share the pool of blocks, each with a table and a
 * length of its own; methods are about the first unless they are given another.
 *
 * Beside keys and values lies what block-sparse attention needs: block lists (`block_lists.ts`) or, for `topk`, a summary of
 * every block of keys, `[heads, blocks, 2, headDim]`, and the blocks that a step of decoding chooses in a layer.
 *
 * Bytes and element counts here pass 2³² (gpt2-xl at 64K has 20 GB of keys and values): they are JavaScript numbers,
 * exact up to 2⁵³. What a shader computes stays below: it counts vectors within one binding.
 */
import type { BatchKvView, KvBuffers, KvView } from "../kernels/index.ts";
import { type HeadRange, KV_BLOCK } from "../kernels/shared/shared.ts";
import { allocate, type GpuBuffer, Readback, upload } from "../runtime/buffers.ts";
import type { Gpu } from "../runtime/device.ts";
import type { Elem } from "../runtime/kernel.ts";
import { UploadRing } from "../runtime/upload_ring.ts";
import { attendedByLists, keptByLists } from "./attended.ts";
import { packLists } from "./block_lists.ts";
import {
  headBytes,
  headRowBytes,
  type KvBufferSpec,
  type KvLayout,
  listSpecs,
  partSpecs,
  selectedSpecs,
  tableSpecs,
} from "./layout.ts";
import type { BlockLists } from "./patterns.ts";
import { layerLists, type Sparsity } from "./sparsity.ts";

/** Bytes read back at a time. */
const SLICE_BYTES = 4 << 20;

/** A run of bytes in one of the cache's buffers. */
interface Segment {
  readonly buffer: GpuBuffer;
  readonly offset: number;
  readonly bytes: number;
}

/** A cache of fixed capacity, written in place: nothing is moved or reallocated as it fills. */
export class KvCache {
  readonly #gpu: Gpu;
  readonly #layout: KvLayout;
  readonly #order: Uint32Array;
  /** Of all sequences, then of each. */
  readonly #tables: readonly GpuBuffer[];
  /** Keys and values of each layer. */
  readonly #layers: readonly (readonly KvBuffers[])[];
  /** Block lists of each layer, which layers may share; none without. */
  readonly #lists: readonly GpuBuffer[];
  /** What is in those, made again by whoever counts what it leaves. */
  readonly #counted = new Map<GpuBuffer, readonly BlockLists[]>();
  /** With `topk`. */
  readonly #selected: GpuBuffer | undefined;
  readonly #lengths: number[];
  /** While `write` is under way. */
  #uploads: UploadRing | undefined;

  private constructor(
    gpu: Gpu,
    layout: KvLayout,
    order: Uint32Array,
    parts: {
      tables: readonly GpuBuffer[];
      layers: readonly (readonly KvBuffers[])[];
      lists: readonly GpuBuffer[];
      selected: GpuBuffer | undefined;
    },
  ) {
    this.#gpu = gpu;
    this.#layout = layout;
    this.#order = order;
    this.#tables = parts.tables;
    this.#layers = parts.layers;
    this.#lists = parts.lists;
    this.#selected = parts.selected;
    this.#lengths = new Array(layout.sequences).fill(0);
  }

  /**
   * Allocates a cache.
   * @param order the block tables of all sequences, a permutation of all blocks; in order when left out
   * @throws DoesNotFitError when the device has no memory for it, or cannot bind one head; InputError when a block mask has
   * too few rows
   */
  static async create(gpu: Gpu, layout: KvLayout, order?: Uint32Array): Promise<KvCache> {
    const { shape, blocks, sequenceBlocks, ranges, sparsity } = layout;
    const table = order ?? Uint32Array.from({ length: blocks }, (_, block) => block);
    const created: GpuBuffer[] = [];
    const buffer = async ({ label, bytes }: KvBufferSpec) => {
      const made = await allocate(gpu, label, "kv", bytes);
      created.push(made);
      return made;
    };
    try {
      const tables: GpuBuffer[] = [];
      for (const [i, spec] of tableSpecs(layout).entries()) {
        const own = i === 0 ? table : table.subarray((i - 1) * sequenceBlocks, i * sequenceBlocks);
        tables.push(await buffer(spec));
        upload(tables[i]!, own as Uint32Array<ArrayBuffer>);
      }
      const layers: (readonly KvBuffers[])[] = [];
      for (let i = 0; i < shape.layers; i++) {
        const parts: KvBuffers[] = [];
        for (const range of ranges) {
          const { k, v, summaries } = partSpecs(layout, i, range);
          parts.push({
            range,
            k: await buffer(k),
            v: await buffer(v),
            ...(summaries ? { summaries: await buffer(summaries) } : {}),
          });
        }
        layers.push(parts);
      }
      const lists: GpuBuffer[] = [];
      for (const { layers: own, ...spec } of listSpecs(layout)) {
        const made = await buffer(spec);
        upload(made, packLists(layerLists(sparsity, own[0]!, shape.heads, sequenceBlocks)));
        for (const layer of own) lists[layer] = made;
      }
      const [selected] = selectedSpecs(layout);
      return new KvCache(gpu, layout, table, {
        tables,
        layers,
        lists,
        selected: selected && await buffer(selected),
      });
    } catch (error) {
      for (const made of created) made.destroy();
      throw error;
    }
  }

  /** Tokens of the first sequence. */
  get length(): number {
    return this.lengthOf(0);
  }

  lengthOf(sequence: number): number {
    const length = this.#lengths[sequence];
    if (length === undefined) throw new RangeError(`The cache has no sequence ${sequence}`);
    return length;
  }

  get sequences(): number {
    return this.#layout.sequences;
  }

  /** Tokens that each sequence has room for: whole blocks. */
  get capacity(): number {
    return this.#layout.sequenceBlocks * KV_BLOCK;
  }

  get layers(): number {
    return this.#layout.shape.layers;
  }

  get heads(): number {
    return this.#layout.shape.heads;
  }

  /** Stored columns of a head, padded to a multiple of four. */
  get headDim(): number {
    return 4 * this.#layout.shape.headDim4;
  }

  get elem(): Elem {
    return this.#layout.shape.elem;
  }

  get sparsity(): Sparsity {
    return this.#layout.sparsity;
  }

  /** A layer as one sequence sees it. */
  layer(i: number, sequence = 0): KvView {
    this.lengthOf(sequence); // or there is no such sequence
    const table = this.#tables[this.sequences === 1 ? 0 : 1 + sequence]!;
    return {
      parts: this.#parts(i),
      table,
      blocks: this.#layout.blocks,
      lists: this.#lists[i],
      attended: this.#lists[i] && ((p) => attendedByLists(this.#listsOf(i, p.range), p)),
    };
  }

  /** A layer with the tables of all sequences, one after another. */
  layerOfAll(i: number): BatchKvView {
    const { blocks, sequenceBlocks } = this.#layout;
    return {
      parts: this.#parts(i),
      table: this.#tables[0]!,
      blocks,
      tableBlocks: sequenceBlocks,
      lists: this.#lists[i],
      selected: this.#selected,
      kept: this.#lists[i] && ((range, length) => keptByLists(this.#listsOf(i, range), length)),
    };
  }

  /** The block lists of some heads of a layer that has any. */
  #listsOf(layer: number, { first, heads }: HeadRange): readonly BlockLists[] {
    const { sparsity, shape, sequenceBlocks } = this.#layout;
    const buffer = this.#lists[layer]!;
    let lists = this.#counted.get(buffer);
    if (!lists) this.#counted.set(buffer, lists = layerLists(sparsity, layer, shape.heads, sequenceBlocks));
    return lists.slice(first, first + heads);
  }

  #parts(i: number): readonly KvBuffers[] {
    const parts = this.#layers[i];
    if (!parts) throw new RangeError(`The cache has no layer ${i}`);
    return parts;
  }

  /** Counts tokens whose keys and values have been recorded for writing. */
  advance(tokens: number, sequence = 0): void {
    const length = this.lengthOf(sequence);
    if (length + tokens > this.capacity) {
      throw new RangeError(`${length} + ${tokens} tokens are more than the cache's ${this.capacity}`);
    }
    this.#lengths[sequence] = length + tokens;
  }

  /** Forgets the tokens from `length` on; their rows are overwritten by what comes next. */
  truncate(length: number, sequence = 0): void {
    const before = this.lengthOf(sequence);
    if (length < 0 || length > before) throw new RangeError(`Cannot cut ${before} tokens to ${length}`);
    this.#lengths[sequence] = length;
  }

  /**
   * Reads back the keys or values of a layer's first tokens in the first sequence, `[heads, tokens, headDim]`.
   * @returns the bytes in order, in slices of a few MiB; a slice is valid until the next is asked for
   */
  async *read(layer: number, which: "k" | "v", tokens: number): AsyncGenerator<Uint8Array<ArrayBuffer>> {
    const total = this.heads * tokens * headRowBytes(this.#layout.shape);
    const host = [0, 1].map(() => new Uint8Array(Math.min(SLICE_BYTES, total)));
    const readbacks: Readback[] = [];
    try {
      for (const { length } of host) {
        readbacks.push(await Readback.allocate(this.#gpu, "keys and values", length));
      }
      let pending: { turn: number; bytes: number } | undefined;
      for (let first = 0, turn = 0; first < total; first += SLICE_BYTES, turn = 1 - turn) {
        const bytes = Math.min(SLICE_BYTES, total - first);
        this.#copyOut([...this.#segments(layer, which, tokens, first, bytes)], readbacks[turn]!);
        // One slice is copied on the GPU while the host works on the one before.
        if (pending) yield await readbacks[pending.turn]!.readInto(host[pending.turn]!, pending.bytes);
        pending = { turn, bytes };
      }
      if (pending) yield await readbacks[pending.turn]!.readInto(host[pending.turn]!, pending.bytes);
    } finally {
      for (const readback of readbacks) readback.destroy();
    }
  }

  /**
   * Takes back what `read` gave: bytes of `[heads, tokens, headDim]` from `byteOffset` on, both multiples of 4. The
   * bytes may be reused when it resolves. `adopt` ends it when all layers are written.
   */
  async write(
    layer: number,
    which: "k" | "v",
    tokens: number,
    byteOffset: number,
    bytes: Uint8Array<ArrayBuffer>,
  ): Promise<void> {
    let taken = 0;
    for (const segment of this.#segments(layer, which, tokens, byteOffset, bytes.length)) {
      this.#uploads ??= await UploadRing.create(this.#gpu);
      await this.#uploads.write(segment.buffer, bytes.subarray(taken, taken + segment.bytes), segment.offset);
      taken += segment.bytes;
    }
  }

  /** Counts tokens whose rows `write` has been given. */
  adopt(tokens: number): void {
    this.advance(tokens);
    this.#uploads?.flush();
    this.#uploads?.destroy();
    this.#uploads = undefined;
  }

  destroy(): void {
    this.#uploads?.destroy();
    for (const table of this.#tables) table.destroy();
    for (const lists of new Set(this.#lists)) lists.destroy();
    this.#selected?.destroy();
    for (const parts of this.#layers) {
      for (const { k, v, summaries } of parts) {
        k.destroy();
        v.destroy();
        summaries?.destroy();
      }
    }
  }

  /** Where `bytes` bytes from `first` on of `[heads, tokens, headDim]` lie, in order; neighbouring blocks are one run. */
  *#segments(
    layer: number,
    which: "k" | "v",
    tokens: number,
    first: number,
    bytes: number,
  ): Generator<Segment> {
    const rowBytes = headRowBytes(this.#layout.shape);
    const blockBytes = KV_BLOCK * rowBytes;
    const parts = this.#parts(layer);
    for (let at = first; at < first + bytes;) {
      const head = Math.floor(at / (tokens * rowBytes));
      const inHead = at - head * tokens * rowBytes;
      const part = parts.find(({ range }) => head < range.first + range.heads)!;
      const start = Math.floor(inHead / blockBytes);
      let end = start + 1;
      while (end * KV_BLOCK < tokens && this.#order[end] === this.#order[end - 1]! + 1) end++;
      const runEnd = Math.min(end * blockBytes, tokens * rowBytes);
      const length = Math.min(runEnd - inHead, first + bytes - at);
      yield {
        buffer: part[which],
        offset: (head - part.range.first) * headBytes(this.#layout) + this.#order[start]! * blockBytes +
          inHead - start * blockBytes,
        bytes: length,
      };
      at += length;
    }
  }

  #copyOut(segments: readonly Segment[], readback: Readback): void {
    const encoder = this.#gpu.device.createCommandEncoder({ label: "read keys and values" });
    let to = 0;
    for (const { buffer, offset, bytes } of segments) {
      encoder.copyBufferToBuffer(buffer.handle, offset, readback.handle, to, bytes);
      to += bytes;
    }
    this.#gpu.device.queue.submit([encoder.finish()]);
  }
}
