/** `classify`: a label for each of many documents, as lines that can be stopped and resumed, or as one report. */
import process from "node:process";
import { type GPT2Config, readConfig } from "../model/config.ts";
import type { Classification, ClassifiedDocument } from "../model/classification.ts";
import { Evaluation, evaluationReport, formatByLength, formatEvaluation } from "../model/evaluation.ts";
import { checkpointLabels } from "../model/label_head.ts";
import { Longform } from "../model/longform.ts";
import { quoteName } from "../model/weight_source.ts";
import { formatBytes } from "../runtime/buffers.ts";
import { UsageError } from "../runtime/errors.ts";
import { printable } from "../runtime/printable.ts";
import { type Collection, type InputDocument, openFiles, openJsonl } from "./documents.ts";
import { readIds } from "./input.ts";
import { Instruments } from "./instruments.ts";
import { checkContext, modelFolder, noteChoices, noteSparsity } from "./load.ts";
import type { ClassifyOptions } from "./options.ts";
import {
  formatMs,
  formatRate,
  JsonArray,
  ProgressLine,
  writeJson,
  writeNote,
  writeResult,
} from "./output.ts";
import { formatProfile, type ProfileReport } from "./profile.ts";
import { type Memory, memoryReport, type SparsityReport, sparsityReport, type Timings } from "./report.ts";
import { ResultFile, type ResultSink, ResultStream } from "./result_file.ts";
import { abortOnSignal, interruptedExitCode } from "./signals.ts";
import { shortName } from "./table.ts";

/** What is said of a document, or of its beginning. */
interface ClassificationReport {
  readonly tokens: number;
  /** Whether the document has more tokens. */
  readonly truncated: boolean;
  readonly label: string;
  readonly scores: Readonly<Record<string, number>>;
  readonly logits: Readonly<Record<string, number>>;
}

/** What is printed for each document. */
type DocumentReport =
  & { readonly id: string | number; readonly file?: string }
  & (
    | { readonly error: string }
    | ClassificationReport & {
      readonly expected?: string;
      /** For several `--max-tokens`. */
      readonly by_length?: readonly (ClassificationReport & { readonly max_tokens: number })[];
      /** Documents that shared its pass, whose time is `prefill_ms`. */
      readonly batch: number;
      readonly timings: Timings;
    }
  );

/** What `--eval` adds. */
interface EvaluationsReport {
  readonly max_tokens: number | null;
  readonly evaluation: ReturnType<typeof evaluationReport>;
}

/** What `--json` prints where the results go to a file. */
interface RunReport {
  /** With those that could not be classified, without those that were there already. */
  readonly documents: number;
  readonly failed: number;
  readonly skipped: number;
  readonly tokens: number;
  readonly load_ms: number;
  readonly ms: number;
  /** Rates are null where there was nothing left to do. */
  readonly documents_per_s: number | null;
  readonly tokens_per_s: number | null;
  /** Share of `ms` in which the GPU was at work; null where it has no timestamps. */
  readonly gpu_busy: number | null;
  readonly sparsity?: SparsityReport;
  readonly evaluations?: readonly EvaluationsReport[];
  readonly profile?: ProfileReport;
  readonly memory: Memory;
}

/** Runs the command. @returns the exit code: 0, 1 when a document could not be classified, or a signal's */
export async function runClassify(options: ClassifyOptions): Promise<number> {
  const dir = await modelFolder(options);
  const config = await readConfig(dir);
  checkContext(config, options);
  checkLengths(config, options);
  const instruments = await Instruments.open(options);
  const labels = options.labels ?? await checkpointLabels(dir);
  const collection = await openCollection(options);
  try {
    const sink = options.out === undefined
      ? new ResultStream()
      : await ResultFile.open(options.out, { resume: options.resume, labels });
    try {
      return await new ClassifyRun(options, config, collection, sink, labels, instruments).run();
    } finally {
      await sink.close();
    }
  } finally {
    await collection.close();
  }
}

function checkLengths(
  { nPositions }: GPT2Config,
  { maxTokens, window, positions, context }: ClassifyOptions,
): void {
  const most = window ?? maxTokens?.at(-1);
  const flag = window === undefined ? "--max-tokens" : "--window";
  if (most !== undefined && most > nPositions && positions === "exact") {
    throw new UsageError(`\`${flag} ${most}\` is more than the model's ${nPositions} positions`, {
      hint: `use at most \`${flag} ${nPositions}\`, or go beyond with \`--positions interpolate\` or ` +
        "`--positions repeat`, at a loss",
    });
  }
  if (most !== undefined && context !== undefined && most > context) {
    throw new UsageError(`\`${flag} ${most}\` is more than \`--context ${context}\``, {
      hint: "cut documents to fewer tokens, or plan for more",
    });
  }
  if (positions !== "exact" && most === undefined && context === undefined) {
    throw new UsageError(`\`--positions ${positions}\` needs to know how long documents may be`, {
      hint: "give `--max-tokens` or `--context`",
    });
  }
}

