/** GPU buffers with labels and byte accounting, uploads and readbacks. */
import { DoesNotFitError } from "./errors.ts";
import type { Gpu } from "./device.ts";
import type { Timeline } from "./timeline.ts";

/** What a buffer is for; the memory report adds up by purpose. */
export type Purpose = "weights" | "kv" | "activations" | "staging";

/** Bytes allocated on the device, counted when buffers are created and destroyed. */
export class MemoryLedger {
  readonly #timeline: Timeline | undefined;
  readonly #current: Record<Purpose, number> = { weights: 0, kv: 0, activations: 0, staging: 0 };
  #total = 0;
  #peak: MemoryPeak = { atMs: 0, totalBytes: 0, bytes: { ...this.#current } };

  constructor(timeline?: Timeline) {
    this.#timeline = timeline;
  }

  add(purpose: Purpose, bytes: number): void {
    this.#current[purpose] += bytes;
    this.#total += bytes;
    if (this.#total > this.#peak.totalBytes) {
      this.#peak = { atMs: performance.now(), totalBytes: this.#total, bytes: { ...this.#current } };
    }
    this.#timeline?.sampleMemory(this.#current);
  }

  /** Bytes allocated now for one purpose. */
  bytes(purpose: Purpose): number {
    return this.#current[purpose];
  }

  /** Bytes allocated now. */
  get totalBytes(): number {
    return this.#total;
  }

  /** Most bytes that were ever allocated at once. */
  get peakBytes(): number {
    return this.#peak.totalBytes;
  }

  /** When that was, and what for. */
  get peak(): MemoryPeak {
    return this.#peak;
  }
}

/** The moment of the most bytes. */
export interface MemoryPeak {
  /** On the clock of `performance.now()`. */
  readonly atMs: number;
  readonly totalBytes: number;
  readonly bytes: Readonly<Record<Purpose, number>>;
}

/** The device refused an allocation that is within its limits: the memory is used up. */
export class OutOfMemoryError extends DoesNotFitError {
  /** Bytes that this process had allocated when it was refused. */
  readonly allocatedBytes: number;

  constructor(label: string, byteLength: number, allocatedBytes: number) {
    super(
      `The GPU is out of memory: "${label}" needs ${formatBytes(byteLength)} besides the ${
        formatBytes(allocatedBytes)
      } allocated so far`,
      { hint: "use a smaller `--context` or `--dtype f16`, or end other programs that use the GPU" },
    );
    this.allocatedBytes = allocatedBytes;
  }
}

let nextId = 0;

/** Bytes that a buffer for `byteLength` bytes takes: kernels index in vec4, so its size is a multiple of 16. */
export function bufferBytes(byteLength: number): number {
  return Math.max(16, Math.ceil(byteLength / 16) * 16);
}

/** A storage buffer; new ones read as zeros. */
export class GpuBuffer {
  readonly id = nextId++;
  readonly gpu: Gpu;
  readonly handle: GPUBuffer;
  readonly label: string;
  readonly purpose: Purpose;
  readonly byteLength: number;

  constructor(
    gpu: Gpu,
    label: string,
    purpose: Purpose,
    byteLength: number,
    usage: GPUBufferUsageFlags,
  ) {
    this.gpu = gpu;
    this.label = label;
    this.purpose = purpose;
    this.byteLength = bufferBytes(byteLength);
    this.handle = gpu.device.createBuffer({
      label,
      size: this.byteLength,
      usage,
    });
    gpu.memory.add(purpose, this.byteLength);
  }

  destroy(): void {
    this.handle.destroy();
    this.gpu.memory.add(this.purpose, -this.byteLength);
    this.gpu.pipelines.forgetBindGroups();
  }
}

