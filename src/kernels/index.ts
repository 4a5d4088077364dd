/**
 * The registry: every kernel with its variants, in order of preference, and the choice for a model on a device.
 * The model never sees a variant: it calls the operations at the end of this file.
 */
import type { GpuBuffer } from "../runtime/buffers.ts";
import type { Capabilities, Gpu } from "../runtime/device.ts";
import { type Elem, firstSupported, type Kernel, supports } from "../runtime/kernel.ts";
import type { Recorder } from "../runtime/pass.ts";
import { embedding, type EmbeddingVariant, type RowRange } from "./embedding/embedding.ts";
import {
  type FlashAttentionVariant,
  flashAttentionVariants,
  tiledAttention,
} from "./flash_attention/flash_attention.ts";
import {
  combineSplits,
  type FlashDecodeVariant,
  flashDecodeVariants,
  splitCount,
  splitKvAttention,
} from "./flash_decode/flash_decode.ts";
import { kvAppend, type KvAppendVariant } from "./kv_append/kv_append.ts";
import { layerNorm, type LayerNormVariant } from "./layer_norm/layer_norm.ts";
import { lmHead, type LmHeadVariant, lmHeadVariant } from "./lm_head/lm_head.ts";
import {
  type Epilogue,
  EPILOGUES,
  gemv,
  type GemvVariant,
  gemvVariants,
  tiledMatmul,
  type TiledVariant,
  tiledVariants,
} from "./matmul/matmul.ts";

/** What a model's size means for its kernels; `width` counts the columns that exist, the rest are padded to four. */
export interface KernelShape {
  readonly elem: Elem;
  readonly width: number;
  readonly heads: number;
  readonly headDim4: number;
  /** Constant trip counts in hot loops: true but for software adapters (`shared/trips.wgsl`). */
  readonly unroll: boolean;
}

/** A kernel with all its variants for a shape, in order of preference. */
export interface Candidates {
  readonly role: string;
  // Kernels of different variants stand in one list here; each is only ever paired with its own variants.
  // deno-lint-ignore no-explicit-any
  readonly kernel: Kernel<any, any>;
  readonly variants: readonly object[];
}

/** Every variant that a model of this shape may use. */
export function candidates(shape: KernelShape): Candidates[] {
  const { elem, width, heads, headDim4, unroll } = shape;
  const width4 = Math.ceil(width / 4);
  const matmuls = (Object.keys(EPILOGUES) as Epilogue[]).flatMap((epilogue) => [
    { role: `matmul, ${epilogue}`, kernel: tiledMatmul, variants: tiledVariants(elem, epilogue, unroll) },
    { role: `matmul of one row, ${epilogue}`, kernel: gemv, variants: gemvVariants(elem, epilogue, unroll) },
  ]);
  return [
    { role: "embedding", kernel: embedding, variants: [{ elem, width4 }] },
    { role: "layer norm", kernel: layerNorm, variants: [{ outElem: elem, width }] },
    { role: "final layer norm", kernel: layerNorm, variants: [{ outElem: "f32", width }] },
    ...matmuls,
    { role: "KV append", kernel: kvAppend, variants: [{ elem, heads, headDim4 }] },
    {
      role: "attention, prefill",
      kernel: tiledAttention,
      variants: flashAttentionVariants(elem, heads, headDim4, unroll),
    },
    {
      role: "attention, decode",
      kernel: splitKvAttention,
      variants: flashDecodeVariants(elem, heads, headDim4, unroll),
    },
    {
      role: "attention, merge",
      kernel: combineSplits,
      variants: flashDecodeVariants(elem, heads, headDim4, unroll),
    },
    { role: "output head, one row", kernel: lmHead, variants: [lmHeadVariant(elem, 1)] },
    { role: "output head, many rows", kernel: lmHead, variants: [lmHeadVariant(elem, 2)] },
  ];
}

/** For `info` and `-v`: what would run on a device, and why better candidates would not. */
export interface Choice {
  readonly role: string;
  readonly kernel: string;
  /** Undefined when no variant runs there. */
  readonly chosen: object | undefined;
  readonly rejected: readonly { readonly variant: object; readonly reason: string }[];
}

