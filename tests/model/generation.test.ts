/**
 * Generation against the loop that it stands for, each token drawn on the CPU from logits that were read back: what runs
 * ahead of its reader shows in nothing, not in tokens, nor in the cache, nor in what follows.
 */
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { createHash } from "node:crypto";
import { join } from "node:path";
import {
  type FinishReason,
  generate,
  type GeneratedToken,
  type GenerationOptions,
  type Prompt,
} from "../../src/model/generation.ts";
import type { Gpt2 } from "../../src/model/gpt2.ts";
import type { Positions } from "../../src/model/positions.ts";
import { createSampler, logSoftmaxTopK, type SamplingOptions } from "../../src/model/sampling.ts";
import { openSession, saveSession } from "../../src/model/session.ts";
import { tokensOf } from "../../src/model/token_source.ts";
import { loadTokenizer } from "../../src/model/tokenizer.ts";
import { download } from "../../src/runtime/buffers.ts";
import { DeviceError, InputError } from "../../src/runtime/errors.ts";
import type { Elem } from "../../src/runtime/kernel.ts";
import { temporaryFolder, writeTinyCheckpoint } from "../support/checkpoint.ts";
import { eachElem, testDevice, testElems } from "../support/device.ts";
import { loadGreedy } from "../support/golden.ts";
import { loadModel, someIds } from "../support/model.ts";

const gpu = await testDevice();
const folder = temporaryFolder();
const CLASSICS = join(import.meta.dir, "../../weights/classics-16k");
const tokenizer = await loadTokenizer(CLASSICS);
const bytesOf = tokenizer.bytesOf.bind(tokenizer);

const MOST_IN_FLIGHT = 8;
const CONTEXT = 320;

const models = new Map<Elem, Gpt2>();
beforeAll(async () => {
  for (const elem of testElems(gpu)) {
    const decoding = { sequences: 1, inFlight: MOST_IN_FLIGHT, logprobs: 3 };
    models.set(elem, await loadModel(gpu, CLASSICS, { context: CONTEXT, elem, decoding }));
  }
});
afterAll(() => {
  for (const model of models.values()) model.destroy();
  folder.remove();
});

const GREEDY: SamplingOptions = { temperature: 0, topK: 0, topP: 1, minP: 0, repeatPenalty: 1, seed: 0 };
const SETTINGS: Readonly<Record<string, SamplingOptions>> = {
  greedy: GREEDY,
  "top-k and top-p": { ...GREEDY, temperature: 0.8, topK: 40, topP: 0.95, seed: 7 },
  "top-p, min-p and a penalty": {
    temperature: 1.2,
    topK: 0,
    topP: 0.9,
    minP: 0.02,
    repeatPenalty: 1.3,
    seed: 2 ** 40 + 5, // more than one word
  },
};
const SEEDED = SETTINGS["top-p, min-p and a penalty"]!;

/** Beginnings of the recorded texts; blocks of the cache end at 64 tokens. */
const LENGTHS = [1, 17, 63, 64, 65, 100, 128, 200];
const PROMPTS = loadGreedy().map(({ promptIds }, i) => promptIds.slice(0, LENGTHS[i]!));
const PROMPT = PROMPTS[3]!;

interface HostRun {
  readonly ids: readonly number[];
  /** What each of them was drawn from. */
  readonly logits: readonly Float32Array[];
}

/**
 * The reference. All tokens but the last go into the cache.
 * @param logits those after the prompt, which is in the cache
 * @param penalised what the penalty applies to besides the tokens drawn
 */
async function hostLoop(
  model: Gpt2,
  prompt: readonly number[],
  logits: Float32Array,
  sampling: SamplingOptions,
  count: number,
  penalised = prompt,
): Promise<HostRun> {
  model.truncate(prompt.length);
  const sampler = createSampler(sampling);
  const ids: number[] = [];
  const rows = [logits];
  for (;;) {
    ids.push(sampler.next(rows.at(-1)!, [...penalised, ...ids]));
    if (ids.length === count) return { ids, logits: rows };
    rows.push(await model.decodeStep(ids.at(-1)!));
  }
}

async function prefilled(model: Gpt2, prompt: readonly number[]): Promise<Float32Array<ArrayBuffer>> {
  model.truncate(0);
  return new Float32Array(await model.prefill(prompt));
}

interface Generated {
  readonly tokens: readonly GeneratedToken[];
  readonly ids: readonly number[];
  readonly text: string;
  readonly finishReason: FinishReason;
}

