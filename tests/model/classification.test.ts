/** Documents that share passes get what each gets alone, and what the CPU reference gives; collections go through in order. */
import { afterAll, describe, expect, test } from "bun:test";
import { join } from "node:path";
import { KV_BLOCK } from "../../src/kernels/shared/shared.ts";
import { parsePattern } from "../../src/kvcache/patterns.ts";
import type { Sparsity } from "../../src/kvcache/sparsity.ts";
import {
  activate,
  activationOf,
  type ClassificationOptions,
  classifyDocuments,
  type Head,
  type LabelHead,
  type Outcome,
  type SourceDocument,
} from "../../src/model/classification.ts";
import type { PackedDocument } from "../../src/model/classifier.ts";
import type { Gpt2, Gpt2Options } from "../../src/model/gpt2.ts";
import type { ClassifyingPlan, Pooling } from "../../src/model/memory_plan.ts";
import { exactPositions } from "../../src/model/positions.ts";
import { referenceForward } from "../../src/model/reference.ts";
import { type Gpu, openDevice } from "../../src/runtime/device.ts";
import { InputError } from "../../src/runtime/errors.ts";
import type { Elem } from "../../src/runtime/kernel.ts";
import {
  encodeElements,
  temporaryFolder,
  type TinyOptions,
  writeTinyCheckpoint,
} from "../support/checkpoint.ts";
import { maxAbsDifference } from "../support/accuracy.ts";
import { eachElem, testDevice } from "../support/device.ts";
import { loadModel, logitTolerance, readReference, someIds } from "../support/model.ts";

const gpu = await testDevice();
const folder = temporaryFolder();

const CLASSES = 5;
const VOCAB = 101;
const PAD = 7;
/** Sizes that nothing divides: heads of 10 columns and a width of 30 are padded. */
const TINY: TinyOptions = {
  config: { nLayer: 2, nHead: 3, nEmbd: 30, nPositions: 700, vocabSize: VOCAB, padTokenId: PAD },
  classes: CLASSES,
  dtype: "F16",
};
const tiny = writeTinyCheckpoint(join(folder.path, "tiny"), TINY);
const { config, parameters } = await readReference(tiny.dir);

const PLAN: ClassifyingPlan = {
  classes: CLASSES,
  pooling: "last",
  rows: 64,
  labelRows: 256,
  lengths: 3,
  inFlight: 2,
};
/** Rows of a pack, and as many for labels. */
const CHUNK = 768;
const CONTEXT = 2 * CHUNK;

/** A model by what is different about it. */
interface ModelChoice {
  readonly elem?: Elem;
  readonly pooling?: Pooling;
  readonly context?: number;
  readonly chunkTokens?: number;
  /** A pattern of attention. */
  readonly sparsity?: string;
}

const models = new Map<string, Promise<Gpt2>>();
const narrow = await openDevice({ restrict: { maxBindingBytes: 62 << 10 } });
afterAll(async () => {
  for (const model of models.values()) (await model).destroy();
  narrow.destroy();
  folder.remove();
});

/** Models are loaded once. */
function modelOf(choice: ModelChoice = {}, device: Gpu = gpu, dir = tiny.dir): Promise<Gpt2> {
  const key = JSON.stringify([choice, device === narrow, dir]);
  const known = models.get(key);
  if (known) return known;
  const { elem = "f32", pooling = "last", context = CONTEXT, chunkTokens = CHUNK, sparsity } = choice;
  const options: Gpt2Options = {
    elem,
    context,
    chunkTokens,
    scoring: true,
    classifying: { ...PLAN, pooling },
    ...(sparsity === undefined ? {} : { sparsity: { pattern: parsePattern(sparsity) } as Sparsity }),
  };
  const loading = loadModel(device, dir, { ...options, decoding: undefined });
  models.set(key, loading);
  return loading;
}

/** A model whose cache has one head to a buffer. */
async function dividedModel(elem: Elem, pooling: Pooling): Promise<Gpt2> {
  const context = elem === "f32" ? 704 : 1408;
  const model = await modelOf({ elem, pooling, context, chunkTokens: 128 }, narrow);
  expect(model.plan.kv.ranges).toHaveLength(config.nHead);
  return model;
}

/** Other tokens for each seed. */
function document(length: number, seed = 0): Uint32Array {
  return Uint32Array.from(
    someIds(length + 3 * seed, VOCAB).slice(3 * seed),
    (id) => (id + 11 * seed) % VOCAB,
  );
}

/** Around the ends of blocks and chunks, longer than a chunk of the other models. */
const LENGTHS = [40, 1, 64, 65, 200, 5, 128];
const DOCUMENTS = LENGTHS.map((length, i) => document(length, i));

function whole(ids: Uint32Array): PackedDocument {
  return { ids, lengths: [ids.length] };
}

/** The logits of each beginning of the documents of a pack. */
async function classify(model: Gpt2, pack: readonly PackedDocument[]): Promise<Float32Array[]> {
  const classifier = await model.classifier();
  return await (await classifier.classify(pack)).result;
}

