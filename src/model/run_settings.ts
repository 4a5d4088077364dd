/** What a run is given, made of what a user asks for. */
import { createHash } from "node:crypto";
import { readFile, stat } from "node:fs/promises";
import { fileURLToPath } from "node:url";
import { parseMask, type Pattern } from "../kvcache/patterns.ts";
import type { Sparsity } from "../kvcache/sparsity.ts";
import type { Capabilities, Gpu } from "../runtime/device.ts";
import { DeviceError, InputError } from "../runtime/errors.ts";
import type { Elem } from "../runtime/kernel.ts";
import { Profiler, type ProfilerOptions } from "../runtime/profiler.ts";
import { programFile } from "../runtime/program_files.ts";

/** The folder of the embedded model. */
export const DEFAULT_MODEL = fileURLToPath(programFile("weights/classics-16k"));

/** How a user names an element type. */
export type DType = "auto" | "f16" | "f32";

/**
 * The element type of a run. `auto` is f16 on a GPU that has it: half the memory and bandwidth. On the CPU it is f32,
 * which needs no conversions there.
 */
export function chooseElem(dtype: DType, caps: Capabilities): Elem {
  if (dtype === "auto") return caps.f16 && !caps.isSoftware ? "f16" : "f32";
  if (dtype === "f16" && !caps.f16) {
    throw new DeviceError(`${caps.name} does not support f16 in shaders`, {
      hint: "use `--dtype f32` or `auto`",
    });
  }
  return dtype;
}

/** A mask larger than this is no mask: one of every block of 256K tokens, written out, has 50 MB. */
const MOST_MASK_BYTES = 256 << 20;

/**
 * What a run attends to; reads the mask of `file:`.
 * @throws InputError when it cannot be read or is no mask
 */
export async function openSparsity(pattern: Pattern): Promise<Sparsity> {
  if (pattern.kind !== "file") return { pattern };
  const { path } = pattern;
  const unreadable = (why: string, cause?: unknown) =>
    new InputError(`The block mask ${path} ${why}`, {
      hint: "give the path of a JSON file behind `file:`",
      ...(cause === undefined ? {} : { cause }),
    });
  let bytes: Uint8Array;
  try {
    const { size } = await stat(path);
    if (size > MOST_MASK_BYTES) throw unreadable(`has ${size} bytes, more than any mask`);
    bytes = await readFile(path);
  } catch (error) {
    if (error instanceof InputError) throw error;
    throw unreadable(`cannot be read: ${(error as Error).message}`, error);
  }
  const sha256 = createHash("sha256").update(bytes).digest("hex");
  return { pattern, mask: parseMask(new TextDecoder().decode(bytes), path), sha256 };
}

/** Steps of decoding that may be under way: enough to hide the way to a GPU and back, which takes two or three steps. */
const IN_FLIGHT = 12;
/** On a CPU there is nothing to hide, and what is under way at the end is lost. */
const SOFTWARE_IN_FLIGHT = 2;

/** Steps of decoding under way unless somebody says otherwise. */
export function inFlightOf({ caps }: Gpu): number {
  return caps.isSoftware ? SOFTWARE_IN_FLIGHT : IN_FLIGHT;
}

/** What times kernels, or passes; undefined where nothing is asked for, and where the device has no timestamps. */
export function openProfiler(gpu: Gpu, options: ProfilerOptions | undefined): Profiler | undefined {
  return options && gpu.caps.timestamps ? new Profiler(gpu, options) : undefined;
}
