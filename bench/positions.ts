/**
 * What a model is worth beyond its positions: `longform score` over long texts with every mode of `--positions`.
 *
 *     bun bench/positions.ts [--model DIR] [--windows 16k,32k,64k] [--out FILE.json] [--commit ID] IDS.json…
 *
 * Every file holds the token ids of one text, which must fill the largest window. All of them are scored over their first
 * tokens, as many as the largest window has, so that all figures are about the same tokens; perplexity by position is
 * over all texts.
 */
import { readFileSync } from "node:fs";
import { basename, join } from "node:path";
import { parseArgs } from "node:util";
import { runLongform } from "./process.ts";
import { deviceOf, provenance, writeResult } from "./provenance.ts";

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    model: { type: "string", default: "weights/classics-16k" },
    windows: { type: "string", default: "16k,32k,64k" },
    commit: { type: "string" },
    out: { type: "string" },
  },
});

interface Bucket {
  readonly from: number;
  readonly to: number;
  readonly scored: number;
  readonly nll_mean: number;
}

interface Report {
  readonly scored: number;
  readonly nll_mean: number;
  readonly by_position: readonly Bucket[];
}

const { n_positions: nPositions } = JSON.parse(readFileSync(join(values.model, "config.json"), "utf8"));
const windows = values.windows.split(",").map((name) => 1024 * parseInt(name));
const tokens = Math.max(...windows);
const rows = [];
for (const window of windows) {
  for (const positions of window <= nPositions ? ["exact"] : ["interpolate", "repeat"]) {
    const reports: Report[] = [];
    for (const ids of positionals) {
      const { result } = await runLongform<Report[]>([
        ...["score", "-m", values.model, "--ids", ids, "--window", String(window), "-n", String(tokens)],
        ...["--positions", positions, "--json", "-q"],
      ]);
      reports.push(result[0]!);
    }
    const perplexity = (parts: readonly { scored: number; nll_mean: number }[]) => {
      const scored = parts.reduce((sum, part) => sum + part.scored, 0);
      return Math.exp(parts.reduce((sum, part) => sum + part.scored * part.nll_mean, 0) / scored);
    };
    const buckets = reports[0]!.by_position.map(({ from, to }, i) => ({
      from,
      to,
      perplexity: perplexity(reports.map((report) => report.by_position[i]!)),
    }));
    rows.push({ window, positions, perplexity: perplexity(reports), buckets });
  }
}

const edges = rows.reduce(
  (all, { buckets }) => buckets.length > all.length ? buckets : all,
  rows[0]!.buckets,
);
const k = (position: number) => position === 0 ? "0" : `${position / 1024}K`;
console.log(
  `| window | positions | all | ${edges.map(({ from, to }) => `${k(from)}–${k(to)}`).join(" | ")} |`,
);
console.log(`| --- | --- | --- | ${edges.map(() => "---").join(" | ")} |`);
for (const { window, positions, perplexity, buckets } of rows) {
  const cells = edges.map((_, i) => buckets[i]?.perplexity.toFixed(2) ?? "");
  console.log(`| ${k(window)} | ${positions} | ${perplexity.toFixed(2)} | ${cells.join(" | ")} |`);
}
if (values.out) {
  const texts = positionals.map((path) => basename(path, ".json"));
  writeResult(values.out, { ...deviceOf(), ...provenance(values.commit), texts, tokens, rows });
}
