/** The library: a model that is loaded once and generates, scores and classifies. `classify` on the command line runs on it. */
import { availableParallelism } from "node:os";
import type { ForcedKernels } from "../kernels/index.ts";
import { KV_BLOCK } from "../kernels/shared/shared.ts";
import { parsePattern, type Pattern } from "../kvcache/patterns.ts";
import { hasLists, type Sparsity } from "../kvcache/sparsity.ts";
import { type Gpu, openDevice } from "../runtime/device.ts";
import { DoesNotFitError, InputError, LongformError, UsageError } from "../runtime/errors.ts";
import type { Elem } from "../runtime/kernel.ts";
import type { Profiler, ProfilerOptions } from "../runtime/profiler.ts";
import { timed, type Timeline } from "../runtime/timeline.ts";
import { resolveCheckpoint } from "./checkpoint.ts";
import {
  checkHead,
  classifyDocuments,
  type Head,
  type LabelHead,
  type Outcome,
  type SourceDocument,
} from "./classification.ts";
import { type GPT2Config, readConfig } from "./config.ts";
import { defaultEncodingWorkers, type EncodedText, EncodingPool } from "./encoding_pool.ts";
import { type FinishReason, generate } from "./generation.ts";
import { Gpt2 } from "./gpt2.ts";
import { findModel } from "./hub.ts";
import { labelHead, noScoreHead, scoreHead } from "./label_head.ts";
import type { ClassifyingPlan, Pooling } from "./memory_plan.ts";
import { packedRows } from "./packing.ts";
import type { PositionMode, Positions } from "./positions.ts";
import { chooseElem, type DType, inFlightOf, openProfiler, openSparsity } from "./run_settings.ts";
import { openCheckpoint } from "./safetensors.ts";
import type { SamplingOptions } from "./sampling.ts";
import { meanNll, perplexity, scoreDocument } from "./scoring.ts";
import { tokensOf } from "./token_source.ts";
import { type GPT2Tokenizer, loadTokenizer } from "./tokenizer.ts";
import type { WeightSource } from "./weight_source.ts";

/** What a model is loaded for: each takes memory on the device. */
export type Use = "generate" | "score" | "classify";

export interface LoadOptions {
  /**
   * Folder with config.json, tokenizer.json and model.safetensors, or a repository that `longform pull` has downloaded,
   * `ORG/NAME` or `ORG/NAME@REVISION`; the embedded model when left out.
   */
  readonly model?: string | undefined;
  /** Storage of weights, activations and cache; `auto`, f16 on a GPU that has it, when left out. */
  readonly dtype?: DType | undefined;
  /** Substring of the adapter's name, or its index. */
  readonly adapter?: string | undefined;
  /** Run on the CPU even where there is a GPU. */
  readonly fallbackAdapter?: boolean | undefined;
  /** All of them when left out. */
  readonly uses?: readonly Use[] | undefined;
  /** Tokens of the longest text, generated ones included; the model's positions when left out. */
  readonly context?: number | undefined;
  /** Beyond the model's positions: `exact` (an error, when left out), `interpolate` or `repeat`. */
  readonly positions?: PositionMode | undefined;
  /** Block-sparse attention, as `--sparsity` takes it; dense when left out. */
  readonly sparsity?: string | Pattern | undefined;
  /** How documents are classified. */
  readonly classifying?: {
    /** The checkpoint's score head, labels as texts, or both, when left out. */
    readonly heads?: readonly Head["kind"][] | undefined;
    /** `last` when left out, as `GPT2ForSequenceClassification` does it. */
    readonly pooling?: Pooling | undefined;
    /** Lengths that each document is classified by, at most; 1 when left out. */
    readonly lengths?: number | undefined;
    /**
     * Tokens of documents that share a pass, at most: less takes less memory, where all documents have fewer together. As
     * many as fill the device when left out.
     */
    readonly packTokens?: number | undefined;
  };
  /** Threads that encode documents; by the number of cores when left out. */
  readonly encodingWorkers?: number | undefined;
  readonly kernels?: ForcedKernels | undefined;
  /** Times kernels or passes on the GPU, where the device can; see `profiler`. */
  readonly profile?: ProfilerOptions | undefined;
  /** Takes what the host does and when. */
  readonly timeline?: Timeline | undefined;
  readonly onNotice?: ((message: string) => void) | undefined;
  readonly onLoad?: ((loadedBytes: number, totalBytes: number) => void) | undefined;
  /** Called with what was opened, before anything is loaded. */
  readonly onOpened?: ((gpu: Gpu, config: GPT2Config, elem: "f16" | "f32") => void) | undefined;
}

