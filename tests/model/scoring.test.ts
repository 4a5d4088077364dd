/** Likelihoods from the GPU against those of the CPU reference, over windows, chunks and positions. */
import { afterAll, describe, expect, test } from "bun:test";
import { join } from "node:path";
import { nllReference } from "../../src/kernels/nll/reference.ts";
import type { Gpt2 } from "../../src/model/gpt2.ts";
import { referenceForward } from "../../src/model/reference.ts";
import {
  type DocumentScore,
  meanNll,
  perplexity,
  scoreDocument,
  type ScoringOptions,
  totalScore,
} from "../../src/model/scoring.ts";
import { tokensOf } from "../../src/model/token_source.ts";
import { openDevice } from "../../src/runtime/device.ts";
import type { Elem } from "../../src/runtime/kernel.ts";
import { maxAbsDifference } from "../support/accuracy.ts";
import { temporaryFolder, writeTinyCheckpoint } from "../support/checkpoint.ts";
import { eachElem, testDevice } from "../support/device.ts";
import { loadModel, logitTolerance, readReference, someIds } from "../support/model.ts";

const gpu = await testDevice();
const folder = temporaryFolder();
afterAll(folder.remove);

const VOCAB = 101;
const POSITIONS = 2200;
const dir = writeTinyCheckpoint(join(folder.path, "model"), {
  config: { nLayer: 1, nHead: 2, nEmbd: 8, nPositions: POSITIONS, vocabSize: VOCAB },
  dtype: "F16",
}).dir;
const { config, parameters } = await readReference(dir);

/** What the CPU makes of a document: NaN for the first token of each window. */
interface Wanted {
  readonly nll: Float64Array;
  /** `[tokens, vocab]` */
  readonly logits: Float64Array;
}

const known = new Map<string, Wanted>();

function reference(ids: readonly number[], window: number): Wanted {
  const key = `${ids.length} ${window}`;
  const found = known.get(key);
  if (found) return found;
  const nll = new Float64Array(ids.length).fill(NaN);
  const logits = new Float64Array(ids.length * VOCAB);
  for (let first = 0; first < ids.length; first += window) {
    const part = ids.slice(first, first + window);
    const rows = referenceForward(parameters, config, part).logits;
    logits.set(rows, first * VOCAB);
    nll.set(nllReference(rows, part.slice(1), VOCAB), first + 1);
  }
  const wanted = { nll, logits };
  known.set(key, wanted);
  return wanted;
}

/** A score with what was shown on the way. */
interface Seen extends DocumentScore {
  /** NaN where none was given. */
  readonly nll: Float64Array;
}

async function score(model: Gpt2, ids: readonly number[], options: ScoringOptions): Promise<Seen> {
  const nll = new Float64Array(ids.length).fill(NaN);
  let next = 0;
  const result = await scoreDocument(model, tokensOf(ids), {
    ...options,
    onNll: (first, values) => {
      expect(first).toBeGreaterThanOrEqual(next);
      nll.set(values, first);
      next = first + values.length;
    },
  });
  return { ...result, nll };
}

function expectNll(got: Float64Array, { nll, logits }: Wanted, elem: Elem): void {
  // A likelihood is a logit less a log-sum-exp, which moves by no more than the largest logit's error.
  const bound = 2 * logitTolerance(elem, logits);
  nll.forEach((wanted, token) => {
    if (Number.isNaN(wanted) ? Number.isNaN(got[token]!) : Math.abs(got[token]! - wanted) <= bound) return;
    throw new Error(`token ${token}: ${got[token]}, wanted ${wanted} within ${bound}`);
  });
}

function sum(values: Float64Array, from = 0, to = values.length): number {
  return values.subarray(from, to).reduce((total, value) => total + (Number.isNaN(value) ? 0 : value), 0);
}

/** Documents and windows, and how many windows and scored tokens they make. */
const WINDOWS:
  readonly (readonly [name: string, tokens: number, window: number, windows: number, scored: number])[] = [
    ["windows that divide the text", 300, 100, 3, 297],
    ["a last window that is short", 250, 100, 3, 247],
    ["a last window of one token", 301, 100, 4, 297],
    ["a window longer than the text", 130, 200, 1, 129],
    ["windows of two tokens", 5, 2, 3, 2],
    ["windows of one token", 3, 1, 3, 0],
    ["one token", 1, 100, 1, 0],
    ["no token", 0, 100, 0, 0],
  ];