export function explainChoices(shape: KernelShape, caps: Capabilities): Choice[] {
  return candidates(shape).map(({ role, kernel, variants }) => {
    const rejected: { variant: object; reason: string }[] = [];
    for (const variant of variants) {
      const verdict = supports(kernel, variant, caps);
      if (verdict === true) return { role, kernel: kernel.name, chosen: variant, rejected };
      rejected.push({ variant, reason: verdict });
    }
    return { role, kernel: kernel.name, chosen: undefined, rejected };
  });
}

/** Keys and values of one layer, `[heads, capacity, headDim]` each; whoever owns the cache provides it. */
export interface KvView {
  readonly k: GpuBuffer;
  readonly v: GpuBuffer;
  readonly capacity: number;
}

/** Rows of a table too large for one binding, in several buffers of whole rows. */
export interface RowPiece extends RowRange {
  readonly buffer: GpuBuffer;
}

export interface Linear {
  /** `[inner, columns]` */
  readonly w: GpuBuffer;
  /** `[columns]`, f32 */
  readonly bias: GpuBuffer;
  readonly inner: number;
  readonly columns: number;
}

export interface Norm {
  readonly gain: GpuBuffer;
  readonly shift: GpuBuffer;
  readonly epsilon: number;
}

/** Rows up to which the small tile wastes less of a workgroup than the large one gains. */
const SMALL_TILE_ROWS = 32;

/** The kernels of one model on one device: chosen and compiled when made, then called by the graph. */
export class ModelKernels {
  readonly #shape: KernelShape;
  readonly #embedding: EmbeddingVariant;
  readonly #norm: LayerNormVariant;
  readonly #finalNorm: LayerNormVariant;
  readonly #tiled: Record<Epilogue, { large: TiledVariant; small: TiledVariant }>;
  readonly #gemv: Record<Epilogue, GemvVariant>;
  readonly #kvAppend: KvAppendVariant;
  readonly #attention: FlashAttentionVariant;
  readonly #decode: FlashDecodeVariant;
  readonly #combine: FlashDecodeVariant;
  readonly #lmHeadOne: LmHeadVariant;
  readonly #lmHeadMany: LmHeadVariant;
  /** Resolves when every pipeline is compiled. */
  readonly compiled: Promise<void>;

