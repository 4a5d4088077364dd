/** Prompts from arguments, files and standard input. */
import { Buffer } from "node:buffer";
import { fstatSync } from "node:fs";
import { type FileHandle, open } from "node:fs/promises";
import process from "node:process";
import { InputError, UsageError } from "../runtime/errors.ts";
import { ioReason } from "../runtime/io_error.ts";

/** Bytes of a file in memory at a time. */
const READ_BYTES = 1 << 18;

/** UTF-8 text that is read as it is asked for. */
export interface TextInput {
  /** What to call it in messages. */
  readonly name: string;
  /** The most bytes it can have, or undefined where only its end will tell, as for a pipe. */
  readonly byteLength: number | undefined;
  /**
   * The text in order, to be gone through once; no piece is empty or ends inside a character. Fails with an InputError
   * if it cannot be read or is not UTF-8.
   */
  readonly pieces: AsyncIterable<string>;
  close(): Promise<void>;
}

/**
 * Opens a file, or standard input if `path` is `-`. Without the newline that `echo` and editors put at the end of a
 * text, if `dropsFinalNewline`. The caller closes it.
 */
export async function openText(
  path: string,
  { dropsFinalNewline = false } = {},
): Promise<TextInput> {
  const name = path === "-" ? "standard input" : path;
  const { byteLength, chunks, close } = await openBytes(path).catch((error: unknown) => {
    throw cannotRead(name, error);
  });
  const pieces = decodePieces(explainingErrors(chunks, name), name);
  return {
    name,
    byteLength,
    pieces: dropsFinalNewline ? withoutFinalNewline(pieces) : pieces,
    close,
  };
}

/** Bytes to read; a chunk is valid until the next is asked for. */
interface ByteInput {
  readonly byteLength: number | undefined;
  readonly chunks: AsyncIterable<Uint8Array>;
  close(): Promise<void>;
}

async function openBytes(path: string): Promise<ByteInput> {
  if (path === "-") return openStdin();
  const file = await open(path);
  try {
    const info = await file.stat();
    // Pipes have no size, and files that the system makes up, as in /proc, claim to be empty.
    const byteLength = info.isFile() && info.size > 0 ? info.size : undefined;
    return { byteLength, chunks: chunksOf(file, byteLength), close: () => file.close() };
  } catch (error) {
    await file.close();
    throw error;
  }
}

/** Bytes that a file had when it was opened are no longer there. */
export class CutShort extends Error {
  constructor() {
    super("it was cut short while it was read");
  }
}

/** The file up to the size it had. @throws CutShort */
async function* chunksOf(file: FileHandle, byteLength = Infinity): AsyncGenerator<Uint8Array> {
  const buffer = new Uint8Array(READ_BYTES);
  for (let left = byteLength; left > 0;) {
    const { bytesRead } = await file.read(buffer, 0, Math.min(buffer.length, left), null);
    if (bytesRead === 0 && left < Infinity) throw new CutShort();
    if (bytesRead === 0) return;
    left -= bytesRead;
    yield buffer.subarray(0, bytesRead);
  }
}

function openStdin(): ByteInput {
  // Deno would read nothing, and say nothing.
  if (fstatSync(0).isDirectory()) throw Object.assign(new Error("stdin is a folder"), { code: "EISDIR" });
  return {
    byteLength: undefined,
    chunks: process.stdin,
    close() {
      process.stdin.destroy();
      return Promise.resolve();
    },
  };
}

async function* explainingErrors(
  chunks: AsyncIterable<Uint8Array>,
  name: string,
): AsyncGenerator<Uint8Array> {
  try {
    yield* chunks;
  } catch (error) {
    throw cannotRead(name, error);
  }
}

function cannotRead(name: string, cause: unknown): InputError {
  return new InputError(`Cannot read ${name}: ${ioReason(cause)}`, { cause });
}

/**
 * UTF-8 text, each piece in whole characters; says at which byte it stops being that.
 * @param chunks cut anywhere; each needs to be valid only until the next is asked for
 */
export async function* decodePieces(chunks: AsyncIterable<Uint8Array>, name: string): AsyncGenerator<string> {
  /** The first bytes of a character that goes on in the next chunk. */
  let unfinished = new Uint8Array(0);
  let offset = 0;
  for await (const chunk of chunks) {
    const bytes = unfinished.length === 0 ? chunk : Buffer.concat([unfinished, chunk]);
    const end = bytes.length - unfinishedLength(bytes);
    if (end > 0) yield decode(bytes.subarray(0, end), offset, name);
    unfinished = bytes.slice(end);
    offset += end;
  }
  if (unfinished.length > 0) throw notUtf8(offset, name);
}

/** Bytes at the end that begin a character without finishing it. */
function unfinishedLength(bytes: Uint8Array): number {
  for (let length = 1; length <= Math.min(3, bytes.length); length++) {
    const byte = bytes[bytes.length - length]!;
    const isContinuation = (byte & 0xc0) === 0x80;
    if (isContinuation) continue;
    const characterLength = byte < 0xc0 ? 1 : byte < 0xe0 ? 2 : byte < 0xf0 ? 3 : 4;
    return characterLength > length ? length : 0;
  }
  return 0;
}

