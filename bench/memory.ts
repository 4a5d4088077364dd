/**
 * Peak memory against the context: `longform generate` with prompts that fill contexts of several lengths.
 *
 *     bun bench/memory.ts --model DIR --contexts 1k,4k,16k [--dtype f16] [--out FILE.json] [--commit ID]
 *
 * Prints what was planned, what was allocated, what the driver and the host saw, and how far each point is from the
 * straight line that fits them best.
 */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { syntheticPrompt } from "../src/model/synthetic.ts";
import { formatMiB, runLongform } from "./process.ts";
import { deviceOf, provenance, writeResult } from "./provenance.ts";

const { values } = parseArgs({
  options: {
    model: { type: "string" },
    contexts: { type: "string", default: "1k,4k,16k,32k,64k" },
    dtype: { type: "string", default: "auto" },
    commit: { type: "string" },
    out: { type: "string" },
  },
});
if (values.model === undefined) throw new Error("--model is needed: a folder with a checkpoint");

const GENERATED = 4;
const { vocab_size: vocabSize } = JSON.parse(readFileSync(join(values.model, "config.json"), "utf8"));

interface Report {
  readonly timings: Readonly<Record<string, number | null>>;
  readonly memory: Readonly<Record<string, number>>;
}

const folder = mkdtempSync(join(tmpdir(), "longform-memory-"));
interface Row {
  readonly context: number;
  readonly memory: Report["memory"];
  readonly timings: Report["timings"];
  readonly hostPeakBytes: number | null;
  readonly driverPeakBytes: number | null;
}

const rows: Row[] = [];
try {
  for (const name of values.contexts.split(",")) {
    const context = /k$/i.test(name) ? 1024 * parseInt(name) : Number(name);
    const ids = join(folder, `${context}.json`);
    writeFileSync(ids, JSON.stringify([...syntheticPrompt(context - GENERATED, vocabSize)]));
    const { result, hostPeakBytes, driverPeakBytes } = await runLongform<Report>([
      ...["generate", "-m", values.model, "--ids", ids, "-n", String(GENERATED), "--dtype", values.dtype],
      ...["--temperature", "0", "--ignore-eos", "--json", "-q"],
    ]);
    const { memory, timings } = result;
    rows.push({ context, memory, timings, hostPeakBytes, driverPeakBytes });
  }
} finally {
  rmSync(folder, { recursive: true });
}

const peak = ({ memory }: Row) => memory["peak_bytes"]!;
/** The straight line whose relative errors have the least squares. */
function fitLine(points: readonly Row[]): (context: number) => number {
  const sum = (of: (row: Row) => number) =>
    points.reduce((total, row) => total + of(row) / peak(row) ** 2, 0);
  const [one, x, xx] = [sum(() => 1), sum((row) => row.context), sum((row) => row.context ** 2)];
  const [y, xy] = [sum(peak), sum((row) => row.context * peak(row))];
  const slope = points.length > 1 ? (one * xy - x * y) / (one * xx - x * x) : 0;
  const start = (y - slope * x) / one;
  return (context) => start + slope * context;
}
const line = fitLine(rows);
console.log("| context | planned MiB | peak MiB | off the line | driver MiB | host MiB | prefill s |");
console.log("| --- | --- | --- | --- | --- | --- | --- |");
for (const row of rows) {
  const off = 100 * (peak(row) / line(row.context) - 1);
  console.log(
    `| ${row.context} | ${formatMiB(row.memory["planned_bytes"]!)} | ${formatMiB(peak(row))} | ${
      off.toFixed(2)
    } % | ${formatMiB(row.driverPeakBytes)} | ${formatMiB(row.hostPeakBytes)} | ${
      ((row.timings["prefill_ms"] ?? 0) / 1000).toFixed(2)
    } |`,
  );
}
if (values.out) writeResult(values.out, { ...deviceOf(), ...provenance(values.commit), rows });