async function openCollection(options: ClassifyOptions): Promise<Collection> {
  const { files, jsonl, ids, shard, expected } = options;
  if (ids !== undefined) return idsCollection(ids, await readIds(ids));
  if (jsonl) return await openJsonl(files, { shard, expected });
  if (files.length === 0 && process.stdin.isTTY) {
    throw new UsageError("There is nothing to classify", {
      hint: "name files or folders, or send a text through a pipe: longform classify book.txt",
    });
  }
  return await openFiles(files.length > 0 ? files : ["-"], { shard, hasExpected: expected !== undefined });
}

/** One document of token ids. */
function idsCollection(path: string, ids: readonly number[]): Collection {
  return {
    total: 1,
    largestBytes: ids.length,
    share: () => undefined,
    async *documents(isDone = () => false) {
      if (!isDone(path)) yield { index: 0, id: path, ids };
    },
    close: () => Promise.resolve(),
  };
}

/** One run over a collection. */
class ClassifyRun {
  readonly #options: ClassifyOptions;
  readonly #config: GPT2Config;
  readonly #collection: Collection;
  readonly #sink: ResultSink;
  readonly #instruments: Instruments;
  readonly #labels: ReadonlySet<string>;
  readonly #progress: ProgressLine;
  /** For the lengths of `--max-tokens`, or for documents as they are. */
  readonly #evaluations: readonly {
    readonly maxTokens: number | undefined;
    readonly evaluation: Evaluation;
  }[];
  readonly #reports: DocumentReport[] = [];
  readonly #array: JsonArray | undefined;
  #done = 0;
  #failed = 0;
  #tokens = 0;
  #startedAt = 0;
  #startShare = 0;
  #onStart = () => Promise.resolve();

  constructor(
    options: ClassifyOptions,
    config: GPT2Config,
    collection: Collection,
    sink: ResultSink,
    labels: readonly string[],
    instruments: Instruments,
  ) {
    this.#options = options;
    this.#config = config;
    this.#collection = collection;
    this.#sink = sink;
    this.#instruments = instruments;
    this.#labels = new Set(labels);
    this.#progress = new ProgressLine(options);
    const lengths = options.maxTokens ?? [undefined];
    this.#evaluations = options.expected === undefined
      ? []
      : lengths.map((maxTokens) => ({ maxTokens, evaluation: new Evaluation(labels) }));
    this.#array = options.json && options.out === undefined && options.expected === undefined
      ? new JsonArray()
      : undefined;
  }

  async run(): Promise<number> {
    const options = this.#options;
    const { controller, stop } = abortOnSignal(() => this.#progress.clear());
    let longform: Longform | undefined;
    try {
      longform = await this.#load(controller.signal);
      const { profiler } = longform;
      this.#onStart = () => this.#instruments.restart(profiler); // what ran before is no part of it
      if (!options.quiet) noteSparsity(longform.model);
      const { signal } = controller;
      const outcomes = longform.classify(this.#documents(signal), { ...options, signal });
      for await (const outcome of outcomes) {
        const { document } = outcome;
        if ("error" in outcome) this.#write({ ...named(document), error: outcome.error });
        else this.#writeResult(document, outcome.classified, longform.loadMs);
        this.#showProgress();
      }
      this.#sink.finishSkipping();
      await this.#finish(longform);
      return this.#failed > 0 ? 1 : 0;
    } catch (error) {
      if (!controller.signal.aborted || error !== controller.signal.reason) throw error;
      this.#array?.endEvenIfEmpty();
      return interruptedExitCode();
    } finally {
      stop();
      this.#progress.clear();
      this.#array?.end();
      await longform?.close();
    }
  }

  async #load(signal: AbortSignal): Promise<Longform> {
    const { labels, pooling, maxTokens, workers, verbose, kernels, quiet } = this.#options;
    const { total, largestBytes } = this.#collection;
    const context = this.#context();
    const isSingle = total === 1;
    return await Longform.load({
      ...this.#options,
      uses: ["classify"],
      context,
      classifying: {
        heads: [labels ? "labels" : "score"],
        pooling,
        lengths: maxTokens?.length ?? 1,
        ...(total !== undefined && largestBytes !== undefined
          ? { packTokens: total * Math.min(largestBytes, maxTokens?.at(-1) ?? Infinity) }
          : {}),
      },
      // A thread would take longer to start than it takes to encode one document.
      encodingWorkers: isSingle ? 0 : workers,
      profile: this.#instruments.profiling ?? { unit: "passes" },
      timeline: this.#instruments.timeline,
      onNotice: (message) => {
        if (!quiet) writeNote(`note: ${message}`);
      },
      onLoad: (loaded, bytes) => {
        signal.throwIfAborted();
        this.#progress.show(`loading ${Math.floor(100 * loaded / bytes)} %`);
      },
      onOpened: (gpu, config, elem) => noteChoices(gpu, config, elem, { verbose, kernels }),
    }).finally(() => this.#progress.clear());
  }

  /** Tokens of the longest document: what was asked for, or as many as it can have. */
  #context(): number {
    const { context, maxTokens, window, positions } = this.#options;
    const { nPositions } = this.#config;
    const limit = context ?? window ?? maxTokens?.at(-1) ?? nPositions;
    if (context !== undefined || positions !== "exact") return limit;
    // No text has more tokens than bytes; a template takes some too.
    const { largestBytes = Infinity } = this.#collection;
    return this.#options.labels ? nPositions : Math.max(1, Math.min(limit, largestBytes));
  }

  /** The documents that have no result yet; what is wrong with an expected label is an error of its document. */
  async *#documents(signal: AbortSignal): AsyncGenerator<InputDocument> {
    let skipped = 0;
    const hasResult = (id: string | number) => {
      signal.throwIfAborted();
      if (skipped === this.#sink.done) return false;
      this.#sink.matches(id);
      skipped++;
      return true;
    };
    for await (const document of this.#collection.documents(hasResult)) {
      if (this.#startedAt === 0) {
        this.#startedAt = performance.now();
        this.#startShare = this.#collection.share() ?? 0;
        await this.#onStart();
      }
      const error = this.#problem(document);
      yield error === undefined ? document : { index: document.index, ...named(document), error };
    }
  }

  /** What is wrong with a document's label. */
  #problem(document: InputDocument): string | undefined {
    if ("error" in document) return undefined;
    const { expected } = document;
    if (expected === undefined || this.#labels.has(expected)) return undefined;
    return `the expected label ${quoteName(expected)} is none of the ${this.#labels.size} labels`;
  }

  #writeResult(document: InputDocument, classified: ClassifiedDocument, loadMs: number): void {
    const { maxTokens } = this.#options;
    const { ms, batch, encodeMs, beginnings, ...whole } = classified;
    const expected = "expected" in document ? document.expected : undefined;
    const ofLength = (length: number | undefined): Classification =>
      beginnings.find(({ tokens }) => length !== undefined && tokens === length) ?? whole;
    for (const { maxTokens: length, evaluation } of this.#evaluations) {
      if (expected !== undefined) evaluation.add(expected, ofLength(length).label);
    }
    this.#tokens += whole.tokens;
    this.#write({
      ...named(document),
      ...reportOf(whole),
      ...(expected === undefined ? {} : { expected }),
      ...(maxTokens && maxTokens.length > 1
        ? { by_length: maxTokens.map((length) => ({ max_tokens: length, ...reportOf(ofLength(length)) })) }
        : {}),
      batch,
      timings: {
        load_ms: loadMs,
        tokenize_ms: encodeMs,
        first_token_ms: null,
        prefill_ms: ms,
        prefill_tokens_per_s: batch === 1 ? 1000 * whole.tokens / ms : null,
        decode_ms: null,
        decode_tokens_per_s: null,
      },
    });
  }

  #write(report: DocumentReport): void {
    this.#done++;
    if ("error" in report) this.#failed++;
    const { jsonl, out, json, expected } = this.#options;
    if (jsonl || out !== undefined) this.#sink.write(report);
    else if (this.#array) this.#array.push(report);
    else if (json && expected !== undefined) this.#reports.push(report);
    else {
      this.#progress.clear();
      writeResult(formatReport(report));
    }
  }

  #showProgress(): void {
    const elapsedMs = performance.now() - this.#startedAt;
    const { total } = this.#collection;
    const share = this.#collection.share();
    const of = total === undefined ? "" : ` of ${total - this.#sink.done}`;
    const left = total !== undefined
      ? elapsedMs / this.#done * (total - this.#sink.done - this.#done)
      : share !== undefined && share > this.#startShare
      ? elapsedMs * (1 - share) / (share - this.#startShare)
      : undefined;
    this.#progress.show(
      `${this.#done}${of} documents, ${formatRate(1000 * this.#done / elapsedMs, "documents")}, ` +
        `${formatRate(1000 * this.#tokens / elapsedMs)}${
          left === undefined ? "" : `, ${formatMs(left)} left`
        }`,
    );
  }

  async #finish(longform: Longform): Promise<void> {
    const { json, quiet, out, jsonl, expected } = this.#options;
    this.#progress.clear();
    await longform.profiler?.settle();
    const run = this.#report(longform);
    const { gpu, model, profiler } = longform;
    const profile = await this.#instruments.profile(gpu, model, profiler);
    const report: RunReport = { ...run, ...(profile ? { profile } : {}) };
    this.#array?.endEvenIfEmpty();
    if (json && out !== undefined) writeJson(report);
    else if (json && expected !== undefined) {
      writeJson({ results: this.#reports, evaluations: report.evaluations });
    } else if (expected !== undefined) {
      const table = this.#formatEvaluations();
      if (jsonl && out === undefined) writeNote(table);
      else writeResult(table);
    }
    if (profile && !(json && out !== undefined)) writeNote(formatProfile(profile));
    await this.#instruments.writeTrace(gpu, profiler);
    if (!quiet && !json && report.documents + report.skipped > 0) writeNote(formatRun(report));
    if (this.#failed > 0) {
      writeNote(`error: ${this.#failed} of ${counted(this.#done, "document")} could not be classified`);
    }
  }

  #report({ gpu, model, loadMs, profiler }: Longform): RunReport {
    const { expected } = this.#options;
    const ms = this.#startedAt === 0 ? 0 : performance.now() - this.#startedAt;
    const sparsity = sparsityReport(model);
    return {
      documents: this.#done,
      failed: this.#failed,
      skipped: this.#sink.done,
      tokens: this.#tokens,
      load_ms: loadMs,
      ms,
      documents_per_s: ms > 0 ? 1000 * this.#done / ms : null,
      tokens_per_s: ms > 0 ? 1000 * this.#tokens / ms : null,
      gpu_busy: profiler?.unit === "passes" && ms > 0 ? profiler.busyMs / ms : null,
      ...(sparsity ? { sparsity } : {}),
      ...(expected === undefined ? {} : {
        evaluations: this.#evaluations.map(({ maxTokens, evaluation }) => ({
          max_tokens: maxTokens ?? null,
          evaluation: evaluationReport(evaluation),
        })),
      }),
      memory: memoryReport(gpu, model),
    };
  }

  #formatEvaluations(): string {
    const last = this.#evaluations.at(-1)!;
    const byLength = this.#evaluations.flatMap(({ maxTokens, evaluation }) =>
      maxTokens === undefined ? [] : [{ tokens: maxTokens, evaluation }]
    );
    const table = byLength.length > 1 ? `${formatByLength(byLength)}\n` : "";
    return `\n${formatEvaluation(last.evaluation).trimEnd()}\n${table && `\n${table}`}`;
  }
}

