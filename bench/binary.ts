/**
 * Times an executable of scripts/compile.ts beside `bun main.ts`: both start anew for each run, by turns.
 *
 *     bun bench/binary.ts FILE [--runs 15] [--commit ID]
 *
 * Prints the median of the runs, their least and their most: until a process that says its version has ended, until the
 * first byte of a generated text, and what is in memory then, of the process's own and of files, which processes share
 * and the kernel can drop. One run of each comes before and is not counted: it fills the driver's shader cache and
 * unpacks Dawn. Linux only.
 */
import { spawn, spawnSync } from "node:child_process";
import { once } from "node:events";
import { readFileSync } from "node:fs";
import process from "node:process";
import { parseArgs } from "node:util";
import { formatTable } from "../src/cli/table.ts";
import { formatMiB } from "./process.ts";
import { deviceOf, provenance } from "./provenance.ts";

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: { runs: { type: "string", default: "15" }, commit: { type: "string" } },
});
if (positionals.length !== 1) throw new Error("The executable to time is needed, and nothing else");

const COMMANDS: readonly (readonly string[])[] = [[process.execPath, "main.ts"], [positionals[0]!]];
const GENERATE = ["generate", "It was the best of times", "-n", "16", "--seed", "1", "-q"];

interface FirstToken {
  readonly ms: number;
  /** Resident when it had come. */
  readonly ownBytes: number;
  readonly fileBytes: number;
}

/** Bytes of a process in memory, by the kernel's count. @param kind `RssAnon`, its own, or `RssFile`, of files */
function residentBytes(pid: number, kind: string): number {
  const line = readFileSync(`/proc/${pid}/status`, "utf8").match(new RegExp(`^${kind}:\\s+(\\d+) kB$`, "m"));
  return Number(line![1]) * 1024;
}

function startMs([file, ...args]: readonly string[]): number {
  const starting = performance.now();
  const { status, stderr } = spawnSync(file!, [...args, "--version"]);
  if (status !== 0) throw new Error(`${file} ended with ${status}: ${stderr}`);
  return performance.now() - starting;
}

async function firstToken([file, ...args]: readonly string[]): Promise<FirstToken> {
  const starting = performance.now();
  const child = spawn(file!, [...args, ...GENERATE], { stdio: ["ignore", "pipe", "ignore"] });
  const closed = once(child, "close");
  await Promise.race([once(child.stdout, "data"), closed]);
  const ms = performance.now() - starting;
  const pid = child.pid!;
  const first = { ms, ownBytes: residentBytes(pid, "RssAnon"), fileBytes: residentBytes(pid, "RssFile") };
  child.stdout.resume();
  const [status] = await closed;
  if (status !== 0) throw new Error(`${file} ended with ${status}`);
  return first;
}

/** The median, least and most. */
function spread(values: readonly number[], format: (value: number) => string): string {
  const sorted = values.toSorted((a, b) => a - b);
  return `${format(sorted[sorted.length >> 1]!)} (${format(sorted[0]!)} to ${format(sorted.at(-1)!)})`;
}

const runs = COMMANDS.map(() => ({ start: [] as number[], first: [] as FirstToken[] }));
for (let run = 0; run <= Number(values.runs); run++) {
  for (const [i, command] of COMMANDS.entries()) {
    const start = startMs(command);
    const first = await firstToken(command);
    if (run === 0) continue;
    runs[i]!.start.push(start);
    runs[i]!.first.push(first);
  }
}
const { adapter, driver } = deviceOf();
const { runtime, version, commit, command, date } = provenance(values.commit);
console.log(
  `${adapter} (${driver}), ${runtime}, longform ${version}, commit ${commit}, ${date}\n$ ${command}\n`,
);
const whole = (ms: number) => ms.toFixed(0);
console.log(formatTable(
  ["command", "--version, ms", "first token, ms", "own memory, MiB", "of files, MiB"],
  runs.map(({ start, first }, i) => [
    i === 0 ? "bun main.ts" : "the executable",
    spread(start, whole),
    spread(first.map(({ ms }) => ms), whole),
    spread(first.map(({ ownBytes }) => ownBytes), formatMiB),
    spread(first.map(({ fileBytes }) => fileBytes), formatMiB),
  ]),
  [0],
));
