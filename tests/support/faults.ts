/** What faults must leave: results that are complete, and no files that are not. */
import { readdirSync } from "node:fs";

/** What a model says of documents, without what depends on the clock and on what shared a pass, from lines of results. */
export function verdictsIn(lines: string): object[] {
  if (lines !== "" && !lines.endsWith("\n")) throw new Error(`the last line is cut: ${lines.slice(-100)}`);
  return lines.split("\n").slice(0, -1).map((line) => {
    const { timings: _, batch: _batch, ...verdict } = JSON.parse(line);
    return verdict;
  });
}

/** The temporary files in a folder. */
export function temporariesIn(dir: string): string[] {
  return readdirSync(dir).filter((name) => name.startsWith(".longform-"));
}
