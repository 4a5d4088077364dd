import { afterAll, describe, test } from "bun:test";
import { layerNorm } from "../../src/kernels/layer_norm/layer_norm.ts";
import { layerNormReference } from "../../src/kernels/layer_norm/reference.ts";
import { GRID_FOLD } from "../../src/kernels/shared/shared.ts";
import { type Elem, op } from "../../src/runtime/kernel.ts";
import { expectClose, expectSame, expectTenIdenticalRuns, maxAbs, reportErrors } from "../support/compare.ts";
import { eachElem, padRows, poison, rounded, runOp, tensor, testDevice, thenNan } from "../support/device.ts";
import { plainLayerNorm } from "../support/matmul.ts";
import { normalArray } from "../support/random.ts";

const gpu = await testDevice();

const EPSILON = 1e-5;

interface Case {
  readonly elem: Elem;
  readonly width: number;
  readonly rows: number;
  readonly firstRow?: number;
  readonly mean?: number;
  readonly deviation?: number;
}

function inputs({ width, rows, mean = 0.3, deviation = 2 }: Case) {
  return {
    x: rounded(normalArray(1, rows * width, mean, deviation), "f32"),
    gain: rounded(normalArray(2, width, 1, 0.5), "f32"),
    shift: rounded(normalArray(3, width), "f32"),
  };
}

async function runLayerNorm(c: Case, { x, gain, shift } = inputs(c)): Promise<Float32Array> {
  const { elem, width, rows, firstRow = 0 } = c;
  const stride = 4 * Math.ceil(width / 4);
  const before = new Float64Array(firstRow * stride).fill(NaN);
  const { out } = await runOp(gpu, op(layerNorm, { outElem: elem, width }), {
    rows,
    firstRow,
    epsilon: EPSILON,
  }, {
    x: tensor("f32", thenNan([...before, ...padRows(x, width)], stride)),
    gain: tensor("f32", padRows(gain, width)),
    shift: tensor("f32", padRows(shift, width)),
    out: poison(elem, rows * stride),
  });
  return out!;
}

/** Intermediates of a row: its values against its deviation, through the gain, and the shift. */
function magnitudes(c: Case, { x, gain, shift }: ReturnType<typeof inputs>): (row: number) => number {
  return (row) => {
    const values = x.subarray(row * c.width, (row + 1) * c.width);
    const mean = values.reduce((a, b) => a + b, 0) / c.width;
    const variance = values.reduce((a, b) => a + (b - mean) ** 2, 0) / c.width;
    return maxAbs(values) / Math.sqrt(variance + EPSILON) * maxAbs(gain) + maxAbs(shift);
  };
}

async function checkLayerNorm(c: Case, given = inputs(c)): Promise<void> {
  const { elem, width } = c;
  const { x, gain, shift } = given;
  const got = await runLayerNorm(c, given);
  const wanted = padRows(layerNormReference(x, gain, shift, width, EPSILON), width);
  const plain = padRows(plainLayerNorm(x, gain, shift, width, EPSILON), width);
  expectClose(got, wanted, plain, {
    kernel: "layer_norm",
    elem,
    stored: elem,
    magnitude: magnitudes(c, given),
    rowLength: 4 * Math.ceil(width / 4),
  });
}

describe("layer_norm", () => {
  afterAll(reportErrors);
  eachElem(gpu, (elem) => {
    for (const rows of [1, 63, 64, 65, 97, 257, 1025]) {
      test(`${elem} rows=${rows} matches the f64 reference`, () => checkLayerNorm({ elem, width: 10, rows }));
    }
    for (const width of [1, 4, 63, 192, 257, 768, 1025]) {
      test(`${elem} width=${width} matches the f64 reference, padding is zero`, async () => {
        await checkLayerNorm({ elem, width, rows: 9 });
        const out = await runLayerNorm({ elem, width, rows: 2 });
        const stride = out.length / 2;
        expectSame(out.subarray(width, stride), new Float32Array(stride - width));
      });
    }
    test(`${elem} a mean far above the spread does not cancel`, async () => {
      for (const [mean, deviation] of [[1e3, 1], [-1e4, 0.5], [3e5, 10]] as const) {
        await checkLayerNorm({ elem, width: 768, rows: 9, mean, deviation });
      }
    });
    test(`${elem} tiny, huge and outlying values match the f64 reference`, async () => {
      const c = { elem, width: 192, rows: 9 };
      await checkLayerNorm({ ...c, mean: 0, deviation: 1e-6 });
      await checkLayerNorm({ ...c, mean: 0, deviation: 1e12 });
      const outlying = inputs(c);
      for (let row = 0; row < c.rows; row++) outlying.x[row * c.width + 31 * row % c.width] = 3000;
      await checkLayerNorm(c, outlying);
    });
    test(`${elem} a row of zeros gives the shift`, async () => {
      const c = { elem, width: 192, rows: 3 };
      const given = inputs(c);
      given.x.fill(0);
      const out = await runLayerNorm(c, given);
      for (let row = 0; row < 3; row++) {
        expectSame(out.subarray(row * 192, (row + 1) * 192), rounded(given.shift, elem));
      }
    });
    test(`${elem} rows before firstRow are not read`, () =>
      checkLayerNorm({ elem, width: 10, rows: 5, firstRow: 64 }));
    for (const rows of [GRID_FOLD, GRID_FOLD + 1, 2 * GRID_FOLD + 1]) {
      test(`${elem} rows=${rows} matches the f64 reference, over a folded grid`, () =>
        checkLayerNorm({ elem, width: 4, rows }));
    }
    test(`${elem} ten runs are bit-identical`, () =>
      expectTenIdenticalRuns(() => runLayerNorm({ elem, width: 768, rows: 65 })));
  });
});
