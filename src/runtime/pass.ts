/**
 * Records dispatches and copies in order and submits them. Dispatches share one compute pass, in which WebGPU orders
 * every read after the writes before it; a profiled run gives each dispatch a pass of its own, to time it.
 */
import type { GpuBuffer, Readback } from "./buffers.ts";
import type { Gpu } from "./device.ts";
import { type Grid, type Kernel, ParameterSlots, type Pipeline, type Work } from "./kernel.ts";
import type { ArithmeticUnit, Profiler } from "./profiler.ts";
import type { EndSpan } from "./timeline.ts";

/** A copy of a tensor taken in the middle of a pass: for tests and for looking at what a layer computes. */
export type Tap = (name: string, buffer: GpuBuffer, recorder: Recorder) => void;

export interface RecorderOptions {
  readonly profiler?: Profiler | undefined;
  readonly tap?: Tap | undefined;
}

/** Takes dispatches in order: to run once, or to be kept. */
export interface Dispatcher {
  /** Names the part of the model that the dispatches from here on belong to, for traces: a layer, the output head. */
  enter(part: string): void;

  /** Runs a prepared kernel over its grid; `buffers` are named as in the kernel's bindings. */
  dispatch<V extends object, P>(
    kernel: Kernel<V, P>,
    v: V,
    p: P,
    buffers: Readonly<Record<string, GpuBuffer>>,
  ): void;
}

/** A dispatch with all that it needs. */
interface BoundDispatch {
  readonly name: string;
  readonly pipeline: GPUComputePipeline;
  readonly bindGroup: GPUBindGroup;
  /** Undefined where the bind group holds the parameters. */
  readonly immediates: Uint32Array | undefined;
  readonly grid: Grid;
  readonly variant: object;
  readonly unit: ArithmeticUnit;
  readonly work: (lengths: readonly number[]) => Work;
  readonly part: string | undefined;
}

function bindDispatch<V extends object, P>(
  { pipelines, caps }: Gpu,
  kernel: Kernel<V, P>,
  v: V,
  p: P,
  buffers: Readonly<Record<string, GpuBuffer>>,
  part: string | undefined,
  slots?: ParameterSlots,
): BoundDispatch {
  const grid = kernel.grid(v, p);
  if (grid.some((n) => n > caps.workgroupsPerDimension)) {
    throw new Error(`${kernel.name} asked for a grid of ${grid.join(" x ")} workgroups`);
  }
  const pipeline = pipelines.get(kernel, v);
  const bound = pipeline.bindings.map((name) => {
    const buffer = buffers[name];
    if (!buffer) throw new Error(`${kernel.name} needs a buffer for "${name}"`);
    return buffer;
  });
  const params = packParams(pipeline, kernel.values(v, p));
  return {
    name: kernel.name,
    pipeline: pipeline.handle,
    bindGroup: pipelines.bindGroup(pipeline, bound, params, slots),
    immediates: pipeline.paramsIn === "uniform" ? undefined : params,
    grid,
    variant: v,
    unit: pipeline.unit,
    work: (lengths) => kernel.work(v, p, lengths),
    part,
  };
}

/**
 * Dispatches that run again and again over the same buffers with the same parameters: bound once, so that running them
 * costs three or four calls each. Its buffers must outlive it.
 */
export class DispatchList implements Dispatcher {
  readonly #gpu: Gpu;
  readonly #slots: ParameterSlots | undefined;
  readonly #dispatches: BoundDispatch[] = [];
  #part: string | undefined;

