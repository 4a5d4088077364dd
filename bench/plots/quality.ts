/**
 * What block-sparse attention costs in perplexity, by position and against density: docs/images/quality.svg.
 *
 *     bun bench/plots/quality.ts RESULT.json [--out FILE.svg]
 *
 * RESULT.json is what `bench/sparsity.ts --out` writes.
 */
import { readFileSync } from "node:fs";
import {
  LABEL_MARK,
  lineBetween,
  pixelOf,
  placeLabels,
  type Scale,
  spread,
} from "../../src/cli/plot_labels.ts";
import { COLOURS, formatTokens, type JsonObject } from "../../src/cli/plots.ts";
import { drawPicture, PERCENT, readCommand } from "./picture.ts";

interface Score {
  readonly perplexity: number;
  /** Of dense attention on the same tokens. */
  readonly dense_perplexity: number;
}

/** Patterns that choose while decoding have only the ranges in which tokens were decoded. */
interface Bucket extends Score {
  /** Positions, from and below. */
  readonly from: number;
  readonly to: number;
}

interface Row extends Score {
  readonly pattern: string;
  readonly density: number;
  readonly buckets: readonly Bucket[];
}

interface Result {
  readonly rows: readonly Row[];
}

const WIDTH = 400;
const HEIGHT = 340;
/** From this ratio of the largest value to the smallest on, an axis is logarithmic. */
const LOG_FROM = 3;
const RATIO_TICKS = [0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 200, 500, 1000];
const DENSITY_TICKS = [0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1];

function ratio({ perplexity, dense_perplexity: dense }: Score): number {
  return perplexity / dense;
}

function nameOf({ from, to }: Bucket): string {
  return `${formatTokens(from)}–${formatTokens(to)}`;
}

/** From top to bottom, as pixels count. */
function ratioScale(values: readonly number[]): Scale {
  const least = Math.min(1, ...values);
  const most = Math.max(1, ...values);
  if (most / least >= LOG_FROM) return { type: "log", from: most * 1.15, to: least / 1.2, size: HEIGHT };
  const margin = Math.max(0.06 * (most - least), 0.001);
  return { type: "linear", from: most + margin, to: least - 2 * margin, size: HEIGHT };
}

function ratioAxis({ type, from, to }: Scale, title: string): JsonObject {
  return {
    type: "quantitative",
    scale: { type, domain: [to, from], nice: false, ...type === "log" ? {} : { zero: false } },
    axis: {
      title,
      ...type === "log"
        ? { values: RATIO_TICKS.filter((tick) => tick >= to && tick <= from), format: "~g" }
        : {},
    },
  };
}

/** Where dense attention is. */
const DENSE_RULE: JsonObject = {
  data: { values: [{ ratio: 1 }] },
  mark: { type: "rule", color: "#555", strokeWidth: 1 },
  encoding: { y: { field: "ratio", type: "quantitative" } },
};

const POINT = { type: "point", filled: true, size: 45, opacity: 1 };

function byPosition(rows: readonly Row[], color: JsonObject): JsonObject {
  const marks = rows.flatMap((row) =>
    row.buckets.map((bucket) => ({
      pattern: row.pattern,
      position: nameOf(bucket),
      ratio: ratio(bucket),
    }))
  );
  const buckets = rows.flatMap((row) => row.buckets).sort((a, b) => a.from - b.from);
  const positions = [...new Set(buckets.map(nameOf))];
  const ends = rows.map(({ pattern }) => marks.findLast((mark) => mark.pattern === pattern)!);
  const y = ratioScale(marks.map((mark) => mark.ratio));
  const heights = ends.map((end) => pixelOf(y, end.ratio));
  const moved = spread(heights, HEIGHT);
  const names = ends.map((end, i) => ({ ...end, dx: 9, dy: moved[i]! - heights[i]!, align: "left" }));
  const encoding = {
    x: {
      field: "position",
      type: "ordinal",
      sort: positions,
      scale: { type: "point", padding: 0.1 },
      axis: { title: "position in the text, tokens", labelAngle: 0 },
    },
    y: { field: "ratio", ...ratioAxis(y, "perplexity ÷ that of dense attention") },
    color,
  };
  return {
    title: { text: "Perplexity by position", subtitle: "over that of dense attention on the same tokens" },
    width: WIDTH,
    height: HEIGHT,
    layer: [
      DENSE_RULE,
      { data: { values: marks }, mark: "line", encoding },
      { data: { values: marks }, mark: POINT, encoding },
      { data: { values: names }, mark: LABEL_MARK, encoding: { ...encoding, text: { field: "pattern" } } },
    ],
  };
}

function byDensity(rows: readonly Row[], color: JsonObject): JsonObject {
  const marks = rows.map((row) => ({ pattern: row.pattern, density: row.density, ratio: ratio(row) }));
  const least = Math.min(...marks.map(({ density }) => density));
  const x: Scale = { type: "log", from: least / 1.3, to: 1.1, size: WIDTH };
  const y = ratioScale(marks.map((mark) => mark.ratio));
  const points = marks.map((mark) => ({
    x: pixelOf(x, mark.density),
    y: pixelOf(y, mark.ratio),
    text: mark.pattern,
  }));
  const rule = lineBetween({ x: 0, y: pixelOf(y, 1) }, { x: WIDTH, y: pixelOf(y, 1) });
  const offsets = placeLabels(points, rule, WIDTH, HEIGHT);
  const encoding = {
    x: {
      field: "density",
      type: "quantitative",
      scale: { type: "log", domain: [x.from, x.to], nice: false },
      axis: {
        title: "density, kept blocks ÷ causal blocks",
        values: DENSITY_TICKS.filter((tick) => tick >= x.from),
        labelExpr: PERCENT,
      },
    },
    y: { field: "ratio", ...ratioAxis(y, "perplexity ÷ that of dense attention") },
    color,
  };
  return {
    title: {
      text: "Perplexity against density",
      subtitle: "over that of dense attention, all positions",
    },
    width: WIDTH,
    height: HEIGHT,
    layer: [
      DENSE_RULE,
      { data: { values: marks }, mark: POINT, encoding },
      {
        data: { values: marks.map((mark, i) => ({ ...mark, ...offsets[i]! })) },
        mark: LABEL_MARK,
        encoding: { ...encoding, text: { field: "pattern" } },
      },
    ],
  };
}

const { files: [file], out } = readCommand("quality.svg");
if (file === undefined) throw new Error("name the file that bench/sparsity.ts wrote");
const result: Result = JSON.parse(readFileSync(file, "utf8"));
/** A mask file by its name. */
const shortName = (pattern: string) => pattern.replace(/^file:(?:.*\/)?(.*?)(?:\.json)?$/, "$1");
const rows = result.rows
  .filter(({ pattern }) => pattern !== "dense")
  .map((row) => ({ ...row, pattern: shortName(row.pattern) }));
const patterns = rows.map(({ pattern }) => pattern);
const color = {
  field: "pattern",
  type: "nominal",
  scale: { domain: patterns, range: patterns.map((_, i) => COLOURS[i % COLOURS.length]!) },
  legend: null,
};
await drawPicture({ spacing: 30, hconcat: [byPosition(rows, color), byDensity(rows, color)] }, out);
