/**
 * Prints, as Markdown, the perplexity of the six recorded books at contexts of 1,024, 4,096 and 16,384 tokens on this
 * machine's adapter, beside the recorded one.
 *
 *     bun scripts/perplexity.ts [--dtype f16|f32] [--books N] [--contexts 1024,4096,16384] [--out FILE.json]
 *         [--commit ID]
 *
 * A few seconds on a GPU; on a CPU `--books 1` takes minutes. Exits 1 if a figure is off by more than 0.2 % in f32 or
 * 0.5 % in f16.
 */
import process from "node:process";
import { parseArgs } from "node:util";
import { provenance, writeResult } from "../bench/provenance.ts";
import { openDevice } from "../src/runtime/device.ts";
import type { Elem } from "../src/runtime/kernel.ts";
import { PERPLEXITY_BOUNDS, perplexityAccuracy, type PerplexityRow } from "../tests/support/accuracy.ts";
import type { RecordedLength } from "../tests/support/golden.ts";

const { values } = parseArgs({
  options: {
    dtype: { type: "string" },
    books: { type: "string", default: "6" },
    contexts: { type: "string", default: "1024,4096,16384" },
    commit: { type: "string" },
    out: { type: "string" },
  },
});

const gpu = await openDevice();
const elems: Elem[] = values.dtype === undefined
  ? (gpu.caps.f16 ? ["f32", "f16"] : ["f32"])
  : [values.dtype as Elem];
const rows: PerplexityRow[] = [];
console.log(`${gpu.caps.name} (${gpu.caps.driver})\n`);
console.log(
  "| dtype | context | perplexity | recorded | off by | tokens/s |\n| --- | --- | --- | --- | --- | --- |",
);
for (const elem of elems) {
  for (const context of values.contexts.split(",").map(Number) as RecordedLength[]) {
    const row = await perplexityAccuracy(gpu, elem, context, Number(values.books));
    rows.push(row);
    console.log(
      `| ${elem} | ${context} | ${row.perplexity.toFixed(4)} | ${row.recorded.toFixed(4)} | ${
        (100 * row.error).toFixed(5)
      } % | ${row.tokensPerSecond.toFixed(0)} |`,
    );
  }
}
if (values.out) {
  const { name, driver } = gpu.caps;
  writeResult(values.out, { adapter: name, driver, ...provenance(values.commit), rows });
}
gpu.destroy();
process.exit(rows.some(({ elem, error }) => !(error <= PERPLEXITY_BOUNDS[elem])) ? 1 : 0);
