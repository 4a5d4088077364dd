/** GPU time by kernel, from timestamp queries around single-dispatch passes. */
import { GpuBuffer } from "./buffers.ts";
import type { Gpu } from "./device.ts";

/** Dispatches timed in one submission; later ones run untimed and are counted in `dropped`. */
const CAPACITY = 2048;

export interface KernelTime {
  readonly name: string;
  readonly calls: number;
  readonly gpuMs: number;
}

/**
 * Times every dispatch of a recorder. A profiled pass holds one dispatch, so gaps between dispatches grow: the sum of
 * kernels is right, the wall time of a profiled run is not that of an ordinary one.
 */
export class Profiler {
  readonly #gpu: Gpu;
  readonly #querySet: GPUQuerySet;
  readonly #resolved: GpuBuffer;
  readonly #readback: GpuBuffer;
  #names: string[] = [];
  readonly #totals = new Map<string, { calls: number; gpuMs: number }>();
  #dropped = 0;

  constructor(gpu: Gpu) {
    this.#gpu = gpu;
    this.#querySet = gpu.device.createQuerySet({ type: "timestamp", count: 2 * CAPACITY });
    const size = 16 * CAPACITY;
    const resolveUsage = GPUBufferUsage.QUERY_RESOLVE | GPUBufferUsage.COPY_SRC;
    const readUsage = GPUBufferUsage.MAP_READ | GPUBufferUsage.COPY_DST;
    this.#resolved = new GpuBuffer(gpu, "timestamps", "staging", size, resolveUsage);
    this.#readback = new GpuBuffer(gpu, "readback of timestamps", "staging", size, readUsage);
  }

  /** Reserves two queries for a dispatch; undefined when the submission has used them up. */
  span(name: string): GPUComputePassTimestampWrites | undefined {
    const index = this.#names.length;
    if (index >= CAPACITY) {
      this.#dropped++;
      return undefined;
    }
    this.#names.push(name);
    return {
      querySet: this.#querySet,
      beginningOfPassWriteIndex: 2 * index,
      endOfPassWriteIndex: 2 * index + 1,
    };
  }

  /** Records the copy of this submission's timestamps. */
  resolve(encoder: GPUCommandEncoder): void {
    if (this.#names.length === 0) return;
    encoder.resolveQuerySet(this.#querySet, 0, 2 * this.#names.length, this.#resolved.handle, 0);
    encoder.copyBufferToBuffer(this.#resolved.handle, 0, this.#readback.handle, 0, 16 * this.#names.length);
  }

  /** Waits for the last submission and adds its times; call once after each. */
  async collect(): Promise<void> {
    if (this.#names.length === 0) return;
    const size = 16 * this.#names.length;
    const { handle } = this.#readback;
    await this.#gpu.wait(handle.mapAsync(GPUMapMode.READ, 0, size));
    const ticks = new BigUint64Array(handle.getMappedRange(0, size));
    this.#names.forEach((name, i) => {
      const total = this.#totals.get(name) ?? { calls: 0, gpuMs: 0 };
      total.calls++;
      total.gpuMs += Number((ticks[2 * i + 1] ?? 0n) - (ticks[2 * i] ?? 0n)) / 1e6;
      this.#totals.set(name, total);
    });
    handle.unmap();
    this.#names = [];
  }

  /** Forgets the times so far. */
  reset(): void {
    this.#totals.clear();
    this.#dropped = 0;
  }

  /** Kernels by falling share of GPU time, and how many dispatches could not be timed. */
  report(): { kernels: KernelTime[]; dropped: number } {
    const kernels = [...this.#totals].map(([name, total]) => ({ name, ...total }));
    return { kernels: kernels.sort((a, b) => b.gpuMs - a.gpuMs), dropped: this.#dropped };
  }

  destroy(): void {
    this.#querySet.destroy();
    this.#resolved.destroy();
    this.#readback.destroy();
  }
}
