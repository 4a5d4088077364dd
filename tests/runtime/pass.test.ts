/** Dispatches, recorded each time or kept in a list: what they compute, in which order. */
import { afterAll, describe, expect, test } from "bun:test";
import { createBuffer, download, type GpuBuffer, upload } from "../../src/runtime/buffers.ts";
import { createParameters, type Kernel, parametersBytes } from "../../src/runtime/kernel.ts";
import { type Dispatcher, DispatchList, Recorder, type RecorderOptions } from "../../src/runtime/pass.ts";
import { Profiler } from "../../src/runtime/profiler.ts";
import { testDevice } from "../support/device.ts";

const gpu = await testDevice();

/** `x = factor x + shift` for `count` numbers from `first` on: what runs twice, late or not at all shows. */
interface Step {
  readonly first: number;
  readonly count: number;
  readonly factor: number;
  readonly shift: number;
}

const LANES = 32;
/** The kernel's one variant. */
const VARIANT = {};

function affine(paramsIn: "immediates" | "uniform"): Kernel<typeof VARIANT, Step> {
  return {
    name: `affine/${paramsIn}`,
    sources: [{
      file: `affine/${paramsIn}.wgsl`,
      text: `@group(0) @binding(0) var<storage, read_write> x: array<f32>;
@compute @workgroup_size(${LANES})
fn main(@builtin(global_invocation_id) id: vec3u) {
    if (id.x >= params.count) { return; }
    let i = params.first + id.x;
    x[i] = params.factor * x[i] + params.shift;
}
`,
    }],
    bindings: { x: "read_write" },
    params: { first: "u32", count: "u32", factor: "f32", shift: "f32" },
    paramsIn,
    header: () => ({ aliases: {}, consts: {} }),
    workgroupBytes: () => 0,
    workgroupInvocations: () => LANES,
    values: (_, step) => ({ ...step }),
    grid: (_, { count }) => [Math.ceil(count / LANES), 1, 1],
    work: () => ({ bytes: 8 * LENGTH, flops: 0 }),
  };
}

const uniform = affine("uniform");
const immediates = affine("immediates");
await Promise.all([uniform, immediates].map((kernel) => gpu.pipelines.prepare(kernel, VARIANT)));

const LENGTH = 100;
const START = Float32Array.from({ length: LENGTH }, (_, i) => i % 7);
const ALL = { first: 0, count: LENGTH };
/** Small whole numbers, so that f32 is exact; no two of these commute. */
const DOUBLE = { ...ALL, factor: 2, shift: 0 };
const ADD_ONE = { ...ALL, factor: 1, shift: 1 };
const NEGATE_THEN_FIVE = { ...ALL, factor: -1, shift: 5 };
const TAIL = { first: 33, count: 67, factor: 3, shift: -1 };

const owned: { destroy(): void }[] = [];
afterAll(() => {
  for (const one of owned) one.destroy();
});

function keep<T extends { destroy(): void }>(one: T): T {
  owned.push(one);
  return one;
}

/** Fresh numbers to work on. */
function start(label = "x"): GpuBuffer {
  const buffer = keep(createBuffer(gpu, label, "activations", 4 * LENGTH));
  upload(buffer, START);
  return buffer;
}

function parametersFor(sets: number): GpuBuffer {
  return keep(createParameters(gpu, parametersBytes(sets)));
}

async function numbers(buffer: GpuBuffer): Promise<number[]> {
  return [...new Float32Array(await download(buffer), 0, LENGTH)];
}

/** What the steps leave of the fresh numbers. */
function after(...steps: readonly Step[]): number[] {
  const x = [...START];
  for (const { first, count, factor, shift } of steps) {
    for (let i = first; i < first + count; i++) x[i] = factor * x[i]! + shift;
  }
  return x;
}

function take(dispatcher: Dispatcher, x: GpuBuffer, steps: readonly Step[], kernel = uniform): void {
  for (const step of steps) dispatcher.dispatch(kernel, VARIANT, step, { x });
}

/** Records and submits. */
function submit(record: (r: Recorder) => void, options?: RecorderOptions): void {
  const r = new Recorder(gpu, "test", options);
  record(r);
  r.submit();
}

/** More sets of parameters than one of the device's own buffers has room for, two for half of the numbers. */
const MANY = Array.from(
  { length: 150 },
  (_, i): Step => ({ first: i % LENGTH, count: 1, factor: i < LENGTH ? 1 : 2, shift: i }),
);

