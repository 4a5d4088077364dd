/** Prompts that share steps give what each gives alone. */
import { afterAll, describe, expect, test } from "bun:test";
import { join } from "node:path";
import { type BatchOptions, type BatchResult, generateBatch, seedOf } from "../../src/model/batch.ts";
import { generate } from "../../src/model/generation.ts";
import type { Gpt2 } from "../../src/model/gpt2.ts";
import type { SamplingOptions } from "../../src/model/sampling.ts";
import { tokensOf } from "../../src/model/token_source.ts";
import { loadTokenizer } from "../../src/model/tokenizer.ts";
import type { Elem } from "../../src/runtime/kernel.ts";
import { eachElem, testDevice } from "../support/device.ts";
import { loadGreedy } from "../support/golden.ts";
import { loadModel } from "../support/model.ts";

const gpu = await testDevice();
const CLASSICS = join(import.meta.dir, "../../weights/classics-16k");
const tokenizer = await loadTokenizer(CLASSICS);
const bytesOf = tokenizer.bytesOf.bind(tokenizer);

/** Whole blocks of the cache: behind one sequence's last row is the next one's first. */
const CONTEXT = 128;
const COUNT = 10;

/** By element type and number of sequences. */
const models = new Map<string, Promise<Gpt2>>();
afterAll(async () => {
  for (const model of models.values()) (await model).destroy();
});

function modelOf(elem: Elem, sequences: number): Promise<Gpt2> {
  const key = `${elem} ${sequences}`;
  const known = models.get(key);
  if (known) return known;
  const decoding = { sequences, inFlight: 8, logprobs: 2 };
  const loading = loadModel(gpu, CLASSICS, { context: CONTEXT, elem, decoding });
  models.set(key, loading);
  return loading;
}

const GREEDY: SamplingOptions = { temperature: 0, topK: 0, topP: 1, minP: 0, repeatPenalty: 1, seed: 0 };
const SEEDED: SamplingOptions = {
  temperature: 1,
  topK: 50,
  topP: 0.95,
  minP: 0.01,
  repeatPenalty: 1.2,
  seed: 2 ** 53 - 3, // seeds of later prompts begin again at 0
};

/** Lengths around a block's end among others; the last two leave room for less than is asked for. */
const LENGTHS = [40, 1, 64, 100, 5, CONTEXT - 2, CONTEXT];
const TEXTS = loadGreedy().filter(({ promptIds }) => promptIds.length > CONTEXT);
const PROMPTS = LENGTHS.map((length, i) => TEXTS[i % TEXTS.length]!.promptIds.slice(0, length));

type Options = Partial<BatchOptions>;

function optionsOf(options: Options): BatchOptions {
  return { maxTokens: COUNT, sampling: GREEDY, stop: [], eosIds: [], logprobs: 2, ...options };
}

async function batch(
  model: Gpt2,
  prompts: readonly (readonly number[])[],
  options: Options = {},
): Promise<BatchResult[]> {
  return await Array.fromAsync(generateBatch(model, prompts, bytesOf, optionsOf(options)));
}

/** What `generate` gives for one of the prompts, in the form of a batch's result. */
async function alone(model: Gpt2, index: number, options: Options = {}): Promise<BatchResult> {
  const { sampling, maxTokens, stop, eosIds, logprobs: top } = optionsOf(options);
  model.truncate(0);
  const prompt = { cached: [], rest: tokensOf(PROMPTS[index]!) };
  const generation = generate(model, prompt, bytesOf, {
    maxTokens,
    sampling: { ...sampling, seed: seedOf(sampling.seed, index) },
    stop,
    eosIds,
    logprobs: top,
  });
  const tokens: number[] = [];
  const logprobs: BatchResult["logprobs"][number][] = [];
  let text = "";
  for (;;) {
    const next = await generation.next();
    if (next.done) {
      const { finishReason, heldBack } = next.value;
      return { index, text: text + heldBack, tokens, logprobs, finishReason };
    }
    const { id, logprob, top, text: piece } = next.value;
    tokens.push(id);
    logprobs.push({ logprob: logprob!, top: top! });
    text += piece;
  }
}

