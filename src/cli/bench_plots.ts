/** What a report of `bench` shows: each figure as a Vega-Lite specification with the table of its numbers. */
import { formatBytes } from "../runtime/buffers.ts";
import { type Elem, sizeOf } from "../runtime/kernel.ts";
import type { ArithmeticUnit } from "../runtime/profiler.ts";
import { type BenchProfile, type BenchReport, type BenchRow, headsOf, nameOf } from "./bench_result.ts";
import type { BenchPhase } from "./options.ts";
import { LABEL_MARK, lineBetween, pixelOf, placeLabels, type Scale } from "./plot_labels.ts";
import { COLOURS, formatTokens, type Json, type JsonObject } from "./plots.ts";
import { labelOf } from "./profile.ts";
import { figure, percent } from "./table.ts";

/** A cell of a table. */
export interface Cell {
  readonly text: string;
  /** Where a number stands in the report's JSON, such as `rows.3.ms.median`. */
  readonly source?: { readonly path: string; readonly value: number };
}

export interface Figure {
  readonly title: string;
  /** What is measured, and how to read it. */
  readonly caption: string;
  readonly spec: JsonObject;
  readonly header: readonly string[];
  readonly table: readonly (readonly Cell[])[];
}

export interface Section {
  readonly id: string;
  readonly title: string;
  readonly figures: readonly Figure[];
  /** Why there is no figure. */
  readonly missing?: string;
}

/** The style sheet gives them to the page's colour scheme: `--c0` and on. */
export const SERIES_COLOURS = COLOURS.map((_, i) => `var(--c${i})`);
const MUTED = "var(--muted)";
const TEXT = "var(--text)";
const SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-left"];

const WIDTH = 620;
const HEIGHT = 300;

/** A row with its place in the report. */
interface Placed extends BenchRow {
  readonly at: number;
}

const says = (text: string): Cell => ({ text });

/** The number at `path` of the report. */
function shows(path: string, value: number | null | undefined, format: (n: number) => string = figure): Cell {
  return value === null || value === undefined ? says("-") : { text: format(value), source: { path, value } };
}

/** All sections, those with nothing to show too. */
export function reportSections(report: BenchReport): Section[] {
  const rows = report.rows.map((row, at) => ({ ...row, at }));
  return [
    rateSection(rows, "prefill"),
    rateSection(rows, "decode"),
    attentionSection(rows),
    productSection(rows),
    memorySection(report, rows),
    shareSection(report),
    rooflineSection(report),
  ];
}

/** Where colours and shapes repeat, they do so out of step. */
function seriesScales(names: readonly string[]): { readonly colour: JsonObject; readonly shape: JsonObject } {
  const scale = (range: readonly string[]) => ({
    domain: names,
    range: names.map((_, i) => range[i % range.length]!),
  });
  return { colour: scale(SERIES_COLOURS), shape: scale(SHAPES) };
}

function legendOf(names: readonly string[]): JsonObject {
  const longest = Math.max(...names.map((name) => name.length));
  return { title: null, columns: Math.max(1, Math.min(4, Math.floor(90 / (longest + 5)))) };
}

const TOKENS_LABEL = "datum.value % 1024 == 0 ? datum.value / 1024 + 'K' : format(datum.value, ',')";

/** Of contexts in tokens. */
function contextAxis(contexts: readonly number[]): JsonObject {
  const values = [...new Set(contexts)].sort((a, b) => a - b);
  return {
    type: "quantitative",
    title: "context, tokens (log scale)",
    scale: { type: "log", base: 2, domain: [values[0]! / 1.2, values.at(-1)! * 1.2], nice: false },
    axis: { values, labelExpr: TOKENS_LABEL, labelOverlap: "greedy" },
  };
}

interface Sample {
  readonly series: string;
  readonly context: number;
  readonly value: number;
  readonly low: number;
  readonly high: number;
}

