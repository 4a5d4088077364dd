/**
 * Session files: the keys and values of a prefix, so that the same prefix costs no second prefill. A session is a
 * safetensors file with `h.{i}.k` and `h.{i}.v` of shape `[heads, tokens, headDim]` in the type of the run,
 * `input_ids` (I32, `[tokens]`) and `logits` (F32, `[vocab]`), the row after the last token. Its `__metadata__` says
 * which model, type, mapping of positions and attention they belong to, and holds a CRC-32 for each tensor.
 */
import { createHash } from "node:crypto";
import { crc32 } from "node:zlib";
import { ModelError } from "../runtime/errors.ts";
import { type Elem, sizeOf } from "../runtime/kernel.ts";
import { writeFileAtomically } from "./atomic_file.ts";
import type { GPT2Config } from "./config.ts";
import { fileErrorCode, isJsonObject } from "./json_file.ts";
import { encodeSafetensorsHeader, openSafetensors, type SafetensorsSource } from "./safetensors.ts";
import { elementCount, formatShape, quoteName, type TensorInfo, type WeightSource } from "./weight_source.ts";

/** The metadata key that says what the file is, and the version of what this module writes. */
const FORMAT = "longform_session";
const VERSION = "1";
/** What a fingerprint reads at either end of a tensor. */
const SAMPLE_BYTES = 4096;
/** What is read, and handed to a cache, at a time. */
const SLICE_BYTES = 4 << 20;
/** Far beyond any context; keeps a hostile sparse file from filling memory with ids. */
const MAX_TOKENS = 2 ** 26;

/** Sizes that a cache shares with the file. */
const ROW_SIZES = ["layers", "heads", "headDim", "elem"] as const;
const DTYPES = { f16: "F16", f32: "F32" } as const satisfies Record<Elem, string>;

/** What a session file holds of a cache, in the order of the file. */
export interface KvRows {
  readonly layers: number;
  readonly heads: number;
  /** Stored columns of a head, padded to a multiple of four. */
  readonly headDim: number;
  readonly elem: Elem;
  /**
   * Bytes of `[heads, tokens, headDim]` of one layer's keys or values, in order, in slices of a few MiB; a slice is
   * valid until the next is asked for.
   */
  read(layer: number, which: "k" | "v", tokens: number): AsyncIterable<Uint8Array>;
  /**
   * Takes such bytes back, from `byteOffset` on: a multiple of 16, as is their length unless they are the last. They
   * may be overwritten once it has returned.
   */
  write(
    layer: number,
    which: "k" | "v",
    tokens: number,
    byteOffset: number,
    bytes: Uint8Array<ArrayBuffer>,
  ): void | Promise<void>;
}

/** What keys and values depend on besides the tokens. */
export interface SessionOrigin {
  /** `fingerprint` of the checkpoint. */
  readonly model: string;
  /** How positions map to rows of `wpe`, in words of the caller's choice: equal words mean an equal mapping. */
  readonly positions: string;
  /** What tokens attend to, `attentionOf` a run's sparsity. */
  readonly attention: string;
}

export interface SessionShape extends Pick<KvRows, typeof ROW_SIZES[number]> {
  readonly tokens: number;
  readonly vocabSize: number;
}

export interface SessionContents extends SessionOrigin {
  /** At least one. */
  readonly ids: Uint32Array;
  /** `[vocab]`, the row after the last token. */
  readonly logits: Float32Array;
  /** Must hold the rows of all `ids`. */
  readonly rows: KvRows;
}

export interface TransferOptions {
  /** Ends the work with the signal's reason. */
  readonly signal?: AbortSignal;
  /** Called after every slice, with bytes of keys and values. */
  readonly onProgress?: (doneBytes: number, totalBytes: number) => void;
}

/**
 * Identifies a checkpoint without reading it all: SHA-256, in hex, of the config's numbers that change what is computed
 * and, for every tensor by name, its type, shape and first and last 4 KiB. Does not see a change that spares both ends
 * of every tensor, as of single rows of an embedding: training moves every element of some tensor, so that fine-tunes
 * differ. Sharding does not matter; the type that the weights are stored in does.
 */
