import { describe, expect, test } from "bun:test";
import {
  drawReference,
  type Filters,
  greedyReference,
  keptReference,
  type KeptToken,
  penalisedReference,
} from "../../src/kernels/sampling/reference.ts";
import philoxText from "../../src/kernels/sampling/philox.wgsl" with { type: "text" };
import {
  draw,
  drawCandidates,
  greedy,
  logprobs,
  logprobsBytes,
  packPlaces,
  packSeen,
  type Result,
  RESULT_BYTES,
  type SamplingVariant,
  seenBytes,
  unpackLogprobs,
  unpackResult,
} from "../../src/kernels/sampling/sampling.ts";
import { packSequence, sequenceStruct, tripsHelper, unrollConst } from "../../src/kernels/shared/shared.ts";
import {
  candidates,
  createSampler,
  logSoftmaxTopK,
  philox4x32,
  type SamplingOptions,
  uniform,
} from "../../src/model/sampling.ts";
import { firstSupported, type Kernel, op } from "../../src/runtime/kernel.ts";
import { expectClose, expectTenIdenticalRuns } from "../support/compare.ts";
import { runnable, runOp, runSteps, step, tensor, testDevice, thenNan, titleOf } from "../support/device.ts";
import { normalArray, uniformArray } from "../support/random.ts";

const gpu = await testDevice();

const NO_FILTERS: Filters = { temperature: 1, topK: 0, topP: 1, minP: 0, repeatPenalty: 1 };
const GREEDY: Filters = { ...NO_FILTERS, temperature: 0 };

/** The kernels of one variant. */
interface Sampler {
  readonly title: string;
  readonly variant: SamplingVariant;
}

/**
 * The variants that are tested: all that the device runs. Software Vulkan takes most of a minute to compile an unrolled
 * one, so there one that shares its work in the same way stands for them.
 */
const VARIANTS = [...drawCandidates(true), ...drawCandidates(false)]
  .map(({ variant }) => variant as SamplingVariant)
  .map((variant) => gpu.caps.isSoftware && variant.unroll ? { lanes: 256, loads: 2, unroll: false } : variant)
  .filter((variant, i, all) =>
    all.findIndex((other) => titleOf(op(draw, other)) === titleOf(op(draw, variant))) === i
  );

const SAMPLERS = runnable(gpu, VARIANTS.map((variant) => op(draw, variant))).map((o): Sampler => ({
  title: titleOf(o),
  variant: o.variant as SamplingVariant,
}));

const PREFERRED = titleOf(firstSupported(drawCandidates(!gpu.caps.isSoftware), gpu.caps));

/** One sequence: a row of logits that stays the same in all steps. */
interface Row {
  readonly logits: Float32Array;
  readonly seed: number;
  /** Steps that it has behind it. */
  readonly step?: number;
  readonly length?: number;
  readonly seen?: readonly number[];
}

interface Run {
  /** For each step the tokens of all rows. */
  readonly drawn: readonly (readonly Result[])[];
  readonly seen: Uint32Array;
  readonly sequences: Uint32Array;
  readonly tokens: Uint32Array;
}

interface RunOptions {
  readonly firstSequence?: number;
  readonly capacity?: number;
}

/** What a word is before a kernel writes it. */
const UNWRITTEN = 0xabababab;

function placeOf(position: number) {
  return { place: 3 * position + 1, weight: position % 4 / 4 };
}

/** `Float32Array` is how tests read buffers; the words are those of the buffer. */
function wordsOf(data: Float32Array): Uint32Array {
  return new Uint32Array(data.buffer, data.byteOffset, data.length);
}

