import { afterAll, describe, expect, test } from "bun:test";
import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import {
  configFromSizes,
  configToJson,
  parameterCount,
  parseConfig,
  PUBLISHED_SHAPES,
  readConfig,
} from "../../src/model/config.ts";
import { ModelError } from "../../src/runtime/errors.ts";
import { temporaryFolder } from "../support/checkpoint.ts";

const SIZES = { vocab_size: 100, n_positions: 64, n_embd: 12, n_head: 3, n_layer: 2 };
const MINIMAL = { model_type: "gpt2", ...SIZES };

function refusal(json: unknown): ModelError {
  try {
    parseConfig(json, "some/config.json");
  } catch (error) {
    expect(error).toBeInstanceOf(ModelError);
    const refused = error as ModelError;
    expect(refused.message).toContain("some/config.json");
    expect(refused.hint).toBeDefined();
    return refused;
  }
  throw new Error("the config was accepted");
}

describe("parseConfig", () => {
  test("absent keys get the defaults of Hugging Face's GPT2Config", () => {
    expect(parseConfig(MINIMAL, "x")).toEqual({
      vocabSize: 100,
      nPositions: 64,
      nEmbd: 12,
      nHead: 3,
      headDim: 4,
      nLayer: 2,
      nInner: 48,
      layerNormEpsilon: 1e-5,
      activation: "gelu_new",
      scaleAttnWeights: true,
      scaleAttnByInverseLayerIdx: false,
      tieWordEmbeddings: true,
      bosTokenId: undefined, // 50256 is not in this vocabulary
      eosTokenId: [],
      padTokenId: undefined,
      id2label: [],
      problemType: undefined,
    });
  });

  test("null means the same as absent", () => {
    const json = {
      ...MINIMAL,
      n_inner: null,
      layer_norm_epsilon: null,
      activation_function: null,
      id2label: null,
    };
    expect(parseConfig(json, "x")).toEqual(parseConfig(MINIMAL, "x"));
  });

  test("architectures alone are enough to be GPT-2", () => {
    for (const name of ["GPT2LMHeadModel", "GPT2Model", "GPT2ForSequenceClassification"]) {
      expect(parseConfig({ ...SIZES, architectures: [name] }, "x").nLayer).toBe(2);
    }
  });

  test("every name of the tanh GELU is the same activation", () => {
    for (const name of ["gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate"]) {
      expect(parseConfig({ ...MINIMAL, activation_function: name }, "x").activation).toBe("gelu_new");
    }
  });

  test("token ids may be a number, a list or null, and ids outside the vocabulary are dropped", () => {
    const ids = (eos: unknown) => parseConfig({ ...MINIMAL, eos_token_id: eos }, "x").eosTokenId;
    expect(ids(7)).toEqual([7]);
    expect(ids([7, 9, 50256])).toEqual([7, 9]);
    expect(ids(null)).toEqual([]);
    expect(parseConfig({ ...MINIMAL, bos_token_id: 0 }, "x").bosTokenId).toBe(0);
    expect(PUBLISHED_SHAPES.gpt2).toMatchObject({ bosTokenId: 50256, eosTokenId: [50256] });
  });

  test("labels are read in the order of their ids", () => {
    expect(parseConfig({ ...MINIMAL, id2label: { "1": "b", "0": "a" } }, "x").id2label).toEqual(["a", "b"]);
  });

  const cases: [string, unknown, string][] = [
    ["an array", [], "not a JSON object"],
    ["another model type", { ...SIZES, model_type: "llama" }, `"llama"`],
    ["another architecture", { ...MINIMAL, architectures: ["BertModel"] }, `"BertModel"`],
    ["nothing that says GPT-2", SIZES, "model_type"],
    ["cross attention", { ...MINIMAL, add_cross_attention: true }, "add_cross_attention"],
    ["a missing size", { ...MINIMAL, n_layer: undefined }, "n_layer"],
    ["a zero size", { ...MINIMAL, n_embd: 0 }, "n_embd 0"],
    ["a negative size", { ...MINIMAL, vocab_size: -5 }, "vocab_size -5"],
    ["a fractional size", { ...MINIMAL, n_head: 1.5 }, "n_head 1.5"],
    ["a size in quotes", { ...MINIMAL, n_positions: "64" }, `n_positions "64"`],
    ["an endless number of layers", { ...MINIMAL, n_layer: 1e9 }, "n_layer"],
    ["a zero inner size", { ...MINIMAL, n_inner: 0 }, "n_inner 0"],
    ["heads that do not divide the width", { ...MINIMAL, n_head: 5 }, "n_head 5"],
    ["sizes whose product overflows", { ...MINIMAL, n_embd: 3 * 2 ** 28, n_head: 3 }, "too large"],
    ["the erf GELU", { ...MINIMAL, activation_function: "gelu" }, `"gelu"`],
    ["an activation that is no name", { ...MINIMAL, activation_function: { a: 1 } }, "activation_function"],
    ["a zero epsilon", { ...MINIMAL, layer_norm_epsilon: 0 }, "layer_norm_epsilon 0"],
    ["a flag that is no boolean", { ...MINIMAL, tie_word_embeddings: "yes" }, `tie_word_embeddings "yes"`],
    ["a token id that is no number", { ...MINIMAL, eos_token_id: ["x"] }, "eos_token_id"],
    ["labels with a gap", { ...MINIMAL, id2label: { "0": "a", "2": "c" } }, "class 1"],
    ["a problem that there is not", { ...MINIMAL, problem_type: "ranking" }, "ranking"],
    ["a padding token that is none", { ...MINIMAL, pad_token_id: "x" }, "pad_token_id"],
    ["labels in a list", { ...MINIMAL, id2label: ["a"] }, "id2label"],
  ];
  for (const [what, json, mention] of cases) {
    test(`${what} is refused by name`, () => expect(refusal(json).message).toContain(mention));
  }

  test("a value deeper than recursion goes is refused as any other", () => {
    const deep = JSON.parse("[".repeat(200_000) + "]".repeat(200_000)) as unknown;
    for (const key of ["n_layer", "scale_attn_weights", "eos_token_id", "id2label", "problem_type"]) {
      expect(refusal({ ...MINIMAL, [key]: deep }).message).toContain(`${key} an array`);
    }
  });

  test("control characters of a hostile file do not reach the message", () => {
    expect(refusal({ ...SIZES, model_type: "\u001b[31mred\u009b" }).message).toMatch(/^[\x20-\x7e]+$/);
  });
});

