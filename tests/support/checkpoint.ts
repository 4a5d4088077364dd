/** Writes small checkpoints for tests: whole models of seeded random weights, and deliberately broken files. */
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { expectedShapes } from "../../src/model/checkpoint.ts";
import { configFromSizes, configToJson, type GPT2Config } from "../../src/model/config.ts";
import { convertElements, f16ToF32, f32ToF16 } from "../../src/model/float16.ts";
import { encodeSafetensorsHeader } from "../../src/model/safetensors.ts";
import { elementCount, type StoredDType } from "../../src/model/weight_source.ts";

/** One tensor of a file to be written. */
export interface FileTensor {
  readonly name: string;
  readonly dtype: string;
  readonly shape: readonly number[];
  readonly bytes: Uint8Array;
}

export interface TinyOptions {
  /** Anything of the config; the default is 2 layers of 2 heads, width 8, 16 positions, 11 tokens. */
  readonly config?: Partial<GPT2Config>;
  readonly dtype?: StoredDType;
  readonly seed?: number;
  /** Before the names of the network itself; `transformer.` unless given, `""` for none. */
  readonly prefix?: string;
  /**
   * `tied` stores no `lm_head.weight`, `listed` stores a copy of wte under that name, `separate` stores a matrix of
   * its own and clears `tie_word_embeddings`.
   */
  readonly lmHead?: "tied" | "listed" | "separate";
  /** Adds `score.weight` with this many classes, and names for them. */
  readonly classes?: number;
  /** Adds the causal mask buffers of old checkpoints. */
  readonly buffers?: boolean;
  /** Sets one element, named canonically, to NaN or to `value`. */
  readonly inject?: { readonly tensor: string; readonly element: number; readonly value?: number };
  /** Canonical names to leave out. */
  readonly omit?: readonly string[];
  /** Shapes to write in place of the right ones, by canonical name. */
  readonly reshape?: Readonly<Record<string, readonly number[]>>;
  /** Stores one tensor, by canonical name, as another type (zeros). */
  readonly retype?: { readonly tensor: string; readonly dtype: string; readonly bytesPerElement: number };
  /** Tensors that do not belong to GPT-2, written as given. */
  readonly extra?: readonly FileTensor[];
  /** Spreads the tensors over this many files with an index. */
  readonly shards?: number;
}

export interface TinyCheckpoint {
  readonly dir: string;
  readonly config: GPT2Config;
  /** By canonical name, the values as stored: rounded to the checkpoint's type. */
  readonly values: ReadonlyMap<string, Float32Array>;
}

/** A new folder under the system's temporary one, and its removal for `afterAll`. */
export function temporaryFolder(): { path: string; remove: () => void } {
  const path = mkdtempSync(join(tmpdir(), "longform-test-"));
  return { path, remove: () => rmSync(path, { recursive: true, force: true }) };
}

/** Writes a tiny random GPT-2 to `dir`, which is created: `model.safetensors` (or shards) and `config.json`. */
export function writeTinyCheckpoint(dir: string, options: TinyOptions = {}): TinyCheckpoint {
  const { dtype = "F32", prefix = "transformer.", lmHead = "tied", classes = 0 } = options;
  const config = tinyConfig(options);
  const values = tinyValues(config, options);
  const tensors: FileTensor[] = [];
  for (const [name, numbers] of values) {
    if (options.omit?.includes(name)) continue;
    const fullName = name === "lm_head.weight" || name === "score.weight" ? name : prefix + name;
    const shape = options.reshape?.[name] ?? shapeOf(name, config, classes);
    tensors.push(retyped(options, name, {
      name: fullName,
      dtype,
      shape,
      bytes: encodeElements(resized(numbers, elementCount(shape)), dtype),
    }));
    if (options.buffers && name.endsWith("attn.c_attn.weight")) {
      tensors.push(...maskBuffers(prefix + name.replace("c_attn.weight", ""), config.nPositions));
    }
  }
  if (lmHead === "listed") {
    const wte = tensors.find((tensor) => tensor.name === `${prefix}wte.weight`);
    if (wte) tensors.push({ ...wte, name: "lm_head.weight" });
  }
  tensors.push(...options.extra ?? []);
  mkdirSync(dir, { recursive: true });
  writeFileSync(join(dir, "config.json"), JSON.stringify(configToJson(config), null, 2));
  if (options.shards === undefined) writeSafetensors(join(dir, "model.safetensors"), tensors);
  else writeShards(dir, tensors, options.shards);
  return { dir, config, values };
}

function tinyConfig({ config = {}, lmHead, classes }: TinyOptions): GPT2Config {
  const sizes = { nLayer: 2, nHead: 2, nEmbd: 8, nPositions: 16, vocabSize: 11, ...config };
  return {
    ...configFromSizes(sizes),
    ...(lmHead === "separate" && { tieWordEmbeddings: false }),
    ...(classes && { id2label: Array.from({ length: classes }, (_, id) => `class ${id}`) }),
    ...config,
  };
}

function shapeOf(name: string, config: GPT2Config, classes: number): readonly number[] {
  if (name === "lm_head.weight") return [config.vocabSize, config.nEmbd];
  if (name === "score.weight") return [classes, config.nEmbd];
  return expectedShapes(config).get(name)!;
}

