/** Prompts from arguments, files and standard input. */
import { Buffer } from "node:buffer";
import { fstatSync } from "node:fs";
import { readFile } from "node:fs/promises";
import process from "node:process";
import { InputError, UsageError } from "../runtime/errors.ts";
import { ioReason } from "./io_error.ts";

async function readStdin(): Promise<Uint8Array> {
  // Deno would read nothing, and say nothing.
  if (fstatSync(0).isDirectory()) throw Object.assign(new Error("stdin is a folder"), { code: "EISDIR" });
  const chunks: Uint8Array[] = [];
  for await (const chunk of process.stdin) chunks.push(chunk as Uint8Array);
  return Buffer.concat(chunks);
}

async function readInput(path: string): Promise<Uint8Array> {
  try {
    return path === "-" ? await readStdin() : await readFile(path);
  } catch (error) {
    throw new InputError(`Cannot read ${nameOf(path)}: ${ioReason(error)}`, { cause: error });
  }
}

function nameOf(path: string): string {
  return path === "-" ? "standard input" : path;
}

/** UTF-8 text; says at which byte it stops being that. */
export function decodeText(bytes: Uint8Array, where: string): string {
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    throw new InputError(
      `${where} is not UTF-8 text: byte ${firstInvalidByte(bytes)} begins no valid character`,
      {
        hint: "convert it, for example with `iconv -t UTF-8`",
      },
    );
  }
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

export interface PromptSource {
  readonly prompt: string | undefined;
  readonly file: string | undefined;
  readonly ids: string | undefined;
}

export type Prompt = { readonly text: string } | { readonly ids: readonly number[] };

/**
 * Reads the prompt that the options name, or standard input when it is a pipe. The newline that `echo` and editors put
 * at the end of a text is not part of it.
 */
export async function readPrompt(source: PromptSource): Promise<Prompt> {
  if (source.ids !== undefined) return { ids: parseIds(await readInput(source.ids), nameOf(source.ids)) };
  if (source.prompt !== undefined && source.prompt !== "-") return { text: source.prompt };
  const path = source.file ?? "-";
  if (path === "-" && source.prompt === undefined && process.stdin.isTTY) {
    throw new UsageError("There is no prompt", {
      hint: 'give one in quotes, with `--file`, or through a pipe: longform generate "Once upon a time"',
    });
  }
  const text = decodeText(await readInput(path), nameOf(path)).replace(/\r?\n$/, "");
  if (text === "") throw new InputError(`The prompt is empty: ${nameOf(path)} holds no text`);
  return { text };
}

/** Token ids as a JSON array. */
function parseIds(bytes: Uint8Array, where: string): number[] {
  let value: unknown;
  try {
    value = JSON.parse(decodeText(bytes, where));
  } catch (error) {
    if (error instanceof InputError) throw error;
    throw new InputError(`${where} is not JSON: ${(error as Error).message}`);
  }
  if (!Array.isArray(value) || !value.every((id) => Number.isSafeInteger(id) && id >= 0)) {
    throw new InputError(`${where} is not a JSON array of token ids`, {
      hint: "it should look like [464, 2068, 7586]",
    });
  }
  if (value.length === 0) throw new InputError(`The prompt is empty: ${where} holds no token ids`);
  return value;
}
