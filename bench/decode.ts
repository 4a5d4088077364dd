/**
 * Where the time of a decoded token goes: the loop by the wall's clock, a step by the GPU's, its kernels by kind, what a
 * dispatch costs that does nothing, and what the host takes to hand a step over.
 *
 *     bun bench/decode.ts --shape gpt2 [--contexts 1k,4k,16k,64k] [--batch 1] [--dtype f16] [--sparsity PATTERN]
 *       [--out FILE.json] [--commit ID]
 *
 * Kernels of a kind run one after another in a pass, each with its own layer's weights or cache, so that at most what fits
 * the GPU's caches is read from there; their time has the gaps between them in it.
 */
import { parseArgs } from "node:util";
import { copyBytes } from "../src/kernels/copy/copy.ts";
import { chooseKernels } from "../src/kernels/index.ts";
import { packSequence, SEQUENCE_BYTES } from "../src/kernels/shared/shared.ts";
import { parsePattern } from "../src/kvcache/patterns.ts";
import { Benchmark } from "../src/model/benchmark.ts";
import { PUBLISHED_SHAPES, type PublishedShape } from "../src/model/config.ts";
import { Gpt2 } from "../src/model/gpt2.ts";
import { kernelShape } from "../src/model/memory_plan.ts";
import { syntheticSource } from "../src/model/synthetic.ts";
import { createBuffer } from "../src/runtime/buffers.ts";
import { openDevice } from "../src/runtime/device.ts";
import { type Elem, sizeOf } from "../src/runtime/kernel.ts";
import { DispatchList, Recorder } from "../src/runtime/pass.ts";
import { Profiler } from "../src/runtime/profiler.ts";
import { provenance, writeResult } from "./provenance.ts";

const { values } = parseArgs({
  options: {
    shape: { type: "string", default: "gpt2" },
    contexts: { type: "string", default: "1k,4k,16k,64k" },
    batch: { type: "string", default: "1" },
    dtype: { type: "string", default: "f16" },
    sparsity: { type: "string", default: "dense" },
    commit: { type: "string" },
    out: { type: "string" },
  },
});

/** Timed runs, of which the median counts; before them the device works for this long, until its clock is up. */
const RUNS = 15;
const WARM_UP_MS = 200;
const RUNS_A_PASS = 20;

const gpu = await openDevice();
const elem = values.dtype as Elem;
const sequences = Number(values.batch);
const contexts = values.contexts.split(",").map((text) => parseInt(text) * (/k$/i.test(text) ? 1024 : 1));
const config = {
  ...PUBLISHED_SHAPES[values.shape as PublishedShape],
  nPositions: Math.max(...contexts),
};
const { nLayer, nEmbd, nInner, vocabSize } = config;
const pattern = parsePattern(values.sparsity);
if (pattern.kind === "file") throw new Error("--sparsity takes patterns without a file");
const profiler = new Profiler(gpu, { unit: "passes" });

function median(values: readonly number[]): number {
  return values.toSorted((a, b) => a - b)[values.length >> 1]!;
}

/** Microseconds of one run of a list on the GPU. */
async function gpuTime(list: DispatchList): Promise<number> {
  const time = async () => {
    profiler.reset();
    const r = new Recorder(gpu, "benchmark", { profiler });
    for (let i = 0; i < RUNS_A_PASS; i++) r.replay(list);
    r.submit();
    await profiler.settle();
    return 1000 * profiler.report().gpu.kernelsMs / RUNS_A_PASS;
  };
  for (const until = performance.now() + WARM_UP_MS; performance.now() < until;) await time();
  const times: number[] = [];
  for (let run = 0; run < RUNS; run++) times.push(await time());
  return median(times);
}

/** Microseconds of the host for recording a step, and for handing it to the driver. */
async function hostTime(step: DispatchList): Promise<{ encode: number; submit: number }> {
  const encode: number[] = [];
  const submit: number[] = [];
  for (let run = 0; run < 20 * RUNS; run++) {
    const start = performance.now();
    const r = new Recorder(gpu, "benchmark");
    r.replay(step);
    const recorded = performance.now();
    r.submit();
    encode.push(1000 * (recorded - start));
    submit.push(1000 * (performance.now() - recorded));
    if (run % 4 === 3) await gpu.idle();
  }
  return { encode: median(encode), submit: median(submit) };
}

/** Microseconds of a dispatch that copies 16 bytes, and waits for the one before. */
async function emptyDispatch(): Promise<number> {
  const variant = {};
  await gpu.pipelines.prepare(copyBytes, variant);
  const [a, b] = ["a", "b"].map((label) => createBuffer(gpu, label, "activations", 16));
  const list = new DispatchList(gpu);
  for (let i = 0; i < 64; i++) {
    const [source, out] = i % 2 === 0 ? [a!, b!] : [b!, a!];
    list.dispatch(copyBytes, variant, { bytes: 16 }, { source, out });
  }
  return await gpuTime(list) / list.length;
}

