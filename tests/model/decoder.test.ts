/** Steps that run ahead of their results: how many there are, whose they are, and what happens where they fail. */
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { createHash } from "node:crypto";
import { join } from "node:path";
import type { Decoder, DecoderOptions, DrawnToken } from "../../src/model/decoder.ts";
import type { Gpt2 } from "../../src/model/gpt2.ts";
import { createSampler, type SamplingOptions } from "../../src/model/sampling.ts";
import { download, upload } from "../../src/runtime/buffers.ts";
import { DeviceError } from "../../src/runtime/errors.ts";
import { testDevice } from "../support/device.ts";
import { loadGreedy } from "../support/golden.ts";
import { loadModel } from "../support/model.ts";

const gpu = await testDevice();
const CLASSICS = join(import.meta.dir, "../../weights/classics-16k");
const CONTEXT = 192;
const MOST_IN_FLIGHT = 16;

/** With one sequence, and with two. */
let one: Gpt2;
let two: Gpt2;
beforeAll(async () => {
  const load = (sequences: number) =>
    loadModel(gpu, CLASSICS, {
      context: CONTEXT,
      elem: "f32",
      decoding: { sequences, inFlight: MOST_IN_FLIGHT, logprobs: 1 },
    });
  one = await load(1);
  two = await load(2);
});
afterAll(() => {
  one.destroy();
  two.destroy();
});

const GREEDY: SamplingOptions = { temperature: 0, topK: 0, topP: 1, minP: 0, repeatPenalty: 1, seed: 0 };
/** What a token depends on is then all that came before it. */
const DRAWN: DecoderOptions = {
  sampling: { temperature: 1, topK: 0, topP: 0.95, minP: 0, repeatPenalty: 1.2 },
  logprobs: 0,
};

const TEXTS = loadGreedy().map(({ promptIds }) => promptIds);
/** Three that differ, none of whole blocks of the cache. */
const [A, B, C] = [TEXTS[3]!.slice(0, 61), TEXTS[4]!.slice(0, 100), TEXTS[5]!.slice(0, 7)] as const;

/** Puts a prompt into a sequence and draws behind it. */
async function begin(model: Gpt2, decoder: Decoder, sequence: number, prompt: number[], seed: number) {
  model.truncate(0, sequence);
  await model.prefill(prompt, { sequence });
  decoder.begin(sequence, prompt, seed);
}

/** The results of `count` steps. */
async function take(decoder: Decoder, count: number): Promise<DrawnToken[]> {
  const drawn: DrawnToken[] = [];
  for (let step = 0; step < count; step++) drawn.push(...await decoder.next());
  return drawn;
}

/** Id and log-probability, which tells one row of logits from another, of a sequence's tokens. */
function tokensOfSequence(drawn: readonly DrawnToken[], sequence: number): (readonly number[])[] {
  return drawn.filter((token) => token.sequence === sequence).map(({ id, logprob }) => [id, logprob!]);
}

/** `count` tokens behind a prompt, one step at a time, with no other sequence begun. */
async function alone(model: Gpt2, sequence: number, prompt: number[], seed: number, count: number) {
  const decoder = await model.decoder(DRAWN);
  await begin(model, decoder, sequence, prompt, seed);
  const drawn = await decoder.next();
  while (drawn.length < count) {
    decoder.stepAhead(1);
    drawn.push(...await decoder.next());
  }
  return tokensOfSequence(drawn, sequence);
}

/** Of the keys and values of a sequence's first tokens in all layers. */
async function digestOfRows({ cache }: Gpt2, sequence: number, tokens: number): Promise<string> {
  const hash = createHash("sha256");
  const { heads, headDim, capacity, sequences } = cache;
  for (let layer = 0; layer < cache.layers; layer++) {
    const [{ k, v } = {}] = cache.layer(layer).parts;
    for (const buffer of [k!, v!]) {
      // A new cache has its blocks in order: those of a sequence are one run in each head.
      const rows = new Float32Array(await download(buffer));
      for (let head = 0; head < heads; head++) {
        const first = (head * sequences + sequence) * capacity * headDim;
        hash.update(rows.subarray(first, first + tokens * headDim));
      }
    }
  }
  return hash.digest("hex");
}