/** The same of whole documents, one by one. */
async function classifyEach(model: Gpt2, documents: readonly Uint32Array[]): Promise<Float32Array[]> {
  const logits: Float32Array[] = [];
  for (const ids of documents) logits.push(...await classify(model, [whole(ids)]));
  return logits;
}

const SCORE: Head = {
  kind: "score",
  labels: Array.from({ length: CLASSES }, (_, i) => `class ${i}`),
  activation: "softmax",
};

/** Documents by their index, from ids or the error of encoding them. */
async function* sourceOf(documents: Iterable<Uint32Array | Error>): AsyncGenerator<SourceDocument<number>> {
  let index = 0;
  for (const ids of documents) yield sourceDocument(index++, ids);
}

function sourceDocument<T>(document: T, ids: Uint32Array | Error): SourceDocument<T> {
  return {
    document,
    size: ids instanceof Error ? 0 : ids.length,
    encode: (most) =>
      ids instanceof Error
        ? Promise.reject(ids)
        : Promise.resolve({ ids: ids.slice(0, most), truncated: ids.length > most, encodeMs: 0 }),
  };
}

async function outcomesOf<T>(
  model: Gpt2,
  documents: AsyncIterable<SourceDocument<T>>,
  { head = SCORE, ...options }: Partial<ClassificationOptions> & { readonly head?: Head } = {},
): Promise<Outcome<T>[]> {
  return await Array.fromAsync(classifyDocuments(model, head, documents, { ahead: 4, ...options }));
}

/** Logits of the outcomes, in the order of the labels; throws for one that failed. */
function logitsIn(outcomes: readonly Outcome<unknown>[]): Float32Array[] {
  return outcomes.map((outcome) => {
    if ("error" in outcome) throw new Error(outcome.error);
    return Float32Array.from(Object.values(outcome.classified.logits));
  });
}

describe("a document's logits are bit for bit those that it has alone", () => {
  eachElem(gpu, (elem) => {
    for (const pooling of ["last", "mean"] as const) {
      const name = `with ${pooling} pooling in ${elem}`;
      const model = () => modelOf({ elem, pooling });
      let alone: Promise<Float32Array[]> | undefined;
      const wanted = async () => await (alone ??= classifyEach(await model(), DOCUMENTS));

      test(`in a pack, in any order, at any place ${name}`, async () => {
        for (const order of [[0, 1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1, 0], [1, 4], [5, 5, 0, 4], [3]]) {
          const got = await classify(await model(), order.map((i) => whole(DOCUMENTS[i]!)));
          const expected = await wanted();
          expect(got).toEqual(order.map((i) => expected[i]!));
        }
      });

      test(`however many share a pack ${name}`, async () => {
        for (const batch of [1, 2, 7]) {
          const outcomes = await outcomesOf(await model(), sourceOf(DOCUMENTS), { batch });
          expect(logitsIn(outcomes)).toEqual(await wanted());
        }
      });

      test(`with other contexts, cut into chunks or not ${name}`, async () => {
        for (const [context, chunkTokens] of [[704, 64], [768, 192]] as const) {
          const other = await modelOf({ elem, pooling, context, chunkTokens });
          expect(await classifyEach(other, DOCUMENTS)).toEqual(await wanted());
        }
      });

      test(`with heads divided over buffers ${name}`, async () => {
        const divided = await dividedModel(elem, pooling);
        expect(await classifyEach(divided, DOCUMENTS)).toEqual(await wanted());
      });

      test(`at several lengths in one go or each alone ${name}`, async () => {
        const lengths = [[7, 64, 129], [200], [1, 63, 128]];
        const documents = lengths.map((own, i) => ({ ids: document(own.at(-1)!, 20 + i), lengths: own }));
        const expected: Float32Array[] = [];
        for (const { ids, lengths } of documents) {
          const beginnings = lengths.map((length) => ids.slice(0, length));
          expected.push(...await classifyEach(await model(), beginnings));
        }
        expect(await classify(await model(), documents)).toEqual(expected);
        const chunked = await modelOf({ elem, pooling, context: 704, chunkTokens: 64 });
        for (const [i, document] of documents.entries()) {
          const before = lengths.slice(0, i).flat().length;
          expect(await classify(chunked, [document])).toEqual(
            expected.slice(before, before + document.lengths.length),
          );
        }
      });
    }
  });
});

/** The score head on what the CPU makes of a document, in f64. */
function referenceLogits(ids: Uint32Array, pooling: Pooling): Float64Array {
  const { nEmbd } = config;
  const hidden = referenceForward(parameters, config, ids).hidden.get("ln_f")!;
  const features = new Float64Array(nEmbd);
  if (pooling === "mean") hidden.forEach((value, i) => features[i % nEmbd]! += value / ids.length);
  else {
    // As GPT2ForSequenceClassification: the rightmost token that is no padding, or the first.
    const last = Math.max(0, ids.findLastIndex((id) => id !== PAD));
    features.set(hidden.subarray(last * nEmbd, (last + 1) * nEmbd));
  }
  const score = parameters.get("score.weight")!;
  return Float64Array.from(
    { length: CLASSES },
    (_, c) => features.reduce((sum, value, i) => sum + value * score[c * nEmbd + i]!, 0),
  );
}

