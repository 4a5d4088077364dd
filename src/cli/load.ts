/** What commands share: the model folder, the device, the element type. */
import { stat } from "node:fs/promises";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import type { Capabilities, Gpu } from "../runtime/device.ts";
import { openDevice } from "../runtime/device.ts";
import { DeviceError } from "../runtime/errors.ts";
import type { Elem } from "../runtime/kernel.ts";
import type { CommonOptions } from "./options.ts";
import { writeNote } from "./output.ts";

const DEFAULT_MODEL = new URL("../../weights/classics-16k", import.meta.url);

export function modelFolder(options: Pick<CommonOptions, "model">): string {
  return options.model ?? fileURLToPath(DEFAULT_MODEL.href);
}

/** Whether a file is in the model's folder. */
export async function hasFile(dir: string, name: string): Promise<boolean> {
  return await stat(join(dir, name)).then((s) => s.isFile(), () => false);
}

export async function openCommandDevice(options: CommonOptions): Promise<Gpu> {
  return await openDevice({
    ...(options.adapter === undefined ? {} : { adapter: options.adapter }),
    fallbackAdapter: options.fallbackAdapter,
    onNotice: (message) => {
      if (!options.quiet) writeNote(`note: ${message}`);
    },
  });
}

/**
 * The element type of a run. `auto` is f16 on a GPU that has it: half the memory and bandwidth. On the CPU it is f32,
 * which needs no conversions there.
 */
export function chooseElem(dtype: CommonOptions["dtype"], caps: Capabilities): Elem {
  if (dtype === "auto") return caps.f16 && !caps.isSoftware ? "f16" : "f32";
  if (dtype === "f16" && !caps.f16) {
    throw new DeviceError(`${caps.name} does not support f16 in shaders`, {
      hint: "use `--dtype f32` or `auto`",
    });
  }
  return dtype;
}
