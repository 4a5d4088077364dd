/** `generate`: a prompt in, streamed text out. */
import type { Sparsity } from "../kvcache/sparsity.ts";
import { type GPT2Config, readConfig } from "../model/config.ts";
import type { DecoderOptions } from "../model/decoder.ts";
import { type FinishReason, generate, type Prompt } from "../model/generation.ts";
import type { Gpt2 } from "../model/gpt2.ts";
import type { Positions } from "../model/positions.ts";
import { chooseElem, inFlightOf, openSparsity } from "../model/run_settings.ts";
import { openCheckpoint } from "../model/safetensors.ts";
import type { TokenLogprob } from "../model/sampling.ts";
import { TextTokens, tokensOf, type TokenSource } from "../model/token_source.ts";
import { type GPT2Tokenizer, loadTokenizer } from "../model/tokenizer.ts";
import type { WeightSource } from "../model/weight_source.ts";
import { formatBytes } from "../runtime/buffers.ts";
import type { Gpu } from "../runtime/device.ts";
import { InputError, UsageError } from "../runtime/errors.ts";
import { timed } from "../runtime/timeline.ts";
import { type Prompt as PromptInput, readPrompt } from "./input.ts";
import { Instruments } from "./instruments.ts";
import {
  boundTokens,
  checkContext,
  checkPositions,
  choosePositions,
  hasFile,
  loadModel,
  modelFolder,
  openCommandDevice,
} from "./load.ts";
import type { GenerateOptions } from "./options.ts";
import {
  ClosedPipe,
  formatMs,
  formatRate,
  ProgressLine,
  workProgress,
  writeJson,
  writeNote,
  writeResult,
} from "./output.ts";
import { PromptSession, type SessionReport } from "./prompt_session.ts";
import { formatProfile, type ProfileReport } from "./profile.ts";
import { type Memory, memoryReport, type SparsityReport, sparsityReport, type Timings } from "./report.ts";
import { abortOnSignal, interruptedExitCode } from "./signals.ts";

export interface LogprobEntry {
  readonly id: number;
  readonly token: string;
  readonly logprob: number;
}

/** What `--json` says of a token's probability, and of the likeliest ones in its place. */
export type TokenLogprobs = LogprobEntry & { readonly top: readonly LogprobEntry[] };

/** The same with the tokens' texts. */
export function namedLogprobs(
  tokenizer: GPT2Tokenizer | undefined,
  id: number,
  logprob: number,
  top: readonly TokenLogprob[],
): TokenLogprobs {
  const named = (entry: TokenLogprob) => ({ ...entry, token: tokenizer?.decode([entry.id]) ?? "" });
  return { ...named({ id, logprob }), top: top.map(named) };
}

/** What `--json` prints. */
interface GenerateReport {
  readonly text: string;
  readonly prompt_tokens: number;
  readonly tokens: readonly number[];
  readonly finish_reason: FinishReason;
  readonly seed: number;
  readonly logprobs?: readonly TokenLogprobs[];
  readonly session?: SessionReport;
  /** Absent for dense attention. */
  readonly sparsity?: SparsityReport;
  readonly profile?: ProfileReport;
  readonly timings: Timings;
  readonly memory: Memory;
}

/** What is settled before the device is open. */
interface PreparedPrompt {
  readonly config: GPT2Config;
  readonly sparsity: Sparsity;
  /** Undefined when the prompt came as ids and the model has none. */
  readonly tokenizer: GPT2Tokenizer | undefined;
  readonly tokens: TokenSource;
  /** The most tokens that it has. */
  readonly bound: number;
  /** How many it has; undefined while the end of a long text is not encoded. */
  readonly promptTokens: () => number | undefined;
  /** How many of them are known. */
  readonly knownTokens: () => number;
  /** Milliseconds spent on the prompt's tokens so far. */
  readonly tokenizeMs: () => number | null;
}

/** How tokens are drawn. */
export function drawingOf(options: GenerateOptions): DecoderOptions {
  const { temperature, topK, topP, minP, repeatPenalty, logprobs } = options;
  return { sampling: { temperature, topK, topP, minP, repeatPenalty }, logprobs };
}

