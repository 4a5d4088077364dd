/** `score`: how well a model predicts texts. */
import { stat } from "node:fs/promises";
import process from "node:process";
import type { Sparsity } from "../kvcache/sparsity.ts";
import { type GPT2Config, readConfig } from "../model/config.ts";
import type { Positions } from "../model/positions.ts";
import { chooseElem, openSparsity } from "../model/run_settings.ts";
import { openCheckpoint } from "../model/safetensors.ts";
import {
  type ComparisonSum,
  type DocumentScore,
  meanNll,
  type NllSum,
  perplexity,
  type PositionBucket,
  scoreDocument,
  totalScore,
} from "../model/scoring.ts";
import { TextTokens, tokensOf, type TokenSource, upTo } from "../model/token_source.ts";
import { type GPT2Tokenizer, loadTokenizer } from "../model/tokenizer.ts";
import type { WeightSource } from "../model/weight_source.ts";
import { formatBytes } from "../runtime/buffers.ts";
import type { Gpu } from "../runtime/device.ts";
import { InputError, UsageError } from "../runtime/errors.ts";
import { timed, type Timeline } from "../runtime/timeline.ts";
import { openText, readIds } from "./input.ts";
import { Instruments } from "./instruments.ts";
import {
  boundTokens,
  checkContext,
  choosePositions,
  type LoadedModel,
  loadModel,
  modelFolder,
  openCommandDevice,
} from "./load.ts";
import type { ScoreOptions } from "./options.ts";
import {
  formatMs,
  formatRate,
  JsonArray,
  ProgressLine,
  workProgress,
  writeNote,
  writeResult,
} from "./output.ts";
import { formatProfile, type ProfileReport } from "./profile.ts";
import { type Memory, memoryReport, type SparsityReport, sparsityReport, type Timings } from "./report.ts";
import { abortOnSignal, interruptedExitCode } from "./signals.ts";

interface BucketReport {
  /** Positions in the window, from and below. */
  readonly from: number;
  readonly to: number;
  readonly scored: number;
  readonly nll_mean: number | null;
  readonly perplexity: number | null;
  readonly compared?: ComparisonReport;
}

/** With `--compare`: what dense attention makes of the same tokens. */
interface ComparisonReport {
  readonly dense_nll_mean: number;
  readonly dense_perplexity: number;
  /** Mean Kullback-Leibler divergence from dense attention's predictions, in nats. */
  readonly kl_mean: number;
  /** Share of the tokens for which both find the same next token likeliest. */
  readonly top1_agreement: number;
}

/** What `--json` prints for each document. */
interface ScoreReport {
  readonly file: string;
  readonly tokens: number;
  readonly scored: number;
  readonly windows: number;
  /** Tokens of a window, the last of which may be shorter. */
  readonly window: number;
  readonly nll_mean: number | null;
  readonly perplexity: number | null;
  readonly compared?: ComparisonReport;
  readonly by_position: readonly BucketReport[];
  /** Absent for dense attention. */
  readonly sparsity?: SparsityReport;
  /** Of each token in nats; null for the first of a window. */
  readonly token_nll?: readonly (number | null)[];
  readonly logits?: Readonly<Record<string, readonly number[]>>;
  readonly profile?: ProfileReport;
  readonly timings: Timings;
  readonly memory: Memory;
}

/** A text or a list of ids, open. */
interface Document {
  readonly name: string;
  readonly tokens: TokenSource;
  /** The most tokens that it has; makes the start of a long text's tokens. */
  bound(): Promise<number>;
  /** How many it has or, while the end is not encoded, probably has. */
  estimate(): number | undefined;
  readonly tokenizeMs: () => number | null;
  close(): Promise<void>;
}

/** Where a document comes from; opened when its turn comes. */
interface DocumentSource {
  open(): Promise<Document>;
  /** The most tokens that it can have, without encoding any. */
  sizeBound(): Promise<number>;
}