/** A rate at the median time, with those at the longest and the shortest. */
function rateSample(series: string, { context, ms }: BenchRow, rate: number): Sample {
  const { min, median, max } = ms!;
  return { series, context, value: rate, low: rate * median / max, high: rate * median / min };
}

/** Lines with points and their ranges over contexts. */
function lineSpec(samples: readonly Sample[], title: string, isLog: boolean): JsonObject {
  const names = [...new Set(samples.map(({ series }) => series))];
  const { colour, shape } = seriesScales(names);
  const legend = legendOf(names);
  const y = {
    type: "quantitative",
    title,
    scale: isLog ? { type: "log" } : { zero: true },
    axis: isLog ? { format: "~g", tickCount: 6 } : { format: ",~f" },
  };
  const colourOf = { field: "series", type: "nominal", scale: colour, legend };
  return {
    width: WIDTH,
    height: HEIGHT,
    data: { values: samples as unknown as Json },
    encoding: { x: { field: "context", ...contextAxis(samples.map(({ context }) => context)) } },
    layer: [
      {
        mark: { type: "rule" },
        encoding: { y: { field: "low", ...y }, y2: { field: "high" }, color: colourOf },
      },
      { mark: { type: "line", strokeWidth: 2 }, encoding: { y: { field: "value", ...y }, color: colourOf } },
      {
        mark: { type: "point", filled: true, size: 60, opacity: 1 },
        encoding: {
          y: { field: "value", ...y },
          color: colourOf,
          shape: { field: "series", type: "nominal", scale: shape, legend },
        },
      },
    ],
  };
}

/** Says the type where there are several. */
function seriesNames(rows: readonly BenchRow[]): (row: BenchRow) => string {
  const hasTypes = new Set(rows.map(({ dtype }) => dtype)).size > 1;
  return (row) => hasTypes ? `${nameOf(row)} ${row.dtype}` : nameOf(row);
}

const SPREAD_HEADER = ["variant", "context", "type", "median ms", "min", "max"];

function spreadCells(row: Placed): Cell[] {
  const path = `rows.${row.at}`;
  return [
    says(nameOf(row)),
    shows(`${path}.context`, row.context, formatTokens),
    says(row.dtype),
    shows(`${path}.ms.median`, row.ms?.median),
    shows(`${path}.ms.min`, row.ms?.min),
    shows(`${path}.ms.max`, row.ms?.max),
  ];
}

/** longform before its peers. */
const inOrder = (rows: readonly Placed[]) =>
  rows.toSorted((a, b) =>
    Number(a.peer !== undefined) - Number(b.peer !== undefined) ||
    nameOf(a).localeCompare(nameOf(b), "en", { numeric: true }) || a.context - b.context
  );

/** What was asked for and has no time. */
function failuresOf(rows: readonly BenchRow[]): string {
  const failed = rows.filter(({ ms }) => ms === null);
  if (failed.length === 0) return "";
  const each = failed.map((row) =>
    `${nameOf(row)} at ${formatTokens(row.context)}` +
    (row.needed_bytes === undefined ? "" : `, whose scores need ${formatBytes(row.needed_bytes)}`)
  );
  return ` Not shown, because it did not run: ${each.join("; ")}.`;
}

function rateSection(rows: readonly Placed[], phase: "prefill" | "decode"): Section {
  const what = phase === "prefill" ? "Prefill" : "Decode";
  const section = { id: phase, title: `${what} against context` };
  const own = inOrder(rows.filter((row) => row.phase === phase));
  const timed = own.filter(({ ms, tokens_per_s: rate }) => ms && rate !== null);
  if (timed.length === 0) return { ...section, figures: [], missing: notMeasured(phase, own) };
  const nameIn = seriesNames(timed);
  const samples = timed.map((row) => rateSample(nameIn(row), row, row.tokens_per_s!));
  const measured = phase === "prefill"
    ? "Tokens a second of a prompt of this length, the whole model, timed on the host"
    : "Tokens a second drawn greedily up to a context of this length, the whole model, timed on the host";
  const table = own.map((row) => [
    ...spreadCells(row),
    shows(`rows.${row.at}.tokens_per_s`, row.tokens_per_s),
    shows(`rows.${row.at}.tflops`, row.tflops),
  ]);
  return {
    ...section,
    figures: [{
      title: section.title,
      caption:
        `${measured}; higher is better. Points are medians, vertical lines go from the slowest run to the ` +
        `fastest.${failuresOf(own)}`,
      spec: lineSpec(samples, "tokens/s", false),
      header: [...SPREAD_HEADER, "tokens/s", "TFLOP/s"],
      table,
    }],
  };
}

