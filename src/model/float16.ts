/**
 * Conversions between the element types a checkpoint stores (F16, BF16, F32) and the two a kernel computes in.
 *
 * All views are little-endian, as safetensors files and every WebGPU host are. Narrowing to f16 rounds to nearest,
 * ties to even; a finite value that rounds past 65504 becomes an infinity and is reported as an overflow.
 */
import type { Elem } from "../runtime/kernel.ts";
import type { StoredDType } from "./weight_source.ts";

/** What a scan of the elements found: flat element indexes, -1 where there is none. */
export interface ElementScan {
  /** First NaN or infinity in the source. */
  readonly firstNonFinite: number;
  /** First finite source value that f16 cannot hold. */
  readonly firstOverflow: number;
}

export interface ConvertedElements extends ElementScan {
  readonly bytes: Uint8Array;
}

/** Bytes of one stored element. */
export const STORED_BYTES: Readonly<Record<StoredDType, number>> = { F32: 4, F16: 2, BF16: 2 };

/** Magnitude bits of the smallest f32 that rounds past 65504: 65520, half way to the next step, ties to even. */
const F32_OVERFLOW = 0x477ff000;
const F32_INFINITY = 0x7f800000;
/** The same bounds in the 15 magnitude bits of a bfloat16. */
const BF16_OVERFLOW = 0x4780;
const BF16_INFINITY = 0x7f80;
const F16_INFINITY = 0x7c00;

const scratchF32 = new Float32Array(1);
const scratchU32 = new Uint32Array(scratchF32.buffer);

/** The f32 bits that equal the f16 with these bits; NaN payloads and the sign of zero survive. */
function widenBits(bits: number): number {
  const sign = (bits & 0x8000) << 16;
  const exponent = (bits >>> 10) & 31;
  const mantissa = bits & 1023;
  if (exponent === 31) return sign | F32_INFINITY | (mantissa << 13);
  if (exponent !== 0) return sign | ((exponent + 112) << 23) | (mantissa << 13);
  scratchF32[0] = mantissa * 2 ** -24; // a subnormal f16 is a normal f32, or zero
  return sign | scratchU32[0]!;
}

/** The f16 bits nearest to the f32 with these bits. */
function narrowBits(bits: number): number {
  const sign = (bits >>> 16) & 0x8000;
  const magnitude = bits & 0x7fffffff;
  if (magnitude > F32_INFINITY) return sign | 0x7e00; // NaN
  if (magnitude >= F32_OVERFLOW) return sign | F16_INFINITY;
  // A carry out of the mantissa steps the exponent, which is the right answer.
  if (magnitude >= 0x38800000) {
    return sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >>> 13) & 1)) >>> 13);
  }
  if (magnitude <= 0x33000000) return sign; // at most half of the smallest subnormal
  const shift = 126 - (magnitude >>> 23); // 14..24: the mantissa in units of 2^-24
  const mantissa = (magnitude & 0x7fffff) | 0x800000;
  return sign | ((mantissa + (1 << (shift - 1)) - 1 + ((mantissa >>> shift) & 1)) >>> shift);
}

/** The number whose f16 bits these are. */
export function f16ToF32(bits: number): number {
  scratchU32[0] = widenBits(bits & 0xffff);
  return scratchF32[0]!;
}

/** The f16 bits nearest to `x`, which is rounded to f32 first. */
export function f32ToF16(x: number): number {
  scratchF32[0] = x;
  return narrowBits(scratchU32[0]!);
}

// 65536-entry tables beat bit arithmetic in both JavaScript engines; each takes about a millisecond to build.
let f16AsF32: Int32Array | undefined;
let bf16AsF16: Uint16Array | undefined;

function wideningTable(): Int32Array {
  return f16AsF32 ??= Int32Array.from({ length: 65536 }, (_, bits) => widenBits(bits));
}

function bfloatTable(): Uint16Array {
  return bf16AsF16 ??= Uint16Array.from({ length: 65536 }, (_, bits) => narrowBits(bits << 16));
}

/** The bytes as aligned elements: a view where the offset allows it, otherwise a copy. */
function halves(src: Uint8Array): Uint16Array {
  const aligned = src.byteOffset % 2 === 0 ? src : src.slice();
  return new Uint16Array(aligned.buffer, aligned.byteOffset, aligned.byteLength / 2);
}

/** Signed, because both engines handle signed 32-bit elements faster. */
function words(src: Uint8Array): Int32Array {
  const aligned = src.byteOffset % 4 === 0 ? src : src.slice();
  return new Int32Array(aligned.buffer, aligned.byteOffset, aligned.byteLength / 4);
}

// Two copies of one loop: shared between array types it would run at a third of the speed.

