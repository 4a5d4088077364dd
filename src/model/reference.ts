/**
 * GPT-2 on the CPU in plain loops with f64 arithmetic: the definition of correct for `gpt2.ts`. Slow on purpose.
 */
import { embeddingReference } from "../kernels/embedding/reference.ts";
import { attentionReference } from "../kernels/flash_attention/reference.ts";
import { layerNormReference } from "../kernels/layer_norm/reference.ts";
import { lmHeadReference } from "../kernels/lm_head/reference.ts";
import { geluNewReference, matmulReference } from "../kernels/matmul/reference.ts";
import type { ResolvedCheckpoint } from "./checkpoint.ts";
import type { GPT2Config } from "./config.ts";
import { convertElements } from "./float16.ts";
import { exactPositions, positionPlace } from "./positions.ts";
import type { WeightSource } from "./weight_source.ts";

/** Every tensor of a checkpoint by canonical name, widened to f32: for small models. */
export type Parameters = ReadonlyMap<string, Float32Array>;

export async function readParameters(
  source: WeightSource,
  checkpoint: ResolvedCheckpoint,
): Promise<Parameters> {
  const parameters = new Map<string, Float32Array>();
  for (const [name, info] of checkpoint.tensors) {
    const bytes = new Uint8Array(info.byteLength);
    await source.read(info.name, 0, bytes);
    const { bytes: f32 } = convertElements(bytes, info.dtype, "f32");
    parameters.set(name, new Float32Array(f32.slice().buffer));
  }
  return parameters;
}

export interface ReferenceResult {
  /** `embedding`, `block_0`, …, `ln_f`: `[tokens, width]` each. */
  readonly hidden: ReadonlyMap<string, Float64Array>;
  /** `[tokens, vocab]` */
  readonly logits: Float64Array;
}

/**
 * The whole forward pass of one sequence from position 0.
 * @param sees the keys up to its own position that a query attends to; all when left out
 */
export function referenceForward(
  parameters: Parameters,
  config: GPT2Config,
  ids: ArrayLike<number>,
  positions = exactPositions(config.nPositions),
  sees: (layer: number, head: number, position: number, key: number) => boolean = () => true,
): ReferenceResult {
  const { nEmbd, nHead, headDim, nInner, nLayer, layerNormEpsilon } = config;
  const get = (name: string) => {
    const tensor = parameters.get(name);
    if (!tensor) throw new Error(`There is no parameter ${name}`);
    return tensor;
  };
  const norm = (x: Float64Array, name: string) =>
    layerNormReference(x, get(`${name}.weight`), get(`${name}.bias`), nEmbd, layerNormEpsilon);
  const linear = (x: Float64Array, name: string, inner: number) =>
    matmulReference(x, get(`${name}.weight`), get(`${name}.bias`), inner);
  const add = (x: Float64Array, y: Float64Array) => x.map((value, i) => value + y[i]!);

  const hidden = new Map<string, Float64Array>();
  const places = Array.from(ids, (_, position) => positionPlace(positions, position));
  let x = embeddingReference(ids, places, get("wte.weight"), get("wpe.weight"), nEmbd);
  hidden.set("embedding", x);
  for (let i = 0; i < nLayer; i++) {
    const qkv = linear(norm(x, `h.${i}.ln_1`), `h.${i}.attn.c_attn`, nEmbd);
    const third = (n: number) =>
      Float64Array.from(x, (_, j) => qkv[(3 * Math.floor(j / nEmbd) + n) * nEmbd + j % nEmbd]!);
    const scale = (config.scaleAttnWeights ? 1 / Math.sqrt(headDim) : 1) /
      (config.scaleAttnByInverseLayerIdx ? i + 1 : 1);
    const attended = attentionReference(third(0), third(1), third(2), {
      heads: nHead,
      headDim,
      firstPosition: 0,
      scale,
    }, (head, position, key) => sees(i, head, position, key));
    x = add(x, linear(attended, `h.${i}.attn.c_proj`, nEmbd));
    const mlp = linear(norm(x, `h.${i}.ln_2`), `h.${i}.mlp.c_fc`, nEmbd).map(geluNewReference);
    x = add(x, linear(mlp, `h.${i}.mlp.c_proj`, nInner));
    hidden.set(`block_${i}`, x);
  }
  const final = norm(x, "ln_f");
  hidden.set("ln_f", final);
  const head = parameters.get("lm_head.weight") ?? get("wte.weight");
  return { hidden, logits: lmHeadReference(final, head, nEmbd) };
}