/** Draws a token of every row with each of the filters, one step after the other. */
async function run(
  sampler: Sampler,
  rows: readonly Row[],
  steps: readonly Filters[],
  { firstSequence = 0, capacity = 64 }: RunOptions = {},
): Promise<Run> {
  const vocab = rows[0]!.logits.length;
  const sequences = firstSequence + rows.length;
  const before = <T>(count: number, value: T) => new Array<T>(count * firstSequence).fill(value);
  const logits = rows.flatMap((row) => [...row.logits]);
  const places = packPlaces(Array.from({ length: capacity }, (_, p) => placeOf(p)));
  const tensors = {
    logits: tensor("f32", thenNan(logits, 1000)),
    seen: tensor("u32", [
      ...before(seenBytes(vocab) / 4, UNWRITTEN),
      ...rows.flatMap(({ seen }) => [...packSeen(seen ?? [], vocab)]),
    ]),
    sequences: tensor("u32", [
      ...before(4, UNWRITTEN),
      ...rows.flatMap(({ length, step, seed }) => [
        ...packSequence({ length: length ?? 0, step: step ?? 0, seed }),
      ]),
    ]),
    places: tensor("u32", new Uint32Array(places.buffer)),
    tokens: tensor("u32", new Array<number>(3 * sequences).fill(UNWRITTEN)),
    results: tensor("u32", new Array<number>(RESULT_BYTES / 4 * sequences * steps.length).fill(UNWRITTEN)),
  };
  const dispatches = steps.map((filters, slot) => {
    const problem = { ...filters, vocab, sequences, firstSequence, rows: rows.length, slot, capacity };
    return step(op(filters.temperature === 0 ? greedy : draw, sampler.variant), problem);
  });
  const out = await runSteps(gpu, dispatches, tensors, ["results", "seen", "sequences", "tokens"]);
  const words = {
    seen: wordsOf(out.seen),
    sequences: wordsOf(out.sequences),
    tokens: wordsOf(out.tokens),
    results: wordsOf(out.results),
  };
  // Sequences that the dispatch is not about stay as they are.
  for (const name of ["seen", "sequences", "tokens"] as const) {
    const count = words[name].length / sequences * firstSequence;
    expect(words[name].subarray(0, count).every((word) => word === UNWRITTEN)).toBe(true);
  }
  const resultAt = (slot: number, sequence: number): Result =>
    unpackResult(
      new DataView(out.results.buffer, RESULT_BYTES * (slot * sequences + sequence), RESULT_BYTES),
    );
  const drawn = steps.map((_, slot) => {
    const skipped = words.results.subarray(3 * slot * sequences, 3 * (slot * sequences + firstSequence));
    expect(skipped.every((word) => word === UNWRITTEN)).toBe(true);
    return rows.map((_, row) => resultAt(slot, firstSequence + row));
  });
  return { drawn, ...words };
}

/** Sorting a large vocabulary takes longer than all the kernels: what a row's scores leave is found once. */
const keptOf = new Map<string, KeptToken[]>();
const numberOf = new Map<Float32Array, number>();

function cachedKept(logits: Float32Array, seen: ReadonlySet<number>, filters: Filters): KeptToken[] {
  if (!numberOf.has(logits)) numberOf.set(logits, numberOf.size);
  const recent = filters.repeatPenalty === 1 ? [] : [...seen];
  const key = JSON.stringify([numberOf.get(logits), recent, filters]);
  let kept = keptOf.get(key);
  if (!kept) {
    const scores = penalisedReference(logits, new Set(recent), filters.repeatPenalty);
    kept = keptReference(scores, filters);
    keptOf.set(key, kept);
  }
  return kept;
}

/**
 * How far a cumulative weight may be off, in parts of the total. WGSL lets exp be off by 3 + 2|x| units in the last
 * place; x = (score - largest) · (1 / temperature) has three roundings of its own, and with a penalty the score has two.
 * A sum of n terms is off by (n - 1) · 2^-24 (Higham 2002, section 4.2): here n is a lane's tokens, then the lanes of a
 * group, then the groups. It is summed twice, for the total and along the way to the token.
 */
function slackOf(kept: readonly KeptToken[], filters: Filters, vocab: number, lanes: number): number {
  const largest = kept.reduce((max, { score }) => Math.max(max, score), -Infinity);
  let total = 0;
  let error = 0;
  for (const { weight, score } of kept) {
    if (weight === 0) continue;
    const x = (largest - score) / filters.temperature;
    const penalty = filters.repeatPenalty === 1 ? 0 : 2 * Math.abs(score) / filters.temperature;
    total += weight;
    error += weight * (3 + 2 * x + 3 * x / 2 + penalty) * 2 ** -23;
  }
  return 2 * error / total + 2 * (Math.ceil(vocab / lanes) + 32 + lanes / 32) * 2 ** -24;
}

/** Whether `u` is in the part of all weights that belongs to `id`, or as near to it as rounding may decide. */
function isDrawnBy(kept: readonly KeptToken[], u: number, id: number, slack: number): boolean {
  let before = 0;
  let own = 0;
  let total = 0;
  for (const token of kept) {
    if (token.id < id) before += token.weight;
    if (token.id === id) own = token.weight;
    total += token.weight;
  }
  return own > 0 && before / total - slack <= u && u < (before + own) / total + slack;
}

/** Tokens that are not those of f64, and all that were compared. */
interface Tally {
  differing: number;
  drawn: number;
}

