/**
 * The GPT-2 graph (Radford et al. 2019) on the GPU: what is computed, in which order, into which buffer. The same
 * graph in plain loops is in `reference.ts`.
 */
import { DIVERGENCE_BYTES, type Divergences, unpackDivergence } from "../kernels/divergence/divergence.ts";
import { packToken, TOKEN_BYTES } from "../kernels/embedding/embedding.ts";
import { packAttended } from "../kernels/flash_attention/flash_attention.ts";
import {
  type AttentionKind,
  decodeRoles,
  type ForcedKernels,
  headRoles,
  type KvView,
  ModelKernels,
  PACK_HEAD_ROLES,
  prefillRoles,
  type Role,
} from "../kernels/index.ts";
import { KV_BLOCK, packSequence } from "../kernels/shared/shared.ts";
import { KvCache } from "../kvcache/cache.ts";
import { checkMask } from "../kvcache/patterns.ts";
import { DENSE, hasLists, keptByTopk, type Sparsity, TOPK_LEAST_BLOCKS } from "../kvcache/sparsity.ts";
import { allocate, type GpuBuffer, OutOfMemoryError, Readback, upload } from "../runtime/buffers.ts";
import type { Gpu } from "../runtime/device.ts";
import { DoesNotFitError, InputError } from "../runtime/errors.ts";
import { allocateParameters, type Elem } from "../runtime/kernel.ts";
import { type Dispatcher, DispatchList, Recorder, type Tap } from "../runtime/pass.ts";
import type { Profiler } from "../runtime/profiler.ts";
import { timed, type Timeline } from "../runtime/timeline.ts";
import { resolveCheckpoint } from "./checkpoint.ts";
import { Classifier, type ClassifyingBuffers } from "./classifier.ts";
import type { GPT2Config } from "./config.ts";
import { Decoder, type DecoderOptions, type DecodingBuffers, drawRoles, packPositions } from "./decoder.ts";
import {
  type ActivationName,
  checkFits,
  type ClassifyingPlan,
  type ComparisonName,
  contextHint,
  decodeParametersBytes,
  type DecodingPlan,
  kernelShape,
  type MemoryPlan,
  packResultBytes,
  paddedSizes,
  planMemory,
  type PlannedBuffer,
  stepResultBytes,
  STEPS_PER_SUBMISSION,
} from "./memory_plan.ts";
import { exactPositions, positionLimit, positionPlace, type Positions } from "./positions.ts";
import { tokensOf, type TokenSource } from "./token_source.ts";
import type { WeightSource } from "./weight_source.ts";
import { type Gpt2Weights, type LoadProgress, loadWeights } from "./weights.ts";

export interface Gpt2Options {
  /** Tokens to hold keys and values for. */
  readonly context: number;
  /** Storage of weights, activations and the cache; sums are in f32 either way. */
  readonly elem: Elem;
  /** Row of `wpe` by position; `exact` when left out. */
  readonly positions?: Positions;
  /** What is attended to; every key when left out. */
  readonly sparsity?: Sparsity;
  /** Also allocate what `onNll` and `onLogits` need. */
  readonly scoring?: boolean;
  /** Also allocate what `onDivergence` needs; goes with `scoring`, and not with `decoding`. */
  readonly comparing?: boolean;
  /** Also allocate what `decoder` and `decodeStep` need. */
  readonly decoding?: DecodingPlan | undefined;
  /** Also load and allocate what `classifier` needs. */
  readonly classifying?: ClassifyingPlan | undefined;
  /** What will probably run, to be compiled while the weights load; the rest is compiled when it is first wanted. */
  readonly expected?: {
    /** Tokens of the prompt; undefined for one of more than a chunk. */
    readonly promptTokens?: number | undefined;
    readonly drawing?: DecoderOptions;
  };
  /** Tokens that go through the layers at a time, at most; the plan's choice when left out. */
  readonly chunkTokens?: number;
  readonly onLoad?: LoadProgress;
  readonly profiler?: Profiler | undefined;
  /** The KV cache's block table: any permutation of its blocks gives the same results. In order when left out. */
  readonly blockTable?: Uint32Array;
  /** Kernels to run in place of those that the device would be given. */
  readonly kernels?: ForcedKernels;
}

