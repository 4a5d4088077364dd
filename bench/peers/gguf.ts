/**
 * GPT-2 as a GGUF file, which llama.cpp loads: names, types and metadata as its own converter gives them.
 *
 *     bun bench/peers/gguf.ts (--model DIR | --model-shape SHAPE [--contexts 1k,4k]) [--dtype f16]
 *       --out FILE.gguf
 *
 * A published shape gets positions for the largest context.
 * @see https://github.com/ggml-org/ggml/blob/master/docs/gguf.md for the format
 */
import { open } from "node:fs/promises";
import { join } from "node:path";
import process from "node:process";
import { type LoadableTensor, resolveCheckpoint } from "../../src/model/checkpoint.ts";
import type { GPT2Config } from "../../src/model/config.ts";
import { convertElements } from "../../src/model/float16.ts";
import { fileErrorCode, isJsonObject, readJsonObject } from "../../src/model/json_file.ts";
import { elementCount, type WeightSource } from "../../src/model/weight_source.ts";
import { ModelError } from "../../src/runtime/errors.ts";
import { type Elem, sizeOf } from "../../src/runtime/kernel.ts";
import { chosenModel, messageOf, openModel, parseConversion } from "./peer.ts";

/** A byte-level BPE; llama.cpp loads no model without one, although only ids are given to it here. */
export interface Vocabulary {
  /** By id; all are different. */
  readonly tokens: readonly string[];
  /** Pairs with a space between, the first to merge first. */
  readonly merges: readonly string[];
  /** Ids that stand for no text, such as `<|endoftext|>`. */
  readonly special: ReadonlySet<number>;
}

const VERSION = 3;
/** Of tensors in the file, unless `general.alignment` says otherwise. */
const ALIGNMENT = 32;
/** `ggml_type`. */
const GGML_TYPE: Readonly<Record<Elem, number>> = { f32: 0, f16: 1 };
/** `llama_ftype`: of matrices; vectors are F32 in both. */
const FILE_TYPE: Readonly<Record<Elem, number>> = { f32: 0, f16: 1 };
/** `gguf_metadata_value_type`. */
const VALUE_TYPE = { i32: 5, u32: 4, f32: 6, bool: 7, string: 8, array: 9 } as const;
/** `llama_token_type`. */
const TOKEN_TYPE = { normal: 1, control: 3 } as const;

type Scalar = Exclude<keyof typeof VALUE_TYPE, "array">;
type Value =
  | { readonly type: "bool"; readonly value: boolean }
  | { readonly type: "string"; readonly value: string }
  | { readonly type: "i32" | "u32" | "f32"; readonly value: number }
  | { readonly type: "array"; readonly of: "string"; readonly value: readonly string[] }
  | { readonly type: "array"; readonly of: "i32"; readonly value: readonly number[] };

/** A tensor of the file, and where it comes from. */
interface GgufTensor {
  readonly name: string;
  readonly from: LoadableTensor;
  /** Rows and columns are exchanged: Conv1D stores `[in, out]`, ggml multiplies by rows of `in`. */
  readonly isTransposed: boolean;
  readonly elem: Elem;
  /** ggml's order: the dimension that is contiguous comes first. */
  readonly dimensions: readonly number[];
  readonly byteLength: number;
}

/** Canonical names of a block's parts, and llama.cpp's. */
const BLOCK_NAMES: Readonly<Record<string, string>> = {
  "ln_1": "attn_norm",
  "attn.c_attn": "attn_qkv",
  "attn.c_proj": "attn_output",
  "ln_2": "ffn_norm",
  "mlp.c_fc": "ffn_up",
  "mlp.c_proj": "ffn_down",
};
const NAMES: Readonly<Record<string, string>> = {
  wte: "token_embd",
  wpe: "position_embd",
  ln_f: "output_norm",
  lm_head: "output",
};

/** llama.cpp's name of a tensor, by its canonical one: `h.0.ln_1.bias` is `blk.0.attn_norm.bias`. */
function ggufName(canonical: string): string {
  const [, layer, part, kind] = /^(?:h\.(\d+)\.)?(.+)\.(weight|bias)$/.exec(canonical)!;
  return layer === undefined ? `${NAMES[part!]}.${kind}` : `blk.${layer}.${BLOCK_NAMES[part!]}.${kind}`;
}

/**
 * The vocabulary of a folder's tokenizer.json, or, where there is none, made-up tokens for as many ids.
 * @throws ModelError when they are more than the model's, or no byte-level BPE
 */
