/** What is planned against the device's limits, and against what is then allocated. */
import { afterAll, describe, expect, test } from "bun:test";
import { join } from "node:path";
import { PLACE_BYTES } from "../../src/kernels/sampling/sampling.ts";
import { KV_BLOCK } from "../../src/kernels/shared/shared.ts";
import { headBytes } from "../../src/kvcache/layout.ts";
import { type GPT2Config, PUBLISHED_SHAPES, readConfig } from "../../src/model/config.ts";
import type { Gpt2, Gpt2Options } from "../../src/model/gpt2.ts";
import {
  checkFits,
  type ClassifyingPlan,
  type DecodingPlan,
  largestContext,
  type MemoryLimits,
  type MemoryPlan,
  paddedSizes,
  planMemory,
  type PlannedBuffer,
  type PlanOptions,
} from "../../src/model/memory_plan.ts";
import { bufferBytes, type Purpose } from "../../src/runtime/buffers.ts";
import { type Gpu, openDevice } from "../../src/runtime/device.ts";
import { DoesNotFitError } from "../../src/runtime/errors.ts";
import { type Elem, sizeOf } from "../../src/runtime/kernel.ts";
import { temporaryFolder, type TinyOptions, writeTinyCheckpoint } from "../support/checkpoint.ts";
import { testDevice, testElems } from "../support/device.ts";
import { DECODING, loadModel } from "../support/model.ts";

const shared = await testDevice();
const elems = testElems(shared);

const ELEMS: readonly Elem[] = ["f16", "f32"];
const CONTEXTS = [1, 64, 65, 1024, 16384, 65536];
const PURPOSES: readonly Purpose[] = ["weights", "kv", "activations", "staging"];

function binding(maxBindingBytes: number): MemoryLimits {
  return { isSoftware: false, maxBindingBytes, maxBufferBytes: 4 * 2 ** 30, memoryBytes: undefined };
}

/** The specification's minimum, which many devices have, and what others offer. */
const LIMITS: readonly (readonly [name: string, limits: MemoryLimits])[] = [
  ["128 MiB bindings", binding(2 ** 27)],
  ["128 MiB bindings on a CPU", { ...binding(2 ** 27), isSoftware: true }],
  ["1 GiB bindings", binding(2 ** 30)],
  ["2 GiB - 4 B bindings", binding(2 ** 31 - 4)],
  ["1 GiB buffers", { ...binding(2 ** 31), maxBufferBytes: 2 ** 30 }],
];
/** Less than any device has: not even one head of a long context fits the second. */
const TINY_LIMITS: typeof LIMITS = [
  ["16 MiB bindings", binding(2 ** 24)],
  ["1 MB bindings", binding(1_000_004)],
];

const CLASSIFYING: ClassifyingPlan = {
  classes: 25,
  pooling: "mean",
  rows: 768,
  labelRows: 4096,
  lengths: 3,
  inFlight: 3,
};

const cases = Object.entries(PUBLISHED_SHAPES).flatMap(([name, config]) =>
  ELEMS.flatMap((elem) =>
    CONTEXTS.flatMap((context) =>
      [{}, { scoring: true }, { decoding: DECODING }, { classifying: CLASSIFYING }].map((use) => ({
        name,
        config,
        options: { context, elem, ...use },
      }))
    )
  )
);

function most({ maxBindingBytes, maxBufferBytes }: MemoryLimits): number {
  return Math.min(maxBindingBytes, maxBufferBytes);
}

