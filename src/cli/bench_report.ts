/** `bench --report`: one page with plots, self-contained, and the JSON beside it. */
import { mkdir } from "node:fs/promises";
import { join } from "node:path";
import { requireWritable, writeFileAtomically } from "../model/atomic_file.ts";
import { OutputError } from "../runtime/errors.ts";
import { ioReason } from "../runtime/io_error.ts";
import { type Cell, type Figure, reportSections, type Section } from "./bench_plots.ts";
import { type BenchReport, PEAK_NAMES } from "./bench_result.ts";
import { COLOURS, type Draw, type JsonObject, loadPlots } from "./plots.ts";
import { figure } from "./table.ts";

/** Writes a report's page and its JSON; returns the page's path. @throws OutputError */
export type ReportWriter = (report: BenchReport) => Promise<string>;

/**
 * Makes the folder where there is none, and loads what draws: to be called before long measurements.
 * @throws OutputError when the folder cannot be made or written to
 */
export async function openReport(dir: string): Promise<ReportWriter> {
  const [page, json] = [join(dir, "report.html"), join(dir, "report.json")];
  try {
    await mkdir(dir, { recursive: true });
  } catch (error) {
    throw new OutputError(`Cannot make the folder ${dir}: ${ioReason(error)}`, {
      hint: "choose a folder that you may write to",
      cause: error,
    });
  }
  for (const path of [page, json]) await requireWritable(path);
  const draw = await loadPlots();
  return async (report) => {
    await writeText(json, JSON.stringify(report, null, 2) + "\n");
    await writeText(page, await drawReport(report, draw));
    return page;
  };
}

async function writeText(path: string, text: string): Promise<void> {
  await writeFileAtomically(path, (file) => file.write(new TextEncoder().encode(text), 0));
}

/** The page as HTML. */
export async function drawReport(report: BenchReport, draw: Draw): Promise<string> {
  const sections = reportSections(report);
  const parts: string[] = [];
  for (const section of sections) parts.push(await drawSection(section, draw));
  const title = `longform on ${report.adapter}`;
  return `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>${escapeText(title)}</title>
<style>${STYLE}</style>
</head>
<body>
<header>
<h1>${escapeText(title)}</h1>
${drawFacts(report)}
</header>
<nav aria-label="Contents"><ul>
${sections.map(({ id, title }) => `<li><a href="#${id}">${escapeText(title)}</a></li>`).join("\n")}
</ul></nav>
<main>
${parts.join("\n")}
</main>
</body>
</html>
`;
}

function escapeText(text: string): string {
  return text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;").replace(/"/g, "&quot;");
}

/** Text in backquotes is code. */
function formatText(text: string): string {
  return escapeText(text).replace(/`([^`]*)`/g, "<code>$1</code>");
}

const CLOCKS = { gpu: "the GPU's timestamps", wall: "the wall's clock" } as const;

/** What was measured, on what, and with what. */
function drawFacts(report: BenchReport): string {
  const { copy_gb_per_s: copyRate, peak_tflops: peakRate, peak_unit: unit, kernel_clock: clock } = report;
  const facts: [string, string | undefined][] = [
    ["Model", report.model],
    ["Adapter", `${report.adapter} (${report.driver})`],
    ["Software", `longform ${report.version}, ${report.runtime}`],
    ["Timed runs of each", report.runs === null ? undefined : String(report.runs)],
    ["Kernels are timed by", clock === null ? undefined : CLOCKS[clock]],
    ["A kernel that copies memory", copyRate === null ? undefined : `${figure(copyRate)} GB/s`],
    [
      "Arithmetic at its peak",
      peakRate === null ? undefined : `${figure(peakRate)} TFLOP/s: ${PEAK_NAMES[unit]}`,
    ],
    ...(report.sources ?? []).map(({ file, commit, date, command }): [string, string] => [
      "Recorded result",
      [`\`${file}\``, commit && `commit ${commit}`, date, command && `\`${command}\``].filter(Boolean).join(
        ", ",
      ),
    ]),
    ...(report.remarks ?? []).map((remark): [string, string] => ["Note", remark]),
  ];
  const rows = facts.filter(([, value]) => value !== undefined)
    .map(([name, value]) => `<dt>${escapeText(name)}</dt><dd>${formatText(value!)}</dd>`);
  return `<dl>\n${rows.join("\n")}\n</dl>`;
}

async function drawSection({ id, title, figures, missing }: Section, draw: Draw): Promise<string> {
  const drawn: string[] = [];
  for (const one of figures) drawn.push(await drawFigure(one, one.title === title, draw));
  const body = missing === undefined ? drawn.join("\n") : `<p class="missing">${formatText(missing)}</p>`;
  return `<section id="${id}">\n<h2>${escapeText(title)}</h2>\n${body}\n</section>`;
}