describe("logits of classes equal the CPU reference's", () => {
  /** Padding at the end, in the middle, everywhere. */
  const padded = [[5, 9, PAD], [5, PAD, 9, PAD, PAD], [PAD, PAD, PAD], [PAD], [3, ...new Array(70).fill(PAD)]]
    .map((ids) => Uint32Array.from(ids));
  const documents = [...DOCUMENTS, ...padded];

  eachElem(gpu, (elem) => {
    for (const pooling of ["last", "mean"] as const) {
      test(`with ${pooling} pooling in ${elem}`, async () => {
        const model = await modelOf({ elem, pooling });
        for (const ids of documents) {
          const [got] = await classify(model, [whole(ids)]);
          const wanted = referenceLogits(ids, pooling);
          expect(maxAbsDifference(got!, wanted)).toBeLessThan(logitTolerance(elem, wanted));
        }
      });
    }
  });

  test("with padding at the end of a beginning", async () => {
    const ids = Uint32Array.from([PAD, PAD, 5, PAD, PAD, 9, 4, PAD]);
    const lengths = [1, 2, 3, 4, 5, 6, 7, 8];
    const got = await classify(await modelOf(), [{ ids, lengths }]);
    const rows = await classifyEach(await modelOf(), [1, 3, 6, 7].map((length) => ids.slice(0, length)));
    expect(got).toEqual([0, 0, 1, 1, 1, 2, 3, 3].map((row) => rows[row]!));
  });
});

/** Labels of so many tokens. */
function labelsOf(lengths: readonly number[]): Uint32Array[] {
  return lengths.map((length, i) => document(length, 40 + i));
}

/** `log p(label | document)` of each label, by document. */
async function scoreLabels(
  model: Gpt2,
  pack: readonly Uint32Array[],
  labels: readonly Uint32Array[],
): Promise<Float64Array[]> {
  const classifier = await model.classifier();
  return await (await classifier.scoreLabels(pack, labels)).result;
}

/** The same from scratch: the document and one label as one text, whose last tokens' likelihoods are added up. */
async function scoreWhole(model: Gpt2, ids: Uint32Array, label: Uint32Array): Promise<number> {
  let sum = 0;
  model.truncate(0);
  await model.prefill([...ids, ...label], {
    onNll: (first, nll) => nll.forEach((value, i) => sum -= first + i < ids.length ? 0 : value),
  });
  return sum;
}

/** The logits after each of the document's tokens, as the CPU reference has them. */
const vocabLogits = referenceForward(parameters, config, document(200)).logits;

/**
 * How far two results for a label of so many tokens may be apart: either is a sum of likelihoods, each of which is off by no
 * more than two logits (docs/numerics.md).
 */
function labelTolerance(elem: Elem, tokens: number): number {
  return tokens * 2 * 2 * logitTolerance(elem, vocabLogits);
}

describe("likelihoods of labels", () => {
  const LABEL_LENGTHS = [1, 2, 33, 1, 70];
  const LABELS = labelsOf(LABEL_LENGTHS);
  const documents = [document(200, 3), document(1, 4), document(64, 5), document(65, 6)];

  eachElem(gpu, (elem) => {
    test(`are those of document and label as one text in ${elem}`, async () => {
      const model = await modelOf({ elem });
      for (const pack of [documents.slice(0, 2), documents.slice(2)]) {
        const got = await scoreLabels(model, pack, LABELS);
        for (const [i, ids] of pack.entries()) {
          for (const [l, label] of LABELS.entries()) {
            const error = Math.abs(got[i]![l]! - await scoreWhole(model, ids, label));
            expect(error).toBeLessThan(labelTolerance(elem, label.length));
          }
        }
      }
    });

    test(`are the same for a document that is longer than a chunk, or divided over buffers in ${elem}`, async () => {
      const wanted = await scoreLabels(await modelOf({ elem }), [documents[0]!], LABELS);
      // A chunk ends between document and labels, and within both.
      for (const chunkTokens of [64, 128, 256]) {
        const chunked = await modelOf({ elem, context: 704, chunkTokens });
        expect(await scoreLabels(chunked, [documents[0]!], LABELS)).toEqual(wanted);
      }
      const divided = await dividedModel(elem, "last");
      expect(await scoreLabels(divided, [documents[0]!], LABELS)).toEqual(wanted);
    });

    test(`do not depend on other documents, to the bit, in ${elem}`, async () => {
      const model = await modelOf({ elem });
      const labels = labelsOf([3, 1, 40, 2]);
      const alone: Float64Array[] = [];
      for (const ids of documents) alone.push(...await scoreLabels(model, [ids], labels));
      for (const order of [[0, 1, 2, 3], [3, 2, 1, 0], [2, 2], [1, 3]]) {
        const got = await scoreLabels(model, order.map((i) => documents[i]!), labels);
        expect(got).toEqual(order.map((i) => alone[i]!));
      }
    });

    test(`of one token do not depend on other labels to the bit, longer ones to rounding in ${elem}`, async () => {
      const model = await modelOf({ elem });
      const ids = [documents[0]!];
      const alone: number[] = [];
      for (const label of LABELS) alone.push((await scoreLabels(model, ids, [label]))[0]![0]!);
      for (const order of [[4, 3, 2, 1, 0], [2, 2, 1, 4, 1], [3, 4, 0]]) {
        const [got] = await scoreLabels(model, ids, order.map((l) => LABELS[l]!));
        order.forEach((l, i) => {
          const error = Math.abs(got![i]! - alone[l]!);
          const tokens = LABEL_LENGTHS[l]!;
          // The keys of a longer one lie elsewhere in a tile, where they are added up in another order.
          if (tokens === 1) expect(error).toBe(0);
          else expect(error).toBeLessThan(labelTolerance(elem, tokens));
        });
      }
    });
  });

  test("of one token for all labels need no branches", async () => {
    const model = await modelOf();
    const labels = labelsOf([1, 1, 1]);
    const got = await scoreLabels(model, documents, labels);
    for (const [i, ids] of documents.entries()) {
      for (const [l, label] of labels.entries()) {
        const error = Math.abs(got[i]![l]! - await scoreWhole(model, ids, label));
        expect(error).toBeLessThan(labelTolerance("f32", 1));
      }
    }
  });
});

