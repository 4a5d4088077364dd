/** When kernels are timed; what they are is tested in `cli/bench.test.ts`. */
import { afterAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { chooseKernels } from "../../src/kernels/index.ts";
import { Benchmark } from "../../src/model/benchmark.ts";
import { PUBLISHED_SHAPES } from "../../src/model/config.ts";
import { kernelShape } from "../../src/model/memory_plan.ts";
import { openDevice } from "../../src/runtime/device.ts";

setDefaultTimeout(60_000);

// Software adapters are timed at once; and small copies, so that a single one does not take as long as the warm-up.
const gpu = await openDevice({ restrict: { isSoftware: false, maxBindingBytes: 1 << 20 } });
afterAll(() => gpu.destroy());

/** Times copies. @returns milliseconds from the start to each timed run, and what ended it if anything did */
async function timeCopies(signal: AbortSignal): Promise<{ runsAt: number[]; error: unknown }> {
  const config = { ...PUBLISHED_SHAPES.gpt2, nPositions: 64 };
  const elem = "f32";
  const chosen = chooseKernels(kernelShape(config, elem, gpu.caps), gpu.caps);
  const starting = performance.now();
  const runsAt: number[] = [];
  const onRun = () => runsAt.push(performance.now() - starting);
  const benchmark = new Benchmark(gpu, config, { elem, chosen, runs: 2, signal, onRun });
  try {
    const error = await benchmark.copyRate().then(() => undefined, (e: unknown) => e);
    return { runsAt, error };
  } finally {
    benchmark.destroy();
  }
}

describe("a kernel that is timed on a GPU", () => {
  test("runs for 200 ms before", async () => {
    const { runsAt, error } = await timeCopies(new AbortController().signal);
    expect(error).toBeUndefined();
    expect(runsAt).toHaveLength(2);
    expect(runsAt[0]).toBeGreaterThanOrEqual(200);
  });

  test("can be interrupted meanwhile", async () => {
    const controller = new AbortController();
    const reason = new Error("enough");
    setTimeout(() => controller.abort(reason), 50);
    expect(await timeCopies(controller.signal)).toEqual({ runsAt: [], error: reason });
  });
});
