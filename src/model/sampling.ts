/**
 * Choosing the next token from a row of logits: pure, and the same for the same seed on every machine.
 *
 * The order of the filters is that of Hugging Face's logits processors:
 *   1. repetition penalty on the logits (Keskar et al. 2019, CTRL), each token seen in `recent` once:
 *      positive logits are divided by it, negative ones multiplied
 *   2. temperature: logits / temperature; 0 takes the largest logit, and the filters below do not matter
 *   3. top-k: the k largest
 *   4. top-p: of those, renormalised, the smallest set of largest probabilities whose sum is at least p
 *   5. min-p: of those, the ones with at least minP times the largest probability
 * Equal logits rank by id, the lower first, so every set is exact and at least one token is always left.
 *
 * The draw: u = `uniform(seed, step)`, step counting the calls of `next` from 0, greedy ones too; the chosen id is the
 * first, in order of ids, whose cumulative weight exceeds u times the sum of all weights left.
 */
import { DeviceError } from "../runtime/errors.ts";

export interface SamplingOptions {
  /** 0 is greedy. */
  readonly temperature: number;
  /** 0 is off. */
  readonly topK: number;
  /** 1 is off. */
  readonly topP: number;
  /** 0 is off. */
  readonly minP: number;
  /** 1 is off. */
  readonly repeatPenalty: number;
  /** Any integer that a number holds exactly; its low 64 bits are the key of the generator. */
  readonly seed: number;
}

export interface Sampler {
  /** Draws a token; `recent` are the ids that the repetition penalty applies to, usually prompt and text so far. */
  next(logits: Float32Array, recent: readonly number[]): number;
}

/** Token ids in increasing order, and their probabilities after all filters, which sum to 1. */
export interface Candidates {
  readonly ids: Uint32Array;
  readonly probabilities: Float64Array;
}

export interface TokenLogprob {
  readonly id: number;
  /** Natural logarithm, at most 0. */
  readonly logprob: number;
}

/** A sampler that counts its own steps; two with the same options and inputs give the same tokens. */
export function createSampler(options: SamplingOptions): Sampler {
  let step = 0;
  return {
    next(logits, recent) {
      const scores = penalised(logits, recent, options.repeatPenalty);
      const u = uniform(options.seed, step++);
      if (options.temperature === 0) return argmax(scores);
      const { ids, weights } = filtered(scores, options);
      let total = 0;
      for (const weight of weights) total += weight;
      // The sum below repeats the one above, so its end exceeds u · total for every u < 1, to the last bit.
      let sum = 0;
      for (let i = 0; i < ids.length; i++) {
        sum += weights[i]!;
        if (sum > u * total) return ids[i]!;
      }
      return ids.at(-1)!;
    },
  };
}

/** The exact distribution that `createSampler` draws from; temperature 0 gives one id with probability 1. */
export function candidates(
  logits: Float32Array,
  recent: readonly number[],
  options: Omit<SamplingOptions, "seed">,
): Candidates {
  const scores = penalised(logits, recent, options.repeatPenalty);
  if (options.temperature === 0) {
    return { ids: Uint32Array.of(argmax(scores)), probabilities: Float64Array.of(1) };
  }
  const { ids, weights } = filtered(scores, options);
  let total = 0;
  for (const weight of weights) total += weight;
  return { ids, probabilities: weights.map((weight) => weight / total) };
}

/**
 * Log-probabilities of the logits as they are, without temperature, penalty or filters, in float64.
 * @returns that of `id`, and the `k` largest in decreasing order (equal ones by id)
 */
export function logSoftmaxTopK(
  logits: Float32Array,
  k: number,
  id: number,
): { logprob: number; top: TokenLogprob[] } {
  const scores = new Float64Array(logits);
  const largest = scores[argmax(scores)]!;
  let total = 0;
  for (const score of scores) total += Math.exp(score - largest);
  const logTotal = largest + Math.log(total);

  const heap = new DescendingHeap(k > 0 ? scores : new Float64Array(0));
  const top: TokenLogprob[] = [];
  while (top.length < Math.min(k, scores.length)) {
    const next = heap.pop();
    top.push({ id: next, logprob: scores[next]! - logTotal });
  }
  return { logprob: (scores[id] ?? -Infinity) - logTotal, top };
}

/** A copy of the logits with step 1 applied. */
function penalised(logits: Float32Array, recent: readonly number[], penalty: number): Float64Array {
  const scores = new Float64Array(logits);
  if (penalty === 1) return scores;
  for (const id of recent) {
    const logit = logits[id]; // not scores[id]: a token seen twice is penalised once
    if (logit !== undefined) scores[id] = logit > 0 ? logit / penalty : logit * penalty;
  }
  return scores;
}

/** The index of the largest score, the lowest of equals; scores that cannot be softmaxed are a DeviceError. */
function argmax(scores: Float64Array): number {
  let best = 0;
  let largest = -Infinity;
  for (let id = 0; id < scores.length; id++) {
    const score = scores[id]!;
    if (score > largest) {
      largest = score;
      best = id;
    } else if (Number.isNaN(score)) {
      throw unusableLogits("contain NaN", id);
    }
  }
  if (!Number.isFinite(largest)) {
    throw unusableLogits(largest > 0 ? "contain infinity" : "are all -infinity", best);
  }
  return best;
}

/**
 * What is said of logits that no token can be drawn from.
 * @param what `contain NaN` and the like
 * @param id the first token id at which they do
 */
export function unusableLogits(what: string, id: number): DeviceError {
  return new DeviceError(`The logits ${what} (first at token id ${id})`, {
    hint:
      "activations may have left the range of f16, try `--dtype f32`; if that gives the same, the checkpoint or the " +
      "GPU driver is at fault",
  });
}