/** Colours come from the page's style sheet, which knows its colour scheme. */
const CONFIG: JsonObject = {
  background: "transparent",
  font: "Helvetica, Arial, sans-serif",
  aria: false,
  axis: {
    labelFontSize: 11,
    titleFontSize: 12,
    titleFontWeight: "normal",
    labelColor: "var(--text)",
    titleColor: "var(--text)",
    gridColor: "var(--grid)",
    domainColor: "var(--muted)",
    tickColor: "var(--muted)",
  },
  legend: { orient: "bottom", labelFontSize: 12, labelLimit: 0, labelColor: "var(--text)", offset: 12 },
  view: { stroke: null },
};

/** @param isNamed the heading above says the figure's title */
async function drawFigure(
  { title, caption, spec, header, table }: Figure,
  isNamed: boolean,
  draw: Draw,
): Promise<string> {
  const svg = await draw({
    $schema: "https://vega.github.io/schema/vega-lite/v6.json",
    padding: 6,
    ...spec,
    config: CONFIG,
  });
  const named = svg.replace("<svg ", `<svg role="img" aria-label="${escapeText(title)}" `);
  return `<figure>
${isNamed ? "" : `<h3>${escapeText(title)}</h3>\n`}${named}
<figcaption>${formatText(caption)}</figcaption>
<details>
<summary>Numbers</summary>
<table>
<thead><tr>${header.map((name) => `<th scope="col">${escapeText(name)}</th>`).join("")}</tr></thead>
<tbody>
${table.map((row) => `<tr>${row.map(drawCell).join("")}</tr>`).join("\n")}
</tbody>
</table>
</details>
</figure>`;
}

/** `data-json` says where in report.json the number stands. */
function drawCell({ text, source }: Cell): string {
  if (!source) return `<td>${escapeText(text)}</td>`;
  return `<td class="number"><data value="${source.value}" data-json="${source.path}">${
    escapeText(text)
  }</data></td>`;
}

/** The same hues as `COLOURS`, bright enough to be read on black. */
const DARK_COLOURS = [
  "#56b4e9",
  "#f0954f",
  "#2fc79b",
  "#e08fc3",
  "#e8cf4a",
  "#d0d0d0",
  "#a99cff",
  "#7fd0e8",
  "#ff8a8a",
  "#a8cc4f",
] as const;

function variables(colours: readonly string[], rest: Readonly<Record<string, string>>): string {
  const named = [...colours.map((colour, i) => [`c${i}`, colour]), ...Object.entries(rest)];
  return named.map(([name, value]) => `--${name}: ${value};`).join(" ");
}

const LIGHT = variables(COLOURS, {
  text: "#1c1c1c",
  muted: "#6b6b6b",
  grid: "#e4e4e4",
  paper: "#ffffff",
  grey0: "#c9c9c9",
  grey1: "#a3a3a3",
  grey2: "#dedede",
});
const DARK = variables(DARK_COLOURS, {
  text: "#ececec",
  muted: "#9d9d9d",
  grid: "#333333",
  paper: "#161616",
  grey0: "#5c5c5c",
  grey1: "#7d7d7d",
  grey2: "#3c3c3c",
});

const STYLE = `
:root { color-scheme: light dark; ${LIGHT} }
@media screen and (prefers-color-scheme: dark) { :root { ${DARK} } }
body { margin: 0 auto; max-width: 52rem; padding: 1.5rem; font: 16px/1.5 Helvetica, Arial, sans-serif;
  color: var(--text); background: var(--paper); }
h1 { font-size: 1.6rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 0.5rem; border-bottom: 1px solid var(--grid); }
h3 { font-size: 1rem; margin: 1rem 0 0.5rem; }
a { color: var(--c0); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.15rem 1rem; font-size: 0.875rem; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
nav ul { display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; padding: 0; list-style: none; }
figure { margin: 0 0 1.5rem; }
svg { display: block; max-width: 100%; height: auto; }
figcaption, .missing { font-size: 0.875rem; margin: 0.5rem 0; }
details { font-size: 0.8125rem; overflow-x: auto; }
summary { cursor: pointer; color: var(--muted); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 0.15rem 0.75rem 0.15rem 0; border-bottom: 1px solid var(--grid);
  vertical-align: top; }
.number { text-align: right; }
@media print {
  :root { color-scheme: light; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav, summary { display: none; }
  details::details-content { content-visibility: visible; block-size: auto; }
  svg, tr, h2, h3 { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
}
`;