/** For a likelihood of each label behind a document, without a template. */
function headOf(texts: readonly Uint32Array[], parts: Partial<LabelHead> = {}): LabelHead {
  return {
    kind: "labels",
    labels: texts.map((_, i) => `label ${i}`),
    texts,
    before: new Uint32Array(0),
    between: new Uint32Array(0),
    ...parts,
  };
}

describe("a collection", () => {
  test("has outcomes in the order of its documents, with errors in their places", async () => {
    const model = await modelOf();
    const reason = "it is written in no language";
    const collection = [
      document(40),
      new Uint32Array(0),
      new InputError(reason),
      document(701), // there are 700 positions
      document(700, 1),
      Uint32Array.of(3, VOCAB, 5),
      document(5, 2),
    ];
    const outcomes = await outcomesOf(model, sourceOf(collection));
    expect(outcomes.map(({ document }) => document)).toEqual([0, 1, 2, 3, 4, 5, 6]);
    expect(outcomes.map((outcome) => "error" in outcome ? outcome.error : "")).toEqual([
      "",
      "the document is empty: it has no tokens",
      reason,
      "the document has more than the 700 tokens that there is room for: `--max-tokens` cuts it, " +
      "`--positions` goes beyond the model's",
      "",
      `token 1 is ${VOCAB}, the model's ids go from 0 to ${VOCAB - 1}`,
      "",
    ]);
    const good = [0, 4, 6];
    const wanted = await classifyEach(model, good.map((i) => collection[i] as Uint32Array));
    expect(logitsIn(good.map((i) => outcomes[i]!))).toEqual(wanted);
  });

  test("says of each document what follows from its logits", async () => {
    const model = await modelOf();
    const [ids] = [document(100, 1)];
    const [outcome] = await outcomesOf(model, sourceOf([ids!, ids!]), { lengths: [10, 64, 120] });
    if (!outcome || "error" in outcome) throw new Error("it failed");
    const { beginnings, ms, batch, encodeMs, ...whole } = outcome.classified;
    expect(whole).toEqual(beginnings.at(-1)!);
    expect(beginnings.map(({ tokens, truncated }) => [tokens, truncated])).toEqual([
      [10, true],
      [64, true],
      [100, false],
    ]);
    expect(batch).toBe(2);
    expect(ms).toBeGreaterThan(0);
    expect(encodeMs).toBe(0);
    const wanted = await classifyEach(model, [ids!.slice(0, 10), ids!.slice(0, 64), ids!]);
    beginnings.forEach(({ label, scores, logits }, i) => {
      const row = Array.from(wanted[i]!);
      expect(Object.keys(scores)).toEqual([...SCORE.labels]);
      expect(Object.values(logits)).toEqual(row);
      expect(label).toBe(SCORE.labels[row.indexOf(Math.max(...row))]!);
      const exps = row.map(Math.exp);
      const total = exps.reduce((a, b) => a + b);
      Object.values(scores).forEach((score, c) => expect(score).toBeCloseTo(exps[c]! / total, 12));
    });
    // Documents that are cut have more tokens than were encoded.
    const cut = await outcomesOf(model, sourceOf([ids!, document(64)]), { lengths: [64] });
    expect(cut.map((one) => "classified" in one && one.classified.truncated)).toEqual([true, false]);
  });

  test("goes through several windows, whose logits are averaged by their tokens", async () => {
    const model = await modelOf();
    const documents = [document(1000, 1), document(64, 2), document(70, 3)];
    const outcomes = await outcomesOf(model, sourceOf(documents), { window: 64, lengths: [30, 128, 1000] });
    for (const [i, ids] of documents.entries()) {
      const lengths = [...new Set([30, 128, 1000].map((length) => Math.min(length, ids.length)))];
      const outcome = outcomes[i]!;
      if ("error" in outcome) throw new Error(outcome.error);
      expect(outcome.classified.beginnings.map(({ tokens }) => tokens)).toEqual(lengths);
      for (const [b, length] of lengths.entries()) {
        const mean = new Float64Array(CLASSES);
        for (let first = 0; first < length; first += 64) {
          const part = ids.slice(first, Math.min(first + 64, length));
          const [row] = await classifyEach(model, [part]);
          row!.forEach((logit, c) => mean[c]! += logit * part.length / length);
        }
        const got = Object.values(outcome.classified.beginnings[b]!.logits);
        got.forEach((logit, c) => expect(logit).toBeCloseTo(mean[c]!, 12));
      }
    }
  });

  test("gives the first results before it ends", async () => {
    const model = await modelOf();
    let came = Promise.withResolvers<void>();
    const trickle = async function* () {
      for (const [i, ids] of DOCUMENTS.entries()) {
        yield sourceDocument(i, ids);
        // The next is there when this one's result is out.
        await came.promise;
        came = Promise.withResolvers();
      }
    };
    const seen: number[] = [];
    const outcomes: Outcome<number>[] = [];
    for await (const outcome of classifyDocuments(model, SCORE, trickle(), { ahead: 4 })) {
      seen.push(outcome.document);
      outcomes.push(outcome);
      came.resolve();
    }
    expect(seen).toEqual(DOCUMENTS.map((_, i) => i));
    expect(logitsIn(outcomes)).toEqual(await classifyEach(model, DOCUMENTS));
  });

  test("of nothing has no outcomes", async () => {
    expect(await outcomesOf(await modelOf(), sourceOf([]))).toEqual([]);
  });

  test("that cannot be read further has the outcomes before, and then the error", async () => {
    const model = await modelOf();
    const error = new Error("the disk is gone");
    const broken = async function* () {
      yield* sourceOf(DOCUMENTS);
      throw error;
    };
    const outcomes: Outcome<number>[] = [];
    const reading = async () => {
      for await (const outcome of classifyDocuments(model, SCORE, broken(), { ahead: 4 })) {
        outcomes.push(outcome);
      }
    };
    await expect(reading()).rejects.toBe(error);
    expect(logitsIn(outcomes)).toEqual(await classifyEach(model, DOCUMENTS));
    // So is one whose encoding fails for no fault of the document.
    const failing = outcomesOf(model, sourceOf([document(5), error]));
    await expect(failing).rejects.toBe(error);
  });

  test("that is aborted ends with the reason, and the model goes on", async () => {
    const model = await modelOf();
    const wanted = await classifyEach(model, DOCUMENTS);
    const reason = new Error("enough");
    const endless = async function* () {
      for (let i = 0;; i++) yield sourceDocument(i, DOCUMENTS[i % DOCUMENTS.length]!);
    };
    const controller = new AbortController();
    const seen: Outcome<number>[] = [];
    const reading = async () => {
      const options = { ahead: 4, signal: controller.signal };
      for await (const outcome of classifyDocuments(model, SCORE, endless(), options)) {
        if (seen.push(outcome) === 20) controller.abort(reason);
      }
    };
    await expect(reading()).rejects.toBe(reason);
    expect(seen.length).toBeLessThan(200);
    expect(logitsIn(seen.slice(0, 7))).toEqual(wanted);
    // One that has not begun, and one that waits for a document that never comes.
    await expect(outcomesOf(model, sourceOf(DOCUMENTS), { signal: controller.signal })).rejects.toBe(reason);
    const waiting = new AbortController();
    const never = async function* () {
      yield sourceDocument(0, document(5));
      setTimeout(() => waiting.abort(reason), 50);
      await new Promise(() => {});
    };
    await expect(outcomesOf(model, never(), { signal: waiting.signal })).rejects.toBe(reason);
    expect(logitsIn(await outcomesOf(model, sourceOf(DOCUMENTS)))).toEqual(wanted);
  });

  test("that is aborted in a long document does not wait for its end", async () => {
    const model = await modelOf({ context: 704, chunkTokens: 64 });
    const reason = new Error("enough");
    const controller = new AbortController();
    const classifier = await model.classifier();
    const running = classifier.classify([whole(document(700))], controller.signal);
    controller.abort(reason);
    await expect(running).rejects.toBe(reason);
    expect(await classifyEach(model, DOCUMENTS)).toEqual(await classifyEach(await modelOf(), DOCUMENTS));
  });

  test("whose reader goes away is closed, and the model goes on", async () => {
    const model = await modelOf();
    let isClosed = false;
    const source = async function* () {
      try {
        for (let i = 0;; i++) yield sourceDocument(i, document(40, i % 9));
      } finally {
        isClosed = true;
      }
    };
    for await (const { document } of classifyDocuments(model, SCORE, source(), { ahead: 4 })) {
      if (document === 14) break;
    }
    await new Promise((resolve) => setTimeout(resolve, 0));
    expect(isClosed).toBe(true);
    expect(logitsIn(await outcomesOf(model, sourceOf(DOCUMENTS)))).toEqual(
      await classifyEach(model, DOCUMENTS),
    );
  });

  test("whose document overflows has an error for that document alone", async () => {
    // A token of embeddings that are finite, and their sum is not; the output head has its own table.
    const overflowing = VOCAB - 1;
    const values = tiny.values.get("wte.weight")!.slice();
    values.fill(3e38, overflowing * config.nEmbd, (overflowing + 1) * config.nEmbd);
    const { dir } = writeTinyCheckpoint(join(folder.path, "overflow"), {
      ...TINY,
      dtype: "F32",
      lmHead: "separate",
      omit: ["wte.weight"],
      extra: [{
        name: "transformer.wte.weight",
        dtype: "F32",
        shape: [VOCAB, config.nEmbd],
        bytes: encodeElements(values, "F32"),
      }],
    });
    const model = await modelOf({}, gpu, dir);
    const good = DOCUMENTS.map((ids) => ids.map((id) => id % overflowing));
    const bad = good[4]!.with(70, overflowing);
    const documents = [bad, ...good.slice(0, 4), bad, ...good.slice(4), bad];
    const isBad = documents.map((ids) => ids === bad);
    const labels = labelsOf([2, 1, 33]);
    for (const head of [SCORE, headOf(labels.map((ids) => ids.map((id) => id % overflowing)))]) {
      const wanted = logitsIn(await outcomesOf(model, sourceOf(good), { head }));
      const outcomes = await outcomesOf(model, sourceOf(documents), { head });
      expect(outcomes.map((outcome) => "error" in outcome)).toEqual(isBad);
      expect(outcomes[0]).toEqual({
        document: 0,
        error: expect.stringMatching(/^its logits are not finite: try `--dtype f32`/),
      });
      expect(logitsIn(outcomes.filter((_, i) => !isBad[i]))).toEqual(wanted);
    }
  });
});