/** @param offset where the bytes begin in the whole input */
function decode(bytes: Uint8Array, offset: number, name: string): string {
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    throw notUtf8(offset + firstInvalidByte(bytes), name);
  }
}

function notUtf8(offset: number, name: string): InputError {
  return new InputError(`${name} is not UTF-8 text: byte ${offset} begins no valid character`, {
    hint: "convert it, for example with `iconv -t UTF-8`",
  });
}

/** Offset of the first byte that belongs to no valid character. */
function firstInvalidByte(bytes: Uint8Array): number {
  const isPrefixValid = (end: number, stream: boolean) => {
    try {
      new TextDecoder("utf-8", { fatal: true }).decode(bytes.subarray(0, end), { stream });
      return true;
    } catch {
      return false;
    }
  };
  // The longest prefix that can go on as text, by bisection.
  let valid = 0;
  let invalid = bytes.length + 1;
  while (invalid - valid > 1) {
    const middle = (valid + invalid) >> 1;
    if (isPrefixValid(middle, true)) valid = middle;
    else invalid = middle;
  }
  // It may end inside a character, which the next byte or the end of the input breaks.
  while (!isPrefixValid(valid, false)) valid--;
  return valid;
}

/** Holds back what may be the newline at the end. */
async function* withoutFinalNewline(pieces: AsyncIterable<string>): AsyncGenerator<string> {
  let held = "";
  for await (const piece of pieces) {
    const text = held + piece;
    const heldLength = text.endsWith("\r\n") ? 2 : text.endsWith("\n") || text.endsWith("\r") ? 1 : 0;
    const end = text.length - heldLength;
    if (end > 0) yield text.slice(0, end);
    held = text.slice(end);
  }
  if (held === "\r") yield held;
}

export interface PromptSource {
  readonly prompt: string | undefined;
  readonly file: string | undefined;
  readonly ids: string | undefined;
}

export type Prompt =
  | { readonly text: string }
  | { readonly ids: readonly number[] }
  | { readonly input: TextInput };

/**
 * The prompt that the options name, or standard input when it is a pipe. Of a file or a pipe only the first piece is
 * read; the newline at its end is not part of it. The caller closes `input`.
 */
export async function readPrompt(source: PromptSource): Promise<Prompt> {
  if (source.ids !== undefined) return { ids: await readIds(source.ids) };
  if (source.prompt !== undefined && source.prompt !== "-") return { text: source.prompt };
  const path = source.file ?? "-";
  if (path === "-" && source.prompt === undefined && process.stdin.isTTY) {
    throw new UsageError("There is no prompt", {
      hint: 'give one in quotes, with `--file`, or through a pipe: longform generate "Once upon a time"',
    });
  }
  const input = await openText(path, { dropsFinalNewline: true });
  try {
    return { input: await requireText(input) };
  } catch (error) {
    await input.close();
    throw error;
  }
}

/** Reads the first piece, so that an input without text fails at once. */
async function requireText(input: TextInput): Promise<TextInput> {
  const rest = input.pieces[Symbol.asyncIterator]();
  const first = await rest.next();
  if (first.done) throw new InputError(`The prompt is empty: ${input.name} holds no text`);
  return { ...input, pieces: prepend(first.value, rest) };
}

async function* prepend(first: string, rest: AsyncIterator<string>): AsyncGenerator<string> {
  yield first;
  yield* { [Symbol.asyncIterator]: () => rest };
}

/** Bytes of an input that is held as one text, at most: half of the characters that a text can have everywhere. */
const MOST_WHOLE_BYTES = 1 << 28;

/** All of an input's text. @throws InputError when it cannot be read, is not UTF-8 or has over 256 MiB */
export async function readWhole(path: string): Promise<{ readonly name: string; readonly text: string }> {
  const input = await openText(path);
  const { name } = input;
  const requireRoom = (bytes: number) => {
    if (bytes > MOST_WHOLE_BYTES) {
      throw new InputError(`${name} is longer than 256 MiB`, { hint: "divide it" });
    }
  };
  try {
    requireRoom(input.byteLength ?? 0);
    const pieces: string[] = [];
    let bytes = 0;
    for await (const piece of input.pieces) {
      requireRoom(bytes += Buffer.byteLength(piece));
      pieces.push(piece);
    }
    return { name, text: pieces.join("") };
  } finally {
    await input.close();
  }
}

/** Token ids from a JSON array in a file, or on standard input if `path` is `-`. */
export async function readIds(path: string): Promise<number[]> {
  const { name, text } = await readWhole(path);
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new InputError(`${name} is not JSON: ${(error as Error).message}`, { hint: IDS_HINT });
  }
  if (!Array.isArray(value) || !value.every((id) => Number.isInteger(id) && id >= 0 && id < 2 ** 32)) {
    throw new InputError(`${name} is not a JSON array of token ids`, { hint: IDS_HINT });
  }
  if (value.length === 0) throw new InputError(`The prompt is empty: ${name} holds no token ids`);
  return value;
}

const IDS_HINT = "it should look like [464, 2068, 7586]";