describe("planMemory", () => {
  for (const [name, limits] of LIMITS) {
    test(`keeps every buffer of every published model up to 64K tokens within ${name}`, () => {
      for (const { name, config, options } of cases) {
        const { buffers } = planMemory(config, options, limits);
        const largest = buffers.reduce((a, b) => a.bytes >= b.bytes ? a : b);
        if (largest.bytes <= most(limits)) continue;
        throw new Error(`${name}, ${JSON.stringify(options)}: "${largest.label}" has ${largest.bytes} B`);
      }
    });
  }

  for (const [name, limits] of TINY_LIMITS) {
    test(`divides what can be divided for ${name}`, () => {
      for (const { config, options } of cases) {
        const plan = planMemory(config, options, limits);
        const { width } = paddedSizes(config);
        /** What a buffer of this label is when it cannot be made smaller; undefined where nothing divides it. */
        const least = ({ label, purpose }: PlannedBuffer): number | undefined => {
          if (purpose === "kv") return label === "block table" ? undefined : headBytes(plan.kv);
          if (/^w[tp]e\.weight/.test(label)) return width * sizeOf(options.elem);
          if (label === "logits") return bufferBytes(4 * config.vocabSize);
          if (purpose !== "activations" || /^attention split|^places/.test(label)) return undefined;
          // Nor does anything divide the rows that are classified of a pack.
          const ofPack = Object.values(plan.classifying ?? {}).some((buffer) => buffer.label === label);
          if (ofPack || (plan.classifying && /^targets|^negative/.test(label))) return undefined;
          const { chunkTokens } = plan;
          const own = plan.buffers.find((buffer) => buffer.label === label)!.bytes;
          return Math.ceil(own / chunkTokens) * Math.min(chunkTokens, 64);
        };
        for (const buffer of plan.buffers) {
          if (buffer.bytes <= most(limits) || buffer.bytes <= (least(buffer) ?? Infinity)) continue;
          throw new Error(`"${buffer.label}" has ${buffer.bytes} B in ${JSON.stringify(options)}`);
        }
      }
    });
  }

  test("adds up to its totals, the activations are among its buffers, and labels tell them apart", () => {
    for (const { config, options } of cases) {
      for (const [, limits] of [...LIMITS, ...TINY_LIMITS]) {
        const plan = planMemory(config, options, limits);
        const of = (purpose: Purpose) => plan.buffers.filter((buffer) => buffer.purpose === purpose);
        let total = 0;
        for (const purpose of PURPOSES) {
          const sum = of(purpose).reduce((sum, { bytes }) => sum + bytes, 0);
          expect(plan.bytes[purpose]).toBe(sum);
          total += sum;
        }
        expect(plan.totalBytes).toBe(total);
        expect(of("activations")).toEqual([
          ...Object.values(plan.activations),
          ...Object.values(plan.decoding ?? {}),
          ...Object.values(plan.classifying ?? {}),
        ]);
        expect(plan.buffers.every(({ bytes }) => bytes >= 16 && bytes % 16 === 0)).toBe(true);
        const bound = plan.buffers.filter(({ purpose }) => purpose !== "staging");
        expect(new Set(bound.map(({ label }) => label)).size).toBe(bound.length);
      }
    }
  });

  test("grows as a straight line with the context, by the bytes of a token, but for longer chunks", () => {
    // Entries of tables come in multiples of what buffers are rounded to.
    const STEP = 512;
    for (const name of ["gpt2", "gpt2-xl"] as const) {
      const config = PUBLISHED_SHAPES[name];
      for (const options of [{ elem: "f16", scoring: true }, { elem: "f32", decoding: DECODING }] as const) {
        const perToken = 2 * config.nLayer * config.nEmbd * sizeOf(options.elem);
        const places = "decoding" in options ? PLACE_BYTES * STEP : 0;
        const tableEntries = 4 * STEP / KV_BLOCK;
        for (const isSoftware of [false, true]) {
          const limits = { ...binding(2 ** 27), isSoftware };
          const plans = Array.from(
            { length: 65536 / STEP },
            (_, i) => planMemory(config, { context: STEP * (i + 1), ...options }, limits),
          );
          const chunks = new Set(plans.map(({ chunkTokens }) => chunkTokens));
          // The lengths of chunks are few: a line has many points.
          expect(chunks.size).toBeLessThan(isSoftware ? 3 : 8);
          for (const [i, plan] of plans.slice(1).entries()) {
            const before = plans[i]!;
            expect(plan.bytesPerToken).toBe(perToken);
            const step = plan.totalBytes - before.totalBytes;
            if (plan.chunkTokens === before.chunkTokens) {
              expect(step).toBe(STEP * perToken + places + tableEntries);
            } else {
              expect(plan.chunkTokens).toBeGreaterThan(before.chunkTokens);
              expect(step).toBeGreaterThan(STEP * perToken);
            }
          }
        }
      }
    }
  });

  test("no buffer but the cache's grows with the context, beyond the longest chunk", () => {
    const [, limits] = LIMITS[0]!;
    const others = (context: number) => {
      const { buffers } = planMemory(PUBLISHED_SHAPES.gpt2, { context, elem: "f16", scoring: true }, limits);
      return buffers.filter(({ label, purpose }) => purpose !== "kv" && !label.startsWith("attention split"));
    };
    expect(others(2 ** 20)).toEqual(others(2 ** 16));
  });

  test("gpt2-xl at 64K tokens has 20,132,659,200 bytes of keys and values and their table", () => {
    const options: PlanOptions = { context: 65536, elem: "f16" };
    for (const [, limits] of LIMITS) {
      const { bytes, totalBytes, bytesPerToken } = planMemory(PUBLISHED_SHAPES["gpt2-xl"], options, limits);
      expect(bytes.kv).toBe(20_132_659_200 + 4 * 1024);
      expect(bytes.kv).toBeGreaterThan(2 ** 32);
      expect(bytesPerToken * 65536).toBe(20_132_659_200);
      expect(totalBytes).toBe(bytes.weights + bytes.kv + bytes.activations + bytes.staging);
    }
  });

  test("scoring takes nothing from the weights and the cache, and an untied head its own table", () => {
    const [, limits] = LIMITS[0]!;
    const config = PUBLISHED_SHAPES.gpt2;
    const plain = planMemory(config, { context: 4096, elem: "f32" }, limits);
    const scoring = planMemory(config, { context: 4096, elem: "f32", scoring: true }, limits);
    expect(scoring.bytes).toMatchObject({ weights: plain.bytes.weights, kv: plain.bytes.kv });
    // Some rows of logits at a time: [chunk, vocab] would be 412 MB.
    expect(scoring.activations.logits.bytes).toBeLessThanOrEqual(32 << 20);
    expect(scoring.logitRows).toBe(Math.floor((32 << 20) / (4 * 50257)));
    const untied = planMemory(config, { context: 4096, elem: "f32", untiedHead: true }, limits);
    expect(untied.bytes.weights - plain.bytes.weights).toBe(4 * 50257 * 768);
  });
});

