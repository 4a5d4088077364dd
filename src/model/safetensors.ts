/**
 * A strict reader of safetensors files: 8 bytes of header length (little-endian u64), a JSON header, then the data.
 * Only the header is read on opening; tensors are read by range. Everything a header claims is checked against the
 * size of the file before anything is allocated, so a damaged or hostile file costs an error message and no memory.
 * @see https://github.com/huggingface/safetensors for the format; the limits here are those of its reference reader
 */
import { stat } from "node:fs/promises";
import { join } from "node:path";
import { ModelError } from "../runtime/errors.ts";
import { printable } from "../runtime/printable.ts";
import { type FileVersion, openForReading, type ReadableFile } from "../runtime/program_files.ts";
import {
  decodeUtf8,
  fileError,
  fileErrorCode,
  isJsonObject,
  type JsonObject,
  parseJsonObject,
  readJsonObject,
  requireFolder,
} from "./json_file.ts";
import {
  formatShape,
  quoteName,
  tensorForRead,
  type TensorInfo,
  type WeightSource,
} from "./weight_source.ts";

/** Largest header that is read, in bytes. */
const MAX_HEADER_BYTES = 100_000_000;
/** Largest single read, well below the 2 GiB that file systems and runtimes allow. */
const MAX_READ_BYTES = 1 << 28;

/** Every element type of the format; most cannot be loaded, but a file may hold them. */
const DTYPE_BITS: ReadonlyMap<string, number> = new Map([
  ...["F4"].map((name) => [name, 4] as const),
  ...["F6_E2M3", "F6_E3M2"].map((name) => [name, 6] as const),
  ...["BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E5M2FNUZ", "F8_E4M3FNUZ"].map((name) =>
    [name, 8] as const
  ),
  ...["I16", "U16", "F16", "BF16"].map((name) => [name, 16] as const),
  ...["I32", "U32", "F32"].map((name) => [name, 32] as const),
  ...["I64", "U64", "F64", "C64"].map((name) => [name, 64] as const),
]);

const LEAVE_ALONE = "make sure nothing writes to the file, then try again";
const DOWNLOAD_AGAIN = "the file is damaged or incomplete: download it again";
const SAVE_AGAIN = "save the checkpoint again with a current version of the safetensors library";

/** A tensor's place in the data section, in bytes from its start. */
interface Extent {
  readonly info: TensorInfo;
  readonly begin: number;
  readonly end: number;
}

export interface SafetensorsSource extends WeightSource {
  /** The free-form `__metadata__` of the header. */
  readonly metadata: ReadonlyMap<string, string>;
}

/** Opens one safetensors file and checks its whole header. The caller closes it. */
export async function openSafetensors(path: string): Promise<SafetensorsSource> {
  const file = await openRegularFile(path);
  try {
    const version = await file.stat();
    const { extents, metadata, dataStart } = await readHeader(file, path, version);
    return safetensorsSource(file, path, version, extents, metadata, dataStart);
  } catch (error) {
    await file.close();
    throw error;
  }
}

/**
 * Opens the weights of a model folder: `model.safetensors`, or `model.safetensors.index.json` and the shards it names.
 * A folder with both is read like one with the single file, as Hugging Face does.
 */
export async function openCheckpoint(dir: string): Promise<WeightSource> {
  await requireFolder(dir);
  const single = join(dir, "model.safetensors");
  if (await exists(single)) return await openSafetensors(single);
  const index = join(dir, "model.safetensors.index.json");
  if (await exists(index)) return await openShards(dir, index);
  const pickled = await exists(join(dir, "pytorch_model.bin"));
  throw new ModelError(`There is no model.safetensors or model.safetensors.index.json in ${dir}`, {
    hint: pickled
      ? "convert pytorch_model.bin: load it with transformers and call save_pretrained(dir, safe_serialization=True)"
      : "put the weights there, or pass `--model` another folder",
  });
}

/**
 * The first bytes of a safetensors file with these tensors in this order, without gaps: length and header, padded with
 * spaces so that the data starts at a multiple of 8.
 */
export function encodeSafetensorsHeader(
  tensors: Iterable<Pick<TensorInfo, "name" | "dtype" | "shape" | "byteLength">>,
  metadata: Readonly<Record<string, string>> = {},
): Uint8Array {
  const header: Record<string, unknown> = { __metadata__: metadata };
  let begin = 0;
  for (const { name, dtype, shape, byteLength } of tensors) {
    header[name] = { dtype, shape, data_offsets: [begin, begin + byteLength] };
    begin += byteLength;
  }
  const json = new TextEncoder().encode(JSON.stringify(header));
  const padded = Math.ceil(json.length / 8) * 8;
  const bytes = new Uint8Array(8 + padded).fill(0x20);
  new DataView(bytes.buffer).setBigUint64(0, BigInt(padded), true);
  bytes.set(json, 8);
  return bytes;
}