describe("labels as texts", () => {
  const documents = [document(90, 1), document(3, 2), document(200, 3)];
  const texts = labelsOf([2, 1, 5, 20]);
  const before = document(4, 60);
  const between = document(3, 61);

  function within(ids: Uint32Array): Uint32Array {
    return Uint32Array.from([...before, ...ids, ...between]);
  }

  test("stand behind the template, and the likeliest wins", async () => {
    const model = await modelOf();
    const head = headOf(texts, { before, between });
    const outcomes = await outcomesOf(model, sourceOf(documents), { head });
    for (const [i, outcome] of outcomes.entries()) {
      if ("error" in outcome) throw new Error(outcome.error);
      const [wanted] = await scoreLabels(model, [within(documents[i]!)], texts);
      const { logits, scores, label, tokens, truncated, beginnings } = outcome.classified;
      expect(Object.values(logits)).toEqual(Array.from(wanted!));
      expect(Object.values(scores)).toEqual(activate(Array.from(wanted!), "softmax"));
      expect(label).toBe(head.labels[wanted!.indexOf(Math.max(...wanted!))]!);
      // Those of the template do not count.
      expect([tokens, truncated, beginnings.length]).toEqual([documents[i]!.length, false, 1]);
    }
  });

  test("are calibrated by what they are likely without a document", async () => {
    const model = await modelOf();
    const plain = headOf(texts, { before, between });
    const baseline = (await scoreLabels(model, [within(new Uint32Array(0))], texts))[0]!;
    const raw = await outcomesOf(model, sourceOf(documents), { head: plain });
    const calibrated = await outcomesOf(model, sourceOf(documents), { head: { ...plain, baseline } });
    for (const [i, outcome] of calibrated.entries()) {
      const other = raw[i]!;
      if ("error" in outcome || "error" in other) throw new Error("it failed");
      const wanted = Object.values(other.classified.logits).map((logit, l) => logit - baseline[l]!);
      const { logits, scores, label } = outcome.classified;
      expect(Object.values(logits)).toEqual(wanted);
      expect(Object.values(scores)).toEqual(activate(wanted, "softmax"));
      expect(label).toBe(plain.labels[wanted.indexOf(Math.max(...wanted))]!);
    }
  });

  test("are behind each of several beginnings", async () => {
    const model = await modelOf();
    const head = headOf(texts, { before, between });
    const outcomes = await outcomesOf(model, sourceOf(documents), { head, lengths: [1, 64, 150] });
    for (const [i, ids] of documents.entries()) {
      const outcome = outcomes[i]!;
      if ("error" in outcome) throw new Error(outcome.error);
      const lengths = [...new Set([1, 64, 150].map((length) => Math.min(length, ids.length)))];
      const { beginnings, truncated } = outcome.classified;
      expect(beginnings.map(({ tokens }) => tokens)).toEqual(lengths);
      expect(truncated).toBe(ids.length > 150);
      for (const [b, length] of lengths.entries()) {
        const [wanted] = await scoreLabels(model, [within(ids.slice(0, length))], texts);
        expect(Object.values(beginnings[b]!.logits)).toEqual(Array.from(wanted!));
      }
    }
  });

  test("take room of the positions and the cache, and there is a most of them", async () => {
    const model = await modelOf({ context: 704, chunkTokens: 128 });
    const head = headOf(texts, { before, between });
    // 24 rows of branches take a block of the 11 of the cache, and the template 7 tokens.
    const room = 640 - 7;
    const outcomes = await outcomesOf(model, sourceOf([document(room), document(room + 1)]), { head });
    expect("classified" in outcomes[0]!).toBe(true);
    expect(outcomes[1]).toEqual({
      document: 1,
      error:
        `the document has more than the ${room} tokens that there is room for: \`--max-tokens\` cuts it, ` +
        "`--context` makes room",
    });
    // What is asked for beyond that is cut to it.
    const [cut] = await outcomesOf(model, sourceOf([document(680)]), { head, lengths: [5, 680] });
    const [fitting] = await outcomesOf(model, sourceOf([document(680)]), { head, lengths: [5, room] });
    expect(cut).toMatchObject({
      classified: { tokens: room, truncated: true, beginnings: [{ tokens: 5 }, {}] },
    });
    expect("classified" in cut! && cut.classified.logits).toEqual(
      "classified" in fitting! && fitting.classified.logits,
    );
    const wide = await modelOf();
    const many = outcomesOf(wide, sourceOf([]), { head: headOf(labelsOf(new Array(257).fill(1))) });
    await expect(many).rejects.toThrow("The labels have 257 tokens together, there is room for 256");
  });
});

