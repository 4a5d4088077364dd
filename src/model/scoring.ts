/** How well a model predicts a text: the negative log-likelihood of each token, over windows and by position. */
import type { Divergences } from "../kernels/divergence/divergence.ts";
import { DeviceError } from "../runtime/errors.ts";
import type { Gpt2 } from "./gpt2.ts";
import { prepended, type TokenSource, upTo } from "./token_source.ts";

export interface ScoringOptions {
  /** Tokens of a window; each window starts from an empty cache at position 0. At most the model's context. */
  readonly window: number;
  /** Also how far the model's attention is from dense; needs a model that was loaded with `comparing`. */
  readonly compare?: boolean;
  readonly signal?: AbortSignal | undefined;
  /** Called with the tokens of the document that are done. */
  readonly onProgress?: (doneTokens: number) => void;
  /** Receives the negative log-likelihoods in nats of the document's tokens from `first` on, in order. */
  readonly onNll?: (first: number, nll: Float32Array) => void;
  /** Receives the logits `[vocab]` after the tokens of the document that `wantsLogits` accepts. */
  readonly onLogits?: (token: number, logits: Float32Array) => void;
  readonly wantsLogits?: (token: number) => boolean;
}

/** Tokens that were scored, and the sum of their negative log-likelihoods in nats. */
export interface NllSum {
  readonly scored: number;
  readonly sum: number;
}

/** What dense attention says of the same tokens, summed over them. */
export interface ComparisonSum {
  /** Negative log-likelihoods with dense attention, in nats. */
  readonly denseSum: number;
  /** Kullback-Leibler divergences of the predictions from those with dense attention, in nats. */
  readonly klSum: number;
  /** Tokens for which both predict the same one. */
  readonly agreeing: number;
}

/** Scored tokens whose position in their window is at least `from` and below `to`. */
export interface PositionBucket extends NllSum {
  /** Where it was asked for. */
  readonly comparison?: ComparisonSum | undefined;
  readonly from: number;
  readonly to: number;
}

export interface DocumentScore extends NllSum {
  readonly comparison?: ComparisonSum | undefined;
  readonly tokens: number;
  readonly windows: number;
  readonly buckets: readonly PositionBucket[];
}

/** Positions 0 to 1K, then every doubling: 1K to 2K, 2K to 4K … */
const FIRST_BUCKET = 1024;

/**
 * Scores a document in windows that do not overlap. The first token of a window has nothing before it and is not
 * scored; all others are, given the tokens before them in the window.
 */
export async function scoreDocument(
  model: Gpt2,
  document: TokenSource,
  options: ScoringOptions,
): Promise<DocumentScore> {
  const { onNll, onLogits, wantsLogits } = options;
  const sums = new BucketSums();
  let tokens = 0;
  let windows = 0;
  for (;;) {
    const window = upTo(document, options.window);
    const head = await window.take(1);
    if (head.length === 0) break;
    const first = tokens;
    for (let sequence = 0; sequence < model.cache.sequences; sequence++) model.truncate(0, sequence);
    await model.prefill(prepended(head, window), {
      signal: options.signal,
      onNll: (token, nll) => {
        sums.add(token, nll);
        onNll?.(first + token, nll);
      },
      ...(options.compare
        ? { onDivergence: (token: number, divergences: Divergences) => sums.compare(token, divergences) }
        : {}),
      ...(onLogits
        ? {
          onLogits: (token: number, logits: Float32Array) => onLogits(first + token, logits),
          wantsLogits: (token: number) => wantsLogits?.(first + token) ?? true,
        }
        : {}),
      onProgress: (done) => options.onProgress?.(first + done),
    });
    tokens += model.length;
    windows++;
  }
  const buckets = sums.buckets();
  return {
    tokens,
    windows,
    scored: buckets.reduce((total, { scored }) => total + scored, 0),
    sum: buckets.reduce((total, { sum }) => total + sum, 0),
    comparison: totalComparison(buckets),
    buckets,
  };
}

