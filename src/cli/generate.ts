/** `generate`: a prompt in, streamed text out. */
import process from "node:process";
import { explainChoices } from "../kernels/index.ts";
import { kvBytesPerToken } from "../kvcache/cache.ts";
import { type GPT2Config, readConfig } from "../model/config.ts";
import { type FinishReason, generate } from "../model/generation.ts";
import { Gpt2 } from "../model/gpt2.ts";
import { kernelShape, kvShape } from "../model/memory_plan.ts";
import { openCheckpoint } from "../model/safetensors.ts";
import type { TokenLogprob } from "../model/sampling.ts";
import { type GPT2Tokenizer, loadTokenizer } from "../model/tokenizer.ts";
import type { WeightSource } from "../model/weight_source.ts";
import { formatBytes } from "../runtime/buffers.ts";
import type { Gpu } from "../runtime/device.ts";
import { InputError, LongformError, UsageError } from "../runtime/errors.ts";
import { type KernelTime, Profiler } from "../runtime/profiler.ts";
import { formatChoices } from "./info.ts";
import { type Prompt, readPrompt } from "./input.ts";
import { chooseElem, hasFile, modelFolder, openCommandDevice } from "./load.ts";
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

interface Timings {
  readonly load_ms: number;
  readonly tokenize_ms: number | null;
  /** From the start of the process. */
  readonly first_token_ms: number | null;
  readonly prefill_ms: number;
  readonly prefill_tokens_per_s: number;
  readonly decode_ms: number | null;
  readonly decode_tokens_per_s: number | null;
}

interface Memory {
  readonly peak_bytes: number;
  readonly weights_bytes: number;
  readonly kv_bytes: number;
  readonly activations_bytes: number;
  readonly bytes_per_token: number;
}

interface LogprobEntry {
  readonly id: number;
  readonly token: string;
  readonly logprob: number;
}

/** What `--json` prints. */
interface GenerateReport {
  readonly text: string;
  readonly prompt_tokens: number;
  readonly tokens: readonly number[];
  readonly finish_reason: FinishReason;
  readonly seed: number;
  readonly logprobs?: readonly (LogprobEntry & { readonly top: readonly LogprobEntry[] })[];
  readonly profile?: readonly KernelTime[];
  readonly timings: Timings;
  readonly memory: Memory;
}

/** What is settled before the device is open. */
interface PreparedPrompt {
  readonly config: GPT2Config;
  /** Undefined when the prompt came as ids and the model has none. */
  readonly tokenizer: GPT2Tokenizer | undefined;
  readonly ids: readonly number[];
  readonly tokenizeMs: number | null;
  /** Tokens to plan memory for. */
  readonly context: number;
}

/** Runs the command. @returns the exit code: 0, or 130 when it was interrupted */
export async function runGenerate(options: GenerateOptions): Promise<number> {
  const dir = modelFolder(options);
  const config = await readConfig(dir);
  const prompt = await readPrompt(options);
  // The driver takes a while to start: it does so while the tokenizer is built and the prompt is tokenized.
  const opening = openCommandDevice(options);
  opening.catch(() => {});
  const prepared = await prepare(dir, config, prompt, options);
  const source = await openCheckpoint(dir);
  try {
    const gpu = await opening;
    try {
      return await runOnDevice(gpu, source, prepared, options);
    } finally {
      gpu.destroy();
    }
  } finally {
    await source.close();
  }
}

async function prepare(
  dir: string,
  config: GPT2Config,
  prompt: Prompt,
  options: GenerateOptions,
): Promise<PreparedPrompt> {
  if ("ids" in prompt) {
    const tokenizer = await hasFile(dir, "tokenizer.json") ? await loadTokenizer(dir) : undefined;
    if (!tokenizer && options.stop.length > 0) {
      throw new UsageError(`\`--stop\` needs a tokenizer, and ${dir} has none`);
    }
    const context = planContext(config, prompt.ids.length, options);
    return { config, tokenizer, ids: prompt.ids, tokenizeMs: null, context };
  }
  const tokenizer = await loadTokenizer(dir);
  const starting = performance.now();
  const ids = tokenizer.encode(prompt.text);
  const tokenizeMs = performance.now() - starting;
  return { config, tokenizer, ids, tokenizeMs, context: planContext(config, ids.length, options) };
}

