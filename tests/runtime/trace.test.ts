/** Timelines, and what traces make of them and of the GPU's timestamps. */
import { describe, expect, test } from "bun:test";
import type { ProfiledDispatch, TimedSubmission } from "../../src/runtime/profiler.ts";
import { type Span, Timeline } from "../../src/runtime/timeline.ts";
import { chromeTrace } from "../../src/runtime/trace.ts";
import { type Trace, traceProblems } from "../support/trace.ts";

const sleep = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));

function traced(timeline: Timeline, submissions: readonly TimedSubmission[] = []): Trace {
  return JSON.parse([...chromeTrace({ timeline, submissions, about: { adapter: "a GPU" } })].join(""));
}

/** A timeline of given spans: real ones depend on the clock. */
function timelineOf(spans: readonly Partial<Span>[]): Timeline {
  const timeline = new Timeline({ keepsAll: true });
  for (const span of spans) {
    timeline.spans.push({ track: "compilation", name: "kernel", startMs: 0, endMs: 1, bytes: 0, ...span });
  }
  return timeline;
}

const dispatch = (kernel: string, step: string, part: string): ProfiledDispatch => ({
  kernel,
  variant: { elem: "f16" },
  unit: "fma",
  step,
  part,
  work: { bytes: 10, flops: 20 },
});

/** A submission of four dispatches in two parts, 10 us each with 1 us between them, from `first` ns on. */
function submission(first: bigint, submittedMs: number, observedMs: number): TimedSubmission {
  const dispatches = ["layer 0", "layer 0", "layer 1", "layer 1"].map((part, i) =>
    dispatch(`kernel ${i}`, "token 7", part)
  );
  const ticks = BigUint64Array.from(
    dispatches.flatMap((_, i) => [first + BigInt(11_000 * i), first + BigInt(11_000 * i + 10_000)]),
  );
  return { label: "decode", submittedMs, observedMs, dispatches, ticks };
}

describe("a timeline", () => {
  test("adds up spans by track: their sum, the time in which any was under way, and their bytes", async () => {
    const timeline = new Timeline({ keepsAll: false });
    const before = performance.now();
    const ends = [timeline.begin("readbacks", "a"), timeline.begin("readbacks", "b")];
    await sleep(5);
    ends[0]!(100);
    ends[1]!(20);
    const elapsed = performance.now() - before;
    const { spans, ms, busyMs, bytes } = timeline.total("readbacks");
    expect({ spans, bytes }).toEqual({ spans: 2, bytes: 120 });
    expect(busyMs).toBeGreaterThan(4);
    expect(busyMs).toBeLessThanOrEqual(elapsed);
    expect(ms).toBeGreaterThan(1.5 * busyMs); // both, side by side
    expect(timeline.total("uploads")).toEqual({ spans: 0, ms: 0, busyMs: 0, bytes: 0 });
    timeline.resetTotals();
    expect(timeline.total("readbacks")).toEqual({ spans: 0, ms: 0, busyMs: 0, bytes: 0 });
  });

  test("keeps phases alone unless it is for a trace", () => {
    for (const keepsAll of [false, true]) {
      const timeline = new Timeline({ keepsAll });
      timeline.begin("phases", "prefill")();
      timeline.begin("uploads", "tokens")(4);
      timeline.add("tokenization", "text", 2);
      timeline.sampleMemory({ weights: 1, kv: 2, activations: 3, staging: 4 });
      expect(timeline.spans.map(({ name }) => name)).toEqual(
        keepsAll ? ["prefill", "tokens", "text"] : ["prefill"],
      );
      expect(timeline.memory.length).toBe(keepsAll ? 1 : 0);
    }
  });

  test("ends a span whose work fails", async () => {
    const timeline = new Timeline({ keepsAll: false });
    await expect(timeline.during("files", "read", () => Promise.reject(new Error("gone")))).rejects.toThrow(
      "gone",
    );
    expect(timeline.total("files").spans).toBe(1);
  });

  test("names the innermost phase of a moment", () => {
    const phase = (name: string, startMs: number, endMs: number) =>
      ({ track: "phases", name, startMs, endMs }) as const;
    const timeline = timelineOf([
      phase("load weights", 2, 4),
      phase("load the model", 1, 5),
      phase("prefill", 6, 7),
    ]);
    expect([1.5, 3, 5.5, 6.5].map((ms) => timeline.phaseAt(ms))).toEqual([
      "load the model",
      "load weights",
      undefined,
      "prefill",
    ]);
  });
});