export interface PrefillOptions {
  /** Which of the cache's sequences the tokens belong to; the first when left out. */
  readonly sequence?: number;
  /** Ends the run between two chunks by throwing its reason; the tokens of the chunks before stay in the cache. */
  readonly signal?: AbortSignal | undefined;
  /** Called with the tokens of this call that the GPU has completed. */
  readonly onProgress?: (doneTokens: number) => void;
  /** Sees the residual stream after `embedding` and every `block_0`, `block_1`, …, and the last row after `ln_f`. */
  readonly tap?: Tap;
  /**
   * Receives the negative log-likelihood, in nats, of each token but the first given those before it, in order: `nll[i]`
   * is that of token `first + i` of this call. Needs `scoring`.
   */
  readonly onNll?: (first: number, nll: Float32Array) => void;
  /**
   * Receives how far from dense attention each token but the first is predicted, in order like `onNll`: the rows are those
   * after the token before. The tokens run with both kinds of attention, in the first two sequences of the cache, which
   * must hold equally many tokens. Needs `comparing`.
   */
  readonly onDivergence?: (first: number, divergences: Divergences) => void;
  /** Receives the logits `[vocab]` after the tokens that `wantsLogits` accepts, in order. Needs `scoring`. */
  readonly onLogits?: (token: number, logits: Float32Array) => void;
  /** All tokens when left out. */
  readonly wantsLogits?: (token: number) => boolean;
  /** Tokens a chunk, at most what the plan allows; the results do not depend on it beyond rounding. */
  readonly chunkTokens?: number;
}

type Activations = Readonly<Record<ActivationName, GpuBuffer>>;
type Comparison = Readonly<Record<ComparisonName, GpuBuffer>>;

interface Parts {
  readonly plan: MemoryPlan;
  readonly kernels: ModelKernels;
  readonly cache: KvCache;
  readonly activations: Activations;
  readonly comparison: Comparison | undefined;
  readonly decoding: DecodingParts | undefined;
  readonly classifying: ClassifyingParts | undefined;
  readonly logitsReadback: Readback;
  /** With `scoring`, of two chunks' likelihoods. */
  readonly nllReadbacks: readonly Readback[];
  /** With `comparing`, of two chunks' divergences. */
  readonly divergenceReadbacks: readonly Readback[];
  readonly weights: Gpt2Weights;
}

/** What decoding needs besides the activations. */
interface DecodingParts {
  readonly plan: DecodingPlan;
  readonly buffers: DecodingBuffers;
  /** Of the kernels of a step. */
  readonly parameters: GpuBuffer;
  /** One for each submission in flight. */
  readonly readbacks: readonly Readback[];
}

/** What classification needs besides the activations. */
interface ClassifyingParts {
  readonly plan: ClassifyingPlan;
  readonly buffers: ClassifyingBuffers;
  /** One for each pack in flight. */
  readonly readbacks: readonly Readback[];
}

/** A model on a device with one sequence in its cache, or several that are decoded together. */
export class Gpt2 {
  readonly config: GPT2Config;
  readonly elem: Elem;
  readonly #gpu: Gpu;
  readonly #plan: MemoryPlan;
  readonly #positions: Positions;
  readonly #kernels: ModelKernels;
  readonly #weights: Gpt2Weights;
  readonly #cache: KvCache;
  readonly #activations: Activations;
  readonly #logitsReadback: Readback;
  /** Two: one chunk's likelihoods are read while the next chunk's are computed. None without `scoring`. */
  readonly #nllReadbacks: readonly Readback[];
  /** Two like those; none without `comparing`. */
  readonly #divergenceReadbacks: readonly Readback[];
  readonly #comparison: Comparison | undefined;
  readonly #decoding: DecodingParts | undefined;
  readonly #classifying: ClassifyingParts | undefined;
  readonly #profiler: Profiler | undefined;
  /** A step of decoding, made when it is first wanted. */
  #decodeList: DispatchList | undefined;

  private constructor(gpu: Gpu, config: GPT2Config, options: Gpt2Options, parts: Parts) {
    const { plan, kernels, cache, activations, comparison, decoding, classifying, weights } = parts;
    this.config = config;
    this.elem = options.elem;
    this.#gpu = gpu;
    this.#profiler = options.profiler;
    this.#positions = options.positions ?? exactPositions(config.nPositions);
    this.#plan = plan;
    this.#kernels = kernels;
    this.#cache = cache;
    this.#activations = activations;
    this.#comparison = comparison;
    this.#decoding = decoding;
    this.#classifying = classifying;
    this.#weights = weights;
    this.#logitsReadback = parts.logitsReadback;
    this.#nllReadbacks = parts.nllReadbacks;
    this.#divergenceReadbacks = parts.divergenceReadbacks;
  }

  /**
   * Loads a checkpoint; pipelines compile while its weights stream to the GPU.
   * @throws UsageError when `kernels` names what there is not
   * @throws DoesNotFitError with the largest context that fits: before anything is allocated when the plan exceeds what
   * the device says of itself, otherwise when an allocation fails
   * @throws InputError when a block mask does not fit the model or the context
   */
  static async load(gpu: Gpu, source: WeightSource, config: GPT2Config, options: Gpt2Options): Promise<Gpt2> {
    return await timed(
      gpu.timeline,
      "phases",
      "load the model",
      () => Gpt2.#load(gpu, source, config, options),
    );
  }

