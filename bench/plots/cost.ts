/**
 * The time of block-sparse attention against its density, at each context: docs/images/cost.svg.
 *
 *     bun bench/plots/cost.ts RESULT.json… [--out FILE.svg]
 *
 * The files are what `longform bench --attention flash,sparse --json` prints: of random blocks, of patterns, or
 * both. Each context needs a row of dense attention in one of them.
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
import { COLOURS, formatTokens } from "../../src/cli/plots.ts";
import { drawPicture, PERCENT, readCommand } from "./picture.ts";

interface Row {
  readonly phase: string;
  /** `flash` is dense; otherwise the pattern, or `random 50 %`. */
  readonly variant: string;
  readonly context: number;
  readonly dtype: string;
  readonly ms: { readonly median: number } | null;
  /** Of block-sparse attention. */
  readonly density?: number;
}

interface Report {
  readonly adapter: string;
  readonly model: string;
  readonly rows: readonly Row[];
}

interface Timed {
  readonly series: string;
  readonly density: number;
  readonly ms: number;
  /** Undefined for random blocks. */
  readonly pattern: string | undefined;
}

/** What sparse attention may take, as a multiple of its density's share of dense attention's time. */
const BOUND = 1.25;
const WIDTH = 620;
const HEIGHT = 460;
const TIME_TICKS = [0.001, 0.01, 0.1, 1, 10, 100, 1000].flatMap((tick) => [tick, 2 * tick, 5 * tick]);
const DENSITY_TICKS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1];

const { files, out } = readCommand("cost.svg");
const reports: Report[] = files.map((file) => JSON.parse(readFileSync(file, "utf8")));
const [first] = reports;
if (!first) throw new Error("name a file that `longform bench --json` printed");
if (reports.some(({ adapter }) => adapter !== first.adapter)) {
  throw new Error("the files are of several adapters");
}
const rows = reports.flatMap((report) => report.rows).filter(({ phase }) => phase === "attention");
const types = new Set(rows.map(({ dtype }) => dtype));

function seriesOf({ context, dtype }: Row): string {
  return formatTokens(context) + (types.size > 1 ? ` ${dtype}` : "");
}

const dense = new Map<string, number>();
for (const row of rows) if (row.variant === "flash" && row.ms) dense.set(seriesOf(row), row.ms.median);
const timed = rows.flatMap((row): Timed[] => {
  if (row.density === undefined || !row.ms) return [];
  const series = seriesOf(row);
  if (!dense.has(series)) throw new Error(`there is no time of dense attention at ${series}`);
  const pattern = row.variant.startsWith("random ") ? undefined : row.variant;
  return [{ series, density: row.density, ms: row.ms.median, pattern }];
});
/** Only of contexts that have something to compare. */
const rules = [...dense].flatMap(([series, ms]) =>
  timed.some((one) => one.series === series) ? [{ series, ms, density: 1 }] : []
);

const leastOf = (some: readonly Timed[]) => Math.min(...some.map(({ density }) => density)) / 1.3;
const least = leastOf(timed);
const bounds = rules.map(({ series, ms }) => {
  const from = leastOf(timed.filter((one) => one.series === series));
  return [{ series, density: from, ms: BOUND * from * ms }, { series, density: 1, ms: BOUND * ms }];
});
const times = [...timed, ...rules, ...bounds.flat()].map(({ ms }) => ms);
const x: Scale = { type: "log", from: least, to: 1.1, size: WIDTH };
const y: Scale = { type: "log", from: 1.2 * Math.max(...times), to: Math.min(...times) / 1.2, size: HEIGHT };
const placeOf = ({ density, ms }: { readonly density: number; readonly ms: number }) => ({
  x: pixelOf(x, density),
  y: pixelOf(y, ms),
});

const named = timed.filter(({ pattern }) => pattern !== undefined);
const random = timed.filter(({ pattern }) => pattern === undefined);
const lines = [
  ...bounds.flatMap(([low, high]) => lineBetween(placeOf(low!), placeOf(high!))),
  ...rules.flatMap((rule) =>
    lineBetween(placeOf({ ...rule, density: x.from }), placeOf({ ...rule, density: x.to }))
  ),
  ...random.map(placeOf),
];
const offsets = placeLabels(
  named.map((one) => ({ ...placeOf(one), text: one.pattern! })),
  lines,
  WIDTH,
  HEIGHT,
);
const names = named.map(({ series, density, ms, pattern }, i) => ({
  series,
  density,
  ms,
  text: pattern!,
  ...offsets[i]!,
}));
const heights = rules.map((rule) => placeOf(rule).y);
const moved = spread(heights, HEIGHT);
const ends = rules.map((rule, i) => ({
  ...rule,
  text: `${rule.series} dense: ${Number(rule.ms.toPrecision(3))} ms`,
  dx: 6 + WIDTH - placeOf(rule).x,
  dy: moved[i]! - heights[i]!,
  align: "left",
}));

const series = [...dense.keys()];
const color = {
  field: "series",
  type: "nominal",
  scale: { domain: series, range: series.map((_, i) => COLOURS[i % COLOURS.length]!) },
  legend: null,
};
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
  y: {
    field: "ms",
    type: "quantitative",
    scale: { type: "log", domain: [y.to, y.from], nice: false },
    axis: {
      title: "time of one layer's attention, ms",
      values: TIME_TICKS.filter((tick) => tick >= y.to && tick <= y.from),
      format: "~g",
    },
  },
  color,
};
await drawPicture({
  title: {
    text: "Block-sparse attention: time against density",
    subtitle: [
      `${first.adapter}, ${first.model}`,
      `level lines: dense attention; dashed: ${BOUND} × density × dense`,
      "circles: random blocks; dots: patterns; a colour for each context",
    ],
  },
  width: WIDTH,
  height: HEIGHT,
  layer: [
    {
      data: { values: rules },
      mark: { type: "rule", strokeWidth: 1.2 },
      encoding: { y: encoding.y, color },
    },
    {
      data: { values: bounds.flat() },
      mark: { type: "line", strokeDash: [5, 4], strokeWidth: 1.2 },
      encoding,
    },
    {
      data: { values: random.map(({ series, density, ms }) => ({ series, density, ms })) },
      mark: { type: "point", filled: false, size: 45, strokeWidth: 1.6, opacity: 1 },
      encoding,
    },
    { data: { values: names }, mark: { type: "point", filled: true, size: 50, opacity: 1 }, encoding },
    {
      data: { values: [...names, ...ends] },
      mark: LABEL_MARK,
      encoding: { ...encoding, text: { field: "text" } },
    },
  ],
}, out);
