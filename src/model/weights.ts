/**
 * Checkpoint tensors to GPU buffers: read in slices, converted on the way, laid out as the kernels read them. The file
 * is never in memory as a whole; the host holds two slices.
 */
import type { Linear, Norm, RowPiece } from "../kernels/index.ts";
import { allocate, type GpuBuffer } from "../runtime/buffers.ts";
import type { Gpu } from "../runtime/device.ts";
import { ModelError } from "../runtime/errors.ts";
import { type Elem, sizeOf } from "../runtime/kernel.ts";
import { UploadRing } from "../runtime/upload_ring.ts";
import type { LoadableTensor, ResolvedCheckpoint } from "./checkpoint.ts";
import type { GPT2Config } from "./config.ts";
import { convertElements, STORED_BYTES } from "./float16.ts";
import { paddedSizes, pieceLabel, rowPieces } from "./memory_plan.ts";
import { elementCount, formatShape, quoteName, type WeightSource } from "./weight_source.ts";

/** Source bytes read at a time. */
const SLICE_BYTES = 8 << 20;

/** One transformer block's parameters under their checkpoint names. */
export interface BlockWeights {
  readonly ln_1: Norm;
  readonly c_attn: Linear;
  readonly c_proj: Linear;
  readonly ln_2: Norm;
  readonly c_fc: Linear;
  readonly mlp_c_proj: Linear;
}

export interface Gpt2Weights {
  readonly wte: readonly RowPiece[];
  readonly wpe: readonly RowPiece[];
  readonly blocks: readonly BlockWeights[];
  readonly ln_f: Norm;
  /** `wte` itself when the head is tied. */
  readonly lm_head: readonly RowPiece[];
  /** `[classes, nEmbd]`, where it was asked for. */
  readonly score: readonly RowPiece[] | undefined;
  destroy(): void;
}

/** How one axis is stored: `groups` runs of `size` elements, each padded with zeros to `padded`. */
interface Axis {
  readonly groups: number;
  readonly size: number;
  readonly padded: number;
}

function axis(size: number, padded: number, groups = 1): Axis {
  return { groups, size, padded };
}

/** Where element `i` of an axis is stored. */
function storedIndex({ size, padded }: Axis, i: number): number {
  return Math.floor(i / size) * padded + i % size;
}

export type LoadProgress = (loadedBytes: number, totalBytes: number) => void;

/**
 * Loads every tensor of the checkpoint onto the GPU, the score head only if it has `classes`.
 * @throws ModelError when a value is NaN, infinite, or finite but too large for f16
 */
export async function loadWeights(
  gpu: Gpu,
  source: WeightSource,
  checkpoint: ResolvedCheckpoint,
  config: GPT2Config,
  elem: Elem,
  { classes, onProgress = () => {} }: {
    classes?: number | undefined;
    onProgress?: LoadProgress | undefined;
  } = {},
): Promise<Gpt2Weights> {
  const names = new Set(checkpoint.tensors.keys());
  if (classes === undefined) names.delete("score.weight");
  const loader = new Loader(gpu, await UploadRing.create(gpu), source, checkpoint, names, onProgress);
  const { nEmbd, nHead, headDim, nInner, layerNormEpsilon, nLayer, vocabSize, nPositions } = config;
  const padded = paddedSizes(config);
  const width = axis(nEmbd, padded.width);
  const heads = axis(headDim, padded.headDim, nHead);
  const qkv = axis(headDim, padded.headDim, 3 * nHead);
  const inner = axis(nInner, padded.inner);

  const linear = async (name: string, rows: Axis, columns: Axis): Promise<Linear> => ({
    w: await loader.tensor(`${name}.weight`, rows, columns, elem),
    bias: await loader.tensor(`${name}.bias`, axis(1, 1), columns, "f32"),
    inner: rows.groups * rows.padded,
    columns: columns.groups * columns.padded,
  });
  const norm = async (name: string): Promise<Norm> => ({
    gain: await loader.tensor(`${name}.weight`, axis(1, 1), width, "f32"),
    shift: await loader.tensor(`${name}.bias`, axis(1, 1), width, "f32"),
    epsilon: layerNormEpsilon,
  });

  try {
    const wte = await loader.table("wte.weight", vocabSize, width, elem);
    const wpe = await loader.table("wpe.weight", nPositions, width, elem);
    const blocks: BlockWeights[] = [];
    for (let i = 0; i < nLayer; i++) {
      blocks.push({
        ln_1: await norm(`h.${i}.ln_1`),
        c_attn: await linear(`h.${i}.attn.c_attn`, width, qkv),
        c_proj: await linear(`h.${i}.attn.c_proj`, heads, width),
        ln_2: await norm(`h.${i}.ln_2`),
        c_fc: await linear(`h.${i}.mlp.c_fc`, width, inner),
        mlp_c_proj: await linear(`h.${i}.mlp.c_proj`, inner, width),
      });
    }
    const ln_f = await norm("ln_f");
    const lm_head = checkpoint.tiedLmHead
      ? wte
      : await loader.table("lm_head.weight", vocabSize, width, elem);
    const score = classes === undefined
      ? undefined
      : await loader.table("score.weight", classes, width, elem);
    loader.finish();
    await gpu.idle();
    return { wte, wpe, blocks, ln_f, lm_head, score, destroy: () => loader.destroy() };
  } catch (error) {
    loader.destroy();
    throw error;
  }
}