eachElem(gpu, (elem) => {
  describe(`in ${elem}`, () => {
    test("likelihoods over windows equal the CPU reference's, and the sums are theirs", async () => {
      const model = await loadModel(gpu, dir, { context: 200, elem, scoring: true });
      for (const [name, tokens, window, windows, scored] of WINDOWS) {
        const ids = someIds(tokens, VOCAB);
        const got = await score(model, ids, { window });
        expect({ name, ...got }).toMatchObject({ name, tokens, windows, scored });
        expectNll(got.nll, reference(ids, window), elem);
        expect(got.sum).toBeCloseTo(sum(got.nll), 9);
        expect(got.buckets.map(({ from, to, scored }) => ({ from, to, scored }))).toEqual(
          scored > 0 ? [{ from: 0, to: 1024, scored }] : [],
        );
      }
      model.destroy();
    });

    test("a window of more than 2,048 tokens has buckets by position, chunks that end in it, and their sums", async () => {
      const ids = someIds(2150, VOCAB);
      const wanted = reference(ids, POSITIONS);
      // Chunks of 2,048 at most here, of a few hundred there, where chunks have more rows than logits are made for at a time.
      const small = await openDevice({ restrict: { maxBindingBytes: 36 << 10 } });
      for (const device of [gpu, small]) {
        const model = await loadModel(device, dir, { context: POSITIONS, elem, scoring: true });
        const { chunkTokens, logitRows } = model.plan;
        expect(chunkTokens).toBeLessThanOrEqual(device === gpu ? 2048 : 512);
        if (device === small) expect(logitRows).toBe(91);
        const got = await score(model, ids, { window: POSITIONS });
        expectNll(got.nll, wanted, elem);
        const bucket = (from: number, to: number) => ({
          from,
          to,
          scored: Math.min(to, 2150) - Math.max(from, 1),
          sum: expect.closeTo(sum(got.nll, from, to), 7),
        });
        expect(got.buckets).toEqual([bucket(0, 1024), bucket(1024, 2048), bucket(2048, 4096)]);
        expect(got).toMatchObject({ tokens: 2150, windows: 1, scored: 2149 });
        expect(got.sum).toBeCloseTo(sum(got.nll), 7);
        model.destroy();
      }
      small.destroy();
    });
  });
});

describe("a document's score", () => {
  test("comes with the logits after the tokens that are asked for, in order", async () => {
    const model = await loadModel(gpu, dir, { context: 100, elem: "f32", scoring: true });
    const ids = someIds(250, VOCAB);
    const { logits, nll } = reference(ids, 100);
    const wanted = [0, 98, 99, 100, 249];
    const tokens: number[] = [];
    const got = await score(model, ids, {
      window: 100,
      onLogits: (token, row) => {
        tokens.push(token);
        const expected = logits.subarray(token * VOCAB, (token + 1) * VOCAB);
        expect(row).toHaveLength(VOCAB);
        expect(maxAbsDifference(row, expected)).toBeLessThan(logitTolerance("f32", expected));
      },
      wantsLogits: (token) => wanted.includes(token),
    });
    expect(tokens).toEqual(wanted);
    expectNll(got.nll, { logits, nll }, "f32");
    tokens.length = 0;
    await scoreDocument(model, tokensOf(ids.slice(0, 7)), {
      window: 3,
      onLogits: (token) => tokens.push(token),
    });
    expect(tokens).toEqual([0, 1, 2, 3, 4, 5, 6]);
    model.destroy();
  });

  test("tells how far it is, and ends between chunks when it is aborted", async () => {
    const small = await openDevice({ restrict: { maxBindingBytes: 36 << 10 } });
    const model = await loadModel(small, dir, { context: 1000, elem: "f32", scoring: true });
    const ids = someIds(1500, VOCAB);
    const done: number[] = [];
    await scoreDocument(model, tokensOf(ids), { window: 1000, onProgress: (tokens) => done.push(tokens) });
    expect(done).toEqual(done.toSorted((a, b) => a - b));
    expect(done).toContain(1000);
    expect(done.at(-1)).toBe(1500);
    const controller = new AbortController();
    const reason = new Error("enough");
    let last = 0;
    const aborted = scoreDocument(model, tokensOf(ids), {
      window: 1000,
      signal: controller.signal,
      onProgress: (tokens) => {
        last = tokens;
        if (tokens >= 256) controller.abort(reason);
      },
    });
    await expect(aborted).rejects.toBe(reason);
    expect(last).toBeLessThan(1000);
    // What is left of it disturbs nothing.
    const short = ids.slice(0, 100);
    expectNll((await score(model, short, { window: 100 })).nll, reference(short, 100), "f32");
    model.destroy();
    small.destroy();
  });

  test("needs a model that was loaded for it", async () => {
    const model = await loadModel(gpu, dir, { context: 10, elem: "f32" });
    await expect(scoreDocument(model, tokensOf([1, 2]), { window: 10 })).rejects.toThrow("`scoring`");
    model.destroy();
  });

  test("has a mean and a perplexity, unless nothing was scored", () => {
    expect(meanNll({ scored: 4, sum: 6 })).toBe(1.5);
    expect(perplexity({ scored: 4, sum: 6 })).toBe(Math.exp(1.5));
    expect(meanNll({ scored: 0, sum: 0 })).toBeNull();
    expect(perplexity({ scored: 0, sum: 0 })).toBeNull();
  });
});

test("the total of many documents adds up tokens, windows and positions, and is not the mean of means", () => {
  const first = { from: 0, to: 1024 };
  const second = { from: 1024, to: 2048 };
  const documents: DocumentScore[] = [
    { tokens: 10, windows: 2, scored: 8, sum: 16, buckets: [{ ...first, scored: 8, sum: 16 }] },
    {
      tokens: 1500,
      windows: 1,
      scored: 1499,
      sum: 4500,
      buckets: [{ ...first, scored: 1023, sum: 4000 }, { ...second, scored: 476, sum: 500 }],
    },
    { tokens: 1, windows: 1, scored: 0, sum: 0, buckets: [] },
  ];
  const total = totalScore(documents);
  expect(total).toEqual({
    tokens: 1511,
    windows: 4,
    scored: 1507,
    sum: 4516,
    buckets: [{ ...first, scored: 1031, sum: 4016 }, { ...second, scored: 476, sum: 500 }],
  });
  expect(meanNll(total)).toBe(4516 / 1507);
  expect(totalScore([])).toEqual({ tokens: 0, windows: 0, scored: 0, sum: 0, buckets: [] });
});