/** Runs the command. @returns the exit code: 0, or a signal's when one has ended it */
export async function runScore(options: ScoreOptions): Promise<number> {
  const dir = await modelFolder(options);
  const config = await readConfig(dir);
  checkContext(config, options);
  checkWindow(config, options);
  requireText(options);
  const sparsity = await openSparsity(options.sparsity);
  const instruments = await Instruments.open(options);
  const { timeline } = instruments;
  const opening = openCommandDevice(options, timeline);
  opening.catch(() => {});
  const tokenizer = options.ids === undefined
    ? await timed(timeline, "phases", "load the tokenizer", () => loadTokenizer(dir))
    : undefined;
  const sources = tokenizer ? fileSources(options, tokenizer, timeline) : [await idsSource(options.ids!)];
  const single = sources.length === 1 ? await sources[0]!.open() : undefined;
  try {
    const context = await planContext(config, sources, single, options);
    const source = await openCheckpoint(dir);
    try {
      const gpu = await opening;
      try {
        const documents = single ? [{ open: () => Promise.resolve(single) }] : sources;
        return await scoreAll(gpu, source, config, documents, context, sparsity, instruments, options);
      } finally {
        gpu.destroy();
      }
    } finally {
      await source.close();
    }
  } finally {
    await single?.close();
  }
}

function checkWindow({ nPositions }: GPT2Config, { window, positions }: ScoreOptions): void {
  if (window === undefined || window <= nPositions || positions !== "exact") return;
  throw new UsageError(`\`--window ${window}\` is more than the model's ${nPositions} positions`, {
    hint: `use at most \`--window ${nPositions}\`, or go beyond with \`--positions interpolate\` or ` +
      "`--positions repeat`, at a loss",
  });
}

function requireText({ files, ids }: ScoreOptions): void {
  if (files.length > 0 || ids !== undefined || !process.stdin.isTTY) return;
  throw new UsageError("There is no text to score", {
    hint: "name files, or send a text through a pipe: longform score book.txt",
  });
}

async function idsSource(path: string): Promise<DocumentSource> {
  const ids = await readIds(path);
  return {
    open: () =>
      Promise.resolve({
        name: path,
        tokens: tokensOf(ids),
        bound: () => Promise.resolve(ids.length),
        estimate: () => ids.length,
        tokenizeMs: () => null,
        close: () => Promise.resolve(),
      }),
    sizeBound: () => Promise.resolve(ids.length),
  };
}

function fileSources(
  options: ScoreOptions,
  tokenizer: GPT2Tokenizer,
  timeline: Timeline | undefined,
): DocumentSource[] {
  const files = options.files.length > 0 ? options.files : ["-"];
  return files.map((path) => ({
    async open() {
      const input = await openText(path);
      const tokens = new TextTokens(tokenizer.encoder(), input.pieces, input.byteLength, timeline);
      return {
        name: path,
        tokens,
        bound: () => boundTokens(tokens, options),
        estimate: () => tokens.estimate(),
        tokenizeMs: () => tokens.encodeMs,
        close: () => input.close(),
      };
    },
    async sizeBound() {
      if (path === "-" || !tokenizer.encoder().isByteBounded) return Infinity;
      // Opening a pipe would take what is in it.
      const info = await stat(path).catch(() => undefined);
      if (!info) await (await openText(path)).close(); // which says what is wrong
      return info?.isFile() && info.size > 0 ? info.size : Infinity;
    },
  }));
}

/**
 * Tokens to plan memory for: the longest window that there can be. For a single text that is known exactly, unless it is
 * long; several are not all read first, so their size in bytes, which is more than they have tokens, has to do.
 */
async function planContext(
  config: GPT2Config,
  sources: readonly DocumentSource[],
  single: Document | undefined,
  options: ScoreOptions,
): Promise<number> {
  const { window, context, maxTokens = Infinity, positions } = options;
  const limit = Math.min(
    window ?? context ?? (positions === "exact" ? config.nPositions : Infinity),
    maxTokens,
  );
  if (!single && positions !== "exact" && limit === Infinity) {
    throw new UsageError(`\`--positions ${positions}\` with several files needs \`--window\``, {
      hint: "positions depend on it, and all files should be scored alike",
    });
  }
  let bound = 0;
  if (single) bound = await single.bound();
  else for (const source of sources) bound = Math.max(bound, await source.sizeBound());
  const missing = options.logits.find((token) => token >= Math.min(bound, maxTokens));
  if (single && missing !== undefined) throw noToken(missing, single.name);
  if (bound === 0) throw new InputError("There is nothing to score: the text is empty");
  return context ?? Math.min(limit, bound);
}

