/** `generate --prompts FILE`: many prompts in, a line of JSON for each out, in the order of the prompts. */
import { type BatchResult, generateBatch, seedOf as seedOfPrompt } from "../model/batch.ts";
import type { Sparsity } from "../kvcache/sparsity.ts";
import { type GPT2Config, readConfig } from "../model/config.ts";
import type { FinishReason } from "../model/generation.ts";
import { tooManyPositions } from "../model/gpt2.ts";
import { positionLimit, type Positions } from "../model/positions.ts";
import { chooseElem, inFlightOf, openSparsity } from "../model/run_settings.ts";
import { openCheckpoint } from "../model/safetensors.ts";
import { type GPT2Tokenizer, loadTokenizer } from "../model/tokenizer.ts";
import type { WeightSource } from "../model/weight_source.ts";
import { formatBytes } from "../runtime/buffers.ts";
import type { Gpu } from "../runtime/device.ts";
import { InputError } from "../runtime/errors.ts";
import { printableMessage } from "../runtime/printable.ts";
import { timed } from "../runtime/timeline.ts";
import { drawingOf, namedLogprobs, seedOf, type TokenLogprobs } from "./generate.ts";
import { readWhole } from "./input.ts";
import { Instruments } from "./instruments.ts";
import { checkContext, choosePositions, loadModel, modelFolder, openCommandDevice } from "./load.ts";
import type { GenerateOptions } from "./options.ts";
import {
  ClosedPipe,
  formatMs,
  formatRate,
  ProgressLine,
  writeJson,
  writeNote,
  writeResult,
} from "./output.ts";
import { formatProfile, type ProfileReport } from "./profile.ts";
import { type Memory, memoryReport, type SparsityReport, sparsityReport, type Timings } from "./report.ts";
import { abortOnSignal, interruptedExitCode } from "./signals.ts";

/** A line of the file. */
interface PromptLine {
  /** From 1. */
  readonly line: number;
  readonly id?: string | number;
  readonly text: string;
}

/** What is wrong with a line, or with its prompt. */
interface BadLine extends Omit<PromptLine, "text"> {
  readonly error: string;
}

interface PreparedLine extends Omit<PromptLine, "text"> {
  readonly ids: readonly number[];
}

/** What is printed for each line of the file. */
type LineReport =
  & { readonly line: number; readonly id?: string | number }
  & (
    | { readonly error: string }
    | {
      readonly text: string;
      readonly prompt_tokens: number;
      readonly tokens: readonly number[];
      readonly finish_reason: FinishReason;
      readonly seed: number;
      readonly logprobs?: readonly TokenLogprobs[];
    }
  );

/** What `--json` prints. */
interface BatchReport {
  readonly results: readonly LineReport[];
  readonly batch: number;
  /** Absent for dense attention. */
  readonly sparsity?: SparsityReport;
  readonly profile?: ProfileReport;
  readonly timings: Timings;
  readonly memory: Memory;
}

/** Prompts that are decoded together unless `--batch` says otherwise. */
const BATCH = 32;
const SOFTWARE_BATCH = 4;

/** Runs the command. @returns the exit code: 0, 1 when a line could not be used, or a signal's */
export async function runGenerateBatch(options: GenerateOptions): Promise<number> {
  const dir = await modelFolder(options);
  const config = await readConfig(dir);
  checkContext(config, options);
  const sparsity = await openSparsity(options.sparsity);
  const lines = await readLines(options.prompts!);
  const instruments = await Instruments.open(options);
  const { timeline } = instruments;
  const opening = openCommandDevice(options, timeline);
  opening.catch(() => {});
  const tokenizer = await timed(timeline, "phases", "load the tokenizer", () => loadTokenizer(dir));
  const starting = performance.now();
  const endEncoding = timeline?.begin("tokenization", "prompts");
  const prepared = lines.map((line) => "error" in line ? line : encoded(line, tokenizer));
  endEncoding?.();
  const tokenizeMs = performance.now() - starting;
  const source = await openCheckpoint(dir);
  try {
    const gpu = await opening;
    try {
      const batch = new Batch(gpu, config, tokenizer, sparsity, instruments, options);
      return await batch.run(source, prepared, tokenizeMs);
    } finally {
      gpu.destroy();
    }
  } finally {
    await source.close();
  }
}

/** The lines that are not empty. Where the first is a JSON object, all must be. */
export async function readLines(path: string): Promise<(PromptLine | BadLine)[]> {
  const { name, text } = await readWhole(path);
  // Editors of some systems begin a file with a mark of its encoding.
  const lines = text.replace(/^\ufeff/, "").split(/\r?\n/)
    .map((text, i) => ({ line: i + 1, text }))
    .filter(({ text }) => text.trim() !== "");
  if (lines.length === 0) throw new InputError(`${name} holds no prompts`);
  return lines[0]!.text.trimStart().startsWith("{") ? lines.map(parseRecord) : lines;
}

