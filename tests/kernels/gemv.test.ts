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
import {
  KV_BLOCK,
  MAX_SPLITS,
  mostSplits,
  packSequence,
  splitCount,
} from "../../src/kernels/shared/shared.ts";
import { type Capabilities, openDevice } from "../../src/runtime/device.ts";
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
/** Validates everything and runs nothing, with the limits that every device has. */
const nullGpu = await openDevice({ nullBackend: true });

const EPSILON = 1e-5;

type Form = keyof typeof plainGemv;
const forms = Object.keys(plainGemv) as Form[];

type Tensors = Readonly<Record<string, Tensor>>;

/** What the rows of `x` are made from, and what they should be. */
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

/** A prologue with the size of its `x`. */
interface Source {
  /** Columns of `x`, padding included. */
  readonly inner: number;
  /** @param sequences how many rows a model would be loaded for */
  candidates(elem: Elem, epilogue: Epilogue, sequences: number, unroll: boolean): Op<LayerNormGemvProblem>[];
  rows(elem: Elem, rows: number, sequences: number): Rows;
}

/** What is multiplied, and by which variants. */
interface Setup {
  readonly source: Source;
  readonly elem: Elem;
  readonly epilogue: Epilogue;
  readonly sequences: number;
}

interface Case extends Setup {
  readonly gemv: Op<LayerNormGemvProblem>;
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
      gemvCandidates(plainGemv, { elem, epilogue, inner }, { rows, unroll }),
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
      gemvCandidates(layerNormGemv, { elem, epilogue, inner, width }, { rows, unroll }),
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

/** Intermediates of each element: the row's values against its deviation, through the gain, and the shift. */
function layerNormSizes(x: Float32Array, gain: Float32Array, shift: Float32Array, width: number) {
  const out = new Float64Array(x.length);
  for (let base = 0; base < x.length; base += width) {
    const row = x.subarray(base, base + width);
    const mean = row.reduce((a, b) => a + b, 0) / width;
    const variance = row.reduce((a, b) => a + (b - mean) ** 2, 0) / width;
    const largest = maxAbs(row) / Math.sqrt(variance + EPSILON);
    for (let c = 0; c < width; c++) out[base + c] = largest * Math.abs(gain[c]!) + Math.abs(shift[c]!);
  }
  return out;
}

/**
 * Blocks that each row's token attends to: where there may be 32 slices they are 2, 31, 1, 32, 32 (of two blocks each), 17,
 * none, whose row is zeros, then any number.
 */
const KEPT_BLOCKS = [
  ...[2, 31, 1, 32, 63, 33, 0],
  ...Array.from({ length: MAX_SPLITS }, (_, i) => MAX_SPLITS - i),
];

/** How far the maxima of a row's slices are apart: equal, or so far that only one counts, and between. */
const SPREADS = [3, 0, 30, 1000];

/** One slice of one head: numerators, their maximum (as a power of two) and the sum of their exponentials. */
interface Slice {
  readonly out: Float32Array;
  readonly m: number;
  readonly l: number;
}

function mergeOf(heads: number, headDim: number): Source {
  const headDim4 = Math.ceil(headDim / 4);
  const inner = 4 * heads * headDim4;
  return {
    inner,
    candidates(elem, epilogue, rows, unroll) {
      const own = { elem, epilogue, inner, heads, headDim4, maxSplits: mostSplits(rows) };
      return gemvCandidates(mergeGemv, own, { rows, unroll });
    },
    rows(_, rows, sequences) {
      const maxSplits = mostSplits(sequences);
      const kept = Array.from({ length: rows }, (_, r) => KEPT_BLOCKS[r % KEPT_BLOCKS.length]!);
      // Of slices that do not exist only the sum is written: 0; and zeros in the first of a row that has none.
      const partialOut = new Float64Array(rows * maxSplits * inner).fill(NaN);
      const partialMl = new Float64Array(rows * maxSplits * heads * 2).map((_, i) => i % 2 ? 0 : -3e38);
      const x = { exact: [] as number[], plain: [] as number[], sizes: [] as number[] };
      kept.forEach((blocks, r) => {
        for (let h = 0; h < heads; h++) {
          const count = splitCount(blocks, maxSplits);
          if (count === 0) {
            const zeros = new Array<number>(4 * headDim4).fill(0);
            partialOut.set(zeros, (r * maxSplits * heads + h) * 4 * headDim4);
            for (const rows of Object.values(x)) rows.push(...zeros);
            continue;
          }
          const slices = randomSlices(r * heads + h, count, headDim, SPREADS[r % 4]!);
          slices.forEach(({ out, m, l }, s) => {
            const index = (r * maxSplits + s) * heads + h;
            partialOut.set(padRows(out, headDim), index * 4 * headDim4);
            partialMl.set([m, l], index * 2);
          });
          // The kernel's exponentials are powers of two, the reference's of e.
          const parts = slices.map(({ out, m, l }) => ({ out: Float64Array.from(out), m: m * Math.LN2, l }));
          const absolute = parts.map((part) => ({ ...part, out: part.out.map(Math.abs) }));
          x.exact.push(...padRows(combineReference(parts), headDim));
          x.plain.push(...padRows(plainMerge(slices), headDim));
          x.sizes.push(...padRows(combineReference(absolute), headDim));
        }
      });
      // Of a row that attends to fewer blocks than it has, too.
      const states = kept.flatMap((blocks, r) => [
        ...packSequence({ length: KV_BLOCK * (blocks + (r % 2 ? 9 : 0)), step: 7, seed: 9 }),
      ]);
      return {
        perRow: {
          partial_out: tensor("f32", partialOut),
          partial_ml: tensor("f32", partialMl),
          sequences: tensor("u32", states),
        },
        shared: {},
        ...x,
      };
    },
  };
}

/** Slices as keys could give them: sums of at least one, numerators of about that size. */
function randomSlices(seed: number, count: number, headDim: number, spread: number): Slice[] {
  const maxima = rounded(normalArray(1000 + seed, count, 0, spread), "f32");
  const sums = rounded(uniformArray(2000 + seed, count, 1, 64), "f32");
  const values = normalArray(3000 + seed, count * headDim);
  return Array.from({ length: count }, (_, s) => ({
    out: rounded(values.subarray(s * headDim, (s + 1) * headDim).map((value) => value * sums[s]!), "f32"),
    m: maxima[s]!,
    l: sums[s]!,
  }));
}

/** The merge with running f32 sums over the slices in order. */
function plainMerge(slices: readonly Slice[]): Float32Array {
  const { fround } = Math;
  const top = Math.max(...slices.map(({ m }) => m));
  const sums = new Float32Array(slices[0]!.out.length);
  let total = 0;
  for (const { out, m, l } of slices) {
    const weight = fround(2 ** fround(m - top));
    total = fround(total + fround(weight * l));
    for (let d = 0; d < sums.length; d++) sums[d] = sums[d]! + fround(weight * out[d]!);
  }
  return sums.map((sum) => sum / total);
}

/** Random inputs; the rows of `w` that meet padding columns of `x` hold numbers, which must not matter. */
function inputs({ source, elem, sequences }: Setup, rows: number, columns: number): Given {
  const size = { rows, inner: source.inner, columns };
  return { ...size, ...source.rows(elem, rows, sequences), ...randomWeights(elem, size) };
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

async function checkGemv(
  c: Case,
  given: Given,
  kernel = `${c.gemv.kernel.name} ${c.epilogue}`,
): Promise<void> {
  const { elem, epilogue } = c;
  const { exact, plain, sizes } = given;
  expectClose(
    await runGemv(c, given),
    exactMatmul({ ...given, x: exact }, epilogue),
    plainMatmul({ ...given, x: plain }, epilogue),
    {
      kernel,
      elem,
      stored: epilogue === "residual" ? "f32" : elem,
      magnitude: matmulMagnitude({ ...given, x: sizes }, epilogue),
    },
  );
}

/** Prologues by the name of their kernels, with `x` of the same widths, but for padding, in the same order. */
const SOURCES = {
  plain: [18, 1, 12, 64, 98, 192, 260, 768, 3072].map((width) => plainOf(width)),
  layer_norm: [18, 1, 11, 64, 97, 192, 257, 768, 3072].map((width) => layerNormOf(width)),
  merge: [[5, 3], [1, 1], [3, 4], [1, 64], [5, 20], [3, 64], [5, 50], [12, 64], [48, 64]]
    .map(([heads, headDim]) => mergeOf(heads!, headDim!)),
} as const;
const INNER = [20, 4, 12, 64, 100, 192, 260, 768, 3072];

/**
 * Software Vulkan takes seconds to compile each variant, so there every epilogue is tested with one size and one number of
 * rows, others for each type, and fewer in the forms that it does not prefer. Other devices get each epilogue with all
 * numbers of rows, and all sizes.
 */
function setups(sources: readonly Source[], form: Form, elem: Elem): Setup[] {
  const setup = (inner: number, epilogue: Epilogue, sequences: number): Setup => ({
    source: sources[INNER.indexOf(inner)]!,
    elem,
    epilogue,
    sequences,
  });
  if (gpu.caps.isSoftware && form === "software") {
    return elem === "f32"
      ? [setup(768, "bias", 1), setup(260, "bias_gelu", 4), setup(100, "residual", 32)]
      : [setup(3072, "bias", 2), setup(20, "bias_gelu", 32), setup(4, "residual", 1)];
  }
  if (gpu.caps.isSoftware) {
    return elem === "f32" ? [setup(768, "bias", 1), setup(260, "bias_gelu", 4)] : [setup(20, "residual", 32)];
  }
  return [
    ...epilogues.flatMap((epilogue) => [1, 2, 3, 8, 9, 32].map((rows) => setup(20, epilogue, rows))),
    ...INNER.flatMap((inner) => [1, 4].map((rows) => setup(inner, "bias", rows))),
  ];
}

/** Candidates of one form, whether the device runs them or not. */
function candidatesOf(form: Form, { source, elem, epilogue, sequences }: Setup): Op<LayerNormGemvProblem>[] {
  return [true, false]
    .flatMap((unroll) => source.candidates(elem, epilogue, sequences, unroll))
    .filter(({ kernel }) => kernel.name.endsWith(`_${form}`));
}

/** What the device runs of one form, each variant once; on software only the preferred one. */
function cases(form: Form, setup: Setup): Case[] {
  const ops = new Map(runnable(gpu, candidatesOf(form, setup)).map((gemv) => [titleOf(gemv), gemv]));
  expect(ops.size).toBeGreaterThan(0);
  return [...ops.values()].slice(0, gpu.caps.isSoftware ? 1 : ops.size).map((gemv) => ({ ...setup, gemv }));
}

/** Why the device runs no kernel of a form, if it does not. */
function whyNot(form: Form): string | undefined {
  const smallest = { source: SOURCES.plain[0]!, elem: "f32", epilogue: "bias", sequences: 1 } as const;
  const { kernel, variant } = candidatesOf(form, smallest).at(-1)!;
  const verdict = supports(kernel, variant, gpu.caps);
  return verdict === true ? undefined : verdict;
}

/** Defines a test of each kernel that the device runs, of those of one prologue if it is named. */
function eachKernel(
  elem: Elem,
  title: string,
  check: (c: Case) => Promise<void>,
  only?: keyof typeof SOURCES,
  isMeant: (setup: Setup) => boolean = () => true,
): void {
  for (const [name, sources] of Object.entries(SOURCES)) {
    if (only !== undefined && name !== only) continue;
    for (const form of forms) {
      const chosen = setups(sources, form, elem).filter(isMeant);
      if (chosen.length === 0 || whyNot(form) !== undefined) continue;
      test(`gemv/${name}_${form} ${elem} ${title}`, async () => {
        for (const setup of chosen) for (const c of cases(form, setup)) await check(c);
      });
    }
  }
}

const isLong = ({ source }: Setup) => source.inner >= 768;

describe("gemv", () => {
  afterAll(reportErrors);
  for (const form of forms) {
    const reason = whyNot(form);
    if (reason !== undefined) test.skip(`the ${form} form: ${reason}`, () => {});
  }
  eachElem(gpu, (elem) => {
    eachKernel(elem, "matches the f64 reference at awkward sizes", async (c) => {
      for (const rows of isLong(c) ? [1, 9] : [1, 2, 3, 7, 8, 9, 17, 32]) {
        await checkGemv(c, inputs(c, rows, 20));
      }
      for (const columns of isLong(c) ? [68] : [4, 12, 60, 68, 132]) {
        await checkGemv(c, inputs(c, 3, columns));
      }
    });

    eachKernel(elem, "gives a row of a batch the bits that it has alone", async (c) => {
      const given = inputs(c, 9, 20);
      const together = await runGemv(c, given);
      for (let r = 0; r < given.rows; r++) {
        const ownPart = <T>(all: { slice(from: number, to: number): T; readonly length: number }) =>
          all.slice(r * all.length / given.rows, (r + 1) * all.length / given.rows);
        const alone = await runGemv(c, {
          ...given,
          rows: 1,
          perRow: mapTensors(given.perRow, ({ data }) => ownPart(Float64Array.from(data))),
          before: ownPart(given.before),
        });
        expectSame(ownPart(together), alone);
      }
    });

    eachKernel(elem, "keeps NaN to the rows that have it", async (c) => {
      const given = inputs(c, 9, 20);
      const wanted = await runGemv(c, given);
      const spoil = (all: ArrayLike<number>) =>
        Float64Array.from(all, (value, i) => Math.floor(i * given.rows / all.length) % 2 === 0 ? NaN : value);
      const perRow = mapTensors(given.perRow, ({ stored, data }) => stored === "u32" ? data : spoil(data));
      expectSame(await runGemv(c, { ...given, perRow }), spoil(wanted));
    });

    eachKernel(
      elem,
      "does not cancel where the mean is far above the spread",
      async (c) => {
        for (const [mean, deviation] of [[1e3, 1], [-1e4, 0.5], [3e5, 10]] as const) {
          const given = inputs({ ...c, source: layerNormOf(c.source.inner, mean, deviation) }, 3, 20);
          await checkGemv(c, given, `${c.gemv.kernel.name}, large mean`);
        }
      },
      "layer_norm",
      isLong,
    );

    eachKernel(elem, "gives identical bits in ten runs", async (c) => {
      const given = inputs(c, 9, 20);
      await expectTenIdenticalRuns(() => runGemv(c, given));
    });
  });
});

describe("gemv's candidates on the null backend", () => {
  const MODELS = [
    { width: 1, heads: 1, headDim: 1 },
    { width: 30, heads: 5, headDim: 6 },
    { width: 512, heads: 1, headDim: 512 },
    { width: 768, heads: 12, headDim: 64 },
    { width: 1600, heads: 25, headDim: 64 },
  ];
  const TYPES = [["f32", "bias_gelu"], ["f16", "bias"], ["f16", "residual"]] as const;
  const withSubgroups = (lanes: number): Capabilities => ({
    ...nullGpu.caps,
    subgroupMinSize: lanes,
    subgroupMaxSize: lanes,
  });
  for (const { width, heads, headDim } of MODELS) {
    for (const source of [layerNormOf(width), mergeOf(heads, headDim), plainOf(4 * padTo4(width))]) {
      const [first] = source.candidates("f32", "bias", 1, true);
      const family = first!.kernel.name.replace(/_subgroup$/, "");
      test(`${family} of ${source.inner}: what supports() accepts compiles, what it refuses does not`, async () => {
        const problems: string[] = [];
        const check = async ({ kernel, variant }: Op<LayerNormGemvProblem>) => {
          // Compiling does not depend on the lanes of the device's subgroups, so they are what the variant needs.
          const lanes = kernel.header(variant).subgroup ?? 0;
          const verdict = supports(kernel, variant, withSubgroups(lanes));
          const error = await nullGpu.pipelines.prepare(kernel, variant).then(
            () => undefined,
            (e: unknown) => e,
          );
          if ((verdict === true) === (error === undefined)) return;
          problems.push(`${JSON.stringify(variant)}: supports() says ${verdict}, compiling says ${error}`);
        };
        for (const [elem, epilogue] of TYPES) {
          for (const sequences of [1, 2, 3, 8, 9, 32]) {
            for (const unroll of [true, false]) {
              const ops = source.candidates(elem, epilogue, sequences, unroll);
              await Promise.all(ops.map(check));
              const plainest = withSubgroups(0);
              const fitting = ops.filter((o) => supports(o.kernel, o.variant, plainest) === true);
              expect(fitting.length).toBeGreaterThan(0);
            }
          }
        }
        expect(problems).toEqual([]);
      });
    }
  }
});