describe("steps in flight", () => {
  test("are filled up when there is room for several, or at most half are left", async () => {
    const decoder = await one.decoder(DRAWN);
    expect(decoder.mostInFlight).toBe(MOST_IN_FLIGHT);
    expect(decoder.inFlight).toBe(0);
    await begin(one, decoder, 0, C, 1);
    expect(decoder.inFlight).toBe(1);
    const after = (ahead: number) => {
      decoder.stepAhead(ahead);
      return decoder.inFlight;
    };
    expect([1, 2, 3, 4, 6, 5, 0, 16, 15].map(after)).toEqual([1, 2, 2, 4, 4, 4, 4, 16, 16]);
    const filled: number[] = [];
    for (let step = 0; step < 9; step++) {
      await decoder.next();
      filled.push(after(16));
    }
    expect(filled).toEqual([15, 14, 13, 16, 15, 14, 13, 16, 15]);
    await decoder.discard();
    expect(decoder.inFlight).toBe(0);
    expect(one.length).toBe(C.length + 8);
  });

  test("give the same tokens however many there are", async () => {
    const wanted = await alone(one, 0, A, 3, 24);
    for (const aheads of [[16], [1, 16], [3, 9, 2], [5], [2]]) {
      const decoder = await one.decoder(DRAWN);
      await begin(one, decoder, 0, A, 3);
      const drawn: DrawnToken[] = [];
      for (let step = 0; step < 24; step++) {
        decoder.stepAhead(aheads[step % aheads.length]!);
        drawn.push(...await decoder.next());
      }
      expect(tokensOfSequence(drawn, 0)).toEqual(wanted);
      expect(one.length).toBe(A.length + 23);
      await decoder.discard();
      expect(one.length).toBe(A.length + 23);
    }
  });

  test("are no more than the model was loaded for", async () => {
    const decoder = await one.decoder(DRAWN);
    await begin(one, decoder, 0, C, 1);
    decoder.stepAhead(MOST_IN_FLIGHT);
    expect(() => decoder.begin(0, C, 1)).toThrow("There is no room for more steps in flight");
    expect(() => decoder.stepAhead(2 * MOST_IN_FLIGHT)).toThrow("There is no room for more steps in flight");
    expect(decoder.inFlight).toBe(MOST_IN_FLIGHT);
    await decoder.discard();
  });

  test("must be there to be waited for", async () => {
    const decoder = await one.decoder(DRAWN);
    await expect(decoder.next()).rejects.toThrow("Nothing is in flight");
    await begin(one, decoder, 0, C, 1);
    await decoder.next();
    await expect(decoder.next()).rejects.toThrow("Nothing is in flight");
    await decoder.discard();
  });

  test("need a model that was loaded to decode", async () => {
    const reader = await loadModel(gpu, CLASSICS, { context: 8, elem: "f32", decoding: undefined });
    await expect(reader.decoder(DRAWN)).rejects.toThrow("loaded with `decoding`");
    reader.destroy();
    await expect(one.decoder({ ...DRAWN, logprobs: 2 })).rejects.toThrow("loaded for 1 log-probabilities");
  });
});