test("what a run has no room for is told before it begins", async () => {
  const model = await modelOf({ context: 640, chunkTokens: 64 });
  const asked = (options: Partial<ClassificationOptions>) => outcomesOf(model, sourceOf([]), options);
  await expect(asked({ lengths: [641] })).rejects.toThrow(
    "There is room for documents of 640 tokens, not of 641",
  );
  await expect(asked({ lengths: [701] })).rejects.toThrow("longer than the model's 700 positions");
  await expect(asked({ window: 641 })).rejects.toThrow(
    "There is room for documents of 640 tokens, not of 641",
  );
  await expect(asked({ lengths: [1, 2, 3, 4] })).rejects.toThrow("by 3 lengths each, not by 4");
  expect(await asked({ lengths: [1, 2, 3, 4], window: 64 })).toEqual([]);
  const [outcome] = await outcomesOf(model, sourceOf([document(641)]));
  expect(outcome).toMatchObject({ error: expect.stringContaining("`--context` makes room") });
});

describe("packs", () => {
  test("share passes as far as rows and documents go", async () => {
    const model = await modelOf();
    const batches = async (lengths: readonly number[], options: Partial<ClassificationOptions> = {}) =>
      (await outcomesOf(model, sourceOf(lengths.map((length) => document(length))), options))
        .map((outcome) => "classified" in outcome ? outcome.classified.batch : 0);
    expect(await batches(new Array(5).fill(1))).toEqual([5, 5, 5, 5, 5]);
    expect(await batches([100, 100, 100, 100, 100], { batch: 2 })).toEqual([2, 2, 2, 2, 1]);
    // 128, 640 and 704 rows of 768.
    expect(await batches([65, 640, 700, 5])).toEqual([2, 2, 2, 2]);
    expect(await batches([65, 641, 64])).toEqual([1, 2, 2]);
  });

  test("that are too large are refused", async () => {
    const classifier = await (await modelOf()).classifier();
    const pack = [whole(document(700)), whole(document(65))];
    await expect(classifier.classify(pack)).rejects.toThrow("832 rows are more than the 768 of a pack");
    const lengths = Array.from({ length: 65 }, (_, i) => i + 1);
    await expect(classifier.classify([{ ids: document(65), lengths }])).rejects.toThrow(
      "65 rows are more than",
    );
    const labels = labelsOf([200, 57]);
    await expect(classifier.scoreLabels([document(5)], labels)).rejects.toThrow(
      "257 rows are more than the 256",
    );
  });

  test("are cut into chunks where the labels of one document are longer than a chunk", async () => {
    const labels = labelsOf([66, 3, 70]);
    const likelihoods = async (chunkTokens: number) => {
      const classifier = await (await modelOf({ context: 704, chunkTokens })).classifier();
      return await (await classifier.scoreLabels([document(100)], labels)).result;
    };
    expect(await likelihoods(64)).toEqual(await likelihoods(704));
  });

  /** In place of a device: packs are done one after the other, a turn of the event loop each. */
  function standIn(rows: number) {
    const seen = { packs: [] as number[], underWay: 0, mostUnderWay: 0 };
    let last = Promise.resolve();
    const classifier = {
      packRows: KV_BLOCK * rows,
      plan: { ...PLAN, rows, inFlight: 3 },
      classify(jobs: readonly PackedDocument[]) {
        seen.packs.push(jobs.length);
        seen.mostUnderWay = Math.max(seen.mostUnderWay, ++seen.underWay);
        last = last.then(() => new Promise((resolve) => setTimeout(resolve, 0)));
        const result = last.then(() => {
          seen.underWay--;
          return jobs.map(() => new Float32Array(CLASSES));
        });
        return Promise.resolve({ result });
      },
    };
    const positions = exactPositions(config.nPositions);
    const model = {
      config,
      positions,
      plan: { context: KV_BLOCK * rows },
      classifier: () => Promise.resolve(classifier),
    };
    return { model: model as unknown as Gpt2, seen };
  }

  test("are full, and a bounded number of documents is in memory", async () => {
    for (const [rows, count, ahead] of [[256, 5000, 1024], [1024, 10_000, 2]] as const) {
      const { model, seen } = standIn(rows);
      let taken = 0;
      const source = async function* () {
        while (taken < count) yield sourceDocument(taken++, Uint32Array.of(1, 2, 3));
      };
      const out: number[] = [];
      let most = 0;
      for await (const { document } of classifyDocuments(model, SCORE, source(), { ahead })) {
        most = Math.max(most, taken - out.length);
        out.push(document);
      }
      expect(out).toEqual(Array.from({ length: count }, (_, i) => i));
      expect(seen.mostUnderWay).toBe(3);
      expect(seen.packs).toEqual([...new Array(Math.floor(count / rows)).fill(rows), count % rows]);
      // Those of the packs under way and of the one that is filled, and those encoded ahead.
      expect(most).toBeLessThanOrEqual(4 * rows + ahead + 1);
    }
  });

  test("wait for a document that fails no longer than others do", async () => {
    // Errors take no room in a pack: one that is not full must go.
    let taken = 0;
    let most = 0;
    const source = async function* () {
      yield sourceDocument(taken++, Uint32Array.of(1));
      while (taken < 10_000) yield sourceDocument(taken++, new Uint32Array(0));
    };
    let out = 0;
    for await (const _ of classifyDocuments(standIn(256).model, SCORE, source(), { ahead: 1024 })) {
      most = Math.max(most, taken - out++);
    }
    expect(out).toBe(10_000);
    expect(most).toBeLessThanOrEqual(1024 + 1024 + 1);
  });
});

