import { afterAll, describe, expect, test } from "bun:test";
import { combineReference } from "../../src/kernels/flash_decode/reference.ts";
import {
  gemvCandidates,
  layerNormGemv,
  type LayerNormGemvProblem,
  mergeGemv,
  plainGemv,
} from "../../src/kernels/gemv/gemv.ts";
import { layerNormReference } from "../../src/kernels/layer_norm/reference.ts";
import type { Epilogue } from "../../src/kernels/matmul/matmul.ts";
import { MAX_SPLITS, packSequence, splitCount } from "../../src/kernels/shared/shared.ts";
import { openDevice } from "../../src/runtime/device.ts";
import { type Elem, type Op, supports } from "../../src/runtime/kernel.ts";
import { expectClose, expectSame, expectTenIdenticalRuns, maxAbs, reportErrors } from "../support/compare.ts";
import {
  eachElem,
  padRows,
  poison,
  rounded,
  runnable,
  runOp,
  type Tensor,
  tensor,
  testDevice,
  thenNan,
  titleOf,
} from "../support/device.ts";
import {
  epilogues,
  exactMatmul,
  type Inputs,
  matmulMagnitude,
  plainLayerNorm,
  plainMatmul,
  randomWeights,
} from "../support/matmul.ts";
import { normalArray, uniformArray } from "../support/random.ts";

const gpu = await testDevice();

const EPSILON = 1e-5;

type Form = keyof typeof plainGemv;
const forms = Object.keys(plainGemv) as Form[];

type Tensors = Readonly<Record<string, Tensor>>;

/** What the rows of `x` are made from, and what should become of it. */
interface Rows {
  /** Of these, each row of the product has its own part. */
  readonly perRow: Tensors;
  /** These are the same for all. */
  readonly shared: Tensors;
  /** `x` in f64, by plain f32 arithmetic, and the size of what is added up to each of its elements. */
  readonly exact: ArrayLike<number>;
  readonly plain: ArrayLike<number>;
  readonly sizes: ArrayLike<number>;
}

/** Where `x` comes from, with its size: one of the three prologues. */
interface Source {
  /** Columns of `x`, padding included. */
  readonly inner: number;
  candidates(elem: Elem, epilogue: Epilogue, rows: number, unroll: boolean): Op<LayerNormGemvProblem>[];
  rows(elem: Elem, rows: number): Rows;
}

/** A kernel with a variant, and what of the variant the test must know. */
interface Case {
  readonly gemv: Op<LayerNormGemvProblem>;
  readonly elem: Elem;
  readonly epilogue: Epilogue;
}

/** All inputs of a product. */
type Given = Rows & Omit<Inputs, "x">;

function padTo4(width: number): number {
  return 4 * Math.ceil(width / 4);
}

function plainOf(width: number): Source {
  const inner = padTo4(width);
  return {
    inner,
    candidates: (elem, epilogue, rows, unroll) =>
      gemvCandidates(plainGemv, { elem, epilogue, inner }, { inner, rows, unroll }),
    rows(elem, rows) {
      const x = padRows(rounded(normalArray(1, rows * width), elem), width);
      return { perRow: { x: tensor(elem, x) }, shared: {}, exact: x, plain: x, sizes: x };
    },
  };
}

function layerNormOf(width: number, mean = 0.3, deviation = 2): Source {
  const inner = padTo4(width);
  return {
    inner,
    candidates: (elem, epilogue, rows, unroll) =>
      gemvCandidates(layerNormGemv, { elem, epilogue, inner, width }, { inner, rows, unroll }),
    rows(_, rows) {
      const x = rounded(normalArray(1, rows * width, mean, deviation), "f32");
      const gain = rounded(normalArray(5, width, 1, 0.5), "f32");
      const shift = rounded(normalArray(6, width), "f32");
      return {
        perRow: { x: tensor("f32", padRows(x, width)) },
        shared: { gain: tensor("f32", padRows(gain, width)), shift: tensor("f32", padRows(shift, width)) },
        exact: padRows(layerNormReference(x, gain, shift, width, EPSILON), width),
        plain: padRows(plainLayerNorm(x, gain, shift, width, EPSILON), width),
        sizes: padRows(layerNormSizes(x, gain, shift, width), width),
      };
    },
  };
}

