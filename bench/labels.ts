/**
 * What labels as texts cost behind a document: milliseconds on the GPU of a document of N tokens alone, as the score head
 * or the output head's one row takes it, and with the likelihoods of so many labels, each in the same run.
 *
 *   bun bench/labels.ts [-m MODEL] [--tokens 1024,4096,16384] [--labels 1,2,5,25] [--runs 10] [--out FILE] [--commit C]
 */
import { parseArgs } from "node:util";
import { Longform } from "../src/model/longform.ts";
import { provenance, writeResult } from "./provenance.ts";

const WORDS =
  ("politics sports science history nature war love travel crime music law money sea church school family " +
    "medicine art animals ghosts games farming engineering philosophy exploration").split(" ");

const { values } = parseArgs({
  options: {
    model: { type: "string", short: "m" },
    tokens: { type: "string", default: "1024,4096,16384" },
    labels: { type: "string", default: "2,5,25" },
    runs: { type: "string", default: "10" },
    out: { type: "string" },
    commit: { type: "string" },
  },
});
const lengths = values.tokens.split(",").map(Number);
const longform = await Longform.load({
  model: values.model,
  uses: ["classify"],
  context: Math.max(...lengths) + 64,
  positions: "repeat",
  profile: { unit: "passes" },
  encodingWorkers: 0,
});
const { profiler, model, config } = longform;
if (!profiler) throw new Error("the device has no timestamps");
const tokenizer = await longform.tokenizer();
const classifier = await model.classifier();
const texts = WORDS.map((word) => Uint32Array.from(tokenizer.encode(` ${word}`)));

/** Median milliseconds on the GPU. */
async function timed(run: () => Promise<{ readonly result: Promise<unknown> }>): Promise<number> {
  const times: number[] = [];
  const until = performance.now() + 200; // its clock falls when a GPU idles
  for (let i = 0; i < Number(values.runs) || performance.now() < until; i++) {
    profiler!.reset();
    await (await run()).result;
    await profiler!.settle();
    times.push(profiler!.busyMs);
  }
  return times.slice(-Number(values.runs)).toSorted((a, b) => a - b)[Number(values.runs) >> 1]!;
}

const rows = [];
for (const tokens of lengths) {
  const ids = Uint32Array.from(
    { length: tokens },
    (_, i) => (i * 7919 + 13) % Math.min(config.vocabSize, 8000),
  );
  // One label of one token needs no branch: the document and one row of the output head.
  const documentMs = await timed(() => classifier.scoreLabels([ids], [texts[0]!.subarray(0, 1)]));
  for (const count of values.labels.split(",").map(Number)) {
    const labels = texts.slice(0, count);
    const labelTokens = labels.reduce((sum, label) => sum + label.length, 0);
    const ms = await timed(() => classifier.scoreLabels([ids], labels));
    rows.push({
      tokens,
      labels: count,
      label_tokens: labelTokens,
      document_ms: documentMs,
      ms,
      ratio: ms / documentMs,
    });
    console.log(
      `${tokens} tokens ${
        documentMs.toFixed(3)
      } ms; with ${count} labels of ${labelTokens} tokens together ` +
        `${ms.toFixed(3)} ms, ${(ms / documentMs).toFixed(3)} times`,
    );
  }
}
const { name, driver } = longform.gpu.caps;
if (values.out) writeResult(values.out, { adapter: name, driver, ...provenance(values.commit), rows });
await longform.close();