function parseRecord({ line, text }: PromptLine): PromptLine | BadLine {
  let record: unknown;
  try {
    record = JSON.parse(text);
  } catch (error) {
    return { line, error: printableMessage(`not JSON: ${(error as Error).message}`) };
  }
  if (typeof record !== "object" || record === null || Array.isArray(record)) {
    return { line, error: "not a JSON object" };
  }
  const { id, prompt } = record as { id?: unknown; prompt?: unknown };
  const named = typeof id === "string" || typeof id === "number" ? { line, id } : { line };
  if (id !== undefined && named.id === undefined) {
    return { line, error: '"id" is neither a string nor a number' };
  }
  // It would come back as another one, or as null.
  if (typeof id === "number" && Math.abs(id) > Number.MAX_SAFE_INTEGER) {
    return { line, error: '"id" is too large for a number: put it in quotes' };
  }
  if (typeof prompt !== "string") return { ...named, error: 'there is no text under "prompt"' };
  return { ...named, text: prompt };
}

function encoded({ text, ...named }: PromptLine, tokenizer: GPT2Tokenizer): PreparedLine | BadLine {
  try {
    const ids = tokenizer.encode(text);
    return ids.length === 0 ? { ...named, error: "the prompt is empty" } : { ...named, ids };
  } catch (error) {
    if (!(error instanceof InputError)) throw error;
    return { ...named, error: error.message };
  }
}

/** One run over the prompts of a file. */
class Batch {
  readonly #gpu: Gpu;
  readonly #config: GPT2Config;
  readonly #tokenizer: GPT2Tokenizer;
  readonly #sparsity: Sparsity;
  readonly #instruments: Instruments;
  readonly #options: GenerateOptions;
  readonly #seed: number;

  constructor(
    gpu: Gpu,
    config: GPT2Config,
    tokenizer: GPT2Tokenizer,
    sparsity: Sparsity,
    instruments: Instruments,
    options: GenerateOptions,
  ) {
    this.#gpu = gpu;
    this.#config = config;
    this.#tokenizer = tokenizer;
    this.#sparsity = sparsity;
    this.#instruments = instruments;
    this.#options = options;
    this.#seed = seedOf(options);
  }