function tinyValues(config: GPT2Config, options: TinyOptions): Map<string, Float32Array> {
  const { dtype = "F32", classes = 0, inject, seed = 1 } = options;
  const random = uniform(seed);
  const names = [...expectedShapes(config).keys()];
  if (!config.tieWordEmbeddings) names.push("lm_head.weight");
  if (classes > 0) names.push("score.weight");
  const values = new Map<string, Float32Array>();
  for (const name of names) {
    const isGain = /ln_(1|2|f)\.weight$/.test(name);
    const numbers = Float32Array.from(
      { length: elementCount(shapeOf(name, config, classes)) },
      () => isGain ? 1 + 0.2 * random() : 0.4 * random(),
    );
    if (inject?.tensor === name) numbers[inject.element] = inject.value ?? NaN;
    values.set(name, decodeElements(encodeElements(numbers, dtype), dtype));
  }
  return values;
}

function resized(numbers: Float32Array, length: number): Float32Array {
  const out = new Float32Array(length);
  out.set(numbers.subarray(0, length));
  return out;
}

function retyped({ retype }: TinyOptions, name: string, tensor: FileTensor): FileTensor {
  if (retype?.tensor !== name) return tensor;
  const bytes = new Uint8Array(elementCount(tensor.shape) * retype.bytesPerElement);
  return { ...tensor, dtype: retype.dtype, bytes };
}

function maskBuffers(prefix: string, nPositions: number): FileTensor[] {
  const mask = new Uint8Array(nPositions * nPositions);
  return [
    { name: `${prefix}bias`, dtype: "BOOL", shape: [1, 1, nPositions, nPositions], bytes: mask },
    { name: `${prefix}masked_bias`, dtype: "F32", shape: [], bytes: new Uint8Array(4) },
  ];
}

function writeShards(dir: string, tensors: readonly FileTensor[], shards: number): void {
  const weightMap: Record<string, string> = {};
  const pad = (n: number) => String(n).padStart(5, "0");
  for (let shard = 0; shard < shards; shard++) {
    const file = `model-${pad(shard + 1)}-of-${pad(shards)}.safetensors`;
    const own = tensors.filter((_, i) => i % shards === shard);
    for (const { name } of own) weightMap[name] = file;
    writeSafetensors(join(dir, file), own);
  }
  writeIndex(dir, weightMap);
}

/** Writes `model.safetensors.index.json`. */
export function writeIndex(dir: string, weightMap: Readonly<Record<string, unknown>>): void {
  const index = { metadata: {}, weight_map: weightMap };
  writeFileSync(join(dir, "model.safetensors.index.json"), JSON.stringify(index));
}

/** Writes a well-formed safetensors file. */
export function writeSafetensors(path: string, tensors: readonly FileTensor[]): void {
  const header = encodeSafetensorsHeader(
    tensors.map((tensor) => ({ ...tensor, byteLength: tensor.bytes.byteLength })),
    { format: "pt" },
  );
  writeFileSync(path, Buffer.concat([header, ...tensors.map((tensor) => tensor.bytes)]));
}

/**
 * Writes a file with any header, right or wrong.
 * @param header text or raw bytes as they are, anything else as JSON
 * @param claimedLength what the first 8 bytes say, if not the truth
 */
export function writeRawSafetensors(
  path: string,
  header: unknown,
  data: Uint8Array,
  claimedLength?: bigint,
): void {
  const json = header instanceof Uint8Array
    ? header
    : new TextEncoder().encode(typeof header === "string" ? header : JSON.stringify(header));
  const length = new Uint8Array(8);
  new DataView(length.buffer).setBigUint64(0, claimedLength ?? BigInt(json.length), true);
  writeFileSync(path, Buffer.concat([length, json, data]));
}

/** The bytes of these numbers in a stored type, rounded to nearest even. */
export function encodeElements(numbers: Float32Array, dtype: StoredDType): Uint8Array {
  if (dtype === "F32") return new Uint8Array(numbers.slice().buffer);
  if (dtype === "F16") return new Uint8Array(Uint16Array.from(numbers, f32ToF16).buffer);
  const bits = new Uint32Array(numbers.slice().buffer);
  const narrow = (x: number) =>
    (x & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (x + 0x7fff + ((x >>> 16) & 1)) >>> 16;
  return new Uint8Array(Uint16Array.from(bits, narrow).buffer);
}

/** The numbers that these bytes hold. */
export function decodeElements(bytes: Uint8Array, dtype: StoredDType): Float32Array {
  if (dtype === "F16") {
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    return Float32Array.from({ length: bytes.length / 2 }, (_, i) => f16ToF32(view.getUint16(2 * i, true)));
  }
  return new Float32Array(convertElements(bytes, dtype, "f32").bytes.slice().buffer);
}

/** Seeded numbers in [-1, 1): a 32-bit linear congruential generator, its top bits. */
function uniform(seed: number): () => number {
  let state = (Math.imul(seed, 0x9e3779b1) ^ 0x6d2b79f5) >>> 0;
  return () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return (state >>> 8) / 2 ** 23 - 1;
  };
}