describe("sparse attention", () => {
  test("gives the same whatever the batch", async () => {
    const model = await modelOf({ sparsity: "sink:64+local:128" });
    const wanted = await classifyEach(model, DOCUMENTS);
    for (const batch of [1, 2, 7]) {
      const outcomes = await outcomesOf(model, sourceOf(DOCUMENTS), { batch });
      expect(logitsIn(outcomes)).toEqual(wanted);
      // Lists are of one document.
      expect(outcomes.every((outcome) => "classified" in outcome && outcome.classified.batch === 1)).toBe(
        true,
      );
    }
    const chunked = await modelOf({ sparsity: "sink:64+local:128", context: 704, chunkTokens: 128 });
    expect(await classifyEach(chunked, DOCUMENTS)).toEqual(wanted);
    // 200 tokens have blocks that it leaves out of the last one.
    const dense = await classifyEach(await modelOf(), DOCUMENTS);
    const differs = wanted.map((logits, i) => maxAbsDifference(logits, dense[i]!) > 0);
    expect(differs).toEqual(LENGTHS.map((length) => length > 192));
  });

  eachElem(gpu, (elem) => {
    test(`of every block is dense attention in ${elem}`, async () => {
      for (const pooling of ["last", "mean"] as const) {
        const every = await modelOf({ elem, pooling, sparsity: "local:1536" });
        const dense = await modelOf({ elem, pooling });
        expect(await classifyEach(every, DOCUMENTS)).toEqual(await classifyEach(dense, DOCUMENTS));
      }
    });
  });

  test("has labels of one token, and no branches", async () => {
    const [every, dense] = [await modelOf({ sparsity: "local:1536" }), await modelOf()];
    const labels = labelsOf([1, 1]);
    const documents = [DOCUMENTS[4]!];
    expect(await scoreLabels(every, documents, labels)).toEqual(await scoreLabels(dense, documents, labels));
    await expect(scoreLabels(every, documents, labelsOf([1, 2]))).rejects.toThrow("labels of several tokens");
  });

  test("of blocks that decoding chooses leaves documents dense", async () => {
    const topk = await modelOf({ sparsity: "topk:256" });
    const pack = DOCUMENTS.map(whole);
    expect(await classify(topk, pack)).toEqual(await classify(await modelOf(), pack));
  });
});

test("scores follow from logits as the problem asks", () => {
  expect(activationOf("regression", 3)).toBe("none");
  expect(activationOf("multi_label_classification", 3)).toBe("sigmoid");
  expect(activationOf("single_label_classification", 3)).toBe("softmax");
  expect(activationOf(undefined, 3)).toBe("softmax");
  expect(activationOf(undefined, 1)).toBe("sigmoid");
  expect(activate([-2, 0.5], "none")).toEqual([-2, 0.5]);
  expect(activate([0, 1000, -1000], "sigmoid")).toEqual([0.5, 1, 0]);
  expect(activate([1000, 1000, -1000], "softmax")).toEqual([0.5, 0.5, 0]);
  expect(activate([3], "softmax")).toEqual([1]);
});
