/** `bench compare`: ratios with their spread, and no claim that the spread does not allow. */
import { afterAll, expect, test } from "bun:test";
import { join } from "node:path";
import { compareResults, type Comparison } from "../../src/cli/bench_compare.ts";
import type { BenchReport, BenchRow, Spread } from "../../src/cli/bench_result.ts";
import { temporaryFolder } from "../support/checkpoint.ts";
import { expectFailure, runCli } from "../support/cli.ts";

const folder = temporaryFolder();
afterAll(folder.remove);

function row(context: number, ms: Spread | null, more: Partial<BenchRow> = {}): BenchRow {
  return {
    ...{ phase: "prefill", variant: "flash", context, dtype: "f16", ms, tokens_per_s: null, tflops: null },
    ...{ gb_per_s: null, peak_bytes: null },
    ...more,
  };
}

function result(rows: readonly BenchRow[], more: Partial<BenchReport> = {}): BenchReport {
  return {
    ...{ adapter: "a", driver: "d", runtime: "Bun", version: "0", model: "m", runs: 3, kernel_clock: "gpu" },
    ...{ copy_gb_per_s: null, peak_tflops: null, peak_unit: "fma", rows },
    ...more,
  };
}

const ten: Spread = { min: 8, median: 10, max: 12 };
const before = result([
  row(1, ten),
  row(2, ten),
  row(3, ten),
  row(4, ten),
  row(5, ten),
  row(6, null),
  row(7, ten),
]);
const after = result([
  row(1, { min: 4, median: 5, max: 7.9 }, { peak_bytes: 50 }),
  row(2, { min: 4, median: 5, max: 8 }),
  row(3, { min: 12.1, median: 20, max: 24 }),
  row(4, { min: 12, median: 20, max: 24 }),
  row(5, null, { error: "does not fit" }),
  row(6, ten),
  row(7, ten, { dtype: "f32" }),
]);

test("faster and slower only where no runs are alike", () => {
  const { rows, only_a: onlyA, only_b: onlyB } = compareResults("A", before, "B", after);
  expect(rows.map(({ verdict }) => verdict)).toEqual([
    ...["faster", "same within spread", "slower", "same within spread", null, null],
  ] as typeof rows[number]["verdict"][]);
  // 4 ms of 12 at least, 7.9 of 8 at most.
  expect(rows[0]!.ratio).toEqual({ min: 4 / 12, median: 0.5, max: 7.9 / 8 });
  expect(rows[4]).toMatchObject({ a_ms: ten, b_ms: null, ratio: null });
  expect(onlyA).toEqual([{ phase: "prefill", variant: "flash", context: 7, dtype: "f16" }]);
  expect(onlyB).toEqual([{ phase: "prefill", variant: "flash", context: 7, dtype: "f32" }]);
});

test("no claim where one of the results has a single run", () => {
  const once = result([row(1, { min: 5, median: 5, max: 5 })]);
  for (const [a, b] of [[before, once], [once, before], [once, once]] as const) {
    expect(compareResults("A", a, "B", b).rows[0]!.verdict).toBe("no spread");
  }
});

test("memory, and peers apart from longform", () => {
  const a = result([row(1, ten, { peak_bytes: 200 }), row(1, ten, { peer: "p" })]);
  const { rows, only_a: onlyA } = compareResults("A", a, "B", after);
  expect(rows.map((one) => one.memory_ratio)).toEqual([0.25]);
  expect(onlyA).toEqual([{ phase: "prefill", peer: "p", variant: "flash", context: 1, dtype: "f16" }]);
});

test("a result and itself are the same", () => {
  const { rows, differences, only_a: onlyA, only_b: onlyB } = compareResults("A", before, "A", before);
  expect({ differences, onlyA, onlyB }).toEqual({ differences: [], onlyA: [], onlyB: [] });
  for (const one of rows) expect([null, "same within spread"]).toContain(one.verdict);
});

test("the command: a table or JSON on stdout, differences on stderr", async () => {
  const [a, b] = [join(folder.path, "a.json"), join(folder.path, "b.json")];
  await Bun.write(a, JSON.stringify(before));
  await Bun.write(b, JSON.stringify({ ...after, adapter: "other" }));
  const { code, stdout, notes } = await runCli(["bench", "compare", a, b]);
  expect(code).toBe(0);
  expect(notes).toBe(
    `note: the adapter differs: a in ${a}, other in ${b}\nnote: the dtype differs: f16 in ${a}, f16 and f32 in ${b}\n`,
  );
  expect(stdout).toMatch(/prefill +flash +1 +f16 +10 +5 +0\.500 +0\.333 to 0\.988 +- +faster\n/);
  expect(stdout).toContain("only in A:\n  prefill flash 7 f16\n");
  const json = await runCli(["bench", "compare", a, b, "--json", "-q"]);
  const comparison: Comparison = JSON.parse(json.stdout);
  expect(comparison.rows).toEqual([...compareResults(a, before, b, after).rows]);
  expectFailure(
    await runCli(["bench", "compare", a, join(folder.path, "none")]),
    1,
    /There is no file .*none/,
  );
});