export interface GenerateOptions extends Partial<SamplingOptions> {
  /** 128 when left out. */
  readonly maxTokens?: number | undefined;
  /** Texts that end the generation; they are not part of it. */
  readonly stop?: readonly string[] | undefined;
  /** Go on after the end-of-text token. */
  readonly ignoreEos?: boolean | undefined;
  readonly signal?: AbortSignal | undefined;
}

/** A token, with the text that it completes, or the text that was held back until the end. */
export interface GeneratedPiece {
  readonly text: string;
  readonly id?: number;
}

export interface ScoreOptions {
  /** Tokens of windows that do not overlap; the whole text, as far as the context goes, when left out. */
  readonly window?: number | undefined;
  readonly signal?: AbortSignal | undefined;
}

export interface ScoreResult {
  readonly tokens: number;
  /** Tokens with others before them in their window. */
  readonly scored: number;
  /** Mean negative log-likelihood in nats; null when nothing was scored. */
  readonly nllMean: number | null;
  readonly perplexity: number | null;
}

/** A document to classify: a text, or its token ids; one that could not be read passes through with its error. */
export type ClassifyInput = { readonly text: string } | { readonly ids: ArrayLike<number> } | {
  readonly error: string;
};

export interface ClassifyOptions {
  /** Labels as texts, likeliest wins; the checkpoint's score head when left out. */
  readonly labels?: readonly string[] | undefined;
  /** Where `{text}` and `{label}` go; `"{text}\n\nLabel: {label}"` when left out. */
  readonly template?: string | undefined;
  /** Subtract each label's log-likelihood without a document (Holtzman et al. 2021, domain-conditional PMI). */
  readonly calibrate?: boolean | undefined;
  /** Tokens that a document is cut to; with several, it is classified by each, in one pass where the head allows it. */
  readonly maxTokens?: number | readonly number[] | undefined;
  /** Tokens of windows that the score head is averaged over, in place of one long context. */
  readonly window?: number | undefined;
  /** Documents that share a pass at most; 1 takes them one by one. As many as fit when left out. */
  readonly batch?: number | undefined;
  readonly signal?: AbortSignal | undefined;
}

/**
 * Rows of documents that share a pass, for models of twelve heads; for fewer heads as many more as fill a GPU with tiles of
 * attention all the same (docs/classification.md). On a CPU sharing gains nothing but the overhead of short documents.
 */
const PACK_ROWS = 16_384;
const PACK_HEADS = 12;
const SOFTWARE_PACK_ROWS = 1024;
/** Packs are not made smaller than this to fit a device. */
const LEAST_PACK_ROWS = 1024;
/** Rows for labels as branches of the documents of a pack, and tokens of labels there. */
const BRANCH_ROWS = 4096;
const SOFTWARE_BRANCH_ROWS = 1024;
/** Packs that may be under way: one runs, one waits for it, one is read. */
const PACKS_IN_FLIGHT = 3;
/** Documents encoded ahead by threads, enough short ones to fill packs; where the caller's does it, one while another runs. */
const AHEAD = 1024;
const AHEAD_INLINE = 2;
/** What documents are classified by unless the caller says otherwise. */
const HEADS: readonly Head["kind"][] = ["score", "labels"];