function notMeasured(phase: BenchPhase, rows: readonly BenchRow[]): string {
  return rows.length === 0 ? `\`${phase}\` was not among the phases.` : failuresOf(rows).trim();
}

/** A figure for each type: kernels of f16 and of f32 do different work. */
function attentionSection(rows: readonly Placed[]): Section {
  const section = { id: "attention", title: "Variants of attention" };
  const own = inOrder(rows.filter(({ phase }) => phase === "attention"));
  const timed = own.filter(({ ms }) => ms);
  if (timed.length === 0) return { ...section, figures: [], missing: notMeasured("attention", own) };
  const figures = [...new Set(timed.map(({ dtype }) => dtype))].map((dtype) => {
    const ofType = own.filter((row) => row.dtype === dtype);
    const samples = ofType.filter(({ ms }) => ms).map((row): Sample => ({
      series: nameOf(row),
      context: row.context,
      value: row.ms!.median,
      low: row.ms!.min,
      high: row.ms!.max,
    }));
    return {
      title: `Attention of one layer, ${dtype}`,
      caption:
        "Causal attention of one layer's heads, kernel alone; lower is better. Both axes are logarithmic: " +
        "quadratic work is a line of slope 2. \u201crandom\u201d is block-sparse with this share of the " +
        "causal blocks; " +
        `\u201cstandard\u201d writes all scores to memory.${failuresOf(ofType)}`,
      spec: lineSpec(samples, "milliseconds (log scale)", true),
      header: [...SPREAD_HEADER, "TFLOP/s", "peak memory"],
      table: ofType.map((row) => [
        ...spreadCells(row),
        shows(`rows.${row.at}.tflops`, row.tflops),
        shows(`rows.${row.at}.peak_bytes`, row.peak_bytes, formatBytes),
      ]),
    };
  });
  return { ...section, figures };
}

function productSection(rows: readonly Placed[]): Section {
  const section = { id: "gemm", title: "Matrix products" };
  const own = inOrder(rows.filter(({ phase }) => phase === "gemm"));
  const timed = own.filter(({ ms, tflops }) => ms && tflops !== null);
  if (timed.length === 0) return { ...section, figures: [], missing: notMeasured("gemm", own) };
  const nameIn = seriesNames(timed);
  const samples = timed.map((row) => rateSample(nameIn(row), row, row.tflops!));
  return {
    ...section,
    figures: [{
      title: "The four matrix products of a layer",
      caption:
        "Arithmetic a second of each product over a prompt of this length, kernel alone; higher is better. " +
        `Vertical lines go from the slowest run to the fastest.${failuresOf(own)}`,
      spec: lineSpec(samples, "TFLOP/s", false),
      header: [...SPREAD_HEADER, "TFLOP/s"],
      table: own.map((row) => [...spreadCells(row), shows(`rows.${row.at}.tflops`, row.tflops)]),
    }],
  };
}

const GIB = 2 ** 30;
/** Steps of a computed curve. */
const STEPS = 48;

/** Memory of a straight line through two measured points, at a context. */
export function straightLine(first: BenchRow, last: BenchRow): (context: number) => number {
  const slope = (last.peak_bytes! - first.peak_bytes!) / (last.context - first.context);
  return (context) => first.peak_bytes! + slope * (context - first.context);
}