/** Compares a run with the reference, and counts the tokens that rounding accounts for. */
function expectDraws(
  sampler: Sampler,
  rows: readonly Row[],
  steps: readonly Filters[],
  { drawn }: Run,
  tally: Tally = { differing: 0, drawn: 0 },
): void {
  rows.forEach(({ logits, seed, step = 0, seen: given = [] }, row) => {
    const seen = new Set(given);
    steps.forEach((filters, slot) => {
      const { id, problem, at } = drawn[slot]![row]!;
      const where = `row ${row}, step ${slot}, ${JSON.stringify(filters)}`;
      expect([where, problem, at]).toEqual([where, undefined, 0]);
      tally.drawn++;
      if (filters.temperature === 0) {
        const scores = penalisedReference(logits, seen, filters.repeatPenalty);
        expect([where, id]).toEqual([where, greedyReference(scores)]);
      } else {
        const u = uniform(seed, step + slot);
        const kept = cachedKept(logits, seen, filters);
        const wanted = drawReference(kept, u);
        if (id !== wanted) {
          tally.differing++;
          const isAllowed = [logits, flushed(logits)].some((some) =>
            isWithinRounding(some, seen, filters, u, id, sampler.variant.lanes)
          );
          if (!isAllowed) {
            throw new Error(
              `${where}: drew ${id}, wanted ${wanted} (u = ${u}, ${kept.length} tokens are left)`,
            );
          }
        }
      }
      seen.add(id);
    });
  });
}

const flushedRows = new WeakMap<Float32Array, Float32Array>();

/** The logits of a device that takes numbers below 2^-126 for 0, as WGSL allows: they are equal then. */
function flushed(logits: Float32Array): Float32Array {
  let row = flushedRows.get(logits);
  if (!row) flushedRows.set(logits, row = logits.map((x) => Math.abs(x) < 2 ** -126 ? 0 : x));
  return row;
}

/** Whether u, or the end of top-p or min-p, is so near to a border that rounding decides. */
function isWithinRounding(
  logits: Float32Array,
  seen: ReadonlySet<number>,
  filters: Filters,
  u: number,
  id: number,
  lanes: number,
): boolean {
  const vocab = logits.length;
  const unfiltered = cachedKept(logits, seen, { ...filters, topP: 1, minP: 0 });
  const ofSums = slackOf(unfiltered, filters, vocab, lanes);
  const ofScores = 4 * (1 + Math.abs(Math.log(filters.minP || 1))) * 2 ** -24;
  for (const p of [1, 1 - ofSums, 1 + ofSums]) {
    for (const m of [1, 1 - ofScores, 1 + ofScores]) {
      const near = { ...filters, topP: Math.min(1, p * filters.topP), minP: Math.min(1, m * filters.minP) };
      const kept = cachedKept(logits, seen, near);
      if (isDrawnBy(kept, u, id, slackOf(kept, near, vocab, lanes))) return true;
    }
  }
  return false;
}

async function checkDraws(
  sampler: Sampler,
  rows: readonly Row[],
  steps: readonly Filters[],
  tally?: Tally,
): Promise<void> {
  expectDraws(sampler, rows, steps, await run(sampler, rows, steps), tally);
}

function filtersOf(...all: Partial<Filters>[]): Filters[] {
  return all.map((filters) => ({ ...NO_FILTERS, ...filters }));
}

function stepsFor(vocab: number): Filters[] {
  return filtersOf(
    {},
    { temperature: 0 },
    { temperature: 0.1 },
    { temperature: 0.7 },
    { temperature: 2.5 },
    { temperature: 1e-30 },
    { temperature: 1e30 },
    ...[1, 2, 40, 255, 256, 257, vocab - 1, vocab, vocab + 7].map((topK) => ({ topK })),
    { topK: 300, temperature: 20 },
    ...[0, 1e-9, 0.1, 0.5, 0.95, 0.9999].map((topP) => ({ topP })),
    { topP: 1 - 2 ** -24 },
    { topP: 1 - 2 ** -24, temperature: 20 },
    { topP: 0.5, temperature: 20 },
    { topP: 0.95, temperature: 3 },
    ...[0.01, 0.5, 1].map((minP) => ({ minP })),
    { topK: 40, topP: 0.95 },
    { topK: 40, topP: 0.5, temperature: 2 },
    { topK: 1000, topP: 0.9, temperature: 5 },
    { topK: 40, minP: 0.05, temperature: 1.5 },
    { topP: 0.9, minP: 0.1 },
    { topK: 100, topP: 0.9, minP: 0.02, temperature: 0.8 },
    { repeatPenalty: 1.3, temperature: 0 },
    { repeatPenalty: 1.3 },
    { repeatPenalty: 0.8, topK: 20 },
    { repeatPenalty: 2, topK: 40, topP: 0.9, minP: 0.01, temperature: 1.2 },
  );
}

