/** `bench compare A B`: two results of `bench`, row by row. */
import {
  type BenchReport,
  type BenchRow,
  keyOf,
  nameOf,
  readBenchResult,
  type Spread,
} from "./bench_result.ts";
import { writeJson, writeNote, writeResult } from "./output.ts";
import { figure, formatTable, shortName } from "./table.ts";

/** A claim only where no run of one result is as fast as any of the other, and there are several of each. */
export type Verdict = "faster" | "slower" | "same within spread" | "no spread";

/** A measurement that both results have. Ratios are of B to A: below 1, B takes less. */
export interface ComparedRow extends Pick<BenchRow, "phase" | "peer" | "variant" | "context" | "dtype"> {
  readonly a_ms: Spread | null;
  readonly b_ms: Spread | null;
  /** Of the medians, and the smallest and largest that two runs have; null where one of them did not run. */
  readonly ratio: Spread | null;
  readonly verdict: Verdict | null;
  readonly a_peak_bytes: number | null;
  readonly b_peak_bytes: number | null;
  readonly memory_ratio: number | null;
}

type NamedRow = Pick<BenchRow, "phase" | "peer" | "variant" | "context" | "dtype">;

/** What `--json` prints. */
export interface Comparison {
  readonly a: string;
  readonly b: string;
  /** In what the two runs differ besides their times. */
  readonly differences: readonly string[];
  readonly rows: readonly ComparedRow[];
  readonly only_a: readonly NamedRow[];
  readonly only_b: readonly NamedRow[];
}

/** Runs the command. @returns 0 @throws InputError for files that are no results */
export async function runCompare(
  [a, b]: readonly [a: string, b: string],
  options: { readonly json: boolean },
): Promise<number> {
  const [first, second] = [await readBenchResult(a), await readBenchResult(b)];
  const comparison = compareResults(a, first, b, second);
  for (const difference of comparison.differences) writeNote(`note: ${difference}`);
  if (options.json) writeJson(comparison);
  else writeResult(formatComparison(comparison));
  return 0;
}

const DIFFERING = ["adapter", "driver", "model"] as const;

export function compareResults(a: string, first: BenchReport, b: string, second: BenchReport): Comparison {
  const theirs = new Map(second.rows.map((row) => [keyOf(row), row]));
  const ours = new Set(first.rows.map(keyOf));
  return {
    a,
    b,
    differences: [
      ...DIFFERING.map((field) => [field, first[field], second[field]]),
      ["dtype", typesOf(first), typesOf(second)],
    ].filter(([, one, other]) => one !== other)
      .map(([field, one, other]) =>
        `the ${field} differs: ${shortName(one!)} in ${a}, ${shortName(other!)} in ${b}`
      ),
    rows: first.rows.flatMap((row) => {
      const other = theirs.get(keyOf(row));
      return other ? [compareRows(row, other)] : [];
    }),
    only_a: first.rows.filter((row) => !theirs.has(keyOf(row))).map(named),
    only_b: second.rows.filter((row) => !ours.has(keyOf(row))).map(named),
  };
}

function typesOf({ rows }: BenchReport): string {
  return [...new Set(rows.map(({ dtype }) => dtype))].sort().join(" and ");
}

function named({ phase, peer, variant, context, dtype }: NamedRow): NamedRow {
  return { phase, ...(peer === undefined ? {} : { peer }), variant, context, dtype };
}

function compareRows(a: BenchRow, b: BenchRow): ComparedRow {
  const [before, after] = [a.ms, b.ms];
  const both = before && after;
  return {
    ...named(a),
    a_ms: before,
    b_ms: after,
    ratio: both
      ? {
        min: after.min / before.max,
        median: after.median / before.median,
        max: after.max / before.min,
      }
      : null,
    verdict: both ? verdictOf(before, after) : null,
    a_peak_bytes: a.peak_bytes,
    b_peak_bytes: b.peak_bytes,
    memory_ratio: a.peak_bytes !== null && a.peak_bytes > 0 && b.peak_bytes !== null
      ? b.peak_bytes / a.peak_bytes
      : null,
  };
}

function verdictOf(before: Spread, after: Spread): Verdict {
  // One run each says nothing of how far two runs are apart.
  if (before.min === before.max || after.min === after.max) return "no spread";
  if (after.max < before.min) return "faster";
  return after.min > before.max ? "slower" : "same within spread";
}

const HEADER = [
  "phase",
  "variant",
  "context",
  "type",
  "ms A",
  "ms B",
  "B/A",
  "least to most",
  "memory B/A",
  "B is",
];

export function formatComparison({ a, b, rows, only_a: onlyA, only_b: onlyB }: Comparison): string {
  const cells = rows.map((row) => [
    ...wordsOf(row),
    figure(row.a_ms?.median ?? null),
    figure(row.b_ms?.median ?? null),
    row.ratio ? row.ratio.median.toFixed(3) : "-",
    row.ratio ? `${row.ratio.min.toFixed(3)} to ${row.ratio.max.toFixed(3)}` : "-",
    row.memory_ratio === null ? "-" : row.memory_ratio.toFixed(3),
    row.verdict ?? didNotRun(row),
  ]);
  const table = rows.length === 0
    ? "nothing was measured in both"
    : formatTable(HEADER, cells, [0, 1, HEADER.length - 1]);
  const lists = [["A", onlyA] as const, ["B", onlyB] as const].filter(([, only]) => only.length > 0)
    .map(([name, only]) =>
      [`only in ${name}:`, ...only.map((row) => `  ${wordsOf(row).join(" ")}`)].join("\n")
    );
  return [`A is ${a}\nB is ${b}`, table, ...lists].join("\n\n") + "\n";
}

function didNotRun({ a_ms: before, b_ms: after }: ComparedRow): string {
  if (!before && !after) return "without a time, as A is";
  return before ? "without a time" : "not comparable: A has no time";
}

function wordsOf(row: NamedRow): string[] {
  return [row.phase, shortName(nameOf(row)), row.context.toLocaleString("en-US"), row.dtype];
}