const TOO_LARGE_HINTS: Readonly<Record<Purpose, string>> = {
  weights:
    "a single matrix is too large for this device: use `--dtype f16` if this run is in f32, or another `--adapter`",
  kv: "use a smaller `--context`, or `--dtype f16` if this run is in f32",
  activations: "use a smaller `--context`, or `--dtype f16` if this run is in f32",
  staging: "use another `--adapter`",
};

/**
 * Creates a storage buffer that a kernel can bind whole. That the memory is used up is an OutOfMemoryError of the waits for
 * the GPU that follow.
 * @throws DoesNotFitError when it is larger than the device can allocate or bind
 */
export function createBuffer(gpu: Gpu, label: string, purpose: Purpose, byteLength: number): GpuBuffer {
  requireBindable(gpu, label, purpose, byteLength);
  return createUnbound(gpu, label, purpose, byteLength, storageUsage());
}

/** The same for a buffer that no kernel binds. */
export function createUnbound(
  gpu: Gpu,
  label: string,
  purpose: Purpose,
  byteLength: number,
  usage: GPUBufferUsageFlags,
): GpuBuffer {
  const { buffer, allocation } = beginAllocation(gpu, label, purpose, byteLength, usage);
  gpu.expectMemory(allocation);
  return buffer;
}

/**
 * Creates a storage buffer and waits until the device has the memory for it.
 * @throws DoesNotFitError as `createBuffer`, and OutOfMemoryError when the memory is used up
 */
export async function allocate(
  gpu: Gpu,
  label: string,
  purpose: Purpose,
  byteLength: number,
): Promise<GpuBuffer> {
  requireBindable(gpu, label, purpose, byteLength);
  return await allocateUnbound(gpu, label, purpose, byteLength, storageUsage());
}

/**
 * The same for a buffer that no kernel binds.
 * @throws OutOfMemoryError when the memory is used up
 */
export async function allocateUnbound(
  gpu: Gpu,
  label: string,
  purpose: Purpose,
  byteLength: number,
  usage: GPUBufferUsageFlags,
): Promise<GpuBuffer> {
  const { buffer, allocation } = beginAllocation(gpu, label, purpose, byteLength, usage);
  try {
    const error = await gpu.wait(allocation);
    if (error) throw error;
    return buffer;
  } catch (error) {
    buffer.destroy();
    throw error;
  }
}

/** A buffer, and what becomes known later: whether there is memory for it. */
function beginAllocation(
  gpu: Gpu,
  label: string,
  purpose: Purpose,
  byteLength: number,
  usage: GPUBufferUsageFlags,
): { readonly buffer: GpuBuffer; readonly allocation: Promise<OutOfMemoryError | undefined> } {
  const allocatedBytes = gpu.memory.totalBytes;
  gpu.device.pushErrorScope("out-of-memory");
  const buffer = new GpuBuffer(gpu, label, purpose, byteLength, usage);
  const allocation = gpu.device.popErrorScope().then((error) =>
    error ? new OutOfMemoryError(label, byteLength, allocatedBytes) : undefined
  );
  return { buffer, allocation };
}

function storageUsage(): GPUBufferUsageFlags {
  return GPUBufferUsage.STORAGE | GPUBufferUsage.COPY_SRC | GPUBufferUsage.COPY_DST;
}

function requireBindable(gpu: Gpu, label: string, purpose: Purpose, byteLength: number): void {
  const most = Math.min(gpu.caps.maxBufferBytes, gpu.caps.maxBindingBytes);
  if (byteLength <= most) return;
  throw new DoesNotFitError(
    `Cannot bind "${label}": it needs ${formatBytes(byteLength)}, this device binds at most ${
      formatBytes(most)
    }`,
    { hint: TOO_LARGE_HINTS[purpose] },
  );
}

/** Copies host bytes into a buffer; offset and length are multiples of 4. The bytes may be reused at once. */
export function upload(buffer: GpuBuffer, data: ArrayBufferView<ArrayBuffer>, byteOffset = 0): void {
  // As bytes: Dawn's binding ends the process when it is handed a Float16Array.
  const bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
  const end = buffer.gpu.timeline?.begin("uploads", buffer.label);
  buffer.gpu.device.queue.writeBuffer(buffer.handle, byteOffset, bytes);
  end?.(bytes.byteLength);
}

