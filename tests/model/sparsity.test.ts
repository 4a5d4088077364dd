/** Laws of block-sparse attention in whole models. */
import { afterAll, describe, expect, test } from "bun:test";
import { join } from "node:path";
import { KV_BLOCK } from "../../src/kernels/shared/shared.ts";
import { parseMask, parsePattern } from "../../src/kvcache/patterns.ts";
import { layerLists, type Sparsity } from "../../src/kvcache/sparsity.ts";
import type { Gpt2 } from "../../src/model/gpt2.ts";
import { referenceForward } from "../../src/model/reference.ts";
import { scoreDocument } from "../../src/model/scoring.ts";
import { tokensOf } from "../../src/model/token_source.ts";
import { seenBy } from "../support/attention.ts";
import { maxAbsDifference } from "../support/accuracy.ts";
import { temporaryFolder, writeTinyCheckpoint } from "../support/checkpoint.ts";
import { testDevice, testElems } from "../support/device.ts";
import { loadModel, logitTolerance, readReference, someIds } from "../support/model.ts";
import { uniformArray } from "../support/random.ts";

const LONG = 300_000;
const gpu = await testDevice();
const elems = testElems(gpu);
const folder = temporaryFolder();
afterAll(() => folder.remove());

/** Sizes that nothing divides: heads of 10 columns, three of them, in two layers. */
const SIZES = { nLayer: 2, nHead: 3, nEmbd: 30, nPositions: 6000, vocabSize: 101 };
/** Heads that the kernels of published models are for. */
const WIDE = { nLayer: 2, nHead: 3, nEmbd: 192, nPositions: 600, vocabSize: 101 };

async function tiny(name: string, config: typeof SIZES): Promise<string> {
  const dir = join(folder.path, name);
  await writeTinyCheckpoint(dir, { config, dtype: "F16", seed: 1 });
  return dir;
}

function sparse(pattern: string): Sparsity {
  const parsed = parsePattern(pattern);
  if (parsed.kind === "file") throw new Error("masks come from maskOf");
  return { pattern: parsed };
}

function maskOf(json: object): Sparsity {
  const mask = parseMask(JSON.stringify(json), "mask.json");
  return { pattern: { kind: "file", path: "mask.json" }, mask, sha256: "" };
}

/** Other random blocks for a layer and head, another layer's heads as a pattern says; some rows are empty. */
function randomMask(rows: number, seed: number): Sparsity {
  const draws = uniformArray(seed, rows * rows, 0, 1);
  const random = (share: number, diagonal: boolean) =>
    Array.from({ length: rows }, (_, row) =>
      Array.from({ length: row + 1 }, (_, block) => block)
        .filter((block) => (diagonal && block === row) || draws[row * rows + block]! < share));
  return maskOf({
    default: "local:128",
    masks: [
      { layers: [0], heads: [1], rows: random(0.4, true) },
      { layers: [0], heads: [2], rows: random(0.5, false) },
      { layers: [1], heads: [0, 2], pattern: "strided:64,128" },
    ],
  });
}

