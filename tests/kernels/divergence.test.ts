import { afterAll, describe, expect, test } from "bun:test";
import {
  DIVERGENCE_BYTES,
  divergenceCandidates,
  type DivergenceProblem,
  type Divergences,
  unpackDivergence,
} from "../../src/kernels/divergence/divergence.ts";
import { divergenceReference } from "../../src/kernels/divergence/reference.ts";
import { nllCandidates } from "../../src/kernels/nll/nll.ts";
import { GRID_FOLD } from "../../src/kernels/shared/shared.ts";
import type { Op } from "../../src/runtime/kernel.ts";
import { expectClose, expectSame, expectTenIdenticalRuns, reportErrors } from "../support/compare.ts";
import {
  poison,
  rounded,
  runnable,
  runOp,
  runSteps,
  step,
  type Tensor,
  tensor,
  testDevice,
  thenNan,
  titleOf,
} from "../support/device.ts";
import { normalArray, uniformArray } from "../support/random.ts";

const gpu = await testDevice();

interface Case {
  readonly rows: number;
  readonly vocab: number;
  readonly logits: Float32Array;
  readonly other: Float32Array;
  readonly targets: Uint32Array;
}

/** Logits around `mean`, and others that are `distance` off: both normally distributed. */
function randomCase(rows: number, vocab: number, { mean = 0, deviation = 4, distance = 0.5 } = {}): Case {
  const logits = normalArray(1, rows * vocab, mean, deviation);
  const noise = normalArray(3, rows * vocab, 0, distance);
  return {
    rows,
    vocab,
    logits: rounded(logits, "f32"),
    other: rounded(logits.map((x, i) => x + noise[i]!), "f32"),
    targets: Uint32Array.from(uniformArray(2, rows, 0, vocab)),
  };
}

/** One pair of rows, compared once for each of the targets. */
function sameRows(logits: ArrayLike<number>, other: ArrayLike<number>, targets: readonly number[]): Case {
  const vocab = logits.length;
  const repeated = (row: ArrayLike<number>) =>
    Float32Array.from({ length: targets.length * vocab }, (_, i) => row[i % vocab]!);
  return {
    rows: targets.length,
    vocab,
    logits: repeated(logits),
    other: repeated(other),
    targets: Uint32Array.from(targets),
  };
}

/** A row of `value` but for some tokens. */
function rowWith(vocab: number, value: number, exceptions: Readonly<Record<number, number>>): Float32Array {
  const row = new Float32Array(vocab).fill(value);
  for (const [token, logit] of Object.entries(exceptions)) row[Number(token)] = logit;
  return row;
}

/** The textbook's two passes over a row in f32: maximum and running sum, then differences. */
function plainLogProbabilities(logits: Float32Array): Float32Array {
  const { fround } = Math;
  const max = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  let sum = 0;
  for (const x of logits) sum = fround(sum + fround(Math.exp(fround(x - max))));
  const logSum = fround(Math.log(sum));
  return logits.map((x) => fround(fround(x - max) - logSum));
}

interface Judged {
  readonly nll: Float32Array;
  readonly otherNll: Float32Array;
  readonly kl: Float32Array;
  /**
   * For each row Σ p |log p - log q| (1 + |log p|) + |q - p| (1 + |log q|): a log-probability moves its term by
   * its own rounding, which is in proportion to it, times the term's derivative. The 1 is the rounding of p
   * and q.
   */
  readonly klMagnitude: Float64Array;
  /** The same of its two likelihoods, as for the kernel `nll`. */
  readonly nllMagnitude: Float64Array;
}

