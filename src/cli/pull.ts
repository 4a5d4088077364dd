/** `pull`: a model from the Hugging Face Hub, into the cache that Python's tools use too. */
import { mkdir, readlink, stat } from "node:fs/promises";
import { dirname, join } from "node:path";
import { writeLinkAtomically } from "../model/atomic_file.ts";
import { formatModelId, parseModelId } from "../model/hub.ts";
import type { HubFile } from "../model/hub_download.ts";
import { type PulledFile, type PulledModel, pullModel } from "../model/hub_pull.ts";
import { fileErrorCode } from "../model/json_file.ts";
import { DEFAULT_MODEL } from "../model/run_settings.ts";
import { formatBytes } from "../runtime/buffers.ts";
import { printable } from "../runtime/printable.ts";
import { IS_EXECUTABLE } from "../runtime/program_files.ts";
import type { PullOptions } from "./options.ts";
import { formatMs, ProgressLine, writeJson, writeNote, writeResult } from "./output.ts";
import { abortOnSignal, interruptedExitCode } from "./signals.ts";
import { formatTable } from "./table.ts";
import { runtimeName, VERSION } from "./version.ts";

/** What `pull --json` prints. */
export interface PullReport {
  /** The folder to load: a link in the checkout's `weights/`, or where there is none the folder in the cache. */
  readonly path: string;
  readonly repo: string;
  readonly revision: string;
  readonly commit: string;
  readonly files: readonly PulledFile[];
}

/** Runs the command. @returns the exit code: 0, or a signal's when one has ended it */
export async function runPull(options: PullOptions): Promise<number> {
  const id = parseModelId(options.repo);
  const progress = new ProgressLine(options);
  const { controller, stop } = abortOnSignal(() => progress.clear());
  const { signal } = controller;
  const note = (text: string) => {
    progress.clear();
    if (!options.quiet) writeNote(printable(text));
  };
  /** Where files were when they began to come. */
  const begun = new Map<HubFile, { readonly bytes: number; readonly ms: number }>();
  try {
    const pulled = await pullModel(id, {
      signal,
      userAgent: `longform/${VERSION} (${runtimeName()})`,
      onNotice: (message) => note(`note: ${message}`),
      onBytes: (file, bytes, resumed) => {
        const before = begun.get(file);
        if (before) {
          return progress.show(transferProgress(file, before.bytes, bytes, performance.now() - before.ms));
        }
        begun.set(file, { bytes, ms: performance.now() });
        const from = resumed > 0 ? `, going on behind ${formatBytes(resumed)}` : "";
        note(`downloading ${file.name}, ${formatBytes(file.bytes)}${from}`);
      },
    });
    const path = await linkInCheckout(formatModelId(id), pulled.path) ?? pulled.path;
    progress.clear();
    if (options.json) {
      writeJson({ path, ...id, commit: pulled.commit, files: pulled.files } satisfies PullReport);
    } else writeResult(formatPulled(formatModelId(id), pulled, path));
    return 0;
  } catch (error) {
    if (!signal.aborted || error !== signal.reason) throw error;
    note("stopped; what has been downloaded is kept, and the same command goes on from there");
    return interruptedExitCode();
  } finally {
    stop();
    progress.clear();
  }
}

/**
 * `model.safetensors 50 % of 2 GiB, 100 MiB/s, 10.24 s left`; without the end where nothing has come yet.
 * @param from bytes that were there `elapsedMs` ago
 */
export function transferProgress(file: HubFile, from: number, bytes: number, elapsedMs: number): string {
  const share = `${printable(file.name)} ${Math.floor(100 * bytes / file.bytes)} % of ${
    formatBytes(file.bytes)
  }`;
  const perMs = (bytes - from) / elapsedMs;
  if (!(perMs > 0)) return share;
  return `${share}, ${formatBytes(Math.round(1000 * perMs))}/s, ${
    formatMs((file.bytes - bytes) / perMs)
  } left`;
}

/**
 * Links a folder of the cache into the checkout's `weights/`, beside the embedded model.
 * @param name path of the link there
 * @returns the link; undefined where there is no checkout, where it is read-only, or where something else has the name
 */
async function linkInCheckout(name: string, target: string): Promise<string | undefined> {
  if (IS_EXECUTABLE) return undefined;
  const weights = dirname(DEFAULT_MODEL);
  const path = join(weights, name);
  try {
    if (!(await stat(weights)).isDirectory()) return undefined;
    const found = await readlink(path).catch((error: unknown) => {
      if (fileErrorCode(error) === "ENOENT") return undefined;
      throw error; // a folder of that name, or a file
    });
    if (found === target) return path;
    await mkdir(dirname(path), { recursive: true });
    await writeLinkAtomically(path, target);
    return path;
  } catch {
    return undefined;
  }
}

/** What was pulled, for people; the last line is the folder. */
function formatPulled(name: string, { commit, files }: PulledModel, path: string): string {
  const rows = files.map((file) => [printable(file.name), formatBytes(file.bytes), file.status]);
  return `${name} at commit ${commit}\n${formatTable(["file", "size", "status"], rows, [0, 2])}\n${path}\n`;
}
