/**
 * The only importer of npm `webgpu` (Dawn). Everything Dawn-specific lives here: the instance flags with the reason
 * for each, and the pin that keeps the native instance alive.
 */
import { NoAdapterError } from "./errors.ts";
import { IS_EXECUTABLE } from "./program_files.ts";

/** Dawn, or why it does not load: a fault of the machine, and nothing to what needs no GPU. */
const dawn = await import("webgpu").catch((error: Error) => error);

/** Whether an instance can be created at all. */
export const DAWN_LOADS = !(dawn instanceof Error);

// Bun has no WebGPU globals; Deno has its own, made for wgpu, and Dawn's objects fail their checks.
if (!(dawn instanceof Error)) {
  for (const [name, value] of Object.entries(dawn.globals)) {
    Object.defineProperty(globalThis, name, { value, configurable: true, writable: true });
  }
}

/** Features of Dawn that are off by default and that the kernels need. */
const ENABLED = [
  // Subgroup matrices (tensor cores) are experimental, and Dawn hides experimental features without this.
  "allow_unsafe_apis",
  // Dawn blocklists f16 on NVIDIA's Vulkan driver; every kernel is compared with a reference on that driver instead.
  "vulkan_enable_f16_on_nvidia",
  // Dawn clamps every index into a buffer or array. Without that the kernels run up to three times as fast; none of them
  // relies on it, and tests look for what is read or written out of bounds (docs/decisions/0006).
  "disable_robustness",
  // Subgroup matrices need it, and it defines the ordering that workgroup barriers rely on.
  "use_vulkan_memory_model",
];

/** Features of Dawn that are on by default and in the way. */
const DISABLED = [
  // Timestamps are rounded to 65,536 ns otherwise: most decode kernels would read as zero.
  "timestamp_quantization",
];

/**
 * The instances by their flags. When the object that `create()` returns is collected while a device lives, the next
 * garbage collection ends the process with a segmentation fault, so instances are kept until the process ends. Each has
 * threads, an open file and some MiB of the driver's: a process that opens device after device shares one.
 */
const instances = new Map<string, GPU>();

/** How many waits for the GPU are under way, and until when the latest of them polls without a pause. */
let waits = 0;
let eagerUntil = 0;

/**
 * dawn.node looks for finished work in callbacks that it hands to `setImmediate` over and over: a loop that takes a
 * whole core while anything is pending. On software Vulkan that is one of the cores that compute, so during a wait it
 * is slowed down to once a millisecond, after `eagerMs` in which a GPU's answer is found at once.
 */
export function beginWait(eagerMs: number): void {
  waits++;
  eagerUntil = performance.now() + eagerMs;
}

export function endWait(): void {
  waits--;
}

const immediate = globalThis.setImmediate;
globalThis.setImmediate =
  ((callback: (...args: unknown[]) => void, ...args: unknown[]) =>
    waits > 0 && performance.now() >= eagerUntil
      ? setTimeout(callback, 1, ...args)
      : immediate(callback, ...args)) as typeof setImmediate;

export interface InstanceOptions {
  /** `null` accepts and validates everything and executes nothing: shader compilation without a GPU. */
  readonly backend?: "vulkan" | "null";
  /** Substring of the adapter's name, as Dawn matches it. */
  readonly adapterName?: string;
}

/**
 * A Dawn instance with the project's features, the same for the same options.
 * @throws NoAdapterError where Dawn's library does not load
 */
export function createInstance(options: InstanceOptions = {}): GPU {
  if (dawn instanceof Error) {
    throw new NoAdapterError(`Dawn, the WebGPU library, does not load: ${dawn.message.split("\n", 1)[0]}`, {
      hint: IS_EXECUTABLE
        ? "it is unpacked to /tmp, or where TMPDIR says: that has to be writable, mounted without `noexec` and to have " +
          "22 MB free; remove a damaged `.bun-*.node` there; the system has to have libstdc++.so.6"
        : "run `bun install` in longform's folder; the system has to have libstdc++.so.6",
      cause: dawn,
    });
  }
  const flags = [
    `enable-dawn-features=${ENABLED.join(",")}`,
    `disable-dawn-features=${DISABLED.join(",")}`,
  ];
  if (options.backend) flags.push(`backend=${options.backend}`);
  if (options.adapterName) flags.push(`adapter=${options.adapterName}`);
  const key = flags.join("\n");
  let gpu = instances.get(key);
  if (!gpu) instances.set(key, gpu = dawn.create(flags));
  return gpu;
}

/**
 * Names of the adapters that Dawn can open, in its order of preference; empty when there is none.
 * dawn.node has no enumeration call: asking for a name that cannot exist makes it list those that do.
 */
export async function listAdapterNames(): Promise<string[]> {
  try {
    await createInstance({ adapterName: "\u0001" }).requestAdapter();
  } catch (error) {
    return adapterNamesIn(String(error));
  }
  return [];
}

/**
 * The names in Dawn's list of adapters. OpenGL shows the GPUs of the other backends once more, for which no kernel is
 * made, and the null backend computes nothing.
 */
export function adapterNamesIn(message: string): string[] {
  return [...message.matchAll(/backend: '(?!opengl|null)\w+', name: '(.*)'/g)].map((match) => match[1]!);
}