describe("configs", () => {
  test("the published shapes have the published numbers of parameters", () => {
    expect(Object.values(PUBLISHED_SHAPES).map(parameterCount)).toEqual([
      81_912_576,
      124_439_808,
      354_823_168,
      774_030_080,
      1_557_611_200,
    ]);
  });

  test("a config survives being written as JSON and read back", () => {
    const config = {
      ...configFromSizes({ nLayer: 3, nHead: 2, nEmbd: 8, nPositions: 9, vocabSize: 60_000 }),
      nInner: 20,
      tieWordEmbeddings: false,
      scaleAttnByInverseLayerIdx: true,
      eosTokenId: [1, 2],
      id2label: ["x", "y"],
      padTokenId: 3,
      problemType: "multi_label_classification" as const,
    };
    expect(parseConfig(JSON.parse(JSON.stringify(configToJson(config))), "x")).toEqual(config);
  });
});

describe("readConfig", () => {
  const folder = temporaryFolder();
  afterAll(folder.remove);

  test("a missing folder, a file in its place and a missing config.json are told apart", async () => {
    const file = join(folder.path, "a_file");
    writeFileSync(file, "");
    await expect(readConfig(join(folder.path, "nowhere"))).rejects.toThrow(/no model folder .*nowhere/);
    await expect(readConfig(file)).rejects.toThrow(/a_file is a file, not a model folder/);
    await expect(readConfig(folder.path)).rejects.toThrow(/no file .*config\.json/);
    await expect(readConfig(folder.path)).rejects.toBeInstanceOf(ModelError);
  });

  const broken: [string, string | Uint8Array, RegExp][] = [
    ["bad JSON", "{", /config\.json is not valid JSON/],
    ["an empty file", "", /config\.json is not valid JSON/],
    ["bad UTF-8", Uint8Array.of(0x7b, 0xff, 0x7d), /config\.json is not valid UTF-8/],
    ["a bare number", "7", /config\.json is not a JSON object/],
  ];
  for (const [what, content, message] of broken) {
    test(`${what} in config.json is refused by name`, async () => {
      const dir = join(folder.path, what.replaceAll(" ", "_"));
      mkdirSync(dir);
      writeFileSync(join(dir, "config.json"), content);
      await expect(readConfig(dir)).rejects.toThrow(message);
      await expect(readConfig(dir)).rejects.toBeInstanceOf(ModelError);
    });
  }
});