type Options = Partial<GenerationOptions> & Pick<GenerationOptions, "maxTokens">;

/** Generates to the end; `onToken` is called with the number of tokens so far. */
async function generated(
  model: Gpt2,
  prompt: Prompt,
  options: Options,
  onToken?: (count: number) => void,
): Promise<Generated> {
  const generation = generate(model, prompt, bytesOf, {
    sampling: GREEDY,
    stop: [],
    eosIds: [],
    ...options,
  });
  const tokens: GeneratedToken[] = [];
  for (;;) {
    const next = await generation.next();
    if (next.done) {
      const { finishReason, heldBack } = next.value;
      const text = tokens.map((token) => token.text).join("") + heldBack;
      return { tokens, ids: tokens.map(({ id }) => id), text, finishReason };
    }
    tokens.push(next.value);
    onToken?.(tokens.length);
  }
}

/** A prompt of which nothing is in the cache. */
function whole(prompt: readonly number[]): Prompt {
  return { cached: [], rest: tokensOf(prompt) };
}

/** Of all keys and values that the model goes by. */
async function digestOfRows({ cache }: Gpt2): Promise<string> {
  const hash = createHash("sha256");
  for (let layer = 0; layer < cache.layers; layer++) {
    for (const which of ["k", "v"] as const) {
      for await (const bytes of cache.read(layer, which, cache.length)) hash.update(bytes);
    }
  }
  return hash.digest("hex");
}

describe("tokens are those of the CPU's sampler, however far ahead the GPU is", () => {
  /** As few as let the GPU be `MOST_IN_FLIGHT` ahead, which it is not from the first token on. */
  const COUNT = 14;
  /** Tokens by the depth; a shallow one is reached sooner. */
  const COUNTS = [[1, 8], [2, 8], [MOST_IN_FLIGHT, COUNT]] as const;

  eachElem(gpu, (elem) => {
    // The sampler sees f32 either way.
    for (const prompt of elem === "f32" ? PROMPTS : PROMPTS.slice(6, 7)) {
      test(`behind a prompt of ${prompt.length} in ${elem}`, async () => {
        const model = models.get(elem)!;
        const logits = await prefilled(model, prompt);
        for (const [name, sampling] of Object.entries(SETTINGS)) {
          const { ids: wanted } = await hostLoop(model, prompt, logits, sampling, COUNT);
          for (const [inFlight, maxTokens] of COUNTS) {
            // Once with the prompt's prefill, then behind what it left.
            model.truncate(inFlight === 1 ? 0 : prompt.length);
            const from = inFlight === 1 ? whole(prompt) : { cached: prompt, rest: { logits } };
            const { ids, finishReason } = await generated(model, from, { maxTokens, sampling, inFlight });
            expect({ name, inFlight, ids, finishReason }).toEqual({
              name,
              inFlight,
              ids: wanted.slice(0, maxTokens),
              finishReason: "length",
            });
            expect(model.length).toBe(prompt.length + maxTokens - 1);
          }
        }
      });
    }
  });

  test("where positions are beyond the model's table", async () => {
    const sizes = { nLayer: 2, nHead: 3, nEmbd: 12, nPositions: 40, vocabSize: 101 };
    const dir = writeTinyCheckpoint(join(folder.path, "positions"), { config: sizes, dtype: "F16" }).dir;
    const context = 70;
    const prompt = someIds(30, sizes.vocabSize);
    const modes: readonly Positions[] = [
      { mode: "interpolate", nPositions: 40, context },
      { mode: "repeat", nPositions: 40, context },
    ];
    for (const positions of modes) {
      const decoding = { sequences: 1, inFlight: MOST_IN_FLIGHT };
      const model = await loadModel(gpu, dir, { context, elem: "f32", positions, decoding });
      const { ids: wanted } = await hostLoop(model, prompt, await prefilled(model, prompt), SEEDED, 35);
      model.truncate(0);
      const { ids } = await generated(model, whole(prompt), { maxTokens: 35, sampling: SEEDED });
      expect(ids).toEqual(wanted);
      model.destroy();
    }
  });

  test("with the prompt's tokens counted for the repetition penalty, wherever they came from", async () => {
    const model = models.get("f32")!;
    const sampling = { ...GREEDY, repeatPenalty: 1.3 };
    const half = PROMPT.length / 2;
    const logits = await prefilled(model, PROMPT);
    const { ids: unaware } = await hostLoop(model, PROMPT, logits, sampling, COUNT, []);
    const { ids: wanted } = await hostLoop(model, PROMPT, logits, sampling, COUNT);
    expect(wanted).not.toEqual(unaware);
    const prompts: (readonly [cached: number, prompt: Prompt])[] = [
      [PROMPT.length, { cached: PROMPT, rest: { logits } }],
      [half, { cached: Uint32Array.from(PROMPT.slice(0, half)), rest: tokensOf(PROMPT.slice(half)) }],
      [0, whole(PROMPT)],
    ];
    for (const [cached, prompt] of prompts) {
      model.truncate(cached);
      expect((await generated(model, prompt, { maxTokens: COUNT, sampling })).ids).toEqual([...wanted]);
    }
  });

  test("behind a session, as if its prompt had just run", async () => {
    const model = models.get("f32")!;
    const logits = await prefilled(model, PROMPT);
    const { ids: wanted } = await hostLoop(model, PROMPT, logits, SEEDED, COUNT);
    model.truncate(PROMPT.length);
    const path = join(folder.path, "prompt.session");
    await saveSession(path, {
      model: "classics",
      positions: "exact",
      attention: "dense",
      ids: Uint32Array.from(PROMPT),
      logits,
      rows: model.cache,
    });
    await prefilled(model, PROMPTS[7]!); // other rows where those of the session will be
    model.truncate(0);
    const session = (await openSession(path))!;
    await session.restore(model.cache, PROMPT.length);
    model.cache.adopt(PROMPT.length);
    const prompt = { cached: session.ids, rest: { logits: await session.logits() } };
    expect((await generated(model, prompt, { maxTokens: COUNT, sampling: SEEDED })).ids).toEqual([...wanted]);
    await session.close();
  });
});

