/** The device that all tests share, and kernels run on it with numbers in and numbers out. */
import { setDefaultTimeout, test } from "bun:test";
import { f16ToF32, f32ToF16 } from "../../src/model/float16.ts";
import { createBuffer, download, type GpuBuffer, upload } from "../../src/runtime/buffers.ts";
import { type Gpu, openDevice } from "../../src/runtime/device.ts";
import { type Elem, type Op, sizeOf, supports } from "../../src/runtime/kernel.ts";
import { Recorder } from "../../src/runtime/pass.ts";

/** Software Vulkan compiles some pipelines for seconds, and a shared machine may be busy. */
const TEST_TIMEOUT_MS = 120_000;

let opening: Promise<Gpu> | undefined;

/** Opened by the first test file that asks, kept until the process ends; tests must leave it healthy. */
export function testDevice(): Promise<Gpu> {
  setDefaultTimeout(TEST_TIMEOUT_MS);
  return opening ??= openDevice().then((gpu) => {
    console.error(`tests run on ${gpu.caps.name} (${gpu.caps.driver})`);
    return gpu;
  });
}

/** The element types that the device computes with. */
export function testElems(gpu: Gpu): Elem[] {
  return gpu.caps.f16 ? ["f32", "f16"] : ["f32"];
}

/** Defines tests for every element type; those of a type that the device lacks show as one skipped test. */
export function eachElem(gpu: Gpu, define: (elem: Elem) => void): void {
  for (const elem of testElems(gpu)) define(elem);
  if (!gpu.caps.f16) test.skip("f16: needs the shader-f16 feature", () => {});
}

/** The candidates that the device runs; `supports` is what the model asks too. */
export function runnable<P>(gpu: Gpu, candidates: readonly Op<P>[]): Op<P>[] {
  return candidates.filter(({ kernel, variant }) => supports(kernel, variant, gpu.caps) === true);
}

/** Vectors of the published models' heads: larger ones are large. */
const LARGE_HEAD_DIM4 = 16;

/**
 * Candidates for attention that are tested with every size of head. Software Vulkan takes a second to compile one, ten for
 * large heads, and up to minutes where loops are unrolled, so there it gets each kernel's most preferred variant and, unless
 * heads are large, the last of all, and an unrolled one only where heads are so small that most loops have one trip; other
 * devices get all.
 */
export function attentionOps<P>(
  gpu: Gpu,
  candidates: (unroll: boolean) => readonly Op<P>[],
  headDim4: number,
): Op<P>[] {
  const rolled = runnable(gpu, candidates(false));
  const unrolled = runnable(gpu, candidates(true));
  if (!gpu.caps.isSoftware) return [...rolled, ...unrolled];
  const isLarge = headDim4 > LARGE_HEAD_DIM4;
  const chosen = rolled.filter((op, i) =>
    (i === rolled.length - 1 && !isLarge) || rolled.findIndex(({ kernel }) => kernel === op.kernel) === i
  );
  return [...chosen, ...(headDim4 === 1 ? unrolled.slice(-1) : [])];
}

/** Kernel and variant as a test's name tells them: `matmul/tiled f32 tileRows=64 tileColumns=64 unrolled`. */
export function titleOf<P>({ kernel, variant }: Op<P>): string {
  const parts = Object.entries(variant).map(([name, value]) =>
    typeof value === "number"
      ? `${name}=${value}`
      : value === true
      ? "unrolled"
      : value === false
      ? ""
      : value
  );
  return [kernel.name, ...parts].filter((part) => part !== "").join(" ");
}

/** How a test's numbers lie in a buffer. */
export type Stored = Elem | "u32";

export interface Tensor {
  readonly stored: Stored;
  readonly data: ArrayLike<number>;
}

export function tensor(stored: Stored, data: ArrayLike<number>): Tensor {
  return { stored, data };
}

/** A tensor of NaN: an element that a kernel should write but does not is then seen, wherever it is. */
export function poison(stored: Elem, count: number): Tensor {
  return { stored, data: new Float32Array(count).fill(NaN) };
}

/** The numbers that a kernel reads when it is given these. */
export function rounded(data: ArrayLike<number>, elem: Elem): Float32Array {
  return Float32Array.from(data, (x) => roundTo(elem, x));
}

/** The stored number nearest to `x`. */
export function roundTo(elem: Elem, x: number): number {
  return elem === "f16" ? f16ToF32(f32ToF16(x)) : Math.fround(x);
}

