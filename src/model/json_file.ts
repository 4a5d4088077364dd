/** Reads the small JSON files of a model folder, with errors that say which file is at fault. */
import { readFile, stat } from "node:fs/promises";
import { ModelError } from "../runtime/errors.ts";
import { quoteName } from "./weight_source.ts";

export type JsonObject = Readonly<Record<string, unknown>>;

/** Far above any real tokenizer.json (the largest are a few tens of MB); keeps a wrong file from filling memory. */
export const MAX_JSON_BYTES = 200_000_000;

export function isJsonObject(value: unknown): value is JsonObject {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** A parsed value as part of a message: a text in quotes and shortened, what holds others by its kind alone. */
export function describeJson(value: unknown): string {
  if (typeof value === "string") return quoteName(value);
  if (Array.isArray(value)) return "an array";
  return typeof value === "object" && value !== null ? "an object" : String(value);
}

/** The error code of a failed file operation ("ENOENT"), or "" for any other value. */
export function fileErrorCode(error: unknown): string {
  return error instanceof Error && "code" in error && typeof error.code === "string" ? error.code : "";
}

/** A failed file operation as a sentence about `path`. */
export function fileError(path: string, error: unknown): ModelError {
  const code = fileErrorCode(error);
  if (code === "ENOENT" || code === "ENOTDIR") {
    return new ModelError(`There is no file ${path}`, {
      hint: "check the path, or download the file",
      cause: error,
    });
  }
  if (code === "EACCES" || code === "EPERM") {
    return new ModelError(`Cannot read ${path}: permission denied`, {
      hint: "check the permissions of the file and its folder",
      cause: error,
    });
  }
  const reason = code || (error instanceof Error ? error.name : "unknown error");
  return new ModelError(`Cannot read ${path}: ${reason}`, {
    hint: "check that the disk is readable, then try again",
    cause: error,
  });
}

/** Throws unless `dir` is a folder that exists. */
export async function requireFolder(dir: string): Promise<void> {
  const found = await stat(dir).catch((error: unknown) => {
    const code = fileErrorCode(error);
    if (code !== "ENOENT" && code !== "ENOTDIR") throw fileError(dir, error);
    throw new ModelError(`There is no model folder ${dir}`, {
      hint: "pass `--model` a folder with config.json, tokenizer.json and model.safetensors",
      cause: error,
    });
  });
  if (!found.isDirectory()) {
    throw new ModelError(`${dir} is a file, not a model folder`, {
      hint: "pass --model the folder that holds config.json and model.safetensors",
    });
  }
}

/** Parses a file as a JSON object (not an array or a scalar) in valid UTF-8. */
export async function readJsonObject(path: string): Promise<JsonObject> {
  const hint = "download the file again";
  let bytes: Uint8Array;
  try {
    const found = await stat(path);
    if (!found.isFile()) throw new ModelError(`${path} is not a regular file`, { hint });
    if (found.size > MAX_JSON_BYTES) {
      throw new ModelError(`${path} is too large: ${found.size} bytes, at most ${MAX_JSON_BYTES} are read`, {
        hint,
      });
    }
    bytes = await readFile(path);
  } catch (error) {
    throw error instanceof ModelError ? error : fileError(path, error);
  }
  return parseJsonObject(bytes, path, hint);
}

/** `where` names the bytes in messages: a path, or "the header of" a path. */
export function parseJsonObject(bytes: Uint8Array, where: string, hint: string): JsonObject {
  let value: unknown;
  try {
    value = JSON.parse(decodeUtf8(bytes, where, hint));
  } catch (error) {
    if (error instanceof ModelError) throw error;
    throw new ModelError(`${where} is not valid JSON`, { hint, cause: error });
  }
  if (!isJsonObject(value)) throw new ModelError(`${where} is not a JSON object`, { hint });
  return value;
}

export function decodeUtf8(bytes: Uint8Array, where: string, hint: string): string {
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch (error) {
    throw new ModelError(`${where} is not valid UTF-8`, { hint, cause: error });
  }
}