describe("what ran ahead leaves no trace", () => {
  const COUNT = 12;
  const MORE = PROMPTS[1]!;
  let host: HostRun;
  let text: string;
  let logits: Float32Array<ArrayBuffer>;
  beforeAll(async () => {
    const model = models.get("f32")!;
    logits = await prefilled(model, PROMPT);
    host = await hostLoop(model, PROMPT, logits, SEEDED, COUNT);
    text = tokenizer.decode(host.ids);
  });

  /** The cache, and what becomes of it when another prompt and other tokens follow. */
  async function traceOf(model: Gpt2) {
    const { length } = model;
    const rows = await digestOfRows(model);
    const seen = [...PROMPT, ...host.ids.slice(0, length - PROMPT.length)];
    let logits = new Float32Array();
    const onPrefilled = (_: unknown, last: Float32Array) => {
      logits = new Float32Array(last);
    };
    const prompt = { cached: seen, rest: tokensOf(MORE) };
    const { ids } = await generated(model, prompt, { maxTokens: 6, sampling: SEEDED, onPrefilled });
    return { length, rows, logits, ids };
  }

  /**
   * Compares the end of a generation at all depths with the host loop's, of as many tokens.
   * @param drawn tokens drawn, the one that ends it among them
   */
  async function expectNoTrace(
    drawn: number,
    wanted: Omit<Generated, "tokens">,
    run: (model: Gpt2, inFlight: number) => Promise<Omit<Generated, "tokens">>,
  ): Promise<void> {
    const model = models.get("f32")!;
    await hostLoop(model, PROMPT, logits, SEEDED, drawn);
    const trace = await traceOf(model);
    expect(trace.length).toBe(PROMPT.length + drawn - 1);
    for (const inFlight of [1, MOST_IN_FLIGHT]) {
      model.truncate(0);
      const { ids, text, finishReason } = await run(model, inFlight);
      expect({ ids, text, finishReason }).toEqual(wanted);
      expect(await traceOf(model)).toEqual(trace);
    }
  }

  test("after its last token", async () => {
    await expectNoTrace(
      COUNT,
      { ids: host.ids, text, finishReason: "length" },
      (model, inFlight) => generated(model, whole(PROMPT), { maxTokens: COUNT, sampling: SEEDED, inFlight }),
    );
  });

  test("after a token that ends the text", async () => {
    const eosIds = [tokenizer.vocabSize - 1, host.ids[6]!];
    const before = host.ids.slice(0, host.ids.findIndex((id) => eosIds.includes(id)));
    expect(before.length).toBeGreaterThan(0);
    const wanted = { ids: before, text: tokenizer.decode(before), finishReason: "eos" } as const;
    await expectNoTrace(
      before.length + 1,
      wanted,
      (model, inFlight) =>
        generated(model, whole(PROMPT), { maxTokens: 100, sampling: SEEDED, inFlight, eosIds }),
    );
  });

  test("after a stop text that several tokens make up", async () => {
    const [start, end] = [tokenizer.decode(host.ids.slice(0, 5)), tokenizer.decode(host.ids.slice(0, 7))];
    const stop = end.slice(start.length - 1);
    const drawn = host.ids.findIndex((_, i) => tokenizer.decode(host.ids.slice(0, i + 1)).includes(stop)) + 1;
    const wanted = {
      ids: host.ids.slice(0, drawn),
      text: text.slice(0, text.indexOf(stop)),
      finishReason: "stop",
    } as const;
    await expectNoTrace(drawn, wanted, (model, inFlight) =>
      generated(model, whole(PROMPT), {
        maxTokens: 100,
        sampling: SEEDED,
        inFlight,
        stop: ["never to be found", stop],
      }));
  });

  test("after an interruption", async () => {
    const ids = host.ids.slice(0, 5);
    const wanted = { ids, text: tokenizer.decode(ids), finishReason: "interrupt" } as const;
    await expectNoTrace(5, wanted, (model, inFlight) => {
      const controller = new AbortController();
      const options = { maxTokens: 100, sampling: SEEDED, inFlight, signal: controller.signal };
      return generated(model, whole(PROMPT), options, (count) => count === 5 && controller.abort());
    });
  });

  test("after its reader went away", async () => {
    const ids = host.ids.slice(0, 3);
    const wanted = { ids, text: tokenizer.decode(ids), finishReason: "interrupt" } as const;
    await expectNoTrace(3, wanted, async (model, inFlight) => {
      const read: GeneratedToken[] = [];
      const options = { maxTokens: 100, sampling: SEEDED, inFlight, stop: [], eosIds: [] };
      for await (const token of generate(model, whole(PROMPT), bytesOf, options)) {
        read.push(token);
        if (read.length === 3) break;
      }
      return { ...wanted, ids: read.map(({ id }) => id), text: read.map((token) => token.text).join("") };
    });
  });
});

