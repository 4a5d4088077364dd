/** GPU time by kernel, from timestamp queries around passes. */
import { createUnbound, type GpuBuffer } from "./buffers.ts";
import type { Gpu } from "./device.ts";
import type { Work } from "./kernel.ts";

/** Dispatches timed in one submission; later ones run untimed. */
const CAPACITY = 2048;

/** Timed dispatches that are kept one by one at most, about 100 MB. */
const MOST_KEPT = 1_000_000;

/** What arithmetic a kernel does: products of f16 matrices on tensor cores, or multiply-adds. */
export type ArithmeticUnit = "matrix" | "fma";

/** What a timed pass runs. */
export interface ProfiledDispatch {
  /** Family and variant, or the label of the pass where more than one dispatch is timed together. */
  readonly kernel: string;
  readonly variant: object;
  readonly unit: ArithmeticUnit;
  /** The part of the model that it belongs to: a layer, the output head. */
  readonly part: string | undefined;
  /** The step of the run: a chunk of a prompt, a decoded token. */
  readonly step: string | undefined;
  readonly work: Work;
}

/** One kernel in one variant. */
export interface KernelTime {
  readonly kernel: string;
  readonly variant: Readonly<Record<string, unknown>>;
  readonly unit: ArithmeticUnit;
  readonly calls: number;
  readonly gpuMs: number;
  /** Of all calls together, as `Kernel.work` counts them. */
  readonly bytes: number;
  readonly flops: number;
}

/** What the GPU did from the first to the last of what was timed. Milliseconds. */
export interface GpuTimes {
  readonly submissions: number;
  /** Sum of what was timed. */
  readonly kernelsMs: number;
  /** Within submissions, in which nothing timed ran: copies, and what lies between passes. */
  readonly gapsMs: number;
  /** Between the end of a submission and the beginning of the next. */
  readonly idleMs: number;
  /** Submissions from their first timestamp to their last: kernels and gaps, what runs at the same time counted once. */
  readonly totalMs: number;
}

export interface ProfilerReport {
  readonly kernels: readonly KernelTime[];
  readonly gpu: GpuTimes;
  readonly untimed: number;
}

/** A submission with its timestamps, for traces. */
export interface TimedSubmission {
  readonly label: string;
  /** On the clock of `performance.now()`: before it was handed over, and when its end had been seen. */
  readonly submittedMs: number;
  readonly observedMs: number;
  readonly dispatches: readonly ProfiledDispatch[];
  /** Nanoseconds on the GPU's clock, begin and end of each. */
  readonly ticks: BigUint64Array;
}

/**
 * What a profiler times: each dispatch, in a pass of its own; or passes as they are without it, which costs next to nothing
 * and says how long the GPU was at work.
 */
export type ProfiledUnit = "dispatches" | "passes";