describe.each(elems)("in %s", (elem) => {
  test("lists of every block give the bits of dense attention, in prefill and decoding", async () => {
    const dir = await tiny(`every-${elem}`, WIDE);
    const tokens = someIds(330, WIDE.vocabSize);
    const rows = Math.ceil(400 / KV_BLOCK);
    const every = Array.from({ length: rows }, (_, row) => Array.from({ length: row + 1 }, (_, i) => i));
    const run = async (sparsity?: Sparsity) => {
      const model = await loadModel(gpu, dir, { context: 400, elem, ...(sparsity ? { sparsity } : {}) });
      const out = [await model.prefill(tokens.slice(0, 130)), await model.prefill(tokens.slice(130, 319))];
      for (const id of tokens.slice(319)) out.push(await model.decodeStep(id));
      model.destroy();
      return out;
    };
    const dense = await run();
    for (const sparsity of [sparse("local:448"), maskOf({ rows: every }), sparse("strided:64,64")]) {
      const got = await run(sparsity);
      got.forEach((logits, i) => expect([i, maxAbsDifference(logits, dense[i]!)]).toEqual([i, 0]));
    }
  }, LONG);

  test("random masks, other ones for layers and heads, match the reference with the same masks", async () => {
    for (const [name, config] of [["odd", SIZES], ["wide", WIDE]] as const) {
      const dir = await tiny(`random-${name}-${elem}`, config);
      const length = 330;
      const sparsity = randomMask(Math.ceil(length / KV_BLOCK), 7);
      const tokens = someIds(length, config.vocabSize);
      const { config: full, parameters } = await readReference(dir);
      const seen = [0, 1].map((layer) =>
        seenBy(layerLists(sparsity, layer, 3, Math.ceil(length / KV_BLOCK)))
      );
      const { logits } = referenceForward(
        parameters,
        full,
        tokens,
        undefined,
        (layer, head, position, key) => seen[layer]!(head, position, key),
      );
      const wanted = (length: number) =>
        logits.subarray((length - 1) * config.vocabSize, length * config.vocabSize);
      const model = await loadModel(gpu, dir, { context: length, elem, sparsity });
      const check = (got: Float32Array, length: number) =>
        expect(maxAbsDifference(got, wanted(length))).toBeLessThan(logitTolerance(elem, wanted(length)));
      for (const length of [1, 63, 64, 65, 129, 257, 330]) {
        model.truncate(0);
        check(await model.prefill(tokens.slice(0, length)), length);
        model.truncate(0);
        check(await model.prefill(tokens.slice(0, length), { chunkTokens: 50 }), length);
      }
      for (const length of [63, 64, 190, 320]) {
        model.truncate(0);
        await model.prefill(tokens.slice(0, length));
        for (let next = length; next < length + 4; next++) {
          check(await model.decodeStep(tokens[next]!), next + 1);
        }
      }
      model.destroy();
    }
  }, LONG);

  test("sequences that are decoded together have lists of their own places", async () => {
    const dir = await tiny(`batch-${elem}`, SIZES);
    const prompts = [40, 200, 129].map((length) => someIds(length, SIZES.vocabSize));
    const decode = async (sequences: number, some: readonly number[][]) => {
      const model = await loadModel(gpu, dir, {
        context: 300,
        elem,
        sparsity: randomMask(5, 3),
        decoding: { sequences, inFlight: 2 },
      });
      const sampling = { temperature: 0, topK: 0, topP: 1, minP: 0, repeatPenalty: 1 };
      const decoder = await model.decoder({ sampling });
      const drawn: number[][] = some.map(() => []);
      for (const [sequence, prompt] of some.entries()) {
        await model.prefill(prompt, { sequence });
        decoder.begin(sequence, [], 0);
        drawn[sequence]!.push((await decoder.next())[0]!.id);
      }
      for (let step = 0; step < 70; step++) {
        decoder.stepAhead(1);
        for (const { sequence, id } of await decoder.next()) drawn[sequence]!.push(id);
      }
      await decoder.discard();
      model.destroy();
      return drawn;
    };
    // As many slices: what is drawn alone runs in a batch of the same size.
    const together = await decode(3, prompts);
    for (const [i, prompt] of prompts.entries()) {
      const alone = await decode(3, prompts.map((_, j) => j === i ? prompt : [1]));
      expect(together[i]).toEqual(alone[i]!);
    }
  }, LONG);
});

test("topk that keeps every block gives the bits of dense attention", async () => {
  const dir = await tiny("topk-all", SIZES);
  const tokens = someIds(4500, SIZES.vocabSize);
  const run = async (pattern: string) => {
    const model = await loadModel(gpu, dir, { context: 4600, elem: "f32", sparsity: sparse(pattern) });
    await model.prefill(tokens.slice(0, 4480));
    const out: Float32Array[] = [];
    for (const id of tokens.slice(4480)) out.push(await model.decodeStep(id));
    model.destroy();
    return out;
  };
  const dense = await run("dense");
  (await run("topk:4608")).forEach((logits, i) => expect(maxAbsDifference(logits, dense[i]!)).toBe(0));
  // And one that leaves blocks out is something else.
  expect(maxAbsDifference((await run("topk:256")).at(-1)!, dense.at(-1)!)).toBeGreaterThan(0);
}, LONG);

test("topk is dense below its least context", async () => {
  const dir = await tiny("topk-short", SIZES);
  const tokens = someIds(1000, SIZES.vocabSize);
  const run = async (pattern: string) => {
    const model = await loadModel(gpu, dir, { context: 1000, elem: "f32", sparsity: sparse(pattern) });
    await model.prefill(tokens.slice(0, 990));
    const logits = await model.decodeStep(tokens[990]!);
    model.destroy();
    return logits;
  };
  expect(maxAbsDifference(await run("topk:256"), await run("dense"))).toBe(0);
}, LONG);

