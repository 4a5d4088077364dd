/** What `--version`, `info` and benchmark records say about the program and what runs it. */
import process from "node:process";

export const VERSION = "0.1.0";

export function runtimeName(): string {
  const { versions } = process;
  if (versions["bun"]) return `Bun ${versions["bun"]}`;
  if (versions["deno"]) return `Deno ${versions["deno"]}`;
  return `Node ${versions["node"]}`;
}