/** Bytes of the scores of all of a layer's heads that standard attention writes. */
export function quadraticBytes(heads: number, context: number, dtype: Elem): number {
  return heads * context * context * sizeOf(dtype);
}

interface MemorySample {
  readonly series: string;
  readonly context: number;
  readonly gib: number;
}

function memorySection(report: BenchReport, rows: readonly Placed[]): Section {
  const section = { id: "memory", title: "Peak memory against context" };
  const own = inOrder(rows.filter((row) => row.phase === "prefill" && row.peak_bytes !== null));
  if (own.length === 0) {
    return { ...section, figures: [], missing: "No prefill was measured together with its memory." };
  }
  const heads = headsOf(report);
  const nameIn = seriesNames(own);
  const names = [...new Set(own.map(nameIn))];
  const contexts = own.map(({ context }) => context);
  const [least, most] = [Math.min(...contexts), Math.max(...contexts)];
  const between = least === most
    ? [least]
    : Array.from({ length: STEPS + 1 }, (_, i) => least * (most / least) ** (i / STEPS));
  const points = own.map((row) => ({
    series: nameIn(row),
    context: row.context,
    gib: row.peak_bytes! / GIB,
  }));
  const lines: MemorySample[] = [];
  const scores: MemorySample[] = [];
  const straight = new Map<string, (context: number) => number>();
  for (const name of names) {
    const ofName = own.filter((row) => nameIn(row) === name);
    const [first, last] = [ofName[0]!, ofName.at(-1)!];
    if (first.context === last.context || first.peer !== undefined) continue;
    const line = straightLine(first, last);
    straight.set(name, line);
    for (const context of between.filter((n) => n >= first.context && n <= last.context)) {
      lines.push({ series: `${name}, straight line`, context, gib: line(context) / GIB });
    }
  }
  const types = heads === undefined ? [] : [...new Set(own.map(({ dtype }) => dtype))];
  for (const dtype of types) {
    for (const context of between) {
      scores.push({
        series: `all scores in ${dtype}, computed`,
        context,
        gib: quadraticBytes(heads!, context, dtype) / GIB,
      });
    }
  }
  const measuredNames = names.map((name) => `${name}, measured`);
  const curveNames = [...new Set([...lines, ...scores].map(({ series }) => series))];
  const all = [...measuredNames, ...curveNames];
  const { colour: scale } = seriesScales(all);
  const legend = { ...legendOf(all), symbolType: "circle" };
  const color = { field: "series", type: "nominal", scale, legend };
  const y = {
    field: "gib",
    type: "quantitative",
    title: "GiB (log scale)",
    scale: { type: "log" },
    axis: { format: "~g", tickCount: 6 },
  };
  const x = { field: "context", ...contextAxis(contexts) };
  return {
    ...section,
    figures: [{
      title: "Peak memory of prefill",
      caption:
        "Most bytes of GPU buffers while a prompt is read, weights included; lower is better. Symbols are " +
        "measured. The straight line goes through the first and the last of longform's points: those between " +
        "lie on it where memory grows linearly (on logarithmic axes it bends: at short contexts the weights " +
        "are most of it). " +
        (heads === undefined
          ? "The quadratic of standard attention is left out: the result does not say how many heads there are."
          : `The quadratic is computed, not measured: the scores of one layer's ${heads} heads, ` +
            "heads × N² × bytes of an element."),
      spec: {
        width: WIDTH,
        height: HEIGHT,
        layer: [
          ...[{ values: lines, strokeDash: [6, 3] }, { values: scores, strokeDash: [1, 0] }].map((
            { values, strokeDash },
          ) => ({
            data: { values: values as unknown as Json },
            mark: { type: "line", strokeWidth: 2, strokeDash },
            encoding: { x, y, color },
          })),
          {
            data: { values: points.map((point) => ({ ...point, series: `${point.series}, measured` })) },
            mark: { type: "point", filled: true, size: 70, opacity: 1 },
            encoding: { x, y, color },
          },
        ],
      },
      header: ["variant", "context", "type", "measured", "straight line (computed)", "all scores (computed)"],
      table: own.map((row) => {
        const line = straight.get(nameIn(row));
        return [
          says(nameOf(row)),
          shows(`rows.${row.at}.context`, row.context, formatTokens),
          says(row.dtype),
          shows(`rows.${row.at}.peak_bytes`, row.peak_bytes, formatBytes),
          says(line ? formatBytes(Math.round(line(row.context))) : "-"),
          says(heads === undefined ? "-" : formatBytes(quadraticBytes(heads, row.context, row.dtype))),
        ];
      }),
    }],
  };
}

