/**
 * Times `longform generate` as a user runs it: whole processes, one prompt, greedy.
 *
 *     bun bench/baseline.ts --model DIR --ids FILE -n 128 --runs 5 [--dtype f16] [--out FILE.json] [--commit ID]
 *
 * Prints and records median, minimum and maximum over the runs; the first process, which fills the driver's shader
 * cache, is reported apart as `cold`.
 */
import { spawnSync } from "node:child_process";
import process from "node:process";
import { parseArgs } from "node:util";
import { deviceOf, provenance, writeResult } from "./provenance.ts";

const { values } = parseArgs({
  options: {
    model: { type: "string", default: "weights/classics-16k" },
    ids: { type: "string" },
    n: { type: "string", short: "n", default: "128" },
    runs: { type: "string", default: "5" },
    dtype: { type: "string", default: "auto" },
    commit: { type: "string" },
    out: { type: "string" },
  },
});
if (values.ids === undefined) throw new Error("--ids is needed: a JSON array of token ids");

const command = [
  ...["main.ts", "generate", "-m", values.model, "--ids", values.ids, "-n", values.n],
  ...["--dtype", values.dtype, "--temperature", "0", "--ignore-eos", "--json", "-q"],
];

interface Run {
  readonly prompt_tokens: number;
  readonly tokens: readonly number[];
  readonly timings: Readonly<Record<string, number | null>>;
  readonly memory: Readonly<Record<string, number>>;
}

function runOnce(): Run {
  const { status, stdout, stderr } = spawnSync(process.execPath, command, { maxBuffer: 1 << 28 });
  if (status !== 0) throw new Error(`exit ${status}: ${stderr}`);
  return JSON.parse(stdout.toString());
}

/** Milliseconds from the start of a process that only says its version: the runtime and the program's modules. */
function startOnce(): number {
  const starting = performance.now();
  const { status } = spawnSync(process.execPath, ["main.ts", "--version"]);
  if (status !== 0) throw new Error(`exit ${status}`);
  return performance.now() - starting;
}

const cold = runOnce();
const runs = Array.from({ length: Number(values.runs) }, runOnce);
if (runs.some((run) => run.tokens.join() !== cold.tokens.join())) {
  throw new Error("The runs generated different tokens");
}

function spreadOf(values: readonly number[]) {
  const sorted = values.toSorted((a, b) => a - b);
  return { median: sorted[sorted.length >> 1]!, min: sorted[0]!, max: sorted.at(-1)! };
}

/** What of the first token is neither the program's start nor loading nor prefill: mostly the driver's start. */
function deviceMs({ timings }: Run, startMs: number): number {
  return timings["first_token_ms"]! - timings["load_ms"]! - timings["prefill_ms"]! - startMs;
}

const startMs = spreadOf(runs.map(startOnce));
const spread = {
  ...Object.fromEntries(
    Object.keys(cold.timings).filter((name) => cold.timings[name] !== null).map((name) =>
      [name, spreadOf(runs.map((run) => run.timings[name] ?? NaN))] as const
    ),
  ),
  start_ms: startMs,
  device_ms: spreadOf(runs.map((run) => deviceMs(run, startMs.median))),
};
const result = {
  ...deviceOf(),
  ...provenance(values.commit),
  process: `bun ${command.join(" ")}`,
  prompt_tokens: cold.prompt_tokens,
  generated: cold.tokens.length,
  cold: cold.timings,
  timings: spread,
  memory: cold.memory,
};
for (const [name, { median, min, max }] of Object.entries(spread)) {
  console.log(
    `${name.padEnd(24)} ${median.toFixed(1).padStart(12)}  (${min.toFixed(1)} to ${max.toFixed(1)})`,
  );
}
console.log(`cold first token ms      ${cold.timings["first_token_ms"]?.toFixed(1).padStart(12)}`);
console.log(`peak bytes               ${String(cold.memory["peak_bytes"]).padStart(12)}`);
if (values.out) writeResult(values.out, result);