/** Intermediates of a row: its values against its deviation, through the gain, and the shift. */
function layerNormSizes(x: Float32Array, gain: Float32Array, shift: Float32Array, width: number) {
  return Float64Array.from(x, (_, i) => {
    const row = x.subarray(i - i % width, i - i % width + width);
    const mean = row.reduce((a, b) => a + b, 0) / width;
    const variance = row.reduce((a, b) => a + (b - mean) ** 2, 0) / width;
    const c = i % width;
    return maxAbs(row) / Math.sqrt(variance + EPSILON) * Math.abs(gain[c]!) + Math.abs(shift[c]!);
  });
}

/** Keys of each row's sequence: in slices they are 2, 31, 1, 32, 32 (of two blocks each), 17 and 1. */
const KV_LENS = [65, 1984, 64, 2048, 4000, 2049, 1];

/** One slice of one head: numerators, their maximum (as a power of two) and the sum of their exponentials. */
interface Slice {
  readonly out: Float32Array;
  readonly m: number;
  readonly l: number;
}

function mergeOf(heads: number, headDim: number, kvLens = KV_LENS, spread = 3): Source {
  const headDim4 = Math.ceil(headDim / 4);
  const inner = 4 * heads * headDim4;
  return {
    inner,
    candidates: (elem, epilogue, rows, unroll) =>
      gemvCandidates(mergeGemv, { elem, epilogue, inner, heads, headDim4 }, { inner, rows, unroll }),
    rows(_, rows) {
      const lens = Array.from({ length: rows }, (_, r) => kvLens[r % kvLens.length]!);
      // Slices that do not exist stay NaN: nobody has written them.
      const partialOut = new Float64Array(rows * MAX_SPLITS * inner).fill(NaN);
      const partialMl = new Float64Array(rows * MAX_SPLITS * heads * 2).fill(NaN);
      const exact: Float64Array[] = [];
      const plain: Float32Array[] = [];
      const sizes: Float64Array[] = [];
      lens.forEach((kvLen, r) => {
        for (let h = 0; h < heads; h++) {
          const slices = randomSlices(r * heads + h, splitCount(kvLen), headDim, spread);
          slices.forEach(({ out, m, l }, s) => {
            const index = (r * MAX_SPLITS + s) * heads + h;
            partialOut.set(padRows(out, headDim), index * 4 * headDim4);
            partialMl.set([m, l], index * 2);
          });
          // The kernel's exponentials are powers of two, the reference's of e.
          const natural = slices.map(({ out, m, l }) => ({
            out: Float64Array.from(out),
            m: m * Math.LN2,
            l,
          }));
          exact.push(padRows(combineReference(natural), headDim));
          sizes.push(
            padRows(combineReference(natural.map((s) => ({ ...s, out: s.out.map(Math.abs) }))), headDim),
          );
          plain.push(Float32Array.from(padRows(plainMerge(slices), headDim)));
        }
      });
      return {
        perRow: {
          partial_out: tensor("f32", partialOut),
          partial_ml: tensor("f32", partialMl),
          sequences: tensor(
            "u32",
            lens.flatMap((kvLen) => [...packSequence({ length: kvLen - 1, step: 7, seed: 9 })]),
          ),
        },
        shared: {},
        exact: exact.flatMap((head) => [...head]),
        plain: plain.flatMap((head) => [...head]),
        sizes: sizes.flatMap((head) => [...head]),
      };
    },
  };
}

/** Slices as keys could give them: sums of at least one, numerators of about that size, maxima `spread` apart. */
function randomSlices(seed: number, count: number, headDim: number, spread: number): Slice[] {
  const maxima = rounded(normalArray(1000 + seed, count, 0, spread), "f32");
  const sums = rounded(uniformArray(2000 + seed, count, 1, 64), "f32");
  const values = normalArray(3000 + seed, count * headDim);
  return Array.from({ length: count }, (_, s) => ({
    out: rounded(values.subarray(s * headDim, (s + 1) * headDim).map((v) => v * sums[s]!), "f32"),
    m: maxima[s]!,
    l: sums[s]!,
  }));
}