describe("a generation ends", () => {
  const model = () => models.get("f32")!;

  test("before it begins when it was interrupted during the prompt or right behind it", async () => {
    const controller = new AbortController();
    const { signal } = controller;
    const onPrefilled = () => controller.abort();
    model().truncate(0);
    const behind = await generated(model(), whole(PROMPT), { maxTokens: 9, signal, onPrefilled });
    expect(behind).toEqual({ tokens: [], ids: [], text: "", finishReason: "interrupt" });
    expect(model().length).toBe(PROMPT.length);
    model().truncate(0);
    const during = await generated(model(), whole(PROMPT), { maxTokens: 9, signal });
    expect(during).toEqual(behind);
    expect(model().length).toBe(0);
  });

  test("after no token or one, if no more are wanted", async () => {
    const logits = await prefilled(model(), PROMPT);
    const { ids: [first] } = await hostLoop(model(), PROMPT, logits, SEEDED, 1);
    for (const maxTokens of [0, 1]) {
      model().truncate(0);
      let prompt: readonly number[] = [];
      const result = await generated(model(), whole(PROMPT), {
        maxTokens,
        sampling: SEEDED,
        onPrefilled: (ids) => {
          prompt = ids;
        },
      });
      expect(result).toMatchObject({ ids: [first!].slice(0, maxTokens), finishReason: "length" });
      expect(prompt).toEqual(PROMPT);
      expect(model().length).toBe(PROMPT.length);
    }
  });

  test("where the context is full, with one token more than fits, and writes nothing behind it", async () => {
    const prompt = PROMPTS[1]!;
    const context = prompt.length + 3;
    const decoding = { sequences: 1, inFlight: MOST_IN_FLIGHT };
    const full = await loadModel(gpu, CLASSICS, { context, elem: "f32", decoding });
    for (const inFlight of [MOST_IN_FLIGHT, 1]) {
      full.truncate(0);
      const { ids, finishReason } = await generated(full, whole(prompt), {
        maxTokens: 100,
        sampling: SEEDED,
        inFlight,
      });
      expect(full.length).toBe(context);
      const rows = await digestOfRows(full);
      // A new cache holds zeros, and has room for a whole block.
      for (let layer = 0; layer < full.cache.layers; layer++) {
        const { heads, headDim, capacity } = full.cache;
        const [{ k, v } = {}] = full.cache.layer(layer).parts;
        for (const buffer of [k!, v!]) {
          const values = new Float32Array(await download(buffer));
          for (let head = 0; head < heads; head++) {
            const row = (position: number) => (head * capacity + position) * headDim;
            expect(values.subarray(row(context), row(capacity)).every((x) => x === 0)).toBe(true);
          }
        }
      }
      const { ids: wanted } = await hostLoop(full, prompt, await prefilled(full, prompt), SEEDED, 4);
      expect({ ids, finishReason }).toEqual({ ids: [...wanted], finishReason: "length" });
      expect(await digestOfRows(full)).toBe(rows);
      await expect(full.decodeStep(wanted[3]!)).rejects.toThrow(InputError);
    }
    // No room for a single token: the prompt's last logits still give one.
    const longer = PROMPTS[2]!.slice(0, context);
    full.truncate(0);
    expect((await generated(full, whole(longer), { maxTokens: 100 })).ids).toHaveLength(1);
    expect(full.length).toBe(context);
    full.destroy();
  });

  test("with an error where logits cannot be drawn from, and the model goes on", async () => {
    const logits = await prefilled(model(), PROMPT);
    const { ids: wanted } = await hostLoop(model(), PROMPT, logits, SEEDED, 4);
    const broken = logits.slice();
    broken[4711] = NaN;
    for (const inFlight of [1, MOST_IN_FLIGHT]) {
      model().truncate(PROMPT.length);
      const prompt = { cached: PROMPT, rest: { logits: broken } };
      const error = await generated(model(), prompt, { maxTokens: 100, inFlight }).catch((e: unknown) => e);
      expect(error).toBeInstanceOf(DeviceError);
      expect((error as DeviceError).message).toBe("The logits contain NaN (first at token id 4711)");
      expect(model().length).toBe(PROMPT.length);
      const again = { cached: PROMPT, rest: { logits } };
      const { ids } = await generated(model(), again, { maxTokens: 4, sampling: SEEDED, inFlight });
      expect(ids).toEqual([...wanted]);
    }
  });
});

