/** The library: what its methods give is what the graph gives, one at a time. */
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import type { Outcome } from "../../src/model/classification.ts";
import { generate } from "../../src/model/generation.ts";
import { labelHead } from "../../src/model/label_head.ts";
import {
  type ClassifyInput,
  type ClassifyOptions,
  type GeneratedPiece,
  type GenerateOptions,
  type LoadOptions,
  Longform,
} from "../../src/model/longform.ts";
import { meanNll, perplexity, scoreDocument } from "../../src/model/scoring.ts";
import { tokensOf } from "../../src/model/token_source.ts";
import { InputError, LongformError, ModelError, UsageError } from "../../src/runtime/errors.ts";
import { temporaryFolder, type TinyOptions, writeTinyCheckpoint } from "../support/checkpoint.ts";
import { testDevice } from "../support/device.ts";

const { caps } = await testDevice(); // for its timeout
const folder = temporaryFolder();

const VOCAB = 101;
const CLASSES = 5;
const NAMES = ["crime", "romance", "crime", "war", "verse"];
const CONFIG = {
  nLayer: 2,
  nHead: 3,
  nEmbd: 30,
  nPositions: 700,
  vocabSize: VOCAB,
  bosTokenId: VOCAB - 1,
  eosTokenId: [VOCAB - 1],
};

/** A small model, and a tokenizer that knows no bytes but those of printable ASCII. */
function modelFolder(name: string, { config = {}, ...options }: TinyOptions = {}): string {
  const { dir } = writeTinyCheckpoint(join(folder.path, name), {
    config: { ...CONFIG, ...config },
    dtype: "F16",
    ...options,
  });
  const printable = Array.from({ length: 94 }, (_, i) => String.fromCharCode(33 + i));
  const tokens = ["Ġ", "Ċ", ...printable, "Ġa", "ab", "Ġab", "bb"];
  const json = {
    added_tokens: [{ id: VOCAB - 1, content: "<|endoftext|>", special: true }],
    pre_tokenizer: { type: "ByteLevel", add_prefix_space: false },
    model: {
      type: "BPE",
      vocab: Object.fromEntries(tokens.map((token, id) => [token, id])),
      merges: ["Ġ a", "a b", "Ġa b", "b b"],
    },
  };
  writeFileSync(join(dir, "tokenizer.json"), JSON.stringify(json));
  return dir;
}

const dir = modelFolder("classes", { classes: CLASSES, config: { id2label: NAMES } });
/** For everything, with a thread that encodes. */
let longform: Longform;
const opened: Longform[] = [];

async function load(options: LoadOptions = {}): Promise<Longform> {
  const loaded = await Longform.load({ model: dir, dtype: "f32", encodingWorkers: 0, ...options });
  opened.push(loaded);
  return loaded;
}

beforeAll(async () => {
  longform = await load({ encodingWorkers: 1, classifying: { lengths: 3 } });
});
afterAll(async () => {
  for (const one of opened) await one.close();
  folder.remove();
});

async function outcomesOf<T extends ClassifyInput>(
  model: Longform,
  documents: Iterable<T> | AsyncIterable<T>,
  options: ClassifyOptions = {},
): Promise<Outcome<T>[]> {
  return await Array.fromAsync(model.classify(documents, options));
}

function classifiedIn(outcome: Outcome<unknown> | undefined) {
  if (!outcome || "error" in outcome) throw new Error(outcome?.error);
  return outcome.classified;
}

/** Logits of the outcomes, in the order of the labels. */
function logitsIn(outcomes: readonly Outcome<unknown>[]): number[][] {
  return outcomes.map((outcome) => Object.values(classifiedIn(outcome).logits));
}

/** What the score head makes of a text alone. */
async function classLogits(text: string, most = Infinity): Promise<number[]> {
  const ids = Uint32Array.from((await longform.tokenizer()).encode(text).slice(0, most));
  const classifier = await longform.model.classifier();
  const [logits] = await (await classifier.classify([{ ids, lengths: [ids.length] }])).result;
  return Array.from(logits!);
}

async function piecesOf(prompt: string | number[], options: GenerateOptions) {
  const generation = longform.generate(prompt, options);
  const pieces: GeneratedPiece[] = [];
  for (;;) {
    const { value, done } = await generation.next();
    if (done) return { pieces, ...value };
    pieces.push(value);
  }
}

