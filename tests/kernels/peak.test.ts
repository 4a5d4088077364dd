/** Kernels that `bench` measures others by: what they compute is what their figure says. */
import { describe, expect, test } from "bun:test";
import {
  FACTOR_BYTES,
  fmaPeak,
  type FmaProblem,
  fmaWork,
  subgroupMatrixPeak,
  subgroupMatrixWork,
} from "../../src/kernels/peak/peak.ts";
import { op, supports } from "../../src/runtime/kernel.ts";
import { expectSame } from "../support/compare.ts";
import { poison, runOp, tensor, testDevice } from "../support/device.ts";

const gpu = await testDevice();

/** One invocation's sum of 32 numbers after eight multiply-adds a trip. */
function fmaReference(lane: number, { trips, factor, addend }: FmaProblem): number {
  let sum = 0;
  for (let i = 0; i < 32; i++) {
    let x = lane + i;
    for (let n = 0; n < 8 * trips; n++) x = x * factor + addend;
    sum += x;
  }
  return sum;
}

describe("peak/fma", () => {
  // All results are whole numbers below 2^24, which f32 holds whether a multiply-add rounds once or twice.
  const problems: readonly FmaProblem[] = [
    { workgroups: 3, trips: 1, factor: 2, addend: 1 },
    { workgroups: 2, trips: 7, factor: 1, addend: 3 },
    { workgroups: 1, trips: 2, factor: -1, addend: 1 },
  ];
  for (const problem of problems) {
    const { workgroups, trips, factor, addend } = problem;
    test(`${trips} trips of ${factor} x + ${addend} are exact`, async () => {
      const { out } = await runOp(gpu, op(fmaPeak, {}), problem, { out: poison("f32", 256 * workgroups) });
      expectSame(out!, Array.from({ length: 256 * workgroups }, (_, i) => fmaReference(i % 256, problem)));
    });
  }
  test("counts two operations a multiply-add", () => {
    const problem = { workgroups: 3, trips: 5 };
    expect(fmaWork(problem)).toEqual({ flop: 3 * 256 * 32 * 8 * 5 * 2, outBytes: 4 * 3 * 256 });
  });
});

describe("peak/subgroup_matrix", () => {
  const verdict = supports(subgroupMatrixPeak, {}, gpu.caps);
  const title = "each of the sixteen sums is exact in every subgroup";
  test.skipIf(verdict !== true)(verdict === true ? title : `${title}: ${verdict}`, async () => {
    // Whole numbers from -3 to 3, so that all sums are exact.
    const whole = (stream: number) =>
      Float32Array.from({ length: FACTOR_BYTES / 2 }, (_, i) => (stream * i) % 7 - 3);
    const [left, right] = [whole(5), whole(11)];
    const [workgroups, trips] = [3, 9];
    for (let kept = 0; kept < 16; kept++) {
      const { out } = await runOp(gpu, op(subgroupMatrixPeak, {}), { workgroups, trips, kept }, {
        left: tensor("f16", left),
        right: tensor("f16", right),
        out: poison("f32", workgroups * 4 * 256),
      });
      const a = left.subarray(256 * Math.floor(kept / 4));
      const b = right.subarray(256 * (kept % 4));
      const wanted = Array.from({ length: 256 }, (_, i) => {
        let sum = 0;
        for (let k = 0; k < 16; k++) sum += a[16 * Math.floor(i / 16) + k]! * b[16 * k + i % 16]!;
        return trips * sum;
      });
      expectSame(out!, Array.from({ length: workgroups * 4 }, () => wanted).flat());
    }
  });
  test("counts two operations a multiply-add", () => {
    const problem = { workgroups: 3, trips: 5 };
    expect(subgroupMatrixWork(problem)).toEqual({
      flop: 3 * 4 * 16 * 16 ** 3 * 5 * 2,
      outBytes: 4 * 3 * 4 * 256,
    });
  });
});