async function eachAlone(model: Gpt2, options: Options = {}): Promise<BatchResult[]> {
  const results: BatchResult[] = [];
  for (const index of PROMPTS.keys()) results.push(await alone(model, index, options));
  return results;
}

/** The same, greedy, made once for each model. */
const greedyResults = new Map<Gpt2, Promise<BatchResult[]>>();
function greedyAlone(model: Gpt2): Promise<BatchResult[]> {
  const known = greedyResults.get(model) ?? eachAlone(model);
  greedyResults.set(model, known);
  return known;
}

function byIndex(results: readonly BatchResult[]): BatchResult[] {
  return results.toSorted((a, b) => a.index - b.index);
}

describe("each prompt's tokens and log-probabilities are bit for bit those that it has alone", () => {
  eachElem(gpu, (elem) => {
    // Other numbers of sequences may add up in another order, so each has its own truth.
    for (const sequences of elem === "f32" ? [1, 2, 3, 5] : [3]) {
      test(`with ${sequences} decoded together in ${elem}`, async () => {
        const model = await modelOf(elem, sequences);
        expect(byIndex(await batch(model, PROMPTS))).toEqual(await greedyAlone(model));
      });
    }

    test(`with seeds of their own in ${elem}`, async () => {
      const model = await modelOf(elem, 3);
      const results = byIndex(await batch(model, PROMPTS, { sampling: SEEDED }));
      expect(results).toEqual(await eachAlone(model, { sampling: SEEDED }));
    });
  });

  test("in whatever order they come, and whoever their neighbours are", async () => {
    const model = await modelOf("f32", 3);
    const wanted = await greedyAlone(model);
    for (const order of [[6, 5, 4, 3, 2, 1, 0], [4, 4, 0], [3]]) {
      const results = byIndex(await batch(model, order.map((index) => PROMPTS[index]!)));
      expect(results).toEqual(order.map((from, index) => ({ ...wanted[from]!, index })));
    }
  });

  test("and greedy tokens are the same however many are decoded together", async () => {
    const tokens = async (sequences: number) =>
      (await greedyAlone(await modelOf("f32", sequences))).map((result) => result.tokens);
    const wanted = await tokens(1);
    expect(wanted.map(({ length }) => length)).toEqual([COUNT, COUNT, COUNT, COUNT, COUNT, 3, 1]);
    for (const sequences of [2, 3, 5]) expect(await tokens(sequences)).toEqual(wanted);
  });
});