const TEXTS = [
  "It was the best of times, ab abb bab.",
  "x",
  "The quick brown fox jumps over the lazy dog. ".repeat(5),
  "ab ".repeat(60),
];

/** What it makes of each of them. */
async function textLogits(): Promise<number[][]> {
  const logits: number[][] = [];
  for (const text of TEXTS) logits.push(await classLogits(text));
  return logits;
}

describe("loading", () => {
  test("takes memory for what the model is loaded for", async () => {
    const { plan } = longform.model;
    expect([plan.decoding, plan.classifying].map((part) => part !== undefined)).toEqual([true, true]);
    expect(longform.loadMs).toBeGreaterThan(0);
    expect(longform.config.id2label).toEqual(NAMES);
    expect(longform.profiler).toBeUndefined();
    const seen: unknown[] = [];
    let loaded = 0;
    const scoring = await load({
      uses: ["score"],
      context: 100,
      onOpened: (gpu, config, elem) => seen.push(gpu.caps.name, config.nLayer, elem),
      onLoad: (bytes, total) => loaded = bytes / total,
    });
    expect(seen).toEqual([caps.name, CONFIG.nLayer, "f32"]);
    expect(loaded).toBe(1);
    expect(scoring.model.plan).toMatchObject({ context: 100, decoding: undefined, classifying: undefined });
    await expect(scoring.generate("a").next()).rejects.toThrow("The model was not loaded to generate");
    await expect(scoring.classify([]).next()).rejects.toThrow("The model was not loaded to classify");
    expect((await scoring.score(TEXTS[0]!)).nllMean).toBe((await longform.score(TEXTS[0]!)).nllMean);
    const classifying = await load({ uses: ["classify"], classifying: { packTokens: 70, heads: ["score"] } });
    await expect(classifying.score("a")).rejects.toThrow(UsageError);
    // Documents may be longer than packs.
    expect(classifying.model.plan).toMatchObject({ context: 704, chunkTokens: 128 });
    const outcomes = await outcomesOf(classifying, TEXTS.map((text) => ({ text })));
    expect(logitsIn(outcomes)).toEqual(await textLogits());
  });

  test("leaves nothing behind when it fails", async () => {
    await expect(load({ model: join(folder.path, "nowhere") })).rejects.toThrow(ModelError);
    await expect(load({ sparsity: "local" })).rejects.toThrow(UsageError);
    let memory: Longform["gpu"]["memory"] | undefined;
    const damaged = modelFolder("damaged", { inject: { tensor: "h.1.ln_1.bias", element: 3 } });
    const options: LoadOptions = {
      model: damaged,
      encodingWorkers: 1,
      onOpened: (gpu) => memory = gpu.memory,
    };
    await expect(load(options)).rejects.toThrow("NaN");
    expect(memory!.totalBytes).toBe(0);
  });
});

describe("generating", () => {
  const OPTIONS = { maxTokens: 20, seed: 7, temperature: 1, ignoreEos: true };

  test("gives pieces that join to the text of `generate`", async () => {
    const prompt = "It was ab";
    const { pieces, finishReason } = await piecesOf(prompt, OPTIONS);
    const tokenizer = await longform.tokenizer();
    longform.model.truncate(0);
    const generation = generate(
      longform.model,
      { cached: [], rest: tokensOf(tokenizer.encode(prompt)) },
      tokenizer.bytesOf.bind(tokenizer),
      {
        maxTokens: 20,
        sampling: { temperature: 1, topK: 40, topP: 0.95, minP: 0, repeatPenalty: 1, seed: 7 },
        stop: [],
        eosIds: [],
      },
    );
    const ids: number[] = [];
    let text = "";
    for (;;) {
      const { value, done } = await generation.next();
      text += done ? value.heldBack : value.text;
      if (done) break;
      ids.push(value.id);
    }
    expect(finishReason).toBe("length");
    expect(pieces.map((piece) => piece.text).join("")).toBe(text);
    expect(pieces.flatMap((piece) => piece.id ?? [])).toEqual(ids);
    // Ids have no text.
    const fromIds = await piecesOf(tokenizer.encode(prompt), OPTIONS);
    expect(fromIds.pieces).toEqual(ids.map((id) => ({ text: "", id })));
    expect((await piecesOf(prompt, { ...OPTIONS, stop: [text.slice(5, 7)] })).finishReason).toBe("stop");
  });

  test("ends with its reader, and the model goes on", async () => {
    const whole = await piecesOf("ab", OPTIONS);
    const classes = await classLogits(TEXTS[0]!);
    let count = 0;
    for await (const _ of longform.generate("ab", OPTIONS)) if (++count === 3) break;
    expect(logitsIn(await outcomesOf(longform, [{ text: TEXTS[0]! }]))).toEqual([classes]);
    for await (const _ of longform.generate("ab", OPTIONS)) break;
    expect(await piecesOf("ab", OPTIONS)).toEqual(whole);
  });

  test("refuses prompts that cannot run, and the model goes on", async () => {
    await expect(piecesOf("", OPTIONS)).rejects.toThrow(InputError);
    await expect(piecesOf([VOCAB], OPTIONS)).rejects.toThrow(InputError);
    await expect(piecesOf(new Array(701).fill(1), OPTIONS)).rejects.toThrow(InputError);
    expect((await piecesOf("ab", { ...OPTIONS, maxTokens: 1 })).pieces).toHaveLength(1);
  });
});