async function scoreAll(
  gpu: Gpu,
  source: WeightSource,
  config: GPT2Config,
  documents: readonly Pick<DocumentSource, "open">[],
  context: number,
  sparsity: Sparsity,
  instruments: Instruments,
  options: ScoreOptions,
): Promise<number> {
  const elem = chooseElem(options.dtype, gpu.caps);
  const progress = new ProgressLine(options);
  const window = options.window ?? context;
  // A stretched table must be the same for all windows, the shorter ones too.
  const positions: Positions = choosePositions(config, options, Math.max(context, window));
  const comparing = options.compare;
  const needs = { elem, context: Math.min(context, window), positions, sparsity, scoring: true, comparing };
  const { profiling } = instruments;
  const loaded = await loadModel(gpu, source, config, needs, options, progress, profiling);
  const { controller, stop } = abortOnSignal(() => progress.clear());
  const output = options.json ? new JsonArray() : undefined;
  const scores: DocumentScore[] = [];
  /** What was watched of the run, which an interruption does not lose. */
  const watched = async () => {
    const profile = options.json ? undefined : await instruments.profile(gpu, loaded.model, loaded.profiler);
    if (profile) writeNote(formatProfile(profile));
    await instruments.writeTrace(gpu, loaded.profiler);
  };
  try {
    for (const { open } of documents) {
      const document = await open();
      try {
        const { score, report } = await scoreOne(
          gpu,
          loaded,
          document,
          window,
          controller.signal,
          instruments,
          options,
          progress,
        );
        scores.push(score);
        if (output) output.push(report);
        else writeResult(formatReport(report));
        if (!options.json && !options.quiet) writeNote(formatCost(report));
      } finally {
        await document.close();
      }
    }
    if (!output && scores.length > 1) {
      writeResult(
        formatReport({ file: `all ${scores.length} files`, window, ...scoreNumbers(totalScore(scores)) }),
      );
    }
    await watched();
    return 0;
  } catch (error) {
    if (controller.signal.aborted && error === controller.signal.reason) {
      output?.endEvenIfEmpty();
      await watched();
      return interruptedExitCode();
    }
    throw error;
  } finally {
    stop();
    progress.clear();
    loaded.profiler?.destroy();
    loaded.model.destroy();
    // What was scored before an error or an interruption is printed, and is a whole JSON document.
    output?.end();
  }
}

async function scoreOne(
  gpu: Gpu,
  { model, loadMs, profiler }: LoadedModel,
  document: Document,
  window: number,
  signal: AbortSignal,
  instruments: Instruments,
  options: ScoreOptions,
  progress: ProgressLine,
): Promise<{ score: DocumentScore; report: ScoreReport }> {
  const { maxTokens = Infinity } = options;
  const nll: (number | null)[] = [];
  const logits: Record<string, number[]> = {};
  const wanted = new Set(options.logits);
  const starting = performance.now();
  const score = await scoreDocument(model, upTo(document.tokens, maxTokens), {
    window,
    compare: options.compare,
    signal,
    onProgress: (done) => {
      const estimate = document.estimate();
      const total = estimate === undefined && maxTokens === Infinity
        ? undefined
        : Math.min(estimate ?? Infinity, maxTokens);
      progress.show(workProgress("scored", done, total, performance.now() - starting));
    },
    ...(options.tokenNll ? { onNll: (first, values) => appendNll(nll, first, values) } : {}),
    ...(wanted.size > 0
      ? {
        onLogits: (token, row) => logits[token] = Array.from(row),
        wantsLogits: (token) => wanted.has(token),
      }
      : {}),
  });
  progress.clear();
  if (score.tokens === 0) throw new InputError(`There is nothing to score: ${document.name} holds no text`);
  const missing = options.logits.find((token) => token >= score.tokens);
  if (missing !== undefined) {
    throw noToken(missing, document.name);
  }
  // The first token of each window has no likelihood; a last window of one token ends the list with it.
  while (options.tokenNll && nll.length < score.tokens) nll.push(null);
  const elapsedMs = performance.now() - starting;
  const sparsity = sparsityReport(model);
  const profile = options.json ? await instruments.profile(gpu, model, profiler) : undefined;
  if (profile) await instruments.restart(profiler); // each document has its own, the first with the loading
  const report: ScoreReport = {
    file: document.name,
    window,
    ...scoreNumbers(score),
    ...(options.tokenNll ? { token_nll: nll } : {}),
    ...(wanted.size > 0 ? { logits } : {}),
    ...(sparsity ? { sparsity } : {}),
    ...(profile ? { profile } : {}),
    timings: {
      load_ms: loadMs,
      tokenize_ms: document.tokenizeMs(),
      first_token_ms: null,
      prefill_ms: elapsedMs,
      prefill_tokens_per_s: 1000 * score.tokens / elapsedMs,
      decode_ms: null,
      decode_tokens_per_s: null,
    },
    memory: memoryReport(gpu, model),
  };
  return { score, report };
}

