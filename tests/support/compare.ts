/**
 * How far a kernel may be from the exact result, argued rather than tuned.
 *
 * The rule is flash-attention's: on the same rounded inputs, the kernel's error against the f64 reference is at most
 * twice that of the plain algorithm, the textbook loops in f32 whose result is rounded to the stored type. It bounds
 * what a kernel adds by its own choices (order of sums, online softmax, exp2 for exp) by what nobody can avoid at that
 * precision, and it follows the data: badly conditioned inputs loosen it, easy ones tighten it.
 *
 * The plain algorithm can be lucky, above all on few elements, so a floor is added that does not depend on it:
 *
 *   u · max|wanted| + 4 · 2^-24 · magnitude
 *
 * The first term is one rounding to the stored type (u = 2^-24 for f32, 2^-11 for f16): of two values either side of
 * a rounding boundary, however close, one may be exact and the other half a unit in the last place away. The second
 * is four f32 roundings at the size of the largest intermediate, `magnitude`, which the caller gives: Σ|a||b| for a
 * dot product (Higham 2002, section 3.1). Four because even the shortest sum rounds its factors, its products, its
 * sum and the scale or bias behind it. It does not grow with the length of sums; their growth must come from the
 * plain error.
 */
import type { Elem } from "../../src/runtime/kernel.ts";
import { roundTo } from "./device.ts";

export interface CloseOptions {
  /** Under which the largest error is listed, the kernel's name. */
  readonly kernel: string;
  readonly elem: Elem;
  /** Type that the result is stored in. */
  readonly stored: Elem;
  /** Largest absolute value of what is added up to one result; a function of the row where rows differ much. */
  readonly magnitude: number | ((row: number) => number);
  /** Elements that are judged together; the whole tensor if absent. Rows of different sizes need it. */
  readonly rowLength?: number;
}

interface Worst {
  error: number;
  plainError: number;
  bound: number;
}

/** For each kernel and type the comparison that came closest to its bound. */
const worst = new Map<string, Worst>();

const UNIT_ROUNDOFF: Readonly<Record<Elem, number>> = { f32: 2 ** -24, f16: 2 ** -11 };

/**
 * Compares a kernel's result with the f64 reference by the rule above.
 * @param plain the plain algorithm's result in f32, not yet rounded to the stored type
 */
export function expectClose(
  got: ArrayLike<number>,
  wanted: ArrayLike<number>,
  plain: ArrayLike<number>,
  options: CloseOptions,
): void {
  if (got.length !== wanted.length || plain.length !== wanted.length) {
    throw new Error(
      `compared ${got.length} values with ${wanted.length} wanted and ${plain.length} plain ones`,
    );
  }
  const length = options.rowLength ?? wanted.length;
  for (let first = 0; first < wanted.length; first += length) {
    judge(got, wanted, plain, first, Math.min(first + length, wanted.length), options);
  }
}

function judge(
  got: ArrayLike<number>,
  wanted: ArrayLike<number>,
  plain: ArrayLike<number>,
  first: number,
  end: number,
  { kernel, elem, stored, magnitude, rowLength }: CloseOptions,
): void {
  let error = 0;
  let index = first;
  let plainError = 0;
  let largest = 0;
  for (let i = first; i < end; i++) {
    const difference = Math.abs(got[i]! - wanted[i]!);
    // Written so that NaN counts as the largest error there is.
    if (!(difference <= error)) {
      error = Number.isNaN(difference) ? Infinity : difference;
      index = i;
    }
    plainError = Math.max(plainError, Math.abs(roundTo(stored, plain[i]!) - wanted[i]!));
    largest = Math.max(largest, Math.abs(wanted[i]!));
  }
  const row = rowLength === undefined ? 0 : first / rowLength;
  const size = typeof magnitude === "number" ? magnitude : magnitude(row);
  const bound = 2 * plainError + UNIT_ROUNDOFF[stored] * largest + 4 * 2 ** -24 * size;
  if (!(error <= bound)) {
    throw new Error(
      `${kernel}, ${elem}: element ${index}${rowLength === undefined ? "" : ` (row ${row})`} is ${
        got[index]
      }, ` +
        `wanted ${
          wanted[index]
        }: off by ${error}, allowed ${bound} (the plain algorithm's worst is ${plainError})`,
    );
  }
  const key = `${kernel} ${elem}`;
  const known = worst.get(key);
  if (bound > 0 && (!known || error * known.bound > known.error * bound)) {
    worst.set(key, { error, plainError, bound });
  }
}

/** Compares exactly, NaN with NaN; for results that are copies or single roundings. */
export function expectSame(got: ArrayLike<number>, wanted: ArrayLike<number>): void {
  if (got.length !== wanted.length) throw new Error(`compared ${got.length} values with ${wanted.length}`);
  for (let i = 0; i < wanted.length; i++) {
    if (got[i] !== wanted[i] && !(Number.isNaN(got[i]) && Number.isNaN(wanted[i]))) {
      throw new Error(`element ${i} is ${got[i]}, wanted exactly ${wanted[i]}`);
    }
  }
}

/** Runs ten times and compares every bit: a race between invocations shows up as a difference sooner or later. */
export async function expectTenIdenticalRuns(run: () => Promise<Float32Array>): Promise<void> {
  const first = new Uint32Array((await run()).slice().buffer);
  for (let n = 2; n <= 10; n++) {
    const again = new Uint32Array((await run()).slice().buffer);
    const index = again.findIndex((bits, i) => bits !== first[i]);
    if (index >= 0) throw new Error(`run ${n} differs from run 1 in element ${index}`);
  }
}

export function maxAbs(values: ArrayLike<number>): number {
  let largest = 0;
  for (let i = 0; i < values.length; i++) largest = Math.max(largest, Math.abs(values[i]!));
  return largest;
}

/**
 * The evidence behind docs/numerics.md: with LONGFORM_TEST_ERRORS set, a test file ends with its kernels' comparisons
 * that came closest to their bounds.
 */
export function reportErrors(): void {
  if (process.env.LONGFORM_TEST_ERRORS) {
    for (const [key, { error, plainError, bound }] of [...worst].sort()) {
      const figures = [error, plainError, bound].map((x) => x.toExponential(2)).join(" | ");
      console.error(`| ${key} | ${figures} | ${(error / bound).toFixed(2)} |`);
    }
  }
  worst.clear();
}