const NO_PROFILES =
  "The result has no profiles: it was recorded without them, or the device has no timestamps.";
/** Kernels with a colour of their own; the rest are \u201cother kernels\u201d. */
const MOST_KERNELS = 8;
const OTHER = "other kernels";
/** What is no kernel, and its colour. */
const NO_KERNEL = {
  "timestamps": "var(--grey0)",
  "copies and gaps": "var(--grey1)",
  "idle between submissions": "var(--grey2)",
} as const;

function profileName({ phase, variant, context }: BenchProfile): string {
  return `${phase}${variant === "flash" ? "" : ` ${variant}`} ${formatTokens(context)}`;
}

function shareSection({ profiles = [] }: BenchReport): Section {
  const section = { id: "time", title: "Where each millisecond goes" };
  if (profiles.length === 0) return { ...section, figures: [], missing: NO_PROFILES };
  const shares = new Map<string, number>();
  for (const { kernels } of profiles) {
    for (const { kernel, share } of kernels) shares.set(kernel, (shares.get(kernel) ?? 0) + share);
  }
  const named = [...shares].sort((a, b) => b[1] - a[1]).slice(0, MOST_KERNELS).map(([kernel]) => kernel);
  const parts = [
    ...named,
    ...(shares.size > named.length ? [OTHER] : []),
    ...Object.keys(NO_KERNEL),
  ];
  const values = profiles.flatMap((profile) => {
    const { gpu, kernels } = profile;
    const whole = gpu.kernels_ms + gpu.timestamps_ms + gpu.gaps_ms + gpu.idle_ms;
    const run = `${profileName(profile)}: ${figure(whole)} ms`;
    const msOf = (part: string) => {
      if (part === "timestamps") return gpu.timestamps_ms;
      if (part === "copies and gaps") return gpu.gaps_ms;
      if (part === "idle between submissions") return gpu.idle_ms;
      const own = kernels.filter(({ kernel }) => part === OTHER ? !named.includes(kernel) : kernel === part);
      return own.reduce((sum, { gpu_ms: ms }) => sum + ms, 0);
    };
    return parts.map((part, order) => ({ run, part, order, share: whole > 0 ? msOf(part) / whole : 0 }));
  });
  const range = parts.map((part, i) =>
    part in NO_KERNEL
      ? NO_KERNEL[part as keyof typeof NO_KERNEL]
      : part === OTHER
      ? MUTED
      : SERIES_COLOURS[i % SERIES_COLOURS.length]!
  );
  return {
    ...section,
    figures: [{
      title: section.title,
      caption:
        "Time of the GPU in one profiled run each, of decode all its tokens (up to 128), divided among its kernels, and what is none: timestamps, " +
        "copies and gaps within submissions, and the time between submissions. The length of a bar's part is " +
        "its share.",
      spec: {
        width: WIDTH - 120,
        height: { step: 34 },
        data: { values },
        mark: { type: "bar", stroke: "var(--paper)", strokeWidth: 1 },
        encoding: {
          y: { field: "run", type: "nominal", sort: null, title: null, axis: { labelLimit: 0 } },
          x: {
            field: "share",
            type: "quantitative",
            stack: "zero",
            title: "share of the GPU's time",
            scale: { domain: [0, 1] },
            axis: { format: ".0%" },
          },
          color: { field: "part", type: "nominal", scale: { domain: parts, range }, legend: legendOf(parts) },
          order: { field: "order", type: "quantitative" },
        },
      },
      header: ["run", "part", "calls", "ms", "% of kernels"],
      table: profiles.flatMap((profile, i) => {
        const run = says(profileName(profile));
        const { gpu, kernels } = profile;
        const path = `profiles.${i}`;
        return [
          ...kernels.map((kernel, k) => [
            run,
            says(labelOf(kernel, kernels)),
            shows(`${path}.kernels.${k}.calls`, kernel.calls),
            shows(`${path}.kernels.${k}.gpu_ms`, kernel.gpu_ms),
            shows(`${path}.kernels.${k}.share`, kernel.share, percent),
          ]),
          ...([["timestamps_ms", "timestamps"], ["gaps_ms", "copies and gaps"], [
            "idle_ms",
            "idle between submissions",
          ]] as const).map((
            [key, part],
          ) => [run, says(part), says("-"), shows(`${path}.gpu.${key}`, gpu[key]), says("-")]),
        ];
      }),
    }],
  };
}