function randomRows(vocab: number, count: number, deviation = 3): Row[] {
  return Array.from({ length: count }, (_, row): Row => {
    const ids = uniformArray(70 + row, Math.min(vocab, 40), 0, vocab);
    return {
      logits: Float32Array.from(normalArray(10 * vocab + row, vocab, -20, deviation)),
      seed: [5 + row, -1 - row, 2 ** 40 + row][row % 3]!,
      step: 100 * row,
      seen: row % 2 === 0 ? [] : [0, vocab - 1, ...ids].map(Math.floor),
    };
  });
}

describe("the reference", () => {
  test("draws what the sampler of the host does", () => {
    for (let seed = 0; seed < 50; seed++) {
      // Steps of 1/4: many scores are equal.
      const logits = Float32Array.from(normalArray(seed, 200), (x) => Math.round(4 * x) / 4);
      const seen = new Set(Array.from(uniformArray(seed, 30, 0, 200), Math.floor));
      stepsFor(200).forEach((filters) => {
        const { ids, probabilities } = candidates(logits, [...seen], filters);
        const sampler = createSampler({ ...filters, seed });
        const scores = penalisedReference(logits, seen, filters.repeatPenalty);
        if (filters.temperature === 0) {
          expect(sampler.next(logits, [...seen])).toBe(greedyReference(scores));
          return;
        }
        const kept = keptReference(scores, filters).filter(({ weight }) => weight > 0);
        expect(kept.map(({ id }) => id)).toEqual([...ids]);
        const total = kept.reduce((sum, { weight }) => sum + weight, 0);
        kept.forEach(({ weight }, i) => expect(weight / total).toBeCloseTo(probabilities[i]!, 12));
        expect(sampler.next(logits, [...seen])).toBe(drawReference(kept, uniform(seed, 0)));
      });
    }
  });
});

describe("random numbers", () => {
  /** Word 0 and uniform number for each step and key: `[n, 3]` in, `[n, 2]` out. */
  const words: Kernel<{ unroll: boolean }, { n: number }> = {
    name: "philox",
    sources: [
      {
        file: "test.wgsl",
        text: "@group(0) @binding(0) var<storage, read> steps: array<u32>;\n" +
          "@group(0) @binding(1) var<storage, read_write> words: array<u32>;\n" +
          "@compute @workgroup_size(1) fn main(@builtin(workgroup_id) workgroup: vec3u) {\n" +
          "    let i = 3u * workgroup.x;\n" +
          "    let key = vec2u(steps[i + 1u], steps[i + 2u]);\n" +
          "    words[2u * workgroup.x] = philox(steps[i], key);\n" +
          "    let u = uniform_number(Sequence(0u, steps[i], key.x, key.y));\n" +
          "    words[2u * workgroup.x + 1u] = bitcast<u32>(u);\n" +
          "}\n",
      },
      { file: "sampling/philox.wgsl", text: philoxText },
      sequenceStruct,
      tripsHelper,
    ],
    bindings: { steps: "read", words: "read_write" },
    params: { one: "u32" },
    header: (v) => ({ aliases: {}, consts: unrollConst(v.unroll) }),
    workgroupBytes: () => 0,
    workgroupInvocations: () => 1,
    values: () => ({ one: 1 }),
    grid: (_, p) => [p.n, 1, 1],
    work: () => ({ bytes: 0, flops: 0 }),
  };

  test("are those of the paper's authors and of the host, whatever step and seed", async () => {
    const seeds = [0, 1, 2 ** 32, 2 ** 53 - 1, -1, 77];
    const cases = seeds.flatMap((seed) =>
      [0, 1, 2, 1000, 0x7fffffff, 0xffffffff, ...uniformArray(5, 20, 0, 2 ** 32)].map((step) =>
        [seed, Math.floor(step)] as const
      )
    );
    const steps = cases.flatMap(([seed, step]) => {
      const [, , low, high] = packSequence({ length: 0, step, seed });
      return [step, low!, high!];
    });
    for (const unroll of [false, true]) {
      const tensors = {
        steps: tensor("u32", steps),
        words: tensor("u32", new Uint32Array(2 * cases.length)),
      };
      const out = await runOp(gpu, op(words, { unroll }), { n: cases.length }, tensors);
      const got = wordsOf(out.words!);
      expect(got[0]).toBe(0x6627e8d5);
      cases.forEach(([seed, step], i) => {
        const [, , low, high] = packSequence({ length: 0, step, seed });
        expect(got[2 * i]).toBe(philox4x32([step, 0, 0, 0], [low!, high!])[0]);
        expect(new Float32Array(got.buffer, got.byteOffset)[2 * i + 1]).toBe(uniform(seed, step));
      });
    }
  });
});