function named({ id, file }: InputDocument): { readonly id: string | number; readonly file?: string } {
  return { id, ...(file === undefined ? {} : { file }) };
}

function reportOf({ tokens, truncated, label, scores, logits }: Classification): ClassificationReport {
  return { tokens, truncated, label, scores, logits };
}

/** `book.txt: Jack London 97.3 % (Mark Twain 1.0 %), 16384 tokens` */
function formatReport(report: DocumentReport): string {
  const name = printable(String(report.file ?? report.id));
  if ("error" in report) return `${name}: error: ${report.error}\n`;
  const { label, scores, tokens, truncated } = report;
  const [second] = Object.entries(scores).filter(([other]) => other !== label).toSorted(([, a], [, b]) =>
    b - a
  );
  const score = (value: number) =>
    value >= 0 && value <= 1 ? `${(100 * value).toFixed(1)} %` : value.toPrecision(4);
  const runnerUp = second ? ` (${shortName(second[0])} ${score(second[1])})` : "";
  const cut = truncated ? `first ${tokens} tokens` : counted(tokens, "token");
  return `${name}: ${shortName(label)} ${score(scores[label]!)}${runnerUp}, ${cut}\n`;
}

function formatRun({ documents, skipped, tokens, ms, gpu_busy, memory, ...rates }: RunReport): string {
  if (documents === 0) return `nothing left to do: ${counted(skipped, "result")} there already`;
  const before = skipped > 0 ? `${counted(skipped, "result")} there already; ` : "";
  const busy = gpu_busy === null ? "" : `, GPU at work ${(100 * gpu_busy).toFixed(0)} % of the time`;
  return `${before}${counted(documents, "document")}, ${tokens.toLocaleString("en-US")} tokens in ${
    formatMs(ms)
  }: ` +
    `${formatRate(rates.documents_per_s, "documents")}, ${formatRate(rates.tokens_per_s)}${busy}; ` +
    `${formatBytes(memory.peak_bytes)} of GPU memory`;
}

function counted(count: number, noun: string): string {
  return `${count.toLocaleString("en-US")} ${noun}${count === 1 ? "" : "s"}`;
}