/** The seed that was asked for, or a random one. */
export function seedOf({ seed }: GenerateOptions): number {
  return seed ?? crypto.getRandomValues(new Uint32Array(1))[0]!;
}

/** Runs the command. @returns the exit code: 0, or a signal's when one has ended it */
export async function runGenerate(options: GenerateOptions): Promise<number> {
  const dir = await modelFolder(options);
  const config = await readConfig(dir);
  checkContext(config, options);
  const instruments = await Instruments.open(options);
  const prompt = await readPrompt(options);
  try {
    // The driver takes a while to start: it does so while the tokenizer is built and the prompt is tokenized.
    const opening = openCommandDevice(options, instruments.timeline);
    opening.catch(() => {});
    const prepared = await timed(
      instruments.timeline,
      "phases",
      "prepare the prompt",
      () => prepare(dir, config, prompt, instruments, options),
    );
    const source = await openCheckpoint(dir);
    try {
      const gpu = await opening;
      try {
        return await runOnDevice(gpu, source, prepared, instruments, options);
      } finally {
        gpu.destroy();
      }
    } finally {
      await source.close();
    }
  } finally {
    if ("input" in prompt) await prompt.input.close();
  }
}

async function prepare(
  dir: string,
  config: GPT2Config,
  prompt: PromptInput,
  { timeline }: Instruments,
  options: GenerateOptions,
): Promise<PreparedPrompt> {
  const sparsity = await openSparsity(options.sparsity);
  if ("ids" in prompt) {
    const tokenizer = await hasFile(dir, "tokenizer.json") ? await loadTokenizer(dir) : undefined;
    if (!tokenizer && options.stop.length > 0) {
      throw new UsageError(`\`--stop\` needs a tokenizer, and ${dir} has none`);
    }
    return { config, sparsity, tokenizer, ...known(prompt.ids), tokenizeMs: () => null };
  }
  const tokenizer = await timed(timeline, "phases", "load the tokenizer", () => loadTokenizer(dir));
  if ("text" in prompt) {
    const starting = performance.now();
    const endEncoding = timeline?.begin("tokenization", "prompt");
    const ids = tokenizer.encode(prompt.text);
    endEncoding?.();
    const tokenizeMs = performance.now() - starting;
    return { config, sparsity, tokenizer, ...known(ids), tokenizeMs: () => tokenizeMs };
  }
  const { input } = prompt;
  const tokens = new TextTokens(tokenizer.encoder(), input.pieces, input.byteLength, timeline);
  const bound = await boundTokens(tokens, options);
  return {
    config,
    sparsity,
    tokenizer,
    tokens,
    bound,
    promptTokens: () => tokens.isExact ? tokens.bound() : undefined,
    knownTokens: () => tokens.known,
    tokenizeMs: () => tokens.encodeMs,
  };
}

function known(
  ids: readonly number[],
): Pick<PreparedPrompt, "tokens" | "bound" | "promptTokens" | "knownTokens"> {
  const count = () => ids.length;
  return { tokens: tokensOf(ids), bound: ids.length, promptTokens: count, knownTokens: count };
}