/** A loaded model. One of its methods runs at a time; `close` frees the device. */
export class Longform {
  readonly gpu: Gpu;
  readonly config: GPT2Config;
  /** The graph on the device, with its memory plan. */
  readonly model: Gpt2;
  /** Undefined unless `profile` was asked for, and where the device has no timestamps. */
  readonly profiler: Profiler | undefined;
  readonly loadMs: number;
  readonly #dir: string;
  readonly #classes: number | undefined;
  readonly #uses: readonly Use[];
  readonly #heads: readonly Head["kind"][];
  readonly #workers: number;
  #tokenizer: Promise<GPT2Tokenizer> | undefined;
  #pool: Promise<EncodingPool> | undefined;
  #isBusy = false;
  #closing: Promise<void> | undefined;

  private constructor(
    parts: Pick<Longform, "gpu" | "config" | "model" | "profiler" | "loadMs"> & {
      readonly dir: string;
      readonly classes: number | undefined;
      readonly uses: readonly Use[];
      readonly heads: readonly Head["kind"][];
      readonly workers: number;
      readonly pool: Promise<EncodingPool> | undefined;
    },
  ) {
    this.gpu = parts.gpu;
    this.config = parts.config;
    this.model = parts.model;
    this.profiler = parts.profiler;
    this.loadMs = parts.loadMs;
    this.#dir = parts.dir;
    this.#classes = parts.classes;
    this.#uses = parts.uses;
    this.#heads = parts.heads;
    this.#workers = parts.workers;
    this.#pool = parts.pool;
  }

  /**
   * Opens the device and loads a model.
   * @throws ModelError for a checkpoint that cannot be used, NoAdapterError, DoesNotFitError with the largest context that
   * fits, UsageError for options that contradict each other
   */
  static async load(options: LoadOptions = {}): Promise<Longform> {
    const dir = await findModel(options.model);
    const uses = options.uses ?? ["generate", "score", "classify"];
    const heads = options.classifying?.heads ?? HEADS;
    const workers = options.encodingWorkers ?? defaultEncodingWorkers(availableParallelism());
    const config = await readConfig(dir);
    // The driver takes a while to start; so do threads.
    const opening = openDevice({
      ...(options.adapter === undefined ? {} : { adapter: options.adapter }),
      fallbackAdapter: options.fallbackAdapter ?? false,
      onNotice: options.onNotice ?? (() => {}),
      timeline: options.timeline,
    });
    opening.catch(() => {});
    const pool = uses.includes("classify") && workers > 0 ? EncodingPool.open(dir, workers) : undefined;
    pool?.catch(() => {}); // whoever encodes is told
    let gpu: Gpu | undefined;
    let profiler: Profiler | undefined;
    try {
      const pattern = typeof options.sparsity === "string"
        ? parsePattern(options.sparsity)
        : options.sparsity;
      const sparsity = await openSparsity(pattern ?? { kind: "dense" });
      const source = await openCheckpoint(dir);
      try {
        const { classes } = resolveCheckpoint(source, config);
        gpu = await opening;
        const elem = chooseElem(options.dtype ?? "auto", gpu.caps);
        options.onOpened?.(gpu, config, elem);
        profiler = openProfiler(gpu, options.profile);
        const loading = performance.now();
        const model = await loadFitting(options, uses, gpu, source, config, {
          elem,
          sparsity,
          profiler,
          classes,
        });
        const loadMs = performance.now() - loading;
        const loaded = { gpu, config, model, profiler, loadMs };
        return new Longform({ ...loaded, dir, classes, uses, heads, workers, pool });
      } finally {
        await source.close();
      }
    } catch (error) {
      profiler?.destroy();
      (gpu ?? await opening.catch(() => undefined))?.destroy();
      await pool?.then((opened) => opened.close(), () => {});
      throw error;
    }
  }

  /** @throws ModelError when the folder has no tokenizer */
  tokenizer(): Promise<GPT2Tokenizer> {
    return this.#tokenizer ??= timed(
      this.gpu.timeline,
      "phases",
      "load the tokenizer",
      () => loadTokenizer(this.#dir),
    );
  }