/** Below, a kernel is in the table alone. */
const LEAST_SHARE = 0.01;

const ROOFS = {
  matrix: "f16 matrices",
  fma: "multiply-adds in f32",
} as const satisfies Record<ArithmeticUnit, string>;

/** One for each phase, at its largest context: more points than that cannot be told apart. */
function rooflineSection({ profiles = [] }: BenchReport): Section {
  const section = { id: "roofline", title: "Roofline" };
  if (profiles.length === 0) return { ...section, figures: [], missing: NO_PROFILES };
  const largest = new Map<string, number>();
  profiles.forEach(({ phase, variant, context }, i) => {
    const key = `${phase} ${variant}`;
    const before = largest.get(key);
    if (before === undefined || profiles[before]!.context < context) largest.set(key, i);
  });
  return { ...section, figures: [...largest.values()].map((at) => roofline(profiles[at]!, at)) };
}

const ROOFLINE_HEIGHT = 360;

function roofline(profile: BenchProfile, at: number): Figure {
  const { kernels, peaks } = profile;
  const placed = kernels.map((kernel, k) => ({ ...kernel, k }));
  const shown = placed.filter(({ share, bytes, flops, tflops }) =>
    share >= LEAST_SHARE && bytes > 0 && flops > 0 && tflops > 0
  );
  const roofs = ([["matrix", peaks.matrix_tflops], ["fma", peaks.fma_tflops]] as const)
    .flatMap(([unit, tflops]) => tflops === null ? [] : [{ unit, tflops }]);
  const copy = peaks.copy_gb_per_s / 1000;
  const top = Math.max(...roofs.map(({ tflops }) => tflops));
  const intensities = [
    ...shown.map(({ bytes, flops }) => flops / bytes),
    ...roofs.map(({ tflops }) => tflops / copy),
  ];
  const [left, right] = [Math.min(...intensities) / 4, Math.max(...intensities) * 8];
  const lowest = Math.min(...shown.map(({ tflops }) => tflops), copy * left) / 2;
  const xScale: Scale = { type: "log", from: left, to: right, size: WIDTH };
  const yScale: Scale = { type: "log", from: top * 2.5, to: lowest, size: ROOFLINE_HEIGHT };
  const pixel = (x: number, y: number) => ({ x: pixelOf(xScale, x), y: pixelOf(yScale, y) });
  const lines = roofs.map(({ unit, tflops }) => ({
    unit,
    label: `${ROOFS[unit]}, ${figure(tflops)} TFLOP/s`,
    points: [[left, copy * left], [tflops / copy, tflops], [right, tflops]] as const,
  }));
  const points = shown.map((kernel) => ({
    text: labelOf(kernel, kernels),
    intensity: kernel.flops / kernel.bytes,
    tflops: kernel.tflops,
    unit: ROOFS[kernel.unit],
  }));
  const titles = [
    ...lines.map(({ label, points }) => ({ text: label, intensity: right, tflops: points[1][1] })),
  ];
  const offsets = placeLabels(
    points.map(({ text, intensity, tflops }) => ({ text, ...pixel(intensity, tflops) })),
    lines.flatMap(({ points: [a, b, c] }) => [
      ...lineBetween(pixel(...a), pixel(...b)),
      ...lineBetween(pixel(...b), pixel(...c)),
    ]),
    WIDTH,
    ROOFLINE_HEIGHT,
  );
  const units = roofs.map(({ unit }) => ROOFS[unit]);
  const x = {
    field: "intensity",
    type: "quantitative",
    title: "arithmetic intensity, operations a byte (log scale)",
    scale: { type: "log", domain: [left, right], nice: false },
    axis: { format: "~g", tickCount: 6 },
  };
  const y = {
    field: "tflops",
    type: "quantitative",
    title: "TFLOP/s (log scale)",
    scale: { type: "log", domain: [lowest, top * 2.5], nice: false },
    axis: { format: "~g", tickCount: 6 },
  };
  const scale = { domain: units, range: SERIES_COLOURS.slice(0, units.length) };
  const legend = legendOf(units);
  return {
    title: `Roofline, ${profileName(profile)}`,
    caption:
      `Kernels of one run that take at least ${
        100 * LEAST_SHARE
      } % of it, with the bytes and the operations ` +
      "that their results need at least. The slanted roof is what copies reach, " +
      `${
        figure(peaks.copy_gb_per_s)
      } GB/s, and the flat ones are arithmetic from registers, all measured behind the ` +
      "run (Williams et al. 2009). The distance to the roof of its kind is what a kernel has left; above the " +
      "slanted one are those whose bytes lie in caches. Kernels without arithmetic are in the table alone.",
    spec: {
      width: WIDTH,
      height: ROOFLINE_HEIGHT,
      layer: [
        ...lines.map(({ points }) => ({
          data: { values: points.map(([intensity, tflops]) => ({ intensity, tflops })) },
          mark: { type: "line", stroke: MUTED, strokeWidth: 1.5 },
          encoding: { x, y },
        })),
        {
          data: { values: titles },
          mark: {
            type: "text",
            align: "right",
            baseline: "bottom",
            dx: -4,
            dy: -4,
            fill: MUTED,
            fontSize: 11,
          },
          encoding: { x, y, text: { field: "text" } },
        },
        {
          data: { values: points },
          mark: { type: "point", filled: true, size: 70, opacity: 1 },
          encoding: {
            x,
            y,
            color: { field: "unit", type: "nominal", scale, legend },
            shape: {
              field: "unit",
              type: "nominal",
              scale: { domain: units, range: SHAPES.slice(0, units.length) },
              legend,
            },
          },
        },
        {
          data: { values: points.map((point, i) => ({ ...point, ...offsets[i]! })) },
          mark: { ...LABEL_MARK, fill: TEXT },
          encoding: { x, y, text: { field: "text" } },
        },
      ],
    },
    header: ["kernel", "GB moved", "GFLOP", "operations a byte (computed)", "GB/s", "TFLOP/s", "ms"],
    table: placed.map((kernel) => {
      const path = `profiles.${at}.kernels.${kernel.k}`;
      return [
        says(labelOf(kernel, kernels)),
        shows(`${path}.bytes`, kernel.bytes, (n) => figure(n / 1e9)),
        shows(`${path}.flops`, kernel.flops, (n) => figure(n / 1e9)),
        says(kernel.bytes > 0 ? figure(kernel.flops / kernel.bytes) : "-"),
        shows(`${path}.gb_per_s`, kernel.gb_per_s),
        shows(`${path}.tflops`, kernel.tflops),
        shows(`${path}.gpu_ms`, kernel.gpu_ms),
      ];
    }),
  };
}
