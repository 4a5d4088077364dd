/** Vega-Lite specifications to SVG files. */
import { mkdirSync, writeFileSync } from "node:fs";
import { dirname, join, resolve } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";

export type Json = string | number | boolean | null | readonly Json[] | JsonObject;
export interface JsonObject {
  readonly [key: string]: Json;
}

declare const runtime: unique symbol;
/** A Vega specification made ready to run. */
interface Runtime {
  readonly [runtime]: true;
}

/** What is used of the package vega. */
interface Vega {
  parse(spec: JsonObject): Runtime;
  View: new (spec: Runtime, options: { readonly renderer: "none" }) => { toSVG(): Promise<string> };
}

/** What is used of the package vega-lite. */
interface VegaLite {
  compile(spec: JsonObject): { readonly spec: JsonObject };
}

/** `labels.ts` estimates how wide its text is. */
const FONT = "Helvetica, Arial, sans-serif";

/** GitHub's dark theme shows through what is not painted. */
const BACKGROUND = "white";

/** Of marks and the texts beside them: all are dark enough to be read on white. */
export const COLOURS = [
  "#0072b2",
  "#c14e00",
  "#00795a",
  "#a04585",
  "#7a6200",
  "#3c3c3c",
  "#5a4fcf",
  "#217ba3",
  "#a1182f",
  "#5d7f00",
];

/** How an axis labels shares, as an expression of Vega. */
export const PERCENT = "format(100 * datum.value, '~g') + ' %'";

/**
 * A package of this folder's own node_modules. The name is no literal, so that type checkers, which run where
 * the folder is not installed too, do not look for it.
 */
async function load(name: string): Promise<unknown> {
  try {
    return await import(name);
  } catch (error) {
    throw new Error(`cannot load ${name}: run \`npm ci\` in bench/plots`, { cause: error });
  }
}

/** Writes the picture of a Vega-Lite specification; `$schema`, background and `config` are added to it. */
export async function drawPicture(spec: JsonObject, path: string): Promise<void> {
  const vega = await load("vega") as Vega;
  const vegaLite = await load("vega-lite") as VegaLite;
  const { spec: compiled } = vegaLite.compile({
    $schema: "https://vega.github.io/schema/vega-lite/v6.json",
    background: BACKGROUND,
    padding: 12,
    ...spec,
    config: {
      font: FONT,
      aria: false,
      title: { anchor: "start", frame: "group", fontSize: 14, subtitleFontSize: 12, subtitleColor: "#555" },
      axis: { labelFontSize: 11, titleFontSize: 12, titleFontWeight: "normal", gridColor: "#e8e8e8" },
      legend: { labelFontSize: 12, labelLimit: 0 },
      view: { stroke: null },
    },
  });
  const svg = await new vega.View(vega.parse(compiled), { renderer: "none" }).toSVG();
  mkdirSync(dirname(path), { recursive: true });
  writeFileSync(path, svg + "\n");
  console.error(`${path}: ${(Buffer.byteLength(svg) / 1024).toFixed(1)} KiB`);
}

/**
 * The command line of a script that draws: files with results, and `--out FILE.svg`.
 * @param picture where it goes without `--out`, in docs/images
 */
export function readCommand(picture: string): { readonly files: readonly string[]; readonly out: string } {
  const { values, positionals } = parseArgs({ options: { out: { type: "string" } }, allowPositionals: true });
  const images = join(dirname(fileURLToPath(import.meta.url)), "../../docs/images");
  return {
    files: positionals,
    out: values.out === undefined ? join(images, picture) : resolve(process.cwd(), values.out),
  };
}

/** 4096 is 4K, 1500 is 1,500. */
export function formatTokens(tokens: number): string {
  return tokens > 0 && tokens % 1024 === 0 ? `${tokens / 1024}K` : tokens.toLocaleString("en-US");
}

export function formatPercent(share: number): string {
  return `${Number((100 * share).toPrecision(3))} %`;
}