describe("largestContext", () => {
  const GB = 10 ** 9;

  for (const memoryBytes of [undefined, 2 * GB, 16 * GB, 80 * GB]) {
    const name = memoryBytes === undefined ? "unknown memory" : `${memoryBytes / GB} GB`;
    test(`with ${name} is what fits, and one block more does not`, () => {
      for (const config of Object.values(PUBLISHED_SHAPES)) {
        for (const [, limits] of [...LIMITS, ...TINY_LIMITS]) {
          for (const options of [{ elem: "f16", scoring: true }, { elem: "f32" }] as const) {
            const caps = { ...limits, memoryBytes, f16: true };
            const largest = largestContext(config, options, caps);
            const check = (context: number) => {
              const run = { ...options, context };
              checkFits(config, run, planMemory(config, run, caps), caps);
            };
            expect(largest % KV_BLOCK).toBe(0);
            if (largest > 0) check(largest);
            expect(() => check(largest + KV_BLOCK)).toThrow(DoesNotFitError);
          }
        }
      }
    });
  }

  test("is bound by the binding of one head where memory is unknown", () => {
    // A head of 64 columns in f16 takes 128 B a token.
    expect(largestContext(PUBLISHED_SHAPES.gpt2, { elem: "f16" }, binding(2 ** 27))).toBe(2 ** 20);
    expect(largestContext(PUBLISHED_SHAPES.gpt2, { elem: "f32" }, binding(2 ** 27))).toBe(2 ** 19);
  });

  test("is 0 where the weights alone are too large", () => {
    const limits = { ...binding(2 ** 30), memoryBytes: 10 ** 9 };
    expect(largestContext(PUBLISHED_SHAPES["gpt2-xl"], { elem: "f16" }, limits)).toBe(0);
  });
});

