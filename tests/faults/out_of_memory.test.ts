/** Memory that is used up at each allocation: an error that names the buffer and what would fit, and nothing left over. */
import { afterAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { join } from "node:path";
import { DENSE } from "../../src/kvcache/sparsity.ts";
import { readConfig } from "../../src/model/config.ts";
import { generate } from "../../src/model/generation.ts";
import { Longform } from "../../src/model/longform.ts";
import { openProfiler } from "../../src/model/run_settings.ts";
import { scoreDocument } from "../../src/model/scoring.ts";
import { openSession, saveSession } from "../../src/model/session.ts";
import { tokensOf } from "../../src/model/token_source.ts";
import { type Gpu, openDevice } from "../../src/runtime/device.ts";
import { DoesNotFitError } from "../../src/runtime/errors.ts";
import { temporaryFolder } from "../support/checkpoint.ts";
import { expectFailure, RUN_TIMEOUT_MS, runCli, writeTinyModel } from "../support/cli.ts";
import { loadModel, someIds } from "../support/model.ts";
import { refuseBuffer } from "../support/refuse_memory.ts";

setDefaultTimeout(2 * RUN_TIMEOUT_MS);

const folder = temporaryFolder();
afterAll(folder.remove);
const model = writeTinyModel(join(folder.path, "tiny"), { classes: 3 }).dir;
const { vocabSize } = await readConfig(model);
const PROMPT = someIds(20, vocabSize);
const SAMPLING = { temperature: 1, topK: 0, topP: 1, minP: 0, repeatPenalty: 1, seed: 1 };

/** Loads a model, saves and restores a session, and generates some tokens with their log-probabilities. */
async function generateOnce(gpu: Gpu): Promise<void> {
  const profiler = openProfiler(gpu, { unit: "passes" });
  try {
    const loaded = await loadModel(gpu, model, {
      context: 64,
      elem: "f32",
      decoding: { sequences: 1, inFlight: 2, logprobs: 2 },
      profiler,
    });
    try {
      const origin = { model: "tiny", positions: "exact", attention: "dense" };
      const path = join(folder.path, "session");
      const logits = await loaded.prefill(PROMPT);
      await saveSession(path, { ...origin, ids: Uint32Array.from(PROMPT), logits, rows: loaded.cache });
      loaded.truncate(0);
      const session = (await openSession(path))!;
      await session.restore(loaded.cache, PROMPT.length).finally(() => session.close());
      loaded.cache.adopt(PROMPT.length);
      const prompt = { cached: PROMPT, rest: tokensOf([1]) };
      const options = { maxTokens: 5, sampling: SAMPLING, stop: [], eosIds: [], logprobs: 2 };
      for await (const _ of generate(loaded, prompt, undefined, options));
    } finally {
      loaded.destroy();
    }
  } finally {
    profiler?.destroy();
  }
}

/** Scores a text with sparse attention and compares it with dense attention. */
async function scoreOnce(gpu: Gpu): Promise<void> {
  const loaded = await loadModel(gpu, model, {
    context: 64,
    elem: "f32",
    decoding: undefined,
    sparsity: { pattern: { kind: "local", window: 32 } },
    scoring: true,
    comparing: true,
  });
  try {
    await scoreDocument(loaded, tokensOf(PROMPT), { window: 64, compare: true });
  } finally {
    loaded.destroy();
  }
}

/** @returns what there was no memory for */
async function refusing(nth: number, work: () => Promise<void>): Promise<readonly string[]> {
  const refusal = refuseBuffer(nth);
  const error = await work().then(() => undefined, (reason: unknown) => reason).finally(refusal.restore);
  const { labels } = refusal;
  if (labels.length === 0) {
    expect(error).toBeUndefined();
    return labels;
  }
  expect(error).toBeInstanceOf(DoesNotFitError);
  const { message, hint, exitCode } = error as DoesNotFitError;
  const [, named] = /^The GPU is out of memory: "(.+)" needs [\d.]+ [KM]?i?B besides the /.exec(message) ??
    [];
  expect(labels).toContain(named!);
  expect(hint).toMatch(/`--context|`--dtype f16`|`--adapter`/);
  // What fits must be less than what did not.
  for (const [, context] of hint!.matchAll(/`--context (\d+)`/g)) expect(Number(context)).toBeLessThan(64);
  expect(exitCode).toBe(4);
  return labels;
}

describe("out of memory", () => {
  const runs = [
    ["a generation with a session and a profile", generateOnce, 60, "keys and values"],
    ["a score compared with dense attention", scoreOnce, 50, "divergences"],
  ] as const;
  for (const [name, work, least, label] of runs) {
    test(`at each allocation of ${name}: exit code 4, the buffer's name, nothing left on the device`, async () => {
      let gpu = await openDevice();
      const refused: string[] = [];
      for (let nth = 1;; nth++) {
        const before = gpu.memory.totalBytes;
        const [first] = await refusing(nth, () => work(gpu));
        expect(gpu.memory.totalBytes).toBe(before);
        if (first === undefined) break;
        refused.push(first);
        const isBroken = await gpu.idle().then(() => false, () => true);
        if (!isBroken) continue;
        gpu.destroy();
        gpu = await openDevice();
      }
      gpu.destroy();
      expect(refused.length).toBeGreaterThan(least);
      expect(refused.some((one) => one.includes(label))).toBe(true);
    });
  }

  test("while a model is loaded to classify: exit code 4, and the device is closed", async () => {
    const { prototype } = GPUDevice;
    const { destroy } = prototype;
    let destroyed = 0;
    prototype.destroy = function () {
      destroyed++;
      return destroy.call(this);
    };
    try {
      const classify = async () => {
        const longform = await Longform.load({ model, uses: ["classify"], context: 64, encodingWorkers: 0 });
        for await (const outcome of longform.classify([{ text: "a text" }])) {
          expect(outcome).toHaveProperty("classified");
        }
        await longform.close();
      };
      let loads = 0;
      for (let nth = 1;; nth += 13) {
        const labels = await refusing(nth, classify);
        expect(destroyed).toBe(++loads);
        if (labels.length === 0) break;
      }
      expect(loads).toBeGreaterThan(4);
    } finally {
      prototype.destroy = destroy;
    }
  });

  test("by what the device says of itself: exit code 4 before anything is allocated", async () => {
    const config = await readConfig(model);
    for (const limit of ["memoryBytes", "maxBufferBytes", "maxBindingBytes"] as const) {
      for (const bytes of [1000, 10_000]) {
        const gpu = await openDevice({ restrict: { [limit]: bytes } });
        const options = { context: config.nPositions, elem: "f32", sparsity: DENSE } as const;
        const error = await loadModel(gpu, model, options).then(
          (loaded) => loaded.destroy(),
          (e: unknown) => e,
        );
        if (bytes < 10_000 || limit === "memoryBytes") expect(error).toBeInstanceOf(DoesNotFitError);
        if (error) expect((error as DoesNotFitError).hint).toMatch(/`--context|`--dtype f16`|`--adapter`/);
        if (error) expect(gpu.memory.peakBytes).toBe(0);
        gpu.destroy();
      }
    }
  });

  const preload = join(import.meta.dir, "../support/refuse_memory.ts");
  const commands = [
    ["generate", ["generate", "-m", model, "hello", "-n", "3"], [5, 40]],
    ["generate --prompts", ["generate", "-m", model, "--prompts", "-", "-n", "3"], [30]],
    ["score", ["score", "-m", model, "-", "--json"], [20]],
    ["classify", ["classify", "-m", model, "-", "--json"], [20]],
    ["bench", ["bench", "-m", model, "--contexts", "64", "--runs", "1", "--phases", "gemm"], [1]],
  ] as const;
  for (const [name, args, places] of commands) {
    test(`in ${name}: exit code 4 and one sentence`, async () => {
      for (const nth of places) {
        const env = { REFUSE_BUFFER: String(nth) };
        const result = await runCli(args, { preload, env, stdin: "hello\n" });
        expectFailure(result, 4, /The GPU is out of memory: ".+" needs .*\n\nhint: /);
      }
    });
  }
});