/** The values with `count` NaN behind them, which no kernel may let into its result. */
export function thenNan(data: ArrayLike<number>, count: number): Float64Array {
  const out = new Float64Array(data.length + count).fill(NaN);
  for (let i = 0; i < data.length; i++) out[i] = data[i]!;
  return out;
}

/** Each row of `length` numbers followed by zeros up to a multiple of four: how odd widths are stored. */
export function padRows(data: ArrayLike<number>, length: number): Float64Array {
  const stride = 4 * Math.ceil(length / 4);
  const out = new Float64Array(data.length / length * stride);
  for (let i = 0; i < data.length; i++) out[Math.floor(i / length) * stride + i % length] = data[i]!;
  return out;
}

/** One dispatch of a test; its buffers are named as the kernel's bindings unless `names` maps them. */
export interface Step {
  prepare(gpu: Gpu): Promise<unknown>;
  record(recorder: Recorder, buffers: Readonly<Record<string, GpuBuffer>>): void;
}

export function step<P>(
  { kernel, variant }: Op<P>,
  problem: P,
  names: Readonly<Record<string, string>> = {},
): Step {
  return {
    prepare: (gpu) => gpu.pipelines.prepare(kernel, variant),
    record(recorder, buffers) {
      const bound: Record<string, GpuBuffer> = {};
      for (const name of Object.keys(kernel.bindings)) bound[name] = buffers[names[name] ?? name]!;
      recorder.dispatch(kernel, variant, problem, bound);
    },
  };
}

/** Bytes behind every tensor that no kernel may write. */
const GUARD_BYTES = 64;
const GUARD = 0xa5;

/**
 * Runs dispatches in order over fresh buffers that hold `tensors`.
 * @returns the tensors named in `outputs` afterwards, widened to f32
 * @throws when a kernel wrote behind the end of one of them
 */
export async function runSteps<Output extends string>(
  gpu: Gpu,
  steps: readonly Step[],
  tensors: Readonly<Record<string, Tensor>>,
  outputs: readonly Output[],
): Promise<Record<Output, Float32Array>> {
  await Promise.all(steps.map((s) => s.prepare(gpu)));
  const buffers: Record<string, GpuBuffer> = {};
  try {
    for (const [name, t] of Object.entries(tensors)) buffers[name] = guardedBuffer(gpu, name, t);
    const recorder = new Recorder(gpu, "test");
    for (const s of steps) s.record(recorder, buffers);
    recorder.submit();
    const results = {} as Record<Output, Float32Array>;
    for (const name of outputs) results[name] = await readGuarded(name, buffers[name]!, tensors[name]!);
    return results;
  } finally {
    for (const buffer of Object.values(buffers)) buffer.destroy();
  }
}

/** Runs one kernel; returns all that it may write. */
export function runOp<P>(
  gpu: Gpu,
  op: Op<P>,
  problem: P,
  tensors: Readonly<Record<string, Tensor>>,
): Promise<Record<string, Float32Array>> {
  const { bindings } = op.kernel;
  const outputs = Object.keys(bindings).filter((name) => bindings[name] === "read_write");
  return runSteps(gpu, [step(op, problem)], tensors, outputs);
}

function bytesOf({ stored, data }: Tensor): Uint8Array {
  const words = stored === "f16"
    ? Uint16Array.from(data, f32ToF16)
    : stored === "u32"
    ? Uint32Array.from(data)
    : Float32Array.from(data);
  return new Uint8Array(words.buffer);
}

function guardedBuffer(gpu: Gpu, name: string, t: Tensor): GpuBuffer {
  const bytes = bytesOf(t);
  const all = new Uint8Array(Math.ceil(bytes.length / 16) * 16 + GUARD_BYTES).fill(GUARD);
  all.set(bytes);
  const buffer = createBuffer(gpu, name, "activations", all.length);
  upload(buffer, all);
  return buffer;
}

async function readGuarded(name: string, buffer: GpuBuffer, { stored, data }: Tensor): Promise<Float32Array> {
  const bytes = await download(buffer);
  const length = data.length * (stored === "u32" ? 4 : sizeOf(stored));
  const written = new Uint8Array(bytes, length).findIndex((byte) => byte !== GUARD);
  if (written >= 0) {
    throw new Error(`a kernel wrote byte ${length + written} of "${name}", which has ${length}`);
  }
  if (stored === "f16") return Float32Array.from(new Uint16Array(bytes, 0, data.length), f16ToF32);
  return new Float32Array(bytes, 0, data.length);
}
