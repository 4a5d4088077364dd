/**
 * GPT-2 as an ONNX model: a decoder with a KV cache, laid out as ONNX Runtime's WebGPU provider runs it best.
 *
 *     bun bench/peers/onnx.ts (--model DIR | --model-shape SHAPE [--contexts 1k,4k]) [--dtype f16] --out FOLDER
 *
 * Attention is one fused operator over a cache that it can update in place, residuals and biases are part of
 * the norms and activations that follow them, and only the last token meets the output head. The weights lie
 * beside the graph, so that a model may exceed protobuf's 2 GB. A published shape gets positions for the
 * largest context.
 * @see https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md for the operators of
 * `com.microsoft`
 */
import { type FileHandle, open, writeFile } from "node:fs/promises";
import { join } from "node:path";
import process from "node:process";
import { type LoadableTensor, resolveCheckpoint } from "../../src/model/checkpoint.ts";
import type { GPT2Config } from "../../src/model/config.ts";
import { convertElements, STORED_BYTES } from "../../src/model/float16.ts";
import { elementCount, type WeightSource } from "../../src/model/weight_source.ts";
import { ModelError } from "../../src/runtime/errors.ts";
import { type Elem, sizeOf } from "../../src/runtime/kernel.ts";
import { chosenModel, loadPackage, messageOf, openModel, parseConversion } from "./peer.ts";

/** The fields of ONNX's messages that are used here, as the package onnx-buf spells them. */
export interface OnnxModel {
  readonly irVersion: bigint;
  readonly producerName: string;
  readonly opsetImport: readonly {
    readonly domain: string;
    readonly version: bigint;
  }[];
  readonly graph: OnnxGraph;
}

export interface OnnxGraph {
  readonly name: string;
  /** Every node after the ones whose outputs it reads. */
  readonly node: readonly OnnxNode[];
  readonly initializer: readonly OnnxTensor[];
  readonly input: readonly OnnxValue[];
  readonly output: readonly OnnxValue[];
}

export interface OnnxNode {
  readonly name: string;
  readonly opType: string;
  readonly domain: string;
  /** An empty name leaves an optional input, or output, out. */
  readonly input: readonly string[];
  readonly output: readonly string[];
  readonly attribute: readonly OnnxAttribute[];
}

interface OnnxAttribute {
  readonly name: string;
  readonly type: number;
  readonly i?: bigint;
  readonly f?: number;
}

export interface OnnxTensor {
  readonly name: string;
  readonly dataType: number;
  readonly dims: readonly bigint[];
  readonly rawData?: Uint8Array;
  readonly dataLocation?: number;
  readonly externalData?: readonly {
    readonly key: string;
    readonly value: string;
  }[];
}

export interface OnnxValue {
  readonly name: string;
  readonly type: {
    readonly value: {
      readonly case: "tensorType";
      readonly value: OnnxTensorType;
    };
  };
}

interface OnnxTensorType {
  readonly elemType: number;
  readonly shape: {
    readonly dim: readonly { readonly value: OnnxDimension }[];
  };
}

type OnnxDimension =
  | { readonly case: "dimValue"; readonly value: bigint }
  | { readonly case: "dimParam"; readonly value: string };

declare const schema: unique symbol;
/** A message's description. */
interface Schema {
  readonly [schema]: true;
}

/** What is used of the package @bufbuild/protobuf. */
interface Protobuf {
  create(schema: Schema, init: OnnxModel): unknown;
  toBinary(schema: Schema, message: unknown): Uint8Array;
}

/** What is used of the package onnx-buf, which holds ONNX's own schema. */
interface OnnxBuf {
  readonly ModelProtoSchema: Schema;
}

/** `TensorProto.DataType`. */
const FLOAT = 1;
const INT32 = 6;
const INT64 = 7;
const FLOAT16 = 10;
const DATA_TYPE: Readonly<Record<Elem, number>> = { f32: FLOAT, f16: FLOAT16 };
/** `AttributeProto.AttributeType`. */
const FLOAT_ATTRIBUTE = 1;
const INT_ATTRIBUTE = 2;
/** `TensorProto.DataLocation`: in a file of its own. */
const EXTERNAL = 1;

const IR_VERSION = 10n;
const OPSET_VERSION = 21n;
const MICROSOFT = "com.microsoft";

/** What a folder holds: the decoder, its weights, and a model that makes the memory of its cache. */
export const DECODER_FILE = "decoder.onnx";
export const WEIGHTS_FILE = "weights.bin";
export const CACHE_FILE = "cache.onnx";

