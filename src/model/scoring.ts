/** How well a model predicts a text: the negative log-likelihood of each token, over windows and by position. */
import type { Gpt2 } from "./gpt2.ts";
import { prepended, type TokenSource, upTo } from "./token_source.ts";

export interface ScoringOptions {
  /** Tokens of a window; each window starts from an empty cache at position 0. At most the model's context. */
  readonly window: number;
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

/** Scored tokens whose position in their window is at least `from` and below `to`. */
export interface PositionBucket extends NllSum {
  readonly from: number;
  readonly to: number;
}

export interface DocumentScore extends NllSum {
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
    model.truncate(0);
    await model.prefill(prepended(head, window), {
      signal: options.signal,
      onNll: (token, nll) => {
        sums.add(token, nll);
        onNll?.(first + token, nll);
      },
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
    buckets,
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
  for (const { buckets } of scores) buckets.forEach((bucket, i) => sums.addSum(i, bucket));
  const add = (of: (score: DocumentScore) => number) => scores.reduce((total, score) => total + of(score), 0);
  return {
    tokens: add(({ tokens }) => tokens),
    windows: add(({ windows }) => windows),
    scored: add(({ scored }) => scored),
    sum: add(({ sum }) => sum),
    buckets: sums.buckets(),
  };
}

/** Sums by position, in f64. */
class BucketSums {
  readonly #scored: number[] = [];
  readonly #sums: number[] = [];

  /** @param first position of `nll[0]` in its window */
  add(first: number, nll: Float32Array): void {
    for (let i = 0; i < nll.length; i++) {
      const position = first + i;
      this.addSum(position < FIRST_BUCKET ? 0 : 1 + Math.floor(Math.log2(position / FIRST_BUCKET)), {
        scored: 1,
        sum: nll[i]!,
      });
    }
  }

  addSum(bucket: number, { scored, sum }: NllSum): void {
    this.#scored[bucket] = (this.#scored[bucket] ?? 0) + scored;
    this.#sums[bucket] = (this.#sums[bucket] ?? 0) + sum;
  }

  buckets(): PositionBucket[] {
    return Array.from(this.#scored, (scored = 0, i) => ({
      from: i === 0 ? 0 : FIRST_BUCKET * 2 ** (i - 1),
      to: FIRST_BUCKET * 2 ** i,
      scored,
      sum: this.#sums[i] ?? 0,
    }));
  }
}