test("scores are those of the text, in windows where they are asked for", async () => {
  const text = TEXTS[2]!;
  const ids = (await longform.tokenizer()).encode(text);
  for (const window of [undefined, 50]) {
    const got = await longform.score(text, { window });
    const wanted = await scoreDocument(longform.model, tokensOf(ids), { window: window ?? 700 });
    expect(got).toEqual({
      tokens: ids.length,
      scored: ids.length - wanted.windows,
      nllMean: meanNll(wanted),
      perplexity: perplexity(wanted),
    });
    expect(await longform.score(ids, { window })).toEqual(got);
  }
  expect(await longform.score("")).toEqual({ tokens: 0, scored: 0, nllMean: null, perplexity: null });
  await expect(longform.score("a", { window: 0 })).rejects.toThrow("`window` is 0");
  await expect(longform.score("é")).rejects.toThrow(InputError);
});

describe("classifying", () => {
  test("hands documents back with what became of them, in order", async () => {
    const ids = (await longform.tokenizer()).encode(TEXTS[0]!);
    const documents: (ClassifyInput & { readonly name: string })[] = [
      { name: "text", text: TEXTS[0]! },
      { name: "ids", ids },
      { name: "unreadable", error: "there is no such file" },
      { name: "empty", text: "" },
      { name: "foreign", text: "naïve" },
      { name: "beyond", ids: [1, VOCAB] },
      { name: "negative", ids: [1, 2, -1] },
      { name: "broken", ids: [0.5] },
      { name: "long", ids: new Array(701).fill(1) },
      { name: "typed", ids: Uint16Array.from(ids) },
    ];
    const outcomes = await outcomesOf(longform, documents);
    expect(outcomes.map(({ document }) => document)).toEqual(documents);
    const errors = outcomes.map((outcome) => "error" in outcome ? outcome.error : "");
    expect(errors).toEqual([
      "",
      "",
      "there is no such file",
      "the document is empty: it has no tokens",
      expect.stringContaining("has no tokens for some characters of the text"),
      `token 1 is ${VOCAB}, the model's ids go from 0 to ${VOCAB - 1}`,
      "token 2 is -1, which is no id of a token",
      "token 0 is 0.5, which is no id of a token",
      expect.stringContaining("more than the 700 tokens that there is room for"),
      "",
    ]);
    const logits = await classLogits(TEXTS[0]!);
    expect(logitsIn(outcomes.filter((_, i) => errors[i] === ""))).toEqual([logits, logits, logits]);
  });

  test("has labels from the config, one for each class", async () => {
    const [outcome] = await outcomesOf(longform, [{ text: TEXTS[0]! }]);
    const { scores, label, tokens } = classifiedIn(outcome);
    expect(Object.keys(scores)).toEqual(["crime", "romance", "crime (2)", "war", "verse"]);
    expect(Object.values(scores).reduce((a, b) => a + b)).toBeCloseTo(1, 12);
    expect(scores[label]).toBe(Math.max(...Object.values(scores)));
    expect(tokens).toBe((await longform.tokenizer()).encode(TEXTS[0]!).length);
  });

  test("gives the same twice in a row, from threads or none, from iterables of any kind", async () => {
    const wanted = await textLogits();
    const documents = TEXTS.map((text) => ({ text }));
    for (let run = 0; run < 2; run++) {
      expect(logitsIn(await outcomesOf(longform, documents))).toEqual(wanted);
    }
    const slow = async function* () {
      for (const document of documents) {
        await new Promise((resolve) => setTimeout(resolve, 1));
        yield document;
      }
    };
    expect(logitsIn(await outcomesOf(longform, slow(), { batch: 2 }))).toEqual(wanted);
    const inline = await load({ uses: ["classify"] });
    expect(logitsIn(await outcomesOf(inline, new Set(documents)))).toEqual(wanted);
    expect(await outcomesOf(inline, [])).toEqual([]);
  });

  test("takes several lengths in any order, and windows", async () => {
    const document = { text: TEXTS[2]! };
    const [outcome] = await outcomesOf(longform, [document], { maxTokens: [64, 10, 10, 5] });
    const { beginnings } = classifiedIn(outcome);
    expect(beginnings.map(({ tokens }) => tokens)).toEqual([5, 10, 64]);
    for (const { tokens, logits } of beginnings) {
      expect(Object.values(logits)).toEqual(await classLogits(document.text, tokens));
    }
    const windowed = await outcomesOf(longform, [document], { window: 64, maxTokens: 64 });
    expect(logitsIn(windowed)).toEqual([await classLogits(document.text, 64)]);
    const four = outcomesOf(longform, [document], { maxTokens: [1, 2, 3, 4] });
    await expect(four).rejects.toThrow("by 3 lengths each, not by 4");
  });

  test("by labels as texts, and calibrated ones, is what their tokens say", async () => {
    const labels = ["ab", "war", "New York"];
    const template = "{text}\nThis is about {label}.";
    const tokenizer = await longform.tokenizer();
    const { before, between, texts } = labelHead(tokenizer, labels, template);
    const likelihoods = async (text: string) => {
      const classifier = await longform.model.classifier();
      const ids = Uint32Array.from([...before, ...tokenizer.encode(text), ...between]);
      return Array.from((await (await classifier.scoreLabels([ids], texts)).result)[0]!);
    };
    const documents = TEXTS.map((text) => ({ text }));
    const raw = await outcomesOf(longform, documents, { labels, template });
    const wanted: number[][] = [];
    for (const text of TEXTS) wanted.push(await likelihoods(text));
    expect(logitsIn(raw)).toEqual(wanted);
    expect(Object.keys(classifiedIn(raw[0]).scores)).toEqual(labels);
    const baseline = await likelihoods("");
    const calibrated = await outcomesOf(longform, documents, { labels, template, calibrate: true });
    expect(logitsIn(calibrated)).toEqual(wanted.map((row) => row.map((logit, i) => logit - baseline[i]!)));
    // Where the template has no text, a document begins as any other.
    const bare = await outcomesOf(longform, documents, { labels, template: "{label}", calibrate: true });
    expect(bare.every((outcome) => "classified" in outcome)).toBe(true);
  });

  test("has room for labels where documents are few and short", async () => {
    const short = await load({ uses: ["classify"], classifying: { packTokens: 1, heads: ["labels"] } });
    const labels = Array.from({ length: 30 }, (_, i) => `label number ${i}`);
    const wanted = logitsIn(await outcomesOf(longform, [{ text: "x" }], { labels }));
    expect(logitsIn(await outcomesOf(short, [{ text: "x" }], { labels }))).toEqual(wanted);
    for (const calibrate of [false, true]) {
      const many = Array.from({ length: 300 }, (_, i) => `label number ${i}`);
      const options = { labels: many, calibrate };
      await expect(outcomesOf(short, [{ text: "x" }], options)).rejects.toThrow(
        /The labels have \d+ tokens together, there is room for \d+/,
      );
      const template = `${"ab".repeat(700)}{text}: {label}`;
      await expect(outcomesOf(short, [{ text: "x" }], { labels, calibrate, template })).rejects.toThrow(
        /The template and a label have \d+ tokens, which leaves none to a document/,
      );
    }
  });

  test("refuses options that make no sense, and the model goes on", async () => {
    const refused = async (options: ClassifyOptions, model = longform) =>
      await outcomesOf(model, [{ text: "x" }], options).then(
        () => "it is taken",
        (error: unknown) => error instanceof UsageError ? error.message : String(error),
      );
    expect(await refused({ template: "{label}" })).toStartWith("A template and calibration are for labels");
    expect(await refused({ calibrate: true })).toStartWith("A template and calibration are for labels");
    expect(await refused({ labels: ["a"] })).toStartWith("There is one label");
    expect(await refused({ labels: ["a", "b"], window: 5 })).toStartWith("Windows are for the score head");
    for (const maxTokens of [0, 1.5, NaN, [], [5, -1]]) {
      expect(await refused({ maxTokens })).toBe(
        `\`maxTokens\` is ${maxTokens}, wanted whole numbers from 1 on`,
      );
    }
    expect(await refused({ window: 0 })).toStartWith("`window` is 0");
    expect(await refused({ batch: 0 })).toStartWith("`batch` is 0");
    expect(await refused({ maxTokens: 701 })).toContain("longer than the model's 700 positions");
    expect(await refused({ batch: 1 })).toBe("it is taken");

    const one = await load({ uses: ["classify"], classifying: { heads: ["score"] }, sparsity: "local:64" });
    expect(await refused({ labels: ["a", "b"] }, one)).toBe('The model was loaded without the head "labels"');
    expect(await refused({}, one)).toBe("it is taken");
    const other = await load({
      uses: ["classify"],
      classifying: { heads: ["labels"] },
      sparsity: "local:64",
    });
    expect(await refused({}, other)).toBe('The model was loaded without the head "score"');
    expect(await refused({ labels: ["a", "b"] }, other)).toStartWith(
      "Labels as texts read all of a document",
    );
  });

  test("without a score head takes labels", async () => {
    const plain = await load({
      model: modelFolder("plain", { config: { bosTokenId: undefined, eosTokenId: [] } }),
      uses: ["classify"],
    });
    const documents = [{ text: "ab" }];
    const labels = ["a", "b"];
    await expect(outcomesOf(plain, documents)).rejects.toThrow("has no score head to classify with");
    const [outcome] = await outcomesOf(plain, documents, { labels });
    expect(labels).toContain(classifiedIn(outcome).label);
    const bare = outcomesOf(plain, documents, { labels, template: "{label}", calibrate: true });
    await expect(bare).rejects.toThrow("There is nothing to calibrate with");
  });
});