describe("two sequences", () => {
  test("draw the same together as alone, in either place", async () => {
    const wanted = [await alone(two, 0, A, 1, 12), await alone(two, 0, B, 2, 12)];
    expect(await alone(two, 1, A, 1, 12)).toEqual(wanted[0]!);
    for (const places of [[0, 1], [1, 0]] as const) {
      const decoder = await two.decoder(DRAWN);
      await begin(two, decoder, places[0], A, 1);
      await begin(two, decoder, places[1], B, 2);
      decoder.stepAhead(13);
      const drawn = await take(decoder, 13);
      places.forEach((place, i) => expect(tokensOfSequence(drawn, place)).toEqual(wanted[i]!));
      expect(places.map((place) => two.cache.lengthOf(place))).toEqual([A.length + 11, B.length + 11]);
      await decoder.discard();
    }
  });

  test("do not see that one ends while steps are in flight and begins anew", async () => {
    const [aAlone, bAlone, cAlone] = [
      await alone(two, 0, A, 1, 20),
      await alone(two, 0, B, 2, 20),
      await alone(two, 0, C, 3, 20),
    ];
    const decoder = await two.decoder(DRAWN);
    await begin(two, decoder, 0, A, 1);
    await begin(two, decoder, 1, B, 2);
    decoder.stepAhead(10);
    const first = await take(decoder, 4);
    expect(tokensOfSequence(first, 0)).toEqual(aAlone.slice(0, 3));
    expect(tokensOfSequence(first, 1)).toEqual(bAlone.slice(0, 3));

    decoder.end(0);
    expect(two.cache.lengthOf(0)).toBe(A.length + 2);
    expect(decoder.inFlight).toBe(6);
    await begin(two, decoder, 0, C, 3);
    decoder.stepAhead(11);
    // Six of the steps in flight were begun for the prompt that is gone, then comes the first token of the new one.
    const second = await take(decoder, 7);
    expect(second.map(({ sequence }) => sequence)).toEqual([1, 1, 1, 1, 1, 1, 0]);
    expect(two.cache.lengthOf(0)).toBe(C.length);
    const third = await take(decoder, 4);
    expect(third.map(({ sequence }) => sequence)).toEqual([0, 1, 0, 1, 0, 1, 0, 1]);
    expect(tokensOfSequence([...second, ...third], 0)).toEqual(cAlone.slice(0, 5));
    expect(tokensOfSequence([...first, ...second, ...third], 1)).toEqual(bAlone.slice(0, 13));
    expect(two.cache.lengthOf(0)).toBe(C.length + 4);
    expect(two.cache.lengthOf(1)).toBe(B.length + 12);
    await decoder.discard();
  });

  test("keep their keys and values apart", async () => {
    const decoder = await two.decoder(DRAWN);
    for (const [kept, other] of [[0, 1], [1, 0]] as const) {
      await begin(two, decoder, kept, A, 1);
      decoder.stepAhead(8);
      await take(decoder, 5);
      decoder.end(kept);
      const tokens = two.cache.lengthOf(kept);
      expect(tokens).toBe(A.length + 4); // over the end of a block
      const before = await digestOfRows(two, kept, tokens);
      await begin(two, decoder, other, B, 2);
      decoder.stepAhead(12);
      await take(decoder, decoder.inFlight);
      expect(two.cache.lengthOf(other)).toBeGreaterThan(B.length);
      expect(await digestOfRows(two, kept, tokens)).toBe(before);
      expect(two.cache.lengthOf(kept)).toBe(tokens);
      decoder.end(other);
    }
  });
});

describe("logits that no token can be drawn from", () => {
  const broken: readonly (readonly [what: string, change: (logits: Float32Array) => void])[] = [
    ["NaN", (logits) => logits[8191] = NaN],
    ["several NaN", (logits) => logits.fill(NaN, 3000, 3003)],
    ["infinity", (logits) => logits[100] = Infinity],
    ["nothing but -infinity", (logits) => logits.fill(-Infinity)],
  ];

  /** What the CPU's sampler says of them. */
  function wantedError(logits: Float32Array): DeviceError {
    try {
      createSampler(GREEDY).next(logits, []);
    } catch (error) {
      return error as DeviceError;
    }
    throw new Error("a token was drawn");
  }

  for (const options of [{ sampling: GREEDY }, DRAWN]) {
    const how = options.sampling.temperature === 0 ? "greedily" : "at random";
    test(`are the CPU sampler's error when drawn from ${how}, and the next sequence is sound`, async () => {
      one.truncate(0);
      const sound = new Float32Array(await one.prefill(C));
      const decoder = await one.decoder(options);
      decoder.begin(0, C, 1);
      const [wanted] = await decoder.next();
      for (const [, change] of broken) {
        const logits = sound.slice();
        change(logits);
        decoder.begin(0, C, 1, logits);
        decoder.stepAhead(8);
        const error = await decoder.next().catch((e: unknown) => e);
        expect(error).toBeInstanceOf(DeviceError);
        const { message, hint } = wantedError(logits);
        expect(error).toMatchObject({ message, hint });
        await decoder.discard();
        expect(decoder.inFlight).toBe(0);
        expect(one.length).toBe(C.length);
        decoder.begin(0, C, 1, sound);
        expect(await decoder.next()).toEqual([wanted!]);
      }
    });
  }

  test("stop a generation in its middle", async () => {
    const decoder = await one.decoder({ sampling: GREEDY });
    await begin(one, decoder, 0, A, 1);
    decoder.stepAhead(4);
    // The value of the first token: every later one attends to it.
    const [{ v } = {}] = one.cache.layer(0).parts;
    upload(v!, new Float32Array(one.cache.headDim).fill(NaN));
    expect(await take(decoder, 4)).toHaveLength(4);
    decoder.stepAhead(8);
    await expect(decoder.next()).rejects.toThrow("The logits contain NaN (first at token id 0)");
    await decoder.discard();

    const again = await one.decoder({ sampling: GREEDY });
    await begin(one, again, 0, A, 1);
    again.stepAhead(8);
    expect(await take(again, 8)).toHaveLength(8);
    await again.discard();
  });
});
