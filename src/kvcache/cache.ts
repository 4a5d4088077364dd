/**
 * Where keys and values live. Layout, as kernels index it: for every layer one buffer of keys and one of values, each
 * `[heads, capacity, headDim]` in the run's element type, `headDim` padded to a multiple of four. A head's keys are
 * contiguous, so that a tile of them is one run of memory. Rows at `length` and beyond are undefined.
 */
import type { KvView } from "../kernels/index.ts";
import { createBuffer } from "../runtime/buffers.ts";
import type { Gpu } from "../runtime/device.ts";
import { type Elem, sizeOf } from "../runtime/kernel.ts";

export interface KvCacheShape {
  readonly layers: number;
  readonly heads: number;
  readonly headDim4: number;
  readonly elem: Elem;
}

/** Bytes that one token takes in all layers, keys and values. */
export function kvBytesPerToken(shape: KvCacheShape): number {
  return 2 * shape.layers * shape.heads * 4 * shape.headDim4 * sizeOf(shape.elem);
}

/** A cache of fixed capacity, written in place: nothing is moved or reallocated as it fills. */
export class KvCache {
  readonly capacity: number;
  readonly #layers: readonly KvView[];
  #length = 0;

  /** @throws DoesNotFitError when a layer's keys are larger than the device can bind */
  constructor(gpu: Gpu, shape: KvCacheShape, capacity: number) {
    const bytes = capacity * kvBytesPerToken(shape) / (2 * shape.layers);
    const layers: KvView[] = [];
    this.capacity = capacity;
    this.#layers = layers;
    for (let i = 0; i < shape.layers; i++) {
      layers.push({
        k: createBuffer(gpu, `layer ${i} keys`, "kv", bytes),
        v: createBuffer(gpu, `layer ${i} values`, "kv", bytes),
        capacity,
      });
    }
  }

  /** Tokens in the cache. */
  get length(): number {
    return this.#length;
  }

  layer(i: number): KvView {
    const layer = this.#layers[i];
    if (!layer) throw new RangeError(`The cache has no layer ${i}`);
    return layer;
  }

  /** Counts tokens whose keys and values have been recorded for writing. */
  advance(tokens: number): void {
    if (this.#length + tokens > this.capacity) {
      throw new RangeError(`${this.#length} + ${tokens} tokens are more than the cache's ${this.capacity}`);
    }
    this.#length += tokens;
  }

  /** Forgets the tokens from `length` on; their rows are overwritten by what comes next. */
  truncate(length: number): void {
    if (length < 0 || length > this.#length) {
      throw new RangeError(`Cannot cut ${this.#length} tokens to ${length}`);
    }
    this.#length = length;
  }

  destroy(): void {
    for (const { k, v } of this.#layers) {
      k.destroy();
      v.destroy();
    }
  }
}