/** First index whose 15 magnitude bits lie in `[low, high]`, or -1. */
function firstHalfBetween(bits: Uint16Array, low: number, high: number): number {
  for (let i = 0; i < bits.length; i++) {
    const magnitude = bits[i]! & 0x7fff;
    if (magnitude >= low && magnitude <= high) return i;
  }
  return -1;
}

/** First index whose 31 magnitude bits lie in `[low, high]`, or -1. */
function firstWordBetween(bits: Int32Array, low: number, high: number): number {
  for (let i = 0; i < bits.length; i++) {
    const magnitude = bits[i]! & 0x7fffffff;
    if (magnitude >= low && magnitude <= high) return i;
  }
  return -1;
}

/** Finds the first non-finite element, and the first one that f16 cannot hold, without converting anything. */
export function scanElements(src: Uint8Array, from: StoredDType): ElementScan {
  checkLength(src, from);
  if (from === "F32") {
    const bits = words(src);
    return scanWith((low, high) => firstWordBetween(bits, low, high), F32_OVERFLOW, F32_INFINITY, 0x7fffffff);
  }
  const bits = halves(src);
  const overflow = from === "F16" ? F16_INFINITY : BF16_OVERFLOW; // an F16 cannot overflow itself
  const infinity = from === "F16" ? F16_INFINITY : BF16_INFINITY;
  return scanWith((low, high) => firstHalfBetween(bits, low, high), overflow, infinity, 0x7fff);
}

/** One pass clears a healthy tensor; only a suspect one is searched again for what is wrong with it. */
function scanWith(
  find: (low: number, high: number) => number,
  overflow: number,
  infinity: number,
  most: number,
): ElementScan {
  if (find(overflow, most) < 0) return { firstNonFinite: -1, firstOverflow: -1 };
  return { firstNonFinite: find(infinity, most), firstOverflow: find(overflow, infinity - 1) };
}

/**
 * Converts `src` element by element and reports what a kernel could not live with. Non-finite elements are converted
 * too (NaN stays NaN); whether they are an error is the caller's decision.
 * @param src little-endian elements at any byte offset; its length must be a whole number of elements
 * @returns `bytes` is `src` itself where the types agree, so it may share memory and be unaligned; otherwise it is new.
 * `firstOverflow` is -1 for `to: "f32"`, which holds every stored value.
 */
export function convertElements(src: Uint8Array, from: StoredDType, to: Elem): ConvertedElements {
  const scan = scanElements(src, from);
  if (to === "f32") {
    return { bytes: toF32(src, from), firstNonFinite: scan.firstNonFinite, firstOverflow: -1 };
  }
  return { bytes: toF16(src, from), ...scan };
}

function toF32(src: Uint8Array, from: StoredDType): Uint8Array {
  if (from === "F32") return src;
  const bits = halves(src);
  const out = new Int32Array(bits.length);
  if (from === "BF16") shiftAll(bits, out);
  else lookUpAll(bits, wideningTable(), out);
  return new Uint8Array(out.buffer);
}

function toF16(src: Uint8Array, from: StoredDType): Uint8Array {
  if (from === "F16") return src;
  const out = new Uint16Array(src.byteLength / STORED_BYTES[from]);
  if (from === "BF16") narrowAllHalves(halves(src), bfloatTable(), out);
  else narrowAllWords(words(src), out);
  return new Uint8Array(out.buffer);
}

// Each loop is a function of its own so that it sees one combination of array types only.

function shiftAll(bits: Uint16Array, out: Int32Array): void {
  for (let i = 0; i < bits.length; i++) out[i] = bits[i]! << 16;
}

function lookUpAll(bits: Uint16Array, table: Int32Array, out: Int32Array): void {
  for (let i = 0; i < bits.length; i++) out[i] = table[bits[i]!]!;
}

function narrowAllHalves(bits: Uint16Array, table: Uint16Array, out: Uint16Array): void {
  for (let i = 0; i < bits.length; i++) out[i] = table[bits[i]!]!;
}

function narrowAllWords(bits: Int32Array, out: Uint16Array): void {
  for (let i = 0; i < bits.length; i++) {
    const word = bits[i]!;
    const magnitude = word & 0x7fffffff;
    // The common case of narrowBits, inlined: a normal f16.
    out[i] = magnitude >= 0x38800000 && magnitude < F32_OVERFLOW
      ? ((word >>> 16) & 0x8000) | ((magnitude - 0x38000000 + 0xfff + ((magnitude >>> 13) & 1)) >>> 13)
      : narrowBits(word);
  }
}

function checkLength(src: Uint8Array, from: StoredDType): void {
  if (src.byteLength % STORED_BYTES[from] !== 0) {
    throw new RangeError(`Cannot read ${src.byteLength} bytes as ${from}: not a whole number of elements`);
  }
}
