/**
 * What `--profile` costs, and whether its kernels add up: the same prefill and the same decoded tokens without a profiler,
 * with passes timed as they are, and with a pass for each dispatch.
 *
 *     bun bench/profiling.ts --shape gpt2 [--contexts 1k,16k] [--dtype f16] [--runs 9] [--out FILE.json] [--commit ID]
 *     bun bench/profiling.ts --model DIR [--contexts 1k] …
 *
 * The three take turns, so that none has the warmer GPU. Wall times are medians; GPU times are of the median run. Kernels are
 * compared as they were timed, and without what a timestamp costs on this device, as `--profile` reports them.
 */
import { parseArgs } from "node:util";
import { PUBLISHED_SHAPES, type PublishedShape, readConfig } from "../src/model/config.ts";
import { chooseKernels } from "../src/kernels/index.ts";
import { Benchmark } from "../src/model/benchmark.ts";
import { Gpt2 } from "../src/model/gpt2.ts";
import { kernelShape } from "../src/model/memory_plan.ts";
import { chooseElem, type DType, inFlightOf } from "../src/model/run_settings.ts";
import { openCheckpoint } from "../src/model/safetensors.ts";
import { syntheticPrompt, syntheticSource } from "../src/model/synthetic.ts";
import { openDevice } from "../src/runtime/device.ts";
import { type GpuTimes, type ProfiledUnit, Profiler } from "../src/runtime/profiler.ts";
import { Timeline } from "../src/runtime/timeline.ts";
import { provenance, writeResult } from "./provenance.ts";

const { values } = parseArgs({
  options: {
    shape: { type: "string" },
    model: { type: "string" },
    contexts: { type: "string", default: "1k,16k" },
    dtype: { type: "string", default: "auto" },
    runs: { type: "string", default: "9" },
    commit: { type: "string" },
    out: { type: "string" },
  },
});

/** Tokens decoded in a run. */
const DECODED = 64;
const WARM_UP_MS = 200;
const GREEDY = { temperature: 0, topK: 0, topP: 1, minP: 0, repeatPenalty: 1 };

const runs = Number(values.runs);
const contexts = values.contexts.split(",").map((text) => parseInt(text) * (/k$/i.test(text) ? 1024 : 1));
const config = values.model === undefined
  ? { ...PUBLISHED_SHAPES[(values.shape ?? "gpt2") as PublishedShape], nPositions: Math.max(...contexts) }
  : await readConfig(values.model);

interface Run {
  readonly wallMs: number;
  readonly gpu: GpuTimes | null;
  /** Timed ones. */
  readonly dispatches: number;
}

/** A model on a device of its own, with what times it. */
async function open(unit: ProfiledUnit | undefined) {
  // `--profile` has a timeline as well: its cost is part of what is measured.
  const timeline = unit === "dispatches" ? new Timeline({ keepsAll: false }) : undefined;
  const gpu = await openDevice({ timeline });
  const profiler = unit && new Profiler(gpu, { unit });
  const source = values.model === undefined ? syntheticSource(config) : await openCheckpoint(values.model);
  const model = await Gpt2.load(gpu, source, config, {
    context: Math.max(...contexts),
    elem: chooseElem(values.dtype as DType, gpu.caps),
    decoding: { sequences: 1, inFlight: inFlightOf(gpu) },
    profiler,
  });
  await source.close();
  const measured = async (work: () => Promise<unknown>): Promise<Run> => {
    await profiler?.settle();
    profiler?.reset();
    const starting = performance.now();
    await work();
    const wallMs = performance.now() - starting;
    await profiler?.settle();
    const report = profiler?.report();
    const dispatches = report?.kernels.reduce((sum, { calls }) => sum + calls, 0) ?? 0;
    return { wallMs, gpu: report?.gpu ?? null, dispatches };
  };
  return { unit: unit ?? "none", gpu, model, measured };
}

type Opened = Awaited<ReturnType<typeof open>>;

async function prefill({ model, measured }: Opened, tokens: number): Promise<Run> {
  const prompt = syntheticPrompt(tokens, config.vocabSize);
  model.truncate(0);
  return await measured(() => model.prefill(prompt));
}