async function runOnDevice(
  gpu: Gpu,
  source: WeightSource,
  { config, tokenizer, ids, tokenizeMs, context }: PreparedPrompt,
  options: GenerateOptions,
): Promise<number> {
  const elem = chooseElem(options.dtype, gpu.caps);
  if (options.verbose > 0) {
    writeNote(`device: ${gpu.caps.name} (${gpu.caps.driver})`);
    writeNote(formatChoices(explainChoices(kernelShape(config, elem, gpu.caps), gpu.caps)));
  }
  const profiler = options.profile ? openProfiler(gpu) : undefined;
  const progress = new ProgressLine(options);
  const loading = performance.now();
  const model = await Gpt2.load(gpu, source, config, {
    context,
    elem,
    profiler,
    onLoad: (loaded, total) => progress.show(`loading ${Math.floor(100 * loaded / total)} %`),
  }).finally(() => progress.clear());
  const loadMs = performance.now() - loading;
  try {
    const result = await stream(model, ids, tokenizer, options, progress);
    const memory: Memory = {
      peak_bytes: gpu.memory.peakBytes,
      weights_bytes: gpu.memory.bytes("weights"),
      kv_bytes: gpu.memory.bytes("kv"),
      activations_bytes: gpu.memory.bytes("activations"),
      bytes_per_token: kvBytesPerToken(kvShape(config, elem)),
    };
    const timings = { load_ms: loadMs, tokenize_ms: tokenizeMs, ...result.timings };
    report(result, timings, memory, ids.length, profiler, options);
    return result.finishReason === "interrupt" && !result.isPipeClosed ? 130 : 0;
  } finally {
    profiler?.destroy();
    model.destroy();
  }
}

/** Tokens to plan memory for: what was asked for, or what this run can need. */
function planContext(config: GPT2Config, promptTokens: number, options: GenerateOptions): number {
  const { nPositions } = config;
  if (options.context !== undefined && options.context > nPositions) {
    throw new UsageError(
      `\`--context ${options.context}\` is more than the model's ${nPositions} positions`,
      { hint: `use at most \`--context ${nPositions}\`` },
    );
  }
  if (promptTokens === 0) throw new InputError("The prompt is empty: it has no tokens");
  const context = options.context ?? Math.min(promptTokens + options.maxTokens, nPositions);
  if (promptTokens > context) {
    throw new InputError(
      `The prompt is longer than the context: ${promptTokens} tokens, room for ${context}`,
      {
        hint: options.context === undefined
          ? `the model has ${nPositions} positions: shorten the prompt`
          : `shorten the prompt, or plan for more with \`--context\`; the model has ${nPositions} positions`,
      },
    );
  }
  return context;
}

function openProfiler(gpu: Gpu): Profiler {
  if (!gpu.caps.timestamps) {
    throw new LongformError(`${gpu.caps.name} has no timestamp queries, which --profile needs`);
  }
  return new Profiler(gpu);
}