  /**
   * Continues a prompt. @returns how it ended
   * @throws InputError for a prompt that is empty or too long
   */
  async *generate(
    prompt: string | ArrayLike<number>,
    options: GenerateOptions = {},
  ): AsyncGenerator<GeneratedPiece, { readonly finishReason: FinishReason }> {
    const release = this.#take("generate");
    try {
      const { temperature = 0.8, topK = 40, topP = 0.95, minP = 0, repeatPenalty = 1 } = options;
      const seed = options.seed ?? crypto.getRandomValues(new Uint32Array(1))[0]!;
      const tokenizer = typeof prompt === "string" ? await this.tokenizer() : undefined;
      const ids = typeof prompt === "string" ? tokenizer!.encode(prompt) : prompt;
      this.model.truncate(0);
      const generation = generate(
        this.model,
        { cached: [], rest: tokensOf(ids) },
        tokenizer?.bytesOf.bind(tokenizer),
        {
          maxTokens: options.maxTokens ?? 128,
          sampling: { temperature, topK, topP, minP, repeatPenalty, seed },
          stop: options.stop ?? [],
          eosIds: options.ignoreEos ? [] : this.config.eosTokenId,
          ...(options.signal ? { signal: options.signal } : {}),
        },
      );
      try {
        for (;;) {
          const { value, done } = await generation.next();
          if (!done) {
            yield { text: value.text, id: value.id };
            continue;
          }
          if (value.heldBack !== "") yield { text: value.heldBack };
          return { finishReason: value.finishReason };
        }
      } finally {
        // A reader that goes away leaves steps under way.
        await generation.return({ finishReason: "interrupt", heldBack: "" });
      }
    } finally {
      release();
    }
  }

  /** How well the model predicts a text. @throws InputError for a text that cannot be encoded */
  async score(text: string | ArrayLike<number>, options: ScoreOptions = {}): Promise<ScoreResult> {
    const release = this.#take("score");
    try {
      requireCounts("window", options.window);
      const ids = typeof text === "string" ? (await this.tokenizer()).encode(text) : text;
      const score = await scoreDocument(this.model, tokensOf(ids), {
        window: options.window ?? this.model.context,
        signal: options.signal,
      });
      const { tokens, scored } = score;
      return { tokens, scored, nllMean: meanNll(score), perplexity: perplexity(score) };
    } finally {
      release();
    }
  }