/** The last tokens up to the context, behind a prompt that is in the cache. */
async function decode({ model, measured }: Opened, tokens: number): Promise<Run> {
  const prompt = syntheticPrompt(tokens, config.vocabSize);
  const prefilled = tokens - DECODED;
  if (model.length < prefilled) {
    model.truncate(0);
    await model.prefill(prompt.subarray(0, prefilled));
  }
  model.truncate(prefilled);
  const decoder = await model.decoder({ sampling: GREEDY });
  decoder.begin(0, [], 0);
  await decoder.next();
  return await measured(async () => {
    for (let drawn = 0; drawn < DECODED; drawn++) {
      decoder.stepAhead(Math.min(decoder.mostInFlight, DECODED - drawn));
      await decoder.next();
    }
    await decoder.discard();
  });
}

function medianRun(all: readonly Run[]): Run {
  return all.toSorted((a, b) => a.wallMs - b.wallMs)[all.length >> 1]!;
}

const opened: Opened[] = [];
for (const unit of [undefined, "passes", "dispatches"] as const) opened.push(await open(unit));
const { caps } = opened[0]!.gpu;
const benchmark = new Benchmark(opened[0]!.gpu, config, {
  elem: opened[0]!.model.elem,
  chosen: chooseKernels(kernelShape(config, opened[0]!.model.elem, caps), caps),
  runs: 3,
  signal: new AbortController().signal,
});
const { timestampMs } = await benchmark.peaks();
benchmark.destroy();
console.log(`${(1000 * timestampMs).toFixed(2)} us to time a dispatch`);
const rows = [];
for (const context of contexts) {
  for (const [phase, run] of [["prefill", prefill], ["decode", decode]] as const) {
    const times = new Map<Opened, Run[]>(opened.map((one) => [one, []]));
    const until = performance.now() + (caps.isSoftware ? 0 : WARM_UP_MS);
    do for (const one of opened) await run(one, context); while (performance.now() < until);
    for (let i = 0; i < runs; i++) {
      for (const one of opened) times.get(one)!.push(await run(one, context));
    }
    const [none, passes, dispatches] = opened.map((one) => medianRun(times.get(one)!));
    const correctedMs = dispatches!.gpu!.kernelsMs - dispatches!.dispatches * timestampMs;
    const row = {
      phase,
      context,
      wall_ms: { none: none!.wallMs, passes: passes!.wallMs, dispatches: dispatches!.wallMs },
      /** Of the wall, against no profiler. */
      profile_cost: dispatches!.wallMs / none!.wallMs,
      gpu: { passes: passes!.gpu, dispatches: dispatches!.gpu },
      dispatches: dispatches!.dispatches,
      /** Of the profiled run. */
      kernels_of_total: dispatches!.gpu!.kernelsMs / dispatches!.gpu!.totalMs,
      /** Without timestamps, of a run whose passes are as they are without `--profile`. */
      corrected_of_unprofiled: correctedMs / passes!.gpu!.totalMs,
    };
    rows.push(row);
    console.log(
      `${phase} ${context}: ${none!.wallMs.toFixed(2)} ms, with --profile ${
        row.profile_cost.toFixed(3)
      } x; ` +
        `kernels ${dispatches!.gpu!.kernelsMs.toFixed(2)} ms; without timestamps ${
          correctedMs.toFixed(2)
        } ms, ` +
        `${row.corrected_of_unprofiled.toFixed(3)} of the ${
          passes!.gpu!.totalMs.toFixed(2)
        } ms without --profile`,
    );
  }
}
if (values.out) {
  const { name: adapter, driver } = caps;
  const { elem } = opened[0]!.model;
  writeResult(values.out, {
    adapter,
    driver,
    ...provenance(values.commit),
    dtype: elem,
    runs,
    decoded: DECODED,
    timestamp_us: 1000 * timestampMs,
    rows,
  });
}
for (const { model, gpu } of opened) {
  model.destroy();
  gpu.destroy();
}