async function openRegularFile(path: string): Promise<ReadableFile> {
  try {
    // Checked before opening: opening a pipe would wait for a writer.
    if (!(await stat(path)).isFile()) {
      throw new ModelError(`${path} is not a regular file`, { hint: "replace it with the safetensors file" });
    }
    return await openForReading(path);
  } catch (error) {
    throw error instanceof ModelError ? error : fileError(path, error);
  }
}

async function exists(path: string): Promise<boolean> {
  try {
    await stat(path);
    return true;
  } catch (error) {
    if (fileErrorCode(error) === "ENOENT") return false;
    throw fileError(path, error);
  }
}

function safetensorsSource(
  file: ReadableFile,
  path: string,
  version: FileVersion,
  extents: readonly Extent[],
  metadata: ReadonlyMap<string, string>,
  dataStart: number,
): SafetensorsSource {
  const places = new Map(extents.map((extent) => [extent.info.name, extent.begin]));
  let closed = false;
  const source: SafetensorsSource = {
    description: path,
    metadata,
    tensors: new Map(extents.map((extent) => [extent.info.name, extent.info])),
    async read(name, offset, into) {
      tensorForRead(source, name, offset, into.byteLength);
      await readFully(file, dataStart + places.get(name)! + offset, into, path, `tensor ${quoteName(name)}`);
      await requireUnchanged(file, path, version);
    },
    async close() {
      if (closed) return;
      closed = true;
      await file.close();
    },
  };
  return source;
}

/** Fills `into` from `position`; `what` names the bytes when the file turns out to end before them. */
async function readFully(
  file: ReadableFile,
  position: number,
  into: Uint8Array,
  path: string,
  what: string,
): Promise<void> {
  let done = 0;
  while (done < into.byteLength) {
    const length = Math.min(MAX_READ_BYTES, into.byteLength - done);
    let bytesRead: number;
    try {
      ({ bytesRead } = await file.read(into, done, length, position + done));
    } catch (error) {
      throw fileError(path, error);
    }
    if (bytesRead === 0) {
      throw new ModelError(`${path} ended while ${what} was read: it was changed or cut short`, {
        hint: LEAVE_ALONE,
      });
    }
    done += bytesRead;
  }
}

/** What is written to a file while it is read is otherwise noticed by nobody: some tensors would be the new ones. */
async function requireUnchanged(file: ReadableFile, path: string, version: FileVersion): Promise<void> {
  const { size, mtimeMs } = await file.stat();
  if (size === version.size && mtimeMs === version.mtimeMs) return;
  throw new ModelError(`${path} was changed while it was read`, { hint: LEAVE_ALONE });
}

async function readHeader(file: ReadableFile, path: string, { size }: FileVersion) {
  if (size < 8) {
    throw new ModelError(
      `${path} is not a safetensors file: it has ${size} bytes, the header length alone takes 8`,
      {
        hint: DOWNLOAD_AGAIN,
      },
    );
  }
  const prefix = new Uint8Array(8);
  await readFully(file, 0, prefix, path, "the header length");
  const claimed = new DataView(prefix.buffer).getBigUint64(0, true);
  if (new TextDecoder("latin1").decode(prefix) === "version ") {
    throw new ModelError(`${path} is a Git LFS pointer, not the weights themselves`, {
      hint: "run `git lfs pull` in that repository, or download the file again",
    });
  }
  if (claimed > BigInt(size - 8)) {
    throw new ModelError(`${path} claims a header of ${claimed} bytes, but only ${size - 8} follow`, {
      hint: "the file is truncated or is no safetensors file: download it again",
    });
  }
  if (claimed > MAX_HEADER_BYTES) {
    throw new ModelError(
      `${path} claims a header of ${claimed} bytes, the format allows ${MAX_HEADER_BYTES}`,
      {
        hint: DOWNLOAD_AGAIN,
      },
    );
  }
  const bytes = new Uint8Array(Number(claimed));
  await readFully(file, 8, bytes, path, "the header");
  if (bytes[0] !== 0x7b) {
    throw new ModelError(`The header of ${path} does not start with "{"`, { hint: DOWNLOAD_AGAIN });
  }
  const where = `The header of ${path}`;
  const header = parseJsonObject(bytes, where, DOWNLOAD_AGAIN);
  if (colons(decodeUtf8(bytes, where, DOWNLOAD_AGAIN)) !== keys(header)) {
    // JSON.parse keeps the last of two equal keys, and which one a reader keeps must not matter.
    throw new ModelError(`The header of ${path} lists a tensor, or what it says of one, more than once`, {
      hint: DOWNLOAD_AGAIN,
    });
  }
  const extents = Object.entries(header).filter(([name]) => name !== "__metadata__")
    .map(([name, entry]) => parseEntry(name, entry, path));
  checkCoverage(extents, size - 8 - bytes.length, path);
  return { extents, metadata: parseMetadata(header, path), dataStart: 8 + bytes.length };
}