  /**
   * A label for each document, in order: any number of them, of which a bounded number is in memory. Documents share
   * passes; the result of one does not depend on the others, to the bit.
   * @returns what became of each document; one that cannot be classified has an error and does not end the others
   * @throws UsageError for labels or a template that cannot be used, InputError when there is no head
   */
  async *classify<T extends ClassifyInput>(
    documents: Iterable<T> | AsyncIterable<T>,
    options: ClassifyOptions = {},
  ): AsyncGenerator<Outcome<T>, void> {
    const release = this.#take("classify");
    try {
      const { maxTokens, window, batch } = options;
      requireCounts("maxTokens", maxTokens);
      requireCounts("window", window);
      requireCounts("batch", batch);
      const head = await this.#headOf(options);
      const lengths = maxTokens === undefined
        ? undefined
        : [...new Set([maxTokens].flat())].toSorted((a, b) => a - b);
      yield* classifyDocuments(this.model, head, this.#sources(documents), {
        lengths,
        window,
        batch,
        ahead: this.#workers === 0 ? AHEAD_INLINE : AHEAD,
        signal: options.signal,
      });
    } finally {
      release();
    }
  }

  /** Frees the device and ends the threads; nothing runs afterwards. */
  close(): Promise<void> {
    return this.#closing ??= this.#close();
  }

  async #close(): Promise<void> {
    await this.#pool?.then((pool) => pool.close(), () => {});
    this.profiler?.destroy();
    this.model.destroy();
    this.gpu.destroy();
  }

  async #headOf({ labels, template, calibrate = false, window }: ClassifyOptions): Promise<Head> {
    if (!labels) {
      if (template !== undefined || calibrate) {
        throw new UsageError("A template and calibration are for labels that are given as texts");
      }
      if (this.#classes === undefined) {
        throw noScoreHead(this.#dir);
      }
      this.#requireHead("score");
      return scoreHead(this.config, this.#classes);
    }
    this.#requireHead("labels");
    if (hasLists(this.model.sparsity)) {
      throw new UsageError("Labels as texts read all of a document: load the model without `sparsity`");
    }
    if (window !== undefined) throw new UsageError("Windows are for the score head, not for labels as texts");
    const head = labelHead(await this.tokenizer(), labels, template);
    return calibrate ? { ...head, baseline: await this.#baseline(head) } : head;
  }

  #requireHead(kind: Head["kind"]): void {
    if (this.#heads.includes(kind)) return;
    throw new UsageError(`The model was loaded without the head "${kind}"`, {
      hint: "add it to `classifying.heads`",
    });
  }

  /** The labels' log-likelihoods in nats where there is no document. */
  async #baseline(head: LabelHead): Promise<Float64Array> {
    const { before, between, texts } = head;
    const { bosTokenId, eosTokenId } = this.config;
    const start = bosTokenId ?? eosTokenId[0];
    const ids = [...before, ...between];
    if (ids.length === 0 && start === undefined) {
      throw new InputError("There is nothing to calibrate with: the template has no text before the label", {
        hint: "put some there, or leave calibration away",
      });
    }
    const classifier = await this.model.classifier();
    checkHead(this.model, classifier, head);
    const { result } = await classifier.scoreLabels(
      [Uint32Array.from(ids.length > 0 ? ids : [start!])],
      texts,
    );
    const [baseline] = await result;
    if (baseline!.every(Number.isFinite)) return baseline!;
    throw new InputError("The labels have no finite likelihoods without a document", {
      hint: "try `--dtype f32`; if that does not help, the checkpoint is damaged",
    });
  }

  async *#sources<T extends ClassifyInput>(
    documents: Iterable<T> | AsyncIterable<T>,
  ): AsyncGenerator<SourceDocument<T>> {
    for await (const document of documents) {
      if ("error" in document) {
        const { error } = document;
        yield { document, size: 0, encode: () => Promise.reject(new InputError(error)) };
      } else if ("ids" in document) {
        const { ids } = document;
        yield {
          document,
          size: ids.length,
          encode: (most) => new Promise((resolve) => resolve(firstIds(ids, most))),
        };
      } else {
        const { text } = document;
        this.#pool ??= EncodingPool.open(this.#dir, this.#workers);
        const pool = await this.#pool;
        const { timeline } = this.gpu;
        yield { document, size: text.length, encode: (most) => encodeTraced(pool, text, most, timeline) };
      }
    }
  }

  #take(use: Use): () => void {
    if (this.#closing) throw new LongformError("The model is closed");
    if (!this.#uses.includes(use)) {
      throw new UsageError(`The model was not loaded to ${use}`, { hint: `add "${use}" to \`uses\`` });
    }
    if (this.#isBusy) {
      throw new LongformError("The model is at work: wait until it is done, or load it twice");
    }
    this.#isBusy = true;
    return () => this.#isBusy = false;
  }
}

/** @throws UsageError for what is no number of things, or none of several */
function requireCounts(name: string, value: number | readonly number[] | undefined): void {
  const counts = value === undefined ? [] : [value].flat();
  const isGiven = value === undefined || counts.length > 0;
  if (isGiven && counts.every((count) => Number.isInteger(count) && count >= 1)) return;
  throw new UsageError(`\`${name}\` is ${value}, wanted whole numbers from 1 on`);
}

/** The first of a document's ids. @throws InputError for what is no id of any vocabulary */
function firstIds(ids: ArrayLike<number>, most: number): EncodedText {
  const first = Uint32Array.from({ length: Math.min(most, ids.length) }, (_, i) => ids[i]!);
  const wrong = first.findIndex((id, i) => id !== ids[i]);
  if (wrong >= 0) throw new InputError(`token ${wrong} is ${ids[wrong]}, which is no id of a token`);
  return { ids: first, truncated: ids.length > most, encodeMs: 0 };
}