describe("a batch", () => {
  test("gives results as they are finished, one for each prompt", async () => {
    const model = await modelOf("f32", 2);
    const prefilled: number[] = [];
    let tokens = 0;
    const results = await batch(model, PROMPTS, {
      onPrefilled: (count, ms) => {
        prefilled.push(count);
        expect(ms).toBeGreaterThan(0);
      },
      onToken: () => tokens++,
    });
    // The last two have room for three tokens and for one; all others are as long, so they end in order.
    expect(results.map(({ index }) => index)).toEqual([0, 1, 2, 3, 5, 6, 4]);
    expect(prefilled).toEqual(LENGTHS);
    expect(tokens).toBe(5 * COUNT + 3 + 1);
    expect(results.every(({ finishReason }) => finishReason === "length")).toBe(true);
  });

  test("of no prompts, or of no tokens, is over at once", async () => {
    const model = await modelOf("f32", 2);
    expect(await batch(model, [])).toEqual([]);
    expect(await batch(model, PROMPTS, { maxTokens: 0 })).toEqual(
      PROMPTS.map((_, index) => ({ index, text: "", tokens: [], logprobs: [], finishReason: "length" })),
    );
  });

  test("without log-probabilities has none", async () => {
    const results = await batch(await modelOf("f32", 2), PROMPTS.slice(0, 2), { logprobs: undefined });
    expect(results.map(({ tokens, logprobs }) => [tokens.length, logprobs])).toEqual([[COUNT, []], [
      COUNT,
      [],
    ]]);
  });

  test("goes on when a token or a text ends one of its prompts", async () => {
    const model = await modelOf("f32", 3);
    const free = await greedyAlone(model);
    // One prompt's fourth token, and what another's fifth and sixth spell.
    const eosIds = [free[0]!.tokens[3]!];
    const stop = [tokenizer.decode(free[3]!.tokens.slice(4, 6)), "never to be found"];
    const wanted = await eachAlone(model, { eosIds, stop });
    const reasons = wanted.map(({ finishReason }) => finishReason);
    expect(new Set(reasons)).toEqual(new Set(["eos", "stop", "length"]));
    expect(byIndex(await batch(model, PROMPTS, { eosIds, stop }))).toEqual(wanted);
  });

  test("is over when it is interrupted, with what there is", async () => {
    const model = await modelOf("f32", 3);
    const whole = await greedyAlone(model);
    const controller = new AbortController();
    let tokens = 0;
    const results = await batch(model, PROMPTS.slice(0, 5), {
      signal: controller.signal,
      onToken: () => ++tokens === 4 * COUNT && controller.abort(),
    });
    // By then the first three are done, and the others in their places.
    const interrupted = results.filter(({ finishReason }) => finishReason === "interrupt");
    const finished = results.filter((result) => !interrupted.includes(result));
    expect(finished.map(({ index }) => index)).toEqual([0, 1, 2]);
    for (const result of finished) expect(result).toEqual(whole[result.index]!);
    expect(interrupted.map(({ index }) => index).toSorted()).toEqual([3, 4]);
    for (const { index, tokens, text, logprobs } of interrupted) {
      expect(tokens).toEqual(whole[index]!.tokens.slice(0, tokens.length));
      expect(logprobs).toEqual(whole[index]!.logprobs.slice(0, tokens.length));
      expect(text).toBe(tokenizer.decode([...tokens]));
    }
    expect(tokens).toBe(4 * COUNT);
    expect(await alone(model, 2)).toEqual(whole[2]!);
    expect(byIndex(await batch(model, PROMPTS.slice(0, 4)))).toEqual(whole.slice(0, 4));
  });

  test("that is interrupted in a prompt leaves that prompt out", async () => {
    const model = await modelOf("f32", 3);
    const controller = new AbortController();
    const { signal } = controller;
    let prefilled = 0;
    const results = await batch(model, PROMPTS, {
      signal,
      onPrefilled: () => ++prefilled === 2 && controller.abort(),
    });
    expect(results.map(({ index, finishReason }) => [index, finishReason])).toEqual([
      [0, "interrupt"],
      [1, "interrupt"],
    ]);
    expect(await batch(model, PROMPTS, { signal })).toEqual([]);
  });

  test("whose reader goes away leaves the model as any other", async () => {
    const model = await modelOf("f32", 3);
    const wanted = (await greedyAlone(model))[3]!;
    for await (const { index } of generateBatch(model, PROMPTS, bytesOf, optionsOf({ maxTokens: 3 }))) {
      if (index === 2) break;
    }
    expect(await alone(model, 3)).toEqual(wanted);
  });

  test("ends with the error of a prompt that cannot run, and the model goes on", async () => {
    const model = await modelOf("f32", 2);
    const prompts = [PROMPTS[0]!, [model.config.vocabSize]];
    await expect(batch(model, prompts)).rejects.toThrow("the model's ids go from 0 to 8191");
    expect(await batch(model, [PROMPTS[0]!])).toEqual((await greedyAlone(model)).slice(0, 1));
  });
});

test("seeds count up from that of the run, and stay exact", () => {
  expect([0, 1, 6].map((index) => seedOf(2 ** 40, index))).toEqual([2 ** 40, 2 ** 40 + 1, 2 ** 40 + 6]);
  expect([2, 3].map((index) => seedOf(2 ** 53 - 3, index))).toEqual([2 ** 53 - 1, 0]);
});
