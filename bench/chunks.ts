/**
 * Prefill time against the tokens of a chunk, the evidence for the plan's choice.
 *
 *     bun bench/chunks.ts --model DIR --tokens 16384 --chunks 1024,2048,4096,8192 [--dtype f16] [--out FILE.json]
 *         [--commit ID]
 */
import { parseArgs } from "node:util";
import { readConfig } from "../src/model/config.ts";
import { Gpt2 } from "../src/model/gpt2.ts";
import { openCheckpoint } from "../src/model/safetensors.ts";
import { syntheticPrompt } from "../src/model/synthetic.ts";
import { openDevice } from "../src/runtime/device.ts";
import type { Elem } from "../src/runtime/kernel.ts";
import { formatMiB } from "./process.ts";
import { provenance, writeResult } from "./provenance.ts";

const { values } = parseArgs({
  options: {
    model: { type: "string", default: "weights/classics-16k" },
    tokens: { type: "string", default: "16384" },
    chunks: { type: "string", default: "1024,2048,4096,8192" },
    dtype: { type: "string", default: "f16" },
    commit: { type: "string" },
    out: { type: "string" },
  },
});

const RUNS = 5;
const gpu = await openDevice();
const config = await readConfig(values.model);
const prompt = syntheticPrompt(Number(values.tokens), config.vocabSize);
const rows = [];
console.log("| chunk | prefill ms | tokens/s | activations MiB |\n| --- | --- | --- | --- |");
for (const chunkTokens of values.chunks.split(",").map(Number)) {
  const source = await openCheckpoint(values.model);
  const elem = values.dtype as Elem;
  const model = await Gpt2.load(gpu, source, config, { context: prompt.length, elem, chunkTokens });
  await model.prefill(prompt); // the first run compiles
  const ms: number[] = [];
  for (let run = 0; run < RUNS; run++) {
    model.truncate(0);
    const starting = performance.now();
    await model.prefill(prompt);
    ms.push(performance.now() - starting);
  }
  ms.sort((a, b) => a - b);
  const [min, median, max] = [ms[0]!, ms[RUNS >> 1]!, ms.at(-1)!];
  const activationsBytes = model.plan.bytes.activations;
  rows.push({ chunkTokens, ms: { median, min, max }, activationsBytes });
  console.log(
    `| ${chunkTokens} | ${median.toFixed(0)} (${min.toFixed(0)} to ${max.toFixed(0)}) | ${
      (1000 * prompt.length / median).toFixed(0)
    } | ${formatMiB(activationsBytes)} |`,
  );
  model.destroy();
  await source.close();
}
if (values.out) {
  const { name, driver } = gpu.caps;
  writeResult(values.out, {
    adapter: name,
    driver,
    ...provenance(values.commit),
    tokens: prompt.length,
    rows,
  });
}
gpu.destroy();