export async function readVocabulary(dir: string | undefined, vocabSize: number): Promise<Vocabulary> {
  const path = dir === undefined ? undefined : join(dir, "tokenizer.json");
  const json = path === undefined ? undefined : await readJsonObject(path).catch((error: unknown) => {
    if (error instanceof ModelError && fileErrorCode(error.cause) === "ENOENT") return undefined;
    throw error;
  });
  if (!json) {
    const tokens = Array.from({ length: vocabSize }, (_, id) => `token${id}`);
    return { tokens, merges: [], special: new Set() };
  }
  const { model, added_tokens: added = [] } = json;
  const wrong = (what: string) =>
    new ModelError(`${path} ${what}`, { hint: "give llama.cpp a checkpoint with GPT-2's own tokenizer" });
  if (!isJsonObject(model) || model["type"] !== "BPE" || !isJsonObject(model["vocab"])) {
    throw wrong("holds no byte-level BPE");
  }
  const tokens = new Array<string>(vocabSize);
  for (const [token, id] of Object.entries(model["vocab"] as Record<string, number>)) tokens[id] = token;
  const special = new Set<number>();
  for (const { id, content, special: isSpecial } of added as readonly AddedToken[]) {
    tokens[id] = content;
    if (isSpecial) special.add(id);
  }
  // Rows of `wte` that pad it to a round number have no token.
  const padded = Array.from(tokens, (token, id) => token ?? `[PAD${id}]`);
  if (padded.length !== vocabSize) {
    throw wrong(`has ids up to ${padded.length - 1}, the model ${vocabSize} tokens`);
  }
  const merges = (model["merges"] as readonly (string | readonly string[])[])
    .map((merge) => typeof merge === "string" ? merge : merge.join(" "));
  return { tokens: padded, merges, special };
}

interface AddedToken {
  readonly id: number;
  readonly content: string;
  readonly special: boolean;
}

function metadata(
  config: GPT2Config,
  { tokens, merges, special }: Vocabulary,
  elem: Elem,
  name: string,
): Record<string, Value> {
  const u32 = (value: number) => ({ type: "u32", value }) as const;
  const types = tokens.map((_, id) => special.has(id) ? TOKEN_TYPE.control : TOKEN_TYPE.normal);
  const [eos] = config.eosTokenId;
  return {
    "general.architecture": { type: "string", value: "gpt2" },
    "general.name": { type: "string", value: name },
    "general.file_type": u32(FILE_TYPE[elem]),
    "gpt2.context_length": u32(config.nPositions),
    "gpt2.embedding_length": u32(config.nEmbd),
    "gpt2.feed_forward_length": u32(config.nInner),
    "gpt2.block_count": u32(config.nLayer),
    "gpt2.attention.head_count": u32(config.nHead),
    "gpt2.attention.layer_norm_epsilon": { type: "f32", value: config.layerNormEpsilon },
    "tokenizer.ggml.model": { type: "string", value: "gpt2" },
    "tokenizer.ggml.pre": { type: "string", value: "gpt-2" },
    "tokenizer.ggml.tokens": { type: "array", of: "string", value: tokens },
    "tokenizer.ggml.token_type": { type: "array", of: "i32", value: types },
    "tokenizer.ggml.merges": { type: "array", of: "string", value: merges },
    ...(config.bosTokenId === undefined ? {} : { "tokenizer.ggml.bos_token_id": u32(config.bosTokenId) }),
    ...(eos === undefined ? {} : { "tokenizer.ggml.eos_token_id": u32(eos) }),
    "tokenizer.ggml.add_bos_token": { type: "bool", value: false },
  };
}

/** Vectors, and positions, which are added and not multiplied, are F32 whatever the type of the matrices. */
function layOut(tensors: ReadonlyMap<string, LoadableTensor>, elem: Elem): GgufTensor[] {
  return [...tensors].filter(([canonical]) => canonical !== "score.weight").map(([canonical, from]) => {
    const isTransposed = /^h\.\d+\.(attn|mlp)\..*\.weight$/.test(canonical);
    const stored: Elem = from.shape.length === 1 || canonical === "wpe.weight" ? "f32" : elem;
    return {
      name: ggufName(canonical),
      from,
      isTransposed,
      elem: stored,
      dimensions: isTransposed ? from.shape : from.shape.toReversed(),
      byteLength: elementCount(from.shape) * sizeOf(stored),
    };
  });
}

/** Little-endian bytes, one value after another, without alignment. */
class ByteWriter {
  readonly #parts: Uint8Array[] = [];

  #number(bytes: number, set: (view: DataView) => void): void {
    const part = new Uint8Array(bytes);
    set(new DataView(part.buffer));
    this.#parts.push(part);
  }

  u32(value: number): void {
    this.#number(4, (view) => view.setUint32(0, value, true));
  }

  u64(value: number): void {
    this.#number(8, (view) => view.setBigUint64(0, BigInt(value), true));
  }

  string(text: string): void {
    const bytes = new TextEncoder().encode(text);
    this.u64(bytes.length);
    this.#parts.push(bytes);
  }

  scalar(type: Scalar, value: string | number | boolean): void {
    if (type === "string") this.string(value as string);
    else if (type === "bool") this.#number(1, (view) => view.setUint8(0, value ? 1 : 0));
    else if (type === "f32") this.#number(4, (view) => view.setFloat32(0, value as number, true));
    else if (type === "i32") this.#number(4, (view) => view.setInt32(0, value as number, true));
    else this.u32(value as number);
  }

  value(entry: Value): void {
    this.u32(VALUE_TYPE[entry.type]);
    if (entry.type !== "array") return this.scalar(entry.type, entry.value);
    this.u32(VALUE_TYPE[entry.of]);
    this.u64(entry.value.length);
    for (const value of entry.value) this.scalar(entry.of, value);
  }

  /** Everything so far, and zeros up to the next multiple of the alignment. */
  aligned(): Uint8Array {
    const bytes = Buffer.concat(this.#parts);
    return Buffer.concat([bytes, new Uint8Array(paddingAfter(bytes.length))]);
  }
}