/** f32 log-probabilities and one running f32 sum of the terms that are not negative. */
function plainDivergence({ rows, vocab, logits, other, targets }: Case): Judged {
  const { fround } = Math;
  const column = () => new Float32Array(rows);
  const nll = column();
  const otherNll = column();
  const kl = column();
  const klMagnitude = new Float64Array(rows);
  const nllMagnitude = new Float64Array(rows);
  for (let row = 0; row < rows; row++) {
    const logP = plainLogProbabilities(logits.subarray(row * vocab, (row + 1) * vocab));
    const logQ = plainLogProbabilities(other.subarray(row * vocab, (row + 1) * vocab));
    for (let i = 0; i < vocab; i++) {
      const p = fround(Math.exp(logP[i]!));
      const q = fround(Math.exp(logQ[i]!));
      const d = p === 0 ? 0 : fround(logP[i]! - logQ[i]!);
      const term = Math.abs(d) <= 1 && p !== 0 ? p * (d + Math.expm1(-d)) : p * d + (q - p);
      kl[row] = kl[row]! + fround(term);
      if (p > 0) klMagnitude[row]! += p * Math.abs(d) * (1 - logP[i]!);
      if (q > 0) klMagnitude[row]! += Math.abs(q - p) * (1 - logQ[i]!);
    }
    const target = targets[row]!;
    nll[row] = -logP[target]!;
    otherNll[row] = -logQ[target]!;
    nllMagnitude[row] = 1 + Math.log(vocab) + Math.max(nll[row]!, otherNll[row]!);
  }
  return { nll, otherNll, kl, klMagnitude, nllMagnitude };
}

/**
 * The rows in pieces that end at `cuts`, each with logits of its own; targets and results lie behind `before`.
 * @returns the entries of `results`, of which the last field is a u32
 */
async function runRaw(
  candidate: Op<DivergenceProblem>,
  c: Case,
  cuts: readonly number[] = [],
  before = 0,
): Promise<Float32Array> {
  const { rows, vocab, logits, other, targets } = c;
  const fields = DIVERGENCE_BYTES / 4;
  const edges = [0, ...cuts, rows];
  const tensors: Record<string, Tensor> = {
    targets: tensor("u32", [...new Array<number>(before).fill(vocab), ...targets, vocab]),
    results: poison("f32", fields * (before + rows + 1)),
  };
  const steps = edges.slice(1).map((end, i) => {
    const first = edges[i]!;
    tensors[`logits_${i}`] = tensor("f32", thenNan(logits.subarray(first * vocab, end * vocab), 2 * vocab));
    tensors[`other_${i}`] = tensor("f32", thenNan(other.subarray(first * vocab, end * vocab), 2 * vocab));
    const problem = { rows: end - first, vocab, firstRow: before + first };
    return step(candidate, problem, { logits: `logits_${i}`, other: `other_${i}` });
  });
  const all = (await runSteps(gpu, steps, tensors, ["results"])).results;
  const around = [...all.subarray(0, fields * before), ...all.subarray(fields * (before + rows))];
  expectSame(around, new Array<number>(fields * (before + 1)).fill(NaN));
  return all.slice(fields * before, fields * (before + rows));
}

async function runDivergence(
  candidate: Op<DivergenceProblem>,
  c: Case,
  cuts: readonly number[] = [],
  before = 0,
): Promise<Divergences> {
  const raw = await runRaw(candidate, c, cuts, before);
  return unpackDivergence(raw.buffer as ArrayBuffer, c.rows);
}

async function checkDivergence(
  candidate: Op<DivergenceProblem>,
  c: Case,
  cuts: readonly number[] = [],
  before = 0,
): Promise<void> {
  const got = await runDivergence(candidate, c, cuts, before);
  const wanted = divergenceReference(c.logits, c.other, c.targets, c.vocab);
  const plain = plainDivergence(c);
  const magnitudes = { nll: plain.nllMagnitude, otherNll: plain.nllMagnitude, kl: plain.klMagnitude };
  for (const column of ["nll", "otherNll", "kl"] as const) {
    expectClose(got[column], wanted[column], plain[column], {
      kernel: `divergence ${column}`,
      elem: "f32",
      stored: "f32",
      magnitude: (row) => magnitudes[column][row]!,
      rowLength: 1,
    });
  }
  expectSame(got.agrees, wanted.agrees);
  expect(got.kl.every((kl) => kl >= 0)).toBe(true);
}

interface Wanted {
  readonly nll: readonly number[];
  readonly otherNll: readonly number[];
  readonly kl: readonly number[];
  readonly agrees: readonly number[];
}

function expectColumns(got: Divergences, wanted: Wanted): void {
  for (const column of ["nll", "otherNll", "kl", "agrees"] as const) expectSame(got[column], wanted[column]);
}

