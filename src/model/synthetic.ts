/**
 * GPT-2 checkpoints made of integers alone, the same bit for bit in any language: big shapes can be run and compared
 * without shipping their weights. Every value is a small odd multiple of a power of two (LayerNorm gains: near 1) and
 * so exact in f16. All hash arithmetic is unsigned 32-bit.
 */
import { fmix32 } from "../runtime/fmix32.ts";
import { expectedShapes } from "./checkpoint.ts";
import type { GPT2Config } from "./config.ts";
import { f32ToF16 } from "./float16.ts";
import { elementCount, tensorForRead, type TensorInfo, type WeightSource } from "./weight_source.ts";

/** The f16 bits of a kind of tensor, indexed by the top bits of the hash: `table[hash >>> shift]`. */
interface ValueTable {
  readonly shift: number;
  readonly bits: Uint16Array;
}

/** 2048 odd multiples of 2^exponent, symmetric about zero. */
function symmetric(exponent: number): ValueTable {
  const bits = Uint16Array.from({ length: 2048 }, (_, top) => f32ToF16((2 * top - 2047) * 2 ** exponent));
  return { shift: 21, bits };
}

const EMBEDDING = symmetric(-14); // ±0.125; also c_attn
const C_FC = symmetric(-15); // ±0.0625
const C_PROJ = symmetric(-16); // ±0.03125
const BIAS = symmetric(-17); // ±0.015625
/** LayerNorm gains: 0.875 … 1.123. */
const GAIN: ValueTable = {
  shift: 25,
  bits: Uint16Array.from({ length: 128 }, (_, top) => f32ToF16(1 + (top - 64) * 2 ** -9)),
};

function tableFor(name: string): ValueTable {
  if (name.endsWith(".bias")) return BIAS;
  if (/ln_(1|2|f)\.weight$/.test(name)) return GAIN;
  if (name.endsWith("c_proj.weight")) return C_PROJ;
  if (name.endsWith("c_fc.weight")) return C_FC;
  return EMBEDDING;
}

/** Writes the f16 bits of elements `first`, `first + 1`, … of tensor number `tensor`. */
function fill(out: Uint16Array, table: ValueTable, tensor: number, first: number): void {
  const { bits, shift } = table;
  const seed = fmix32(Math.imul(tensor + 1, 0x9e3779b1) >>> 0) | 0;
  for (let i = 0; i < out.length; i++) {
    // fmix32(fmix32(element) ^ seed), inlined without the conversions to unsigned: they halve the speed.
    let h = (first + i) | 0;
    h ^= h >>> 16;
    h = Math.imul(h, 0x85ebca6b);
    h ^= h >>> 13;
    h = Math.imul(h, 0xc2b2ae35);
    h ^= (h >>> 16) ^ seed;
    h ^= h >>> 16;
    h = Math.imul(h, 0x85ebca6b);
    h ^= h >>> 13;
    h = Math.imul(h, 0xc2b2ae35);
    h ^= h >>> 16;
    out[i] = bits[h >>> shift]!;
  }
}

/** A checkpoint of this shape in F16, generated as it is read. The output head is tied to `wte`. */
export function syntheticSource(config: GPT2Config): WeightSource {
  const description = `synthetic ${config.nLayer}x${config.nHead}x${config.nEmbd}`;
  const tensors = new Map<string, TensorInfo>();
  const numbers = new Map<string, number>();
  // The forward order of expectedShapes is the numbering: 0 wte, 1 wpe, then 12 a block, then ln_f.
  for (const [canonical, shape] of expectedShapes(config)) {
    const name = `transformer.${canonical}`;
    numbers.set(name, numbers.size);
    tensors.set(name, { name, dtype: "F16", shape, byteLength: 2 * elementCount(shape), file: description });
  }
  const source: WeightSource = {
    description,
    tensors,
    // deno-lint-ignore require-await
    async read(name, offset, into) {
      tensorForRead(source, name, offset, into.byteLength);
      const table = tableFor(name);
      const tensor = numbers.get(name)!;
      if (offset % 2 === 0 && into.byteOffset % 2 === 0 && into.byteLength % 2 === 0) {
        fill(new Uint16Array(into.buffer, into.byteOffset, into.byteLength / 2), table, tensor, offset / 2);
        return;
      }
      // A range that cuts elements in half: make the whole ones around it.
      const first = Math.floor(offset / 2);
      const around = new Uint16Array(Math.ceil((offset + into.byteLength) / 2) - first);
      fill(around, table, tensor, first);
      into.set(new Uint8Array(around.buffer, offset - 2 * first, into.byteLength));
    },
    async close() {},
  };
  return source;
}

/** The first `length` tokens of the prompt that belongs to synthetic checkpoints; a shorter one is its beginning. */
export function syntheticPrompt(length: number, vocabSize: number): Uint32Array {
  return Uint32Array.from({ length }, (_, i) => fmix32((i ^ 0x5bd1e995) >>> 0) % vocabSize);
}