  /** @param parameters a buffer from `createParameters` for all the sets of parameters that kernels take from there */
  constructor(gpu: Gpu, parameters?: GpuBuffer) {
    this.#gpu = gpu;
    const buffers = parameters ? [parameters] : [];
    this.#slots = parameters && new ParameterSlots(() => {
      const buffer = buffers.pop();
      if (!buffer) throw new Error("The list has more sets of parameters than its buffer");
      return buffer;
    });
  }

  enter(part: string): void {
    this.#part = part;
  }

  dispatch<V extends object, P>(
    kernel: Kernel<V, P>,
    v: V,
    p: P,
    buffers: Readonly<Record<string, GpuBuffer>>,
  ): void {
    const bound = bindDispatch(this.#gpu, kernel, v, p, buffers, this.#part, this.#slots);
    this.#dispatches.push({ ...bound, immediates: bound.immediates?.slice() });
  }

  /** The dispatches of some kernels only, by name. */
  only(isWanted: (kernelName: string) => boolean): DispatchList {
    const list = new DispatchList(this.#gpu);
    list.#dispatches.push(...this.#dispatches.filter(({ name }) => isWanted(name)));
    return list;
  }

  get length(): number {
    return this.#dispatches.length;
  }

  [Symbol.iterator](): Iterator<BoundDispatch> {
    return this.#dispatches[Symbol.iterator]();
  }
}

export class Recorder implements Dispatcher {
  readonly #gpu: Gpu;
  readonly #label: string;
  readonly #profiler: Profiler | undefined;
  readonly #tap: Tap | undefined;
  readonly #encoder: GPUCommandEncoder;
  readonly #endEncoding: EndSpan | undefined;
  #pass: GPUComputePassEncoder | undefined;
  /** Whether a pass that begins now follows another at once. */
  #follows = false;
  #part: string | undefined;
  #step: string | undefined;
  #lengths: readonly number[] = [];

  constructor(gpu: Gpu, label: string, { profiler, tap }: RecorderOptions = {}) {
    this.#gpu = gpu;
    this.#label = label;
    this.#profiler = profiler?.isPaused ? undefined : profiler;
    this.#tap = tap;
    this.#endEncoding = gpu.timeline?.begin("encoding", label);
    this.#encoder = gpu.device.createCommandEncoder({ label });
  }

  /**
   * Names the step of the run that the dispatches from here on belong to, for traces.
   * @param lengths tokens of each sequence with those of the step, which dispatches that take them from the GPU are counted by
   */
  beginStep(step: string, lengths: readonly number[] = []): void {
    this.#step = step;
    this.#lengths = lengths;
  }

  enter(part: string): void {
    this.#part = part;
  }

  dispatch<V extends object, P>(
    kernel: Kernel<V, P>,
    v: V,
    p: P,
    buffers: Readonly<Record<string, GpuBuffer>>,
  ): void {
    this.#encode(bindDispatch(this.#gpu, kernel, v, p, buffers, this.#part));
  }

  /** Runs the dispatches of a list in order. */
  replay(list: DispatchList): void {
    for (const dispatch of list) this.#encode(dispatch);
  }

  /** Copies bytes between buffers, after the dispatches recorded so far. */
  copy(
    from: GpuBuffer,
    fromOffset: number,
    to: GpuBuffer | Readback,
    toOffset: number,
    byteLength: number,
  ): void {
    this.#endPass();
    this.#follows = false;
    this.#encoder.copyBufferToBuffer(from.handle, fromOffset, to.handle, toOffset, byteLength);
  }

  /** Shows a tensor to whoever asked for it; nothing otherwise. */
  tap(name: string, buffer: GpuBuffer): void {
    this.#tap?.(name, buffer, this);
  }

  /** Hands everything recorded to the GPU. The recorder is spent. */
  submit(): void {
    this.#endPass();
    this.#profiler?.resolve(this.#encoder);
    this.#endEncoding?.();
    const startMs = performance.now();
    const endSubmission = this.#gpu.timeline?.begin("submission", this.#label);
    this.#gpu.device.queue.submit([this.#encoder.finish()]);
    endSubmission?.();
    this.#profiler?.submitted(this.#label, startMs);
    this.#gpu.check();
  }

  #encode(dispatch: BoundDispatch): void {
    const pass = this.#computePass(dispatch);
    pass.setPipeline(dispatch.pipeline);
    pass.setBindGroup(0, dispatch.bindGroup);
    if (dispatch.immediates) (pass as ImmediatesEncoder).setImmediates(0, dispatch.immediates);
    pass.dispatchWorkgroups(...dispatch.grid);
    if (this.#profiler?.unit === "dispatches") this.#endPass();
  }

  #computePass(first: BoundDispatch): GPUComputePassEncoder {
    return this.#pass ??= this.#encoder.beginComputePass({ label: first.name, ...this.#timestamps(first) });
  }

  #timestamps(first: BoundDispatch): { timestampWrites?: GPUComputePassTimestampWrites } {
    if (!this.#profiler) return {};
    const { name: kernel, variant, unit, part } = first;
    const timestampWrites = this.#profiler.span(
      this.#profiler.unit === "dispatches"
        ? { kernel, variant, unit, part, step: this.#step, work: first.work(this.#lengths) }
        : {
          kernel: this.#label,
          variant: NO_VARIANT,
          unit: "fma",
          part: undefined,
          step: this.#step,
          work: NO_WORK,
        },
      this.#follows,
    );
    this.#follows = true;
    return timestampWrites ? { timestampWrites } : {};
  }

  #endPass(): void {
    this.#pass?.end();
    this.#pass = undefined;
  }
}

/** A pass of many dispatches is timed as a whole, and not compared with anything. */
const NO_VARIANT = {};
const NO_WORK: Work = { bytes: 0, flops: 0 };

/** Immediates are in Dawn and in the WebGPU draft, not yet in the published types. */
type ImmediatesEncoder = GPUComputePassEncoder & { setImmediates(offset: number, data: Uint32Array): void };

const packed = new DataView(new ArrayBuffer(64));

/**
 * Lays the values out in the order of the kernel's `params`, as the generated struct reads them. The next call overwrites
 * them.
 */
function packParams(
  { handle, params }: Pipeline,
  values: Readonly<Record<string, number>>,
): Uint32Array<ArrayBuffer> {
  let offset = 0;
  for (const [name, type] of params) {
    const value = values[name];
    if (value === undefined) throw new Error(`${handle.label} got no value for parameter "${name}"`);
    if (type === "f32") packed.setFloat32(offset, value, true);
    else packed.setUint32(offset, value, true);
    offset += 4;
  }
  return new Uint32Array(packed.buffer, 0, offset / 4);
}
