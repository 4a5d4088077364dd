/** Hostile results of `bench`: what `bench compare` prints of them, and what `bench --report --from` draws. */
import { afterAll } from "bun:test";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import fc from "fast-check";
import { compareResults, formatComparison } from "../../src/cli/bench_compare.ts";
import { drawReport } from "../../src/cli/bench_report.ts";
import { mergeBenchResults, readBenchResult } from "../../src/cli/bench_result.ts";
import { loadPlots } from "../../src/cli/plots.ts";
import { temporaryFolder } from "../support/checkpoint.ts";
import { fuzz, judge, reportTallies, requireShowable } from "../support/fuzz.ts";
import {
  anyBytes,
  anyJson,
  bytesOf,
  damagedBytes,
  damagedJson,
  hostileText,
  jsonOf,
  textOf,
} from "../support/fuzz_input.ts";

reportTallies();
const folder = temporaryFolder();
afterAll(folder.remove);
const [first, second] = [join(folder.path, "a.json"), join(folder.path, "b.json")];

const ms = (median: number) => ({ min: 0.9 * median, median, max: 1.1 * median });
const row = (phase: string, variant: string, context: number, median: number) => ({
  phase,
  variant,
  context,
  dtype: "f16",
  ms: ms(median),
  tokens_per_s: 1000 * context / median,
  tflops: 3.5,
  gb_per_s: 120,
  peak_bytes: 1 << 26,
});
const COMMON = { adapter: "Some GPU", driver: "1.2.3", runtime: "bun", version: "0.1.0", commit: "0123abc" };
const PROFILE = {
  phase: "prefill",
  context: 4096,
  variant: "flash",
  ms: 12,
  peaks: { copy_gb_per_s: 300, fma_tflops: 10, matrix_tflops: null, timestamp_us: 1 },
  gpu: { total_ms: 11, kernels_ms: 10, timestamps_ms: 0.5, gaps_ms: 0.5, idle_ms: 1, submissions: 3 },
  kernels: [{
    kernel: "flash_attention/tiled",
    variant: { elem: "f16", headDim: 64 },
    calls: 12,
    gpu_ms: 8,
    share: 0.8,
    bytes: 1e6,
    flops: 1e9,
    gb_per_s: 100,
    tflops: 3,
    unit: "fma",
    floor_ms: 2,
    bound: "compute",
  }],
};
const BENCH = {
  ...COMMON,
  model: "gpt2, random weights",
  runs: 5,
  kernel_clock: "gpu",
  copy_gb_per_s: 300,
  peak_tflops: 20,
  peak_unit: "matrix",
  heads: 12,
  rows: [
    row("prefill", "flash", 1024, 3),
    row("prefill", "flash", 4096, 12),
    {
      ...row("attention", "sink:64+local:1k", 4096, 2),
      density: 0.2,
      tolerance: 0.01,
      largest_difference: 0.001,
    },
    { ...row("attention", "standard", 4096, 1), ms: null, error: "does not fit", needed_bytes: 1e12 },
    row("decode", "8", 4096, 5),
  ],
  profiles: [PROFILE],
  remarks: ["measured twice"],
};
const SIDE_BY_SIDE = {
  ...COMMON,
  shape: "gpt2",
  ours: [{ process: "longform", rows: [row("gemm", "c_fc", 1024, 1)], copy_gb_per_s: 300, peak_tflops: 2 }],
  peer: {
    process: "peer",
    error: "one line\nanother",
    rows: [{ ...row("gemm", "peer", 1024, 2), kernel: "c_fc" }],
  },
};
const PEERS = {
  ...COMMON,
  model: "gpt2",
  ours: {
    peer: "longform",
    device: "some-gpu",
    version: "1",
    provider: "webgpu",
    dtype: "f16",
    rows: [row("prefill", "x", 1024, 4)],
  },
  peers: [
    {
      peer: "other",
      device: "some-gpu",
      version: "2",
      provider: "cuda",
      dtype: "f16",
      rows: [row("prefill", "y", 1024, 3)],
    },
    { peer: "absent", error: "not installed" },
  ],
};
const WORDS = [
  ...["rows", "ours", "peer", "peers", "profiles", "remarks", "ms", "median", "error", "adapter"],
  ...["model", "phase"],
  ...[
    "variant",
    "context",
    "dtype",
    "f32",
    "attention",
    "decode",
    "gemm",
    "<script>alert(1)</script>",
    '"><img src=x>',
  ],
  ...["javascript:alert(1)", "datum.x", "signal", "</style>", "`<b>`", "gpt2-xl, random weights"],
];