async function runOnDevice(
  gpu: Gpu,
  source: WeightSource,
  prepared: PreparedPrompt,
  instruments: Instruments,
  options: GenerateOptions,
): Promise<number> {
  const { config, sparsity } = prepared;
  const { context, positions } = planContext(prepared, options);
  const elem = chooseElem(options.dtype, gpu.caps);
  const progress = new ProgressLine(options);
  const session = options.session === undefined ? undefined : await PromptSession.open(options.session, {
    source,
    config,
    elem,
    positions,
    sparsity,
    isQuiet: options.quiet,
  });
  try {
    const needs = {
      elem,
      context,
      positions,
      sparsity,
      decoding: { sequences: 1, inFlight: options.inFlight ?? inFlightOf(gpu), logprobs: options.logprobs },
      expected: { promptTokens: prepared.promptTokens(), drawing: drawingOf(options) },
    };
    const { model, loadMs, profiler } = await loadModel(
      gpu,
      source,
      config,
      needs,
      options,
      progress,
      instruments.profiling,
    );
    try {
      const prompt = await session?.begin(model, prepared.tokens, progress) ??
        { cached: [], rest: prepared.tokens };
      const result = await stream(model, prompt, prepared, session, options, progress);
      const timings = { load_ms: loadMs, tokenize_ms: prepared.tokenizeMs(), ...result.timings };
      const memory = memoryReport(gpu, model);
      const profile = await instruments.profile(gpu, model, profiler);
      report(result, timings, memory, sparsityReport(model), session, profile, options);
      await instruments.writeTrace(gpu, profiler);
      return result.finishReason === "interrupt" && !result.isPipeClosed ? interruptedExitCode() : 0;
    } finally {
      profiler?.destroy();
      model.destroy();
    }
  } finally {
    await session?.close();
  }
}

/** Tokens to plan memory for: what was asked for, or what this run can need. */
function planContext(
  { config, bound, promptTokens, knownTokens }: PreparedPrompt,
  options: GenerateOptions,
): { context: number; positions: Positions } {
  if (bound === 0) throw new InputError("The prompt is empty: it has no tokens");
  const limit = options.positions === "exact" ? config.nPositions : Infinity;
  const context = options.context ?? Math.min(bound + options.maxTokens, limit);
  const positions = choosePositions(config, options, context);
  // Of a long text only the beginning is encoded yet; the rest is checked when it is there.
  const isAll = promptTokens() !== undefined;
  const tokens = knownTokens();
  checkPositions(tokens, isAll, positions);
  if (tokens > context) {
    const count = `${isAll ? "" : "over "}${tokens} tokens`;
    throw new InputError(`The prompt is longer than the context: ${count}, room for ${context}`, {
      hint: "shorten the prompt, or plan for more with `--context`",
    });
  }
  return { context, positions };
}

interface StreamResult {
  readonly text: string;
  readonly promptTokens: number;
  readonly tokens: readonly number[];
  readonly finishReason: FinishReason;
  readonly isPipeClosed: boolean;
  readonly seed: number;
  readonly logprobs: GenerateReport["logprobs"] | undefined;
  readonly timings: Omit<Timings, "load_ms" | "tokenize_ms">;
}

/** Where text goes: to stdout as it comes, unless the output is one JSON document at the end. */
class TextOutput {
  text = "";
  isPipeClosed = false;
  readonly #isStreaming: boolean;

  constructor(isStreaming: boolean) {
    this.#isStreaming = isStreaming;
  }

  emit(piece: string): void {
    this.text += piece;
    this.#write(piece);
  }

  /** Ends the last line on stdout; the newline is not part of the text. */
  end(): void {
    this.#write("\n");
  }

  #write(piece: string): void {
    if (!this.#isStreaming || piece === "" || this.isPipeClosed) return;
    try {
      writeResult(piece);
    } catch (error) {
      if (!(error instanceof ClosedPipe)) throw error;
      this.isPipeClosed = true;
    }
  }
}