export async function fingerprint(source: WeightSource, config: GPT2Config): Promise<string> {
  const {
    bosTokenId: _bos,
    eosTokenId: _eos,
    padTokenId: _pad,
    id2label: _labels,
    problemType: _type,
    ...computed
  } = config;
  const hash = createHash("sha256");
  hash.update(JSON.stringify(Object.entries(computed).toSorted(([a], [b]) => a < b ? -1 : 1)));
  for (const name of [...source.tensors.keys()].toSorted()) {
    const { dtype, shape, byteLength } = source.tensors.get(name)!;
    hash.update(JSON.stringify([name, dtype, shape]));
    const sample = new Uint8Array(Math.min(SAMPLE_BYTES, byteLength));
    for (const offset of [0, byteLength - sample.length]) {
      await source.read(name, offset, sample);
      hash.update(sample);
    }
  }
  return hash.digest("hex");
}

/** Equal tokens that both sequences start with. */
export function commonPrefix(a: ArrayLike<number>, b: ArrayLike<number>): number {
  const most = Math.min(a.length, b.length);
  let length = 0;
  while (length < most && a[length] === b[length]) length++;
  return length;
}

/** The tensors of a session file, in its order. */
export function sessionTensors(shape: SessionShape): Omit<TensorInfo, "file">[] {
  const { layers, heads, headDim, elem, tokens, vocabSize } = shape;
  const rows = (name: string) => tensorInfo(name, DTYPES[elem], [heads, tokens, headDim], sizeOf(elem));
  return [
    ...Array.from({ length: layers }, (_, i) => [rows(rowsName(i, "k")), rows(rowsName(i, "v"))]).flat(),
    tensorInfo("input_ids", "I32", [tokens], 4),
    tensorInfo("logits", "F32", [vocabSize], 4),
  ];
}

/**
 * Writes a session file. What was at `path` stays as it is until the new file is complete; a `Session` open on it can
 * still be read after that on POSIX systems, and must be closed before on Windows.
 * @throws OutputError when it cannot be written, the reason of `signal`, and what `rows.read` throws
 */
export async function saveSession(
  path: string,
  contents: SessionContents,
  options: TransferOptions = {},
): Promise<void> {
  const { ids, logits, rows } = contents;
  if (ids.length < 1 || ids.length > MAX_TOKENS) throw new RangeError(`Cannot save ${ids.length} tokens`);
  const { layers, heads, headDim, elem } = rows;
  const shape = { layers, heads, headDim, elem, tokens: ids.length, vocabSize: logits.length };
  const tensors = sessionTensors(shape);
  // Of the final length already: the data goes behind the header, which can only be written after it.
  const checksums = new Map(tensors.map(({ name }) => [name, hex(0)]));
  const sizes = new Map(tensors.map(({ name, byteLength }) => [name, byteLength]));
  const header = () => encodeSafetensorsHeader(tensors, sessionMetadata(contents, checksums));
  const progress = progressOf(shape, options);
  await writeFileAtomically(path, async (file) => {
    let position = header().length;
    const append = async (name: string, slices: AsyncIterable<Uint8Array> | Iterable<Uint8Array>) => {
      const begin = position;
      let crc = 0;
      for await (const bytes of slices) {
        crc = crc32(bytes, crc);
        await file.write(bytes, position);
        position += bytes.length;
        progress(name, bytes.length);
      }
      if (position - begin !== sizes.get(name)) {
        throw new RangeError(`The cache gave ${position - begin} bytes of ${name}`);
      }
      checksums.set(name, hex(crc));
    };
    for (const { layer, which, name } of rowTensors(shape)) {
      await append(name, rows.read(layer, which, ids.length));
    }
    await append("input_ids", [bytesOf(ids)]);
    await append("logits", [bytesOf(logits)]);
    await file.write(header(), 0);
  });
}

/**
 * Opens a session file, checks everything about it but the keys, values and logits themselves, and reads its tokens.
 * The caller closes it.
 * @returns undefined when there is no such file
 * @throws ModelError when it cannot be read, is damaged or is no session
 */
export async function openSession(path: string): Promise<Session | undefined> {
  let source: SafetensorsSource;
  try {
    source = await openSafetensors(path);
  } catch (error) {
    if (fileErrorCode((error as Error).cause) === "ENOENT") return undefined;
    throw error instanceof ModelError ? withSessionHint(error) : error;
  }
  try {
    const header = checkHeader(source);
    return new Session(source, header, await readIds(source, header));
  } catch (error) {
    await source.close();
    throw error;
  }
}

/** CRC-32 of each tensor by name. */
type Checksums = ReadonlyMap<string, number>;

/** Bytes from `offset` on of something larger, valid until the next slice is asked for. */
interface Slice {
  readonly bytes: Uint8Array<ArrayBuffer>;
  readonly offset: number;
}