class Loader {
  readonly #gpu: Gpu;
  readonly #source: WeightSource;
  readonly #checkpoint: ResolvedCheckpoint;
  readonly #onProgress: LoadProgress;
  readonly #buffers: GpuBuffer[] = [];
  /** Two, used by turns for every tensor: fresh ones for each would wait for the garbage collector by the hundred. */
  readonly #slices = [new Uint8Array(SLICE_BYTES), new Uint8Array(SLICE_BYTES)];
  /** Until the last of them is loaded. */
  #uploads: UploadRing | undefined;
  readonly #totalBytes: number;
  #loadedBytes = 0;

  constructor(
    gpu: Gpu,
    uploads: UploadRing,
    source: WeightSource,
    checkpoint: ResolvedCheckpoint,
    names: ReadonlySet<string>,
    onProgress: LoadProgress,
  ) {
    this.#gpu = gpu;
    this.#uploads = uploads;
    this.#source = source;
    this.#checkpoint = checkpoint;
    this.#onProgress = onProgress;
    const used = [...checkpoint.tensors].filter(([name]) => names.has(name));
    this.#totalBytes = used.reduce((sum, [, info]) => sum + info.byteLength, 0);
  }

  /** One buffer of `rows × columns`; a vector is a single row. */
  async tensor(name: string, rows: Axis, columns: Axis, elem: Elem): Promise<GpuBuffer> {
    const bytes = rows.groups * rows.padded * columns.groups * columns.padded * sizeOf(elem);
    const buffer = await this.#create(name, bytes);
    await this.#fill(
      name,
      rows,
      columns,
      elem,
      (row) => ({ buffer, row: storedIndex(rows, row), end: Infinity }),
    );
    return buffer;
  }

  /** A table of rows in as few buffers as the device's largest binding allows. */
  async table(name: string, rows: number, columns: Axis, elem: Elem): Promise<RowPiece[]> {
    const rowBytes = columns.groups * columns.padded * sizeOf(elem);
    const { maxBindingBytes, maxBufferBytes } = this.#gpu.caps;
    const pieces: RowPiece[] = [];
    for (const range of rowPieces(rows, rowBytes, Math.min(maxBindingBytes, maxBufferBytes))) {
      const buffer = await this.#create(pieceLabel(name, rows, range), range.rows * rowBytes);
      pieces.push({ ...range, buffer });
    }
    await this.#fill(name, axis(rows, rows), columns, elem, (row) => {
      const piece = pieces[Math.floor(row / pieces[0]!.rows)]!;
      return { buffer: piece.buffer, row: row - piece.first, end: piece.first + piece.rows };
    });
    return pieces;
  }

  /** Memory for `bytes` source bytes; more than usual for rows larger than a slice. */
  #slice(turn: number, bytes: number): Uint8Array {
    if (this.#slices[turn]!.length < bytes) this.#slices[turn] = new Uint8Array(bytes);
    return this.#slices[turn]!.subarray(0, bytes);
  }

  /** Hands over the last of the weights. */
  finish(): void {
    this.#uploads?.flush();
    this.#uploads?.destroy();
    this.#uploads = undefined;
  }

  destroy(): void {
    this.#uploads?.destroy();
    this.#uploads = undefined;
    for (const buffer of this.#buffers) buffer.destroy();
    this.#buffers.length = 0;
  }

  async #create(label: string, bytes: number): Promise<GpuBuffer> {
    const buffer = await allocate(this.#gpu, label, "weights", bytes);
    this.#buffers.push(buffer);
    return buffer;
  }

  /**
   * Streams a tensor in slices of whole rows. `place` says where a row goes and up to which row (exclusive) the rows
   * after it follow in the same buffer.
   */
  async #fill(
    name: string,
    rows: Axis,
    columns: Axis,
    elem: Elem,
    place: (row: number) => { buffer: GpuBuffer; row: number; end: number },
  ): Promise<void> {
    const info = this.#checkpoint.tensors.get(name)!;
    const rowCount = rows.groups * rows.size;
    const rowElements = columns.groups * columns.size;
    const storedRowBytes = columns.groups * columns.padded * sizeOf(elem);
    const sourceRowBytes = rowElements * STORED_BYTES[info.dtype];
    const sliceRows = Math.max(1, Math.min(rowCount, Math.floor(SLICE_BYTES / sourceRowBytes)));

    const read = async (first: number, turn: number): Promise<Uint8Array> => {
      const slice = this.#slice(turn % 2, Math.min(sliceRows, rowCount - first) * sourceRowBytes);
      const end = this.#gpu.timeline?.begin("files", `read ${name}`);
      await this.#source.read(info.name, first * sourceRowBytes, slice);
      end?.(slice.byteLength);
      return slice;
    };
    let next = read(0, 0);
    for (let first = 0, turn = 1; first < rowCount; first += sliceRows, turn++) {
      const slice = await next;
      if (first + sliceRows < rowCount) next = read(first + sliceRows, turn);
      next.catch(() => {}); // reported when awaited; this slice may fail before
      const endConversion = this.#gpu.timeline?.begin("files", `convert ${name}`);
      const converted = convertElements(slice, info.dtype, elem);
      endConversion?.();
      this.#refuseUnusable(info, first * rowElements, converted);
      const bytes = padRows(converted.bytes, columns, sizeOf(elem));
      const count = slice.byteLength / sourceRowBytes;
      // Runs of rows that are stored one after another go up in one call: all of them, unless rows are padded in
      // groups or the table is cut into pieces.
      for (let row = 0; row < count;) {
        const target = place(first + row);
        const groupEnd = rows.padded === rows.size
          ? Infinity
          : (Math.floor((first + row) / rows.size) + 1) * rows.size;
        const run = Math.min(count, target.end - first, groupEnd - first) - row;
        const part = bytes.subarray(row * storedRowBytes, (row + run) * storedRowBytes);
        await this.#uploads!.write(target.buffer, part, target.row * storedRowBytes);
        row += run;
      }
      this.#account(slice.byteLength);
    }
  }

  #refuseUnusable(
    info: LoadableTensor,
    firstElement: number,
    found: { firstNonFinite: number; firstOverflow: number },
  ): void {
    const at = (index: number) => {
      const flat = firstElement + index;
      const place = info.shape.map((_, d) =>
        Math.floor(flat / elementCount(info.shape.slice(d + 1))) % info.shape[d]!
      );
      return `${quoteName(info.name)} in ${info.file} at ${formatShape(place)}`;
    };
    if (found.firstNonFinite >= 0) {
      throw new ModelError(`The weights hold a NaN or an infinity: ${at(found.firstNonFinite)}`, {
        hint:
          "the checkpoint is damaged, or was saved after its training had diverged: download or export it again",
      });
    }
    if (found.firstOverflow >= 0) {
      throw new ModelError(`A weight is too large for f16: ${at(found.firstOverflow)}`, {
        hint: "run with `--dtype f32`",
      });
    }
  }

  #account(sourceBytes: number): void {
    this.#loadedBytes += sourceBytes;
    this.#onProgress(this.#loadedBytes, this.#totalBytes);
    this.#gpu.check();
  }
}

/** Spreads rows of `groups × size` elements to `groups × padded`, with zeros between. */
function padRows(bytes: Uint8Array, columns: Axis, elementBytes: number): Uint8Array {
  const { size, padded } = columns;
  if (size === padded) return bytes;
  const runs = bytes.byteLength / (size * elementBytes);
  const out = new Uint8Array(runs * padded * elementBytes);
  for (let i = 0; i < runs; i++) {
    out.set(
      bytes.subarray(i * size * elementBytes, (i + 1) * size * elementBytes),
      i * padded * elementBytes,
    );
  }
  return out;
}