function noToken(token: number, name: string): InputError {
  return new InputError(`${name} has no token ${token}, counted from 0, that \`--logits\` asks for`, {
    hint: "give `--logits` smaller numbers",
  });
}

/** Appends the likelihoods of the tokens from `first` on; tokens skipped before them have none. */
function appendNll(nll: (number | null)[], first: number, values: Float32Array): void {
  while (nll.length < first) nll.push(null);
  // Nine digits name a float32.
  for (const value of values) nll.push(Number(value.toPrecision(9)));
}

function scoreNumbers(score: DocumentScore) {
  return {
    tokens: score.tokens,
    scored: score.scored,
    windows: score.windows,
    nll_mean: meanNll(score),
    perplexity: perplexity(score),
    ...compared(score),
    by_position: score.buckets.map((bucket: PositionBucket): BucketReport => ({
      from: bucket.from,
      to: bucket.to,
      scored: bucket.scored,
      nll_mean: meanNll(bucket),
      perplexity: perplexity(bucket),
      ...compared(bucket),
    })),
  };
}

function compared(
  { scored, comparison }: NllSum & { readonly comparison?: ComparisonSum | undefined },
): { readonly compared?: ComparisonReport } {
  if (!comparison || scored === 0) return {};
  const mean = comparison.denseSum / scored;
  return {
    compared: {
      dense_nll_mean: mean,
      dense_perplexity: Math.exp(mean),
      kl_mean: comparison.klSum / scored,
      top1_agreement: comparison.agreeing / scored,
    },
  };
}

function formatReport(
  report: Pick<
    ScoreReport,
    | "file"
    | "tokens"
    | "scored"
    | "windows"
    | "window"
    | "nll_mean"
    | "perplexity"
    | "compared"
    | "by_position"
  >,
): string {
  const { file, tokens, scored, windows, window } = report;
  const of = windows === 1 ? "in one window" : `in ${windows} windows of ${count(window)}`;
  const lines = [
    `${file}: perplexity ${figure(report.perplexity)} (mean NLL ${report.nll_mean?.toFixed(4) ?? "-"}), ${
      count(scored)
    } of ${count(tokens)} tokens scored ${of}`,
  ];
  if (report.compared) {
    const { dense_perplexity: dense, kl_mean: kl, top1_agreement: top1 } = report.compared;
    lines.push(
      `  dense attention: perplexity ${figure(dense)}; KL divergence from it ${kl.toFixed(4)} nats, ` +
        `the same token likeliest for ${percent(top1)}`,
    );
  }
  if (report.by_position.length > 1) {
    const header = ["position", "tokens", "perplexity", ...(report.compared ? ["dense", "KL", "top-1"] : [])];
    lines.push(tableRow(header));
    for (const { from, to, scored: n, perplexity: p, compared: other } of report.by_position) {
      const row = [`${short(from)} to ${short(to)}`, count(n), figure(p)];
      if (other) {
        row.push(figure(other.dense_perplexity), other.kl_mean.toFixed(4), percent(other.top1_agreement));
      }
      lines.push(tableRow(row));
    }
  }
  return lines.join("\n") + "\n";
}

function formatCost({ tokens, timings, memory }: ScoreReport): string {
  return `${count(tokens)} tokens in ${formatMs(timings.prefill_ms)}, ${
    formatRate(timings.prefill_tokens_per_s)
  }; ${formatBytes(memory.peak_bytes)} of GPU memory`;
}

function count(n: number): string {
  return n.toLocaleString("en-US");
}

function tableRow(cells: readonly string[]): string {
  const widths = [16, 10, 12, 12, 10, 8];
  return `  ${cells.map((cell, i) => cell.padStart(widths[i]!)).join(" ")}`;
}

function percent(share: number): string {
  return `${(100 * share).toFixed(1)} %`;
}

function figure(n: number | null): string {
  return n === null ? "-" : n.toPrecision(5);
}

/** Positions as multiples of 1,024, which the buckets end at. */
function short(position: number): string {
  return position === 0 ? "0" : `${position / 1024}K`;
}