/** Rows whose tokens are all equally likely: sums are whole numbers, so exact. */
function equalRows(vocab: number, value: number, seeds: readonly number[]): Row[] {
  const logits = new Float32Array(vocab).fill(value);
  return seeds.map((seed) => ({ logits, seed }));
}

for (const sampler of SAMPLERS) {
  describe(sampler.title, () => {
    const tally: Tally = { differing: 0, drawn: 0 };
    for (const vocab of [1, 2, 31, 33, 64, 65, 257, 1000, 1025, 8192]) {
      test(`vocab=${vocab} draws what the reference does`, () =>
        checkDraws(sampler, randomRows(vocab, 4), stepsFor(vocab), tally));
    }
    test("vocab=50257 draws what the reference does", () =>
      checkDraws(sampler, randomRows(50257, 2), stepsFor(50257), tally));

    // The bound that they are held to is the worst case. Real roundings cancel: a cumulative weight is off by some 2^-24
    // of the total, and u is that near to a border for one draw in thousands.
    test("tokens that rounding changes are few", () => {
      expect(tally.drawn).toBeGreaterThan(1000);
      expect(tally.differing).toBeLessThanOrEqual(tally.drawn / 500);
    });

    test("draws what a sampler of the host does, step by step", async () => {
      const options: SamplingOptions = {
        ...NO_FILTERS,
        temperature: 1.3,
        topK: 60,
        topP: 0.97,
        minP: 0.001,
        repeatPenalty: 1.2,
        seed: 77,
      };
      for (const temperature of [0, 1.3]) {
        const logits = Float32Array.from(normalArray(8, 1000, 0, 2));
        const steps = new Array<Filters>(40).fill({ ...options, temperature });
        const { drawn } = await run(sampler, [{ logits, seed: 77, seen: [3, 999] }], steps);
        const host = createSampler({ ...options, temperature });
        const recent = [3, 999];
        for (const [result] of drawn) {
          const id = host.next(logits, recent);
          expect(result!.id).toBe(id);
          recent.push(id);
        }
      }
    });

    test("equal logits: sets are exact, the lower ids first", async () => {
      for (const vocab of [2, 255, 256, 257, 8192, 50257]) {
        for (const value of vocab === 50257 ? [-3.5] : [0, -3.5, 1e30]) {
          const steps = filtersOf(
            {},
            { temperature: 0 },
            ...[1, 2, 200, 256, 257, 1000, vocab - 1].map((topK) => ({ topK })),
            ...[0, 0.25, 0.5, 0.75, 1 - 2 ** -20].map((topP) => ({ topP })),
            { topK: 600, topP: 0.5 },
            { topK: 1000, topP: 0.5, minP: 1 },
          );
          await checkDraws(sampler, equalRows(vocab, value, [1, 2]), steps);
        }
      }
    });
    test("the last token that is kept can be drawn, and none behind it", async () => {
      const vocab = 5000;
      const late = Array.from({ length: 20000 }, (_, step) => step)
        .filter((step) => uniform(9, step) > 1 - 1 / 4096);
      expect(late.length).toBeGreaterThan(1);
      const equal = new Float32Array(vocab).fill(1);
      for (const topK of [1, 2, 255, 256, 257, 1024, 1025, 3000]) {
        const rows = late.slice(0, 2).map((step): Row => ({ logits: equal, seed: 9, step }));
        const { drawn } = await run(sampler, rows, filtersOf({ topK }));
        for (const { id } of drawn[0]!) expect(id).toBe(topK - 1);
      }
    });
    test("a random number on the border between two tokens draws the second", async () => {
      const vocab = 8192;
      const steps = Array.from({ length: 20000 }, (_, step) => step)
        .filter((step) => Number.isInteger(uniform(12, step) * vocab));
      expect(steps.length).toBeGreaterThan(2);
      const equal = new Float32Array(vocab).fill(1);
      const { drawn } = await run(sampler, steps.map((step): Row => ({ logits: equal, seed: 12, step })), [
        NO_FILTERS,
      ]);
      expect(drawn[0]!.map(({ id }) => id)).toEqual(steps.map((step) => uniform(12, step) * vocab));
    });
    test("ties across the end of top-k and top-p: exactly as many as there should be", async () => {
      // Two values, 100 of the larger; values in steps, 16 or 750 tokens each; zeros of both signs; neighbouring floats.
      const two = Float32Array.from({ length: 3000 }, (_, id) => id % 30 === 7 ? 2 : -1);
      const stairs = Float32Array.from({ length: 3000 }, (_, id) => (id * 7 % 187) / 8);
      const broad = Float32Array.from({ length: 3000 }, (_, id) => id * 7 % 4 - 2);
      const zeros = Float32Array.from({ length: 3000 }, (_, id) => id === 1500 ? 1e-3 : id % 2 ? 0 : -0);
      const adjacent = Float32Array.from({ length: 3000 }, (_, id) => 1 + (id * 7 % 3) * 2 ** -23);
      const rows = [two, stairs, broad, zeros, adjacent].map((logits, row): Row => ({ logits, seed: row }));
      const topKs = [1, 7, 99, 100, 101, 350, 351, 700, 1000, 2999].map((topK) => ({
        topK,
        temperature: 30,
      }));
      const topPs = [0.03, 0.3, 0.6, 0.9].map((topP) => ({ topP, temperature: 30 }));
      await checkDraws(
        sampler,
        rows,
        filtersOf(...topKs, ...topPs, { topK: 500, topP: 0.7, temperature: 30 }),
      );
    });

    test("extreme logits", async () => {
      const noise = normalArray(4, 3000);
      const rows = [
        (id: number) => id % 3 === 0 ? -1e30 : id % 3 === 1 ? 1e30 : noise[id]!,
        (id: number) => id % 3 === 0 ? -Infinity : noise[id]!,
        (id: number) => id % 7 === 0 ? -3.4e38 : 3.4e38 - 1e32 * id,
        (id: number) => id === 2345 ? 0 : -Infinity,
        (id: number) => id === 2345 ? 1e4 : noise[id]!,
        (id: number) => id === 2345 ? -1e30 : 1e-38 * noise[id]!,
        (id: number) => 1e30 * noise[id]!,
        (id: number) => -1e4 + noise[id]!,
      ].map((logit, row): Row => ({
        logits: Float32Array.from(noise, (_, id) => logit(id)),
        seed: 40 + row,
      }));
      const steps = filtersOf(
        {},
        { temperature: 0 },
        { temperature: 1e30 },
        ...[1, 500, 1001, 2000, 2500].map((topK) => ({ topK })),
        ...[0.1, 0.5, 0.999].map((topP) => ({ topP })),
        { topP: 0.5, temperature: 1e30 },
        { topK: 1500, topP: 0.5, minP: 0.1 },
      );
      await checkDraws(sampler, rows, steps);
    });

    test("logits that are no use are reported with the first id, and everything stays in bounds", async () => {
      for (const vocab of [1, 33, 5000]) {
        const usual = Float32Array.from(normalArray(3, vocab));
        const last = vocab - 1;
        const bad = (...changes: [number, number][]): Row => {
          const logits = usual.slice();
          for (const [id, value] of changes) logits[id] = value;
          return { logits, seed: 1 };
        };
        const rows: Row[] = [
          bad([last, NaN]),
          bad([last, NaN], [last >> 1, Infinity], [last >> 2, NaN]),
          bad([last, Infinity]),
          bad([last, Infinity], [last >> 1, Infinity], [0, -Infinity]),
          { logits: usual.map(() => -Infinity), seed: 1 },
          { logits: usual, seed: 1 },
        ];
        const penalised = rows.map((row) => ({ ...row, seen: [0, last >> 1, last] }));
        const steps = [NO_FILTERS, { ...NO_FILTERS, topK: 40, topP: 0.9 }, GREEDY];
        const penalties = steps.map((filters) => ({ ...filters, repeatPenalty: 1.5 }));
        for (const { drawn } of [await run(sampler, rows, steps), await run(sampler, penalised, penalties)]) {
          for (const results of drawn) {
            results.forEach(({ id, problem, at }, row) => {
              const message = problem === undefined
                ? "usable"
                : `The logits ${problem} (first at token id ${at})`;
              expect(message).toBe(messageOf(rows[row]!.logits));
              if (problem !== undefined) expect(id).toBe(0);
            });
          }
        }
      }
    });

    test("sequences move on: token, place, length, step and seen tokens, from the first sequence on", async () => {
      const vocab = 100;
      const rows = randomRows(vocab, 3).map((row, i): Row => ({ ...row, length: 5 * i, step: 7 * i }));
      const steps = [...filtersOf({ topK: 40 }, { repeatPenalty: 1.1 }), GREEDY, NO_FILTERS];
      for (const [firstSequence, capacity] of [[0, 64], [2, 64], [13, 12]] as const) {
        const out = await run(sampler, rows, steps, { firstSequence, capacity });
        expectDraws(sampler, rows, steps, out);
        rows.forEach(({ length = 0, step = 0, seed, seen = [] }, row) => {
          const s = firstSequence + row;
          const ids = out.drawn.map((results) => results[row]!.id);
          const position = Math.min(length + steps.length, capacity - 1);
          const state = packSequence({ length: position, step: step + steps.length, seed });
          expect(out.sequences.subarray(4 * s, 4 * s + 4)).toEqual(state);
          const { place, weight } = placeOf(position);
          const bits = new Uint32Array(Float32Array.of(weight).buffer)[0]!;
          expect([...out.tokens.subarray(3 * s, 3 * s + 3)]).toEqual([ids.at(-1)!, place, bits]);
          const words = seenBytes(vocab) / 4;
          expect(out.seen.subarray(words * s, words * (s + 1))).toEqual(packSeen([...seen, ...ids], vocab));
        });
      }
    });

    test("ten runs are bit-identical", async () => {
      const rows = randomRows(8192, 3);
      const steps = stepsFor(8192).slice(-12);
      await expectTenIdenticalRuns(async () => {
        const { drawn, tokens, seen, sequences } = await run(sampler, rows, steps);
        const ids = drawn.flat().map(({ id }) => id);
        return Float32Array.from([...ids, ...tokens, ...seen, ...sequences]);
      });
    });

    // Of the variant that a model would take: thousands of steps are slow, and other variants draw the same tokens.
    if (sampler.title !== PREFERRED) return;
    test("counts of tokens follow their probabilities (chi-square)", async () => {
      const draws = 200; // of each of 16 sequences
      const logits = Float32Array.from(normalArray(12, 97, 0, 1.5));
      const flat = Float32Array.from(normalArray(13, 400, 0, 0.3));
      for (
        const [row, filters] of [
          [logits, NO_FILTERS],
          [logits, { ...NO_FILTERS, topK: 20, temperature: 1.5 }],
          [logits, { ...NO_FILTERS, topP: 0.8 }],
          [logits, { ...NO_FILTERS, minP: 0.1, topK: 50, topP: 0.95, temperature: 0.9 }],
          [flat, { ...NO_FILTERS, topK: 300, topP: 0.7 }],
        ] as const
      ) {
        const rows = Array.from({ length: 16 }, (_, i): Row => ({ logits: row, seed: 31 * i }));
        const { drawn } = await run(sampler, rows, new Array<Filters>(draws).fill(filters));
        const counts = new Map<number, number>();
        for (const { id } of drawn.flat()) counts.set(id, (counts.get(id) ?? 0) + 1);
        const { ids, probabilities } = candidates(row, [], filters);
        expect([...counts.keys()].filter((id) => !ids.includes(id))).toEqual([]);
        const observed = Array.from(ids, (id) => counts.get(id) ?? 0);
        const expected = Array.from(probabilities, (p) => 16 * draws * p);
        const { statistic, freedom } = chiSquare(observed, expected);
        expect(statistic).toBeLessThan(chiSquareQuantile(freedom));
        // As unlikely to fit too well as it is to fit too badly: that would be no chance at all.
        expect(statistic).toBeGreaterThan(chiSquareQuantile(freedom, -NORMAL_QUANTILE));
      }
    });
  });
}