/** The merge with running f32 sums over the slices in order. */
function plainMerge(slices: readonly Slice[]): Float32Array {
  const { fround } = Math;
  const max = Math.max(...slices.map(({ m }) => m));
  const sums = new Float32Array(slices[0]!.out.length);
  let total = 0;
  for (const { out, m, l } of slices) {
    const weight = fround(2 ** fround(m - max));
    total = fround(total + fround(weight * l));
    for (let d = 0; d < sums.length; d++) sums[d] = sums[d]! + fround(weight * out[d]!);
  }
  return sums.map((sum) => sum / total);
}

/** Random inputs; the rows of `w` that meet padding columns of `x` hold numbers, which must not matter. */
function inputs(source: Source, elem: Elem, rows: number, columns: number): Given {
  const size = { rows, inner: source.inner, columns };
  return { ...size, ...source.rows(elem, rows), ...randomWeights(elem, size) };
}

function mapTensors(tensors: Tensors, change: (t: Tensor) => ArrayLike<number>): Tensors {
  return Object.fromEntries(Object.entries(tensors).map(([name, t]) => [name, tensor(t.stored, change(t))]));
}

async function runGemv({ gemv, elem, epilogue }: Case, given: Given): Promise<Float32Array> {
  const { rows, inner, columns, perRow, shared } = given;
  const { out } = await runOp(gpu, gemv, { rows, inner, columns, epsilon: EPSILON }, {
    ...mapTensors(perRow, ({ data }) => thenNan(data, data.length / rows)),
    ...mapTensors(shared, ({ data }) => thenNan(data, 64)),
    w: tensor(elem, thenNan(given.w, 16 * columns)),
    bias: tensor("f32", thenNan(given.bias, 64)),
    out: epilogue === "residual" ? tensor("f32", given.before) : poison(elem, rows * columns),
  });
  return out!;
}

async function checkGemv(c: Case, given: Given, hard = ""): Promise<void> {
  const { elem, epilogue } = c;
  const { exact, plain, sizes } = given;
  expectClose(
    await runGemv(c, given),
    exactMatmul({ ...given, x: exact }, epilogue),
    plainMatmul({ ...given, x: plain }, epilogue),
    {
      kernel: `${c.gemv.kernel.name} ${epilogue}${hard}`,
      elem,
      stored: epilogue === "residual" ? "f32" : elem,
      magnitude: matmulMagnitude({ ...given, x: sizes }, epilogue),
    },
  );
}

/** What the device runs of one form, each variant once, for each number of rows that a model could be loaded for. */
function cases(
  source: Source,
  form: Form,
  elem: Elem,
  epilogue: Epilogue,
  loadedFor: readonly number[] = [1, 2, 3, 4, 8],
): Case[] {
  const ops = loadedFor.flatMap((rows) =>
    [true, false].flatMap((unroll) => source.candidates(elem, epilogue, rows, unroll))
  ).filter(({ kernel }) => kernel.name.endsWith(`_${form}`));
  const distinct = new Map(runnable(gpu, ops).map((gemv) => [titleOf(gemv), gemv]));
  return [...distinct.values()].map((gemv) => ({ gemv, elem, epilogue }));
}

/** Named as the kernels; each with every number of columns that is tested, the smallest first. */
const SOURCES: Readonly<Record<string, readonly Source[]>> = {
  plain: [18, 1, 12, 64, 100, 192, 260, 768, 3072].map((width) => plainOf(width)),
  layer_norm: [18, 1, 11, 64, 97, 192, 260, 768, 3072].map((width) => layerNormOf(width)),
  merge: ([[3, 6], [1, 4], [3, 4], [1, 64], [3, 8], [5, 20], [3, 64], [5, 50], [12, 64], [48, 64]] as const)
    .map(([heads, headDim]) => mergeOf(heads, headDim)),
};

/** Defines a test for each kernel and form; one that the device cannot run at all shows as skipped. */
function eachKernel(
  elem: Elem,
  title: string,
  check: (form: Form, sources: readonly Source[]) => Promise<void>,
  names = Object.keys(SOURCES),
): void {
  for (const name of names) {
    for (const form of forms) {
      const sources = SOURCES[name]!;
      const [first] = sources[0]!.candidates(elem, "bias", 1, form !== "software")
        .filter(({ kernel }) => kernel.name.endsWith(`_${form}`));
      const verdict = supports(first!.kernel, first!.variant, gpu.caps);
      const full = `${first!.kernel.name} ${elem} ${title}`;
      test.skipIf(verdict !== true)(
        verdict === true ? full : `${full}: ${verdict}`,
        () => check(form, sources),
      );
    }
  }
}