interface SessionHeader {
  readonly origin: SessionOrigin;
  readonly shape: SessionShape;
  readonly checksums: Checksums;
}

/** An open session file. */
export class Session {
  readonly path: string;
  readonly origin: SessionOrigin;
  readonly shape: SessionShape;
  /** `[tokens]`, all of the vocabulary. */
  readonly ids: Uint32Array;
  readonly #source: SafetensorsSource;
  readonly #checksums: Checksums;

  /** For `openSession`: takes over the open file. */
  constructor(source: SafetensorsSource, header: SessionHeader, ids: Uint32Array) {
    this.path = source.description;
    this.origin = header.origin;
    this.shape = header.shape;
    this.ids = ids;
    this.#source = source;
    this.#checksums = header.checksums;
  }

  get tokens(): number {
    return this.shape.tokens;
  }

  /** @throws ModelError unless the session can be continued in a run like this */
  check(run: SessionOrigin & Omit<SessionShape, "tokens">): void {
    const { path, shape, origin: { model, positions, attention } } = this;
    if (model !== run.model) {
      throw new ModelError(`${path} was saved with another model`, {
        hint: "pass the model that it was saved with, or another file",
        detail: `saved with ${quoteName(model)}, this run has ${quoteName(run.model)}`,
      });
    }
    if (shape.elem !== run.elem) {
      throw new ModelError(`${path} was saved in ${shape.elem}, this run is in ${run.elem}`, {
        hint: `use \`--dtype ${shape.elem}\`, or another file`,
      });
    }
    if (positions !== run.positions) {
      const [saved, here] = [quoteName(positions), quoteName(run.positions)];
      throw new ModelError(`${path} was saved with the positions ${saved}, this run has ${here}`, {
        hint: `use ${positionFlags(positions)} as it was saved with, or another file`,
      });
    }
    if (attention !== run.attention) {
      const [saved, here] = [quoteName(attention), quoteName(run.attention)];
      throw new ModelError(`${path} was saved with the attention ${saved}, this run has ${here}`, {
        hint: `use the \`--sparsity\` that it was saved with, or another file`,
      });
    }
    // The fingerprint covers the sizes: they differ only in a file that was tampered with.
    const [saved, here] = [describeSizes(shape), describeSizes(run)];
    if (saved !== here) {
      throw new ModelError(`${path} holds ${saved}, the model has ${here}`, { hint: ANOTHER_FILE });
    }
  }

  /**
   * Writes the first `tokens` tokens' keys and values to a cache. Unless that is none, it reads those of all tokens, to
   * find damage anywhere; when it throws, the cache may hold any part of them.
   * @throws ModelError when the file is damaged or cannot be read, and what `rows.write` throws
   */
  async restore(rows: KvRows, tokens: number, options: TransferOptions = {}): Promise<void> {
    const { shape, shape: { heads, headDim, elem } } = this;
    if (ROW_SIZES.some((size) => rows[size] !== shape[size])) {
      throw new RangeError(`${this.path} does not fit the cache`);
    }
    if (!Number.isInteger(tokens) || tokens < 0 || tokens > shape.tokens) {
      throw new RangeError(`Cannot restore ${tokens} tokens of ${shape.tokens}`);
    }
    if (tokens === 0) return;
    const rowBytes = headDim * sizeOf(elem);
    const progress = progressOf(shape, options);
    const buffer = new Uint8Array(Math.min(SLICE_BYTES, heads * tokens * rowBytes));
    for (const { layer, which, name } of rowTensors(shape)) {
      const slices = this.#verified(name, progress);
      for await (const slice of headStarts(slices, shape.tokens * rowBytes, tokens * rowBytes, buffer)) {
        await rows.write(layer, which, tokens, slice.offset, slice.bytes);
      }
    }
  }

