/**
 * Classifies a collection as a user does, in a process of its own, and watches what it takes: documents and tokens a second,
 * the share of the time in which the GPU was at work, the process's memory as it goes on.
 *
 *   bun bench/classify.ts [--runs 3] [--out FILE] [--commit C] -- ARGUMENTS OF classify
 */
import { spawn } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { parseArgs } from "node:util";
import { formatMiB } from "./process.ts";
import { deviceOf, provenance, writeResult } from "./provenance.ts";

/** What the command prints. */
interface RunReport {
  readonly documents: number;
  readonly failed: number;
  readonly tokens: number;
  readonly ms: number;
  readonly documents_per_s: number;
  readonly tokens_per_s: number;
  readonly gpu_busy: number | null;
}

/** How often memory is looked at. */
const WATCH_MS = 100;

const split = process.argv.indexOf("--");
const { values } = parseArgs({
  args: process.argv.slice(2, split),
  options: {
    runs: { type: "string", default: "3" },
    out: { type: "string" },
    commit: { type: "string" },
  },
});
const args = process.argv.slice(split + 1);

function residentBytes(pid: number): number | null {
  try {
    return Number(/VmRSS:\s+(\d+) kB/.exec(readFileSync(`/proc/${pid}/status`, "utf8"))![1]) * 1024;
  } catch {
    return null; // it has ended, or there is no /proc
  }
}

/** One run, and the resident set of the process, in bytes, every `WATCH_MS`. */
async function run(): Promise<{ report: RunReport; resident: number[] }> {
  const folder = mkdtempSync(join(tmpdir(), "classify-"));
  try {
    const command = ["main.ts", "classify", ...args, "--out", join(folder, "out.jsonl"), "--json"];
    const child = spawn(process.execPath, command, { stdio: ["ignore", "pipe", "inherit"] });
    let stdout = "";
    child.stdout.on("data", (data) => stdout += data);
    const resident: number[] = [];
    const watch = setInterval(() => {
      const bytes = residentBytes(child.pid!);
      if (bytes !== null) resident.push(bytes);
    }, WATCH_MS);
    await new Promise((resolve) => child.on("close", resolve));
    clearInterval(watch);
    return { report: JSON.parse(stdout), resident };
  } finally {
    rmSync(folder, { recursive: true });
  }
}

/** The mean of a part of the samples, from one share of the run to another. */
function meanOf(samples: readonly number[], from: number, to: number): number {
  const part = samples.slice(Math.floor(from * samples.length), Math.ceil(to * samples.length));
  return part.reduce((a, b) => a + b, 0) / part.length;
}

const runs = [];
for (let i = 0; i < Number(values.runs); i++) {
  const { report, resident } = await run();
  const host = {
    second_quarter_bytes: Math.round(meanOf(resident, 0.25, 0.5)),
    last_quarter_bytes: Math.round(meanOf(resident, 0.75, 1)),
    peak_bytes: Math.max(...resident),
  };
  runs.push({ ...report, host });
  console.log(
    `${report.documents} documents (${report.failed} failed), ${report.tokens} tokens in ${
      report.ms.toFixed(0)
    } ms: ` +
      `${report.documents_per_s.toFixed(1)} documents/s, ${report.tokens_per_s.toFixed(0)} tokens/s, ` +
      `GPU at work ${(100 * (report.gpu_busy ?? NaN)).toFixed(1)} %; host ${
        formatMiB(host.second_quarter_bytes)
      } MiB ` +
      `in the second quarter, ${formatMiB(host.last_quarter_bytes)} in the last, ${
        formatMiB(host.peak_bytes)
      } at most`,
  );
}
if (values.out) {
  writeResult(values.out, { ...provenance(values.commit), ...deviceOf(), classify: args, runs });
}
