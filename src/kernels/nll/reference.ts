/**
 * Negative log-likelihood in nats of one target token for each row of `logits[rows, vocab]`, with f64 sums: what
 * PyTorch calls `cross_entropy(reduction="none")`.
 */
export function nllReference(
  logits: ArrayLike<number>,
  targets: ArrayLike<number>,
  vocab: number,
): Float64Array {
  return Float64Array.from(targets, (target, row) => {
    const base = row * vocab;
    let max = -Infinity;
    for (let i = 0; i < vocab; i++) max = Math.max(max, logits[base + i]!);
    let sum = 0;
    for (let i = 0; i < vocab; i++) sum += Math.exp(logits[base + i]! - max);
    return Math.log(sum) + (max - logits[base + target]!);
  });
}