describe("gemv", () => {
  afterAll(reportErrors);
  eachElem(gpu, (elem) => {
    for (const epilogue of epilogues) {
      eachKernel(elem, `${epilogue} matches the f64 reference at awkward sizes`, async (form, [source]) => {
        for (const c of cases(source!, form, elem, epilogue)) {
          for (const rows of [1, 2, 3, 7, 8, 9, 17, 32]) await checkGemv(c, inputs(source!, elem, rows, 68));
          for (const columns of [4, 12, 60, 132]) await checkGemv(c, inputs(source!, elem, 3, columns));
        }
      });
    }

    eachKernel(elem, "sums of every length match the f64 reference", async (form, sources) => {
      for (const source of sources) {
        for (const c of cases(source, form, elem, "bias", [1, 4])) {
          await checkGemv(c, inputs(source, elem, 3, 20));
        }
      }
    });

    eachKernel(elem, "a row of a batch has the bits that it has alone", async (form, sources) => {
      for (const source of [sources[0]!, sources.find(({ inner }) => inner === 768)!]) {
        for (const c of cases(source, form, elem, "residual")) {
          const given = inputs(source, elem, 9, 20);
          const together = await runGemv(c, given);
          for (let r = 0; r < given.rows; r++) {
            const part = <T>(all: { slice(from: number, to: number): T; length: number }) =>
              all.slice(r * all.length / given.rows, (r + 1) * all.length / given.rows);
            const alone = await runGemv(c, {
              ...given,
              rows: 1,
              perRow: mapTensors(given.perRow, ({ data }) => part(Float64Array.from(data))),
              before: part(given.before),
            });
            expectSame(part(together), alone);
          }
        }
      }
    });

    eachKernel(elem, "a row of NaN leaves the others as they are", async (form, [source]) => {
      const rows = 9;
      for (const c of cases(source!, form, elem, "bias")) {
        const given = inputs(source!, elem, rows, 20);
        const wanted = await runGemv(c, given);
        const isSpoiled = (i: number, length: number) => Math.floor(i * rows / length) % 2 === 0;
        const perRow = mapTensors(given.perRow, ({ stored, data }) =>
          Float64Array.from(
            data,
            (value, i) => stored !== "u32" && isSpoiled(i, data.length) ? NaN : value,
          ));
        const got = await runGemv(c, { ...given, perRow });
        expectSame(got, wanted.map((value, i) => isSpoiled(i, wanted.length) ? NaN : value));
      }
    });

    eachKernel(elem, "a mean far above the spread does not cancel", async (form) => {
      for (const [mean, deviation] of [[1e3, 1], [-1e4, 0.5], [3e5, 10]] as const) {
        const source = layerNormOf(768, mean, deviation);
        for (const c of cases(source, form, elem, "bias", [1, 4])) {
          await checkGemv(c, inputs(source, elem, 3, 20), ", large mean");
        }
      }
    }, ["layer_norm"]);

    eachKernel(elem, "slices of equal and of very different maxima match", async (form) => {
      for (const spread of [0, 30, 1000, 1e30]) {
        const source = mergeOf(3, 8, KV_LENS, spread);
        for (const c of cases(source, form, elem, "bias", [1, 8])) {
          await checkGemv(c, inputs(source, elem, 7, 20), ", large scores");
        }
      }
    }, ["merge"]);

    eachKernel(elem, "every number of slices matches", async (form) => {
      const wholeBlocks = Array.from({ length: MAX_SPLITS }, (_, i) => 64 * (i + 1));
      const source = mergeOf(3, 8, [...wholeBlocks, 2049, 4096, 4097, 100_000]);
      for (const c of cases(source, form, elem, "bias", [1, 8])) {
        await checkGemv(c, inputs(source, elem, 36, 20));
      }
    }, ["merge"]);

    eachKernel(elem, "ten runs are bit-identical", async (form, sources) => {
      const source = sources.at(-1)!;
      for (const c of cases(source, form, elem, "residual", [1, 4])) {
        const given = inputs(source, elem, 4, 20);
        await expectTenIdenticalRuns(() => runGemv(c, given));
      }
    });
  });
});
