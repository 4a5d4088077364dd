/** Runs longform as a user does and watches what the process takes from outside. */
import { spawn, spawnSync } from "node:child_process";
import { readFileSync } from "node:fs";
import process from "node:process";

export interface Watched<T> {
  readonly result: T;
  /** Largest resident set of the process, by the kernel's count; null where there is no /proc. */
  readonly hostPeakBytes: number | null;
  /** Most that the driver reported in use, above what was in use before; null without nvidia-smi. */
  readonly driverPeakBytes: number | null;
}

/** Bytes in use on the first NVIDIA GPU; null without nvidia-smi. */
export function driverBytes(): number | null {
  const { status, stdout } = spawnSync("nvidia-smi", [
    "--query-gpu=memory.used",
    "--format=csv,noheader,nounits",
  ]);
  return status === 0 ? Number(stdout.toString().split("\n")[0]) * 2 ** 20 : null;
}

/** Largest resident set of a process, by the kernel's count; null where there is no /proc. */
export function residentPeakBytes(pid: number): number | null {
  try {
    const line = /VmHWM:\s+(\d+) kB/.exec(readFileSync(`/proc/${pid}/status`, "utf8"));
    return line ? Number(line[1]) * 1024 : null;
  } catch {
    return null;
  }
}

/** Runs `main.ts` with arguments that make it print one JSON document, and parses that. */
export async function runLongform<T>(args: readonly string[]): Promise<Watched<T>> {
  const before = driverBytes();
  const child = spawn(process.execPath, ["main.ts", ...args], { stdio: ["ignore", "pipe", "pipe"] });
  let stdout = "";
  let stderr = "";
  child.stdout.on("data", (data) => stdout += data);
  child.stderr.on("data", (data) => stderr += data);
  let hostPeakBytes: number | null = null;
  let driverPeak = before;
  const watch = setInterval(() => {
    hostPeakBytes = residentPeakBytes(child.pid!) ?? hostPeakBytes;
    if (before !== null) driverPeak = Math.max(driverPeak!, driverBytes() ?? 0);
  }, 50);
  const status = await new Promise((resolve) => child.on("close", resolve));
  clearInterval(watch);
  if (status !== 0) throw new Error(`main.ts ${args.join(" ")} ended with ${status}: ${stderr}`);
  return {
    result: JSON.parse(stdout) as T,
    hostPeakBytes,
    driverPeakBytes: before === null ? null : driverPeak! - before,
  };
}

export function formatMiB(bytes: number | null): string {
  return bytes === null ? "-" : (bytes / 2 ** 20).toFixed(1);
}
