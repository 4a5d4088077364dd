/**
 * Collections of documents: files and folders, or JSON lines. One document is in memory at a time, however many there
 * are, and what is wrong with one does not end the others.
 */
import { Buffer } from "node:buffer";
import { type Dirent, fstatSync } from "node:fs";
import { open, readdir, stat } from "node:fs/promises";
import { basename, dirname, join, resolve } from "node:path";
import process from "node:process";
import { setImmediate } from "node:timers/promises";
import { InputError, UsageError } from "../runtime/errors.ts";
import { ioReason } from "../runtime/io_error.ts";
import { printable } from "../runtime/printable.ts";
import { CutShort, openText } from "./input.ts";
import { isInShard, type Shard } from "./shard.ts";

/** Where a document stands in its collection, and what to call it. */
interface Named {
  /** From 0, over the whole collection, whatever the shard. */
  readonly index: number;
  readonly id: string | number;
  /** The path, for a document that is a file. */
  readonly file?: string;
}

export interface TextDocument extends Named {
  /** Not empty. */
  readonly text: string;
  readonly expected?: string;
}

export interface IdsDocument extends Named {
  /** Not empty. */
  readonly ids: readonly number[];
  readonly expected?: string;
}

/** A document that cannot be used, and why. */
export interface BadDocument extends Named {
  readonly error: string;
}

export type InputDocument = TextDocument | IdsDocument | BadDocument;

export type IsDone = (id: string | number) => boolean;

export interface Collection {
  /** How many documents there are, of the shard, where that is known before they are read. */
  readonly total: number | undefined;
  /** UTF-8 bytes of the largest one that can be used, where that is known before they are read; it may grow since. */
  readonly largestBytes: number | undefined;
  /** Share of the input that has been read, 0 to 1, where its size is known. */
  share(): number | undefined;
  /**
   * In order, to be gone through once.
   * @param isDone asked for each document in order: one that is done is left out, and a file that is done is not read
   * @throws InputError when the input itself cannot be read any further, and what `isDone` throws
   */
  documents(isDone?: IsDone): AsyncGenerator<InputDocument>;
  /** May be called at any time. */
  close(): Promise<void>;
}

export interface FileOptions {
  readonly shard?: Shard | undefined;
  /** Whether the folder that a file lies in is its label: a dataset laid out as `label/file.txt`. */
  readonly hasExpected: boolean;
}

export interface JsonlOptions {
  readonly shard?: Shard | undefined;
  /** The field with the true label. */
  readonly expected?: string | undefined;
}

/** Bytes of a document, or of its line, at most. */
const MAX_BYTES = 64 * 2 ** 20;
const TOO_LARGE = "is longer than 64 MiB";
/** Characters of a message about a line's JSON, at most. */
const MOST_QUOTED = 200;
/** Bytes of a file in memory at a time. */
const READ_BYTES = 1 << 18;
/** Files whose sizes are asked for at a time. */
const STAT_BATCH = 64;

/**
 * Documents that are files, or folders: all regular files below, ordered by path. `-` is standard input, and a path
 * that does not exist may be a pattern with `*`, `?`, `[a-z]`, `{a,b}` and `**`. In folders and patterns, names that
 * begin with a dot are left out; links to files are followed, links to folders are not. The paths are held in memory,
 * the files are opened when their turn comes.
 * @throws InputError for a path or a pattern without files
 */