/** Weights are mapped into memory by the page. */
const PAGE_BYTES = 4096;
/** Source bytes read at a time. */
const SLICE_BYTES = 8 << 20;

/** Columns of the output head: the vocabulary, padded with zeros so that kernels can take four at a time. */
export function headColumns(config: GPT2Config): number {
  return Math.ceil(config.vocabSize / 4) * 4;
}

/** The cache's tensors, `[1, nHead, capacity, headDim]` each: what they are called as inputs and as outputs. */
export function cacheNames(
  config: GPT2Config,
): { readonly past: string; readonly present: string }[] {
  return Array.from(
    { length: config.nLayer },
    (_, layer) =>
      ["key", "value"].map((part) => ({
        past: `past.${layer}.${part}`,
        present: `present.${layer}.${part}`,
      })),
  ).flat();
}

/** One tensor of the weights file. */
interface Placed {
  readonly name: string;
  readonly info: LoadableTensor;
  /** As it is stored. */
  readonly shape: readonly number[];
  readonly isTransposed: boolean;
  readonly offset: number;
  readonly byteLength: number;
}

/** The output head is stored `[nEmbd, headColumns]`, as exporters do; a tied one is there a second time. */
function placeWeights(
  tensors: ReadonlyMap<string, LoadableTensor>,
  config: GPT2Config,
  elem: Elem,
): Placed[] {
  const placed: Placed[] = [];
  let end = 0;
  const place = (
    name: string,
    info: LoadableTensor,
    shape: readonly number[],
    isTransposed: boolean,
  ) => {
    const offset = Math.ceil(end / PAGE_BYTES) * PAGE_BYTES;
    const byteLength = elementCount(shape) * sizeOf(elem);
    placed.push({ name, info, shape, isTransposed, offset, byteLength });
    end = offset + byteLength;
  };
  for (const [name, info] of tensors) {
    if (name !== "lm_head.weight" && name !== "score.weight") {
      place(name, info, info.shape, false);
    }
  }
  const head = tensors.get("lm_head.weight") ?? tensors.get("wte.weight")!;
  place("lm_head.weight", head, [config.nEmbd, headColumns(config)], true);
  return placed;
}

/** Attributes are integers where they are bigints, and floats otherwise. */
function nodeOf(
  opType: string,
  name: string,
  input: readonly string[],
  output: readonly string[],
  attributes: Readonly<Record<string, bigint | number>> = {},
  domain = "",
): OnnxNode {
  const attribute = Object.entries(attributes).map((
    [name, value],
  ): OnnxAttribute =>
    typeof value === "bigint"
      ? { name, type: INT_ATTRIBUTE, i: value }
      : { name, type: FLOAT_ATTRIBUTE, f: value }
  );
  return { name, opType, domain, input, output, attribute };
}

/** @param shape sizes, and names for those that are known only at run time */
function valueOf(
  name: string,
  elemType: number,
  shape: readonly (number | string)[],
): OnnxValue {
  const dim = shape.map((size): { value: OnnxDimension } => ({
    value: typeof size === "string"
      ? { case: "dimParam", value: size }
      : { case: "dimValue", value: BigInt(size) },
  }));
  return {
    name,
    type: {
      value: { case: "tensorType", value: { elemType, shape: { dim } } },
    },
  };
}

function modelOf(graph: OnnxGraph): OnnxModel {
  return {
    irVersion: IR_VERSION,
    producerName: "longform",
    opsetImport: [{ domain: "", version: OPSET_VERSION }, {
      domain: MICROSOFT,
      version: 1n,
    }],
    graph,
  };
}