/** Queries of one submission, and where its timestamps come back. */
class QuerySlot {
  readonly #dispatches: ProfiledDispatch[] = [];
  /** The query behind each; the one before it is where it begins. */
  readonly #ends: number[] = [];
  #queries = 0;
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
    this.#resolved = createUnbound(gpu, "timestamps", "staging", size, resolveUsage);
    this.#readback = createUnbound(gpu, "readback of timestamps", "staging", size, readUsage);
  }

  span(dispatch: ProfiledDispatch, hasBegin: boolean): GPUComputePassTimestampWrites | undefined {
    if (this.#dispatches.length >= CAPACITY) return undefined;
    const begin = hasBegin ? this.#queries++ : undefined;
    const end = this.#queries++;
    this.#dispatches.push(dispatch);
    this.#ends.push(end);
    return {
      querySet: this.#querySet,
      ...(begin === undefined ? {} : { beginningOfPassWriteIndex: begin }),
      endOfPassWriteIndex: end,
    };
  }

  resolve(encoder: GPUCommandEncoder): void {
    encoder.resolveQuerySet(this.#querySet, 0, this.#queries, this.#resolved.handle, 0);
    encoder.copyBufferToBuffer(this.#resolved.handle, 0, this.#readback.handle, 0, 8 * this.#queries);
  }

  /** The slot is free again afterwards. */
  async read(): Promise<{ dispatches: ProfiledDispatch[]; ticks: BigUint64Array }> {
    const size = 8 * this.#queries;
    const { handle } = this.#readback;
    await this.#gpu.wait(handle.mapAsync(GPUMapMode.READ, 0, size));
    const queries = new BigUint64Array(handle.getMappedRange(0, size).slice(0));
    handle.unmap();
    this.#queries = 0;
    const ends = this.#ends.splice(0);
    const ticks = BigUint64Array.from(ends.flatMap((end) => [queries[end - 1]!, queries[end]!]));
    return { dispatches: this.#dispatches.splice(0), ticks };
  }

  destroy(): void {
    this.#querySet.destroy();
    this.#resolved.destroy();
    this.#readback.destroy();
  }
}

/** What is added up for one kernel in one variant. */
interface RunningTotal {
  readonly unit: ArithmeticUnit;
  calls: number;
  ns: bigint;
  bytes: number;
  flops: number;
}

export interface ProfilerOptions {
  /** Dispatches when left out. */
  readonly unit?: ProfiledUnit;
  /** Keep every submission, for a trace; only sums otherwise. */
  readonly keepsAll?: boolean;
}

/**
 * Times what recorders run. Timestamps come back by themselves while the run goes on; `settle` waits for the last of them.
 *
 * A timestamp at the end of a pass waits until the pass has run, which takes microseconds of its own. Dispatches are timed
 * with one each: from the end of the one before to their own end, what it takes to begin included, as it is part of a run
 * without timestamps too. Their sum is the submission's time but for copies. What a timestamp costs is in them;
 * `Benchmark.timestampCost` measures it.
 */
export class Profiler {
  readonly unit: ProfiledUnit;
  /** While it is true recorders run as if there were no profiler. */
  isPaused = false;
  /** In the order in which they were handed over, where all are kept. */
  readonly submissions: TimedSubmission[] = [];
  readonly #gpu: Gpu;
  readonly #keepsAll: boolean;
  /** Of the submission that is being recorded; undefined until it times something. */
  #open: QuerySlot | undefined;
  readonly #slots: QuerySlot[] = [];
  readonly #free: QuerySlot[] = [];
  /** Ends when the timestamps of all submissions so far have been added up. */
  #read: Promise<void> = Promise.resolve();
  #totals = new Map<string, Map<object, RunningTotal>>();
  #kept = 0;
  #unkept = 0;
  #untimed = 0;
  #submitted = 0;
  #kernelsNs = 0n;
  #busyNs = 0n;
  #spansNs = 0n;
  #idleNs = 0n;
  #lastEnd: bigint | undefined;

  constructor(gpu: Gpu, { unit = "dispatches", keepsAll = false }: ProfilerOptions = {}) {
    this.unit = unit;
    this.#gpu = gpu;
    this.#keepsAll = keepsAll;
    this.#free.push(this.#newSlot());
  }

  #newSlot(): QuerySlot {
    const slot = new QuerySlot(this.#gpu);
    this.#slots.push(slot);
    return slot;
  }

  /**
   * Reserves queries for a pass; undefined when the submission has used them up.
   * @param follows whether the pass follows the one before at once: that one's end is then where this one begins
   */
  span(dispatch: ProfiledDispatch, follows: boolean): GPUComputePassTimestampWrites | undefined {
    const isFirst = this.#open === undefined;
    this.#open ??= this.#free.pop() ?? this.#newSlot();
    const span = this.#open.span(dispatch, isFirst || !follows);
    if (!span) this.#untimed++;
    return span;
  }

  /** Records the copy of this submission's timestamps. */
  resolve(encoder: GPUCommandEncoder): void {
    this.#open?.resolve(encoder);
  }

  /**
   * Takes the timestamps of what was just handed over to the GPU, when they are there.
   * @param submittedMs when that began, on the clock of `performance.now()`
   */
  submitted(label: string, submittedMs: number): void {
    const slot = this.#open;
    if (!slot) return;
    this.#open = undefined;
    // Mapped at once, so that it is known when they were there; added up in order.
    const reading = slot.read().then(({ dispatches, ticks }) => {
      this.#free.push(slot);
      return { label, submittedMs, observedMs: performance.now(), dispatches, ticks };
    });
    const earlier = this.#read;
    this.#read = reading.then(async (submission) => {
      await earlier;
      this.#add(submission);
    });
    this.#read.catch(() => {}); // `settle` tells
  }

  /** Waits until all that was handed over is in the sums. */
  async settle(): Promise<void> {
    await this.#read;
  }

  #add(submission: TimedSubmission): void {
    const { dispatches, ticks } = submission;
    const first = ticks[0]!;
    if (this.#lastEnd !== undefined && first > this.#lastEnd) this.#idleNs += first - this.#lastEnd;
    let covered = this.#lastEnd !== undefined && this.#lastEnd > first ? this.#lastEnd : first;
    const start = covered;
    dispatches.forEach((dispatch, i) => {
      const [begin, end] = [ticks[2 * i]!, ticks[2 * i + 1]!];
      this.#count(dispatch, end - begin);
      this.#kernelsNs += end - begin;
      // Passes may overlap at their ends: time counts once.
      const from = begin > covered ? begin : covered;
      if (end <= from) return;
      this.#busyNs += end - from;
      covered = end;
    });
    this.#spansNs += covered - start;
    this.#lastEnd = covered;
    this.#submitted++;
    if (!this.#keepsAll) return;
    if (this.#kept + dispatches.length > MOST_KEPT) {
      this.#unkept += dispatches.length;
      return;
    }
    this.#kept += dispatches.length;
    this.submissions.push(submission);
  }

  #count({ kernel, variant, unit, work }: ProfiledDispatch, ns: bigint): void {
    let variants = this.#totals.get(kernel);
    if (!variants) this.#totals.set(kernel, variants = new Map());
    let total = variants.get(variant);
    if (!total) variants.set(variant, total = { unit, calls: 0, ns: 0n, bytes: 0, flops: 0 });
    total.calls++;
    total.ns += ns;
    total.bytes += work.bytes;
    total.flops += work.flops;
  }

  /** Milliseconds in which something timed was running. */
  get busyMs(): number {
    return Number(this.#busyNs) / 1e6;
  }

  /** Timed dispatches that there was no room to keep. */
  get unkept(): number {
    return this.#unkept;
  }

  /** Forgets the sums so far, not what was kept; call it behind `settle`. */
  reset(): void {
    this.#totals = new Map();
    this.#untimed = 0;
    this.#submitted = 0;
    this.#kernelsNs = 0n;
    this.#busyNs = 0n;
    this.#spansNs = 0n;
    this.#idleNs = 0n;
    this.#lastEnd = undefined;
  }

  /** Times so far, of kernels by falling share; `untimed` counts dispatches that a submission had no queries for. */
  report(): ProfilerReport {
    const kernels = new Map<string, KernelTime>();
    for (const [kernel, variants] of this.#totals) {
      // Variants that are equal are one, whoever made the objects.
      for (const [variant, { unit, calls, ns, bytes, flops }] of variants) {
        const key = `${kernel} ${JSON.stringify(variant)}`;
        const before = kernels.get(key);
        kernels.set(key, {
          kernel,
          variant: { ...variant },
          unit,
          calls: calls + (before?.calls ?? 0),
          gpuMs: Number(ns) / 1e6 + (before?.gpuMs ?? 0),
          bytes: bytes + (before?.bytes ?? 0),
          flops: flops + (before?.flops ?? 0),
        });
      }
    }
    return {
      kernels: [...kernels.values()].sort((a, b) => b.gpuMs - a.gpuMs),
      gpu: {
        submissions: this.#submitted,
        kernelsMs: Number(this.#kernelsNs) / 1e6,
        gapsMs: Number(this.#spansNs - this.#busyNs) / 1e6,
        idleMs: Number(this.#idleNs) / 1e6,
        totalMs: Number(this.#spansNs) / 1e6,
      },
      untimed: this.#untimed,
    };
  }

  /** Frees it; what is in flight is nobody's. */
  destroy(): void {
    for (const slot of this.#slots) slot.destroy();
  }
}
