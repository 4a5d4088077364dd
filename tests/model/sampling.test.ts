import { describe, expect, test } from "bun:test";
import {
  candidates,
  createSampler,
  logSoftmaxTopK,
  philox4x32,
  type SamplingOptions,
  uniform,
} from "../../src/model/sampling.ts";
import { DeviceError } from "../../src/runtime/errors.ts";

const plain: SamplingOptions = { temperature: 1, topK: 0, topP: 1, minP: 0, repeatPenalty: 1, seed: 1 };
const greedy: SamplingOptions = { ...plain, temperature: 0 };

/** Logits whose softmax is exactly these probabilities, to float32. */
function logitsOf(...probabilities: number[]): Float32Array {
  return Float32Array.from(probabilities, Math.log);
}

function idsOf(
  logits: Float32Array,
  options: Partial<SamplingOptions>,
  recent: readonly number[] = [],
): number[] {
  return [...candidates(logits, recent, { ...plain, ...options }).ids];
}

function draw(logits: Float32Array, options: Partial<SamplingOptions>, count: number): number[] {
  const sampler = createSampler({ ...plain, ...options });
  return Array.from({ length: count }, () => sampler.next(logits, []));
}

function randomLogits(length: number, seed: number): Float32Array {
  return Float32Array.from({ length }, (_, i) => 6 * uniform(seed, i) - 3);
}