for (const kernel of [uniform, immediates]) {
  describe(`dispatches with parameters in ${kernel.paramsIn}`, () => {
    test("each get their own, in order", async () => {
      const x = start();
      const steps = [DOUBLE, ADD_ONE, TAIL, DOUBLE, NEGATE_THEN_FIVE];
      submit((r) => take(r, x, steps, kernel));
      expect(await numbers(x)).toEqual(after(...steps));
    });

    test("each get their own in a list", async () => {
      const x = start();
      const steps = [NEGATE_THEN_FIVE, TAIL, DOUBLE, ADD_ONE, DOUBLE];
      const list = new DispatchList(gpu, parametersFor(4));
      take(list, x, steps, kernel);
      expect(await numbers(x)).toEqual(after()); // it has only been made
      submit((r) => r.replay(list));
      expect(await numbers(x)).toEqual(after(...steps));
    });

    test("may have very many sets of them, several times over", async () => {
      const x = start();
      submit((r) => take(r, x, MANY, kernel));
      submit((r) => take(r, x, MANY.toReversed(), kernel));
      expect(await numbers(x)).toEqual(after(...MANY, ...MANY.toReversed()));
    });

    test("are refused beyond the device's grid, without a buffer and without a parameter", () => {
      const x = start();
      const list = new DispatchList(gpu, parametersFor(1));
      const count = LANES * gpu.caps.workgroupsPerDimension + 1;
      const unnamed = { ...kernel, values: () => ({ first: 0, count: 1, factor: 1 }) };
      for (const dispatcher of [list, new Recorder(gpu, "test")]) {
        expect(() => take(dispatcher, x, [{ ...DOUBLE, count }], kernel)).toThrow(
          `${kernel.name} asked for a grid of ${gpu.caps.workgroupsPerDimension + 1} x 1 x 1 workgroups`,
        );
        expect(() => dispatcher.dispatch(kernel, VARIANT, DOUBLE, { y: x })).toThrow(
          `${kernel.name} needs a buffer for "x"`,
        );
        expect(() => dispatcher.dispatch(unnamed, VARIANT, DOUBLE, { x })).toThrow(
          `${kernel.name} got no value for parameter "shift"`,
        );
      }
      expect([...list]).toHaveLength(0);
    });
  });
}

