/** GPT-2's config.json: the keys that change what is computed, checked once, with Hugging Face's defaults. */
import { join } from "node:path";
import { ModelError } from "../runtime/errors.ts";
import { describeJson, isJsonObject, type JsonObject, readJsonObject, requireFolder } from "./json_file.ts";
import { quoteName } from "./weight_source.ts";

export interface GPT2Config {
  readonly vocabSize: number;
  /** Rows of `wpe`: the longest context the model was trained for. */
  readonly nPositions: number;
  /** Width of the residual stream. */
  readonly nEmbd: number;
  readonly nHead: number;
  /** `nEmbd / nHead`. */
  readonly headDim: number;
  readonly nLayer: number;
  /** Width of the MLP's hidden layer; `4 * nEmbd` unless the file says otherwise. */
  readonly nInner: number;
  readonly layerNormEpsilon: number;
  /** The tanh approximation of GELU, under whichever of its names the file had. */
  readonly activation: "gelu_new";
  /** Divide attention scores by √headDim. */
  readonly scaleAttnWeights: boolean;
  /** Also divide them by the layer's number, counted from 1. */
  readonly scaleAttnByInverseLayerIdx: boolean;
  /** The output head is `wte`. */
  readonly tieWordEmbeddings: boolean;
  /** Undefined where the file has none, or one that the vocabulary does not contain. */
  readonly bosTokenId: number | undefined;
  /** Ids outside the vocabulary are dropped: they can never be sampled. */
  readonly eosTokenId: readonly number[];
  /** What pads a batch, which `GPT2ForSequenceClassification` skips at the end of a text; undefined where there is none. */
  readonly padTokenId: number | undefined;
  /** Names of a classification head's outputs, in order; empty where the file has none. */
  readonly id2label: readonly string[];
  /** What a classification head was trained for; undefined where the file does not say. */
  readonly problemType: ProblemType | undefined;
}

const PROBLEM_TYPES = ["single_label_classification", "multi_label_classification", "regression"] as const;
/** Hugging Face's names. */
export type ProblemType = typeof PROBLEM_TYPES[number];

/** What must be said to describe a GPT-2; the rest has a default. */
export interface GPT2Sizes {
  readonly nLayer: number;
  readonly nHead: number;
  readonly nEmbd: number;
  readonly nPositions: number;
  readonly vocabSize: number;
}

/**
 * All of these compute 0.5x(1 + tanh(√(2/π)(x + 0.044715x³))), to the rounding of their constants. Plain "gelu" is the
 * erf form and "quick_gelu" a sigmoid: other functions.
 */
const TANH_GELU_NAMES = ["gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate"];

/** `<|endoftext|>` of the published vocabulary, Hugging Face's default for both ids. */
const END_OF_TEXT = 50256;
/** Far beyond any model, and small enough that listing every tensor name stays cheap. */
const MAX_LAYERS = 10_000;
/** WebGPU addresses rows and columns with 32-bit numbers. */
const MAX_SIZE = 2 ** 31 - 1;

/** A config with the defaults of the published models for everything but the sizes. */
export function configFromSizes(sizes: GPT2Sizes): GPT2Config {
  return parseConfig(
    {
      model_type: "gpt2",
      vocab_size: sizes.vocabSize,
      n_positions: sizes.nPositions,
      n_embd: sizes.nEmbd,
      n_head: sizes.nHead,
      n_layer: sizes.nLayer,
    },
    "the requested shape",
  );
}

function published(nLayer: number, nHead: number, nEmbd: number): GPT2Config {
  return configFromSizes({ nLayer, nHead, nEmbd, nPositions: 1024, vocabSize: 50257 });
}

/** The models of the GPT-2 family by their Hugging Face names. */
export const PUBLISHED_SHAPES = {
  distilgpt2: published(6, 12, 768),
  gpt2: published(12, 12, 768),
  "gpt2-medium": published(24, 16, 1024),
  "gpt2-large": published(36, 20, 1280),
  "gpt2-xl": published(48, 25, 1600),
} as const satisfies Readonly<Record<string, GPT2Config>>;

export type PublishedShape = keyof typeof PUBLISHED_SHAPES;

export function isPublishedShape(name: string): name is PublishedShape {
  return Object.hasOwn(PUBLISHED_SHAPES, name);
}