function parseMetadata(header: JsonObject, path: string): ReadonlyMap<string, string> {
  if (!Object.hasOwn(header, "__metadata__")) return new Map();
  const metadata = header["__metadata__"];
  if (!isJsonObject(metadata)) {
    throw new ModelError(`__metadata__ in the header of ${path} is not an object`, { hint: SAVE_AGAIN });
  }
  const entries = Object.entries(metadata).map(([key, value]) => {
    if (typeof value === "string") return [key, value] as const;
    throw new ModelError(
      `__metadata__ in the header of ${path} holds ${quoteName(key)}, which is not a string`,
      {
        hint: SAVE_AGAIN,
      },
    );
  });
  return new Map(entries);
}

/** One header entry: everything about it that can be judged without the others. */
function parseEntry(name: string, entry: unknown, path: string): Extent {
  const refuse = (problem: string): never => {
    throw new ModelError(`Tensor ${quoteName(name)} in ${path} ${problem}`, { hint: DOWNLOAD_AGAIN });
  };
  if (!isJsonObject(entry)) return refuse("has a header entry that is not an object");
  const { dtype, shape, data_offsets: offsets } = entry;
  const bits = typeof dtype === "string" ? DTYPE_BITS.get(dtype) : undefined;
  if (typeof dtype !== "string") return refuse("has no dtype");
  if (bits === undefined) return refuse(`has the unknown dtype ${quoteName(dtype)}`);
  if (!isSizeList(shape)) return refuse("has a shape that is not a list of whole numbers");
  if (!isSizeList(offsets) || offsets.length !== 2) {
    return refuse("has data_offsets that are not two whole numbers");
  }
  const [begin, end] = offsets as [number, number];
  if (begin > end) return refuse(`has data_offsets [${begin}, ${end}] that run backwards`);
  let elements = 1;
  for (const size of shape) {
    elements *= size;
    // Beyond 2^53 products lose precision, so an overflow is refused before it could look equal to something, and
    // before a size of 0 behind it hides it.
    if (!Number.isSafeInteger(elements)) return refuse(`has the impossible shape ${formatShape(shape)}`);
  }
  const byteLength = (bits % 8 === 0) ? elements * (bits / 8) : (elements * bits) / 8;
  if (!Number.isInteger(byteLength)) return refuse(`has a ${dtype} shape that does not fill whole bytes`);
  if (byteLength !== end - begin) {
    return refuse(`needs ${byteLength} bytes for ${dtype} ${formatShape(shape)}, but has ${end - begin}`);
  }
  return { info: { name, dtype, shape, byteLength, file: path }, begin, end };
}

/** The extents must tile the data exactly: no overlap, no hole, nothing after the last and nothing missing. */
function checkCoverage(extents: readonly Extent[], dataBytes: number, path: string): void {
  const ordered = extents.toSorted((a, b) => a.begin - b.begin || a.end - b.end);
  let reached = 0;
  let previous = "";
  for (const { info, begin, end } of ordered) {
    const name = quoteName(info.name);
    if (begin < reached) {
      throw new ModelError(`Tensors ${previous} and ${name} in ${path} overlap`, { hint: DOWNLOAD_AGAIN });
    }
    if (begin > reached) {
      throw new ModelError(
        `${path} has ${begin - reached} bytes before tensor ${name} that belong to no tensor`,
        {
          hint: DOWNLOAD_AGAIN,
        },
      );
    }
    if (end > dataBytes) {
      throw new ModelError(
        `${path} ends inside tensor ${name}: ${end} bytes of data needed, ${dataBytes} there`,
        {
          hint: "the file is truncated: download it again",
        },
      );
    }
    reached = end;
    previous = name;
  }
  if (reached < dataBytes) {
    throw new ModelError(
      `${path} has ${dataBytes - reached} bytes after the last tensor that belong to no tensor`,
      {
        hint: DOWNLOAD_AGAIN,
      },
    );
  }
}