test("summaries that decoding keeps up are those of a fresh start, after forgetting tokens too", async () => {
  const dir = await tiny("topk-summaries", SIZES);
  const prompt = someIds(4450, SIZES.vocabSize);
  const model = await loadModel(gpu, dir, { context: 4800, elem: "f32", sparsity: sparse("topk:512") });
  const sampling = { temperature: 0, topK: 0, topP: 1, minP: 0, repeatPenalty: 1 };
  const draw = async (model: Gpt2, steps: number) => {
    const decoder = await model.decoder({ sampling });
    decoder.begin(0, [], 0);
    const ids = [(await decoder.next())[0]!.id];
    while (ids.length < steps) {
      decoder.stepAhead(2);
      ids.push((await decoder.next())[0]!.id);
    }
    await decoder.discard();
    return ids;
  };
  await model.prefill(prompt);
  // Over the ends of two blocks.
  const kept = await draw(model, 150);
  model.truncate(100);
  await model.prefill(prompt.slice(100));
  const fresh: number[] = [];
  let logits = await model.prefill([kept[0]!]);
  fresh.push(kept[0]!);
  for (const id of kept.slice(1)) {
    fresh.push(logits.indexOf(logits.reduce((a, b) => Math.max(a, b))));
    logits = await model.decodeStep(id);
  }
  expect(fresh).toEqual(kept);
  model.destroy();
}, LONG);

test("a comparison gives what two runs' logits say", async () => {
  const dir = await tiny("compare", SIZES);
  const { vocabSize } = SIZES;
  const tokens = someIds(400, vocabSize);
  const sparsity = randomMask(7, 5);
  const rowsOf = async (options: { sparsity?: Sparsity }) => {
    const model = await loadModel(gpu, dir, { context: 400, elem: "f32", scoring: true, ...options });
    const rows: Float32Array[] = [];
    await model.prefill(tokens, { onLogits: (token, logits) => rows[token] = logits.slice() });
    model.destroy();
    return rows;
  };
  const [dense, other] = [await rowsOf({}), await rowsOf({ sparsity })];
  const logSoftmax = (row: Float32Array) => {
    const top = row.reduce((a, b) => Math.max(a, b));
    const sum = row.reduce((total, x) => total + Math.exp(x - top), 0);
    return Float64Array.from(row, (x) => x - top - Math.log(sum));
  };
  const wanted = { nll: 0, denseNll: 0, kl: 0, agreeing: 0 };
  for (let token = 0; token + 1 < tokens.length; token++) {
    const [p, q] = [logSoftmax(dense[token]!), logSoftmax(other[token]!)];
    wanted.denseNll -= p[tokens[token + 1]!]!;
    wanted.nll -= q[tokens[token + 1]!]!;
    p.forEach((x, i) => wanted.kl += Math.exp(x) * (x - q[i]!));
    if (p.indexOf(p.reduce((a, b) => Math.max(a, b))) === q.indexOf(q.reduce((a, b) => Math.max(a, b)))) {
      wanted.agreeing++;
    }
  }
  const model = await loadModel(gpu, dir, {
    context: 400,
    elem: "f32",
    sparsity,
    scoring: true,
    comparing: true,
    chunkTokens: 150,
    decoding: undefined,
  });
  for (const window of [400, 400]) {
    const score = await scoreDocument(model, tokensOf(tokens), { window, compare: true });
    const { denseSum, klSum, agreeing } = score.comparison!;
    expect(score.scored).toBe(399);
    expect(Math.abs(score.sum / wanted.nll - 1)).toBeLessThan(1e-5);
    expect(Math.abs(denseSum / wanted.denseNll - 1)).toBeLessThan(1e-5);
    expect(Math.abs(klSum / wanted.kl - 1)).toBeLessThan(1e-3);
    expect(agreeing).toBe(wanted.agreeing);
  }
  model.destroy();
}, LONG);

test(
  "a mask that is too short for the context, or for another model, is refused and leaves nothing",
  async () => {
    const dir = await tiny("refused", SIZES);
    const before = gpu.memory.totalBytes;
    const load = (sparsity: Sparsity) => loadModel(gpu, dir, { context: 200, elem: "f32", sparsity });
    await expect(load(maskOf({ rows: [[0], [0, 1]] }))).rejects.toThrow(
      "covers 128 tokens, and 256 are needed",
    );
    await expect(load(maskOf({ masks: [{ layers: [2], pattern: "dense" }] }))).rejects.toThrow("layer 2");
    expect(gpu.memory.totalBytes).toBe(before);
  },
  LONG,
);
