/** Hostile config.json, and whole model folders as `inspect` looks at them. */
import { afterAll } from "bun:test";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import fc from "fast-check";
import { formatInspect, inspectModel } from "../../src/cli/inspect.ts";
import {
  configToJson,
  type GPT2Config,
  parameterCount,
  parseConfig,
  readConfig,
} from "../../src/model/config.ts";
import { scoreHead } from "../../src/model/label_head.ts";
import { temporaryFolder, writeTinyCheckpoint } from "../support/checkpoint.ts";
import { fuzz, judge, reportTallies, requireShowable } from "../support/fuzz.ts";
import {
  anyBytes,
  anyJson,
  bytesOf,
  damagedBytes,
  damagedJson,
  jsonOf,
  textOf,
} from "../support/fuzz_input.ts";

reportTallies();
const folder = temporaryFolder();
afterAll(folder.remove);

const CONFIG = {
  architectures: ["GPT2ForSequenceClassification"],
  model_type: "gpt2",
  vocab_size: 11,
  n_positions: 16,
  n_embd: 8,
  n_head: 2,
  n_layer: 2,
  n_inner: null,
  activation_function: "gelu_new",
  layer_norm_epsilon: 1e-5,
  scale_attn_weights: true,
  scale_attn_by_inverse_layer_idx: false,
  tie_word_embeddings: true,
  bos_token_id: 10,
  eos_token_id: [10, 3],
  pad_token_id: 3,
  problem_type: "single_label_classification",
  id2label: { "0": "crime", "1": "romance" },
  label2id: { crime: 0, romance: 1 },
};
const WORDS = [
  ...Object.keys(CONFIG),
  "add_cross_attention",
  "gpt2",
  "GPT2LMHeadModel",
  "gelu",
  "regression",
  "0",
  "2",
];

function requireSound(config: GPT2Config): void {
  const again = parseConfig(configToJson(config), "again");
  if (JSON.stringify(again) !== JSON.stringify(config)) throw new Error("it does not read back alike");
  const sizes = [
    config.vocabSize,
    config.nPositions,
    config.nEmbd,
    config.nHead,
    config.nLayer,
    config.nInner,
  ];
  if (![...sizes, config.headDim].every((size) => Number.isSafeInteger(size) && size > 0)) {
    throw new Error("a size");
  }
  if (!Number.isSafeInteger(4 * parameterCount(config))) throw new Error("too many parameters to count");
  const ids = [...config.eosTokenId, config.bosTokenId ?? 0, config.padTokenId ?? 0];
  if (!ids.every((id) => id >= 0 && id < config.vocabSize)) throw new Error("an id outside the vocabulary");
  const { labels } = scoreHead(config, config.id2label.length + 1);
  if (new Set(labels).size !== labels.length) throw new Error("two classes of one name");
}

fuzz("config.json: damaged JSON", {
  runs: 4000,
  arbitrary: damagedJson(jsonOf(CONFIG), WORDS).map(textOf),
  check: async (text) => {
    const judged = await judge({ inputBytes: text.length }, () => {
      let json: unknown;
      try {
        json = JSON.parse(text);
      } catch {
        return undefined;
      }
      return parseConfig(json, "config.json");
    });
    if ("value" in judged && judged.value) requireSound(judged.value);
  },
});

fuzz("config.json: damaged bytes and any JSON, from a file", {
  runs: 1000,
  arbitrary: fc.oneof(damagedBytes(bytesOf(JSON.stringify(CONFIG))), anyJson.map(bytesOf), anyBytes),
  check: async (bytes) => {
    writeFileSync(join(folder.path, "config.json"), bytes);
    const judged = await judge({ inputBytes: bytes.length }, () => readConfig(folder.path));
    if ("value" in judged) requireSound(judged.value);
  },
});

const model = writeTinyCheckpoint(join(folder.path, "model"), {
  classes: 2,
  config: { id2label: ["crime", "romance"] },
});
const weights = join(model.dir, "model.safetensors");
const sound = readFileSync(weights);
const headerBytes = Number(sound.readBigUInt64LE(0));
const header = JSON.parse(sound.toString("utf8", 8, 8 + headerBytes)) as unknown;
const tensors = [
  ...["transformer.wte.weight", "wte.weight", "lm_head.weight", "h.2.ln_1.bias", "h.1e9.x", "F16"],
  ...["I8"],
];

fuzz("model folder: what `inspect` prints of damaged files", {
  runs: 400,
  share: 0.2,
  arbitrary: fc.record({
    config: fc.option(damagedJson(jsonOf(CONFIG), WORDS).map(textOf), {
      nil: JSON.stringify(CONFIG),
      freq: 1,
    }),
    header: damagedJson(jsonOf(header), tensors).map(textOf),
    tokenizer: fc.option(anyJson, { nil: "{}" }),
  }),
  check: async ({ config, header, tokenizer }) => {
    const json = Buffer.from(header);
    const length = Buffer.alloc(8);
    length.writeBigUInt64LE(BigInt(json.length));
    writeFileSync(weights, Buffer.concat([length, json, sound.subarray(8 + headerBytes)]));
    writeFileSync(join(model.dir, "config.json"), config);
    writeFileSync(join(model.dir, "tokenizer.json"), tokenizer);
    const inputBytes = json.length + config.length + tokenizer.length + sound.length;
    // A layer more costs no more than its names.
    const judged = await judge({ inputBytes, constantBytes: 64 << 20 }, async () => {
      const report = await inspectModel(model.dir);
      return { report, text: formatInspect(report) };
    });
    if (!("value" in judged)) {
      throw new Error("it should have been reported, not thrown", { cause: judged.error });
    }
    const { report, text } = judged.value;
    for (const line of text.trimEnd().split("\n")) if (line !== "") requireShowable(line);
    for (const line of [...report.problems, ...report.notes]) requireShowable(line);
  },
});