/** Parameters of the network without a classification head; a tied output head is not counted twice. */
export function parameterCount(config: GPT2Config): number {
  const { nEmbd, nInner, nLayer, vocabSize, nPositions } = config;
  const attention = nEmbd * (3 * nEmbd) + 3 * nEmbd + nEmbd * nEmbd + nEmbd; // c_attn, c_proj
  const mlp = nEmbd * nInner + nInner + nInner * nEmbd + nEmbd; // c_fc, c_proj
  const norms = 4 * nEmbd; // ln_1, ln_2
  const head = config.tieWordEmbeddings ? 0 : vocabSize * nEmbd;
  return (vocabSize + nPositions) * nEmbd + nLayer * (attention + mlp + norms) + 2 * nEmbd + head;
}

/** Reads and checks `config.json` of a model folder. */
export async function readConfig(dir: string): Promise<GPT2Config> {
  await requireFolder(dir);
  const path = join(dir, "config.json");
  return parseConfig(await readJsonObject(path), path);
}

/**
 * Checks a parsed config.json.
 * @param where names the file in messages
 */
export function parseConfig(json: unknown, where: string): GPT2Config {
  if (!isJsonObject(json)) throw new ModelError(`${where} is not a JSON object`, { hint: CORRECT_IT });
  checkArchitecture(json, where);
  const vocabSize = readSize(json, "vocab_size", where);
  const nPositions = readSize(json, "n_positions", where);
  const nEmbd = readSize(json, "n_embd", where);
  const nHead = readSize(json, "n_head", where);
  const nLayer = readSize(json, "n_layer", where, MAX_LAYERS);
  if (nEmbd % nHead !== 0) {
    throw new ModelError(`${where} has n_embd ${nEmbd}, which n_head ${nHead} does not divide`, {
      hint: CORRECT_IT,
    });
  }
  const config: GPT2Config = {
    vocabSize,
    nPositions,
    nEmbd,
    nHead,
    headDim: nEmbd / nHead,
    nLayer,
    nInner: isAbsent(json["n_inner"]) ? 4 * nEmbd : readSize(json, "n_inner", where),
    layerNormEpsilon: readEpsilon(json, where),
    activation: readActivation(json, where),
    scaleAttnWeights: readFlag(json, "scale_attn_weights", true, where),
    scaleAttnByInverseLayerIdx: readFlag(json, "scale_attn_by_inverse_layer_idx", false, where),
    tieWordEmbeddings: readFlag(json, "tie_word_embeddings", true, where),
    bosTokenId: readTokenIds(json, "bos_token_id", vocabSize, where)[0],
    eosTokenId: readTokenIds(json, "eos_token_id", vocabSize, where),
    padTokenId: isAbsent(json["pad_token_id"])
      ? undefined
      : readTokenIds(json, "pad_token_id", vocabSize, where)[0],
    id2label: readLabels(json, where),
    problemType: readProblemType(json, where),
  };
  // In bytes of f32; beyond 2^53 sizes could no longer be computed exactly.
  if (parameterCount(config) * 4 > Number.MAX_SAFE_INTEGER) {
    throw new ModelError(`${where} describes a model too large to address`, { hint: CORRECT_IT });
  }
  return config;
}

/** The config as a config.json that Hugging Face and `parseConfig` read back alike. */
export function configToJson(config: GPT2Config): JsonObject {
  return {
    architectures: ["GPT2LMHeadModel"],
    model_type: "gpt2",
    vocab_size: config.vocabSize,
    n_positions: config.nPositions,
    n_embd: config.nEmbd,
    n_head: config.nHead,
    n_layer: config.nLayer,
    n_inner: config.nInner === 4 * config.nEmbd ? null : config.nInner,
    activation_function: config.activation,
    layer_norm_epsilon: config.layerNormEpsilon,
    scale_attn_weights: config.scaleAttnWeights,
    scale_attn_by_inverse_layer_idx: config.scaleAttnByInverseLayerIdx,
    tie_word_embeddings: config.tieWordEmbeddings,
    bos_token_id: config.bosTokenId ?? null,
    eos_token_id: config.eosTokenId.length > 1 ? config.eosTokenId : config.eosTokenId[0] ?? null,
    ...(config.padTokenId !== undefined && { pad_token_id: config.padTokenId }),
    ...(config.problemType && { problem_type: config.problemType }),
    ...(config.id2label.length > 0 && {
      id2label: Object.fromEntries(config.id2label.map((label, id) => [id, label])),
      label2id: Object.fromEntries(config.id2label.map((label, id) => [label, id])),
    }),
  };
}

const CORRECT_IT = "correct config.json, or download it again";
const NOT_GPT2 = "longform runs GPT-2 checkpoints only: choose another model";