describe("a list", () => {
  test("runs as often as it is replayed, in one submission and in several", async () => {
    const x = start();
    const steps = [DOUBLE, ADD_ONE];
    const list = new DispatchList(gpu, parametersFor(2));
    take(list, x, steps);
    submit((r) => {
      r.replay(list);
      r.replay(list);
    });
    expect(await numbers(x)).toEqual(after(...steps, ...steps));
    submit((r) => r.replay(list));
    submit((r) => r.replay(list));
    expect(await numbers(x)).toEqual(after(...steps, ...steps, ...steps, ...steps));
  });

  test("runs in order with what is recorded around it", async () => {
    const x = start();
    const [between, afterwards] = [start("between"), start("afterwards")];
    const list = new DispatchList(gpu, parametersFor(2));
    take(list, x, [DOUBLE, NEGATE_THEN_FIVE]);
    submit((r) => {
      take(r, x, [ADD_ONE]);
      r.replay(list);
      r.copy(x, 0, between, 0, 4 * LENGTH);
      take(r, x, [TAIL]);
      r.replay(list);
      r.copy(x, 0, afterwards, 0, 4 * LENGTH);
      take(r, x, [DOUBLE]);
    });
    const once = [ADD_ONE, DOUBLE, NEGATE_THEN_FIVE];
    const twice = [...once, TAIL, DOUBLE, NEGATE_THEN_FIVE];
    expect(await numbers(between)).toEqual(after(...once));
    expect(await numbers(afterwards)).toEqual(after(...twice));
    expect(await numbers(x)).toEqual(after(...twice, DOUBLE));
  });

  test("may mix kernels that take parameters from a buffer and as immediates", async () => {
    const x = start();
    const list = new DispatchList(gpu, parametersFor(2));
    take(list, x, [DOUBLE], uniform);
    take(list, x, [ADD_ONE], immediates);
    take(list, x, [TAIL], uniform);
    take(list, x, [NEGATE_THEN_FIVE], immediates);
    // What is dispatched in the meantime is packed into the same memory of the host.
    submit((r) => take(r, start("other"), [TAIL, DOUBLE], immediates));
    submit((r) => r.replay(list));
    submit((r) => r.replay(list));
    const steps = [DOUBLE, ADD_ONE, TAIL, NEGATE_THEN_FIVE];
    expect(await numbers(x)).toEqual(after(...steps, ...steps));
  });

  test("keeps equal sets of parameters once, whatever they are for", async () => {
    const [x, y] = [start("x"), start("y")];
    const list = new DispatchList(gpu, parametersFor(1));
    take(list, x, [DOUBLE, { ...DOUBLE }, DOUBLE]);
    take(list, y, [DOUBLE]);
    submit((r) => r.replay(list));
    expect(await numbers(x)).toEqual(after(DOUBLE, DOUBLE, DOUBLE));
    expect(await numbers(y)).toEqual(after(DOUBLE));
  });

  test("tells sets of parameters apart by every bit", () => {
    const x = start();
    const list = new DispatchList(gpu, parametersFor(3));
    const least = { ...ALL, factor: 1, shift: 2 ** -149 };
    take(list, x, [{ ...least, shift: 0 }, { ...least, shift: -0 }, least]);
    expect(() => take(list, x, [{ ...least, shift: 2 * least.shift }])).toThrow("more sets of parameters");
  });

  test("refuses more sets of parameters than it has room for, and still runs those it has", async () => {
    const x = start();
    const list = new DispatchList(gpu, parametersFor(2));
    take(list, x, [DOUBLE, ADD_ONE]);
    expect(() => take(list, x, [TAIL])).toThrow("The list has more sets of parameters than its buffer");
    take(list, x, [DOUBLE]);
    take(list, x, [TAIL], immediates); // which take no room there
    submit((r) => r.replay(list));
    expect(await numbers(x)).toEqual(after(DOUBLE, ADD_ONE, DOUBLE, TAIL));
  });

  test("without a buffer of its own shares those of the device", async () => {
    const x = start();
    const list = new DispatchList(gpu);
    take(list, x, MANY);
    submit((r) => {
      r.replay(list);
      take(r, x, [DOUBLE]);
      r.replay(list);
    });
    expect(await numbers(x)).toEqual(after(...MANY, DOUBLE, ...MANY));
  });

  test("depends neither on another list's buffer nor on what bind groups are forgotten", async () => {
    const x = start();
    const parameters = createParameters(gpu, parametersBytes(1));
    const gone = new DispatchList(gpu, parameters);
    const list = new DispatchList(gpu, parametersFor(1));
    take(gone, x, [DOUBLE]);
    take(list, x, [DOUBLE]);
    parameters.destroy();
    submit((r) => r.replay(list));
    take(list, x, [DOUBLE]);
    submit((r) => r.replay(list));
    expect(await numbers(x)).toEqual(after(DOUBLE, DOUBLE, DOUBLE));
  });

  test("of some kernels only runs those, in order", async () => {
    const x = start();
    const list = new DispatchList(gpu, parametersFor(2));
    take(list, x, [DOUBLE, ADD_ONE]);
    take(list, x, [TAIL], immediates);
    take(list, x, [DOUBLE]);
    const some = list.only((name) => name === uniform.name);
    expect([list.length, some.length, list.only(() => false).length]).toEqual([4, 3, 0]);
    submit((r) => r.replay(some));
    submit((r) => r.replay(list));
    expect(await numbers(x)).toEqual(after(DOUBLE, ADD_ONE, DOUBLE, DOUBLE, ADD_ONE, TAIL, DOUBLE));
  });

  test("that is empty runs nothing", async () => {
    const x = start();
    submit((r) => r.replay(new DispatchList(gpu)));
    expect(await numbers(x)).toEqual(after());
  });
});