export async function openFiles(paths: readonly string[], options: FileOptions): Promise<Collection> {
  const { shard, hasExpected } = options;
  requireOneStdin(paths);
  if (hasExpected && paths.includes("-")) {
    throw new UsageError("Standard input, `-`, lies in no folder that would be its label", {
      hint: "give files in folders, or JSON lines with a field for the label",
    });
  }
  const all: string[] = [];
  for (const path of paths) for (const file of await filesOf(path)) all.push(file);
  const own = shard ? all.filter((_, i) => isInShard(shard, i)) : all;
  const sizes = await sizesOf(own);
  const known = sizes.every((size) => size !== undefined) ? sizes : undefined;
  return new DocumentStream({
    total: own.length,
    largestBytes: known?.reduce((most, size) => size > MAX_BYTES ? most : Math.max(most, size), 0),
    inputBytes: known?.reduce((sum, size) => sum + size, 0),
    hasStdin: own.includes("-"),
    async *read(isDone, onBytes) {
      for (const [i, path] of own.entries()) {
        const index = shard ? i * shard.count + shard.index : i;
        onBytes(sizes[i] ?? 0);
        // Signals are heard between files, however many are done.
        if (isDone(path)) await setImmediate();
        else yield await fileDocument(index, path, hasExpected);
      }
    },
  });
}

/**
 * Documents that are lines of JSON: `{"id": …, "text": …}`, or `"ids"`, token ids, in place of the text. A document
 * without an id has the number of its line, from 1, or `file:line` if there are several files. A field that is null
 * counts as missing. Blank lines are no documents.
 * @param paths none for standard input
 * @throws InputError for a path that cannot be read
 */
export async function openJsonl(paths: readonly string[], options: JsonlOptions): Promise<Collection> {
  requireOneStdin(paths);
  if (paths.length === 0 && process.stdin.isTTY) {
    throw new UsageError("There are no documents", {
      hint: "name a file of JSON lines, or give them through a pipe",
    });
  }
  const sources = paths.length > 0 ? paths : ["-"];
  for (const path of sources) await requireReadable(path);
  const sizes = await sizesOf(sources);
  return new DocumentStream({
    total: undefined,
    largestBytes: undefined,
    inputBytes: sizes.reduce(
      (sum, size) => sum === undefined || size === undefined ? undefined : sum + size,
      0,
    ),
    hasStdin: sources.includes("-"),
    read: (isDone, onBytes) => readJsonl(sources, options, isDone, onBytes),
  });
}

interface StreamOptions {
  readonly total: number | undefined;
  readonly largestBytes: number | undefined;
  readonly inputBytes: number | undefined;
  readonly hasStdin: boolean;
  /** @param onBytes to be called with bytes that have been read since the last call */
  read(isDone: IsDone, onBytes: (bytes: number) => void): AsyncGenerator<InputDocument>;
}

class DocumentStream implements Collection {
  readonly total: number | undefined;
  readonly largestBytes: number | undefined;
  readonly #inputBytes: number | undefined;
  readonly #hasStdin: boolean;
  readonly #read: StreamOptions["read"];
  #documents: AsyncGenerator<InputDocument> | undefined;
  #readBytes = 0;

  constructor({ total, largestBytes, inputBytes, hasStdin, read }: StreamOptions) {
    this.total = total;
    this.largestBytes = largestBytes;
    this.#inputBytes = inputBytes;
    this.#hasStdin = hasStdin;
    this.#read = read;
  }

