/** The short form of `bench/long_haul.ts`: nothing that a process opens, loads or runs is left behind. */
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import {
  classifyOne,
  generateOne,
  haul,
  judge,
  loadOne,
  type Metric,
  rowsOf,
  type Sample,
  Sampler,
  SharedSignal,
  type Tally,
  trendOf,
  type Values,
} from "../../bench/long_haul.ts";
import { load, type LoadOptions, type Longform } from "../../mod.ts";
import { DEFAULT_MODEL } from "../../src/model/run_settings.ts";
import { createInstance } from "../../src/runtime/dawn.ts";
import { testDevice } from "../support/device.ts";
import { normalArray } from "../support/random.ts";

await testDevice(); // for its timeout

const sampler = new Sampler();
const options: LoadOptions = {
  model: DEFAULT_MODEL,
  context: 256,
  encodingWorkers: 0,
  classifying: { packTokens: 256 },
  onOpened: ({ device }) => sampler.handles.watch(device),
};
let longform: Longform;

beforeAll(async () => {
  longform = await load(options);
});
afterAll(() => longform.close());

function sample(): Promise<Values> {
  return sampler.sample(longform, true);
}

/** What is freed at once, and what when the garbage collector finds that nothing holds it. */
const FREED: readonly Metric[] = ["ledger", "buffers", "listeners"];
const COLLECTED: readonly Metric[] = ["bufferObjects", "bindGroups", "pipelines"];

function heldIn({ values }: Sample, metrics: readonly Metric[]): Partial<Values> {
  return Object.fromEntries(metrics.map((metric) => [metric, values[metric]]));
}

describe("what a process holds", () => {
  test("is the same after generations and classifications of all kinds", async () => {
    const tally: Tally = {};
    const samples = await haul(24, 2, async (i) => {
      await generateOne(longform, i, sampler.shared, tally);
      if (i % 8 === 0) await classifyOne(longform, i / 8, sampler.shared, tally);
    }, sample);
    expect(samples.map(({ operations }) => operations)).toEqual([0, 12, 24]);
    const [, middle, end] = samples;
    const held = [...FREED, ...COLLECTED];
    expect(heldIn(end!, held)).toEqual(heldIn(middle!, held));
    // A stray value on the stack may hold one or two, of several an operation.
    expect(end!.values.encoders).toBeLessThan(12);
    const kinds = ["greedy", "sampled", "stopped", "abandoned", "aborted", "refused"];
    expect(kinds.filter((kind) => tally[kind] === undefined)).toEqual([]);
    expect(tally["ended by interrupt"]).toBeGreaterThan(0);
    expect(tally["ended by InputError"]).toBe(tally["refused"]!);
    expect(sampler.shared.listeners).toBe(0);
  });

  test("is the same after models were loaded and closed, and not loaded", async () => {
    const tally: Tally = {};
    const samples = await haul(8, 1, (i) => loadOne(options, i, tally), sample);
    const [before, after] = samples;
    expect(heldIn(after!, FREED)).toEqual(heldIn(before!, FREED));
    // Five devices were opened: a stray value on the stack may hold one of them.
    for (const metric of COLLECTED) {
      expect(after!.values[metric]).toBeLessThan(3 * before!.values[metric]!);
    }
    expect(tally).toEqual({
      "loaded and closed": 4,
      "not loaded for LongformError": 1,
      "not loaded for ModelError": 1,
      "not loaded for NoAdapterError": 1,
      "not loaded for UsageError": 1,
    });
  });

  test("does not grow with the devices that were opened: they share Dawn's instance", () => {
    expect(createInstance()).toBe(createInstance());
    expect(createInstance({ backend: "null" })).not.toBe(createInstance());
  });

  test("does not grow with the documents of a stream: no promise is raced with more than once", async () => {
    const { race } = Promise;
    const raced: unknown[] = [];
    Promise.race = (<T>(values: Iterable<T>) => {
      const all = [...values];
      raced.push(...all);
      return race.call(Promise, all);
    }) as typeof Promise.race;
    try {
      const { signal } = new SharedSignal();
      const documents = Array.from({ length: 8 }, () => ({ text: "the ship went down" }));
      const outcomes = await Array.fromAsync(longform.classify(documents, { batch: 1, signal }));
      expect(outcomes.filter((outcome) => "error" in outcome)).toEqual([]);
    } finally {
      Promise.race = race;
    }
    expect(raced.length).toBeGreaterThan(8);
    expect(new Set(raced).size).toBe(raced.length);
  });
});

test("buffers are counted until they are destroyed", () => {
  const before = sampler.handles.buffers;
  const { device } = longform.gpu;
  const made = [1, 2].map(() => device.createBuffer({ size: 16, usage: GPUBufferUsage.COPY_DST }));
  expect(sampler.handles.buffers).toBe(before + 2);
  made[0]!.destroy();
  made[0]!.destroy();
  expect(sampler.handles.buffers).toBe(before + 1);
  made[1]!.destroy();
  expect(sampler.handles.buffers).toBe(before);
});

describe("a trend", () => {
  const noise = normalArray(3, 64, 0, 5);

  test("is the slope of a straight line, exactly", () => {
    const { slope, uncertainty } = trendOf([0, 10, 20, 30].map((x) => [x, 7 + 0.25 * x]));
    expect(slope).toBeCloseTo(0.25, 12);
    expect(uncertainty).toBeLessThan(1e-12);
  });

  test("of noise has an interval that holds the slope beneath", () => {
    for (const beneath of [0, 2]) {
      const { slope, uncertainty } = trendOf(Array.from(noise, (y, x) => [x, y + beneath * x]));
      expect(Math.abs(slope - beneath)).toBeLessThan(uncertainty);
      expect(uncertainty).toBeLessThan(0.2);
    }
  });

  test("of samples that follow one another is less certain than of as many that do not", () => {
    let level = 0;
    const walk = Array.from(noise, (step) => level = 0.9 * level + step);
    const shuffled = walk.map((_, i) => walk[i * 27 % 64]!);
    const [slow, fast] = [walk, shuffled].map((values) => trendOf(values.map((y, x) => [x, y])).uncertainty);
    expect(slow!).toBeGreaterThan(2 * fast!);
  });
});

describe("a verdict", () => {
  test("says what is below the bound, what is above zero, and what cannot be told", () => {
    expect(judge({ slope: 0, uncertainty: 0 }, 1)).toBe("flat");
    expect(judge({ slope: 0.5, uncertainty: 0.4 }, 1)).toBe("flat");
    expect(judge({ slope: -3, uncertainty: 1 }, 1)).toBe("flat");
    expect(judge({ slope: 2, uncertainty: 1 }, 1)).toBe("grows");
    expect(judge({ slope: 0.5, uncertainty: 3 }, 1)).toBe("unclear");
  });

  test("sees a handle that one in a hundred operations leaves, and 2 KiB that each does", async () => {
    const first = await sample();
    let operations = 0;
    const samples = await haul(2000, 50, () => {
      operations++;
      return Promise.resolve();
    }, () =>
      Promise.resolve({
        ...first,
        rss: first.rss! + 2048 * operations,
        buffers: first.buffers! + Math.floor(operations / 100),
        heap: first.heap! + 512 * operations,
      }));
    const verdicts = Object.fromEntries(rowsOf(samples, 1).map(({ metric, verdict }) => [metric, verdict]));
    expect(verdicts).toMatchObject({ rss: "grows", buffers: "grows", heap: "flat", pipelines: "flat" });
  });
});
