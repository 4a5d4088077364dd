/**
 * The GPT-2 graph (Radford et al. 2019) on the GPU: what is computed, in which order, into which buffer. The same
 * graph in plain loops is in `reference.ts`.
 */
import { KvCache } from "../kvcache/cache.ts";
import { ModelKernels } from "../kernels/index.ts";
import { createBuffer, type GpuBuffer, Readback, upload } from "../runtime/buffers.ts";
import type { Gpu } from "../runtime/device.ts";
import { InputError } from "../runtime/errors.ts";
import { type Elem, sizeOf } from "../runtime/kernel.ts";
import { Recorder, type Tap } from "../runtime/pass.ts";
import type { Profiler } from "../runtime/profiler.ts";
import { resolveCheckpoint } from "./checkpoint.ts";
import type { GPT2Config } from "./config.ts";
import { checkContextFits, kernelShape, kvShape, paddedSizes } from "./memory_plan.ts";
import type { WeightSource } from "./weight_source.ts";
import { type Gpt2Weights, type LoadProgress, loadWeights } from "./weights.ts";

/** Tokens of a prompt that go through the layers at a time: activations grow with this, not with the context. */
const CHUNK_TOKENS = 2048;
/** Rows that meet the output head at a time when all of a prompt's logits are asked for. */
const LOGIT_ROWS = 64;

export interface Gpt2Options {
  /** Tokens to hold keys and values for. */
  readonly context: number;
  /** Storage of weights, activations and the cache; sums are in f32 either way. */
  readonly elem: Elem;
  readonly onLoad?: LoadProgress;
  readonly profiler?: Profiler | undefined;
}

export interface PrefillOptions {
  /** Ends the run between two chunks by throwing its reason; the tokens of the chunks before stay in the cache. */
  readonly signal?: AbortSignal | undefined;
  /** Called as chunks complete on the GPU. */
  readonly onProgress?: (doneTokens: number, totalTokens: number) => void;
  /** Sees the residual stream after `embedding` and every `block_0`, `block_1`, …, and the last row after `ln_f`. */
  readonly tap?: Tap;
  /** Receives the logits `[rows, vocab]` of every token, in order; without it only the last row is computed. */
  readonly onLogits?: (firstToken: number, logits: Float32Array) => void;
  /** Tokens a chunk; the results do not depend on it beyond rounding. */
  readonly chunkTokens?: number;
}

interface Activations {
  readonly ids: GpuBuffer; // [chunk] u32
  readonly x: GpuBuffer; // [chunk, width] f32: the residual stream
  readonly normed: GpuBuffer; // [chunk, width]
  readonly qkv: GpuBuffer; // [chunk, 3, heads, headDim]
  readonly attended: GpuBuffer; // [chunk, heads, headDim]
  readonly hidden: GpuBuffer; // [chunk, inner]
  readonly partialOut: GpuBuffer; // [splits, heads, headDim] f32
  readonly partialMl: GpuBuffer; // [splits, heads, 2] f32
  readonly final: GpuBuffer; // [LOGIT_ROWS, width] f32, after ln_f
  readonly logits: GpuBuffer; // [1, vocab] f32
}

/** A model on a device with one sequence in its cache. */
export class Gpt2 {
  readonly config: GPT2Config;
  readonly elem: Elem;
  readonly #gpu: Gpu;
  readonly #kernels: ModelKernels;
  readonly #weights: Gpt2Weights;
  readonly #cache: KvCache;
  readonly #activations: Activations;
  readonly #logitsReadback: Readback;
  readonly #profiler: Profiler | undefined;

  private constructor(
    gpu: Gpu,
    config: GPT2Config,
    options: Gpt2Options,
    parts: { kernels: ModelKernels; cache: KvCache; activations: Activations; weights: Gpt2Weights },
  ) {
    this.config = config;
    this.elem = options.elem;
    this.#gpu = gpu;
    this.#profiler = options.profiler;
    this.#kernels = parts.kernels;
    this.#cache = parts.cache;
    this.#activations = parts.activations;
    this.#weights = parts.weights;
    this.#logitsReadback = new Readback(gpu, "logits", 4 * config.vocabSize);
  }

