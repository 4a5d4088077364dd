/** What `--version`, `info` and benchmark records say about the program and what runs it. */
import process from "node:process";
import { IS_EXECUTABLE } from "../runtime/program_files.ts";

export const VERSION = "0.1.0";

export function runtimeName(): string {
  const { versions } = process;
  if (versions["bun"]) return `Bun ${versions["bun"]}${IS_EXECUTABLE ? ", compiled" : ""}`;
  if (versions["deno"]) return `Deno ${versions["deno"]}`;
  return `Node ${versions["node"]}`;
}