describe("log-probabilities", () => {
  /**
   * Of 8,192 exponentials a lane adds up to 128, and up to 64 lanes follow: 2^-24 each at most, together less than 2^-16.
   * An exponential of a number x is off by 3 + 2|x| units of 2^-23, which counts as much as the exponential itself, so by
   * less than 5 of them; the logarithm by 2^-21. The difference is rounded to its own size.
   */
  const tolerance = (logprob: number) => 2 ** -16 + 5 * 2 ** -23 + 2 ** -21 + Math.abs(logprob) * 2 ** -22;

  eachElem(gpu, (elem) => {
    test(`in ${elem} are those of the host loop's logits, at any depth`, async () => {
      const model = models.get(elem)!;
      const logits = await prefilled(model, PROMPT);
      const host = await hostLoop(model, PROMPT, logits, SEEDED, 8);
      for (const [top, inFlight] of [[0, 1], [3, 1], [0, MOST_IN_FLIGHT], [3, MOST_IN_FLIGHT]] as const) {
        model.truncate(PROMPT.length);
        const options = { maxTokens: 8, sampling: SEEDED, logprobs: top, inFlight };
        const { tokens } = await generated(model, { cached: PROMPT, rest: { logits } }, options);
        expect(tokens.map(({ id }) => id)).toEqual([...host.ids]);
        tokens.forEach((token, i) => {
          const wanted = logSoftmaxTopK(host.logits[i]!, top, token.id);
          expect(Math.abs(token.logprob! - wanted.logprob)).toBeLessThan(tolerance(wanted.logprob));
          expect(token.top!.map(({ id }) => id)).toEqual(wanted.top.map(({ id }) => id));
          token.top!.forEach(({ logprob }, rank) => {
            const exact = wanted.top[rank]!.logprob;
            expect(Math.abs(logprob - exact)).toBeLessThan(tolerance(exact));
          });
        });
      }
    });
  });

  test("are there only if asked for, and no more than the model was loaded for", async () => {
    const model = models.get("f32")!;
    model.truncate(0);
    const { tokens } = await generated(model, whole(PROMPT), { maxTokens: 2 });
    expect(Object.keys(tokens[0]!).toSorted()).toEqual(["id", "text"]);
    model.truncate(0);
    const more = generated(model, whole(PROMPT), { maxTokens: 2, logprobs: 4 });
    await expect(more).rejects.toThrow("loaded for 3 log-probabilities, not for 4");
    expect(model.length).toBe(0);
  });
});