  /** Starts compiling all the pipelines at once; weights can load meanwhile. */
  constructor(gpu: Gpu, shape: KernelShape) {
    const { elem, width, heads, headDim4, unroll } = shape;
    const compiling: Promise<unknown>[] = [];
    const use = <V, P>(kernel: Kernel<V, P>, variants: readonly V[]): V => {
      const v = firstSupported(kernel, variants, gpu.caps);
      compiling.push(gpu.pipelines.prepare(kernel, v));
      return v;
    };
    const byEpilogue = <T>(make: (epilogue: Epilogue) => T): Record<Epilogue, T> => ({
      bias: make("bias"),
      bias_gelu: make("bias_gelu"),
      residual: make("residual"),
    });
    this.#shape = shape;
    this.#embedding = use(embedding, [{ elem, width4: Math.ceil(width / 4) }]);
    this.#norm = use(layerNorm, [{ outElem: elem, width }]);
    this.#finalNorm = use(layerNorm, [{ outElem: "f32", width }]);
    this.#tiled = byEpilogue((epilogue) => {
      const variants = tiledVariants(elem, epilogue, unroll);
      return { large: use(tiledMatmul, variants), small: use(tiledMatmul, variants.slice(-1)) };
    });
    this.#gemv = byEpilogue((epilogue) => use(gemv, gemvVariants(elem, epilogue, unroll)));
    this.#kvAppend = use(kvAppend, [{ elem, heads, headDim4 }]);
    this.#attention = use(tiledAttention, flashAttentionVariants(elem, heads, headDim4, unroll));
    this.#decode = use(splitKvAttention, flashDecodeVariants(elem, heads, headDim4, unroll));
    this.#combine = use(combineSplits, [{ ...this.#decode }]);
    this.#lmHeadOne = use(lmHead, [lmHeadVariant(elem, 1)]);
    this.#lmHeadMany = use(lmHead, [lmHeadVariant(elem, 2)]);
    this.compiled = Promise.all(compiling).then(() => undefined);
    this.compiled.catch(() => {});
  }

  /** Slices that decoding cuts `kvLen` keys into: the size of its scratch buffers. */
  decodeSplits(kvLen: number): number {
    return splitCount(this.#decode, kvLen);
  }

  /** `x[tokens, width] = wte[ids] + wpe[firstPosition…]` */
  embed(
    r: Recorder,
    ids: GpuBuffer,
    wte: readonly RowPiece[],
    wpe: readonly RowPiece[],
    x: GpuBuffer,
    p: { tokens: number; firstPosition: number },
  ): void {
    for (const tokenRows of wte) {
      for (const positionRows of wpe) {
        const problem = { ...p, wte: tokenRows, wpe: positionRows };
        r.dispatch(embedding, this.#embedding, problem, {
          ids,
          wte: tokenRows.buffer,
          wpe: positionRows.buffer,
          x,
        });
      }
    }
  }

  /** `out[rows, width]`, as wide as the stored elements. */
  layerNorm(r: Recorder, x: GpuBuffer, norm: Norm, out: GpuBuffer, rows: number): void {
    const { gain, shift, epsilon } = norm;
    r.dispatch(layerNorm, this.#norm, { rows, firstRow: 0, epsilon }, { x, gain, shift, out });
  }

  /** The same in f32, from row `firstRow` on: what the output head reads. */
  finalNorm(r: Recorder, x: GpuBuffer, norm: Norm, out: GpuBuffer, firstRow: number, rows: number): void {
    const { gain, shift, epsilon } = norm;
    r.dispatch(layerNorm, this.#finalNorm, { rows, firstRow, epsilon }, { x, gain, shift, out });
  }

  /** `out[rows, columns] = epilogue(x · w + bias)` */
  matmul(r: Recorder, x: GpuBuffer, layer: Linear, out: GpuBuffer, rows: number, epilogue: Epilogue): void {
    const { w, bias, inner, columns } = layer;
    const buffers = { x, w, bias, out };
    const problem = { rows, inner, columns };
    if (rows === 1) {
      r.dispatch(gemv, this.#gemv[epilogue], problem, buffers);
    } else {
      const { large, small } = this.#tiled[epilogue];
      r.dispatch(tiledMatmul, rows <= SMALL_TILE_ROWS ? small : large, problem, buffers);
    }
  }

  /** Appends the keys and values in `qkv[tokens, 3, heads, headDim]` to the cache. */
  appendKv(r: Recorder, qkv: GpuBuffer, kv: KvView, p: { tokens: number; firstPosition: number }): void {
    r.dispatch(kvAppend, this.#kvAppend, { ...p, capacity: kv.capacity }, { qkv, k: kv.k, v: kv.v });
  }

  /** Causal attention of `qLen` queries over the cache, whose last `qLen` keys are their own. */
  attention(
    r: Recorder,
    qkv: GpuBuffer,
    kv: KvView,
    out: GpuBuffer,
    p: { qLen: number; firstPosition: number; scale: number },
  ): void {
    const problem = { ...p, capacity: kv.capacity };
    r.dispatch(tiledAttention, this.#attention, problem, { qkv, k: kv.k, v: kv.v, out });
  }

  /** Attention of one query over `kvLen` keys, split over the device and merged. */
  decodeAttention(
    r: Recorder,
    qkv: GpuBuffer,
    kv: KvView,
    scratch: { partialOut: GpuBuffer; partialMl: GpuBuffer },
    out: GpuBuffer,
    p: { kvLen: number; scale: number },
  ): void {
    const problem = { ...p, capacity: kv.capacity };
    const partial = { partial_out: scratch.partialOut, partial_ml: scratch.partialMl };
    r.dispatch(splitKvAttention, this.#decode, problem, { qkv, k: kv.k, v: kv.v, ...partial });
    r.dispatch(combineSplits, this.#combine, problem, { ...partial, out });
  }

  /** `logits[rows, vocab] = x[rows, width] · headᵀ` */
  lmHead(
    r: Recorder,
    x: GpuBuffer,
    head: readonly RowPiece[],
    logits: GpuBuffer,
    p: { rows: number; vocab: number },
  ): void {
    const inner = 4 * Math.ceil(this.#shape.width / 4);
    const variant = p.rows === 1 ? this.#lmHeadOne : this.#lmHeadMany;
    for (const piece of head) {
      r.dispatch(lmHead, variant, { ...p, inner, piece }, { x, w: piece.buffer, logits });
    }
  }
}