describe("a trace", () => {
  test("puts spans that overlap without nesting into rows of their own", () => {
    const trace = traced(timelineOf([
      { name: "a", startMs: 0, endMs: 10 },
      { name: "inside a", startMs: 2, endMs: 3 },
      { name: "across the end of a", startMs: 5, endMs: 15 },
      { name: "behind a", startMs: 10, endMs: 12 },
    ]));
    expect(traceProblems(trace)).toEqual([]);
    const slices = trace.traceEvents.filter(({ ph }) => ph === "X");
    const rowOf = (name: string) => slices.find((slice) => slice.name === name)!.tid;
    expect(rowOf("inside a")).toBe(rowOf("a"));
    expect(rowOf("behind a")).toBe(rowOf("a"));
    expect(rowOf("across the end of a")).not.toBe(rowOf("a"));
    expect(slices.find(({ name }) => name === "inside a")).toMatchObject({ ts: 2000, dur: 1000 });
  });

  test("nests the GPU's submissions, steps, parts and dispatches on the host's clock", () => {
    // Behind a clock that counts nanoseconds since 1970: more than a number holds exactly.
    const first = 1_790_000_000_000_000_001n;
    const trace = traced(new Timeline({ keepsAll: true }), [
      submission(first, 100, 101), // it begins 0.3 ms after it was handed over
      submission(first + 1_700_000n, 102, 103), // at once
    ]);
    expect(traceProblems(trace)).toEqual([]);
    const slices = trace.traceEvents.filter(({ ph }) => ph === "X");
    const rounded = (us: number | undefined) => Math.round(us!);
    const first8 = slices.slice(0, 8).map(({ name, ts, dur }) => ({
      name,
      ts: rounded(ts),
      dur: rounded(dur),
    }));
    expect(first8).toEqual([
      { name: "decode", ts: 100_300, dur: 43 },
      { name: "token 7", ts: 100_300, dur: 43 },
      { name: "layer 0", ts: 100_300, dur: 21 },
      { name: "kernel 0", ts: 100_300, dur: 10 },
      { name: "kernel 1", ts: 100_311, dur: 10 },
      { name: "layer 1", ts: 100_322, dur: 21 },
      { name: "kernel 2", ts: 100_322, dur: 10 },
      { name: "kernel 3", ts: 100_333, dur: 10 },
    ]);
    expect(slices[3]!.args).toEqual({ elem: "f16", bytes: 10, flops: 20 });
    // The first must have ended by 101 ms, which leaves 657 us; the second's end leaves more.
    expect(trace.otherData.gpu_clock).toContain("up to 657 us later");
  });

  test("cuts what overlaps on the GPU, so that slices nest", () => {
    const one = submission(0n, 0, 1);
    one.ticks[3] = 25_000n; // the second ends while the third runs
    const trace = traced(new Timeline({ keepsAll: true }), [one]);
    expect(traceProblems(trace)).toEqual([]);
    const third = trace.traceEvents.find(({ name }) => name === "kernel 2");
    expect(third).toMatchObject({ ts: 25, dur: 7 });
  });

  test("lets slices touch without overlapping, whatever their times", () => {
    const one = submission(0n, 0, 1);
    // As dispatches are timed: each begins where the one before has ended.
    const ends = [0n, 10_100n, 21_300n, 30_700n, 1_000_001n];
    for (let i = 0; i < 4; i++) one.ticks.set([ends[i]!, ends[i + 1]!], 2 * i);
    const trace = traced(new Timeline({ keepsAll: true }), [one]);
    expect(traceProblems(trace)).toEqual([]);
    const kernels = trace.traceEvents.filter(({ name }) => name.startsWith("kernel"));
    for (let i = 1; i < 4; i++) expect(kernels[i]!.ts).toBe(kernels[i - 1]!.ts! + kernels[i - 1]!.dur!);
  });

  test("has memory as a counter, and says where the GPU has no timestamps", () => {
    const timeline = new Timeline({ keepsAll: true });
    const bytes = { weights: 1, kv: 2, activations: 3, staging: 4 };
    timeline.sampleMemory(bytes);
    const trace = traced(timeline);
    expect(traceProblems(trace)).toEqual([]);
    expect(trace.traceEvents.find(({ ph }) => ph === "C")).toMatchObject({
      name: "GPU memory, bytes",
      args: bytes,
    });
    expect(trace.otherData.gpu).toContain("no timestamps");
  });
});
