/** Bytes a model needs on the device, from its config alone: asked before anything is allocated. */
import type { KernelShape } from "../kernels/index.ts";
import { kvBytesPerToken, type KvCacheShape } from "../kvcache/cache.ts";
import type { Capabilities } from "../runtime/device.ts";
import { formatBytes } from "../runtime/buffers.ts";
import { DoesNotFitError } from "../runtime/errors.ts";
import { type Elem, sizeOf } from "../runtime/kernel.ts";
import type { GPT2Config } from "./config.ts";

/** Padded sizes: rows of four elements are what the kernels read, and padding is zero everywhere. */
export interface PaddedSizes {
  readonly width: number;
  readonly headDim: number;
  /** All heads side by side: `nHead * headDim`, padded. */
  readonly headsWidth: number;
  readonly inner: number;
}

export function pad4(n: number): number {
  return 4 * Math.ceil(n / 4);
}

export function paddedSizes(config: GPT2Config): PaddedSizes {
  const headDim = pad4(config.headDim);
  return {
    width: pad4(config.nEmbd),
    headDim,
    headsWidth: config.nHead * headDim,
    inner: pad4(config.nInner),
  };
}

export function kvShape(config: GPT2Config, elem: Elem): KvCacheShape {
  return {
    layers: config.nLayer,
    heads: config.nHead,
    headDim4: paddedSizes(config).headDim / 4,
    elem,
  };
}

/** What the kernels need to know of a model on a device. */
export function kernelShape(config: GPT2Config, elem: Elem, caps: Capabilities): KernelShape {
  const { heads, headDim4 } = kvShape(config, elem);
  return { elem, width: config.nEmbd, heads, headDim4, unroll: !caps.isSoftware };
}

/**
 * The longest context whose keys of one layer fit one binding.
 * @returns tokens; may exceed the model's positions
 */
export function largestContext(config: GPT2Config, elem: Elem, caps: Capabilities): number {
  const bytesPerToken = paddedSizes(config).headsWidth * sizeOf(elem);
  return Math.floor(Math.min(caps.maxBufferBytes, caps.maxBindingBytes) / bytesPerToken);
}

/** @throws DoesNotFitError naming the largest context that does fit, in this type and in f16 */
export function checkContextFits(config: GPT2Config, context: number, elem: Elem, caps: Capabilities): void {
  const largest = largestContext(config, elem, caps);
  if (context <= largest) return;
  const inF16 = largestContext(config, "f16", caps);
  const bytes = context * kvBytesPerToken(kvShape(config, elem)) / (2 * config.nLayer);
  throw new DoesNotFitError(
    `A context of ${context} tokens does not fit: the keys of one layer take ${
      formatBytes(bytes)
    } in ${elem}, ` +
      `this device binds at most ${formatBytes(Math.min(caps.maxBufferBytes, caps.maxBindingBytes))}`,
    {
      hint: `use \`--context ${largest}\`, the largest that fits in ${elem}` +
        (elem === "f32" && caps.f16 ? `, or \`--dtype f16\` for up to ${inF16}` : ""),
    },
  );
}