describe("checkFits", () => {
  function refusal(config: GPT2Config, options: PlanOptions, caps: MemoryLimits & { f16: boolean }) {
    try {
      checkFits(config, options, planMemory(config, options, caps), caps);
    } catch (error) {
      if (error instanceof DoesNotFitError) return error;
      throw error;
    }
    throw new Error("it fits");
  }
  const gpt2 = PUBLISHED_SHAPES.gpt2;

  test("says which buffer is too large, and the largest contexts in both types: exit code 4", () => {
    const caps = { ...binding(2 ** 27), f16: true };
    const error = refusal(gpt2, { context: 2 ** 20, elem: "f32" }, caps);
    expect(error.exitCode).toBe(4);
    expect(error.message).toBe(
      'A context of 1048576 tokens does not fit in f32: "layer 0 keys of heads 0 to 0" takes 256 MiB for ' +
        "1048576 tokens, this device binds at most 128 MiB",
    );
    expect(error.hint).toBe(
      "use `--context 524288`, the largest that fits in f32, or `--dtype f16` for up to 1048576",
    );
  });

  test("says how much memory it would take, where the device tells how much there is", () => {
    const caps = { ...binding(2 ** 30), memoryBytes: 16 * 2 ** 30, f16: true };
    const options: PlanOptions = { context: 2 ** 20, elem: "f16" };
    const error = refusal(gpt2, options, caps);
    expect(error.message).toMatch(
      /^A context of 1048576 tokens does not fit in f16: it takes 36\.\d GiB, this device has 16 GiB$/,
    );
    const largest = largestContext(gpt2, options, caps);
    expect(error.hint).toBe(`use \`--context ${largest}\`, the largest that fits in f16`);
    expect(largest * 2 * 12 * 768 * 2).toBeLessThan(caps.memoryBytes);
  });

  test("names f16 only where the device has it and it holds more, and no context where there is none", () => {
    const limits = { ...binding(2 ** 30), memoryBytes: 400 * 10 ** 6 };
    const options: PlanOptions = { context: 1024, elem: "f32" };
    expect(refusal(gpt2, options, { ...limits, f16: false }).hint).toMatch(/the model itself is too large/);
    expect(refusal(gpt2, options, { ...limits, f16: true }).hint).toMatch(
      /^use `--dtype f16` for up to \d+ tokens$/,
    );
    const xl = PUBLISHED_SHAPES["gpt2-xl"];
    expect(refusal(xl, options, { ...limits, f16: true }).hint).toMatch(/the model itself is too large/);
  });

  test("says nothing of what fits", () => {
    const caps = { ...binding(2 ** 27), f16: true };
    const options: PlanOptions = { context: 65536, elem: "f32", scoring: true };
    for (const config of Object.values(PUBLISHED_SHAPES)) {
      checkFits(config, options, planMemory(config, options, caps), caps);
    }
  });
});

