/**
 * Which attention patterns still see a passage far back: how much better a model predicts it the second time.
 *
 *     bun bench/retrieval.ts [--model DIR] [--dtype auto] [--window 16k] [--positions exact]
 *         [--patterns "local:1k;topk:1k"] [--distances 512,2k,4k,8k,15k] [--passages 6] [--out FILE.json]
 *         [--commit ID] IDS.json…
 *
 * Every file holds the token ids of one text. A document is the first window of one text with a passage of
 * another, 256 tokens, in place of its last ones, and the same passage once more `distance` tokens before. What
 * counts is the mean negative log-likelihood, in nats, of the last 128 tokens; in the control, other tokens of
 * the passage's text are in place of the first copy. The gain is the difference of the two. A pattern sees the
 * passage if its gain is at least half of that of dense attention.
 *
 * Document i has text i, and its passage is of text i + 1, counted round: it begins 1024 i tokens behind the
 * first window, and the control's tokens 512 behind that. `topk` chooses blocks only while decoding: there the
 * second copy is decoded, and all before it is prefilled.
 */
import { basename } from "node:path";
import { parseArgs } from "node:util";
import { nllReference } from "../src/kernels/nll/reference.ts";
import { DENSE, type Sparsity } from "../src/kvcache/sparsity.ts";
import {
  decodeKnown,
  isDecoded,
  KNOWN_DECODING,
  nameOf,
  parseTokens,
  PATTERN_OPTIONS,
  PatternBench,
  Reader,
  readText,
  tableHead,
  tableRow,
} from "./quality.ts";

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    ...PATTERN_OPTIONS,
    distances: { type: "string", default: "512,2k,4k,8k,15k" },
    passages: { type: "string", default: "6" },
  },
});

const PASSAGE = 256;
const SCORED = PASSAGE / 2;
/** Tokens from passage to passage of a text; what replaces one in its control is half as far. */
const STRIDE = 1024;

const bench = await PatternBench.open(values);
const { window } = bench;
const passages = Number(values.passages);
/** Ascending, so that a document begins like the one before until its own first copy. */
const distances = values.distances.split(",").map(parseTokens).sort((a, b) => a - b);
for (const distance of distances) {
  if (distance >= PASSAGE && distance + PASSAGE <= window) continue;
  throw new Error(`Two passages of ${PASSAGE} tokens, ${distance} apart, do not fit ${window} tokens`);
}
const texts: Uint32Array[] = [];
for (const path of positionals) texts.push(await readText(path, window + STRIDE * passages));

/** Where the second copy begins. */
const second = window - PASSAGE;

interface Trial {
  readonly distance: number;
  readonly repeated: Uint32Array;
  readonly control: Uint32Array;
}

function trialsOf(passage: number): Trial[] {
  const filler = texts[passage % texts.length]!;
  const other = texts[(passage + 1) % texts.length]!;
  const at = window + STRIDE * passage;
  const copy = other.subarray(at, at + PASSAGE);
  const replacement = other.subarray(at + STRIDE / 2, at + STRIDE / 2 + PASSAGE);
  return distances.map((distance) => {
    const document = (first: Uint32Array) => {
      const tokens = filler.slice(0, window);
      tokens.set(first, second - distance);
      tokens.set(copy, second);
      return tokens;
    };
    return { distance, repeated: document(copy), control: document(replacement) };
  });
}

const trials = Array.from({ length: passages }, (_, passage) => trialsOf(passage)).flat();

/** The mean over the scored tokens of a document, of each model. */
type Measure = (readers: readonly Reader[], document: Uint32Array) => Promise<number[]>;

const prefilled: Measure = async (readers, document) => {
  const means = [];
  for (const reader of readers) {
    await reader.read(document, second);
    let sum = 0;
    await reader.model.prefill(document.subarray(second), {
      onNll(first, nll) {
        nll.forEach((value, i) => sum += first + i < PASSAGE - SCORED ? 0 : value);
      },
    });
    means.push(sum / SCORED);
  }
  return means;
};

const decoded: Measure = async (readers, document) => {
  const sums = readers.map(() => 0);
  const place = { start: second, count: PASSAGE - 1 };
  for await (const { position, token, logits } of decodeKnown(readers, document, place)) {
    if (position < window - SCORED) continue;
    logits.forEach((row, i) => sums[i]! += nllReference(row, [token], row.length)[0]!);
  }
  return sums.map((sum) => sum / SCORED);
};

interface Outcome {
  readonly pattern: string;
  readonly distance: number;
  readonly nll_repeated: number;
  readonly nll_control: number;
  readonly gain: number;
  /** Of each passage. */
  readonly gains: readonly number[];
}

function mean(numbers: readonly number[]): number {
  return numbers.reduce((sum, number) => sum + number, 0) / numbers.length;
}

/** @param sparsities one, or some that change decoding alone */
async function measureAll(sparsities: readonly Sparsity[]): Promise<Outcome[]> {
  const [measure, options] = sparsities.every(isDecoded)
    ? [decoded, { decoding: KNOWN_DECODING }]
    : [prefilled, { scoring: true }];
  return await bench.withModels(sparsities, options, async (models) => {
    const readers = models.map((model) => new Reader(model));
    const measured: { distance: number; repeated: number[]; control: number[] }[] = [];
    for (const { distance, repeated, control } of trials) {
      measured.push({
        distance,
        repeated: await measure(readers, repeated),
        control: await measure(readers, control),
      });
    }
    return sparsities.flatMap((sparsity, i) =>
      distances.map((distance) => {
        const pairs = measured.filter((one) => one.distance === distance);
        const gains = pairs.map(({ repeated, control }) => control[i]! - repeated[i]!);
        return {
          pattern: nameOf(sparsity),
          distance,
          nll_repeated: mean(pairs.map(({ repeated }) => repeated[i]!)),
          nll_control: mean(pairs.map(({ control }) => control[i]!)),
          gain: mean(gains),
          gains,
        };
      })
    );
  });
}

const rows: (Outcome & { readonly sees: boolean | null })[] = [];
const denseGains = new Map<number, number>();

function show(outcomes: readonly Outcome[]): void {
  for (const outcome of outcomes) {
    const { pattern, distance, nll_repeated, nll_control, gain } = outcome;
    const dense = denseGains.get(distance)!;
    // Where dense attention does not see the passage either, there is nothing to compare with.
    const sees = dense > 0 ? gain >= dense / 2 : null;
    rows.push({ ...outcome, sees });
    console.log(tableRow([
      pattern,
      String(distance),
      nll_repeated.toFixed(4),
      nll_control.toFixed(4),
      gain.toFixed(4),
      sees === null ? "" : sees ? "yes" : "no",
    ]));
  }
}

console.log(tableHead(["pattern", "distance", "repeated", "control", "gain", "sees it"]));
const dense = await measureAll([DENSE]);
for (const { distance, gain } of dense) denseGains.set(distance, gain);
show(dense);
for (const sparsity of bench.sparsities) {
  if (!isDecoded(sparsity)) show(await measureAll([sparsity]));
}
const chosen = bench.sparsities.filter(isDecoded);
if (chosen.length > 0) show(await measureAll(chosen));
await bench.finish({
  texts: positionals.map((path) => basename(path, ".json")),
  passages,
  passage_tokens: PASSAGE,
  scored_tokens: SCORED,
  rows,
});