describe("the profiler", () => {
  const untimed = gpu.caps.timestamps ? "" : ": needs timestamp queries";
  const calls = (profiler: Profiler) =>
    new Map(profiler.report().kernels.map(({ kernel, calls }) => [kernel, calls]));

  test.skipIf(untimed !== "")(`counts a list's dispatches each time it runs${untimed}`, async () => {
    const x = start();
    const profiler = keep(new Profiler(gpu));
    const list = new DispatchList(gpu, parametersFor(2));
    take(list, x, [DOUBLE, ADD_ONE]);
    take(list, x, [TAIL], immediates);
    submit((r) => {
      r.replay(list);
      take(r, x, [ADD_ONE]);
      r.replay(list);
    }, { profiler });
    // Two submissions may be under way before their times are read.
    submit((r) => r.replay(list), { profiler });
    await profiler.settle();
    expect(calls(profiler)).toEqual(new Map([[uniform.name, 7], [immediates.name, 3]]));
    const { kernels, gpu: times, untimed } = profiler.report();
    expect(untimed).toBe(0);
    for (const { kernel, gpuMs, bytes } of kernels) {
      expect(gpuMs).toBeGreaterThanOrEqual(0);
      expect(bytes).toBe(8 * LENGTH * calls(profiler).get(kernel)!);
    }
    const sum = kernels.reduce((total, { gpuMs }) => total + gpuMs, 0);
    expect(times.submissions).toBe(2);
    expect(times.kernelsMs).toBeCloseTo(sum, 9);
    expect(times.gapsMs).toBeGreaterThanOrEqual(0);
    expect(times.idleMs).toBeGreaterThanOrEqual(0);
    // Gaps are what the submissions last beyond what ran in them, which counts once where it overlaps.
    expect(times.totalMs - times.gapsMs).toBeCloseTo(profiler.busyMs, 9);
    profiler.reset();
    expect(profiler.report()).toEqual({
      kernels: [],
      gpu: { submissions: 0, kernelsMs: 0, gapsMs: 0, idleMs: 0, totalMs: 0 },
      untimed: 0,
    });
    const steps = [DOUBLE, ADD_ONE, TAIL];
    expect(await numbers(x)).toEqual(after(...steps, ADD_ONE, ...steps, ...steps));
  });

  test.skipIf(untimed !== "")(`times whole passes if asked${untimed}`, async () => {
    const x = start();
    const profiler = keep(new Profiler(gpu, { unit: "passes" }));
    submit((r) => {
      take(r, x, [DOUBLE], immediates);
      take(r, x, [ADD_ONE, TAIL], uniform);
      r.copy(x, 0, start("between"), 0, 4 * LENGTH); // which ends a pass
      take(r, x, [DOUBLE, ADD_ONE], uniform);
    }, { profiler });
    await profiler.settle();
    expect(calls(profiler)).toEqual(new Map([["test", 2]]));
    const sum = profiler.report().kernels.reduce((total, { gpuMs }) => total + gpuMs, 0);
    expect(profiler.busyMs).toBeGreaterThan(0);
    expect(profiler.busyMs).toBeLessThanOrEqual(sum * (1 + 1e-9));
    expect(await numbers(x)).toEqual(after(DOUBLE, ADD_ONE, TAIL, DOUBLE, ADD_ONE));
  });

  test.skipIf(untimed !== "")(`times nothing while it is paused${untimed}`, async () => {
    const x = start();
    const profiler = keep(new Profiler(gpu));
    profiler.isPaused = true;
    submit((r) => take(r, x, [DOUBLE]), { profiler });
    profiler.isPaused = false;
    submit((r) => take(r, x, [ADD_ONE, TAIL]), { profiler });
    await profiler.settle();
    expect(calls(profiler)).toEqual(new Map([[uniform.name, 2]]));
    expect(await numbers(x)).toEqual(after(DOUBLE, ADD_ONE, TAIL));
  });

  test.skipIf(untimed !== "")(
    `says how many dispatches a submission had no queries for${untimed}`,
    async () => {
      const x = start();
      const profiler = keep(new Profiler(gpu));
      submit((r) => {
        for (let i = 0; i < 2050; i++) take(r, x, [DOUBLE], immediates);
      }, { profiler });
      await profiler.settle();
      expect(calls(profiler)).toEqual(new Map([[immediates.name, 2048]]));
      expect(profiler.report().untimed).toBe(2);
    },
  );

  test.skipIf(untimed !== "")(`keeps submissions with their steps and parts if asked${untimed}`, async () => {
    const x = start();
    const profiler = keep(new Profiler(gpu, { keepsAll: true }));
    const list = new DispatchList(gpu);
    list.enter("layer 0");
    take(list, x, [DOUBLE], immediates);
    list.enter("layer 1");
    take(list, x, [ADD_ONE], immediates);
    const before = performance.now();
    submit((r) => {
      r.beginStep("token 5", [6]);
      r.replay(list);
      r.beginStep("token 6", [7]);
      r.replay(list);
    }, { profiler });
    await profiler.settle();
    const [submission] = profiler.submissions;
    expect(submission!.dispatches.map(({ step, part }) => `${step}, ${part}`)).toEqual([
      "token 5, layer 0",
      "token 5, layer 1",
      "token 6, layer 0",
      "token 6, layer 1",
    ]);
    expect(submission!.ticks.length).toBe(8);
    expect(submission!.submittedMs).toBeGreaterThanOrEqual(before);
    expect(submission!.observedMs).toBeGreaterThan(submission!.submittedMs);
    expect(submission!.observedMs).toBeLessThanOrEqual(performance.now());
  });
});