  static async #load(
    gpu: Gpu,
    source: WeightSource,
    config: GPT2Config,
    options: Gpt2Options,
  ): Promise<Gpt2> {
    const { elem, onLoad, sparsity = DENSE } = options;
    if ("mask" in sparsity) checkMask(sparsity.mask, config.nLayer, config.nHead);
    const checkpoint = resolveCheckpoint(source, config);
    const planOptions = { ...options, untiedHead: !checkpoint.tiedLmHead };
    const plan = planMemory(config, planOptions, gpu.caps);
    checkFits(config, planOptions, plan, gpu.caps);
    const { decoding } = options;
    const kernels = new ModelKernels(
      gpu,
      kernelShape(config, elem, gpu.caps, {
        sequences: decoding?.sequences ?? 1,
        selectableBlocks: attentionKind(sparsity) === "topk" ? plan.kv.sequenceBlocks : 0,
      }),
      options.kernels,
    );
    const compiled = kernels.prepare(expectedRoles(options, plan));
    compiled.catch(() => {});
    const owned: { destroy(): void }[] = [];
    const endAllocation = gpu.timeline?.begin("phases", "allocate buffers");
    try {
      const cache = await KvCache.create(gpu, plan.kv, options.blockTable);
      owned.push(cache);
      const allocateAll = async <Name extends string>(planned: Readonly<Record<Name, PlannedBuffer>>) => {
        const buffers = {} as Record<Name, GpuBuffer>;
        for (const [name, { label, bytes }] of Object.entries<PlannedBuffer>(planned)) {
          const buffer = await allocate(gpu, label, "activations", bytes);
          owned.push(buffer);
          buffers[name as Name] = buffer;
        }
        return buffers;
      };
      const activations = await allocateAll(plan.activations);
      const comparison = plan.comparison && await allocateAll(plan.comparison);
      const decodingBuffers = plan.decoding && await allocateAll(plan.decoding);
      const classifyingBuffers = plan.classifying && await allocateAll(plan.classifying);
      const readbacks = async (count: number, label: string, bytes: number) => {
        const made: Readback[] = [];
        while (made.length < count) {
          const readback = await Readback.allocate(gpu, label, bytes);
          owned.push(readback);
          made.push(readback);
        }
        return made;
      };
      const logitsReadback = (await readbacks(1, "logits", 4 * config.vocabSize))[0]!;
      const nllReadbacks = await readbacks(
        options.scoring ? 2 : 0,
        "negative log-likelihoods",
        4 * plan.chunkTokens,
      );
      const divergenceReadbacks = await readbacks(
        options.comparing ? 2 : 0,
        "divergences",
        DIVERGENCE_BYTES * plan.chunkTokens,
      );
      let decodingParts: DecodingParts | undefined;
      if (decoding && decodingBuffers) {
        const positions = options.positions ?? exactPositions(config.nPositions);
        upload(decodingBuffers.places, packPositions(positions, plan.context));
        const step = stepResultBytes(decoding);
        const parameters = await allocateParameters(gpu, decodeParametersBytes(config, sparsity));
        owned.push(parameters);
        decodingParts = {
          plan: decoding,
          buffers: decodingBuffers,
          parameters,
          readbacks: await readbacks(
            decoding.inFlight,
            "drawn tokens",
            STEPS_PER_SUBMISSION * (step.results + step.logprobs),
          ),
        };
      }
      const { classifying } = options;
      const classifyingParts = classifying && classifyingBuffers && {
        plan: classifying,
        buffers: classifyingBuffers,
        readbacks: await readbacks(classifying.inFlight, "a pack", packResultBytes(classifying)),
      };
      endAllocation?.();
      const classes = classifying?.classes;
      const weights = await timed(
        gpu.timeline,
        "phases",
        "load weights",
        () => loadWeights(gpu, source, checkpoint, config, elem, { classes, onProgress: onLoad }),
      );
      owned.push(weights);
      await timed(gpu.timeline, "phases", "wait for kernels", () => compiled);
      return new Gpt2(gpu, config, options, {
        plan,
        kernels,
        cache,
        activations,
        comparison,
        decoding: decodingParts,
        classifying: classifyingParts,
        logitsReadback,
        nllReadbacks,
        divergenceReadbacks,
        weights,
      });
    } catch (error) {
      for (const part of owned) part.destroy();
      if (!(error instanceof OutOfMemoryError)) throw error;
      // What this process could allocate is the only measure of the memory that WebGPU gives; this run was too large for it.
      const limits = { ...gpu.caps, memoryBytes: Math.min(error.allocatedBytes, plan.totalBytes - 1) };
      throw new DoesNotFitError(error.message, {
        hint: `${contextHint(config, planOptions, limits)}; other programs may be using the GPU`,
        cause: error,
      });
    }
  }

  /** Tokens of the first sequence whose keys and values are in the cache. */
  get length(): number {
    return this.#cache.length;
  }

  /** Tokens that a sequence of this run can have: those that it was planned for, as far as there are positions. */
  get context(): number {
    return Math.min(this.#plan.context, positionLimit(this.#positions));
  }

  /** What was allocated, and why. */
  get plan(): MemoryPlan {
    return this.#plan;
  }

  get positions(): Positions {
    return this.#positions;
  }

  /** What is attended to. */
  get sparsity(): Sparsity {
    return this.#cache.sparsity;
  }

  /** What the host does and when, where somebody wants to know. */
  get timeline(): Timeline | undefined {
    return this.#gpu.timeline;
  }

  /** The cache, to save its contents. */
  get cache(): KvCache {
    return this.#cache;
  }

  /** Forgets the tokens of a sequence from `length` on, so that another continuation can follow. */
  truncate(length: number, sequence = 0): void {
    this.#cache.truncate(length, sequence);
  }

  /** @throws InputError when the sequence cannot have `end` tokens */
  checkRoom(end: number): void {
    const limit = positionLimit(this.#positions);
    if (end > limit) throw tooManyPositions("The text", this.#positions);
    if (end > this.#plan.context) {
      throw new InputError(
        `The text is longer than the ${this.#plan.context} tokens that this run has room for`,
        {
          hint: "shorten the text, or plan for more with `--context`",
        },
      );
    }
  }

  /**
   * Runs tokens through the model behind those already in the cache, a chunk at a time: tokens of the next chunk are
   * asked for while the GPU works on this one.
   * @returns the logits after the last of them, `[vocab]`
   */
  async prefill(
    tokens: TokenSource | ArrayLike<number>,
    options: PrefillOptions = {},
  ): Promise<Float32Array> {
    return await timed(this.timeline, "phases", "prefill", () => this.#prefill(tokens, options));
  }

  async #prefill(tokens: TokenSource | ArrayLike<number>, options: PrefillOptions): Promise<Float32Array> {
    const source = "take" in tokens ? tokens : tokensOf(tokens);
    const isCompared = options.onDivergence !== undefined;
    const sequence = isCompared ? SPARSE_SEQUENCE : options.sequence ?? 0;
    const { chunkTokens: most } = this.#plan;
    const chunkTokens = Math.min(options.chunkTokens ?? most, most);
    const scores = options.onNll || options.onLogits || isCompared
      ? new PrefillScores(this.#nllReadbacks, this.#divergenceReadbacks, options)
      : undefined;
    const kind = attentionKind(this.sparsity);
    let chunk = await takeUnlessAborted(source, chunkTokens, options.signal);
    if (chunk.length === 0) throw new InputError("There are no tokens to run");
    let done = 0;
    let submitted: Promise<void> | undefined;
    for (;;) {
      options.signal?.throwIfAborted();
      const kinds = isCompared ? [kind, "dense" as const] : [kind];
      await this.#kernels.prepare(kinds.flatMap((one) => prefillRoles([chunk.length], one)));
      this.#upload(chunk, sequence);
      const r = this.#recorder("prefill", options.tap);
      const first = this.#cache.lengthOf(sequence);
      r.beginStep(`tokens ${first} to ${first + chunk.length - 1}`);
      if (isCompared) this.#recordDense(r, chunk.length);
      this.#recordLayers(r, chunk.length, sequence);
      r.submit();
      const next = await takeUnlessAborted(source, chunkTokens, options.signal);
      if (next.length > 0) this.#checkId(next[0]!, this.#cache.lengthOf(sequence));
      if (scores) await this.#score(scores, done, chunk, next[0]);
      const tokensRun = chunk.length;
      if (next.length === 0) break;
      // One chunk runs while the next is recorded: the queue never empties, nor does it fill without bound.
      await submitted;
      if (done > 0) options.onProgress?.(done);
      submitted = this.#gpu.idle();
      submitted.catch(() => {}); // whatever fails first is thrown, and then nobody may await this one
      done += tokensRun;
      chunk = next;
    }
    await this.#kernels.prepare(headRoles(1));
    const r = this.#recorder("logits", options.tap);
    this.#recordHead(r, chunk.length - 1, 1, options.tap && ((final) => r.tap("ln_f", final)));
    this.#copyLogits(r);
    r.submit();
    const logits = await this.#logitsReadback.read();
    await submitted;
    await scores?.flush();
    options.onProgress?.(done + chunk.length);
    return new Float32Array(logits);
  }

  /**
   * Appends one token to the first sequence.
   * @returns the logits after it, `[vocab]`
   */
  async decodeStep(id: number): Promise<Float32Array> {
    const { buffers } = this.#requireDecoding();
    const { length } = this.#cache;
    this.checkRoom(length + 1);
    upload(buffers.nextTokens, this.#packTokens([id], length));
    upload(buffers.sequences, packSequence({ length, step: 0, seed: 0 }));
    const step = await this.decodeStepList();
    const r = this.#recorder("decode");
    r.beginStep(`token ${length}`, [length + 1]);
    this.#summarizeBlocks(r, 0);
    r.replay(step);
    this.#copyLogits(r);
    r.submit();
    this.#cache.advance(1);
    const logits = await this.#logitsReadback.read();
    return new Float32Array(logits);
  }

  /** What a step of decoding reads and writes besides activations. Needs `decoding`. */
  get decodingBuffers(): DecodingBuffers {
    return this.#requireDecoding().buffers;
  }

  /** What draws tokens on the GPU. Needs `decoding`. */
  async decoder(options: DecoderOptions): Promise<Decoder> {
    const decoding = this.#requireDecoding();
    return await Decoder.create({
      ...decoding,
      gpu: this.#gpu,
      config: this.config,
      context: this.#plan.context,
      kernels: this.#kernels,
      cache: this.#cache,
      profiler: this.#profiler,
      logits: this.#activations.logits,
      step: await this.decodeStepList(),
      summarize: (r, sequence) => this.#summarizeBlocks(r, sequence),
    }, options);
  }

  /** What runs packs of documents. Needs `classifying`. */
  async classifier(): Promise<Classifier> {
    const classifying = this.#classifying;
    if (!classifying) throw new Error("Classifying needs a model that was loaded with `classifying`");
    const kind = attentionKind(this.sparsity);
    const isSparse = kind === "lists";
    await this.#kernels.prepare(classifyingRoles(classifying.plan, this.#plan.chunkTokens, kind));
    const { x, final, logits, targets, nll, tokens } = this.#activations;
    const { ln_f, lm_head, score } = this.#weights;
    return new Classifier({
      ...classifying,
      gpu: this.#gpu,
      config: this.config,
      memory: this.#plan,
      kernels: this.#kernels,
      cache: this.#cache,
      profiler: this.#profiler,
      isSparse,
      activations: { x, final, logits, targets, nll, tokens },
      weights: { ln_f, lm_head, score: score ?? [] },
      packTokens: (packed, at, ids, first) => this.#packTokensAt(packed, at, ids, first),
      recordLayers: (r, rows, segments) =>
        this.#recordLayers(
          r,
          rows,
          0,
          isSparse ? {} : {
            segments: classifying.buffers.segments,
            attended: (p) => packAttended(segments, p),
          },
        ),
    });
  }

  destroy(): void {
    this.#logitsReadback.destroy();
    for (const readback of [...this.#nllReadbacks, ...this.#divergenceReadbacks]) readback.destroy();
    for (const buffer of Object.values({ ...this.#activations, ...this.#comparison })) buffer.destroy();
    for (const parts of [this.#decoding, this.#classifying]) {
      for (const buffer of Object.values(parts?.buffers ?? {})) buffer.destroy();
      for (const readback of parts?.readbacks ?? []) readback.destroy();
    }
    this.#decoding?.parameters.destroy();
    this.#cache.destroy();
    this.#weights.destroy();
  }

  #requireDecoding(): DecodingParts {
    if (!this.#decoding) throw new Error("Decoding needs a model that was loaded with `decoding`");
    return this.#decoding;
  }

  /**
   * Where blocks are chosen by their summaries, makes those of all that a sequence has completed: decoding keeps them up
   * from there.
   */
  #summarizeBlocks(r: Dispatcher, sequence: number): void {
    const count = Math.floor(this.#cache.lengthOf(sequence) / KV_BLOCK);
    if (attentionKind(this.sparsity) !== "topk" || count === 0) return;
    for (let i = 0; i < this.#cache.layers; i++) {
      r.enter(layerName(i));
      this.#kernels.summarizeBlocks(r, this.#cache.layerOfAll(i), { sequence, count });
    }
  }

  /** Checks tokens and puts them, with their positions, where the embedding reads them. */
  #upload(ids: ArrayLike<number>, sequence: number): void {
    const first = this.#cache.lengthOf(sequence);
    this.checkRoom(first + ids.length);
    upload(this.#activations.tokens, this.#packTokens(ids, first));
  }

  #packTokens(ids: ArrayLike<number>, first: number): DataView<ArrayBuffer> {
    const packed = new DataView(new ArrayBuffer(TOKEN_BYTES * ids.length));
    this.#packTokensAt(packed, 0, ids, first);
    return packed;
  }

  /** Tokens as the embedding reads them, from the `at`th on; the first of them is at position `first`. */
  #packTokensAt(packed: DataView, at: number, ids: ArrayLike<number>, first: number): void {
    for (let t = 0; t < ids.length; t++) {
      this.#checkId(ids[t]!, first + t);
      packToken(packed, at + t, ids[t]!, positionPlace(this.#positions, first + t));
    }
  }

  #checkId(id: number, position: number): void {
    const { vocabSize } = this.config;
    if (Number.isInteger(id) && id >= 0 && id < vocabSize) return;
    throw new InputError(`Token ${position} is ${id}, the model's ids go from 0 to ${vocabSize - 1}`);
  }

  /** The uploaded tokens with dense attention, in a sequence of their own: leaves the residual stream in `otherX`. */
  #recordDense(r: Recorder, tokens: number): void {
    const { otherX } = this.#requireComparison();
    const { x } = this.#activations;
    this.#recordLayers(r, tokens, DENSE_SEQUENCE, { isDense: true });
    r.copy(x, 0, otherX, 0, 4 * tokens * paddedSizes(this.config).width);
  }

  #requireComparison(): Comparison {
    if (!this.#comparison) throw new Error("`onDivergence` needs a model that was loaded with `comparing`");
    return this.#comparison;
  }

  /**
   * The transformer: `tokens` uploaded ones become keys and values in the cache and the last residual stream in `x`.
   * @param attention all keys before a token although the run is sparse, or those of its segment; the run's when left out
   */
  #recordLayers(
    r: Recorder,
    tokens: number,
    sequence: number,
    { isDense = false, segments, attended: ofSegments }: {
      isDense?: boolean;
      segments?: GpuBuffer;
      attended?: KvView["attended"];
    } = {},
  ): void {
    const { x, normed, qkv, attended, hidden } = this.#activations;
    const { wte, wpe, blocks } = this.#weights;
    const kernels = this.#kernels;
    const firstPosition = this.#cache.lengthOf(sequence);
    this.#cache.advance(tokens, sequence);

    r.enter("embedding");
    kernels.embed(r, this.#activations.tokens, wte, wpe, x, tokens);
    r.tap("embedding", x);
    for (const [i, block] of blocks.entries()) {
      r.enter(layerName(i));
      const cached = this.#cache.layer(i, sequence);
      const kv = isDense || segments
        ? { ...cached, lists: undefined, segments, attended: ofSegments }
        : cached;
      kernels.layerNorm(r, x, block.ln_1, normed, tokens);
      kernels.matmul(r, normed, block.c_attn, qkv, tokens, "bias");
      kernels.appendKv(r, qkv, kv, { tokens, firstPosition });
      kernels.attention(r, qkv, kv, attended, { qLen: tokens, firstPosition, scale: this.#scale(i) });
      kernels.matmul(r, attended, block.c_proj, x, tokens, "residual");

      kernels.layerNorm(r, x, block.ln_2, normed, tokens);
      kernels.matmul(r, normed, block.c_fc, hidden, tokens, "bias_gelu");
      kernels.matmul(r, hidden, block.mlp_c_proj, x, tokens, "residual");
      r.tap(`block_${i}`, x);
    }
  }

  /** What the scores of a layer are multiplied with. */
  #scale(layer: number): number {
    const { headDim, scaleAttnWeights, scaleAttnByInverseLayerIdx } = this.config;
    return (scaleAttnWeights ? 1 / Math.sqrt(headDim) : 1) / (scaleAttnByInverseLayerIdx ? layer + 1 : 1);
  }

  /**
   * The same for one token of each sequence, from `nextTokens` to the logits: five dispatches a layer, six where blocks
   * are chosen. What changes from step to step is in GPU memory, so the list is the same for all of them. Needs `decoding`.
   */
  async decodeStepList(): Promise<DispatchList> {
    if (this.#decodeList) return this.#decodeList;
    const { plan: { sequences }, buffers, parameters } = this.#requireDecoding();
    const { x, qkv, hidden } = this.#activations;
    const { wte, wpe, blocks } = this.#weights;
    const kernels = this.#kernels;
    const { pattern } = this.sparsity;
    await kernels.prepare(decodeRoles(sequences, attentionKind(this.sparsity)));
    const list = new DispatchList(this.#gpu, parameters);
    list.enter("embedding");
    kernels.embed(list, buffers.nextTokens, wte, wpe, x, sequences);
    for (const [i, block] of blocks.entries()) {
      list.enter(layerName(i));
      const attention = { qkv, ...buffers };
      kernels.normedGemv(list, x, block.ln_1, block.c_attn, qkv, sequences, "bias");
      const kv = this.#cache.layerOfAll(i);
      const selection = pattern.kind === "topk"
        ? { keep: keptByTopk(pattern), leastBlocks: TOPK_LEAST_BLOCKS }
        : undefined;
      if (selection) kernels.selectBlocks(list, attention, kv, { sequences, ...selection });
      kernels.decodeAttention(list, attention, kv, { sequences, scale: this.#scale(i) }, selection);
      kernels.mergedGemv(list, attention, block.c_proj, x, sequences, kv, selection);
      kernels.normedGemv(list, x, block.ln_2, block.c_fc, hidden, sequences, "bias_gelu");
      kernels.outputGemv(list, hidden, block.mlp_c_proj, x, sequences);
    }
    this.#recordHead(list, 0, sequences);
    return this.#decodeList = list;
  }

  /** The output head for some rows of `x`: no other row's logits are computed. */
  #recordHead(r: Dispatcher, firstRow: number, rows: number, onFinal?: (final: GpuBuffer) => void): void {
    const { x, final, logits } = this.#activations;
    const { ln_f, lm_head } = this.#weights;
    r.enter(OUTPUT_HEAD);
    this.#kernels.finalNorm(r, x, ln_f, final, firstRow, rows);
    onFinal?.(final);
    this.#kernels.lmHead(r, final, lm_head, logits, { rows, vocab: this.config.vocabSize });
  }

  /** Copies the first row of the logits to where the host reads it. */
  #copyLogits(r: Recorder): void {
    r.copy(this.#activations.logits, 0, this.#logitsReadback, 0, 4 * this.config.vocabSize);
  }

  /** Likelihoods and logits of a chunk's tokens, some rows at a time: never `[chunk, vocab]`. */
  async #score(
    scores: PrefillScores,
    first: number,
    chunk: Uint32Array,
    next: number | undefined,
  ): Promise<void> {
    const { vocabSize: vocab } = this.config;
    const { x, final, logits, targets, nll } = this.#activations;
    const { ln_f, lm_head } = this.#weights;
    const kernels = this.#kernels;
    const comparison = scores.wantsDivergence ? this.#requireComparison() : undefined;
    // The last token's successor is the next chunk's first, or there is none to be surprised by.
    const following = Uint32Array.from(chunk, (_, t) => chunk[t + 1] ?? next ?? 0);
    const scored = next === undefined ? chunk.length - 1 : chunk.length;
    upload(targets, following);
    await kernels.prepare([
      ...headRoles(1),
      ...headRoles(this.#plan.logitRows),
      "nll",
      ...(comparison ? ["divergence"] as const : []),
    ]);
    const recorder = () => {
      const made = this.#recorder("score");
      made.beginStep(`tokens ${first} to ${first + chunk.length - 1}`);
      made.enter(OUTPUT_HEAD);
      return made;
    };
    let r = recorder();
    for (let row = 0; row < chunk.length; row += this.#plan.logitRows) {
      const rows = Math.min(this.#plan.logitRows, chunk.length - row);
      const wanted = scores.wantedRows(first + row, rows);
      if (!scores.wantsNll && !comparison && wanted.length === 0) continue;
      if (comparison) {
        kernels.finalNorm(r, comparison.otherX, ln_f, final, row, rows);
        kernels.lmHead(r, final, lm_head, comparison.otherLogits, { rows, vocab });
      }
      kernels.finalNorm(r, x, ln_f, final, row, rows);
      kernels.lmHead(r, final, lm_head, logits, { rows, vocab });
      if (scores.wantsNll) kernels.nll(r, logits, targets, nll, { rows, vocab, firstRow: row });
      if (comparison) {
        const { otherLogits, divergences: results } = comparison;
        const compared = { logits: otherLogits, other: logits, targets, results };
        kernels.divergence(r, compared, { rows, vocab, firstRow: row });
      }
      for (const one of wanted) {
        r.copy(logits, 4 * one * vocab, this.#logitsReadback, 0, 4 * vocab);
        r.submit();
        scores.showLogits(first + row + one, new Float32Array(await this.#logitsReadback.read()));
        r = recorder();
      }
    }
    if (scored > 0) {
      const readbacks = scores.nextReadbacks(first + 1, scored);
      if (readbacks.nll) r.copy(nll, 0, readbacks.nll, 0, 4 * scored);
      if (readbacks.divergences && comparison) {
        r.copy(comparison.divergences, 0, readbacks.divergences, 0, DIVERGENCE_BYTES * scored);
      }
    }
    r.submit();
    await scores.readEarlier();
  }

  #recorder(label: string, tap?: Tap): Recorder {
    return new Recorder(this.#gpu, label, { profiler: this.#profiler, tap });
  }
}

/** The part of the model that makes logits, in traces. */
const OUTPUT_HEAD = "output head";

/** A block of the model, in traces. */
function layerName(i: number): string {
  return `layer ${i}`;
}

/** Where tokens run that are compared with dense attention, and where they do with it. */
const SPARSE_SEQUENCE = 0;
const DENSE_SEQUENCE = 1;

/** What a run's attention walks over. */
function attentionKind(sparsity: Sparsity): AttentionKind {
  if (hasLists(sparsity)) return "lists";
  return sparsity.pattern.kind === "topk" ? "topk" : "dense";
}

/** What a run is likely to need first. */
function expectedRoles(
  { expected = {}, scoring, comparing, decoding, classifying, sparsity = DENSE }: Gpt2Options,
  plan: MemoryPlan,
): Role[] {
  const { promptTokens = plan.chunkTokens, drawing } = expected;
  const { chunkTokens, logitRows } = plan;
  const chunks = [Math.min(promptTokens, chunkTokens), promptTokens % chunkTokens].filter((rows) => rows > 0);
  const kind = attentionKind(sparsity);
  const isClassifying = classifying && !scoring && !decoding;
  return [
    ...(isClassifying ? [] : [...prefillRoles(chunks, kind), ...headRoles(1)]),
    ...(classifying ? classifyingRoles(classifying, chunkTokens, kind) : []),
    ...(scoring ? [...headRoles(logitRows), "nll" as const] : []),
    ...(comparing ? [...prefillRoles(chunks, "dense"), "divergence" as const] : []),
    ...(decoding ? decodeRoles(decoding.sequences, kind) : []),
    ...(drawing ? drawRoles(drawing) : []),
  ];
}

/** What packs of documents run. */
function classifyingRoles({ labelRows }: ClassifyingPlan, rows: number, kind: AttentionKind): Role[] {
  return [
    ...prefillRoles([rows], kind === "lists" ? kind : "packed"),
    ...PACK_HEAD_ROLES,
    ...(labelRows > 0 ? ["nll" as const] : []),
  ];
}

/** What is said of a text beyond the positions, here and before anything runs. */
export function tooManyPositions(text: string, { mode, nPositions, context }: Positions): InputError {
  return mode === "interpolate"
    ? new InputError(`${text} is longer than the ${Math.max(nPositions, context)} positions of this run`, {
      hint: "shorten it, or plan for more tokens with `--context`",
    })
    : new InputError(`${text} is longer than the model's ${nPositions} positions`, {
      hint: "shorten it, or go beyond with `--positions interpolate` or `--positions repeat`, at a loss",
    });
}

/** The next tokens, unless the signal comes first: a pipe may not deliver for hours. */
async function takeUnlessAborted(
  source: TokenSource,
  most: number,
  signal: AbortSignal | undefined,
): Promise<Uint32Array> {
  signal?.throwIfAborted();
  const taking = source.take(most);
  if (!signal) return await taking;
  taking.catch(() => {}); // what fails after the signal has no one to tell
  let abort = () => {};
  const aborted = new Promise<never>((_, reject) => abort = () => reject(signal.reason));
  signal.addEventListener("abort", abort);
  try {
    return await Promise.race([taking, aborted]);
  } finally {
    signal.removeEventListener("abort", abort);
  }
}

/** What is read back of a chunk's tokens. */
interface ScoreReadbacks {
  readonly nll: Readback | undefined;
  readonly divergences: Readback | undefined;
}

/** What the caller of `prefill` asked to see of each token, and the likelihoods that are still on their way. */
class PrefillScores {
  readonly #nll: readonly Readback[];
  readonly #divergences: readonly Readback[];
  readonly #options: PrefillOptions;
  #turn = 0;
  #pending: (ScoreReadbacks & { readonly first: number; readonly count: number })[] = [];

  constructor(nll: readonly Readback[], divergences: readonly Readback[], options: PrefillOptions) {
    if (nll.length === 0) throw new Error("onNll and onLogits need a model that was loaded with `scoring`");
    this.#nll = nll;
    this.#divergences = divergences;
    this.#options = options;
  }

  get wantsNll(): boolean {
    return this.#options.onNll !== undefined;
  }

  get wantsDivergence(): boolean {
    return this.#options.onDivergence !== undefined;
  }

  /** Which of `rows` rows from token `first` on are wanted. */
  wantedRows(first: number, rows: number): number[] {
    const { onLogits, wantsLogits = () => true } = this.#options;
    if (!onLogits) return [];
    return Array.from({ length: rows }, (_, r) => r).filter((r) => wantsLogits(first + r));
  }

  showLogits(token: number, logits: Float32Array): void {
    this.#options.onLogits?.(token, logits);
  }

  /** Where to copy what is wanted of `count` tokens from `first` on. */
  nextReadbacks(first: number, count: number): ScoreReadbacks {
    const turn = this.#turn++;
    const next = (all: readonly Readback[]) => all[turn % all.length];
    const readbacks = {
      nll: this.wantsNll ? next(this.#nll) : undefined,
      divergences: this.wantsDivergence ? next(this.#divergences) : undefined,
    };
    this.#pending.push({ ...readbacks, first, count });
    return readbacks;
  }

  /** Waits for all but the latest: the GPU goes on meanwhile. */
  async readEarlier(): Promise<void> {
    while (this.#pending.length > 1) await this.#readOne();
  }

  async flush(): Promise<void> {
    while (this.#pending.length > 0) await this.#readOne();
  }

  async #readOne(): Promise<void> {
    const { nll, divergences, first, count } = this.#pending.shift()!;
    if (nll) this.#options.onNll?.(first, new Float32Array(await nll.read(), 0, count));
    if (divergences) this.#options.onDivergence?.(first, unpackDivergence(await divergences.read(), count));
  }
}
