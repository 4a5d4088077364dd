/**
 * Prints, as Markdown, how far this machine's adapter is from the recorded references, and the bound of each row.
 *
 *     bun scripts/accuracy.ts [--dtype f16|f32] [--adapter NAME] [--max-prompt N] [--synthetic CASE,CASE]
 *         [--documents N] [--only classify] [--out FILE.json] [--commit ID]
 *
 * Prompts longer than `--max-prompt` tokens (4,096) are left out; the longest have 16,000 and 16,384. `--synthetic`
 * adds checkpoints in the shapes of published ones: gpt2, gpt2-medium (1,024 tokens), gpt2-16k, gpt2-64k; seconds to
 * minutes on a GPU, hours on a CPU. Exits 1 if a bound is broken.
 */
import process from "node:process";
import { parseArgs } from "node:util";
import { provenance, writeResult } from "../bench/provenance.ts";
import { openDevice } from "../src/runtime/device.ts";
import type { Elem } from "../src/runtime/kernel.ts";
import {
  type AccuracyRow,
  type ClassifyAccuracy,
  classifyAccuracy,
  greedyAccuracy,
  greedyGapTolerance,
  promptAccuracy,
  shortAccuracy,
  syntheticAccuracy,
} from "../tests/support/accuracy.ts";
import type { ClassifiedLength, SyntheticCase } from "../tests/support/golden.ts";

const { values } = parseArgs({
  options: {
    dtype: { type: "string" },
    adapter: { type: "string" },
    synthetic: { type: "string" },
    "max-prompt": { type: "string", default: "4096" },
    documents: { type: "string", default: "10" },
    only: { type: "string" },
    commit: { type: "string" },
    out: { type: "string" },
  },
});

const gpu = await openDevice(values.adapter === undefined ? {} : { adapter: values.adapter });
const maxPrompt = Number(values["max-prompt"]);
const elems: Elem[] = values.dtype === undefined
  ? (gpu.caps.f16 ? ["f32", "f16"] : ["f32"])
  : [values.dtype as Elem];

const results: { elem: Elem; rows: AccuracyRow[]; classify: ClassifyAccuracy[] }[] = [];
const lengths = ([512, 2048, 8192, 16384] as ClassifiedLength[]).filter((tokens) => tokens <= maxPrompt);

/** Everything but classification. */
async function languageModel(elem: Elem): Promise<AccuracyRow[]> {
  const greedy = await greedyAccuracy(gpu, elem, maxPrompt);
  return [
    ...await shortAccuracy(gpu, elem),
    ...await promptAccuracy(gpu, elem, 1024),
    ...await promptAccuracy(gpu, elem, 4096),
    ...(maxPrompt >= 16384 ? await promptAccuracy(gpu, elem, 16384) : []),
    {
      what:
        `greedy, ${greedy.prompts} prompts, ${greedy.steps} steps, ${greedy.closeCalls} close calls: largest gap`,
      error: greedy.worstGap,
      bound: greedyGapTolerance(elem),
    },
  ];
}

for (const elem of elems) {
  const classify = await classifyAccuracy(gpu, elem, lengths, Number(values.documents));
  const rows = [...(values.only === "classify" ? [] : await languageModel(elem)), ...classify.rows];
  for (const shape of values.synthetic?.split(",") ?? []) {
    rows.push(...await syntheticAccuracy(gpu, elem, shape as SyntheticCase));
  }
  results.push({ elem, rows, classify: classify.right });
}

console.log(`${gpu.caps.name} (${gpu.caps.driver})\n`);
console.log("| dtype | compared | largest error | bound | |\n| --- | --- | --- | --- | --- |");
let broken = 0;
for (const { elem, rows } of results) {
  for (const { what, error, bound } of rows) {
    const isKept = error <= bound;
    if (!isKept) broken++;
    console.log(
      `| ${elem} | ${what} | ${error.toPrecision(3)} | ${bound.toPrecision(3)} | ${
        isKept ? "ok" : "BROKEN"
      } |`,
    );
  }
}
console.log("\n| dtype | tokens | right | by the recorded logits |\n| --- | --- | --- | --- |");
for (const { elem, classify } of results) {
  for (const { tokens, right, recorded, documents } of classify) {
    console.log(`| ${elem} | ${tokens} | ${right} of ${documents} | ${recorded} |`);
  }
}
if (values.out) {
  const { name, driver } = gpu.caps;
  writeResult(values.out, { adapter: name, driver, ...provenance(values.commit), results });
}
gpu.destroy();
process.exit(broken > 0 ? 1 : 0);
