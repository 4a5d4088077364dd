/** stdout carries results, stderr everything else; both are written synchronously, so nothing is lost at exit. */
import { writeSync } from "node:fs";
import process from "node:process";
import { OutputError } from "../runtime/errors.ts";
import { ioReason } from "../runtime/io_error.ts";
import { printableLines } from "../runtime/printable.ts";

/** The reader of stdout has gone away: `| head` has seen enough. */
export class ClosedPipe extends Error {}

const retry = new Int32Array(new SharedArrayBuffer(4));

function writeAll(fd: 1 | 2, text: string): void {
  let bytes = new TextEncoder().encode(text);
  while (bytes.length > 0) {
    try {
      bytes = bytes.subarray(writeSync(fd, bytes));
    } catch (error) {
      // A pipe that somebody made non-blocking, and that is full.
      if ((error as NodeJS.ErrnoException).code !== "EAGAIN") throw error;
      Atomics.wait(retry, 0, 0, 5);
    }
  }
}

/** Writes a result. @throws ClosedPipe when nobody reads any more, OutputError when it cannot be stored */
export function writeResult(text: string): void {
  try {
    writeAll(1, text);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "EPIPE") throw new ClosedPipe("stdout was closed");
    throw new OutputError(`Cannot write to stdout: ${ioReason(error)}`, {
      hint: "free some space there, or send it elsewhere",
      cause: error,
    });
  }
}

/** Writes one JSON document, the only thing on stdout. */
export function writeJson(value: unknown): void {
  writeResult(JSON.stringify(value, null, 2) + "\n");
}

/** A JSON array on stdout whose elements are printed as they come: those before an error are not lost. */
export class JsonArray {
  #length = 0;

  push(element: unknown): void {
    writeResult((this.#length++ === 0 ? "[\n" : ",\n") + JSON.stringify(element, null, 2));
  }

  /** Closes the array; nothing is printed if nothing was pushed: an error has no results. */
  end(): void {
    if (this.#length > 0) writeResult("\n]\n");
    this.#length = 0;
  }

  /** Closes the array, an empty one too: an interruption has results, if none. */
  endEvenIfEmpty(): void {
    if (this.#length === 0) writeResult("[]\n");
    else this.end();
  }
}

/** Writes to stderr; where that is closed or full, the work goes on: there is nobody left to tell. */
function writeAside(text: string): void {
  try {
    writeAll(2, text);
  } catch {
    // The exit code still says how it ended.
  }
}

/** Writes a line for the user, or several; what could do something to the terminal is escaped. */
export function writeNote(text: string): void {
  writeAside(printableLines(text) + "\n");
}

/** A line on stderr that is rewritten in place while long work runs; nothing unless stderr is a terminal. */
export class ProgressLine {
  readonly #enabled: boolean;
  #shown = "";
  #lastMs = 0;

  constructor(options: { readonly quiet: boolean }) {
    this.#enabled = !options.quiet && process.stderr.isTTY === true;
  }

  /** Shows a line, at most ten times a second. */
  show(text: string): void {
    const now = performance.now();
    if (!this.#enabled || now - this.#lastMs < 100) return;
    this.#lastMs = now;
    // Spaces over the rest of the longer line before: no control sequence is needed.
    writeAside("\r" + text.padEnd(this.#shown.length));
    this.#shown = text;
  }

  /** Blanks the line. */
  clear(): void {
    if (this.#shown === "") return;
    writeAside("\r" + " ".repeat(this.#shown.length) + "\r");
    this.#shown = "";
  }
}

/** `1,234 tokens/s`, or fewer digits for less. */
export function formatRate(perSecond: number | null, unit = "tokens"): string {
  if (perSecond === null) return "-";
  return `${
    perSecond >= 100 ? Math.round(perSecond).toLocaleString("en-US") : perSecond.toFixed(1)
  } ${unit}/s`;
}

/** `prefill 4096 of 16384 tokens, 1,000 tokens/s, 12.3 s left`; without the end where the total is not known. */
export function workProgress(
  work: string,
  done: number,
  total: number | undefined,
  elapsedMs: number,
): string {
  const rate = formatRate(1000 * done / elapsedMs);
  if (total === undefined) return `${work} ${done} tokens, ${rate}`;
  return `${work} ${done} of ${total} tokens, ${rate}, ${formatMs(elapsedMs / done * (total - done))} left`;
}

export function formatMs(ms: number): string {
  return ms >= 1000 ? `${(ms / 1000).toFixed(2)} s` : `${ms.toFixed(ms < 10 ? 1 : 0)} ms`;
}