/** What the sampler of the host says of logits. */
function messageOf(logits: Float32Array): string {
  try {
    createSampler({ ...GREEDY, seed: 0 }).next(logits, []);
    return "usable";
  } catch (error) {
    return (error as Error).message;
  }
}

/** Of a standard normal variable, exceeded with probability 1e-6: a test that fails by chance fails for ever. */
const NORMAL_QUANTILE = 4.7534;

/** The chi-square distribution's quantile by Wilson and Hilferty 1931, within a percent from 10 degrees of freedom on. */
function chiSquareQuantile(freedom: number, normalQuantile = NORMAL_QUANTILE): number {
  const variance = 2 / (9 * freedom);
  return freedom * (1 - variance + normalQuantile * Math.sqrt(variance)) ** 3;
}

/** Pearson's statistic; what is expected less than ten times is counted together with its neighbours. */
function chiSquare(observed: readonly number[], expected: readonly number[]) {
  const bins: [observed: number, expected: number][] = [];
  let [o, e] = [0, 0];
  observed.forEach((count, i) => {
    o += count;
    e += expected[i]!;
    if (e < 10) return;
    bins.push([o, e]);
    [o, e] = [0, 0];
  });
  const last = bins.at(-1)!;
  last[0] += o;
  last[1] += e;
  return {
    statistic: bins.reduce((sum, [o, e]) => sum + (o - e) ** 2 / e, 0),
    freedom: bins.length - 1,
  };
}

