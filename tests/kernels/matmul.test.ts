import { afterAll, describe, expect, test } from "bun:test";
import {
  type Epilogue,
  matmulCandidates,
  type MatmulProblem,
  subgroupMatrixMatmul,
  subgroupMatrixVariant,
} from "../../src/kernels/matmul/matmul.ts";
import { geluNewReference } from "../../src/kernels/matmul/reference.ts";
import { type Elem, type Op, op, supports } from "../../src/runtime/kernel.ts";
import { expectClose, expectSame, expectTenIdenticalRuns, reportErrors } from "../support/compare.ts";
import {
  eachElem,
  poison,
  rounded,
  runnable,
  runOp,
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
  plainMatmul,
  randomWeights,
} from "../support/matmul.ts";
import { normalArray } from "../support/random.ts";

const gpu = await testDevice();

/** A kernel with a variant, and what of the variant the test must know. */
interface Case {
  readonly matmul: Op<MatmulProblem>;
  readonly elem: Elem;
  readonly epilogue: Epilogue;
}

function inputs(elem: Elem, size: MatmulProblem) {
  const x = rounded(normalArray(1, size.rows * size.inner), elem);
  return { ...size, x, ...randomWeights(elem, size) };
}

async function runMatmul({ matmul, elem, epilogue }: Case, given: Inputs): Promise<Float32Array> {
  const { rows, inner, columns } = given;
  const { out } = await runOp(gpu, matmul, { rows, inner, columns }, {
    x: tensor(elem, thenNan(given.x, 4 * inner)),
    w: tensor(elem, thenNan(given.w, 16 * columns)),
    bias: tensor("f32", thenNan(given.bias, 64)),
    out: epilogue === "residual" ? tensor("f32", given.before) : poison(elem, rows * columns),
  });
  return out!;
}

async function checkMatmul(c: Case, given: Inputs): Promise<void> {
  const { elem, epilogue } = c;
  expectClose(await runMatmul(c, given), exactMatmul(given, epilogue), plainMatmul(given, epilogue), {
    kernel: `${c.matmul.kernel.name} ${epilogue}`,
    elem,
    stored: epilogue === "residual" ? "f32" : elem,
    magnitude: matmulMagnitude(given, epilogue),
  });
}

/** What the device runs. */
function cases(elem: Elem, epilogue: Epilogue, unroll: boolean): Case[] {
  const ops = runnable(gpu, matmulCandidates(elem, epilogue, unroll, false));
  return ops.map((matmul) => ({ matmul, elem, epilogue }));
}

/** Around the tiles' edges in the inner dimension (16) and across (32 and 64 columns). */
const INNER_COLUMNS = [[4, 4], [12, 60], [16, 64], [20, 68], [100, 132], [260, 28]] as const;

describe("matmul", () => {
  afterAll(reportErrors);
  eachElem(gpu, (elem) => {
    for (const epilogue of epilogues) {
      for (const c of [false, true].flatMap((unroll) => cases(elem, epilogue, unroll))) {
        test(`${titleOf(c.matmul)} matches the f64 reference at awkward sizes`, async () => {
          for (const rows of [1, 7, 8, 9, 17, 63, 64, 65, 97, 257]) {
            await checkMatmul(c, inputs(elem, { rows, inner: 20, columns: 68 }));
          }
          for (const [inner, columns] of INNER_COLUMNS) {
            await checkMatmul(c, inputs(elem, { rows: 33, inner, columns }));
          }
        });
      }
    }

    for (const epilogue of epilogues) {
      const matrix = op(subgroupMatrixMatmul, subgroupMatrixVariant(epilogue));
      if (elem !== "f16") continue;
      const verdict = supports(matrix.kernel, matrix.variant, gpu.caps);
      const c: Case = { matmul: matrix, elem, epilogue };
      const title = `${titleOf(matrix)} matches the f64 reference at awkward sizes`;
      test.skipIf(verdict !== true)(verdict === true ? title : `${title}: ${verdict}`, async () => {
        for (const rows of [1, 33, 63, 64, 65, 127, 128, 129, 257]) {
          await checkMatmul(c, inputs(elem, { rows, inner: 96, columns: 72 }));
        }
        for (const [inner, columns] of [[32, 8], [32, 64], [64, 136], [160, 128], [768, 264]] as const) {
          await checkMatmul(c, inputs(elem, { rows: 65, inner, columns }));
        }
        const large = inputs(elem, { rows: 130, inner: 3072, columns: 136 });
        await checkMatmul(c, large);
        await expectTenIdenticalRuns(() => runMatmul(c, large));
      });
    }

    test(`${elem} sums of 3072 and 1025 rows match the f64 reference`, async () => {
      for (const c of cases(elem, "bias", false)) {
        await checkMatmul(c, inputs(elem, { rows: 5, inner: 3072, columns: 68 }));
        await checkMatmul(c, inputs(elem, { rows: 1025, inner: 64, columns: 20 }));
      }
    });

    test(`${elem} sums that cancel match the f64 reference`, async () => {
      for (const c of cases(elem, "bias", false)) {
        const given = inputs(elem, { rows: 33, inner: 128, columns: 64 });
        // The second half of every sum is the negated first half, so only the bias is left.
        given.x.forEach((value, i) => {
          if (i % 128 < 64) given.x[i + 64] = -value;
        });
        given.w.copyWithin(64 * 64, 0, 64 * 64);
        await checkMatmul(c, given);
      }
    });

    test(`${elem} gelu of huge and tiny values is finite and right`, async () => {
      const sizes = [0, 1e-20, 1e-7, 1e-3, 0.5, 1, 3, 5, 8, 10, 13, 20, 100, 1e4, 6e4];
      if (elem === "f32") sizes.push(1e6, 1e9, 1e12);
      const bias = Float32Array.from(sizes.flatMap((x) => [x, -x, 0, 0]));
      const columns = bias.length;
      const zeros = { x: new Float32Array(4), w: new Float32Array(4 * columns), before: new Float32Array(0) };
      const given = { rows: 1, inner: 4, columns, bias, ...zeros };
      const plain = plainMatmul(given, "bias_gelu");
      for (const c of cases(elem, "bias_gelu", false)) {
        const got = await runMatmul(c, given);
        bias.forEach((value, i) => {
          expect(Number.isFinite(got[i])).toBe(true);
          expectClose([got[i]!], [geluNewReference(value)], [plain[i]!], {
            kernel: "gelu",
            elem,
            stored: elem,
            magnitude: Math.abs(value),
          });
        });
      }
    });

    test(`${elem} all kernels give the same bits`, async () => {
      for (const epilogue of epilogues) {
        const given = inputs(elem, { rows: 97, inner: 100, columns: 132 });
        const [first, ...others] = cases(elem, epilogue, false);
        const wanted = await runMatmul(first!, given);
        for (const other of others) expectSame(await runMatmul(other, given), wanted);
      }
    });

    test(`${elem} ten runs are bit-identical`, async () => {
      for (const c of cases(elem, "residual", false)) {
        const given = inputs(elem, { rows: 257, inner: 100, columns: 132 });
        await expectTenIdenticalRuns(() => runMatmul(c, given));
      }
    });
  });
});