/** Steps 2 to 5: what is left, in order of ids, with weights exp((score - largest) / temperature), the largest 1. */
function filtered(scores: Float64Array, options: Omit<SamplingOptions, "seed">) {
  const largest = scores[argmax(scores)]!;
  const weights = new Float64Array(scores.length);
  for (let id = 0; id < scores.length; id++) {
    weights[id] = Math.exp((scores[id]! - largest) / options.temperature);
  }
  const ids = topKTopP(scores, weights, options) ?? firstIntegers(scores.length);
  const keptWeights = new Float64Array(ids.length);
  let kept = 0; // compacts in place: what step 5 keeps moves to the front
  for (let i = 0; i < ids.length; i++) {
    const weight = weights[ids[i]!]!;
    if (weight === 0 || weight < options.minP) continue;
    ids[kept] = ids[i]!;
    keptWeights[kept++] = weight;
  }
  return { ids: ids.subarray(0, kept), weights: keptWeights.subarray(0, kept) };
}

/** Steps 3 and 4, in order of ids; `undefined` when both are off. */
function topKTopP(
  scores: Float64Array,
  weights: Float64Array,
  { topK, topP }: { readonly topK: number; readonly topP: number },
): Uint32Array | undefined {
  const k = topK > 0 ? Math.min(topK, scores.length) : scores.length;
  if (k === scores.length && topP >= 1) return undefined;
  const heap = new DescendingHeap(scores);
  const kept: number[] = [];
  let total = 0;
  if (k < scores.length) {
    for (let i = 0; i < k; i++) {
      kept.push(heap.pop());
      total += weights[kept[i]!]!;
    }
  } else {
    for (const weight of weights) total += weight;
  }
  if (topP < 1) {
    let sum = 0;
    let count = 0;
    do {
      if (count === kept.length) kept.push(heap.pop());
      sum += weights[kept[count++]!]!;
    } while (sum < topP * total && count < k);
    kept.length = count;
  }
  return Uint32Array.from(kept).sort();
}

/** 0, 1, … n - 1. */
function firstIntegers(n: number): Uint32Array {
  const integers = new Uint32Array(n);
  for (let i = 0; i < n; i++) integers[i] = i;
  return integers;
}

/**
 * Ids by decreasing score, equal scores by id, without sorting them all: making the heap costs O(n) and each `pop`
 * O(log n), so a small top-k or top-p costs about one pass over the vocabulary.
 */
class DescendingHeap {
  readonly #scores: Float64Array;
  readonly #ids: Uint32Array;
  #size: number;

  constructor(scores: Float64Array) {
    this.#scores = scores;
    this.#size = scores.length;
    this.#ids = firstIntegers(scores.length);
    for (let i = (this.#size >> 1) - 1; i >= 0; i--) this.#siftDown(i);
  }

  /** The next id; not to be called more often than there are scores. */
  pop(): number {
    const top = this.#ids[0]!;
    this.#ids[0] = this.#ids[--this.#size]!;
    this.#siftDown(0);
    return top;
  }

  #siftDown(start: number): void {
    const ids = this.#ids;
    const moved = ids[start]!;
    let hole = start;
    for (let child = 2 * hole + 1; child < this.#size; child = 2 * hole + 1) {
      if (child + 1 < this.#size && this.#before(ids[child + 1]!, ids[child]!)) child++;
      if (!this.#before(ids[child]!, moved)) break;
      ids[hole] = ids[child]!;
      hole = child;
    }
    ids[hole] = moved;
  }

  #before(a: number, b: number): boolean {
    const difference = this.#scores[a]! - this.#scores[b]!;
    return difference > 0 || (!(difference < 0) && a < b);
  }
}

/**
 * The random number of a step, uniform on the multiples of 2^-24 in [0, 1), so exact in float32 on a GPU too:
 * word 0 of Philox-4x32-10 with key [seed mod 2^32, floor(seed / 2^32) mod 2^32] and counter [step, 0, 0, 0],
 * of which the top 24 bits are divided by 2^24. Any step can be computed on its own.
 */
export function uniform(seed: number, step: number): number {
  const [word] = philox4x32([step, 0, 0, 0], [seed >>> 0, Math.floor(seed / 2 ** 32) >>> 0]);
  return (word >>> 8) / 2 ** 24;
}

type Words2 = readonly [number, number];
type Words4 = readonly [number, number, number, number];

/** Philox-4x32 with 10 rounds, a counter-based generator: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". */
export function philox4x32(counter: Words4, key: Words2): Words4 {
  let [c0, c1, c2, c3] = counter;
  let [k0, k1] = key;
  for (let round = 0; round < 10; round++) {
    const high0 = multiplyHigh(0xd2511f53, c0);
    const high1 = multiplyHigh(0xcd9e8d57, c2);
    const low0 = Math.imul(0xd2511f53, c0);
    const low1 = Math.imul(0xcd9e8d57, c2);
    [c0, c1, c2, c3] = [(high1 ^ c1 ^ k0) >>> 0, low1 >>> 0, (high0 ^ c3 ^ k1) >>> 0, low0 >>> 0];
    k0 = (k0 + 0x9e3779b9) >>> 0;
    k1 = (k1 + 0xbb67ae85) >>> 0;
  }
  return [c0, c1, c2, c3];
}

/** The upper 32 bits of the 64-bit product of two u32; every partial product fits the 53 bits of a number. */
function multiplyHigh(a: number, b: number): number {
  const low = (a & 0xffff) * b; // < 2^48
  const high = (a >>> 16) * b;
  return Math.floor((high + Math.floor(low / 0x10000)) / 0x10000);
}