describe("what a model allocates is what was planned", () => {
  const folder = temporaryFolder();
  afterAll(folder.remove);
  /** Sizes that nothing divides. */
  const CLASSES = 3;
  const AWKWARD = { nLayer: 2, nHead: 3, nEmbd: 30, nPositions: 1100, vocabSize: 101 };
  const checkpoints: readonly (readonly [name: string, options: TinyOptions])[] = [
    ["awkward sizes", { config: AWKWARD, classes: CLASSES }],
    ["a head of its own", { config: { ...AWKWARD, nHead: 2 }, lmHead: "separate", classes: CLASSES }],
    ["one layer, one head", {
      config: { nLayer: 1, nHead: 1, nEmbd: 4, nPositions: 70, vocabSize: 5 },
      classes: CLASSES,
    }],
  ];
  /** Of documents in blocks of the cache, which the context has whole. */
  const classifying = { classes: CLASSES, rows: 16, labelRows: 128, lengths: 2, inFlight: 2 };
  type Run =
    & Pick<Gpt2Options, "context" | "scoring" | "sparsity" | "classifying">
    & { readonly decoding: DecodingPlan };
  const runs: readonly Run[] = [
    { context: 1, decoding: DECODING },
    { context: 65, scoring: true, decoding: { sequences: 3, inFlight: 4, logprobs: 2 } },
    { context: 550, decoding: { sequences: 2, inFlight: 1 } },
    { context: 1100, scoring: true, decoding: DECODING },
    { context: 550, sparsity: { pattern: { kind: "strided", window: 64, stride: 128 } }, decoding: DECODING },
    {
      context: 550,
      sparsity: { pattern: { kind: "topk", keys: 256 } },
      decoding: { sequences: 2, inFlight: 1 },
    },
    { context: 576, classifying: { ...classifying, pooling: "last", labelRows: 0 }, decoding: DECODING },
    { context: 576, classifying: { ...classifying, pooling: "mean", labelRows: 0 }, decoding: DECODING },
    {
      context: 576,
      scoring: true,
      classifying: { ...classifying, pooling: "mean" },
      decoding: { sequences: 2, inFlight: 1 },
    },
    {
      context: 576,
      classifying: { ...classifying, pooling: "last", classes: undefined },
      decoding: DECODING,
    },
  ];
  const dirs = checkpoints.map(([name, options]) =>
    writeTinyCheckpoint(join(folder.path, name), { ...options, dtype: "F16" }).dir
  );

  /** What is left of the plan when the weights are loaded. */
  const kept = ({ bytes, buffers }: MemoryPlan) => {
    const uploads = buffers.filter(({ label }) => label === "uploads");
    return { ...bytes, staging: bytes.staging - uploads.reduce((sum, { bytes }) => sum + bytes, 0) };
  };
  /** Documents and labels that fill what a run has room for. */
  async function classifySome(
    model: Gpt2,
    { classes, rows, labelRows, lengths }: ClassifyingPlan,
    isRun: boolean,
  ): Promise<void> {
    const classifier = await model.classifier();
    const ids = Uint32Array.from({ length: 66 }, (_, i) => i % model.config.vocabSize);
    if (classes !== undefined) {
      const documents = Math.floor(Math.min(rows / lengths, classifier.packRows / (2 * KV_BLOCK)));
      const beginnings = Array.from({ length: lengths }, (_, i) => 65 + i);
      const pack = Array.from({ length: documents }, () => ({ ids, lengths: beginnings }));
      const logits = await (await classifier.classify(pack)).result;
      expect(logits.map(({ length }) => length)).toEqual(new Array(documents * lengths).fill(classes));
      // What was never written is whatever the memory held before.
      if (isRun) expect(logits.every((row) => row.every(Number.isFinite))).toBe(true);
    }
    if (labelRows === 0) return;
    const labels = Array.from({ length: labelRows / 2 }, () => Uint32Array.of(1, 2));
    const [likelihoods] = await (await classifier.scoreLabels([ids.slice(0, 60)], labels)).result;
    expect(likelihoods!.length).toBe(labels.length);
    if (isRun) expect(likelihoods!.every((value) => value < 0)).toBe(true);
  }
  const restrictions = [
    ["as the device is", {}],
    // One and two heads of three to a buffer, tables in pieces, chunks of less than the context.
    ["with bindings of 80 KiB", { maxBindingBytes: 80 << 10 }],
    ["with buffers of 128 KiB", { maxBufferBytes: 2 ** 17 }],
  ] as const;

  /** Loads, runs and frees a model, whose bytes must be the plan's at every turn. */
  async function runAll(
    gpu: Gpu,
    dir: string,
    isRun: boolean,
    some: readonly Run[],
    elems: readonly Elem[],
  ): Promise<void> {
    const memory = () => Object.fromEntries(PURPOSES.map((purpose) => [purpose, gpu.memory.bytes(purpose)]));
    let peak = 0;
    for (const elem of elems) {
      for (const run of some) {
        const options: Gpt2Options = { ...run, elem };
        const model = await loadModel(gpu, dir, options);
        const { plan } = model;
        expect({ dir, options, ...memory() }).toEqual({ dir, options, ...kept(plan) });
        const bound = plan.buffers.filter(({ purpose }) => purpose !== "staging");
        expect(bound.every(({ bytes }) => bytes <= most(gpu.caps))).toBe(true);
        const { vocabSize } = model.config;
        const ids = Array.from({ length: Math.min(run.context - 1, 66) }, (_, i) => i % vocabSize);
        if (ids.length > 0) await model.prefill(ids, run.scoring ? { onNll: () => {} } : {});
        await model.decodeStep(1);
        if (run.classifying) await classifySome(model, run.classifying, isRun);
        // Nothing else was needed to load and to run it.
        peak = Math.max(peak, plan.totalBytes);
        expect(gpu.memory.peakBytes).toBe(peak);
        model.destroy();
        expect(gpu.memory.totalBytes).toBe(0);
      }
    }
  }

  for (const [name, restrict] of restrictions) {
    for (const [i, dir] of dirs.entries()) {
      // Bytes are counted where nothing runs, too; software Vulkan compiles for minutes what all of these need.
      const { isSoftware } = shared.caps;
      const where = isSoftware ? ", on no device" : "";
      test(`${name}, ${checkpoints[i]![0]}: for every purpose, and at its peak${where}`, async () => {
        const gpu = await openDevice({ restrict, nullBackend: isSoftware });
        await runAll(gpu, dir, !isSoftware, runs, elems);
        gpu.destroy();
      });
    }
  }

  test("where it runs, too: on a CPU in f32, and what takes the most", async () => {
    const gpu = await openDevice();
    await runAll(gpu, dirs[0]!, true, runs.filter(({ scoring }) => scoring), ["f32"]);
    gpu.destroy();
  });

  test("in as many buffers as the limits make of it", async () => {
    const gpu = await openDevice({ restrict: { maxBindingBytes: 80 << 10 } });
    const model = await loadModel(gpu, dirs[0]!, { context: 1100, elem: "f32" });
    expect(model.plan.kv.ranges).toEqual([{ first: 0, heads: 1 }, { first: 1, heads: 1 }, {
      first: 2,
      heads: 1,
    }]);
    expect(model.plan.chunkTokens).toBe(128);
    const wpe = model.plan.buffers.filter(({ label }) => label.startsWith("wpe"));
    expect(wpe.map(({ label }) => label)).toEqual([
      "wpe.weight rows 0 to 639",
      "wpe.weight rows 640 to 1099",
    ]);
    model.destroy();
    gpu.destroy();
  });

  test("and a context that does not fit is refused before anything is allocated", async () => {
    const options: Gpt2Options = { context: 1100, elem: "f32", scoring: true, decoding: DECODING };
    const config = await readConfig(dirs[0]!);
    const memoryBytes = planMemory(config, { ...options, context: 640 }, shared.caps).totalBytes;
    const gpu = await openDevice({ restrict: { memoryBytes } });
    const error = await loadModel(gpu, dirs[0]!, options).catch((error) => error);
    expect(error).toBeInstanceOf(DoesNotFitError);
    expect(error.message).toMatch(/1100 tokens .* f32: it takes [\d.]+ MiB, this device has [\d.]+ MiB$/);
    expect(error.hint).toStartWith("use `--context 640`, the largest that fits in f32");
    await expect(loadModel(gpu, dirs[0]!, { ...options, context: 641 })).rejects.toThrow("does not fit");
    expect(gpu.memory.peakBytes).toBe(0);
    const model = await loadModel(gpu, dirs[0]!, { ...options, context: 640 });
    expect(gpu.memory.peakBytes).toBe(memoryBytes);
    model.destroy();
    gpu.destroy();
  });

  test("and where the device runs out of memory on the way, nothing stays and what it held says what fits", async () => {
    const gpu = await openDevice();
    // No GPU says how much memory it has: it refuses an allocation, here in the midst of 253 KB of weights.
    const pop = gpu.device.popErrorScope.bind(gpu.device);
    Object.defineProperty(gpu.device, "popErrorScope", {
      value: async () =>
        await pop() ?? (gpu.memory.bytes("weights") > 200_000 ? { message: "none left" } : null),
    });
    const options: Gpt2Options = { context: 1100, elem: "f32", decoding: DECODING };
    const error = await loadModel(gpu, dirs[0]!, options).catch((error) => error);
    expect(error).toBeInstanceOf(DoesNotFitError);
    expect(error.exitCode).toBe(4);
    expect(error.message).toMatch(
      /^The GPU is out of memory: ".*" needs [\d.]+ KiB besides the [\d.]+ MiB allocated/,
    );
    expect(error.hint).toMatch(
      /^use `--context \d+`, the largest that fits in f32.*; other programs may be using/,
    );
    expect(gpu.memory.totalBytes).toBe(0);
    const largest = Number(/`--context (\d+)`/.exec(error.hint)![1]);
    expect(largest).toBeLessThan(1100);
    const { totalBytes } = planMemory(await readConfig(dirs[0]!), { ...options, context: largest }, gpu.caps);
    expect(totalBytes).toBeLessThanOrEqual(error.cause.allocatedBytes);
    gpu.destroy();
  });
});
