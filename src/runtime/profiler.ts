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

/** What a profiler times: each dispatch, in a pass of its own, or passes as they are without it. */
export type ProfiledUnit = "dispatches" | "passes";

/** Queries of one submission, and where its timestamps come back. */
class QuerySlot {
  readonly names: string[] = [];
  readonly #gpu: Gpu;
  readonly #querySet: GPUQuerySet;
  readonly #resolved: GpuBuffer;
  readonly #readback: GpuBuffer;

  constructor(gpu: Gpu) {
    this.#gpu = gpu;
    this.#querySet = gpu.device.createQuerySet({ type: "timestamp", count: 2 * CAPACITY });
    const size = 16 * CAPACITY;
    const resolveUsage = GPUBufferUsage.QUERY_RESOLVE | GPUBufferUsage.COPY_SRC;
    const readUsage = GPUBufferUsage.MAP_READ | GPUBufferUsage.COPY_DST;
    this.#resolved = new GpuBuffer(gpu, "timestamps", "staging", size, resolveUsage);
    this.#readback = new GpuBuffer(gpu, "readback of timestamps", "staging", size, readUsage);
  }

  span(name: string): GPUComputePassTimestampWrites | undefined {
    const index = this.names.length;
    if (index >= CAPACITY) return undefined;
    this.names.push(name);
    return {
      querySet: this.#querySet,
      beginningOfPassWriteIndex: 2 * index,
      endOfPassWriteIndex: 2 * index + 1,
    };
  }

  resolve(encoder: GPUCommandEncoder): void {
    const { length } = this.names;
    encoder.resolveQuerySet(this.#querySet, 0, 2 * length, this.#resolved.handle, 0);
    encoder.copyBufferToBuffer(this.#resolved.handle, 0, this.#readback.handle, 0, 16 * length);
  }

  /** Nanoseconds, begin and end of each span; the slot is free again afterwards. */
  async read(): Promise<{ names: string[]; ticks: BigUint64Array }> {
    const size = 16 * this.names.length;
    const { handle } = this.#readback;
    await this.#gpu.wait(handle.mapAsync(GPUMapMode.READ, 0, size));
    const ticks = new BigUint64Array(handle.getMappedRange(0, size).slice(0));
    handle.unmap();
    return { names: this.names.splice(0), ticks };
  }

  destroy(): void {
    this.#querySet.destroy();
    this.#resolved.destroy();
    this.#readback.destroy();
  }
}

/**
 * Times what recorders run. A profiled pass that holds one dispatch makes gaps between dispatches grow: the sum of kernels is
 * right then, the wall time of the run is not that of an ordinary one. Passes as they are cost next to nothing, and say how
 * long the GPU was at work.
 */
export class Profiler {
  readonly unit: ProfiledUnit;
  readonly #gpu: Gpu;
  /** Of the submission that is being recorded; undefined until it times something. */
  #open: QuerySlot | undefined;
  /** Of submissions whose timestamps have not been read, oldest first. */
  readonly #pending: QuerySlot[] = [];
  readonly #free: QuerySlot[] = [];
  readonly #totals = new Map<string, { calls: number; gpuMs: number }>();
  #dropped = 0;
  #busyNs = 0n;
  #lastEnd = 0n;

  constructor(gpu: Gpu, unit: ProfiledUnit = "dispatches") {
    this.unit = unit;
    this.#gpu = gpu;
    this.#free.push(new QuerySlot(gpu));
  }

  /** Reserves two queries for a pass; undefined when the submission has used them up. */
  span(name: string): GPUComputePassTimestampWrites | undefined {
    this.#open ??= this.#free.pop() ?? new QuerySlot(this.#gpu);
    const span = this.#open.span(name);
    if (!span) this.#dropped++;
    return span;
  }

  /** Records the copy of this submission's timestamps. */
  resolve(encoder: GPUCommandEncoder): void {
    if (!this.#open) return;
    this.#open.resolve(encoder);
    this.#pending.push(this.#open);
    this.#open = undefined;
  }

  /** Waits for the oldest submission that was not collected, and adds its times; call once after each. */
  async collect(): Promise<void> {
    const slot = this.#pending.shift();
    if (!slot) return;
    const { names, ticks } = await slot.read();
    names.forEach((name, i) => {
      const [begin, end] = [ticks[2 * i] ?? 0n, ticks[2 * i + 1] ?? 0n];
      const total = this.#totals.get(name) ?? { calls: 0, gpuMs: 0 };
      total.calls++;
      total.gpuMs += Number(end - begin) / 1e6;
      this.#totals.set(name, total);
      // Passes may overlap at their ends: time counts once.
      const from = begin > this.#lastEnd ? begin : this.#lastEnd;
      if (end <= from) return;
      this.#busyNs += end - from;
      this.#lastEnd = end;
    });
    this.#free.push(slot);
  }

  /** Milliseconds in which something timed was running. */
  get busyMs(): number {
    return Number(this.#busyNs) / 1e6;
  }

  /** Forgets the times so far. */
  reset(): void {
    this.#totals.clear();
    this.#dropped = 0;
    this.#busyNs = 0n;
  }

  /** Kernels by falling share of GPU time, and how many dispatches could not be timed. */
  report(): { kernels: KernelTime[]; dropped: number } {
    const kernels = [...this.#totals].map(([name, total]) => ({ name, ...total }));
    return { kernels: kernels.sort((a, b) => b.gpuMs - a.gpuMs), dropped: this.#dropped };
  }

  destroy(): void {
    for (const slot of [...this.#free, ...this.#pending, ...(this.#open ? [this.#open] : [])]) slot.destroy();
  }
}
