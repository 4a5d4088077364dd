/**
 * Adapter choice and the device: what the machine can do (`Capabilities`), and the one object (`Gpu`) that owns the
 * device, its pipelines, its bind groups and the count of bytes allocated on it.
 */
import { beginWait, createInstance, endWait, listAdapterNames } from "./dawn.ts";
import { MemoryLedger } from "./buffers.ts";
import { PipelineCache } from "./kernel.ts";
import { DeviceError, DoesNotFitError, LongformError, NoAdapterError } from "./errors.ts";
import { hostMemoryBytes } from "./host_memory.ts";
import { timed, type Timeline } from "./timeline.ts";
import { diagnose, invisibleGpuNote, SOFTWARE_VULKAN } from "./vulkan_diagnosis.ts";
import { inspectVulkan } from "./vulkan_setup.ts";

/** Immediates (push constants) a kernel may have: sixteen u32 or f32 parameters, what every backend of Dawn offers. */
export const IMMEDIATE_BYTES = 64;

/** What the chosen adapter is and allows; the only thing that kernels look at when they choose a variant. */
export interface Capabilities {
  readonly name: string;
  readonly vendor: string;
  readonly architecture: string;
  readonly driver: string;
  /** A CPU implementation of Vulkan: correct, and a hundred to a thousand times slower than a GPU. */
  readonly isSoftware: boolean;
  readonly f16: boolean;
  readonly timestamps: boolean;
  /** Lanes of a subgroup; 0 where the device has no subgroups. */
  readonly subgroupMinSize: number;
  readonly subgroupMaxSize: number;
  /** Multiplies 16×16 matrices of f16 into f32 by subgroups of 32 lanes: tensor cores. */
  readonly subgroupMatrix: boolean;
  /** Memory for all buffers together; undefined where WebGPU does not tell, which is on every GPU. */
  readonly memoryBytes: number | undefined;
  readonly maxBufferBytes: number;
  readonly maxBindingBytes: number;
  /** Bytes of immediates; 0 where the adapter has none. */
  readonly immediateBytes: number;
  readonly workgroupBytes: number;
  readonly workgroupInvocations: number;
  readonly workgroupsPerDimension: number;
}

export interface DeviceOptions {
  /** Substring of an adapter's name, or its index in the order that `info` lists. */
  readonly adapter?: string;
  /** Take a software adapter even where there is a GPU. */
  readonly fallbackAdapter?: boolean;
  /** Narrows what the adapter reports, so that tests reach the paths of smaller devices on any machine. */
  readonly restrict?: Partial<Capabilities>;
  /** Opens Dawn's null backend: shaders compile, nothing runs. */
  readonly nullBackend?: boolean;
  /** Receives one-line notices for the user (a software adapter, a GPU that Vulkan does not show). */
  readonly onNotice?: (message: string) => void;
  /** Takes what the host does on the device, from opening it on. */
  readonly timeline?: Timeline | undefined;
}

/** How long a wait polls a GPU without a pause: decode steps and small prefills end within it. */
const EAGER_MS = 20;

/** A device and all that is cached on it. Create one a process; call `destroy()` when done. */
export class Gpu {
  readonly device: GPUDevice;
  readonly caps: Capabilities;
  /** What the host does on it and when, where somebody wants to know. */
  readonly timeline: Timeline | undefined;
  readonly memory: MemoryLedger;
  readonly pipelines: PipelineCache;
  #failure: LongformError | undefined;
  /** Rejects each wait that is under way. One promise for all of them would keep every result that it raced with. */
  readonly #waiting = new Set<(error: LongformError) => void>();
  /** Allocations of which it is not known yet whether there is memory for them. */
  readonly #allocating = new Set<Promise<void>>();
  #destroyed = false;

  constructor(device: GPUDevice, caps: Capabilities, timeline?: Timeline) {
    this.device = device;
    this.caps = caps;
    this.timeline = timeline;
    this.memory = new MemoryLedger(timeline);
    this.pipelines = new PipelineCache(this);
    const onError = (event: Event) => {
      event.preventDefault();
      this.#fail(describeError((event as GPUUncapturedErrorEvent).error));
    };
    device.addEventListener("uncapturederror", onError);
    device.lost.then((info) => {
      // Dawn holds the listener and the listener all that is cached on the device: together they would never be collected.
      device.removeEventListener("uncapturederror", onError);
      if (this.#destroyed) return;
      this.#fail(
        new DeviceError(`The GPU device was lost (${info.reason}): ${firstLine(info.message)}`, {
          hint:
            "run the command again; if it happens again, try a smaller `--context` or another `--adapter`",
        }),
      );
    });
  }

