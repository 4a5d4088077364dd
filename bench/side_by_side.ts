/**
 * longform and PyTorch on the same GPU, one after the other: attention, the matrix products of a layer, prefill.
 *
 *     bun bench/side_by_side.ts --shape gpt2 --contexts 1k,4k,16k,64k [--out FILE.json] [--commit ID]
 *     bun bench/side_by_side.ts --from FILE.json
 *
 * Runs `longform bench` and then `bench/peers/pytorch_kernels.py`, and prints a Markdown table a phase. A peer's factor
 * is its time, or memory, over ours: above 1, longform does better. Peers are compared within a dtype. A machine without
 * PyTorch gets the tables without peers.
 * `--from` prints the tables of a recorded run again.
 */
import { spawnSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { parseArgs } from "node:util";
import { formatMiB } from "./process.ts";
import { deviceOf, provenance, writeResult } from "./provenance.ts";

/** As `longform bench --json` and the peer's script write them. */
interface Row {
  readonly phase: string;
  readonly kernel?: string | null;
  readonly variant: string;
  readonly context: number;
  readonly dtype: string;
  readonly ms?: { readonly min: number; readonly median: number; readonly max: number } | null;
  readonly tokens_per_s?: number | null;
  readonly tflops?: number | null;
  readonly peak_bytes?: number | null;
  readonly error?: string | null;
  /** Of scores that did not fit. */
  readonly needed_bytes?: number;
}

/** What one process measured; `error` says why it did not. */
interface Measured {
  readonly process: string;
  /** What the device did in that run, for comparison. */
  readonly copy_gb_per_s?: number | null;
  readonly peak_tflops?: number | null;
  readonly peak_unit?: string;
  readonly rows: readonly Row[];
  readonly error?: string;
}

interface Recorded {
  readonly ours: readonly Measured[];
  readonly peer: Measured & Readonly<Record<string, unknown>>;
}

const PHASES = ["attention", "gemm", "prefill"];
/** `c_proj` comes last: it is a part of another's name. */
const GEMMS = ["c_attn", "c_fc", "mlp_c_proj", "c_proj"];
/** The exit code of a peer's script that finds nothing to run on. */
const ABSENT = 3;

function runOurs(args: readonly string[]): Measured {
  const command = ["main.ts", "bench", ...args, "--json", "-q"];
  console.error(`bun ${command.join(" ")}`);
  const ran = spawnSync(process.execPath, command, { maxBuffer: 1 << 28 });
  const started = { process: `bun ${command.join(" ")}`, rows: [] };
  const failure = ran.status === 0
    ? {}
    : { error: ran.stderr?.toString().trim() || `ended with ${ran.status ?? ran.signal}` };
  try {
    const { rows = [], copy_gb_per_s, peak_tflops, peak_unit } = JSON.parse(ran.stdout.toString());
    return { ...started, copy_gb_per_s, peak_tflops, peak_unit, rows, ...failure };
  } catch {
    return { ...started, error: "printed no JSON", ...failure };
  }
}

function runPeer(shape: string, contexts: string): Recorded["peer"] {
  const script = ["bench/peers/pytorch_kernels.py", shape, contexts];
  const folder = mkdtempSync(join(tmpdir(), "longform-"));
  const file = join(folder, "peer.json");
  const started = { process: `python3 ${script.join(" ")}`, rows: [] };
  console.error(started.process);
  try {
    const ran = spawnSync("python3", [...script, file]);
    if (ran.error) return { ...started, error: "no python3" };
    const said = ran.stderr.toString().trim();
    if (ran.status === ABSENT) return { ...started, error: said };
    let measured = started;
    try {
      measured = { ...started, ...JSON.parse(readFileSync(file, "utf8")) };
    } catch {
      // The script ended before its first row; its exit code says so below.
    }
    return ran.status === 0
      ? measured
      : { ...measured, error: said.slice(-2000) || `ended with ${ran.status}` };
  } finally {
    rmSync(folder, { recursive: true });
  }
}

function measure(shape: string, contexts: string): Recorded {
  const common = ["--model-shape", shape];
  const attention = [...common, "--phases", "attention", "--attention"];
  const ours = [
    runOurs([
      ...common,
      "--contexts",
      contexts,
      "--phases",
      PHASES.join(),
      "--attention",
      "flash",
      "--dtype",
      "f16",
    ]),
    runOurs([...attention, "standard", "--contexts", contexts, "--dtype", "f16"]),
    runOurs([...attention, "flash", "--contexts", contexts, "--dtype", "f32"]),
  ];
  return { ours, peer: runPeer(shape, contexts) };
}

/** Which matrix product a row is of; empty for the other phases. */
function gemmOf({ phase, kernel, variant }: Row): string {
  if (phase !== "gemm") return "";
  const names = [kernel, variant];
  return GEMMS.find((name) => names.includes(name)) ??
    GEMMS.find((name) => names.some((text) => text?.includes(name))) ?? "";
}

/** What ran: kernel and variant, without the matrix product's name, which has a column of its own. */
function labelOf(row: Row): string {
  const { kernel, variant } = row;
  const parts = [kernel, variant].filter((part) => part && part !== gemmOf(row));
  return [...new Set(parts)].join(" ");
}

/** Rows of equal keys are the same work, whoever did it. */
function keyOf(row: Row): string {
  return [row.context, row.dtype, gemmOf(row)].join();
}

type Metric = (row: Row) => string;

function formatRate({ phase, ms, tflops, tokens_per_s: tokens }: Row): string {
  const rate = phase === "prefill"
    ? tokens?.toLocaleString("en-US", { maximumFractionDigits: 0 })
    : tflops?.toFixed(1);
  const digits = ms!.median < 1 ? 3 : ms!.median < 100 ? 2 : 1;
  return `${ms!.median.toFixed(digits)} (${rate ?? "-"})`;
}

function formatCell(row: Row | undefined, metric: Metric): string {
  if (!row) return "-";
  if (!row.ms) {
    const isFull = row.needed_bytes !== undefined || /out of memory|does not fit/i.test(row.error ?? "");
    return isFull ? "does not fit" : "failed";
  }
  return metric(row);
}

function formatFactor(of: number | null | undefined, over: number | null | undefined): string {
  return of && over ? `${(of / over).toFixed(2)}×` : "-";
}

/**
 * @param metric what a cell shows
 * @param value what the factor compares, theirs over ours
 */
function formatTable(
  ours: readonly Row[],
  theirs: readonly Row[],
  metric: Metric,
  value: (row: Row) => number | null | undefined,
): string {
  const variants = [...new Set(theirs.map((row) => row.variant))];
  const peers = new Map(theirs.map((row) => [`${row.variant},${keyOf(row)}`, row]));
  const isGemm = ours.concat(theirs).some((row) => gemmOf(row) !== "");
  const cells = (row: Row, own: Row | undefined) => [
    row.context.toLocaleString("en-US"),
    ...isGemm ? [gemmOf(row)] : [],
    row.dtype,
    own ? labelOf(own) : "-",
    formatCell(own, metric),
    ...variants.flatMap((variant) => {
      const peer = peers.get(`${variant},${keyOf(row)}`);
      const factor = own && peer ? formatFactor(value(peer), value(own)) : "-";
      return [formatCell(peer, metric), factor];
    }),
  ];
  const known = new Set(ours.map(keyOf));
  // Work that only peers did still gets its line.
  const alone = new Map(theirs.filter((row) => !known.has(keyOf(row))).map((row) => [keyOf(row), row]));
  const body = [
    ...ours.map((row) => ({ row, own: row as Row | undefined })),
    ...[...alone.values()].map((row) => ({ row, own: undefined })),
  ].sort((a, b) => a.row.context - b.row.context);
  const head = [
    "context",
    ...isGemm ? ["product"] : [],
    "dtype",
    "kernel",
    "longform",
    ...variants.flatMap((variant) => [variant, "factor"]),
  ];
  const lines = [head, head.map(() => "---"), ...body.map(({ row, own }) => cells(row, own))];
  return lines.map((line) => `| ${line.join(" | ")} |`).join("\n");
}

function formatPhase(phase: string, { ours, peer }: Recorded): string {
  const own = ours.flatMap(({ rows }) => rows).filter((row) => row.phase === phase);
  const theirs = peer.rows.filter((row) => row.phase === phase);
  if (own.length + theirs.length === 0) return `### ${phase}\n\nNothing was measured.`;
  const unit = phase === "prefill" ? "tokens/s" : "TFLOP/s";
  const times = formatTable(own, theirs, formatRate, (row) => row.ms?.median);
  const tables = [`### ${phase}: median ms (${unit})`, times];
  if (phase !== "gemm") {
    const peaks = formatTable(
      own,
      theirs,
      (row) => formatMiB(row.peak_bytes ?? null),
      (row) => row.peak_bytes,
    );
    tables.push(`### ${phase}: peak GPU memory, MiB`, peaks);
  }
  return tables.join("\n\n");
}

function printTables(recorded: Recorded): void {
  console.log(PHASES.map((phase) => formatPhase(phase, recorded)).join("\n\n"));
  for (const { process: command, error } of [...recorded.ours, recorded.peer]) {
    if (!error) continue;
    const lines = error.split("\n");
    const reason = lines.find((line) => line.startsWith("error:")) ?? lines.at(-1);
    console.log(`\nNot measured, or not to its end: \`${command}\`: ${reason}`);
  }
}

const { values } = parseArgs({
  options: {
    shape: { type: "string", default: "gpt2" },
    contexts: { type: "string", default: "1k,4k,16k,64k" },
    from: { type: "string" },
    commit: { type: "string" },
    out: { type: "string" },
  },
});

if (values.from !== undefined) {
  printTables(JSON.parse(readFileSync(values.from, "utf8")));
} else {
  const recorded = measure(values.shape, values.contexts);
  printTables(recorded);
  if (values.out) {
    writeResult(values.out, {
      ...deviceOf(),
      ...provenance(values.commit),
      shape: values.shape,
      ...recorded,
    });
  }
  // A peer may be absent; longform may not.
  if (recorded.ours.some(({ error }) => error)) process.exitCode = 1;
}
