/** `bench --report`: the page's numbers are the JSON's, recorded results are read, bad ones refused. */
import { afterAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { quadraticBytes, reportSections, straightLine } from "../../src/cli/bench_plots.ts";
import { drawReport, openReport } from "../../src/cli/bench_report.ts";
import {
  type BenchProfile,
  type BenchReport,
  type BenchRow,
  mergeBenchResults,
  readBenchResult,
} from "../../src/cli/bench_result.ts";
import { parseOptions } from "../../src/cli/options.ts";
import { loadPlots } from "../../src/cli/plots.ts";
import type { KernelProfile } from "../../src/cli/profile.ts";
import { LongformError } from "../../src/runtime/errors.ts";
import { temporaryFolder } from "../support/checkpoint.ts";
import { expectFailure, RUN_TIMEOUT_MS, runCli, runtimes, writeTinyModel } from "../support/cli.ts";

setDefaultTimeout(2 * RUN_TIMEOUT_MS);

const folder = temporaryFolder();
afterAll(folder.remove);
const inFolder = (name: string) => join(folder.path, name);
const recorded = (name: string) => join(import.meta.dir, "../../bench/results/h100", name);
const SIDE_BY_SIDE = recorded("side-by-side-gpt2.json");

function row(phase: BenchRow["phase"], context: number, more: Partial<BenchRow> = {}): BenchRow {
  const ms = { min: 0.9 * context, median: context, max: 1.3 * context };
  return {
    ...{
      phase,
      variant: "flash",
      context,
      dtype: "f32",
      ms,
      tokens_per_s: 1000,
      tflops: 0.25,
      gb_per_s: null,
    },
    peak_bytes: 1e6 + 100 * context,
    ...more,
  };
}

function kernel(name: string, gpuMs: number, more: Partial<KernelProfile> = {}): KernelProfile {
  return {
    ...{ kernel: name, variant: {}, calls: 12, gpu_ms: gpuMs, share: gpuMs / 10, bytes: 2e9, flops: 3e12 },
    ...{ gb_per_s: 2000 / gpuMs, tflops: 3 / gpuMs, unit: "fma", floor_ms: 1, bound: "memory" },
    ...more,
  };
}

const profile: BenchProfile = {
  ...{ phase: "prefill", context: 4096, variant: "flash", ms: 12 },
  peaks: { copy_gb_per_s: 2000, fma_tflops: 50, matrix_tflops: 500, timestamp_us: 2 },
  gpu: { total_ms: 11, kernels_ms: 10, timestamps_ms: 0.3, gaps_ms: 0.7, idle_ms: 0.5, submissions: 3 },
  // Ten kernels: two more than have a colour of their own; the last does no arithmetic.
  kernels: Array.from(
    { length: 10 },
    (_, i) =>
      kernel(
        `kernel ${i} <&>`,
        1.9 - 0.2 * i,
        i === 9 ? { flops: 0, tflops: 0 } : { bytes: 10 ** (9 + i / 4) },
      ),
  ),
};

const report: BenchReport = {
  ...{ adapter: 'a <b> & "c"', driver: "d", runtime: "Bun 1", version: "0", model: "tiny", runs: 3 },
  ...{ kernel_clock: "gpu", copy_gb_per_s: 12.5, peak_tflops: 0.5, peak_unit: "fma", heads: 2 },
  rows: [
    ...[1024, 1500, 4096].flatMap((n) => [row("prefill", n), row("decode", n), row("attention", n)]),
    row("prefill", 4096, { peer: "another 1.0" }),
    row("attention", 4096, { variant: "standard", ms: null, needed_bytes: 2 ** 30, error: "too large" }),
    row("gemm", 1024, { variant: "c_fc" }),
  ],
  profiles: [profile],
};
const draw = await loadPlots();

/** Every number of the page that names its place in the JSON, in order. */
function numbersOf(page: string): { readonly path: string; readonly value: number }[] {
  return [...page.matchAll(/<data value="([^"]*)" data-json="([^"]*)">/g)]
    .map(([, value, path]) => ({ path: path!, value: Number(value) }));
}

function at(json: unknown, path: string): unknown {
  return path.split(".").reduce((value, key) => (value as Record<string, unknown>)[key], json);
}

function expectSameNumbers(page: string, json: unknown): Set<string> {
  const numbers = numbersOf(page);
  for (const { path, value } of numbers) {
    expect({ path, value }).toEqual({ path, value: at(json, path) as number });
  }
  return new Set(numbers.map(({ path }) => path));
}

/** The values that figures draw, by section. */
function drawn(of: BenchReport): Map<string, Record<string, unknown>[]> {
  const valuesIn = (spec: unknown): Record<string, unknown>[] => {
    if (Array.isArray(spec)) return spec.flatMap(valuesIn);
    if (typeof spec !== "object" || spec === null) return [];
    return Object.entries(spec).flatMap(([key, value]) =>
      key === "values" && Array.isArray(value) && typeof value[0] === "object" ? value : valuesIn(value)
    );
  };
  return new Map(
    reportSections(of).map(({ id, figures }) => [id, figures.flatMap(({ spec }) => valuesIn(spec))]),
  );
}

describe("the page", () => {
  test("every number is the JSON's, and every row that ran is there", async () => {
    const paths = expectSameNumbers(await drawReport(report, draw), report);
    report.rows.forEach((one, i) => {
      for (const key of ["min", "median", "max"]) {
        expect(paths.has(`rows.${i}.ms.${key}`)).toBe(one.ms !== null);
      }
    });
    profile.kernels.forEach((_, k) => expect(paths.has(`profiles.0.kernels.${k}.gpu_ms`)).toBe(true));
  });

  test("needs nothing else: no script, no address, colours from its style sheet", async () => {
    const page = await drawReport(report, draw);
    expect(page).not.toMatch(/<script|<link|<img|url\(|@import/);
    const addresses = page.match(/https?:[^"\s<]+/g)!;
    expect(new Set(addresses)).toEqual(
      new Set(["http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"]),
    );
    // Texts of results are no markup.
    expect(page).toContain("a &lt;b&gt; &amp; &quot;c&quot;");
    expect(page).not.toContain("<b>");
    const used = new Set([...page.matchAll(/var\(--([a-z0-9]+)\)/g)].map(([, name]) => name!));
    const schemes = [...page.matchAll(/:root \{([^}]*--text:[^}]*)\}/g)].map(([, body]) => body!);
    expect(schemes.length).toBe(2);
    for (const name of used) for (const scheme of schemes) expect(scheme).toContain(`--${name}:`);
    expect(used.size).toBeGreaterThan(8);
    // A figure of Vega's own colours would be wrong in one of the schemes.
    for (const [svg] of page.matchAll(/<svg .*?<\/svg>/gs)) {
      const colours = [...svg.matchAll(/(?:fill|stroke)="([^"]*)"/g)].map(([, colour]) => colour!);
      expect(colours.filter((colour) => !/^(var\(--\w+\)|none|transparent)$/.test(colour))).toEqual([]);
    }
  });

  test("each figure has its axes named, a caption and a table", async () => {
    const page = await drawReport(report, draw);
    const figures = page.match(/<figure>.*?<\/figure>/gs)!;
    // Prefill, decode, attention, products, memory, time, roofline.
    expect(figures.length).toBe(7);
    for (const figure of figures) {
      expect(figure).toMatch(/<figcaption>.{40,}<\/figcaption>/s);
      expect(figure).toContain("<tbody>\n<tr>");
    }
    for (
      const title of [
        ...[
          "context, tokens (log scale)",
          "tokens/s",
          "milliseconds (log scale)",
          "TFLOP/s",
          "GiB (log scale)",
        ],
        ...["arithmetic intensity, operations a byte (log scale)", "share of the GPU's time"],
      ]
    ) {
      expect(page).toContain(`>${title}</text>`);
    }
    for (const label of ["1K", "1,500", "4K"]) expect(figures[0]).toContain(`>${label}</text>`);
  });

  test("a section without numbers says why, in place of its figures", async () => {
    const sections = reportSections({ ...report, rows: [row("decode", 64)], profiles: [] });
    const missing = Object.fromEntries(sections.map(({ id, missing }) => [id, missing]));
    expect(missing["decode"]).toBeUndefined();
    expect(missing["prefill"]).toBe("`prefill` was not among the phases.");
    for (const id of ["attention", "gemm", "memory", "time", "roofline"]) expect(missing[id]).toMatch(/\.$/);
    expect(await drawReport({ ...report, rows: [], profiles: [] }, draw)).not.toContain("<figure>");
  });
});

describe("what is drawn", () => {
  test("rates with their range, and what did not run in words", () => {
    const [first] = drawn(report).get("prefill")!;
    // The slowest run took 1.3 times as long as the median, the fastest 0.9 times.
    expect(first).toMatchObject({ series: "flash", context: 1024, value: 1000 });
    expect(first!["low"]).toBeCloseTo(1000 / 1.3, 9);
    expect(first!["high"]).toBeCloseTo(1000 / 0.9, 9);
    const attention = reportSections(report).find(({ id }) => id === "attention")!;
    expect(attention.figures[0]!.caption).toContain("standard at 4K, whose scores need 1 GiB");
  });

  test("memory: a straight line through linear points, and scores that are quadratic", () => {
    expect(straightLine(report.rows[0]!, report.rows[6]!)(1500)).toBeCloseTo(1e6 + 100 * 1500, 3);
    expect(quadraticBytes(12, 65536, "f16")).toBe(96 * 2 ** 30);
    const values = drawn(report).get("memory")!;
    const seriesOf = (name: string) => values.filter(({ series }) => series === name);
    expect(seriesOf("flash, measured").map(({ gib }) => gib)).toEqual(
      [1024, 1500, 4096].map((n) => (1e6 + 100 * n) / 2 ** 30),
    );
    const [first, last] = [
      seriesOf("all scores in f32, computed")[0]!,
      seriesOf("all scores in f32, computed").at(-1)!,
    ];
    expect((last["gib"] as number) / (first["gib"] as number)).toBeCloseTo(16, 9);
    // Nobody knows how many heads a model has whose result does not say it.
    const { heads: _, ...unknown } = report;
    expect(drawn(unknown).get("memory")!.map(({ series }) => series)).not.toContain(
      "all scores in f32, computed",
    );
  });

  test("the parts of a bar are the whole time, and small kernels share one", () => {
    const parts = drawn(report).get("time")!;
    expect(parts.reduce((sum, { share }) => sum + (share as number), 0)).toBeCloseTo(1, 9);
    const other = parts.find(({ part }) => part === "other kernels")!;
    expect(other["share"]).toBeCloseTo((0.3 + 0.1) / 11.5, 9);
    expect(parts.find(({ part }) => part === "copies and gaps")!["share"]).toBeCloseTo(0.7 / 11.5, 9);
  });

  test("roofs meet the slope of copies at their ridge, and kernels without arithmetic are no points", () => {
    const values = drawn(report).get("roofline")!;
    const hasPoint = (intensity: number, tflops: number) =>
      values.some((one) =>
        Math.abs(one["intensity"] as number - intensity) < 1e-9 &&
        Math.abs(one["tflops"] as number - tflops) < 1e-9
      );
    expect(hasPoint(250, 500)).toBe(true);
    expect(hasPoint(25, 50)).toBe(true);
    const names = values.map(({ text }) => text);
    expect(names).toContain("kernel 0 <&>");
    expect(names).not.toContain("kernel 9 <&>");
  });
});

describe("recorded results", () => {
  test("a run beside peers: all rows that ran, peers by name", async () => {
    const json = JSON.parse(readFileSync(SIDE_BY_SIDE, "utf8"));
    const read = await readBenchResult(SIDE_BY_SIDE);
    const medians = (rows: readonly { ms?: { median: number } | null }[]) =>
      rows.map(({ ms }) => ms?.median ?? null);
    expect(medians(read.rows)).toEqual(
      medians([...json.ours.flatMap((one: { rows: [] }) => one.rows), ...json.peer.rows]),
    );
    expect(read.rows.filter(({ peer }) => peer === "cublas").map(({ variant }) => variant)).toContain(
      "mlp_c_proj",
    );
    expect(read.model).toBe("gpt2, random weights");
  });

  test("several files are one report, which can be read back", async () => {
    const merged = await mergeBenchResults([SIDE_BY_SIDE, recorded("sparse-random.json")]);
    expect(merged.heads).toBe(12);
    expect(merged.remarks!.join()).toContain("3 of the 21 rows");
    const write = await openReport(inFolder("merged/deep"));
    const page = readFileSync(await write(merged), "utf8");
    const json = inFolder("merged/deep/report.json");
    expectSameNumbers(page, JSON.parse(readFileSync(json, "utf8")));
    expect((await readBenchResult(json)).rows).toEqual([...merged.rows]);
  });

  const peers = {
    ...{ adapter: "nvidia-x-1", driver: "d", runtime: "Bun", version: "0", model: "gpt2", dtype: "f16" },
    ours: {
      peer: "longform",
      version: "0",
      provider: "WebGPU",
      device: "NVIDIA X 1",
      dtype: "f16",
      rows: [],
    },
    peers: [
      {
        ...{ peer: "p", version: "1", provider: "cuda", device: "NVIDIA X 1", dtype: "f16" },
        rows: [{ phase: "decode", context: 64, ms: { min: 1, median: 2, max: 3 }, tokens_per_s: 500 }],
      },
      { peer: "q", version: "1", provider: "cpu", device: "a CPU", dtype: "f16", rows: [] },
      {
        peer: "r",
        version: "unknown",
        provider: "unknown",
        device: null,
        dtype: "f16",
        rows: [],
        error: "is not installed",
      },
    ],
  };

  test("peers: by name and provider, and not those that ran elsewhere or not at all", async () => {
    await Bun.write(inFolder("peers.json"), JSON.stringify(peers));
    const { rows, remarks } = await readBenchResult(inFolder("peers.json"));
    expect(rows).toMatchObject([{
      phase: "decode",
      peer: "p 1, cuda",
      context: 64,
      dtype: "f16",
      tokens_per_s: 500,
    }]);
    expect(remarks).toEqual([
      "q ran on a CPU, not on nvidia-x-1: it is no comparison",
      "r was not measured: is not installed",
    ]);
  });

  test("bad files are refused with the file and the field", async () => {
    const write = async (name: string, value: unknown) => {
      await Bun.write(inFolder(name), typeof value === "string" ? value : JSON.stringify(value));
      return inFolder(name);
    };
    const rowsOf = (one: object) => ({ ...report, rows: [one] });
    const bad: [unknown, string][] = [
      ["{", "not valid JSON"],
      [{ adapter: "a" }, "neither `rows` nor `ours`"],
      [{ ...report, driver: 5 }, "`driver` is 5, wanted a text"],
      [
        JSON.stringify({ ...report, driver: 0 }).replace(
          '"driver":0',
          `"driver":${"[".repeat(1e5)}${"]".repeat(1e5)}`,
        ),
        "`driver` is an array, wanted a text",
      ],
      [{ ...report, rows: new Array(10_001).fill(report.rows[0]) }, "`rows` has 10001 entries"],
      [rowsOf({ ...report.rows[0], phase: "lunch" }), '`rows[0]`: `phase` is "lunch"'],
      [rowsOf({ ...report.rows[0], context: -1 }), "`context` is -1"],
      [rowsOf({ ...report.rows[0], ms: { min: 2, median: 1, max: 3 } }), "a median of 1 outside of 2 to 3"],
      [{ ...report, profiles: [{ ...profile, peaks: {} }] }, "`copy_gb_per_s` is missing"],
    ];
    for (const [i, [value, message]] of bad.entries()) {
      const path = await write(`bad-${i}.json`, value);
      const error = await readBenchResult(path).then(() => undefined, (error: Error) => error);
      expect(error?.name).toBe("InputError");
      expect(error?.message).toContain(path);
      expect(error?.message).toContain(message);
    }
    const elsewhere = await write("elsewhere.json", { ...report, adapter: "another" });
    expect(mergeBenchResults([await write("here.json", report), elsewhere])).rejects.toThrow(
      /differ in their adapter: a <b> & "c" in .*here\.json, another in .*elsewhere\.json/,
    );
  });

  test("names that Vega takes for something else are an error, not a stack trace", async () => {
    const rows = report.rows.map((one) => ({ ...one, variant: "constructor" }));
    const error = await drawReport({ ...report, rows }, await loadPlots()).then(
      () => undefined,
      (error: Error) => error,
    );
    expect(error).toBeInstanceOf(LongformError);
    expect(error?.message).toBe("Vega cannot draw these results");
  });
});

describe("the command", () => {
  for (const runtime of runtimes) {
    test(`--from draws without measuring (${runtime})`, async () => {
      const dir = inFolder(`from-${runtime}`);
      const args = ["bench", "--report", dir, "--from", recorded("sparse-random.json"), "--json"];
      const { code, stdout, notes } = await runCli(args, { runtime });
      expect({ code, notes }).toEqual({ code: 0, notes: `wrote ${join(dir, "report.html")} and its JSON\n` });
      expect(stdout).toBe(readFileSync(join(dir, "report.json"), "utf8"));
      expect(expectSameNumbers(readFileSync(join(dir, "report.html"), "utf8"), JSON.parse(stdout)).size)
        .toBeGreaterThan(80);
    });
  }

  test("--report measures, and the page shows what it printed", async () => {
    const dir = inFolder("measured");
    const { dir: model } = writeTinyModel(inFolder("tiny"));
    const { code, stdout } = await runCli([
      ...[
        "bench",
        "-m",
        model,
        "--dtype",
        "f32",
        "--runs",
        "1",
        "--contexts",
        "32",
        "--report",
        dir,
        "--json",
      ],
    ]);
    expect(code).toBe(0);
    const json: BenchReport = JSON.parse(stdout);
    expect(new Set(json.rows.map(({ phase }) => phase))).toEqual(
      new Set(["prefill", "decode", "attention", "gemm"]),
    );
    expect(stdout).toBe(readFileSync(join(dir, "report.json"), "utf8"));
    expectSameNumbers(readFileSync(join(dir, "report.html"), "utf8"), json);
  });

  test("a folder that cannot be is an error before anything is measured", async () => {
    await Bun.write(inFolder("file"), "");
    expectFailure(
      await runCli(["bench", "--report", inFolder("file/below")]),
      1,
      /Cannot make the folder .*file\/below/,
    );
  });

  test("contradictions are errors of the command line", () => {
    const contradictions: [string[], RegExp][] = [
      [["--from", "a.json"], /add `--report`/],
      [["--report", "d", "--from", "a.json", "--phases", "decode"], /`--phases` says what to measure/],
      [["compare", "a.json"], /does not take "compare a.json"/],
      [["compare", "a", "b", "--report", "d"], /prints a table/],
      [["compare", "a", "b", "--runs", "3"], /`--runs` says what to measure, and `compare`/],
    ];
    for (const [args, message] of contradictions) {
      expect(() => parseOptions(["bench", ...args])).toThrow(message);
    }
    expect(parseOptions(["bench", "--report", "d"])).toMatchObject({
      phases: ["prefill", "decode", "attention", "gemm"],
      attention: ["flash", "sparse", "standard"],
      report: "d",
    });
  });
});
