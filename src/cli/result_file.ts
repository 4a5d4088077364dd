/**
 * Results as lines of JSON, on stdout or in a file that survives a crash: whatever ends the process, the file holds
 * complete lines and at most one that is cut short, and a run with `--resume` goes on behind the last complete one.
 */
import {
  closeSync,
  constants,
  fstatSync,
  fsyncSync,
  ftruncateSync,
  openSync,
  readSync,
  writeSync,
} from "node:fs";
import { dirname } from "node:path";
import { describeJson } from "../model/json_file.ts";
import { InputError, OutputError } from "../runtime/errors.ts";
import { ioReason } from "../runtime/io_error.ts";
import { LineSplitter } from "./documents.ts";
import { writeResult } from "./output.ts";
import { shortName } from "./table.ts";

/** Where results go, one line each. */
export interface ResultSink {
  /** Results that are there already: the first documents of the input, to be skipped. */
  readonly done: number;
  /**
   * To be called with the ids of the first `done` documents, in order.
   * @throws InputError when the result in this place is another document's
   */
  matches(id: string | number): void;
  /** To be called when the input has ended. @throws InputError when it had fewer than `done` documents */
  finishSkipping(): void;
  /**
   * Writes a line of JSON, all of it before it returns.
   * @throws OutputError when it cannot be stored, ClosedPipe when stdout is a pipe that nobody reads
   */
  write(value: unknown): void;
  close(): Promise<void>;
}

/** Results on stdout. */
export class ResultStream implements ResultSink {
  readonly done = 0;

  matches(): void {}

  finishSkipping(): void {}

  write(value: unknown): void {
    writeResult(lineOf(value));
  }

  close(): Promise<void> {
    return Promise.resolve();
  }
}

export interface ResultFileOptions {
  /** Whether to go on with a file that holds results. */
  readonly resume: boolean;
  /** Of this run: results that are there must have the same, in any order. */
  readonly labels: readonly string[];
}

/** Bytes of the file in memory at a time. */
const READ_BYTES = 1 << 18;
/** Bytes of a result, at most: thousands of labels take less than a hundredth. */
const MAX_LINE_BYTES = 64 * 2 ** 20;
/** Labels that a message names. */
const MOST_NAMED = 5;
const OPEN_BRACE = 0x7b;

/** Results in a file. One run at a time writes to it; that another one does is noticed at the next line. */
export class ResultFile implements ResultSink {
  readonly done: number;
  readonly #path: string;
  readonly #fd: number;
  readonly #ids: Generator<string | number>;
  #skipped = 0;
  /** Bytes of complete lines. */
  #size: number;
  #isOpen = true;

  private constructor(path: string, fd: number, { done, bytes }: Existing, ids: Generator<string | number>) {
    this.#path = path;
    this.#fd = fd;
    this.done = done;
    this.#size = bytes;
    this.#ids = ids;
  }

  /**
   * Opens the file, or creates it. With `resume`, checks every line that is there, and cuts off a last one without a
   * newline: the process was killed while it wrote it. A file that is refused is not changed.
   * @throws InputError when there are results without `resume`, or anything that is not a result with these labels;
   * OutputError when the file cannot be written
   */
  static open(path: string, { resume, labels }: ResultFileOptions): Promise<ResultFile> {
    return Promise.try(() => ResultFile.#open(path, resume, labels));
  }

  static #open(path: string, resume: boolean, labels: readonly string[]): ResultFile {
    const fd = attempt(path, () => openSync(path, constants.O_RDWR | constants.O_CREAT | constants.O_APPEND));
    try {
      const info = fstatSync(fd);
      if (!info.isFile()) {
        throw new OutputError(`Cannot write ${path}: it is not a regular file`, { hint: "name a file" });
      }
      if (!resume && info.size > 0) {
        throw new InputError(`${path} is not empty`, {
          hint: "add `--resume` to go on with the results in it, or name another file",
        });
      }
      const existing = examine(fd, path, info.size, new Set(labels));
      if (existing.bytes < info.size) attempt(path, () => ftruncateSync(fd, existing.bytes));
      return new ResultFile(path, fd, existing, idsOf(fd, path, existing.bytes));
    } catch (error) {
      closeSync(fd);
      throw error;
    }
  }

  matches(id: string | number): void {
    const found = this.#ids.next();
    if (found.done) throw new RangeError(`${this.#path} holds only ${this.done} results`);
    const line = ++this.#skipped;
    if (found.value === id) return;
    throw new InputError(
      `${this.#path}:${line} is the result of ${describeJson(found.value)}, ` +
        `document ${line} of the input is ${describeJson(id)}`,
      { hint: "resume with the input and the shard that it was begun with, or name another file" },
    );
  }

