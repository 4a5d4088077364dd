/**
 * Measures how far the recorded float32 prompts are from the same network in float64, computed by
 * `src/model/reference.ts`: the yardstick of the f32 bounds where the recording does not say.
 *
 *   bun tests/golden/float64.ts
 *
 * Writes tests/golden/float64.json. One core, some forty minutes, nearly all of it for 16,384 tokens.
 */
import { writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { nllReference } from "../../src/kernels/nll/reference.ts";
import { resolveCheckpoint } from "../../src/model/checkpoint.ts";
import { readConfig } from "../../src/model/config.ts";
import { readParameters, referenceForward } from "../../src/model/reference.ts";
import { openCheckpoint } from "../../src/model/safetensors.ts";
import { maxAbsDifference } from "../support/accuracy.ts";
import { loadPrompt } from "../support/golden.ts";

const goldenDir = dirname(fileURLToPath(import.meta.url));
const modelDir = join(goldenDir, "../../weights/classics-16k");
const config = await readConfig(modelDir);
const source = await openCheckpoint(modelDir);
const parameters = await readParameters(source, resolveCheckpoint(source, config));
await source.close();

const differences: Record<string, { logits: number; nll: number; meanNllRelative: number }> = {};
for (const tokens of [1024, 4096, 16384] as const) {
  const golden = loadPrompt(tokens);
  const { logits } = referenceForward(parameters, config, golden.inputIds);
  const rows = [...golden.logits].map(([position, wanted]) => {
    const first = position * config.vocabSize;
    return maxAbsDifference(logits.subarray(first, first + config.vocabSize), wanted);
  });
  const nll = nllReference(logits, golden.inputIds.subarray(1), config.vocabSize);
  const mean = nll.reduce((a, b) => a + b, 0) / nll.length;
  differences[tokens] = {
    logits: Math.max(...rows),
    nll: maxAbsDifference(nll, golden.nll),
    meanNllRelative: Math.abs(golden.meanNll / mean - 1),
  };
  console.log(tokens, differences[tokens]);
}
writeFileSync(join(goldenDir, "float64.json"), JSON.stringify(differences, null, 1) + "\n");