describe("one thing at a time", () => {
  test("is what a model does, until it is done or its reader goes away", async () => {
    const busy = "The model is at work";
    const idle = longform.classify([{ text: "x" }]);
    const classifying = longform.classify([{ text: "x" }, { text: "ab" }]);
    await classifying.next();
    await expect(longform.score("x")).rejects.toThrow(busy);
    await expect(longform.generate("x").next()).rejects.toThrow(busy);
    await expect(longform.classify([]).next()).rejects.toThrow(busy);
    await classifying.return();
    // One that was not begun was never at work.
    expect("classified" in (await idle.next()).value!).toBe(true);
    await idle.next();
    const scoring = longform.score("ab");
    await expect(longform.score("x")).rejects.toThrow(LongformError);
    expect((await scoring).tokens).toBe(1);
    const generation = longform.generate("ab", { maxTokens: 5, ignoreEos: true });
    await generation.next();
    await expect(longform.score("x")).rejects.toThrow(busy);
    await generation.return({ finishReason: "interrupt" });
    expect((await longform.score("ab")).tokens).toBe(1);
  });

  test("ends when the signal comes, and the model goes on", async () => {
    const reason = new Error("enough");
    const documents = async function* () {
      for (;;) yield { text: TEXTS[0]! };
    };
    const controller = new AbortController();
    let count = 0;
    const reading = async () => {
      for await (const _ of longform.classify(documents(), { signal: controller.signal })) {
        if (++count === 5) controller.abort(reason);
      }
    };
    await expect(reading()).rejects.toBe(reason);
    await expect(longform.score(TEXTS[0]!, { signal: controller.signal })).rejects.toBe(reason);
    expect(logitsIn(await outcomesOf(longform, [{ text: TEXTS[0]! }]))).toEqual([
      await classLogits(TEXTS[0]!),
    ]);
  });
});

test("closing frees everything, once, and nothing runs afterwards", async () => {
  const one = await load({ uses: ["score", "classify"], encodingWorkers: 1 });
  expect(one.gpu.memory.totalBytes).toBeGreaterThan(0);
  await Promise.all([one.close(), one.close()]);
  await one.close();
  expect(one.gpu.memory.totalBytes).toBe(0);
  await expect(one.score("x")).rejects.toThrow("The model is closed");
  await expect(one.classify([]).next()).rejects.toThrow("The model is closed");
});