  #fail(error: LongformError): void {
    this.#failure ??= error;
    for (const reject of this.#waiting) reject(this.#failure);
  }

  /** For an allocation that nobody waits for: where it fails, its error is that of the waits that follow. */
  expectMemory(allocation: Promise<LongformError | undefined>): void {
    const ended = allocation.then((error) => {
      if (!error) return;
      // To use a buffer that there was no memory for is an error too, and not the one to tell.
      if (!(this.#failure instanceof DoesNotFitError)) this.#failure = error;
      this.#fail(error);
    }, () => {}) // the device was lost, which is told anyway
      .finally(() => this.#allocating.delete(ended));
    this.#allocating.add(ended);
  }

  /**
   * Throws what went wrong on the device since it was opened, if anything did; where that may follow from memory that there
   * turns out not to be, the next wait does.
   */
  check(): void {
    if (this.#allocating.size === 0) this.#throwFailure();
  }

  #throwFailure(): void {
    if (this.#failure) throw this.#failure;
  }

  /** Waits for GPU work, but no longer than the device lives: its loss or any uncaptured error rejects. */
  async wait<T>(work: Promise<T>): Promise<T> {
    // Work on a lost device rejects too; unhandled, that would end the process before the failure below is reported.
    work.catch(() => {});
    let reject: (error: LongformError) => void = () => {};
    const failed = new Promise<never>((_, rejectFailed) => reject = rejectFailed);
    failed.catch(() => {}); // it may come when the work has ended
    this.#waiting.add(reject);
    beginWait(this.caps.isSoftware ? 0 : EAGER_MS);
    try {
      this.#throwFailure();
      const result = await Promise.race([work, failed]);
      this.#throwFailure();
      return result;
    } catch (error) {
      // A lost device also aborts the work itself; the loss is the cause worth reporting, and it may arrive a turn later.
      if (!(error instanceof LongformError)) await new Promise((resolve) => setTimeout(resolve, 0));
      await Promise.all(this.#allocating);
      this.#throwFailure();
      throw error;
    } finally {
      this.#waiting.delete(reject);
      endWait();
    }
  }

  /** Waits until all submitted work is done. */
  async idle(): Promise<void> {
    await this.wait(this.device.queue.onSubmittedWorkDone());
  }

  destroy(): void {
    this.#destroyed = true;
    this.device.destroy();
  }
}

/** What an error says, in one line without the period. */
function messageOf(error: unknown): string {
  return firstLine(error instanceof Error ? error.message : String(error)).replace(/\.$/, "");
}

function firstLine(text: string): string {
  return text.trim().split("\n")[0] ?? "";
}

function describeError(error: GPUError): LongformError {
  if (error instanceof GPUOutOfMemoryError) {
    return new DoesNotFitError(`The GPU is out of memory: ${firstLine(error.message)}`, {
      hint: "use a smaller `--context` or `--dtype f16`, or end other programs that use the GPU",
    });
  }
  return new DeviceError(`The GPU reported an error: ${firstLine(error.message)}`, { cause: error });
}

/** Opens the adapter that the options ask for, hardware first. */
export async function openDevice(options: DeviceOptions = {}): Promise<Gpu> {
  return await timed(options.timeline, "phases", "open the device", () => open(options));
}

async function open(options: DeviceOptions): Promise<Gpu> {
  const adapter = await chooseAdapter(options);
  const caps = capabilitiesOf(adapter, options.restrict);
  if (caps.immediateBytes < IMMEDIATE_BYTES) {
    throw new NoAdapterError(
      `${caps.name} cannot run longform: it has ${caps.immediateBytes} B of immediates, kernels need ${IMMEDIATE_BYTES} B`,
      { hint: "update its driver, or choose another `--adapter`; `info` lists them" },
    );
  }
  const features: GPUFeatureName[] = [];
  if (caps.f16) features.push("shader-f16");
  if (caps.timestamps) features.push("timestamp-query");
  if (caps.subgroupMaxSize > 0) features.push("subgroups");
  if (adapter.features.has(SUBGROUP_MATRIX)) features.push(SUBGROUP_MATRIX);
  const device = await adapter.requestDevice({
    label: "longform",
    requiredFeatures: features,
    // Without these the device has the specification's minimum: 128 MiB bindings, 16 KiB of workgroup memory.
    requiredLimits: {
      maxBufferSize: adapter.limits.maxBufferSize,
      maxStorageBufferBindingSize: adapter.limits.maxStorageBufferBindingSize,
      maxComputeWorkgroupStorageSize: adapter.limits.maxComputeWorkgroupStorageSize,
      maxComputeInvocationsPerWorkgroup: adapter.limits.maxComputeInvocationsPerWorkgroup,
      maxComputeWorkgroupSizeX: adapter.limits.maxComputeWorkgroupSizeX,
      maxImmediateSize: IMMEDIATE_BYTES,
    } as Record<string, number>,
  }).catch((error: unknown) => {
    throw new DeviceError(`Cannot open ${caps.name}: ${messageOf(error)}`, {
      hint: "end other programs that use the GPU, or choose another `--adapter`; `info` lists them",
      cause: error,
    });
  });
  return new Gpu(device, caps, options.timeline);
}

/** The adapters of this machine in Dawn's order, described. */
export async function listAdapters(): Promise<Capabilities[]> {
  const found: Capabilities[] = [];
  for (const name of await listAdapterNames()) {
    const adapter = await createInstance({ adapterName: name }).requestAdapter();
    if (adapter) found.push(capabilitiesOf(adapter));
  }
  return found;
}

async function chooseAdapter(options: DeviceOptions): Promise<GPUAdapter> {
  if (options.nullBackend) {
    const adapter = await createInstance({ backend: "null" }).requestAdapter();
    if (!adapter) throw new NoAdapterError("Dawn's null backend has no adapter");
    return adapter;
  }
  if (options.adapter !== undefined) return await adapterByName(options.adapter);
  let cause: unknown;
  const instance = createInstance();
  // Dawn looks for SwiftShader alone when a fallback adapter is the first that it is asked for; later, among all.
  if (options.fallbackAdapter) await instance.requestAdapter().catch(() => null);
  const first = await instance.requestAdapter({
    powerPreference: "high-performance",
    forceFallbackAdapter: options.fallbackAdapter === true,
  }).catch((error: unknown) => {
    cause = error;
    return null;
  });
  if (!first) throw options.fallbackAdapter ? noSoftwareAdapter(cause) : noAdapter(cause);
  if (options.fallbackAdapter || !first.info.isFallbackAdapter) return first;
  const hardware = await hardwareAdapter();
  if (!hardware) {
    options.onNotice?.(`no GPU found, running on the CPU with ${adapterName(first)}: expect it to be slow`);
    const note = invisibleGpuNote();
    if (note) options.onNotice?.(note);
  }
  return hardware ?? first;
}

/** Software implementations of Vulkan by the names they give themselves. */
const SOFTWARE_NAMES = /llvmpipe|SwiftShader/i;

/** Dawn may put a software adapter first: look through the others before settling for it. */
async function hardwareAdapter(): Promise<GPUAdapter | null> {
  for (const name of await listAdapterNames()) {
    if (SOFTWARE_NAMES.test(name)) continue;
    const adapter = await createInstance({ adapterName: name }).requestAdapter();
    if (adapter && !adapter.info.isFallbackAdapter) return adapter;
  }
  return null;
}

async function adapterByName(wanted: string): Promise<GPUAdapter> {
  const names = await listAdapterNames();
  if (names.length === 0) throw noAdapter();
  const name = names[adapterIndex(names, wanted)]!;
  let cause: unknown;
  const adapter = await createInstance({ adapterName: name }).requestAdapter().catch((error: unknown) => {
    cause = error;
    return null;
  });
  if (!adapter) throw new NoAdapterError(`Cannot use ${name}: Dawn does not open it`, { cause });
  return adapter;
}

/** Place of the adapter that `--adapter` names; Dawn is then asked for it by name. */
export function adapterIndex(names: readonly string[], wanted: string): number {
  const index = /^\d+$/.test(wanted)
    ? Number(wanted)
    : names.findIndex((candidate) => slug(candidate).includes(slug(wanted)));
  const name = names[index];
  if (name === undefined) {
    throw new NoAdapterError(`No adapter matches \`--adapter ${wanted}\``, {
      hint: `this machine has ${names.map((n, i) => `${i}: ${n}`).join(", ")}`,
    });
  }
  // Dawn takes the first adapter whose name contains the one that it is given.
  const first = names.findIndex((candidate) => candidate.includes(name));
  if (first !== index) {
    throw new NoAdapterError(
      `\`--adapter ${wanted}\` cannot be chosen: Dawn goes by names, and ${name} is adapter ${first} too`,
      { hint: `use \`--adapter ${first}\`` },
    );
  }
  return index;
}

/** Dawn writes the same name in two ways: `NVIDIA H100 80GB HBM3` in its list, `nvidia-h100-80gb-hbm3` in the adapter. */
function slug(name: string): string {
  return name.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "");
}

/** Names what keeps adapters from being found; `info` tells all of it. */
function noAdapter(cause?: unknown): NoAdapterError {
  const reason = cause === undefined ? undefined : messageOf(cause);
  const [why] = diagnose(inspectVulkan(), [], reason);
  return new NoAdapterError(`No Vulkan adapter was found on this machine${why ? `: ${why.message}` : ""}`, {
    hint: why?.hint ?? "install a driver for the GPU",
    cause,
  });
}

function noSoftwareAdapter(cause: unknown): NoAdapterError {
  return new NoAdapterError("There is no software adapter, which `--fallback-adapter` asks for", {
    hint: `install ${SOFTWARE_VULKAN}, or leave \`--fallback-adapter\` away to run on the GPU`,
    cause,
  });
}

function adapterName(adapter: GPUAdapter): string {
  return adapter.info.description || adapter.info.device || adapter.info.vendor || "an unnamed adapter";
}

/** Experimental, so not in the published types, nor are its configurations. */
const SUBGROUP_MATRIX = "chromium-experimental-subgroup-matrix" as GPUFeatureName;

interface MatrixConfig {
  readonly componentType: string;
  readonly resultComponentType: string;
  readonly M: number;
  readonly N: number;
  readonly K: number;
}

/** Whether f16 matrices of 16×16 can be multiplied into f32 ones. */
function hasMatrixConfig(info: GPUAdapterInfo): boolean {
  const configs = (info as { subgroupMatrixConfigs?: Iterable<MatrixConfig> }).subgroupMatrixConfigs ?? [];
  return [...configs].some(({ componentType, resultComponentType, M, N, K }) =>
    componentType === "f16" && resultComponentType === "f32" && M === 16 && N === 16 && K === 16
  );
}

function capabilitiesOf(adapter: GPUAdapter, restrict: Partial<Capabilities> = {}): Capabilities {
  const { info, limits, features } = adapter;
  return Object.freeze({
    name: info.device.replace(/-$/, "") || adapterName(adapter),
    vendor: info.vendor,
    architecture: info.architecture,
    driver: info.description,
    isSoftware: info.isFallbackAdapter,
    f16: features.has("shader-f16"),
    timestamps: features.has("timestamp-query"),
    subgroupMinSize: features.has("subgroups") ? info.subgroupMinSize ?? 0 : 0,
    subgroupMaxSize: features.has("subgroups") ? info.subgroupMaxSize ?? 0 : 0,
    subgroupMatrix: features.has(SUBGROUP_MATRIX) && features.has("shader-f16") &&
      info.subgroupMinSize === 32 && info.subgroupMaxSize === 32 && hasMatrixConfig(info),
    memoryBytes: info.isFallbackAdapter ? hostMemoryBytes() : undefined,
    maxBufferBytes: limits.maxBufferSize,
    maxBindingBytes: limits.maxStorageBufferBindingSize,
    // Not yet in the published types.
    immediateBytes: (limits as { maxImmediateSize?: number }).maxImmediateSize ?? 0,
    workgroupBytes: limits.maxComputeWorkgroupStorageSize,
    workgroupInvocations: limits.maxComputeInvocationsPerWorkgroup,
    workgroupsPerDimension: limits.maxComputeWorkgroupsPerDimension,
    ...restrict,
  });
}