const anyResult = fc.oneof(
  { weight: 6, arbitrary: damagedJson(jsonOf(BENCH), WORDS).map(textOf).map(bytesOf) },
  { weight: 2, arbitrary: damagedJson(jsonOf(SIDE_BY_SIDE), WORDS).map(textOf).map(bytesOf) },
  { weight: 2, arbitrary: damagedJson(jsonOf(PEERS), WORDS).map(textOf).map(bytesOf) },
  { weight: 1, arbitrary: damagedBytes(bytesOf(JSON.stringify(BENCH))) },
  { weight: 1, arbitrary: fc.oneof(anyJson.map(bytesOf), anyBytes) },
);

/** A result as it should be, but for what is called what, and how large the numbers are. */
const renamedResult = fc.record({
  texts: fc.array(fc.oneof(fc.constantFrom(...WORDS), hostileText), { minLength: 6, maxLength: 6 }),
  context: fc.constantFrom(1, 64, 1e9, 2 ** 53, 1e300, 5e-324),
  scale: fc.constantFrom(1, 1e-300, 1e300),
}).map(({ texts: [adapter, driver, variant, kernel, error, key], context, scale }) => {
  const changed = {
    ...BENCH,
    adapter,
    driver,
    model: error,
    remarks: [kernel, error],
    rows: BENCH.rows.map((one, i) => ({
      ...one,
      variant: i % 2 === 0 ? variant : one.variant,
      context: i % 3 === 0 ? context : one.context,
      ms: one.ms && ms(one.ms.median * scale),
      ...("error" in one ? { error } : {}),
    })),
    profiles: [{
      ...PROFILE,
      variant,
      kernels: PROFILE.kernels.map((one) => ({ ...one, kernel, variant: { [key!]: error } })),
    }],
  };
  return bytesOf(JSON.stringify(changed));
});

writeFileSync(second, JSON.stringify(BENCH));
const before = await readBenchResult(second);

fuzz("bench compare: a table or an error", {
  runs: 1200,
  arbitrary: fc.oneof({ weight: 1, arbitrary: renamedResult }, { weight: 4, arbitrary: anyResult }),
  check: async (bytes) => {
    writeFileSync(first, bytes);
    const judged = await judge({ inputBytes: bytes.length, constantBytes: 2 << 20 }, async () => {
      const result = await readBenchResult(first);
      return [compareResults(first, result, second, before), compareResults(second, before, first, result)];
    });
    if (!("value" in judged)) return;
    for (const comparison of judged.value) {
      const text = await judge({ inputBytes: bytes.length }, () => formatComparison(comparison));
      if (!("value" in text)) throw text.error;
      for (const line of text.value.split("\n")) if (line !== "") requireShowable(line);
      for (const difference of comparison.differences) requireShowable(difference);
      JSON.stringify(comparison);
    }
  },
});

fuzz("bench --from: several results as one", {
  runs: 700,
  arbitrary: anyResult,
  check: async (bytes) => {
    writeFileSync(first, bytes);
    await judge({ inputBytes: bytes.length + 4000 }, () => mergeBenchResults([second, first]));
  },
});

const draw = await loadPlots();
/** What a page of ours has no use for: elements, attributes and addresses that run something. */
const ACTIVE = /<(?:script|img|iframe|object|embed|link|b)\b|\bon\w+\s*=\s*["']|javascript:alert\(1\)["']/i;

fuzz("bench --report --from: a page that runs nothing", {
  runs: 8,
  share: 0.005,
  arbitrary: fc.oneof(renamedResult, anyResult),
  check: async (bytes) => {
    writeFileSync(first, bytes);
    const judged = await judge({ inputBytes: bytes.length, constantBytes: 512 << 20 }, async () => {
      return await drawReport(await mergeBenchResults([first]), draw);
    });
    if (!("value" in judged)) return;
    const found = ACTIVE.exec(judged.value);
    if (found) {
      throw new Error(
        `the page has ${JSON.stringify(judged.value.slice(found.index - 60, found.index + 60))}`,
      );
    }
  },
});