/** Generates and, unless the output is JSON, prints the text as it comes. */
async function stream(
  model: Gpt2,
  prompt: Prompt,
  { tokenizer, promptTokens }: PreparedPrompt,
  session: PromptSession | undefined,
  options: GenerateOptions,
  progress: ProgressLine,
): Promise<StreamResult> {
  const seed = seedOf(options);
  const { sampling, logprobs: wantedLogprobs } = drawingOf(options);
  const { controller, stop } = abortOnSignal(() => progress.clear());
  const output = new TextOutput(!options.json);
  const starting = performance.now();
  const cached = prompt.cached.length;
  const generation = generate(model, prompt, tokenizer?.bytesOf.bind(tokenizer), {
    maxTokens: options.maxTokens,
    sampling: { ...sampling, seed },
    stop: options.stop,
    eosIds: options.ignoreEos ? [] : model.config.eosTokenId,
    logprobs: wantedLogprobs,
    signal: controller.signal,
    onPrefillProgress: (done) => {
      const total = promptTokens();
      const elapsedMs = performance.now() - starting;
      progress.show(workProgress("prefill", done, total && total - cached, elapsedMs));
    },
    onPrefilled: async (ids, logits) => {
      prefill = { tokens: ids.length, ms: performance.now() - starting };
      await session?.save(model, ids, logits, progress, controller.signal);
    },
  });

  let prefill: { tokens: number; ms: number } | undefined;
  const tokens: number[] = [];
  const logprobs: TokenLogprobs[] = [];
  let firstTokenAt: number | undefined;
  try {
    for (;;) {
      const next = await generation.next();
      firstTokenAt ??= performance.now();
      progress.clear();
      if (next.done) {
        output.emit(next.value.heldBack);
        if (tokens.length > 0) output.end();
        // An interrupted prefill has run only the part of the prompt that is in the cache.
        prefill ??= { tokens: model.length, ms: firstTokenAt - starting };
        return {
          text: output.text,
          promptTokens: promptTokens() ?? prefill.tokens,
          tokens,
          finishReason: next.value.finishReason,
          isPipeClosed: output.isPipeClosed,
          seed,
          logprobs: options.logprobs === undefined ? undefined : logprobs,
          timings: streamTimings(prefill.tokens - cached, prefill.ms, firstTokenAt, tokens.length),
        };
      }
      const { id, text, logprob, top } = next.value;
      tokens.push(id);
      if (logprob !== undefined && top) logprobs.push(namedLogprobs(tokenizer, id, logprob, top));
      if (tokenizer) output.emit(text);
      else if (!options.json) output.emit(`${tokens.length > 1 ? " " : ""}${id}`); // ids are the result then
      if (output.isPipeClosed) controller.abort();
    }
  } finally {
    stop();
    progress.clear();
  }
}

/** @param firstTokenAt ms since the process started, which is when the clock of `performance` does */
function streamTimings(
  prefillTokens: number,
  prefillMs: number,
  firstTokenAt: number,
  generated: number,
): StreamResult["timings"] {
  const decodeMs = generated > 1 ? performance.now() - firstTokenAt : null;
  return {
    first_token_ms: generated > 0 ? firstTokenAt : null,
    prefill_ms: prefillMs,
    prefill_tokens_per_s: prefillTokens === 0 ? null : 1000 * prefillTokens / prefillMs,
    decode_ms: decodeMs,
    decode_tokens_per_s: decodeMs === null ? null : 1000 * (generated - 1) / decodeMs,
  };
}

function report(
  result: StreamResult,
  timings: Timings,
  memory: Memory,
  sparsity: SparsityReport | undefined,
  session: PromptSession | undefined,
  profile: ProfileReport | undefined,
  options: GenerateOptions,
): void {
  if (options.json) {
    const document: GenerateReport = {
      text: result.text,
      prompt_tokens: result.promptTokens,
      tokens: result.tokens,
      finish_reason: result.finishReason,
      seed: result.seed,
      ...(result.logprobs ? { logprobs: result.logprobs } : {}),
      ...(session ? { session: session.report() } : {}),
      ...(sparsity ? { sparsity } : {}),
      ...(profile ? { profile } : {}),
      timings,
      memory,
    };
    writeJson(document);
  } else if (profile) {
    writeNote(formatProfile(profile));
  }
  if (options.quiet || options.json || result.isPipeClosed) return;
  const first = timings.first_token_ms === null
    ? ""
    : `, first token after ${formatMs(timings.first_token_ms)}`;
  writeNote(
    `prompt ${result.promptTokens} tokens, ${formatRate(timings.prefill_tokens_per_s)}; ` +
      `generated ${result.tokens.length}, ${formatRate(timings.decode_tokens_per_s)}${first}; ` +
      `${
        formatBytes(memory.peak_bytes)
      } of GPU memory; seed ${result.seed}; finished: ${result.finishReason}`,
  );
}
