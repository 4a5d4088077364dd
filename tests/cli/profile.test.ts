/** `--profile` and `--trace`: their sums, what they say where the device cannot time, and runs of every command. */
import { afterAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { formatProfile, kernelProfiles, type ProfileReport } from "../../src/cli/profile.ts";
import { temporaryFolder } from "../support/checkpoint.ts";
import {
  expectFailure,
  RUN_TIMEOUT_MS,
  runCli,
  type RunResult,
  runtimes,
  writeTinyModel,
} from "../support/cli.ts";
import { traceProblems } from "../support/trace.ts";

setDefaultTimeout(RUN_TIMEOUT_MS);

const folder = temporaryFolder();
afterAll(folder.remove);
const model = writeTinyModel(join(folder.path, "tiny")).dir;
const ids = join(folder.path, "ids.json");
await Bun.write(ids, JSON.stringify(Array.from({ length: 40 }, (_, i) => i % 7)));
const withoutTimestamps = join(import.meta.dir, "../support/no_timestamps.ts");

describe("kernelProfiles", () => {
  const peaks = { copyRate: 2e12, rates: { fma: 50e12, matrix: 500e12 }, dispatchMs: 0.002, timestampMs: 0 };
  const time = { kernel: "k", variant: {}, unit: "fma", calls: 2, gpuMs: 2, bytes: 0, flops: 0 } as const;

  test("compares a kernel with what the device can do", () => {
    const [multiplying, streaming, computing] = kernelProfiles([
      { ...time, bytes: 1e9, flops: 1e9 },
      { ...time, bytes: 1e6, flops: 50e9 },
      { ...time, unit: "matrix", flops: 500e9, gpuMs: 4 },
    ], peaks);
    // 1 GB in 2 ms is 500 GB/s; at 2 TB/s it takes half a millisecond.
    expect(streaming).toMatchObject({
      gb_per_s: 500,
      tflops: 0.5,
      floor_ms: 0.5,
      bound: "memory",
      share: 0.25,
    });
    expect(computing).toMatchObject({ tflops: 25, floor_ms: 1, bound: "compute", share: 0.25 });
    expect(multiplying).toMatchObject({ tflops: 125, floor_ms: 1, bound: "compute", share: 0.5 });
  });

  test("takes off what timestamps cost, never more than there is", () => {
    const rows = kernelProfiles([{ ...time, calls: 100, gpuMs: 2 }, {
      ...time,
      kernel: "j",
      calls: 2,
      gpuMs: 0.1,
    }], {
      ...peaks,
      timestampMs: 0.005,
    });
    expect(rows[0]!.gpu_ms).toBeCloseTo(1.5, 12);
    expect(rows[1]!.gpu_ms).toBeCloseTo(0.09, 12);
    const [none] = kernelProfiles([{ ...time, calls: 100, gpuMs: 0.2 }], { ...peaks, timestampMs: 0.005 });
    expect(none!.gpu_ms).toBe(0);
  });

  test("has no floor where the device's rates are not known", () => {
    const [row] = kernelProfiles([{ ...time, bytes: 1e9 }], undefined);
    expect(row).toMatchObject({ gb_per_s: 500, floor_ms: null, bound: null });
  });
});

/** What the reports of all commands keep to. */
function expectConsistent(profile: ProfileReport): void {
  const { gpu, kernels, host, phases, memory, peaks, missing } = profile;
  expect(missing).toEqual([]);
  const sum = kernels.reduce((total, { gpu_ms: ms }) => total + ms, 0);
  expect(gpu!.kernels_ms).toBeCloseTo(sum, 6);
  expect(gpu!.kernels_ms + gpu!.timestamps_ms + gpu!.gaps_ms).toBeCloseTo(gpu!.total_ms, 6);
  expect(gpu!.timestamps_ms).toBeGreaterThanOrEqual(0);
  expect(kernels.reduce((total, { share }) => total + share, 0)).toBeCloseTo(1, 6);
  for (const { bytes, floor_ms: floor } of kernels) {
    expect(bytes).toBeGreaterThan(0);
    expect(floor).toBeGreaterThan(0);
  }
  expect(peaks!.copy_gb_per_s).toBeGreaterThan(0);
  expect(host.compilation.count).toBeGreaterThan(0);
  expect(host.submission.count).toBeGreaterThanOrEqual(gpu!.submissions);
  expect(phases.map(({ name }) => name)).toContain("load weights");
  const atPeak = Object.values(memory.at_peak).reduce((a, b) => a + b, 0);
  expect(atPeak).toBe(memory.peak_bytes);
}

const commands: readonly [string, readonly string[], (stdout: string) => ProfileReport][] = [
  ["generate", ["generate", "--ids", ids, "-n", "4"], (stdout) => JSON.parse(stdout).profile],
  ["score", ["score", "--ids", ids], (stdout) => JSON.parse(stdout)[0].profile],
];

for (const runtime of runtimes) {
  for (const [name, args, profileOf] of commands) {
    test(`${name} on ${runtime} reports and traces`, async () => {
      const trace = join(folder.path, `${name}-${runtime}.json`);
      const more = ["-m", model, "--json", "--profile", "--trace", trace];
      const run = await runCli([...args, ...more], { runtime });
      expect({ code: run.code, notes: run.notes }).toMatchObject({ code: 0 });
      const profile = profileOf(run.stdout);
      expectConsistent(profile);
      const traced = JSON.parse(readFileSync(trace, "utf8"));
      expect(traceProblems(traced)).toEqual([]);
      const names = new Set(traced.traceEvents.map((event: { name: string }) => event.name));
      for (
        const wanted of ["prefill", "layer 0", "layer 1", "output head", "load weights", "GPU memory, bytes"]
      ) {
        expect(names).toContain(wanted);
      }
      // Every timed call is a slice of the trace.
      const slices = traced.traceEvents.filter((event: { cat?: string; args?: object }) =>
        event.cat === "gpu" && event.args
      );
      expect(slices.length).toBe(profile.kernels.reduce((sum, { calls }) => sum + calls, 0));
    });
  }
}

test("the report as text has a line for each kernel, and fits its columns", async () => {
  const run = await runCli(["generate", "-m", model, "--ids", ids, "-n", "2", "--profile"]);
  expect(run.code).toBe(0);
  const lines = run.notes.split("\n");
  const header = lines.find((line) => line.startsWith("kernel "))!;
  const first = lines.indexOf(header) + 1;
  const rows = lines.slice(first, lines.indexOf("", first));
  expect(rows.length).toBeGreaterThan(5);
  const places = header.indexOf("bound by");
  for (const row of rows) expect(row.slice(places)).toMatch(/^(memory|compute)$/);
  expect(run.notes).toMatch(/GPU memory: most .* weights .* KV cache .* activations .* staging/);
});

function expectNoTimes(run: RunResult): ProfileReport {
  expect(run.code).toBe(0);
  const { profile } = JSON.parse(run.stdout);
  expect(profile).toMatchObject({ gpu: null, kernels: [] });
  expect(profile.missing).toEqual([expect.stringMatching(/^GPU times: .* has no timestamp queries$/)]);
  expect(profile.host.submission.count).toBeGreaterThan(0);
  return profile;
}

test("a device without timestamp queries gets the rest, and is told what is missing", async () => {
  const trace = join(folder.path, "untimed.json");
  const args = ["generate", "-m", model, "--ids", ids, "-n", "2", "--json", "--profile", "--trace", trace];
  const profile = expectNoTimes(await runCli(args, { preload: withoutTimestamps }));
  expect(formatProfile(profile)).toMatch(/not measured: GPU times: .* no timestamp queries/);
  const traced = JSON.parse(readFileSync(trace, "utf8"));
  expect(traceProblems(traced)).toEqual([]);
  expect(traced.otherData.gpu).toContain("no timestamps");
});

test("a trace that cannot be written is an error before anything runs", async () => {
  const trace = join(folder.path, "none", "trace.json");
  const run = await runCli(["generate", "-m", model, "--ids", ids, "-n", "2", "--trace", trace]);
  expectFailure(run, 1, /Cannot write .*trace\.json: there is no folder/);
  expect(run.stdout).toBe("");
  expect(existsSync(trace)).toBe(false);
});