function paddingAfter(bytes: number): number {
  return (ALIGNMENT - bytes % ALIGNMENT) % ALIGNMENT;
}

function encodeHeader(values: Readonly<Record<string, Value>>, tensors: readonly GgufTensor[]): Uint8Array {
  const entries = Object.entries(values);
  const out = new ByteWriter();
  out.u32(0x46554747); // "GGUF"
  out.u32(VERSION);
  out.u64(tensors.length);
  out.u64(entries.length);
  for (const [key, value] of entries) {
    out.string(key);
    out.value(value);
  }
  let offset = 0;
  for (const { name, dimensions, elem, byteLength } of tensors) {
    out.string(name);
    out.u32(dimensions.length);
    for (const size of dimensions) out.u64(size);
    out.u32(GGML_TYPE[elem]);
    out.u64(offset);
    offset += byteLength + paddingAfter(byteLength);
  }
  return out.aligned();
}

/** `[rows, columns]` to `[columns, rows]`. */
function transpose<T extends Uint16Array | Uint32Array>(from: T, into: T, rows: number): T {
  const columns = from.length / rows;
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      into[column * rows + row] = from[row * columns + column]!;
    }
  }
  return into;
}

/** A tensor's bytes as the file holds them. @throws ModelError when f16 cannot hold a value */
async function readTensor(source: WeightSource, tensor: GgufTensor): Promise<Uint8Array> {
  const { from, elem, isTransposed } = tensor;
  const stored = new Uint8Array(from.byteLength);
  await source.read(from.name, 0, stored);
  const { bytes, firstOverflow } = convertElements(stored, from.dtype, elem);
  if (firstOverflow >= 0) {
    throw new ModelError(`A weight of ${from.name} is too large for f16`, {
      hint: "convert with --dtype f32",
    });
  }
  if (!isTransposed) return bytes;
  const rows = from.shape[0]!;
  const { buffer, byteOffset, length } = bytes;
  const elements = length / sizeOf(elem);
  const transposed = elem === "f16"
    ? transpose(new Uint16Array(buffer, byteOffset, elements), new Uint16Array(elements), rows)
    : transpose(new Uint32Array(buffer, byteOffset, elements), new Uint32Array(elements), rows);
  return new Uint8Array(transposed.buffer);
}

/**
 * Writes a checkpoint as GGUF, without a classification head.
 * @returns bytes of the file
 * @throws ModelError for a checkpoint that is no GPT-2, or one that llama.cpp would compute otherwise
 */
export async function writeGguf(
  path: string,
  source: WeightSource,
  config: GPT2Config,
  vocabulary: Vocabulary,
  elem: Elem,
): Promise<number> {
  if (!config.scaleAttnWeights || config.scaleAttnByInverseLayerIdx) {
    throw new ModelError(`${source.description} scales attention scores as llama.cpp's GPT-2 does not`);
  }
  const tensors = layOut(resolveCheckpoint(source, config).tensors, elem);
  const file = await open(path, "w");
  let written = 0;
  const put = async (bytes: Uint8Array) => {
    for (let done = 0; done < bytes.length;) {
      done += (await file.write(bytes, done, bytes.length - done, written + done)).bytesWritten;
    }
    written += bytes.length;
  };
  try {
    await put(encodeHeader(metadata(config, vocabulary, elem, source.description), tensors));
    for (const tensor of tensors) {
      await put(await readTensor(source, tensor));
      await put(new Uint8Array(paddingAfter(tensor.byteLength)));
    }
  } finally {
    await file.close();
  }
  return written;
}

if (import.meta.main) {
  try {
    const values = parseConversion();
    const { out } = values;
    if (out === undefined) throw new Error("there is no --out FILE.gguf");
    const { model, dtype, ...choice } = chosenModel(values);
    const { config, source } = await openModel({ model, ...choice });
    const vocabulary = await readVocabulary(model, config.vocabSize);
    const bytes = await writeGguf(out, source, config, vocabulary, dtype);
    await source.close();
    console.error(`${out}: ${bytes} bytes`);
  } catch (error) {
    console.error(`error: ${messageOf(error)}`);
    process.exitCode = 1;
  }
}