interface StreamResult {
  readonly text: string;
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

/** Aborts on the first SIGINT and ends the process on the second, which does not wait for the work in flight. */
function abortOnInterrupt(onHardExit: () => void): { controller: AbortController; stop: () => void } {
  const controller = new AbortController();
  const interrupt = () => {
    if (controller.signal.aborted) {
      onHardExit();
      process.exit(130);
    }
    controller.abort();
  };
  process.on("SIGINT", interrupt);
  return { controller, stop: () => process.off("SIGINT", interrupt) };
}

/** Generates and, unless the output is JSON, prints the text as it comes. */
async function stream(
  model: Gpt2,
  ids: readonly number[],
  tokenizer: GPT2Tokenizer | undefined,
  options: GenerateOptions,
  progress: ProgressLine,
): Promise<StreamResult> {
  const seed = options.seed ?? crypto.getRandomValues(new Uint32Array(1))[0]!;
  const { temperature, topK, topP, minP, repeatPenalty } = options;
  const { controller, stop } = abortOnInterrupt(() => progress.clear());
  const output = new TextOutput(!options.json);
  const starting = performance.now();
  const generation = generate(model, ids, tokenizer?.bytesOf.bind(tokenizer), {
    maxTokens: options.maxTokens,
    sampling: { temperature, topK, topP, minP, repeatPenalty, seed },
    stop: options.stop,
    eosIds: options.ignoreEos ? [] : model.config.eosTokenId,
    logprobs: options.logprobs,
    signal: controller.signal,
    onPrefillProgress: (done, total) =>
      progress.show(prefillProgress(done, total, performance.now() - starting)),
  });

  const tokens: number[] = [];
  const logprobs: (LogprobEntry & { top: LogprobEntry[] })[] = [];
  const named = (entry: TokenLogprob): LogprobEntry => ({
    ...entry,
    token: tokenizer?.decode([entry.id]) ?? "",
  });
  let firstTokenAt: number | undefined;
  try {
    for (;;) {
      const next = await generation.next();
      firstTokenAt ??= performance.now();
      progress.clear();
      if (next.done) {
        output.emit(next.value.heldBack);
        if (tokens.length > 0) output.end();
        return {
          text: output.text,
          tokens,
          finishReason: next.value.finishReason,
          isPipeClosed: output.isPipeClosed,
          seed,
          logprobs: options.logprobs === undefined ? undefined : logprobs,
          // An interrupted prefill has run only the part of the prompt that is in the cache.
          timings: streamTimings(starting, firstTokenAt, Math.min(ids.length, model.length), tokens.length),
        };
      }
      const { id, text, logprob, top } = next.value;
      tokens.push(id);
      if (logprob !== undefined && top) logprobs.push({ ...named({ id, logprob }), top: top.map(named) });
      if (tokenizer) output.emit(text);
      else if (!options.json) output.emit(`${tokens.length > 1 ? " " : ""}${id}`); // ids are the result then
      if (output.isPipeClosed) controller.abort();
    }
  } finally {
    stop();
    progress.clear();
  }
}

/** @param starting, firstTokenAt ms since the process started, which is when the clock of `performance` does */
function streamTimings(
  starting: number,
  firstTokenAt: number,
  promptTokens: number,
  generated: number,
): StreamResult["timings"] {
  const prefillMs = firstTokenAt - starting;
  const decodeMs = generated > 1 ? performance.now() - firstTokenAt : null;
  return {
    first_token_ms: generated > 0 ? firstTokenAt : null,
    prefill_ms: prefillMs,
    prefill_tokens_per_s: 1000 * promptTokens / prefillMs,
    decode_ms: decodeMs,
    decode_tokens_per_s: decodeMs === null ? null : 1000 * (generated - 1) / decodeMs,
  };
}

function prefillProgress(done: number, total: number, elapsedMs: number): string {
  const leftMs = elapsedMs / done * (total - done);
  return `prefill ${done} of ${total} tokens, ${formatRate(1000 * done / elapsedMs)}, ${
    formatMs(leftMs)
  } left`;
}

function report(
  result: StreamResult,
  timings: Timings,
  memory: Memory,
  promptTokens: number,
  profiler: Profiler | undefined,
  options: GenerateOptions,
): void {
  const profile = profiler?.report();
  if (options.json) {
    const document: GenerateReport = {
      text: result.text,
      prompt_tokens: promptTokens,
      tokens: result.tokens,
      finish_reason: result.finishReason,
      seed: result.seed,
      ...(result.logprobs ? { logprobs: result.logprobs } : {}),
      ...(profile ? { profile: profile.kernels } : {}),
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
    `prompt ${promptTokens} tokens, ${formatRate(timings.prefill_tokens_per_s)}; ` +
      `generated ${result.tokens.length}, ${formatRate(timings.decode_tokens_per_s)}${first}; ` +
      `${
        formatBytes(memory.peak_bytes)
      } of GPU memory; seed ${result.seed}; finished: ${result.finishReason}`,
  );
}

function formatProfile({ kernels, dropped }: { kernels: readonly KernelTime[]; dropped: number }): string {
  const total = kernels.reduce((sum, kernel) => sum + kernel.gpuMs, 0);
  const rows = kernels.map(({ name, calls, gpuMs }) =>
    `${name.padEnd(26)} ${String(calls).padStart(7)} ${gpuMs.toFixed(3).padStart(12)} ` +
    `${(100 * gpuMs / total).toFixed(1).padStart(6)}`
  );
  const header = `${"kernel".padEnd(26)} ${"calls".padStart(7)} ${"GPU ms".padStart(12)} ${"%".padStart(6)}`;
  const note = dropped > 0 ? [`${dropped} dispatches were not timed: more than a submission's queries`] : [];
  return [header, ...rows, ...note].join("\n");
}