describe("divergence", () => {
  afterAll(reportErrors);
  const forSoftware = divergenceCandidates(false);
  for (const candidate of runnable(gpu, [...divergenceCandidates(true), ...forSoftware])) {
    const title = titleOf(candidate);
    // SwiftShader takes milliseconds for each row with the variant that is not made for it.
    const isSlow = gpu.caps.isSoftware && !forSoftware.includes(candidate);

    for (const vocab of [1, 2, 7, 8, 63, 64, 65, 101, 257, 1025, 2047, 2048, 2049, 8192, 50257]) {
      test(`${title} vocab=${vocab} matches the f64 reference`, async () => {
        for (const rows of [1, 3]) await checkDivergence(candidate, randomCase(rows, vocab));
      });
    }
    for (const rows of [64, 65, 257]) {
      test(`${title} rows=${rows} matches the f64 reference`, () =>
        checkDivergence(candidate, randomCase(rows, 101)));
    }
    for (const rows of isSlow ? [] : [GRID_FOLD, GRID_FOLD + 1, 2 * GRID_FOLD + 1]) {
      test(`${title} rows=${rows} matches the f64 reference, over a folded grid`, () =>
        checkDivergence(candidate, randomCase(rows, 3)));
    }
    test(`${title} pieces of rows land where they belong, what lies around them stays`, async () => {
      await checkDivergence(candidate, randomCase(65, 101), [], 7);
      await checkDivergence(candidate, randomCase(65, 101), [1, 33], 7);
    });

    test(`${title} close distributions match the f64 reference, however small their divergence`, async () => {
      for (const distance of [1e-1, 1e-2, 1e-3, 1e-4, 1e-5]) {
        for (const deviation of [0, 1, 4]) {
          await checkDivergence(candidate, randomCase(9, 8192, { deviation, distance }));
        }
      }
    });
    test(`${title} distant distributions match the f64 reference`, async () => {
      for (const distance of [1, 2, 5, 20, 100, 1e4, 1e30]) {
        await checkDivergence(candidate, randomCase(9, 1025, { distance }));
      }
    });
    test(`${title} large logits match the f64 reference`, async () => {
      for (const mean of [1e4, -1e4, 1e30]) {
        for (const distance of [1e-2, 1]) {
          await checkDivergence(candidate, randomCase(9, 1025, { mean, distance }));
        }
      }
    });
    test(`${title} a constant added to all logits changes nothing but rounding`, async () => {
      const { logits, ...c } = randomCase(9, 1025);
      const other = logits.map((x) => x + 1000);
      await checkDivergence(candidate, { ...c, logits, other });
    });
    test(`${title} ratios of every size match the f64 reference, also where the series ends`, async () => {
      const ratios = [1e-3, 0.1, 0.5, 0.999, 1, 1.001, 1.5, 2, 3, 10, 50, 90, 120].flatMap((x) => [x, -x]);
      const logits = Float32Array.from(ratios.flatMap(() => [0, 0]));
      const other = Float32Array.from(ratios.flatMap((x) => [0, x]));
      const targets = Uint32Array.from(ratios, (_, i) => i % 2);
      const c = { rows: ratios.length, vocab: 2, logits, other, targets };
      await checkDivergence(candidate, c);
      await checkDivergence(candidate, { ...c, logits: other, other: logits });
    });
    test(`${title} equal logits have a divergence of 0, agree, and give the same likelihood`, async () => {
      for (const vocab of [1, 65, 2049, 50257]) {
        for (const deviation of [0, 4, 1e4]) {
          const c = randomCase(5, vocab, { deviation });
          const got = await runDivergence(candidate, { ...c, other: c.logits });
          expectColumns(got, {
            nll: [...got.nll],
            otherNll: [...got.nll],
            kl: new Array<number>(5).fill(0),
            agrees: new Array<number>(5).fill(1),
          });
        }
      }
    });
    test(`${title} likelihoods have the bits that the kernel nll gives`, async () => {
      const nllOp = runnable(gpu, [...nllCandidates(true), ...nllCandidates(false)])
        .find(({ variant }) => titleOf({ kernel: candidate.kernel, variant }) === title)!;
      for (const vocab of [1, 65, 2049, 50257]) {
        const c = randomCase(5, vocab);
        const { nll, otherNll } = await runDivergence(candidate, c);
        for (const [got, logits] of [[nll, c.logits], [otherNll, c.other]] as const) {
          const alone = await runOp(gpu, nllOp, { rows: 5, vocab, firstRow: 0 }, {
            logits: tensor("f32", logits),
            targets: tensor("u32", c.targets),
            nll: poison("f32", 5),
          });
          expectSame(got, alone.nll!);
        }
      }
    });

    test(`${title} the largest logits agree or not, wherever they are`, async () => {
      const vocab = 4103;
      const places = [0, 1, 63, 64, 255, 256, 2047, 2048, 4095, 4096, 4102];
      const pairs = places.flatMap((a) => places.map((b) => [a, b] as const));
      const logits = new Float32Array(pairs.length * vocab);
      const other = new Float32Array(pairs.length * vocab);
      pairs.forEach(([a, b], row) => {
        logits[row * vocab + a] = 30;
        other[row * vocab + b] = 20;
      });
      const targets = Uint32Array.from(pairs, ([a]) => a);
      await checkDivergence(candidate, { rows: pairs.length, vocab, logits, other, targets });
    });
    test(`${title} of equally large logits the lowest token counts`, async () => {
      for (const vocab of [7, 101, 5000]) {
        const last = vocab - 1;
        for (
          const [a, b, agrees] of [
            [{ 2: 5, 5: 5 }, { 2: 5 }, 1],
            [{ 2: 5, 5: 5 }, { 5: 5 }, 0],
            [{ 2: 5, [last]: 5 }, { 2: 7, 3: 7 }, 1],
            [{ 1: 5, [last]: 5 }, { 2: 7, [last]: 7 }, 0],
            [{}, {}, 1],
            [{}, { 0: 1 }, 1],
            [{}, { 1: 1 }, 0],
            [{ [last]: 1 }, {}, 0],
          ] as const
        ) {
          const c = sameRows(rowWith(vocab, 0, a), rowWith(vocab, 0, b), [0, last]);
          expectSame((await runDivergence(candidate, c)).agrees, [agrees, agrees]);
          await checkDivergence(candidate, c);
        }
      }
    });
    test(`${title} the largest floats do not overflow`, async () => {
      const largest = 2 ** 127 * (2 - 2 ** -23);
      for (const vocab of [1, 101, 5000]) {
        for (const value of [3e38, -3e38, largest, -largest]) {
          const row = new Float32Array(vocab).fill(value);
          const opposite = row.map((x) => -x);
          await checkDivergence(candidate, sameRows(row, opposite, [0, vocab - 1]));
        }
      }
      const row = rowWith(5000, -largest, { 4321: largest });
      const equal = await runDivergence(candidate, sameRows(row, row, [4321, 0]));
      expectColumns(equal, { nll: [0, Infinity], otherNll: [0, Infinity], kl: [0, 0], agrees: [1, 1] });
      const elsewhere = rowWith(5000, -largest, { 17: 0 });
      const different = await runDivergence(candidate, sameRows(row, elsewhere, [4321, 17]));
      expectColumns(different, {
        nll: [0, Infinity],
        otherNll: [largest, 0],
        kl: [largest, largest],
        agrees: [0, 0],
      });
    });

    test(`${title} what P excludes counts for nothing, what only Q excludes is infinitely far`, async () => {
      for (const vocab of [3, 101, 5000]) {
        const logits = rounded(normalArray(3, vocab, 0, 4), "f32");
        const some = logits.map((x, i) => i % 3 === 1 ? -Infinity : x);
        await checkDivergence(candidate, sameRows(some, logits, [0]));
        await checkDivergence(candidate, sameRows(some, some, [0]));
        const excluded = await runDivergence(candidate, sameRows(logits, some, [0, 1]));
        expectSame(excluded.kl, [Infinity, Infinity]);
        expect(excluded.nll[0]).toBeFinite();
        expect(excluded.otherNll[0]).toBeFinite();
        expect(excluded.otherNll[1]).toBe(Infinity);

        const one = rowWith(vocab, -Infinity, { [vocab >> 1]: -2.5 });
        const certain = await runDivergence(candidate, sameRows(one, one, [vocab >> 1, 0]));
        expectColumns(certain, { nll: [0, Infinity], otherNll: [0, Infinity], kl: [0, 0], agrees: [1, 1] });
        const two = rowWith(vocab, -Infinity, { 0: 1 });
        const disjoint = await runDivergence(candidate, sameRows(one, two, [vocab >> 1, 0]));
        expectColumns(disjoint, {
          nll: [0, Infinity],
          otherNll: [Infinity, 0],
          kl: [Infinity, Infinity],
          agrees: [0, 0],
        });
      }
    });
    test(`${title} a NaN anywhere in a row makes that row's results NaN, and no other's`, async () => {
      for (const vocab of [3, 101, 5000]) {
        const c = randomCase(9, vocab);
        const clean = await runDivergence(candidate, c);
        const spoilt = (column: ArrayLike<number>, value: number) =>
          Array.from(column, (x, row) => row % 4 === 0 ? value : x);
        for (const at of [0, 1, vocab >> 1, vocab - 1]) {
          for (const which of ["logits", "other"] as const) {
            const values = c[which].slice();
            for (const row of [0, 4, 8]) values[row * vocab + at] = NaN;
            expectColumns(await runDivergence(candidate, { ...c, [which]: values }), {
              nll: which === "logits" ? spoilt(clean.nll, NaN) : [...clean.nll],
              otherNll: which === "other" ? spoilt(clean.otherNll, NaN) : [...clean.otherNll],
              kl: spoilt(clean.kl, NaN),
              agrees: spoilt(clean.agrees, 0),
            });
          }
        }
      }
    });
    test(`${title} a row with +inf, or of nothing but -inf, gives nothing finite`, async () => {
      for (const vocab of [3, 101, 5000]) {
        const good = rounded(normalArray(4, vocab), "f32");
        const broken = [0, vocab >> 1, vocab - 1].map((at) => {
          const row = good.slice();
          row[at] = Infinity;
          return row;
        });
        const targets = [0, vocab >> 1, vocab - 1];
        for (const bad of [...broken, new Float32Array(vocab).fill(-Infinity)]) {
          for (const [logits, other] of [[bad, good], [good, bad], [bad, bad]] as const) {
            const got = await runDivergence(candidate, sameRows(logits, other, targets));
            for (const kl of got.kl) expect(kl).not.toBeFinite();
            if (logits === bad) { for (const nll of got.nll) expect(nll).not.toBeFinite(); }
            if (other === bad) { for (const nll of got.otherNll) expect(nll).not.toBeFinite(); }
            expectSame(got.agrees, [0, 0, 0]);
          }
        }
      }
    });
    test(`${title} a target that is no token reads nothing outside its row`, async () => {
      const c = randomCase(3, 101);
      const last = await runRaw(candidate, { ...c, targets: new Uint32Array(3).fill(100) });
      const beyond = Uint32Array.of(101, 2 ** 31, 2 ** 32 - 1);
      expectSame(await runRaw(candidate, { ...c, targets: beyond }), last);
    });
    test(`${title}: ten runs are bit-identical`, () => {
      const c = randomCase(9, 50257);
      return expectTenIdenticalRuns(() => runRaw(candidate, c));
    });
  }
});

describe("unpackDivergence", () => {
  test("reads the entries by column, and no more than there are", () => {
    const bytes = new ArrayBuffer(3 * DIVERGENCE_BYTES);
    const view = new DataView(bytes);
    for (let row = 0; row < 3; row++) {
      [0.5, 1.5, 2.5].forEach((x, i) => view.setFloat32(DIVERGENCE_BYTES * row + 4 * i, x + 10 * row, true));
      view.setUint32(DIVERGENCE_BYTES * row + 12, row % 2, true);
    }
    expectColumns(unpackDivergence(bytes, 2), {
      nll: [0.5, 10.5],
      otherNll: [1.5, 11.5],
      kl: [2.5, 12.5],
      agrees: [0, 1],
    });
    expect(unpackDivergence(bytes, 0).kl.length).toBe(0);
    expect(() => unpackDivergence(bytes, 4)).toThrow(RangeError);
  });
});