/** The nodes in the order of the forward pass; weights are inputs under their checkpoint names. */
function decoderNodes(config: GPT2Config): OnnxNode[] {
  const { nHead, headDim, nLayer, layerNormEpsilon } = config;
  const nodes: OnnxNode[] = [];
  const node = (...args: Parameters<typeof nodeOf>) => nodes.push(nodeOf(...args));
  const product = (name: string, x: string) =>
    node("MatMul", `${name}.product`, [x, `${name}.weight`], [
      `${name}.product`,
    ]);
  /** Adds what the last part computed, its bias and the residual stream, and takes the norm of the sum. */
  const addNorm = (
    name: string,
    x: string,
    bias: string,
    residual: string,
    sum: string,
  ) =>
    node(
      "SkipLayerNormalization",
      name,
      [x, residual, `${name}.weight`, `${name}.bias`, bias],
      [`${name}.out`, "", "", sum],
      { epsilon: layerNormEpsilon },
      MICROSOFT,
    );

  node("Gather", "wte", ["wte.weight", "input_ids"], ["wte.out"]);
  node("Gather", "wpe", ["wpe.weight", "position_ids"], ["wpe.out"]);
  let [x, bias, residual] = ["wte.out", "", "wpe.out"];
  const cache = cacheNames(config);
  for (let layer = 0; layer < nLayer; layer++) {
    const at = (name: string) => `h.${layer}.${name}`;
    const [key, value] = [cache[2 * layer]!, cache[2 * layer + 1]!];
    addNorm(at("ln_1"), x, bias, residual, at("ln_1.sum"));
    product(at("attn.c_attn"), at("ln_1.out"));
    node("Add", at("attn.qkv"), [
      at("attn.c_attn.product"),
      at("attn.c_attn.bias"),
    ], [at("attn.qkv")]);
    node(
      "GroupQueryAttention",
      at("attn"),
      [
        at("attn.qkv"),
        "",
        "",
        key.past,
        value.past,
        "last_key",
        "total_length",
      ],
      [at("attn.out"), key.present, value.present],
      {
        num_heads: BigInt(nHead),
        kv_num_heads: BigInt(nHead),
        scale: (config.scaleAttnWeights ? 1 / Math.sqrt(headDim) : 1) /
          (config.scaleAttnByInverseLayerIdx ? layer + 1 : 1),
      },
      MICROSOFT,
    );
    product(at("attn.c_proj"), at("attn.out"));
    addNorm(
      at("ln_2"),
      at("attn.c_proj.product"),
      at("attn.c_proj.bias"),
      at("ln_1.sum"),
      at("ln_2.sum"),
    );
    product(at("mlp.c_fc"), at("ln_2.out"));
    const hidden = [at("mlp.c_fc.product"), at("mlp.c_fc.bias")];
    node(
      "FastGelu",
      at("mlp.gelu"),
      hidden,
      [at("mlp.gelu.out")],
      {},
      MICROSOFT,
    );
    product(at("mlp.c_proj"), at("mlp.gelu.out"));
    [x, bias, residual] = [
      at("mlp.c_proj.product"),
      at("mlp.c_proj.bias"),
      at("ln_2.sum"),
    ];
  }
  node("Gather", "last.x", [x, "last"], ["last.x"], { axis: 1n });
  node("Gather", "last.residual", [residual, "last"], ["last.residual"], {
    axis: 1n,
  });
  addNorm("ln_f", "last.x", bias, "last.residual", "");
  product("lm_head", "ln_f.out");
  node("Cast", "logits", ["lm_head.product"], ["logits"], {
    to: BigInt(FLOAT),
  });
  return nodes;
}

/**
 * Inputs: `input_ids` and `position_ids` `[1, tokens]` i64; `last_key` `[1]` i32, the position of the last of
 * the tokens; `total_length`, a scalar i32, one more; the cache as it was. Outputs: `logits`
 * `[1, 1, headColumns]` f32 of the last token; the cache with the tokens' keys and values, in the same memory
 * if it is bound so.
 */
function decoderModel(
  config: GPT2Config,
  elem: Elem,
  weights: readonly Placed[],
): OnnxModel {
  const dataType = DATA_TYPE[elem];
  const external = weights.map((
    { name, shape, offset, byteLength },
  ): OnnxTensor => ({
    name,
    dataType,
    dims: shape.map(BigInt),
    dataLocation: EXTERNAL,
    externalData: [
      { key: "location", value: WEIGHTS_FILE },
      { key: "offset", value: String(offset) },
      { key: "length", value: String(byteLength) },
    ],
  }));
  const last: OnnxTensor = {
    name: "last",
    dataType: INT64,
    dims: [1n],
    rawData: new Uint8Array(BigInt64Array.of(-1n).buffer),
  };
  const cache = cacheNames(config);
  const cacheShape = [1, config.nHead, "capacity", config.headDim];
  return modelOf({
    name: "decoder",
    node: decoderNodes(config),
    initializer: [...external, last],
    input: [
      valueOf("input_ids", INT64, [1, "tokens"]),
      valueOf("position_ids", INT64, [1, "tokens"]),
      valueOf("last_key", INT32, [1]),
      valueOf("total_length", INT32, []),
      ...cache.map(({ past }) => valueOf(past, dataType, cacheShape)),
    ],
    output: [
      valueOf("logits", FLOAT, [1, 1, headColumns(config)]),
      ...cache.map(({ present }) => valueOf(present, dataType, cacheShape)),
    ],
  });
}

