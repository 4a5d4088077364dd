/** The model against outputs recorded from PyTorch; `docs/numerics.md` argues the bounds. */
import { describe, expect, test } from "bun:test";
import {
  type AccuracyRow,
  classifyAccuracy,
  greedyAccuracy,
  greedyGapTolerance,
  PERPLEXITY_BOUNDS,
  perplexityAccuracy,
  promptAccuracy,
  shortAccuracy,
  syntheticAccuracy,
} from "../support/accuracy.ts";
import { testDevice, testElems } from "../support/device.ts";

const LONG = 600_000;
const gpu = await testDevice();

function expectKept(rows: readonly AccuracyRow[]): void {
  const broken = rows.filter(({ error, bound }) => !(error <= bound));
  expect(broken.map(({ what, error, bound }) => `${what}: ${error} is over ${bound}`)).toEqual([]);
}

for (const elem of testElems(gpu)) {
  describe(`classics-16k in ${elem}`, () => {
    test("hidden states after every block and the logits match the reference", async () => {
      expectKept(await shortAccuracy(gpu, elem));
    }, LONG);

    test("logits and per-token NLL of 1,024 tokens match the reference", async () => {
      expectKept(await promptAccuracy(gpu, elem, 1024));
    }, LONG);

    test("logits and per-token NLL of 4,096 tokens match the reference", async () => {
      expectKept(await promptAccuracy(gpu, elem, 4096));
    }, LONG);

    // What takes a CPU longest is run there in f32 alone, and of 16,384 tokens half: attention over all of them would take
    // both cores a minute and a half.
    const isSpared = gpu.caps.isSoftware && elem === "f16";
    const spared = isSpared ? " (needs a GPU: in f32 alone on a CPU)" : "";
    const run = gpu.caps.isSoftware ? 8193 : 16384;
    const part = run < 16384 && !isSpared ? ` (needs a GPU for more than ${run})` : spared;
    test.skipIf(isSpared)(`logits and NLL of 16,384 tokens match the reference${part}`, async () => {
      expectKept(await promptAccuracy(gpu, elem, 16384, run));
    }, LONG);

    // On a CPU the first lengths of a few documents.
    const isWhole = !gpu.caps.isSoftware;
    const lengths = isWhole ? [512, 2048, 8192, 16384] as const : [512, 2048] as const;
    const documents = isWhole ? 10 : elem === "f32" ? 2 : 1;
    const few = isWhole ? "" : ` (needs a GPU for more than ${documents} and ${lengths.at(-1)} tokens)`;
    test(`classification logits match the reference${few}`, async () => {
      const { rows, right } = await classifyAccuracy(gpu, elem, lengths, documents);
      expectKept(rows);
      expect(rows).toHaveLength(lengths.length);
      for (const { right: got, recorded } of right) expect(got).toBe(recorded);
    }, LONG);

    const books = gpu.caps.isSoftware ? " (needs a GPU: an hour on a CPU)" : "";
    test.skipIf(gpu.caps.isSoftware)(`perplexity of six books is the recorded one${books}`, async () => {
      for (const context of [1024, 4096, 16384] as const) {
        const { error } = await perplexityAccuracy(gpu, elem, context, 6);
        expect(error).toBeLessThan(PERPLEXITY_BOUNDS[elem]);
      }
    }, LONG);

    test.skipIf(isSpared)(
      `greedy tokens equal the reference's, but for steps where its two best are closer than the tolerance${spared}`,
      async () => {
        // The recorded prompts go up to 16,000 tokens; the longest takes minutes on a CPU.
        const result = await greedyAccuracy(gpu, elem, gpu.caps.isSoftware ? 4096 : 16384);
        expect(result.worstGap).toBeLessThan(greedyGapTolerance(elem));
        expect(result.steps).toBe(result.prompts * 64);
      },
      LONG,
    );
  });

  for (const shape of ["gpt2", "gpt2-medium", "gpt2-16k"] as const) {
    const why = gpu.caps.isSoftware ? " (needs a GPU: an hour on a CPU)" : "";
    test.skipIf(gpu.caps.isSoftware)(`${shape} in ${elem} matches the reference${why}`, async () => {
      expectKept(await syntheticAccuracy(gpu, elem, shape));
    }, LONG);
  }
}
