/**
 * What attention patterns cost in quality: every pattern against dense attention over the same tokens of long
 * texts.
 *
 *     bun bench/sparsity.ts [--model DIR] [--dtype auto] [--window 16k] [--positions exact]
 *         [--patterns "local:1k;topk:1k"] [--topk-tokens 512] [--out FILE.json] [--commit ID] IDS.json…
 *
 * Every file holds the token ids of one text, of which the first window is scored; figures are over all texts.
 * `topk` chooses blocks only while decoding: the tokens before a place are prefilled, and `--topk-tokens` from
 * there on are decoded as the text has them. Places are where each range of positions from 4,096 on begins, and
 * the end of the window. Its figures, those of dense attention among them, are about the tokens that the
 * decoded ones predict.
 */
import { basename } from "node:path";
import { parseArgs } from "node:util";
import { divergenceReference } from "../src/kernels/divergence/reference.ts";
import { KV_BLOCK } from "../src/kernels/shared/shared.ts";
import { DENSE, type Sparsity, sparsityDensity, TOPK_LEAST_BLOCKS } from "../src/kvcache/sparsity.ts";
import {
  type ComparisonSum,
  meanNll,
  type NllSum,
  type PositionBucket,
  scoreDocument,
  totalScore,
} from "../src/model/scoring.ts";
import { tokensOf } from "../src/model/token_source.ts";
import {
  decodeKnown,
  isDecoded,
  KNOWN_DECODING,
  nameOf,
  parseTokens,
  PATTERN_OPTIONS,
  PatternBench,
  type Prediction,
  Reader,
  readText,
  tableHead,
  tableRow,
} from "./quality.ts";

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: { ...PATTERN_OPTIONS, "topk-tokens": { type: "string", default: "512" } },
});

type Compared = NllSum & { readonly comparison?: ComparisonSum | undefined };
type Range = Pick<PositionBucket, "from" | "to">;

const bench = await PatternBench.open(values);
const { window } = bench;
const texts: Uint32Array[] = [];
for (const path of positionals) texts.push(await readText(path, window));
const topkTokens = parseTokens(values["topk-tokens"]);

/** The ranges of positions that `scoreDocument` has. */
const ranges: Range[] = [{ from: 0, to: 1024 }];
while (ranges.at(-1)!.to < window) {
  const { to } = ranges.at(-1)!;
  ranges.push({ from: to, to: 2 * to });
}

/** Null where nothing was scored. */
function figures(score: Compared) {
  const { scored, comparison } = score;
  const mean = meanNll(score);
  if (mean === null || !comparison) return null;
  return {
    scored,
    perplexity: Math.exp(mean),
    dense_perplexity: Math.exp(comparison.denseSum / scored),
    kl_mean: comparison.klSum / scored,
    top1_agreement: comparison.agreeing / scored,
  };
}

function rowOf(sparsity: Sparsity, all: Compared, buckets: readonly (Range & Compared)[]) {
  return {
    pattern: nameOf(sparsity),
    density: sparsityDensity(sparsity, bench.heads, Math.ceil(window / KV_BLOCK)),
    ...figures(all)!,
    buckets: buckets.flatMap((bucket) => {
      const found = figures(bucket);
      return found ? [{ from: bucket.from, to: bucket.to, ...found }] : [];
    }),
  };
}

type Row = ReturnType<typeof rowOf>;

async function prefilled(sparsity: Sparsity): Promise<Row> {
  return await bench.withModels([sparsity], { scoring: true, comparing: true }, async ([model]) => {
    const scores = [];
    for (const text of texts) {
      scores.push(await scoreDocument(model!, tokensOf(text), { window, compare: true }));
    }
    const total = totalScore(scores);
    return rowOf(sparsity, total, total.buckets);
  });
}

/** Where known tokens are decoded. */
function places(): { start: number; count: number }[] {
  const least = TOPK_LEAST_BLOCKS * KV_BLOCK;
  const starts = ranges.map(({ from }) => from).filter((from) => from >= least && from + 1 < window);
  const last = window - 1 - topkTokens;
  if (last >= (starts.at(-1) ?? 0) + topkTokens) starts.push(last);
  return starts.map((start) => ({ start, count: Math.min(topkTokens, window - 1 - start) }));
}

/** What one pattern predicts behind decoded tokens against what dense attention does: sums in f64. */
class DecodedSums {
  readonly #ranges = ranges.map((range) => ({ ...range, ...DecodedSums.#none() }));
  readonly #all = DecodedSums.#none();

  static #none() {
    return { scored: 0, sum: 0, comparison: { denseSum: 0, klSum: 0, agreeing: 0 } };
  }

  add({ position, token }: Prediction, dense: Float32Array, sparse: Float32Array): void {
    const { nll, otherNll, kl, agrees } = divergenceReference(dense, sparse, [token], dense.length);
    for (const sums of [this.#all, this.#ranges.findLast(({ from }) => from <= position)!]) {
      sums.scored++;
      sums.sum += otherNll[0]!;
      sums.comparison.denseSum += nll[0]!;
      sums.comparison.klSum += kl[0]!;
      sums.comparison.agreeing += agrees[0]!;
    }
  }

  row(sparsity: Sparsity): Row {
    return rowOf(sparsity, this.#all, this.#ranges);
  }
}

async function decoded(sparsities: readonly Sparsity[]): Promise<Row[]> {
  return await bench.withModels([DENSE, ...sparsities], { decoding: KNOWN_DECODING }, async (models) => {
    const readers = models.map((model) => new Reader(model));
    const sums = sparsities.map(() => new DecodedSums());
    for (const text of texts) {
      for (const place of places()) {
        for await (const prediction of decodeKnown(readers, text, place)) {
          const [dense, ...sparse] = prediction.logits;
          sparse.forEach((logits, i) => sums[i]!.add(prediction, dense!, logits));
        }
      }
    }
    return sparsities.map((sparsity, i) => sums[i]!.row(sparsity));
  });
}

const rows: Row[] = [];

function show(row: Row): void {
  rows.push(row);
  const ratios = ranges.map(({ from }) => {
    const bucket = row.buckets.find((one) => one.from === from);
    return bucket ? (bucket.perplexity / bucket.dense_perplexity).toFixed(4) : "";
  });
  console.log(tableRow([
    row.pattern,
    `${(100 * row.density).toPrecision(3)} %`,
    String(row.scored),
    row.perplexity.toFixed(2),
    row.dense_perplexity.toFixed(2),
    row.kl_mean.toFixed(4),
    `${(100 * row.top1_agreement).toFixed(2)} %`,
    ...ratios,
  ]));
}

const k = (position: number) => position === 0 ? "0" : `${position / 1024}K`;
console.log(tableHead([
  ...["pattern", "density", "tokens", "perplexity", "dense", "KL", "top-1"],
  ...ranges.map(({ from, to }) => `ratio ${k(from)}–${k(to)}`),
]));
for (const sparsity of bench.sparsities) if (!isDecoded(sparsity)) show(await prefilled(sparsity));
const chosen = bench.sparsities.filter(isDecoded);
if (chosen.length > 0) { for (const row of await decoded(chosen)) show(row); }
await bench.finish({
  texts: positionals.map((path) => basename(path, ".json")),
  topk_tokens: topkTokens,
  rows,
});