/** From `shape` `[4]` i64 to `cache`, zeros of that shape. */
function cacheModel(elem: Elem): OnnxModel {
  const dataType = DATA_TYPE[elem];
  return modelOf({
    name: "cache",
    node: [nodeOf("Expand", "cache", ["zero", "shape"], ["cache"])],
    initializer: [{
      name: "zero",
      dataType,
      dims: [1n],
      rawData: new Uint8Array(sizeOf(elem)),
    }],
    input: [valueOf("shape", INT64, [4])],
    output: [
      valueOf("cache", dataType, ["batch", "heads", "capacity", "size"]),
    ],
  });
}

/** `count` elements of a tensor from element `first` on, converted. */
async function readElements(
  source: WeightSource,
  info: LoadableTensor,
  elem: Elem,
  first: number,
  count: number,
): Promise<Uint8Array> {
  const bytes = new Uint8Array(count * STORED_BYTES[info.dtype]);
  await source.read(info.name, first * STORED_BYTES[info.dtype], bytes);
  const converted = convertElements(bytes, info.dtype, elem);
  if (converted.firstOverflow >= 0) {
    throw new ModelError(`A weight of ${info.name} is too large for f16`, {
      hint: "run with `--dtype f32`",
    });
  }
  return converted.bytes;
}

/** `[rows, columns]` to `[columns, padded]`, whose last columns stay as they are. */
function transpose<T extends Uint16Array | Uint32Array>(
  from: T,
  to: T,
  columns: number,
  padded: number,
): void {
  const rows = from.length / columns;
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      to[column * padded + row] = from[row * columns + column]!;
    }
  }
}

async function writeTensor(
  file: FileHandle,
  source: WeightSource,
  placed: Placed,
  elem: Elem,
): Promise<void> {
  const { info, isTransposed, offset, byteLength, shape } = placed;
  const count = elementCount(info.shape);
  if (isTransposed) {
    const [columns, padded] = shape as [number, number];
    const bytes = await readElements(source, info, elem, 0, count);
    const out = new Uint8Array(byteLength);
    if (elem === "f16") {
      transpose(
        new Uint16Array(bytes.buffer),
        new Uint16Array(out.buffer),
        columns,
        padded,
      );
    } else {transpose(
        new Uint32Array(bytes.buffer),
        new Uint32Array(out.buffer),
        columns,
        padded,
      );}
    await file.write(out, 0, byteLength, offset);
    return;
  }
  const step = SLICE_BYTES / STORED_BYTES[info.dtype];
  for (let first = 0; first < count; first += step) {
    const bytes = await readElements(
      source,
      info,
      elem,
      first,
      Math.min(step, count - first),
    );
    await file.write(bytes, 0, bytes.byteLength, offset + first * sizeOf(elem));
  }
}

/**
 * Writes the weights of a checkpoint into a folder, and returns the decoder that refers to them.
 * @throws ModelError when the checkpoint is not a complete GPT-2, or does not fit `elem`
 */
export async function writeWeights(
  folder: string,
  source: WeightSource,
  config: GPT2Config,
  elem: Elem,
): Promise<OnnxModel> {
  const weights = placeWeights(
    resolveCheckpoint(source, config).tensors,
    config,
    elem,
  );
  const file = await open(join(folder, WEIGHTS_FILE), "w");
  try {
    for (const placed of weights) await writeTensor(file, source, placed, elem);
  } finally {
    await file.close();
  }
  return decoderModel(config, elem, weights);
}

/** A model as the bytes of an .onnx file. */
export async function encodeModel(model: OnnxModel): Promise<Uint8Array> {
  const { create, toBinary } = await loadPackage(
    "@bufbuild/protobuf",
  ) as Protobuf;
  const { ModelProtoSchema } = await loadPackage("onnx-buf") as OnnxBuf;
  return toBinary(ModelProtoSchema, create(ModelProtoSchema, model));
}

if (import.meta.main) {
  try {
    const values = parseConversion();
    const { out } = values;
    if (out === undefined) throw new Error("there is no --out FOLDER");
    const { dtype, ...choice } = chosenModel(values);
    const { config, source } = await openModel(choice);
    const decoder = await writeWeights(out, source, config, dtype);
    await source.close();
    await writeFile(join(out, DECODER_FILE), await encodeModel(decoder));
    await writeFile(
      join(out, CACHE_FILE),
      await encodeModel(cacheModel(dtype)),
    );
  } catch (error) {
    console.error(`error: ${messageOf(error)}`);
    process.exitCode = 1;
  }
}