  share(): number | undefined {
    if (this.#inputBytes === undefined) return undefined;
    // A file may have grown, and empty ones are read at once.
    return this.#inputBytes === 0 ? 1 : Math.min(1, this.#readBytes / this.#inputBytes);
  }

  documents(isDone: IsDone = () => false): AsyncGenerator<InputDocument> {
    return this.#documents ??= this.#read(isDone, (bytes) => this.#readBytes += bytes);
  }

  async close(): Promise<void> {
    const returning = this.#documents?.return(undefined);
    if (this.#hasStdin) process.stdin.destroy();
    // A read that waits for a pipe need not end: on Deno not even when standard input is destroyed.
    if (this.#hasStdin || this.#inputBytes === undefined) returning?.catch(() => {});
    else await returning;
  }
}

function requireOneStdin(paths: readonly string[]): void {
  if (paths.filter((path) => path === "-").length > 1) {
    throw new UsageError("Standard input, `-`, is named twice and can be read once");
  }
}

function nameOf(path: string): string {
  return path === "-" ? "standard input" : path;
}

function cannotRead(path: string, cause: unknown, hint = "check the path"): InputError {
  return new InputError(`Cannot read ${nameOf(path)}: ${ioReason(cause)}`, { hint, cause });
}

function codeOf(error: unknown): string | undefined {
  return (error as NodeJS.ErrnoException).code;
}

/** Bytes of each input; undefined for pipes and devices. */
async function sizesOf(paths: readonly string[]): Promise<(number | undefined)[]> {
  const sizes: (number | undefined)[] = [];
  for (let i = 0; i < paths.length; i += STAT_BATCH) {
    sizes.push(...await Promise.all(paths.slice(i, i + STAT_BATCH).map(sizeOf)));
  }
  return sizes;
}

async function sizeOf(path: string): Promise<number | undefined> {
  try {
    const info = path === "-" ? fstatSync(0) : await stat(path);
    return info.isFile() ? info.size : undefined;
  } catch {
    return 0; // Reading it will say what is wrong.
  }
}

async function fileDocument(index: number, path: string, hasExpected: boolean): Promise<InputDocument> {
  const named: Named = { index, id: path, file: path };
  try {
    const text = await readDocument(path);
    if (text === "") return { ...named, error: printable(`${nameOf(path)} is empty`) };
    return hasExpected ? { ...named, text, expected: basename(dirname(resolve(path))) } : { ...named, text };
  } catch (error) {
    if (!(error instanceof InputError)) throw error;
    return { ...named, error: error.message };
  }
}

/** The text of a file as it is, but for a byte-order mark. */
async function readDocument(path: string): Promise<string> {
  const input = await openText(path);
  try {
    const pieces: string[] = [];
    const requireRoom = (bytes: number) => {
      if (bytes > MAX_BYTES) throw new InputError(`${input.name} ${TOO_LARGE}`);
    };
    requireRoom(input.byteLength ?? 0);
    let bytes = 0;
    for await (const piece of input.pieces) {
      requireRoom(bytes += Buffer.byteLength(piece));
      pieces.push(piece);
    }
    return pieces.join("").replace(/^\ufeff/, "");
  } finally {
    await input.close();
  }
}

/** The files that an argument stands for; at least one. */
async function filesOf(path: string): Promise<string[]> {
  if (path === "-") return [path];
  const info = await stat(path).catch((error: unknown) => {
    if (isMissing(error) && isPattern(path)) return undefined;
    throw cannotRead(path, error);
  });
  if (info && !info.isDirectory()) return [path];
  const files = info ? await filesBelow(path) : await filesMatching(path);
  if (files.length === 0) {
    throw info
      ? new InputError(`There are no files in ${path}`, {
        hint: "names that begin with a dot, and links to folders, are left out",
      })
      : new InputError(`No file matches ${path}`, {
        hint: "`*` stays within a folder, `**/` goes through all; names that begin with a dot are left out",
      });
  }
  return files.sort();
}

async function filesBelow(root: string): Promise<string[]> {
  const files: string[] = [];
  const folders = [root];
  for (let folder = folders.pop(); folder !== undefined; folder = folders.pop()) {
    for (const entry of await visibleEntries(folder)) {
      const path = join(folder, entry.name);
      if (entry.isDirectory()) folders.push(path);
      else if (await isFile(entry, path)) files.push(path);
    }
  }
  return files;
}

async function entriesOf(folder: string): Promise<Dirent[]> {
  try {
    return await readdir(folder || ".", { withFileTypes: true });
  } catch (error) {
    if (isMissing(error)) return [];
    throw cannotRead(folder, error, "check the permissions of the folder, or leave it out");
  }
}

async function visibleEntries(folder: string): Promise<Dirent[]> {
  return (await entriesOf(folder)).filter((entry) => !entry.name.startsWith("."));
}

/** Links that lead nowhere count: they were meant to be files, and reading them will say what is wrong. */
async function isFile(entry: Dirent, path: string): Promise<boolean> {
  if (!entry.isSymbolicLink()) return entry.isFile();
  return await stat(path).then((info) => info.isFile(), () => true);
}

/** No such file, or no such folder on the way to it. */
function isMissing(error: unknown): boolean {
  return codeOf(error) === "ENOENT" || codeOf(error) === "ENOTDIR";
}

function isPattern(path: string): boolean {
  return /[*?[{]/.test(path);
}

/** Not `glob` of node:fs, which on Deno needs permission for variables of the environment. */
async function filesMatching(pattern: string): Promise<string[]> {
  const files = new Set<string>();
  for (const one of alternatives(pattern)) {
    const segments = one.split("/").filter((segment) => segment !== "");
    await addMatches(one.startsWith("/") ? "/" : "", segments, files);
  }
  return [...files];
}

/** `{a,b}.txt` as `a.txt` and `b.txt`. */
function alternatives(pattern: string): string[] {
  const match = /^(.*?)\{([^{}]*,[^{}]*)\}(.*)$/s.exec(pattern);
  if (!match) return [pattern];
  const [, before, choices, after] = match;
  return choices!.split(",").flatMap((choice) => alternatives(before + choice + after));
}

async function addMatches(folder: string, segments: readonly string[], files: Set<string>): Promise<void> {
  const [segment, ...rest] = segments;
  if (segment === undefined) return;
  if (segment === "**") {
    await addMatches(folder, rest.length > 0 ? rest : ["*"], files);
    for (const entry of await visibleEntries(folder)) {
      if (entry.isDirectory()) await addMatches(join(folder, entry.name), segments, files);
    }
  } else if (!isPattern(segment)) {
    const path = join(folder, segment);
    if (rest.length > 0) await addMatches(path, rest, files);
    else if (await stat(path).then((info) => info.isFile(), () => false)) files.add(path);
  } else {
    const expression = segmentExpression(segment);
    const entries = segment.startsWith(".") ? await entriesOf(folder) : await visibleEntries(folder);
    for (const entry of entries) {
      if (!expression.test(entry.name)) continue;
      const path = join(folder, entry.name);
      if (rest.length > 0) await addMatches(path, rest, files);
      else if (await isFile(entry, path)) files.add(path);
    }
  }
}

/** A pattern for one name in a folder. */
function segmentExpression(segment: string): RegExp {
  const source = segment.replace(
    /\[([!^]?)(\][^\]]*|[^\]]+)\]|[\\^$.*+?()[\]{}|/]/g,
    (part, not: string | undefined, set: string | undefined) => {
      if (set !== undefined) return `[${not ? "^" : ""}${set.replace(/[\\\][^]/g, "\\$&")}]`;
      return part === "*" ? ".*" : part === "?" ? "." : `\\${part}`;
    },
  );
  try {
    return new RegExp(`^${source}$`, "su");
  } catch {
    throw new InputError(`${segment} is not a pattern: a range in brackets runs backwards`, {
      hint: "write it as [a-z]",
    });
  }
}

async function requireReadable(path: string): Promise<void> {
  try {
    const info = path === "-" ? fstatSync(0) : await stat(path);
    if (info.isDirectory()) throw Object.assign(new Error("it is a folder"), { code: "EISDIR" });
    // Not `access`, which on Deno needs permission to know the user. A named pipe would wait for its writer.
    if (path !== "-" && info.isFile()) await (await open(path)).close();
  } catch (error) {
    throw cannotRead(path, error, codeOf(error) === "EISDIR" ? "name the files in it" : "check the path");
  }
}

async function* readJsonl(
  paths: readonly string[],
  { shard, expected }: JsonlOptions,
  isDone: IsDone,
  onBytes: (bytes: number) => void,
): AsyncGenerator<InputDocument> {
  let index = 0;
  for (const path of paths) {
    for await (const { number, bytes } of linesOf(path, onBytes)) {
      if (bytes && isBlank(bytes)) continue;
      if (isInShard(shard, index)) {
        const place = paths.length > 1 ? `${path}:${number}` : number;
        const document = jsonDocument(bytes, index, place, expected);
        if (!isDone(document.id)) yield document;
      }
      index++;
    }
  }
}

async function* linesOf(path: string, onBytes: (bytes: number) => void): AsyncGenerator<Line> {
  const splitter = new LineSplitter(MAX_BYTES);
  for await (const chunk of chunksOf(path)) {
    onBytes(chunk.length);
    for (const line of splitter.push(chunk)) yield line.number === 1 ? withoutMark(line) : line;
  }
  const last = splitter.end();
  if (last) yield last.number === 1 ? withoutMark(last) : last;
}

/** A chunk is valid until the next is asked for. @throws InputError */
async function* chunksOf(path: string): AsyncGenerator<Uint8Array> {
  try {
    yield* path === "-" ? process.stdin : fileChunks(path);
  } catch (error) {
    throw error instanceof CutShort
      ? cannotRead(path, error, "make sure nothing writes to the file, then try again")
      : cannotRead(path, error);
  }
}

/** The file up to its end, wherever that has moved meanwhile but back. @throws CutShort */
async function* fileChunks(path: string): AsyncGenerator<Uint8Array> {
  const file = await open(path);
  try {
    const { size } = await file.stat();
    const buffer = new Uint8Array(READ_BYTES);
    for (let done = 0;;) {
      const { bytesRead } = await file.read(buffer, 0, buffer.length, null);
      if (bytesRead === 0 && done < size) throw new CutShort();
      if (bytesRead === 0) return;
      done += bytesRead;
      yield buffer.subarray(0, bytesRead);
    }
  } finally {
    await file.close();
  }
}

/** A line without its newline. */
export interface Line {
  /** From 1. */
  readonly number: number;
  /** Undefined for a line that is too long; valid until the next line is asked for. */
  readonly bytes: Uint8Array | undefined;
}

const NEWLINE = 0x0a;

/** Cuts chunks of bytes into lines; holds at most one line. */
export class LineSplitter {
  readonly #maxBytes: number;
  /** What came before of the line that goes on: none of a line that is too long. */
  #parts: Uint8Array[] = [];
  #heldBytes = 0;
  #lines = 0;

  /** @param maxBytes of a line; longer ones are counted and not held */
  constructor(maxBytes: number) {
    this.#maxBytes = maxBytes;
  }

  /** The lines that end in the chunk, which needs to be valid only until they have been gone through: all of them. */
  *push(chunk: Uint8Array): Generator<Line> {
    let start = 0;
    for (let end = chunk.indexOf(NEWLINE); end >= 0; end = chunk.indexOf(NEWLINE, start)) {
      yield this.#finish(chunk.subarray(start, end));
      start = end + 1;
    }
    this.#heldBytes += chunk.length - start;
    if (this.#heldBytes > this.#maxBytes) this.#parts = [];
    else if (start < chunk.length) this.#parts.push(chunk.slice(start));
  }

  /** The last line, if it has no newline. */
  end(): Line | undefined {
    return this.#heldBytes > 0 ? this.#finish(new Uint8Array(0)) : undefined;
  }

  #finish(last: Uint8Array): Line {
    const isTooLong = this.#heldBytes + last.length > this.#maxBytes;
    const bytes = isTooLong
      ? undefined
      : this.#parts.length > 0
      ? Buffer.concat([...this.#parts, last])
      : last;
    this.#parts = [];
    this.#heldBytes = 0;
    return { number: ++this.#lines, bytes };
  }
}

/** Editors of some systems begin a file with a mark of its encoding. */
function withoutMark({ number, bytes }: Line): Line {
  const isMarked = bytes?.[0] === 0xef && bytes[1] === 0xbb && bytes[2] === 0xbf;
  return { number, bytes: isMarked ? bytes.subarray(3) : bytes };
}

/** Whether there is nothing but what JSON takes for white space. */
function isBlank(bytes: Uint8Array): boolean {
  return bytes.every((byte) => byte === 0x20 || byte === 0x09 || byte === 0x0d);
}

const utf8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

type JsonRecord = Readonly<Record<string, unknown>>;

/** What is wrong with a line, as the end of a sentence that begins with its place. */
class BadRecord extends Error {}

/** @param place of the line, for messages and for a document without an id */
function jsonDocument(
  bytes: Uint8Array | undefined,
  index: number,
  place: string | number,
  expectedField: string | undefined,
): InputDocument {
  let id = place;
  try {
    if (!bytes) throw new BadRecord(TOO_LARGE);
    const record = parseRecord(bytes);
    id = idOf(record) ?? place;
    const content = contentOf(record);
    if (expectedField === undefined) return { index, id, ...content };
    return { index, id, ...content, expected: expectedOf(record, expectedField) };
  } catch (error) {
    if (!(error instanceof BadRecord)) throw error;
    const where = typeof place === "number" ? `line ${place}` : printable(place);
    return { index, id, error: `${where} ${error.message}` };
  }
}

function parseRecord(bytes: Uint8Array): JsonRecord {
  let text: string;
  try {
    text = utf8.decode(bytes);
  } catch {
    throw new BadRecord("is not UTF-8 text");
  }
  let record: unknown;
  try {
    record = JSON.parse(text);
  } catch (error) {
    // The message can quote all of the line.
    throw new BadRecord(`is not JSON: ${printable((error as Error).message.slice(0, MOST_QUOTED))}`);
  }
  if (typeof record !== "object" || record === null || Array.isArray(record)) {
    throw new BadRecord("is not a JSON object");
  }
  return record as JsonRecord;
}

/** Undefined where the field is missing or null. */
function fieldOf(record: JsonRecord, name: string): unknown {
  return Object.hasOwn(record, name) ? record[name] ?? undefined : undefined;
}

function idOf(record: JsonRecord): string | number | undefined {
  const id = fieldOf(record, "id");
  if (id === undefined || typeof id === "string") return id;
  if (typeof id !== "number") throw new BadRecord('has an "id" that is neither a string nor a number');
  // Two such numbers may have become one.
  if (Math.abs(id) > Number.MAX_SAFE_INTEGER) {
    throw new BadRecord('has an "id" that is too large for a number: put it in quotes');
  }
  return id;
}

function contentOf(record: JsonRecord): { readonly text: string } | { readonly ids: readonly number[] } {
  const text = fieldOf(record, "text");
  const ids = fieldOf(record, "ids");
  if (text === undefined && ids === undefined) throw new BadRecord('has neither "text" nor "ids"');
  if (text !== undefined && ids !== undefined) throw new BadRecord('has both "text" and "ids"');
  if (ids !== undefined) {
    if (!isIds(ids)) throw new BadRecord('has "ids" that are not an array of token ids');
    if (ids.length === 0) throw new BadRecord('has an empty "ids"');
    return { ids };
  }
  if (typeof text !== "string") throw new BadRecord('has a "text" that is not a string');
  if (text === "") throw new BadRecord('has an empty "text"');
  return { text };
}

function isIds(value: unknown): value is readonly number[] {
  return Array.isArray(value) && value.every((id) => Number.isInteger(id) && id >= 0 && id < 2 ** 32);
}

function expectedOf(record: JsonRecord, field: string): string {
  const expected = fieldOf(record, field);
  if (expected === undefined) throw new BadRecord(`has no expected label under "${field}"`);
  if (typeof expected === "object") {
    throw new BadRecord(`has under "${field}" neither a string, a number nor a boolean`);
  }
  return String(expected);
}