  finishSkipping(): void {
    if (this.#skipped >= this.done) return;
    throw new InputError(
      `${this.#path} has ${this.done} results, the input has only ${this.#skipped} documents`,
      { hint: "resume with the input and the shard that it was begun with, or name another file" },
    );
  }

  write(value: unknown): void {
    this.#requireUntouched();
    const bytes = new TextEncoder().encode(lineOf(value));
    try {
      for (let done = 0; done < bytes.length;) {
        done += writeSync(this.#fd, bytes, done, bytes.length - done);
      }
    } catch (error) {
      this.#cutOff(bytes);
      throw outputError(this.#path, error);
    }
    this.#size += bytes.length;
  }

  /** Waits until the lines are on the disk. */
  close(): Promise<void> {
    return Promise.try(() => {
      if (!this.#isOpen) return;
      this.#isOpen = false;
      try {
        attempt(this.#path, () => fsyncSync(this.#fd));
      } finally {
        closeSync(this.#fd);
      }
    });
  }

  #requireUntouched(): void {
    const { nlink, size } = attempt(this.#path, () => fstatSync(this.#fd));
    if (nlink === 0) {
      throw new OutputError(`Cannot write ${this.#path}: it has been deleted meanwhile`, {
        hint: "start again; results written before are lost",
      });
    }
    if (size !== this.#size) {
      throw new OutputError(`Cannot write ${this.#path}: another program has changed it meanwhile`, {
        hint: "let only one run write to a file, then add `--resume`",
      });
    }
  }

  /** Removes the part of a line that was written before it failed: Deno does not say how much that was. */
  #cutOff(line: Uint8Array): void {
    try {
      const part = fstatSync(this.#fd).size - this.#size;
      // More is what another program has written.
      if (part > line.length) return;
      const found = new Uint8Array(part);
      readSync(this.#fd, found, 0, part, this.#size);
      if (found.every((byte, i) => byte === line[i])) ftruncateSync(this.#fd, this.#size);
    } catch {
      // Resuming will cut it off.
    }
  }
}

function lineOf(value: unknown): string {
  return JSON.stringify(value) + "\n";
}

/** What a file holds before this run writes to it. */
interface Existing {
  /** Complete lines. */
  readonly done: number;
  readonly bytes: number;
}

/** Reads all of the file, in pieces. */
function examine(fd: number, path: string, size: number, labels: ReadonlySet<string>): Existing {
  const splitter = new LineSplitter(MAX_LINE_BYTES);
  let done = 0;
  let bytes = 0;
  for (const chunk of chunksOf(fd, path, size)) {
    for (const line of splitter.push(chunk)) {
      requireLabels(parseResult(line.bytes, path, line.number), labels, path, line.number);
      done++;
      bytes += line.bytes!.length + 1;
    }
  }
  const rest = splitter.end();
  // A file system that lost its power can leave zeros. Anything else is no result of ours to be cut off.
  if (rest && rest.bytes?.[0] !== OPEN_BRACE && rest.bytes?.[0] !== 0) throw notAResult(path, rest.number);
  return { done, bytes };
}

/** A chunk is valid until the next is asked for. */
function* chunksOf(fd: number, path: string, size: number): Generator<Uint8Array> {
  const buffer = new Uint8Array(READ_BYTES);
  for (let position = 0; position < size;) {
    const length = attempt(
      path,
      () => readSync(fd, buffer, 0, Math.min(buffer.length, size - position), position),
    );
    if (length === 0) return;
    position += length;
    yield buffer.subarray(0, length);
  }
}

function* idsOf(fd: number, path: string, size: number): Generator<string | number> {
  const splitter = new LineSplitter(MAX_LINE_BYTES);
  for (const chunk of chunksOf(fd, path, size)) {
    for (const line of splitter.push(chunk)) yield parseResult(line.bytes, path, line.number).id;
  }
}

interface Result {
  readonly id: string | number;
  /** By label; undefined for a document that could not be classified. */
  readonly logits: object | undefined;
}

/** @throws InputError unless the line is what a run writes: an id, and logits or an error */
function parseResult(bytes: Uint8Array | undefined, path: string, line: number): Result {
  let value: unknown;
  try {
    value = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes));
  } catch {
    throw notAResult(path, line);
  }
  if (typeof value !== "object" || value === null) throw notAResult(path, line);
  const { id, logits, error } = value as { id?: unknown; logits?: unknown; error?: unknown };
  if (typeof id !== "string" && typeof id !== "number") throw notAResult(path, line);
  if (typeof logits === "object" && logits !== null) return { id, logits };
  // Without this, the input itself would pass for results of all of its documents.
  if (typeof error !== "string") throw notAResult(path, line);
  return { id, logits: undefined };
}

function notAResult(path: string, line: number): InputError {
  return new InputError(`${path}:${line} is not a result`, {
    hint: "`--resume` goes on with a file that a run before has written: name that, or leave `--resume` away",
  });
}

function requireLabels({ logits }: Result, labels: ReadonlySet<string>, path: string, line: number): void {
  if (!logits) return;
  const found = Object.keys(logits);
  if (found.length === labels.size && found.every((label) => labels.has(label))) return;
  throw new InputError(
    `${path}:${line} was written with the labels ${listed(found)}, those of this run are ${
      listed([...labels])
    }`,
    { hint: "resume with the model and the labels that it was begun with, or name another file" },
  );
}

function listed(labels: readonly string[]): string {
  const named = labels.slice(0, MOST_NAMED).map(shortName).join(", ");
  return labels.length > MOST_NAMED ? `${named} and ${labels.length - MOST_NAMED} more` : named;
}

function attempt<T>(path: string, operation: () => T): T {
  try {
    return operation();
  } catch (error) {
    throw outputError(path, error);
  }
}

const FREE_SPACE = "free some space, then go on with `--resume`";

const HINTS: Readonly<Record<string, string>> = {
  EDQUOT: FREE_SPACE,
  ENOENT: "create the folder, or choose another",
  ENOSPC: FREE_SPACE,
};

function outputError(path: string, error: unknown): OutputError {
  const code = (error as NodeJS.ErrnoException).code ?? "";
  const reason = code === "ENOENT" ? `there is no folder ${dirname(path)}` : ioReason(error);
  return new OutputError(`Cannot write ${path}: ${reason}`, {
    hint: HINTS[code] ?? "choose another file or disk",
    cause: error,
  });
}