describe("logprobs", () => {
  for (const candidate of SAMPLERS.map(({ variant }) => op(logprobs, variant))) {
    const runLogprobs = async (rows: readonly Float32Array[], ids: readonly number[], top: number) => {
      const vocab = rows[0]!.length;
      // The rows are of the last sequences, and of the second slot.
      const [slot, firstSequence, sequences] = [1, 2, 2 + rows.length];
      const results = new Uint32Array(3 * 2 * sequences);
      ids.forEach((id, row) => results[3 * (sequences + firstSequence + row)] = id);
      const words = logprobsBytes(top) / 4;
      const problem = { vocab, sequences, firstSequence, rows: rows.length, slot, top };
      const out = await runOp(gpu, candidate, problem, {
        logits: tensor("f32", thenNan(rows.flatMap((row) => [...row]), 1000)),
        results: tensor("u32", results),
        logprobs: tensor("u32", new Array<number>(words * 2 * sequences).fill(UNWRITTEN)),
      });
      const start = words * (sequences + firstSequence);
      expect(wordsOf(out.logprobs!).subarray(0, start).every((word) => word === UNWRITTEN)).toBe(true);
      return rows.map((_, row) =>
        unpackLogprobs(new DataView(out.logprobs!.buffer, 4 * (start + words * row), 4 * words))
      );
    };

    /** Against f64: ids exactly, values by the rule of `expectClose`, with the sum in f32 as the plain algorithm. */
    const check = async (rows: readonly Float32Array[], ids: readonly number[], top: number) => {
      const lists = await runLogprobs(rows, ids, top);
      lists.forEach((entries, row) => {
        const logits = rows[row]!;
        const wanted = logSoftmaxTopK(logits, top, ids[row]!);
        expect(entries.map(({ id }) => id)).toEqual([ids[row]!, ...wanted.top.map(({ id }) => id)]);
        const largest = logits.reduce((a, b) => Math.max(a, b), -Infinity);
        const { fround } = Math;
        const sum = logits.reduce((sum, x) => fround(sum + fround(Math.exp(fround(x - largest)))), 0);
        const plain = entries.map(({ id }) => fround(fround(logits[id]! - largest) - fround(Math.log(sum))));
        const exact = [wanted.logprob, ...wanted.top.map(({ logprob }) => logprob)];
        // The difference to the largest, the logarithm, and 1 for the sum's rounding, which it makes an absolute error.
        entries.forEach(({ id, logprob }, i) => {
          if (exact[i] === -Infinity) expect(logprob).toBe(-Infinity);
          else {
            expectClose([logprob], [exact[i]!], [plain[i]!], {
              kernel: "logprobs",
              elem: "f32",
              stored: "f32",
              magnitude: 1 + Math.log(logits.length) + Math.abs(logits[id]! - largest),
            });
          }
        });
      });
    };

    for (const vocab of [1, 2, 31, 33, 1000, 8192, 50257]) {
      test(`${titleOf(candidate)} vocab=${vocab} gives the log-probabilities of the host`, async () => {
        const rows = Array.from(
          { length: 3 },
          (_, row) => Float32Array.from(normalArray(row, vocab, -30, 4)),
        );
        for (const top of vocab === 50257 ? [20] : [0, 1, 5, 20]) {
          await check(rows, [0, vocab >> 1, vocab - 1], top);
        }
      });
    }
    test(`${titleOf(candidate)} equal, distant and -infinite logits`, async () => {
      const noise = normalArray(6, 3000);
      const rows = [
        () => 1.25,
        (id: number) => Math.round(4 * noise[id]!) / 4,
        (id: number) => id > 2990 ? noise[id]! : -Infinity,
        (id: number) => 1e30 * noise[id]!,
        (id: number) => id === 77 ? 0 : -0,
      ].map((logit) => Float32Array.from(noise, (_, id) => logit(id)));
      await check(rows, [5, 2999, 2995, 9, 78], 30);
    });
    test(`${titleOf(candidate)} logits that are no use are no harm`, async () => {
      for (const value of [NaN, Infinity, -Infinity]) {
        const [entries] = await runLogprobs([new Float32Array(100).fill(value)], [0], 5);
        for (const { id } of entries!) expect(id).toBeLessThan(100);
      }
    });
    test(`${titleOf(candidate)}: ten runs are bit-identical`, () => {
      const rows = [Float32Array.from(normalArray(1, 8192, 0, 4))];
      return expectTenIdenticalRuns(async () => {
        const [entries] = await runLogprobs(rows, [3], 20);
        return Float32Array.from(entries!.flatMap(({ id, logprob }) => [id, logprob]));
      });
    });
  }
});
