/** Small checkpoints on the device and on the CPU, for laws that hold for any model. */
import { resolveCheckpoint } from "../../src/model/checkpoint.ts";
import { type GPT2Config, readConfig } from "../../src/model/config.ts";
import { Gpt2, type Gpt2Options } from "../../src/model/gpt2.ts";
import { type Parameters, readParameters } from "../../src/model/reference.ts";
import { openCheckpoint } from "../../src/model/safetensors.ts";
import type { Gpu } from "../../src/runtime/device.ts";
import type { Elem } from "../../src/runtime/kernel.ts";

/** What a model needs to decode one sequence. */
export const DECODING = { sequences: 1, inFlight: 2 };

/** Loads a model folder, ready to decode one sequence unless the options say otherwise. */
export async function loadModel(gpu: Gpu, dir: string, options: Gpt2Options): Promise<Gpt2> {
  const source = await openCheckpoint(dir);
  try {
    return await Gpt2.load(gpu, source, await readConfig(dir), { decoding: DECODING, ...options });
  } finally {
    await source.close();
  }
}

/** What `referenceForward` takes. */
export async function readReference(dir: string): Promise<{ config: GPT2Config; parameters: Parameters }> {
  const config = await readConfig(dir);
  const source = await openCheckpoint(dir);
  try {
    return { config, parameters: await readParameters(source, resolveCheckpoint(source, config)) };
  } finally {
    await source.close();
  }
}

/** Tokens without a short period. */
export function someIds(length: number, vocab: number): number[] {
  return Array.from({ length }, (_, i) => (7 * i + (i * i) % 13) % vocab);
}

/** A few stored roundings of logits this large: f32 sums of a few hundred terms, or f16 activations. */
export function logitTolerance(elem: Elem, logits: ArrayLike<number>): number {
  const largest = Array.from(logits, Math.abs).reduce((a, b) => Math.max(a, b), 1);
  return largest * (elem === "f32" ? 2 ** -17 : 2 ** -7);
}