function checkArchitecture(json: JsonObject, where: string): void {
  const { model_type: type, architectures } = json;
  if (typeof type === "string" && type !== "gpt2") {
    throw new ModelError(`${where} describes a ${quoteName(type)} model, not GPT-2`, { hint: NOT_GPT2 });
  }
  const names = Array.isArray(architectures) ? architectures.filter((name) => typeof name === "string") : [];
  const foreign = names.find((name) => !/^GPT2[A-Z]/.test(name));
  if (foreign !== undefined) {
    throw new ModelError(`${where} names the architecture ${quoteName(foreign)}, not GPT-2`, {
      hint: NOT_GPT2,
    });
  }
  if (type !== "gpt2" && names.length === 0) {
    throw new ModelError(`${where} does not say that this is GPT-2: it has no model_type`, {
      hint: `add "model_type": "gpt2" if it is`,
    });
  }
  if (json["add_cross_attention"] === true) {
    throw new ModelError(`${where} sets add_cross_attention, which needs an encoder`, { hint: NOT_GPT2 });
  }
}

/** Python's None in a config.json means the same as leaving the key out. */
function isAbsent(value: unknown): value is null | undefined {
  return value === undefined || value === null;
}

function readSize(json: JsonObject, key: string, where: string, most = MAX_SIZE): number {
  const value = json[key];
  if (isAbsent(value)) throw new ModelError(`${where} has no ${key}`, { hint: CORRECT_IT });
  if (typeof value !== "number" || !Number.isInteger(value) || value < 1 || value > most) {
    throw new ModelError(
      `${where} has ${key} ${describeJson(value)}, wanted a whole number from 1 to ${most}`,
      {
        hint: CORRECT_IT,
      },
    );
  }
  return value;
}

function readFlag(json: JsonObject, key: string, absent: boolean, where: string): boolean {
  const value = json[key];
  if (isAbsent(value)) return absent;
  if (typeof value === "boolean") return value;
  throw new ModelError(`${where} has ${key} ${describeJson(value)}, wanted true or false`, {
    hint: CORRECT_IT,
  });
}

function readEpsilon(json: JsonObject, where: string): number {
  const value = json["layer_norm_epsilon"];
  if (isAbsent(value)) return 1e-5;
  if (typeof value === "number" && value > 0 && value <= 1) return value;
  throw new ModelError(
    `${where} has layer_norm_epsilon ${describeJson(value)}, wanted a number above 0 and at most 1`,
    {
      hint: CORRECT_IT,
    },
  );
}

function readActivation(json: JsonObject, where: string): "gelu_new" {
  const value = json["activation_function"];
  if (isAbsent(value) || (typeof value === "string" && TANH_GELU_NAMES.includes(value))) return "gelu_new";
  throw new ModelError(
    `${where} has activation_function ${describeJson(value)}, which longform does not compute`,
    {
      hint: `it computes ${TANH_GELU_NAMES.join(", ")}: choose another model`,
    },
  );
}

/** One id or several; an absent key means `<|endoftext|>`, null means none. */
function readTokenIds(json: JsonObject, key: string, vocabSize: number, where: string): readonly number[] {
  const value = json[key] === undefined ? END_OF_TEXT : json[key] ?? [];
  const ids: unknown[] = Array.isArray(value) ? value : [value];
  return ids.map((id) => {
    if (typeof id === "number" && Number.isInteger(id)) return id;
    throw new ModelError(`${where} has ${key} ${describeJson(value)}, wanted a token id`, {
      hint: CORRECT_IT,
    });
  }).filter((id) => id >= 0 && id < vocabSize);
}

function readProblemType(json: JsonObject, where: string): ProblemType | undefined {
  const value = json["problem_type"];
  if (isAbsent(value)) return undefined;
  const known = PROBLEM_TYPES.find((type) => type === value);
  if (known) return known;
  throw new ModelError(
    `${where} has problem_type ${describeJson(value)}, wanted one of ${PROBLEM_TYPES.join(", ")}`,
    { hint: CORRECT_IT },
  );
}

function readLabels(json: JsonObject, where: string): readonly string[] {
  const value = json["id2label"];
  if (isAbsent(value)) return [];
  if (!isJsonObject(value)) {
    throw new ModelError(`${where} has id2label ${describeJson(value)}, wanted an object`, {
      hint: CORRECT_IT,
    });
  }
  return Array.from({ length: Object.keys(value).length }, (_, id) => {
    const label = value[String(id)];
    if (typeof label === "string") return label;
    throw new ModelError(`${where} has an id2label without a name for class ${id}`, {
      hint: "give every class from 0 a name in config.json",
    });
  });
}