const benchmark = new Benchmark(gpu, config, {
  elem,
  chosen: chooseKernels(kernelShape(config, elem, gpu.caps, { sequences }), gpu.caps),
  runs: RUNS,
  signal: new AbortController().signal,
});
const copyRate = await benchmark.copyRate();
const gapUs = await emptyDispatch();
const e = sizeOf(elem);
/** Bytes of the weights, or of the cache, that the kernels of a kind read in a step. */
const kinds = (context: number) => [
  { name: "normed products", match: /^gemv\/layer_norm/, bytes: nLayer * e * nEmbd * (3 * nEmbd + nInner) },
  {
    name: "attention",
    match: /^flash_decode\//,
    bytes: pattern.kind === "dense" ? sequences * nLayer * 2 * e * nEmbd * context : 0,
  },
  { name: "choice of blocks", match: /^block_selection\//, bytes: 0 },
  { name: "merge and projection", match: /^gemv\/merge/, bytes: nLayer * e * nEmbd * nEmbd },
  { name: "output of the MLP", match: /^gemv\/plain/, bytes: nLayer * e * nInner * nEmbd },
  { name: "output head", match: /^lm_head\//, bytes: e * vocabSize * nEmbd },
  { name: "embedding and last norm", match: /^(embedding|layer_norm)/, bytes: 0 },
];

console.log(`${gpu.caps.name}, ${values.shape}, ${elem}, batch ${sequences}, ${values.sparsity}`);
console.log(`copy ${(copyRate / 1e9).toFixed(0)} GB/s; a dispatch that does nothing ${gapUs.toFixed(2)} us`);
const rows = [];
for (const context of contexts) {
  const model = await Gpt2.load(gpu, syntheticSource(config), config, {
    context,
    elem,
    sparsity: { pattern },
    decoding: { sequences, inFlight: 12 },
  });
  const { ms } = await benchmark.decode(model, context);
  const step = await model.decodeStepList();
  const { sequences: states } = model.decodingBuffers;
  const length = packSequence({ length: context - 1, step: 0, seed: 0 });
  for (let s = 0; s < sequences; s++) {
    gpu.device.queue.writeBuffer(states.handle, SEQUENCE_BYTES * s, length);
  }
  const stepUs = await gpuTime(step);
  const parts = [];
  for (const { name, match, bytes } of kinds(context)) {
    const list = step.only((kernel) => match.test(kernel));
    if (list.length === 0) continue;
    const us = await gpuTime(list);
    parts.push({
      name,
      kernels: [...new Set([...list].map((dispatch) => dispatch.name))],
      dispatches: list.length,
      us,
      gb_per_s: bytes === 0 ? null : bytes / us / 1000,
      share_of_copy: bytes === 0 ? null : bytes / us / 1000 / (copyRate / 1e9),
    });
  }
  const host = await hostTime(step);
  const weightBytes = e * (nLayer * (4 * nEmbd * nEmbd + 2 * nEmbd * nInner) + vocabSize * nEmbd);
  const kvBytes = sequences * nLayer * 2 * e * nEmbd * context;
  const row = {
    context,
    loop_us: 1000 * median(ms),
    loop_us_range: [1000 * Math.min(...ms), 1000 * Math.max(...ms)],
    tokens_per_s: 1000 * sequences / median(ms),
    step_us: stepUs,
    floor_us: { weights: 1e6 * weightBytes / copyRate, kv: 1e6 * kvBytes / copyRate },
    gaps_us: gapUs * step.length,
    host_us: host,
    parts,
  };
  rows.push(row);
  console.log(
    `\n${context}: ${row.tokens_per_s.toFixed(0)} tokens/s, ${
      row.loop_us.toFixed(0)
    } us a step in the loop, ` +
      `${stepUs.toFixed(0)} on the GPU without drawing; floor: weights ${row.floor_us.weights.toFixed(0)}, ` +
      `cache ${row.floor_us.kv.toFixed(0)}, ${step.length} dispatches ${row.gaps_us.toFixed(0)}; ` +
      `host: recording ${host.encode.toFixed(0)}, submitting ${host.submit.toFixed(0)}`,
  );
  for (const { name, dispatches, us, gb_per_s, share_of_copy } of parts) {
    const rate = gb_per_s === null
      ? ""
      : `${gb_per_s.toFixed(0)} GB/s, ${(100 * share_of_copy!).toFixed(0)} %`;
    console.log(
      `  ${name.padEnd(24)} ${String(dispatches).padStart(3)} ${us.toFixed(1).padStart(8)} us  ${rate}`,
    );
  }
  model.destroy();
}
if (values.out) {
  const { name, driver } = gpu.caps;
  const copyGbPerS = copyRate / 1e9;
  writeResult(values.out, {
    ...provenance(values.commit),
    adapter: name,
    driver,
    shape: values.shape,
    elem,
    batch: sequences,
    sparsity: values.sparsity,
    copy_gb_per_s: copyGbPerS,
    empty_dispatch_us: gapUs,
    rows,
  });
}
gpu.destroy();