/** A mappable buffer that receives one copy; `read()` maps it, copies the bytes out and frees it. */
export class Readback {
  readonly #buffer: GpuBuffer;
  readonly #byteLength: number;

  /** As `createBuffer`, unless a buffer is given that is there. */
  constructor(
    gpu: Gpu,
    label: string,
    byteLength: number,
    buffer = createUnbound(gpu, readbackLabel(label), "staging", byteLength, readbackUsage()),
  ) {
    this.#byteLength = byteLength;
    this.#buffer = buffer;
  }

  /** @throws OutOfMemoryError when the memory is used up */
  static async allocate(gpu: Gpu, label: string, byteLength: number): Promise<Readback> {
    const named = readbackLabel(label);
    const buffer = await allocateUnbound(gpu, named, "staging", byteLength, readbackUsage());
    return new Readback(gpu, label, byteLength, buffer);
  }

  get handle(): GPUBuffer {
    return this.#buffer.handle;
  }

  /** Waits for the copy that was submitted before this call; the buffer can be copied to again afterwards. */
  async read(): Promise<ArrayBuffer> {
    return await this.#mapped(
      this.#byteLength,
      (mapped) => mapped.slice().buffer,
    );
  }

  /** The same into memory of the caller's, the first `byteLength` bytes; returns that part of it. */
  async readInto(
    into: Uint8Array<ArrayBuffer>,
    byteLength = this.#byteLength,
  ): Promise<Uint8Array<ArrayBuffer>> {
    return await this.#mapped(byteLength, (mapped) => {
      into.set(mapped);
      return into.subarray(0, byteLength);
    });
  }

  /** Waits for the copy, and takes what is needed of it while it is mapped. */
  async #mapped<T>(byteLength: number, take: (mapped: Uint8Array<ArrayBuffer>) => T): Promise<T> {
    const { handle, gpu, label } = this.#buffer;
    const end = gpu.timeline?.begin("readbacks", label);
    try {
      await gpu.wait(handle.mapAsync(GPUMapMode.READ));
      const taken = take(
        new Uint8Array(handle.getMappedRange(0, Math.ceil(byteLength / 4) * 4), 0, byteLength),
      );
      handle.unmap();
      return taken;
    } finally {
      end?.(byteLength);
    }
  }

  destroy(): void {
    this.#buffer.destroy();
  }
}

function readbackLabel(label: string): string {
  return `readback of ${label}`;
}

function readbackUsage(): GPUBufferUsageFlags {
  return GPUBufferUsage.MAP_READ | GPUBufferUsage.COPY_DST;
}

/** Reads a whole buffer, or `byteLength` bytes from `byteOffset` (multiples of 4), back to the host. */
export async function download(
  buffer: GpuBuffer,
  byteOffset = 0,
  byteLength = buffer.byteLength - byteOffset,
): Promise<ArrayBuffer> {
  const readback = new Readback(buffer.gpu, buffer.label, byteLength);
  try {
    const encoder = buffer.gpu.device.createCommandEncoder({ label: `download ${buffer.label}` });
    encoder.copyBufferToBuffer(buffer.handle, byteOffset, readback.handle, 0, Math.ceil(byteLength / 4) * 4);
    buffer.gpu.device.queue.submit([encoder.finish()]);
    return await readback.read();
  } finally {
    readback.destroy();
  }
}

/** Bytes in the largest binary unit that leaves a number of at least one. */
export function formatBytes(bytes: number): string {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  let value = bytes;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit++;
  }
  return `${Number.isInteger(value) ? value : value.toFixed(value < 10 ? 2 : 1)} ${units[unit]}`;
}