/** Of all of them; undefined when there was none. */
function totalComparison(all: readonly Pick<PositionBucket, "comparison">[]): ComparisonSum | undefined {
  return all.reduce<ComparisonSum | undefined>(
    (total, { comparison }) => comparison ? addComparison(total, comparison) : total,
    undefined,
  );
}

function addComparison(a: ComparisonSum | undefined, b: ComparisonSum): ComparisonSum {
  return {
    denseSum: (a?.denseSum ?? 0) + b.denseSum,
    klSum: (a?.klSum ?? 0) + b.klSum,
    agreeing: (a?.agreeing ?? 0) + b.agreeing,
  };
}

/** Mean negative log-likelihood in nats; null when nothing was scored. */
export function meanNll({ scored, sum }: NllSum): number | null {
  return scored === 0 ? null : sum / scored;
}

/** `exp` of the mean; null when nothing was scored. */
export function perplexity(score: NllSum): number | null {
  const mean = meanNll(score);
  return mean === null ? null : Math.exp(mean);
}

/** Adds up many scores: that of a collection is not the mean of its documents'. */
export function totalScore(scores: readonly DocumentScore[]): DocumentScore {
  const sums = new BucketSums();
  for (const { buckets } of scores) {
    buckets.forEach((bucket, i) => {
      sums.addSum(i, bucket);
      if (bucket.comparison) sums.addComparison(i, bucket.comparison);
    });
  }
  const add = (of: (score: DocumentScore) => number) => scores.reduce((total, score) => total + of(score), 0);
  return {
    tokens: add(({ tokens }) => tokens),
    windows: add(({ windows }) => windows),
    scored: add(({ scored }) => scored),
    sum: add(({ sum }) => sum),
    comparison: totalComparison(scores),
    buckets: sums.buckets(),
  };
}

function bucketOf(position: number): number {
  return position < FIRST_BUCKET ? 0 : 1 + Math.floor(Math.log2(position / FIRST_BUCKET));
}

/** Sums by position, in f64. */
class BucketSums {
  readonly #scored: number[] = [];
  readonly #sums: number[] = [];
  readonly #comparisons: ComparisonSum[] = [];

  /** @param first position of `nll[0]` in its window */
  add(first: number, nll: Float32Array): void {
    for (let i = 0; i < nll.length; i++) this.addSum(bucketOf(first + i), { scored: 1, sum: nll[i]! });
  }

  /**
   * @param first position of the first in its window
   * @throws DeviceError when a prediction is none: a NaN or an infinity is among its logits
   */
  compare(first: number, { nll, kl, agrees }: Divergences): void {
    for (let i = 0; i < kl.length; i++) {
      if (!Number.isFinite(kl[i]!) || !Number.isFinite(nll[i]!)) {
        throw new DeviceError(
          `The predictions of token ${first + i} cannot be compared: they are not finite`,
          {
            hint: "try `--dtype f32`; if that does not help, the checkpoint is damaged",
          },
        );
      }
      this.addComparison(bucketOf(first + i), { denseSum: nll[i]!, klSum: kl[i]!, agreeing: agrees[i]! });
    }
  }

  addSum(bucket: number, { scored, sum }: NllSum): void {
    this.#scored[bucket] = (this.#scored[bucket] ?? 0) + scored;
    this.#sums[bucket] = (this.#sums[bucket] ?? 0) + sum;
  }

  addComparison(bucket: number, comparison: ComparisonSum): void {
    this.#comparisons[bucket] = addComparison(this.#comparisons[bucket], comparison);
  }

  buckets(): PositionBucket[] {
    return Array.from(this.#scored, (scored = 0, i) => ({
      from: i === 0 ? 0 : FIRST_BUCKET * 2 ** (i - 1),
      to: FIRST_BUCKET * 2 ** i,
      scored,
      sum: this.#sums[i] ?? 0,
      comparison: this.#comparisons[i],
    }));
  }
}