  /**
   * The row after the last token, `[vocab]`.
   * @throws ModelError when the file is damaged or cannot be read
   */
  async logits(): Promise<Float32Array<ArrayBuffer>> {
    return new Float32Array(await readVerified(this.#source, this.#checksums, "logits"));
  }

  async close(): Promise<void> {
    await this.#source.close();
  }

  /** The slices of a tensor; throws at its end when it is damaged. */
  async *#verified(name: string, progress: (name: string, bytes: number) => void): AsyncGenerator<Slice> {
    const { byteLength } = this.#source.tensors.get(name)!;
    const buffer = new Uint8Array(Math.min(SLICE_BYTES, byteLength));
    let crc = 0;
    for (let offset = 0; offset < byteLength; offset += buffer.length) {
      const bytes = buffer.subarray(0, byteLength - offset);
      await this.#source.read(name, offset, bytes);
      crc = crc32(bytes, crc);
      yield { bytes, offset };
      progress(name, bytes.length);
    }
    requireChecksum(this.#source, this.#checksums, name, crc);
  }
}

/** The options that map positions as these words say, if they are `describePositions`'. */
function positionFlags(positions: string): string {
  const [, mode, context] = /^(exact|repeat|interpolate)(?: \d+(?: to (\d+))?)?$/.exec(positions) ?? [];
  if (mode === undefined) return "the `--positions`";
  return `\`--positions ${mode}${context === undefined ? "" : ` --context ${context}`}\``;
}

const ANOTHER_FILE = "use another file";
const SAVE_ANOTHER = "use another file; a damaged session can only be saved again";

function describeSizes({ layers, heads, headDim, vocabSize }: Omit<SessionShape, "tokens">): string {
  return `${layers} layers of ${heads} heads of ${headDim} columns and ${vocabSize} logits`;
}

function tensorInfo(name: string, dtype: string, shape: readonly number[], elementBytes: number) {
  return { name, dtype, shape, byteLength: elementCount(shape) * elementBytes };
}

function rowsName(layer: number, which: "k" | "v"): string {
  return `h.${layer}.${which}`;
}

/** The tensors of keys and values, in the order of the file. */
function* rowTensors({ layers }: SessionShape) {
  for (let layer = 0; layer < layers; layer++) {
    for (const which of ["k", "v"] as const) yield { layer, which, name: rowsName(layer, which) };
  }
}

function bytesOf({ buffer, byteOffset, byteLength }: Uint32Array | Float32Array): Uint8Array {
  return new Uint8Array(buffer, byteOffset, byteLength);
}

function hex(crc: number): string {
  return crc.toString(16).padStart(8, "0");
}

function sessionMetadata(
  { model, positions, attention, rows }: SessionContents,
  checksums: ReadonlyMap<string, string>,
): Record<string, string> {
  return {
    [FORMAT]: VERSION,
    model,
    dtype: rows.elem,
    positions,
    attention,
    crc32: JSON.stringify(Object.fromEntries(checksums)),
  };
}

/** Counts the bytes of keys and values, reports them, and ends the work when it is aborted. */
function progressOf(shape: SessionShape, { signal, onProgress }: TransferOptions) {
  const { layers, heads, tokens, headDim, elem } = shape;
  const total = 2 * layers * heads * tokens * headDim * sizeOf(elem);
  let done = 0;
  signal?.throwIfAborted();
  return (name: string, bytes: number): void => {
    signal?.throwIfAborted();
    if (!name.startsWith("h.")) return;
    done += bytes;
    onProgress?.(done, total);
  };
}

/**
 * The first `wanted` bytes of every head out of the slices of `[heads, stored]` bytes, packed and in slices again.
 * @param buffer what holds them, a multiple of 16 bytes unless all fit
 */
async function* headStarts(
  slices: AsyncIterable<Slice>,
  stored: number,
  wanted: number,
  buffer: Uint8Array<ArrayBuffer>,
): AsyncGenerator<Slice> {
  let offset = 0;
  let filled = 0;
  for await (const slice of slices) {
    const end = slice.offset + slice.bytes.length;
    for (let head = slice.offset - slice.offset % stored; head < end; head += stored) {
      const last = Math.min(head + wanted, end);
      for (let from = Math.max(head, slice.offset); from < last;) {
        const to = Math.min(last, from + buffer.length - filled);
        buffer.set(slice.bytes.subarray(from - slice.offset, to - slice.offset), filled);
        filled += to - from;
        from = to;
        if (filled < buffer.length) continue;
        yield { bytes: buffer, offset };
        offset += filled;
        filled = 0;
      }
    }
  }
  if (filled > 0) yield { bytes: buffer.subarray(0, filled), offset };
}

/** The advice of the reader is to download a file again; that about permissions holds here, too. */
function withSessionHint(error: ModelError): ModelError {
  if (["EACCES", "EPERM"].includes(fileErrorCode(error.cause))) return error;
  return new ModelError(error.message, { hint: SAVE_ANOTHER, cause: error });
}

function checkHeader(source: SafetensorsSource): SessionHeader {
  const { description: path, metadata } = source;
  const version = metadata.get(FORMAT);
  if (version === undefined) {
    throw new ModelError(`${path} is a safetensors file, but not a session`, {
      hint: "name a file that longform saved a session in, or one that does not exist yet",
    });
  }
  if (version !== VERSION) {
    throw new ModelError(
      `${path} is a session of version ${quoteName(version)}, this longform reads ${VERSION}`,
      {
        hint: "use the longform that it was saved with, or another file",
      },
    );
  }
  const shape = checkTensors(source);
  const elem = readMetadata(source, "dtype");
  if (elem !== shape.elem) {
    throw damaged(`${path} says that it is in ${quoteName(elem)}, but holds ${DTYPES[shape.elem]}`);
  }
  const origin = {
    model: readMetadata(source, "model"),
    positions: readMetadata(source, "positions"),
    // The first releases knew no other.
    attention: source.metadata.get("attention") ?? "dense",
  };
  return { origin, shape, checksums: readChecksums(source) };
}

function damaged(message: string): ModelError {
  return new ModelError(message, { hint: SAVE_ANOTHER });
}

function readMetadata({ description, metadata }: SafetensorsSource, key: string): string {
  const value = metadata.get(key);
  if (value === undefined) throw damaged(`${description} is a session without ${key}`);
  return value;
}

/** Takes the sizes from some tensors, and requires that all are as these sizes make them. */
function checkTensors({ description: path, tensors }: SafetensorsSource): SessionShape {
  const keys = tensors.get(rowsName(0, "k"));
  const [heads = 0, tokens = 0, headDim = 0] = keys?.shape ?? [];
  const shape: SessionShape = {
    layers: Math.ceil((tensors.size - 2) / 2),
    heads,
    headDim,
    elem: keys?.dtype === DTYPES.f32 ? "f32" : "f16",
    tokens,
    vocabSize: tensors.get("logits")?.shape[0] ?? 0,
  };
  const expected = sessionTensors(shape);
  for (const { name, dtype, shape } of expected) {
    const found = tensors.get(name);
    if (!found) throw damaged(`${path} is a session without tensor ${quoteName(name)}`);
    const isAlike = found.shape.length === shape.length && shape.every((size, i) => size === found.shape[i]);
    if (found.dtype === dtype && isAlike) continue;
    const what = `${found.dtype} ${formatShape(found.shape)}`;
    throw damaged(`Tensor ${quoteName(name)} in ${path} is ${what}, wanted ${dtype} ${formatShape(shape)}`);
  }
  if (heads * headDim === 0 || tokens < 1 || tokens > MAX_TOKENS) {
    throw damaged(`${path} is a session of ${tokens} tokens, ${heads} heads and ${headDim} columns`);
  }
  return shape;
}

function readChecksums(source: SafetensorsSource): Checksums {
  const { description: path, tensors } = source;
  const json = readMetadata(source, "crc32");
  let values: unknown;
  try {
    values = JSON.parse(json);
  } catch {
    // Judged below, as anything else that is no list of checksums.
  }
  const found = new Map(isJsonObject(values) ? Object.entries(values) : []);
  return new Map([...tensors.keys()].map((name) => {
    const value = found.get(name);
    if (typeof value === "string" && /^[0-9a-f]{8}$/.test(value)) return [name, parseInt(value, 16)];
    throw damaged(`${path} is a session without a checksum of tensor ${quoteName(name)}`);
  }));
}

/** Reads a tensor whole. */
async function readVerified(
  source: SafetensorsSource,
  checksums: Checksums,
  name: string,
): Promise<ArrayBuffer> {
  const bytes = new Uint8Array(source.tensors.get(name)!.byteLength);
  await source.read(name, 0, bytes);
  requireChecksum(source, checksums, name, crc32(bytes));
  return bytes.buffer;
}

function requireChecksum(
  { description }: SafetensorsSource,
  checksums: Checksums,
  name: string,
  crc: number,
): void {
  if (crc === checksums.get(name)) return;
  throw damaged(
    `Tensor ${quoteName(name)} in ${description} is damaged: its bytes are not those that were saved`,
  );
}

async function readIds(
  source: SafetensorsSource,
  { shape: { vocabSize }, checksums }: SessionHeader,
): Promise<Uint32Array> {
  const ids = new Uint32Array(await readVerified(source, checksums, "input_ids"));
  const outside = ids.find((id) => id >= vocabSize);
  if (outside === undefined) return ids;
  throw damaged(`${source.description} holds the token ${outside}, outside its vocabulary of ${vocabSize}`);
}
