/** Where a recorded result comes from: goes into every file under `bench/results/`. */
import { spawnSync } from "node:child_process";
import { mkdirSync, writeFileSync } from "node:fs";
import { dirname, relative } from "node:path";
import process from "node:process";
import { runtimeName, VERSION } from "../src/cli/version.ts";

export interface Provenance {
  readonly runtime: string;
  readonly version: string;
  readonly commit: string;
  readonly command: string;
  readonly date: string;
}

/** @param commit the commit measured, where there is no repository to ask */
export function provenance(commit: string | undefined): Provenance {
  const asked = spawnSync("git", ["rev-parse", "--short", "HEAD"]);
  const [script = "", ...all] = process.argv.slice(1);
  // Where the result goes is no part of how it was made.
  const out = all.indexOf("--out");
  const args = out < 0 ? all : all.toSpliced(out, 2);
  const program = process.versions["deno"] ? "deno run -A" : "bun";
  return {
    runtime: runtimeName(),
    version: VERSION,
    commit: commit ?? asked.stdout?.toString().trim() ?? "unknown",
    command: [program, relative(process.cwd(), script), ...args].join(" "),
    date: new Date().toISOString().slice(0, 10),
  };
}

/** The adapter that a run takes, asked of a process of its own. */
export function deviceOf(): { readonly adapter: string; readonly driver: string } {
  const info = JSON.parse(spawnSync(process.execPath, ["main.ts", "info", "--json"]).stdout.toString());
  return { adapter: info.chosen.name, driver: info.chosen.driver };
}

export function writeResult(path: string, result: object): void {
  mkdirSync(dirname(path), { recursive: true });
  writeFileSync(path, JSON.stringify(result, null, 1) + "\n");
}