/** Loads the graph, with smaller packs of documents where larger ones do not fit the device. */
async function loadFitting(
  options: LoadOptions,
  uses: readonly Use[],
  gpu: Gpu,
  source: WeightSource,
  config: GPT2Config,
  { elem, sparsity, profiler, classes }: {
    readonly elem: Elem;
    readonly sparsity: Sparsity;
    readonly profiler: Profiler | undefined;
    readonly classes: number | undefined;
  },
): Promise<Gpt2> {
  const { isSoftware } = gpu.caps;
  for (let packRows = mostPackRows(config, options, isSoftware);; packRows /= 2) {
    try {
      return await Gpt2.load(gpu, source, config, {
        ...planRun(config, options, uses, { classes, isSoftware, packRows: packedRows(packRows) }),
        elem,
        sparsity,
        scoring: uses.includes("score"),
        decoding: uses.includes("generate") ? { sequences: 1, inFlight: inFlightOf(gpu) } : undefined,
        profiler,
        ...(options.kernels ? { kernels: options.kernels } : {}),
        ...(options.onLoad ? { onLoad: options.onLoad } : {}),
      });
    } catch (error) {
      const isSmall = packRows <= LEAST_PACK_ROWS || !uses.includes("classify");
      if (isSmall || !(error instanceof DoesNotFitError)) throw error;
    }
  }
}

/** Rows of a pack where memory does not matter: of documents, and of labels as their branches. */
function mostPackRows({ nHead }: GPT2Config, { classifying }: LoadOptions, isSoftware: boolean): number {
  const filling = isSoftware ? SOFTWARE_PACK_ROWS : PACK_ROWS * Math.max(1, Math.floor(PACK_HEADS / nHead));
  const documents = packedRows(Math.max(1, classifying?.packTokens ?? Infinity));
  return Math.min(filling, documents) + mostBranchRows(classifying, isSoftware);
}

/** Rows for the labels of a pack, and tokens of labels there. */
function mostBranchRows(classifying: LoadOptions["classifying"], isSoftware: boolean): number {
  if (!(classifying?.heads ?? HEADS).includes("labels")) return 0;
  return isSoftware ? SOFTWARE_BRANCH_ROWS : BRANCH_ROWS;
}

/** Tokens and rows to plan memory for. */
function planRun(
  { nPositions }: GPT2Config,
  options: LoadOptions,
  uses: readonly Use[],
  { classes, isSoftware, packRows }: {
    readonly classes: number | undefined;
    readonly isSoftware: boolean;
    readonly packRows: number;
  },
): {
  readonly context: number;
  readonly positions: Positions;
  readonly classifying: ClassifyingPlan | undefined;
  readonly chunkTokens?: number;
} {
  const { context = nPositions, positions: mode = "exact", classifying = {} } = options;
  const positions: Positions = { mode, nPositions, context };
  if (!uses.includes("classify")) return { context, positions, classifying: undefined };
  const { heads = HEADS, pooling = "last", lengths = 1 } = classifying;
  const branchRows = mostBranchRows(classifying, isSoftware);
  return {
    context: Math.max(packedRows(context), packRows) + branchRows,
    positions,
    chunkTokens: packRows,
    classifying: {
      classes: heads.includes("score") ? classes : undefined,
      pooling,
      rows: lengths * Math.ceil(packRows / KV_BLOCK),
      labelRows: branchRows,
      lengths,
      inFlight: PACKS_IN_FLIGHT,
    },
  };
}

/** Encodes as the pool does, and notes when its thread did. */
async function encodeTraced(
  pool: EncodingPool,
  text: string,
  most: number,
  timeline: Timeline | undefined,
): Promise<EncodedText> {
  const encoded = await pool.encode(text, most);
  timeline?.add("tokenization", "document", encoded.encodeMs);
  return encoded;
}
