/** The pictures of the documentation as SVG files. */
import { mkdirSync, writeFileSync } from "node:fs";
import { dirname, join, resolve } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { type JsonObject, loadPlots } from "../../src/cli/plots.ts";

/** `plot_labels.ts` estimates how wide its text is. */
const FONT = "Helvetica, Arial, sans-serif";

/** GitHub's dark theme shows through what is not painted. */
const BACKGROUND = "white";

/** How an axis labels shares, as an expression of Vega. */
export const PERCENT = "format(100 * datum.value, '~g') + ' %'";

/** Writes the picture of a Vega-Lite specification; `$schema`, background and `config` are added to it. */
export async function drawPicture(spec: JsonObject, path: string): Promise<void> {
  const draw = await loadPlots();
  const svg = await draw({
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

export function formatPercent(share: number): string {
  return `${Number((100 * share).toPrecision(3))} %`;
}