  async run(
    source: WeightSource,
    prepared: readonly (PreparedLine | BadLine)[],
    tokenizeMs: number,
  ): Promise<number> {
    const options = this.#options;
    const config = this.#config;
    const { context, positions } = this.#planContext(prepared);
    const lines = prepared.map((line) => "error" in line ? line : fitting(line, context, positions));
    const usable = lines.flatMap((line, place) => "ids" in line ? [{ line, place }] : []);
    const out = new OrderedOutput(lines.length, !options.json);
    lines.forEach((line, i) => {
      if ("error" in line) out.set(i, line);
    });
    const progress = new ProgressLine(options);
    const most = options.batch ?? (this.#gpu.caps.isSoftware ? SOFTWARE_BATCH : BATCH);
    const sequences = Math.max(1, Math.min(most, usable.length));
    const { sampling, logprobs } = drawingOf(options);
    const { model, loadMs, profiler } = await loadModel(
      this.#gpu,
      source,
      config,
      {
        elem: chooseElem(options.dtype, this.#gpu.caps),
        context,
        positions,
        sparsity: this.#sparsity,
        decoding: { sequences, inFlight: options.inFlight ?? inFlightOf(this.#gpu), logprobs },
        expected: { promptTokens: usable[0]?.line.ids.length, drawing: { sampling, logprobs } },
      },
      options,
      progress,
      this.#instruments.profiling,
    );
    const { controller, stop } = abortOnSignal(() => progress.clear());
    const prefill = { tokens: 0, ms: 0 };
    let generated = 0;
    let firstTokenAt: number | null = null;
    let isInterrupted = false;
    const starting = performance.now();
    try {
      const results = generateBatch(
        model,
        usable.map(({ line }) => line.ids),
        this.#tokenizer.bytesOf.bind(this.#tokenizer),
        {
          maxTokens: options.maxTokens,
          sampling: { ...sampling, seed: this.#seed },
          stop: options.stop,
          eosIds: options.ignoreEos ? [] : config.eosTokenId,
          logprobs,
          signal: controller.signal,
          onPrefilled: (tokens, ms) => {
            prefill.tokens += tokens;
            prefill.ms += ms;
          },
          onToken: () => {
            firstTokenAt ??= performance.now();
            generated++;
            const rate = formatRate(1000 * generated / (performance.now() - starting));
            progress.show(`${out.done} of ${lines.length} prompts, ${rate}`);
          },
        },
      );
      for await (const result of results) {
        const { line, place } = usable[result.index]!;
        progress.clear();
        out.set(place, this.#reportOf(line, result));
        if (out.isClosed) controller.abort();
        isInterrupted ||= result.finishReason === "interrupt";
      }
      isInterrupted ||= controller.signal.aborted;
      out.finish();
      const decodeMs = generated === 0 ? null : performance.now() - starting - prefill.ms;
      const timings: Timings = {
        load_ms: loadMs,
        tokenize_ms: tokenizeMs,
        first_token_ms: firstTokenAt,
        prefill_ms: prefill.ms,
        prefill_tokens_per_s: prefill.tokens === 0 ? null : 1000 * prefill.tokens / prefill.ms,
        decode_ms: decodeMs,
        decode_tokens_per_s: decodeMs === null ? null : 1000 * generated / decodeMs,
      };
      const memory = memoryReport(this.#gpu, model);
      const sparsity = sparsityReport(model);
      const profile = await this.#instruments.profile(this.#gpu, model, profiler);
      const report: BatchReport = {
        results: out.reports,
        batch: sequences,
        ...(sparsity ? { sparsity } : {}),
        ...(profile ? { profile } : {}),
        timings,
        memory,
      };
      if (options.json) writeJson(report);
      else if (profile) writeNote(formatProfile(profile));
      await this.#instruments.writeTrace(this.#gpu, profiler);
      const failed = lines.length - usable.length;
      if (!options.quiet && !options.json && !out.isClosed) this.#note(report, generated, failed);
      if (out.isClosed) return 0;
      return isInterrupted ? interruptedExitCode() : failed > 0 ? 1 : 0;
    } catch (error) {
      out.finish();
      throw error;
    } finally {
      stop();
      progress.clear();
      profiler?.destroy();
      model.destroy();
    }
  }

  /** Room for the longest prompt and what may follow it, unless it is given. */
  #planContext(lines: readonly (PreparedLine | BadLine)[]): { context: number; positions: Positions } {
    const { context, maxTokens, positions } = this.#options;
    const longest = lines.reduce((most, line) => Math.max(most, "ids" in line ? line.ids.length : 0), 1);
    const limit = positions === "exact" ? this.#config.nPositions : Infinity;
    const planned = context ?? Math.min(longest + maxTokens, limit);
    return { context: planned, positions: choosePositions(this.#config, this.#options, planned) };
  }

  #reportOf({ ids, ...named }: PreparedLine, result: BatchResult): LineReport {
    const { text, tokens, logprobs, finishReason, index } = result;
    return {
      ...named,
      text,
      prompt_tokens: ids.length,
      tokens,
      finish_reason: finishReason,
      seed: seedOfPrompt(this.#seed, index),
      ...(this.#options.logprobs === undefined ? {} : {
        logprobs: logprobs.map(({ logprob, top }, i) =>
          namedLogprobs(this.#tokenizer, tokens[i]!, logprob, top)
        ),
      }),
    };
  }

  #note({ results, batch, timings, memory }: BatchReport, generated: number, failed: number): void {
    const first = timings.first_token_ms === null
      ? ""
      : `, first token after ${formatMs(timings.first_token_ms)}`;
    writeNote(
      `${results.length} prompts, ${batch} together, prefill ${formatRate(timings.prefill_tokens_per_s)}; ` +
        `generated ${generated} tokens, ${formatRate(timings.decode_tokens_per_s)}${first}; ` +
        `${formatBytes(memory.peak_bytes)} of GPU memory; seed ${this.#seed}` +
        (failed === 0 ? "" : `; ${failed} ${failed === 1 ? "line" : "lines"} could not be used`),
    );
  }
}

/** A prompt that the run has room for, or why it has none. */
function fitting(line: PreparedLine, context: number, positions: Positions): PreparedLine | BadLine {
  const { ids, ...named } = line;
  if (ids.length > positionLimit(positions)) {
    return { ...named, error: tooManyPositions(`The prompt, ${ids.length} tokens,`, positions).message };
  }
  if (ids.length > context) {
    return { ...named, error: `the prompt has ${ids.length} tokens, there is room for ${context}` };
  }
  return line;
}

/** Reports in the order of the lines, each as soon as all before it are there. */
class OrderedOutput {
  readonly #reports: (LineReport | undefined)[];
  readonly #isStreaming: boolean;
  #written = 0;
  done = 0;
  isClosed = false;

  constructor(count: number, isStreaming: boolean) {
    this.#reports = new Array(count).fill(undefined);
    this.#isStreaming = isStreaming;
  }

  get reports(): LineReport[] {
    return this.#reports.filter((report) => report !== undefined);
  }

  set(i: number, report: LineReport): void {
    this.#reports[i] = report;
    this.done++;
    while (this.#reports[this.#written]) this.#write(this.#reports[this.#written++]!);
  }

  /** Writes what an interruption or an error has left without predecessors. */
  finish(): void {
    for (const report of this.#reports.slice(this.#written)) if (report) this.#write(report);
    this.#written = this.#reports.length;
  }

  #write(report: LineReport): void {
    if (!this.#isStreaming || this.isClosed) return;
    try {
      writeResult(JSON.stringify(report) + "\n");
    } catch (error) {
      if (!(error instanceof ClosedPipe)) throw error;
      this.isClosed = true;
    }
  }
}