  /**
   * Loads a checkpoint; pipelines compile while its weights stream to the GPU.
   * @throws DoesNotFitError before anything is allocated when a layer's keys exceed a binding, and before any weight is
   * read when cache and activations exceed the memory
   */
  static async load(gpu: Gpu, source: WeightSource, config: GPT2Config, options: Gpt2Options): Promise<Gpt2> {
    const { elem, context, onLoad } = options;
    checkContextFits(config, context, elem, gpu.caps);
    const checkpoint = resolveCheckpoint(source, config);
    const kernels = new ModelKernels(gpu, kernelShape(config, elem, gpu.caps));
    const owned: { destroy(): void }[] = [];
    try {
      const cache = new KvCache(gpu, kvShape(config, elem), context);
      owned.push(cache);
      const activations = allocateActivations(gpu, config, kernels, options);
      owned.push(...Object.values(activations));
      await gpu.idle(); // reports memory that ran out
      const weights = await loadWeights(gpu, source, checkpoint, config, elem, onLoad);
      owned.push(weights);
      await kernels.compiled;
      return new Gpt2(gpu, config, options, { kernels, cache, activations, weights });
    } catch (error) {
      for (const part of owned) part.destroy();
      throw error;
    }
  }

  /** Tokens whose keys and values are in the cache. */
  get length(): number {
    return this.#cache.length;
  }

  /** Tokens the cache has room for. */
  get context(): number {
    return this.#cache.capacity;
  }

  /** Forgets the tokens from `length` on, so that another continuation can follow. */
  truncate(length: number): void {
    this.#cache.truncate(length);
  }

