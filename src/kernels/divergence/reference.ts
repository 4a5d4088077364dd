/** What two rows of logits give, by column; the f64 counterpart of `Divergences`. */
export interface DivergenceReference {
  readonly nll: Float64Array;
  readonly otherNll: Float64Array;
  readonly kl: Float64Array;
  readonly agrees: Uint8Array;
}

/**
 * Compares P = softmax(logits[row]) with Q = softmax(other[row]), both `[rows, vocab]`, in f64: negative
 * log-likelihoods of one target token for each row and KL(P‖Q) = Σ p (log p - log q) in nats, and whether the
 * first of the largest logits is at the same place. A row without a finite log-sum-exp gives NaN.
 */
export function divergenceReference(
  logits: ArrayLike<number>,
  other: ArrayLike<number>,
  targets: ArrayLike<number>,
  vocab: number,
): DivergenceReference {
  const rows = targets.length;
  const out: DivergenceReference = {
    nll: new Float64Array(rows),
    otherNll: new Float64Array(rows),
    kl: new Float64Array(rows),
    agrees: new Uint8Array(rows),
  };
  for (let row = 0; row < rows; row++) {
    const p = logProbabilities(logits, row * vocab, vocab);
    const q = logProbabilities(other, row * vocab, vocab);
    let kl = 0;
    for (let i = 0; i < vocab; i++) {
      const weight = Math.exp(p[i]!);
      if (weight !== 0) kl += weight * (p[i]! - q[i]!);
    }
    out.nll[row] = -p[targets[row]!]!;
    out.otherNll[row] = -q[targets[row]!]!;
    out.kl[row] = kl;
    out.agrees[row] = firstLargest(logits, row * vocab, vocab) === firstLargest(other, row * vocab, vocab)
      ? 1
      : 0;
  }
  return out;
}

function logProbabilities(logits: ArrayLike<number>, base: number, vocab: number): Float64Array {
  let max = -Infinity;
  for (let i = 0; i < vocab; i++) max = Math.max(max, logits[base + i]!);
  let sum = 0;
  for (let i = 0; i < vocab; i++) sum += Math.exp(logits[base + i]! - max);
  return Float64Array.from({ length: vocab }, (_, i) => (logits[base + i]! - max) - Math.log(sum));
}

function firstLargest(logits: ArrayLike<number>, base: number, vocab: number): number {
  let first = 0;
  for (let i = 1; i < vocab; i++) {
    if (logits[base + i]! > logits[base + first]!) first = i;
  }
  return first;
}
