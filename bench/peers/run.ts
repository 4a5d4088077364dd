/**
 * longform and its peers on the same GPU, model and prompts, by turns:
 *
 *     bun bench/peers/run.ts (--model DIR | --model-shape gpt2) [--dtype f16] [--contexts 1k,4k] [--new-tokens 64]
 *       [--runs 5] [--rounds 3] [--peers onnxruntime,llama,pytorch] [--llama-batch 512] [--out FILE.json]
 *       [--commit ID]
 *     bun bench/peers/run.ts --from FILE.json
 *
 * Each is a process of its own in each round, longform first, and measures as peer.ts says; of several rounds
 * the median of the medians counts, and the largest memory. Prints Markdown tables. A factor is a peer's time
 * over ours: above 1, longform is faster. There is none for a peer that ran on something else than longform.
 * Greedy tokens are compared with longform's; where they part, rounding decided between two tokens that are
 * nearly as likely, or one of the two is wrong. `--from` prints the tables of a recorded run again.
 */
import { spawnSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { parseArgs } from "node:util";
import { isSameDevice } from "../../src/cli/bench_result.ts";
import { syntheticPrompt } from "../../src/model/synthetic.ts";
import { formatMiB, runLongform } from "../process.ts";
import { provenance, writeResult } from "../provenance.ts";
import {
  ABSENT,
  COMMON_FLAGS,
  commonOptions,
  messageOf,
  openModel,
  type PeerOptions,
  type PeerResult,
  type PeerRow,
  spreadOf,
  tokensPerSecond,
} from "./peer.ts";

type Work = Omit<PeerOptions, "out" | "model" | "modelShape"> & { readonly model: string };

interface Recorded {
  readonly adapter: string;
  readonly dtype: string;
  readonly ours: PeerResult;
  readonly peers: readonly PeerResult[];
}

/** What `longform info --json` says of the adapter that a run takes. */
interface Info {
  readonly chosen: { readonly name: string; readonly driver: string; readonly isSoftware: boolean };
}

/** Greedy tokens that are compared, at most. */
const COMPARED = 16;
/** Names on the command line, and what the peers call themselves. */
const PEERS = { onnxruntime: "onnxruntime-node", llama: "node-llama-cpp", pytorch: "PyTorch" } as const;
type PeerName = keyof typeof PEERS;

/** A peer that has nothing to show, and why. */
function failed(peer: string, dtype: Work["dtype"], error: string): PeerResult {
  return {
    peer,
    version: "unknown",
    provider: "unknown",
    device: null,
    dtype,
    load_ms: null,
    host_peak_bytes: null,
    gpu_peak_bytes: null,
    rows: [],
    error,
  };
}

/** The last line that a process wrote to stderr, without the word that marks it. */
function lastLine(stderr: Uint8Array): string | undefined {
  return new TextDecoder().decode(stderr).trim().split("\n").at(-1)?.replace(/^error: /, "") || undefined;
}

/** Runs one of this folder's TypeScript processes. */
function runProcess(
  peer: string,
  script: string,
  work: Work,
  { extra = [], env = {} }: { extra?: readonly string[]; env?: Readonly<Record<string, string>> } = {},
): PeerResult {
  const folder = mkdtempSync(join(tmpdir(), "longform-peer-"));
  const out = join(folder, "result.json");
  const args = [
    join(import.meta.dirname!, script),
    ...["--model", work.model, "--dtype", work.dtype, "--contexts", work.contexts.join()],
    ...["--new-tokens", String(work.newTokens), "--runs", String(work.runs), "--out", out, ...extra],
  ];
  console.error(`${peer}: ${script}`);
  try {
    const ran = spawnSync(process.execPath, args, {
      stdio: ["ignore", "ignore", "pipe"],
      maxBuffer: 1 << 28,
      env: { ...process.env, ...env },
    });
    if (ran.status === ABSENT) return failed(peer, work.dtype, lastLine(ran.stderr) ?? "is not installed");
    try {
      return JSON.parse(readFileSync(out, "utf8"));
    } catch {
      const ending = `ended with ${ran.status ?? ran.signal}`;
      return failed(peer, work.dtype, [ending, lastLine(ran.stderr)].filter(Boolean).join(": "));
    }
  } finally {
    rmSync(folder, { recursive: true });
  }
}

/** What pytorch.py writes. */
interface PytorchResult {
  readonly gpu: string;
  readonly torch: string;
  readonly transformers: string;
  readonly prefill_ms: { readonly min: number; readonly median: number; readonly max: number };
  readonly decode_tokens_per_s: number;
  readonly peak_bytes: number;
}

/** Runs pytorch.py twice a context, for its prefill and for its decoding. */
async function runPytorch(work: Work): Promise<PeerResult> {
  const peer = PEERS.pytorch;
  if (work.dtype !== "f16") return failed(peer, work.dtype, "pytorch.py measures f16 alone");
  const { config, source } = await openModel({ ...work, modelShape: undefined });
  await source.close();
  const folder = mkdtempSync(join(tmpdir(), "longform-pytorch-"));
  const [ids, out] = ["ids.json", "result.json"].map((name) => join(folder, name)) as [string, string];
  const script = join(import.meta.dirname!, "pytorch.py");
  const run = (tokens: number, newTokens: number): PytorchResult => {
    console.error(`${peer}: ${tokens} tokens and ${newTokens}`);
    writeFileSync(ids, JSON.stringify([...syntheticPrompt(tokens, config.vocabSize)]));
    const ran = spawnSync("python3", [script, work.model, ids, String(newTokens), out]);
    if (ran.error) throw new Error("there is no python3");
    if (ran.status !== 0) throw new Error(lastLine(ran.stderr) ?? `ended with ${ran.status}`);
    return JSON.parse(readFileSync(out, "utf8"));
  };
  const rows: PeerRow[] = [];
  let last: PytorchResult | undefined;
  let peakBytes = 0;
  const measure = (phase: PeerRow["phase"], context: number) => {
    try {
      const newTokens = phase === "prefill" ? 1 : work.newTokens;
      last = run(phase === "prefill" ? context : context - newTokens, newTokens);
      peakBytes = Math.max(peakBytes, last.peak_bytes);
      const ms = phase === "prefill" ? last.prefill_ms : spreadOf([1000 / last.decode_tokens_per_s]);
      rows.push({ phase, context, ms, tokens_per_s: tokensPerSecond(phase, context, ms) });
    } catch (error) {
      rows.push({ phase, context, ms: null, tokens_per_s: null, error: messageOf(error) });
    }
  };
  for (const context of work.contexts) {
    measure("prefill", context);
    measure("decode", context);
  }
  rmSync(folder, { recursive: true });
  if (!last) return failed(peer, work.dtype, rows[0]!.error!);
  return {
    peer,
    version: last.torch,
    provider: "cuda",
    device: last.gpu,
    dtype: work.dtype,
    note:
      `transformers ${last.transformers}, SDPA; GPU memory as PyTorch counts it; of decoding the median alone`,
    load_ms: null,
    host_peak_bytes: null,
    gpu_peak_bytes: peakBytes,
    rows,
  };
}

/** Median of what is there, null of nothing. */
function medianOf(values: readonly (number | null)[]): number | null {
  const known = values.filter((value) => value !== null);
  return known.length === 0 ? null : spreadOf(known).median;
}

function largestOf(values: readonly (number | null)[]): number | null {
  const known = values.filter((value) => value !== null);
  return known.length === 0 ? null : Math.max(...known);
}

/** Several processes' rows as one's; one that failed in a round has failed. */
function mergeRows(rows: readonly PeerRow[]): PeerRow {
  const [first] = rows;
  const bad = rows.find(({ ms }) => ms === null);
  if (bad) return bad;
  const spreads = rows.map(({ ms }) => ms!);
  const ms = {
    min: Math.min(...spreads.map(({ min }) => min)),
    median: spreadOf(spreads.map(({ median }) => median)).median,
    max: Math.max(...spreads.map(({ max }) => max)),
  };
  return { ...first!, ms, tokens_per_s: tokensPerSecond(first!.phase, first!.context, ms) };
}

function mergeRounds(rounds: readonly PeerResult[]): PeerResult {
  const bad = rounds.find(({ error }) => error !== undefined);
  if (bad) return bad;
  return {
    ...rounds[0]!,
    load_ms: medianOf(rounds.map((round) => round.load_ms)),
    host_peak_bytes: largestOf(rounds.map((round) => round.host_peak_bytes)),
    gpu_peak_bytes: largestOf(rounds.map((round) => round.gpu_peak_bytes)),
    rows: rounds[0]!.rows.map((_, i) => mergeRows(rounds.map(({ rows }) => rows[i]!))),
  };
}

async function measure(
  work: Work,
  peers: readonly PeerName[],
  rounds: number,
  { isSoftware, llamaBatch }: { readonly isSoftware: boolean; readonly llamaBatch: string },
): Promise<Pick<Recorded, "ours" | "peers">> {
  const run = async (name: PeerName): Promise<PeerResult> => {
    if (name === "pytorch") return await runPytorch(work);
    if (name === "onnxruntime") return runProcess(PEERS[name], "onnxruntime.ts", work);
    // llama.cpp passes over software devices that are not named.
    const env = isSoftware ? { GGML_VK_VISIBLE_DEVICES: "0" } : {};
    return runProcess(PEERS[name], "llama.ts", work, { extra: ["--batch-size", llamaBatch], env });
  };
  const ours: PeerResult[] = [];
  const theirs = new Map<PeerName, PeerResult[]>(peers.map((name) => [name, []]));
  for (let round = 0; round < rounds; round++) {
    ours.push(runProcess("longform", "longform.ts", work));
    for (const [name, results] of theirs) {
      // What is not installed, or does not run, need not be tried again.
      if (results.at(-1)?.error === undefined) results.push(await run(name));
    }
  }
  return { ours: mergeRounds(ours), peers: [...theirs.values()].map(mergeRounds) };
}

function formatNumber(value: number): string {
  const digits = value < 10 ? 2 : value < 100 ? 1 : 0;
  return value.toLocaleString("en-US", { maximumFractionDigits: digits });
}

function formatRate(row: PeerRow | undefined): string {
  if (!row?.ms) return row ? "failed" : "-";
  const { min, max } = row.ms;
  return `${formatNumber(row.tokens_per_s!)} (${formatNumber(min)} to ${formatNumber(max)} ms)`;
}

function formatTable(lines: readonly (readonly string[])[]): string {
  const [head, ...body] = lines;
  return [head!, head!.map(() => "---"), ...body].map((line) => `| ${line.join(" | ")} |`).join("\n");
}

function titleOf({ peer, version, provider }: PeerResult): string {
  return `${peer} ${version}, ${provider}`;
}

function formatPhase(phase: PeerRow["phase"], { adapter, ours, peers }: Recorded): string {
  const rowOf = ({ rows }: PeerResult, context: number) =>
    rows.find((row) => row.phase === phase && row.context === context);
  const shown = peers.filter(({ rows }) => rows.length > 0);
  const lines = ours.rows.filter((row) => row.phase === phase).map((own) => [
    own.context.toLocaleString("en-US"),
    formatRate(own),
    ...shown.flatMap((peer) => {
      const row = rowOf(peer, own.context);
      const isComparable = own.ms && row?.ms && isSameDevice(adapter, peer.device ?? "");
      return [formatRate(row), isComparable ? `${(row.ms!.median / own.ms!.median).toFixed(2)}×` : "-"];
    }),
  ]);
  const head = ["context", titleOf(ours), ...shown.flatMap((peer) => [titleOf(peer), "factor"])];
  return `### ${phase}, ${ours.dtype}: tokens/s (ms of a ${phase === "prefill" ? "prompt" : "step"})\n\n${
    formatTable([head, ...lines])
  }`;
}

function formatCosts({ ours, peers }: Recorded): string {
  const lines = [ours, ...peers.filter(({ rows }) => rows.length > 0)].map((result) => [
    titleOf(result),
    result.load_ms === null ? "-" : formatNumber(result.load_ms),
    formatMiB(result.host_peak_bytes),
    formatMiB(result.gpu_peak_bytes),
  ]);
  const head = ["", "load ms", "peak host memory, MiB", "peak GPU memory, MiB"];
  return `### Loading and memory\n\n${formatTable([head, ...lines])}`;
}

/** How far a peer's greedy tokens are ours. */
function formatGreedy(context: number, ours: readonly number[], theirs: readonly number[]): string {
  const compared = Math.min(COMPARED, ours.length, theirs.length);
  let equal = 0;
  while (equal < compared && ours[equal] === theirs[equal]) equal++;
  const parting = equal < compared ? ` (then ${theirs[equal]} in place of ${ours[equal]})` : "";
  return `${equal} of ${compared} at ${context.toLocaleString("en-US")}${parting}`;
}

/** Where a peer ran, what it answered, and what went wrong. */
function formatPeer(peer: PeerResult, { adapter, ours }: Recorded): string {
  if (peer.error !== undefined) return `- ${peer.peer}: not measured: ${peer.error}`;
  const where = isSameDevice(adapter, peer.device ?? "")
    ? "on the same adapter"
    : `not on ${adapter}, but on ${peer.device}: its times are no comparison`;
  const greedy = ours.rows.flatMap((own) => {
    const row = peer.rows.find(({ phase, context }) => phase === own.phase && context === own.context);
    return own.greedy && row?.greedy ? [formatGreedy(own.context, own.greedy, row.greedy)] : [];
  });
  const answers = greedy.length === 0
    ? "greedy tokens unknown"
    : `greedy tokens as longform's: ${greedy.join(", ")}`;
  const errors = peer.rows.flatMap(({ phase, context, error }) =>
    error === undefined ? [] : [`${phase} at ${context}: ${error}`]
  );
  const parts = [where, answers, peer.note, peer.placement, ...errors].filter((part) => part !== undefined);
  return `- ${peer.peer}: ${parts.join("; ")}`;
}

function printTables(recorded: Recorded): void {
  const { ours, peers } = recorded;
  if (ours.error !== undefined) console.log(`longform was not measured: ${ours.error}\n`);
  const tables = [formatPhase("prefill", recorded), formatPhase("decode", recorded), formatCosts(recorded)];
  console.log([...tables, ...peers.map((peer) => formatPeer(peer, recorded))].join("\n\n"));
}

/** A folder with the model: the one that was named, or one of a published shape, for `use` alone. */
async function withFolder<T>(
  { model, modelShape, contexts }: Omit<PeerOptions, "out">,
  use: (model: string) => Promise<T>,
): Promise<T> {
  if (model !== undefined) return await use(model);
  const folder = mkdtempSync(join(tmpdir(), "longform-shape-"));
  try {
    const positions = String(Math.max(...contexts));
    const args = ["scripts/make_synthetic.ts", modelShape!, folder, "--positions", positions];
    const made = spawnSync(process.execPath, args);
    if (made.status !== 0) {
      throw new Error(`make_synthetic.ts ended with ${made.status}: ${made.stderr}`);
    }
    return await use(folder);
  } finally {
    rmSync(folder, { recursive: true });
  }
}

const { values } = parseArgs({
  options: {
    ...COMMON_FLAGS,
    "new-tokens": { type: "string", default: "64" },
    runs: { type: "string", default: "5" },
    rounds: { type: "string", default: "3" },
    peers: { type: "string", default: Object.keys(PEERS).join() },
    "llama-batch": { type: "string", default: "512" },
    from: { type: "string" },
    commit: { type: "string" },
  },
});

if (values.from !== undefined) {
  printTables(JSON.parse(readFileSync(values.from, "utf8")));
} else {
  const peers = values.peers.split(",").map((name) => {
    if (Object.hasOwn(PEERS, name)) return name as PeerName;
    throw new Error(`--peers has "${name}", wanted some of ${Object.keys(PEERS).join(", ")}`);
  });
  const rounds = Number(values.rounds);
  if (!Number.isInteger(rounds) || rounds < 1) {
    throw new Error(`--rounds is ${values.rounds}, wanted 1 or more`);
  }
  const { model, modelShape, ...options } = commonOptions(values);
  const { result: { chosen } } = await runLongform<Info>(["info", "--json"]);
  const { isSoftware } = chosen;
  const measured = await withFolder(
    { model, modelShape, ...options },
    (folder) =>
      measure({ ...options, model: folder }, peers, rounds, {
        isSoftware,
        llamaBatch: values["llama-batch"],
      }),
  );
  const recorded = {
    adapter: chosen.name,
    driver: chosen.driver,
    ...provenance(values.commit),
    model: model ?? modelShape,
    dtype: options.dtype,
    ...measured,
  };
  printTables(recorded);
  if (values.out) writeResult(values.out, recorded);
  // A peer may be absent; longform may not.
  if (measured.ours.error !== undefined) process.exitCode = 1;
}