describe("philox", () => {
  test("gives the known answers of the paper's authors", () => {
    const ones = 0xffffffff;
    expect(philox4x32([0, 0, 0, 0], [0, 0])).toEqual([0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
    expect(philox4x32([ones, ones, ones, ones], [ones, ones]))
      .toEqual([0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
    expect(philox4x32([0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344], [0xa4093822, 0x299f31d0]))
      .toEqual([0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]);
  });

  test("uniform numbers are exact in float32, below 1, and differ by seed, its upper half included", () => {
    for (let step = 0; step < 1000; step++) {
      const u = uniform(42, step);
      expect(Math.fround(u)).toBe(u);
      expect(u).toBeLessThan(1);
      expect(u).toBeGreaterThanOrEqual(0);
    }
    expect(new Set([0, 1, -1, 2 ** 32, 2 ** 32 + 1, 2 ** 52].map((seed) => uniform(seed, 0))).size).toBe(6);
  });
});

describe("greedy", () => {
  test("takes the largest logit, the lowest id of equals", () => {
    expect(draw(Float32Array.of(1, 3, 3, 2), greedy, 2)).toEqual([1, 1]);
    expect(draw(Float32Array.of(-5, -5), greedy, 1)).toEqual([0]);
  });

  test("heeds the repetition penalty, once for each token", () => {
    const sampler = createSampler({ ...greedy, repeatPenalty: 2 });
    expect(sampler.next(Float32Array.of(3, 2), [0, 0, 0])).toBe(1); // 1.5 against 2
    expect(sampler.next(Float32Array.of(3, 1), [0, 0, 0])).toBe(0); // 1.5 against 1, not 0.375
    expect(sampler.next(Float32Array.of(-1, -1.5), [0, 7])).toBe(1); // -2 against -1.5
  });

  test("equals sampling at a temperature near 0", () => {
    for (let seed = 0; seed < 20; seed++) {
      const logits = randomLogits(100, seed);
      expect(draw(logits, { temperature: 1e-30, seed }, 1)).toEqual(draw(logits, greedy, 1));
    }
  });
});

describe("seeds", () => {
  test("repeat exactly and differ from each other", () => {
    const logits = randomLogits(1000, 9);
    expect(draw(logits, { seed: 5 }, 50)).toEqual(draw(logits, { seed: 5 }, 50));
    expect(draw(logits, { seed: 5 }, 50)).not.toEqual(draw(logits, { seed: 6 }, 50));
  });

  test("count greedy steps too, so the number of a step does not depend on the path to it", () => {
    const [low, high] = [logitsOf(0.5, 0.5), Float32Array.of(0, -Infinity)];
    const first = createSampler(plain);
    const second = createSampler(plain);
    first.next(high, []);
    second.next(low, []);
    expect(Array.from({ length: 30 }, () => first.next(low, [])))
      .toEqual(Array.from({ length: 30 }, () => second.next(low, [])));
  });
});

describe("filters", () => {
  const logits = logitsOf(0.1, 0.4, 0.05, 0.25, 0.2);

  test("top-k keeps exactly k, the lower ids of equals", () => {
    expect(idsOf(logits, { topK: 1 })).toEqual([1]);
    expect(idsOf(logits, { topK: 3 })).toEqual([1, 3, 4]);
    expect(idsOf(logits, { topK: 99 })).toEqual([0, 1, 2, 3, 4]);
    expect(idsOf(Float32Array.of(1, 2, 2, 2, 1), { topK: 2 })).toEqual([1, 2]);
  });

  test("top-p keeps the smallest set that reaches p, and at least one", () => {
    expect(idsOf(logits, { topP: 0 })).toEqual([1]);
    expect(idsOf(logits, { topP: 0.39 })).toEqual([1]);
    expect(idsOf(logits, { topP: 0.41 })).toEqual([1, 3]);
    expect(idsOf(logits, { topP: 0.84 })).toEqual([1, 3, 4]);
    expect(idsOf(logits, { topP: 0.86 })).toEqual([0, 1, 3, 4]);
    expect(idsOf(Float32Array.of(0, 0, 0, 0), { topP: 0.5 })).toEqual([0, 1]); // exactly p is enough
  });

  test("top-p counts the probabilities after top-k, renormalised", () => {
    expect(idsOf(logits, { topK: 2, topP: 0.6 })).toEqual([1]); // 0.4 / 0.65 = 0.615
    expect(idsOf(logits, { topK: 2, topP: 0.63 })).toEqual([1, 3]);
  });

  test("min-p is relative to the largest probability", () => {
    expect(idsOf(logits, { minP: 0.49 })).toEqual([1, 3, 4]);
    expect(idsOf(logits, { minP: 0.51 })).toEqual([1, 3]);
    expect(idsOf(logits, { minP: 1 })).toEqual([1]);
    expect(idsOf(logits, { topK: 4, topP: 0.99, minP: 0.6 })).toEqual([1, 3]);
  });

  test("temperature comes before top-p and min-p", () => {
    expect(idsOf(logits, { minP: 0.51, temperature: 2 })).toEqual([1, 3, 4]); // sqrt(0.5) > 0.51
    expect(idsOf(logits, { topP: 0.41, temperature: 0.25 })).toEqual([1]);
  });

  test("probabilities are those of the softmax, renormalised over what is left", () => {
    const { ids, probabilities } = candidates(logits, [], { ...plain, topK: 3 });
    expect([...ids]).toEqual([1, 3, 4]);
    [0.4, 0.25, 0.2].forEach((p, i) => expect(probabilities[i]!).toBeCloseTo(p / 0.85, 6));
  });

  test("sets equal those of a full sort, ties included", () => {
    for (let seed = 0; seed < 200; seed++) {
      const coarse = randomLogits(60, seed).map((logit) => Math.round(logit * 2) / 2);
      const options = {
        topK: seed % 3 === 0 ? 0 : 1 + seed % 50,
        topP: seed % 2 === 0 ? 1 : uniform(seed, 999),
      };
      expect(idsOf(coarse, options)).toEqual(sortedSet(coarse, options.topK, options.topP));
    }
  });

  test("a masked token is never drawn", () => {
    expect(new Set(draw(Float32Array.of(-Infinity, 0, -Infinity, 0, -Infinity), {}, 200))).toEqual(
      new Set([1, 3]),
    );
  });
});

/** Top-k, then top-p, by sorting everything. */
function sortedSet(logits: Float32Array, topK: number, topP: number): number[] {
  const ranked = [...logits.keys()].sort((a, b) => logits[b]! - logits[a]! || a - b);
  const kept = ranked.slice(0, topK || undefined);
  const weights = kept.map((id) => Math.exp(logits[id]! - logits[kept[0]!]!));
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  let sum = 0;
  const count = topP >= 1 ? kept.length : 1 + weights.findIndex((weight) => (sum += weight) >= topP * total);
  return kept.slice(0, count).sort((a, b) => a - b);
}

describe("the draw", () => {
  test("follows the exact probabilities (chi-square, 20,000 draws)", () => {
    const logits = randomLogits(40, 3);
    for (
      const options of [{}, { temperature: 0.7 }, { topK: 12 }, { topP: 0.8 }, {
        minP: 0.2,
        temperature: 1.5,
      }]
    ) {
      const exact = candidates(logits, [], { ...plain, ...options });
      const draws = 20_000;
      const counts = new Map<number, number>();
      for (const id of draw(logits, { ...options, seed: 11 }, draws)) {
        counts.set(id, (counts.get(id) ?? 0) + 1);
      }
      let chiSquare = 0;
      exact.ids.forEach((id, i) => {
        const expected = draws * exact.probabilities[i]!;
        chiSquare += ((counts.get(id) ?? 0) - expected) ** 2 / expected;
        counts.delete(id);
      });
      expect(counts.size).toBe(0);
      const freedom = exact.ids.length - 1; // mean and half the variance of chi-square; 4 deviations above is p < 0.001
      expect(chiSquare).toBeLessThan(freedom + 4 * Math.sqrt(2 * freedom));
    }
  });

  test("is the first id whose cumulative probability exceeds uniform(seed, step)", () => {
    const logits = randomLogits(300, 4);
    const { ids, probabilities } = candidates(logits, [], { ...plain, topK: 30 });
    const expected = Array.from({ length: 200 }, (_, step) => {
      let sum = 0;
      return ids[probabilities.findIndex((p) => (sum += p) > uniform(8, step))]!;
    });
    expect(draw(logits, { topK: 30, seed: 8 }, 200)).toEqual(expected);
  });

  test("leaves the logits as they were", () => {
    const logits = randomLogits(50, 1);
    const copy = logits.slice();
    createSampler({ ...plain, topK: 5, topP: 0.5, repeatPenalty: 1.3 }).next(logits, [1, 2, 3]);
    expect(logits).toEqual(copy);
  });
});

describe("unusable logits", () => {
  test("are a DeviceError that names the first bad token", () => {
    const bad: [Float32Array, string][] = [
      [Float32Array.of(1, NaN, NaN), "The logits contain NaN (first at token id 1)"],
      [Float32Array.of(1, Infinity), "The logits contain infinity"],
      [Float32Array.of(-Infinity, -Infinity), "The logits are all -infinity"],
    ];
    for (const [logits, message] of bad) {
      for (const options of [greedy, plain, { ...plain, topK: 1 }]) {
        expect(() => createSampler(options).next(logits, [])).toThrow(message);
        expect(() => createSampler(options).next(logits, [])).toThrow(DeviceError);
      }
      expect(() => logSoftmaxTopK(logits, 1, 0)).toThrow(message);
    }
  });
});

describe("logSoftmaxTopK", () => {
  test("gives log-probabilities of one id and of the largest, in order", () => {
    const { logprob, top } = logSoftmaxTopK(logitsOf(0.1, 0.4, 0.25, 0.25), 3, 0);
    expect(logprob).toBeCloseTo(Math.log(0.1), 6);
    expect(top.map(({ id }) => id)).toEqual([1, 2, 3]);
    [0.4, 0.25, 0.25].forEach((p, i) => expect(top[i]!.logprob).toBeCloseTo(Math.log(p), 6));
  });

  test("is exact for logits far from 0, and takes any k", () => {
    expect(logSoftmaxTopK(Float32Array.of(1e30, -1e30), 0, 0)).toEqual({ logprob: 0, top: [] });
    expect(logSoftmaxTopK(Float32Array.of(5000, 5000), 9, 1).top.length).toBe(2);
    expect(logSoftmaxTopK(Float32Array.of(5000, 5000), 9, 1).logprob).toBeCloseTo(-Math.LN2, 12);
  });

  test("sums to 1 over the whole vocabulary", () => {
    const { top } = logSoftmaxTopK(randomLogits(50257, 2), 50257, 0);
    expect(top.reduce((sum, { logprob }) => sum + Math.exp(logprob), 0)).toBeCloseTo(1, 9);
  });
});