/** Colons outside of strings in valid JSON text: one for each key. */
function colons(json: string): number {
  let count = 0;
  for (let i = 0; i < json.length; i++) {
    const code = json.charCodeAt(i);
    if (code === 0x3a) count++;
    if (code !== 0x22) continue;
    // A string: skip to its closing quote.
    for (i++; json.charCodeAt(i) !== 0x22; i++) if (json.charCodeAt(i) === 0x5c) i++;
  }
  return count;
}

/** Keys of a parsed value and of all values in it, however deep. */
function keys(json: unknown): number {
  let count = 0;
  const rest = [json];
  while (rest.length > 0) {
    const value = rest.pop();
    if (typeof value !== "object" || value === null) continue;
    const values: unknown[] = Object.values(value);
    if (!Array.isArray(value)) count += values.length;
    for (const one of values) if (typeof one === "object") rest.push(one);
  }
  return count;
}

function isSizeList(value: unknown): value is readonly number[] {
  return Array.isArray(value) && value.every((size) => Number.isSafeInteger(size) && size >= 0);
}

/** The weight_map of an index file: shard name to the tensors that must be in it. */
async function readIndex(index: string): Promise<Map<string, string[]>> {
  const map = (await readJsonObject(index))["weight_map"];
  if (!isJsonObject(map) || Object.keys(map).length === 0) {
    throw new ModelError(`${index} has no weight_map`, { hint: "download the file again" });
  }
  const shards = new Map<string, string[]>();
  for (const [tensor, shard] of Object.entries(map)) {
    if (typeof shard !== "string" || !isPlainFileName(shard)) {
      const shown = typeof shard === "string" ? quoteName(shard) : "something that is no file name";
      throw new ModelError(
        `${index} places tensor ${quoteName(tensor)} in ${shown}, outside the model folder`,
        {
          hint: "shards must be .safetensors files beside the index; do not trust this checkpoint",
        },
      );
    }
    const listed = shards.get(shard);
    if (listed) listed.push(tensor);
    else shards.set(shard, [tensor]);
  }
  return shards;
}

/**
 * Names of the shards that an index names, all of them plain names of files beside it.
 * @throws ModelError when the index cannot be read, or names anything else
 */
export async function shardNames(index: string): Promise<string[]> {
  return [...(await readIndex(index)).keys()];
}

/** File systems take no longer names. */
const MAX_FILE_NAME = 255;

/** A file of the folder itself: no separators of any platform, no drive, nothing that a terminal would obey. */
function isPlainFileName(name: string): boolean {
  return name.length <= MAX_FILE_NAME && name === printable(name) && /^[^/\\:]+\.safetensors$/.test(name);
}

async function openShards(dir: string, index: string): Promise<WeightSource> {
  const shards = await readIndex(index);
  const opened: WeightSource[] = [];
  const close = async () => {
    for (const shard of opened) await shard.close();
  };
  try {
    const owner = new Map<string, WeightSource>();
    for (const [name, expected] of shards) {
      const path = join(dir, name);
      if (!(await exists(path))) {
        throw new ModelError(`Shard ${path} is missing, ${expected.length} tensors of ${index} are in it`, {
          hint: "download the missing shard",
        });
      }
      const shard = await openSafetensors(path);
      opened.push(shard);
      addShard(owner, shard, expected, index);
    }
    return shardedSource(index, owner, close);
  } catch (error) {
    await close();
    throw error;
  }
}

/** Enters the tensors of one shard, refusing what the index and the other shards contradict. */
function addShard(
  owner: Map<string, WeightSource>,
  shard: WeightSource,
  expected: readonly string[],
  index: string,
): void {
  const missing = expected.find((tensor) => !shard.tensors.has(tensor));
  if (missing !== undefined) {
    throw new ModelError(
      `${index} places tensor ${quoteName(missing)} in ${shard.description}, which lacks it`,
      {
        hint: "index and shards do not belong together: download all of them again",
      },
    );
  }
  for (const tensor of shard.tensors.keys()) {
    const other = owner.get(tensor);
    if (other) {
      throw new ModelError(
        `Tensor ${quoteName(tensor)} is in both ${other.description} and ${shard.description}`,
        {
          hint: "index and shards do not belong together: download all of them again",
        },
      );
    }
    owner.set(tensor, shard);
  }
}

function shardedSource(
  index: string,
  owner: Map<string, WeightSource>,
  close: () => Promise<void>,
): WeightSource {
  const source: WeightSource = {
    description: index,
    tensors: new Map([...owner].map(([tensor, shard]) => [tensor, shard.tensors.get(tensor)!])),
    async read(name, offset, into) {
      tensorForRead(source, name, offset, into.byteLength);
      await owner.get(name)!.read(name, offset, into);
    },
    close,
  };
  return source;
}