  /**
   * Runs tokens through the model behind those already in the cache.
   * @returns the logits after the last of them, `[vocab]`
   */
  async prefill(ids: ArrayLike<number>, options: PrefillOptions = {}): Promise<Float32Array> {
    this.#checkTokens(ids);
    const chunkTokens = Math.min(options.chunkTokens ?? CHUNK_TOKENS, CHUNK_TOKENS);
    let submitted: Promise<void> | undefined;
    for (let first = 0; first < ids.length; first += chunkTokens) {
      options.signal?.throwIfAborted();
      const tokens = Math.min(chunkTokens, ids.length - first);
      const isLast = first + tokens === ids.length;
      upload(this.#activations.ids, Uint32Array.from({ length: tokens }, (_, t) => ids[first + t]!));
      const r = this.#recorder("prefill", options.tap);
      this.#recordLayers(r, tokens);
      if (isLast) this.#recordLogits(r, tokens - 1);
      r.submit();
      await this.#profiler?.collect();
      if (options.onLogits) await this.#allLogits(first, tokens, options.onLogits);
      // One chunk runs while the next is recorded: the queue never empties, nor does it fill without bound.
      await submitted;
      if (first > 0) options.onProgress?.(first, ids.length);
      submitted = this.#gpu.idle();
      submitted.catch(() => {}); // whatever fails first is thrown, and then nobody may await this one
    }
    const logits = await this.#logitsReadback.read();
    await submitted;
    options.onProgress?.(ids.length, ids.length);
    return new Float32Array(logits);
  }

  /**
   * Appends one token.
   * @returns the logits after it, `[vocab]`
   */
  async decodeStep(id: number): Promise<Float32Array> {
    this.#checkTokens([id]);
    upload(this.#activations.ids, Uint32Array.of(id));
    const r = this.#recorder("decode");
    this.#recordLayers(r, 1);
    this.#recordLogits(r, 0);
    r.submit();
    const logits = await this.#logitsReadback.read();
    await this.#profiler?.collect();
    return new Float32Array(logits);
  }

  destroy(): void {
    this.#logitsReadback.destroy();
    for (const buffer of Object.values(this.#activations)) buffer.destroy();
    this.#cache.destroy();
    this.#weights.destroy();
  }

  /** The transformer: `tokens` ids become keys and values in the cache and the last residual stream in `x`. */
  #recordLayers(r: Recorder, tokens: number): void {
    const { nLayer, headDim, scaleAttnWeights, scaleAttnByInverseLayerIdx } = this.config;
    const { ids, x, normed, qkv, attended, hidden } = this.#activations;
    const { wte, wpe, blocks } = this.#weights;
    const kernels = this.#kernels;
    const firstPosition = this.#cache.length;
    this.#cache.advance(tokens);

    kernels.embed(r, ids, wte, wpe, x, { tokens, firstPosition });
    r.tap("embedding", x);
    for (let i = 0; i < nLayer; i++) {
      const block = blocks[i]!;
      const kv = this.#cache.layer(i);
      const scale = (scaleAttnWeights ? 1 / Math.sqrt(headDim) : 1) /
        (scaleAttnByInverseLayerIdx ? i + 1 : 1);

      kernels.layerNorm(r, x, block.ln_1, normed, tokens);
      kernels.matmul(r, normed, block.c_attn, qkv, tokens, "bias");
      kernels.appendKv(r, qkv, kv, { tokens, firstPosition });
      if (tokens === 1) {
        const p = { kvLen: firstPosition + 1, scale };
        kernels.decodeAttention(r, qkv, kv, this.#activations, attended, p);
      } else {
        kernels.attention(r, qkv, kv, attended, { qLen: tokens, firstPosition, scale });
      }
      kernels.matmul(r, attended, block.c_proj, x, tokens, "residual");

      kernels.layerNorm(r, x, block.ln_2, normed, tokens);
      kernels.matmul(r, normed, block.c_fc, hidden, tokens, "bias_gelu");
      kernels.matmul(r, hidden, block.mlp_c_proj, x, tokens, "residual");
      r.tap(`block_${i}`, x);
    }
  }

  /** The output head for one row of `x`: no other row's logits are computed. */
  #recordLogits(r: Recorder, row: number): void {
    const { x, final, logits } = this.#activations;
    const { ln_f, lm_head } = this.#weights;
    this.#kernels.finalNorm(r, x, ln_f, final, row, 1);
    r.tap("ln_f", final);
    this.#kernels.lmHead(r, final, lm_head, logits, { rows: 1, vocab: this.config.vocabSize });
    r.copy(logits, 0, this.#logitsReadback, 0, 4 * this.config.vocabSize);
  }

  /** Logits of all of a chunk's rows, a few at a time: never `[chunk, vocab]`. */
  async #allLogits(
    firstToken: number,
    tokens: number,
    onLogits: NonNullable<PrefillOptions["onLogits"]>,
  ): Promise<void> {
    const { vocabSize } = this.config;
    const { x, final } = this.#activations;
    const logits = createBuffer(this.#gpu, "logits of many rows", "activations", 4 * LOGIT_ROWS * vocabSize);
    const readback = new Readback(this.#gpu, "logits of many rows", 4 * LOGIT_ROWS * vocabSize);
    try {
      for (let row = 0; row < tokens; row += LOGIT_ROWS) {
        const rows = Math.min(LOGIT_ROWS, tokens - row);
        const r = this.#recorder("logits");
        this.#kernels.finalNorm(r, x, this.#weights.ln_f, final, row, rows);
        this.#kernels.lmHead(r, final, this.#weights.lm_head, logits, { rows, vocab: vocabSize });
        r.copy(logits, 0, readback, 0, 4 * rows * vocabSize);
        r.submit();
        onLogits(firstToken + row, new Float32Array(await readback.read(), 0, rows * vocabSize));
        await this.#profiler?.collect();
      }
    } finally {
      logits.destroy();
      readback.destroy();
    }
  }

  #recorder(label: string, tap?: Tap): Recorder {
    return new Recorder(this.#gpu, label, { profiler: this.#profiler, tap });
  }

  #checkTokens(ids: ArrayLike<number>): void {
    const { vocabSize, nPositions } = this.config;
    if (ids.length === 0) throw new InputError("There are no tokens to run");
    for (let t = 0; t < ids.length; t++) {
      const id = ids[t]!;
      if (!(Number.isInteger(id) && id >= 0 && id < vocabSize)) {
        throw new InputError(`Token ${t} is ${id}, the model's ids go from 0 to ${vocabSize - 1}`);
      }
    }
    const end = this.#cache.length + ids.length;
    const room = Math.min(this.#cache.capacity, nPositions);
    if (end > room) {
      throw new InputError(`${end} tokens do not fit: this run has room for ${room}`, {
        hint: `the model has ${nPositions} positions; plan for more tokens with \`--context\``,
      });
    }
  }
}

function allocateActivations(
  gpu: Gpu,
  config: GPT2Config,
  kernels: ModelKernels,
  { context, elem }: Gpt2Options,
): Activations {
  const { width, headsWidth, inner } = paddedSizes(config);
  const chunk = Math.min(context, CHUNK_TOKENS);
  const splits = kernels.decodeSplits(context);
  const stored = sizeOf(elem);
  const buffer = (label: string, bytes: number) => createBuffer(gpu, label, "activations", bytes);
  return {
    ids: buffer("ids", 4 * chunk),
    x: buffer("residual stream", 4 * chunk * width),
    normed: buffer("layer norm", stored * chunk * width),
    qkv: buffer("qkv", stored * chunk * 3 * headsWidth),
    attended: buffer("attention", stored * chunk * headsWidth),
    hidden: buffer("mlp", stored * chunk * inner),
    partialOut: buffer("attention splits", 4 * splits * headsWidth),
    partialMl: buffer("attention split statistics", 8 * splits * config.nHead),
    final: buffer("final layer norm", 4 * LOGIT_ROWS * width),
    logits: buffer("logits", 4 * config.vocabSize),
  };
}
