/** How fast a device computes when nothing has to be fetched: arithmetic from registers, which kernels are measured by. */
import type { Kernel } from "../../runtime/kernel.ts";
import fmaText from "./fma.wgsl" with { type: "text" };
import subgroupMatrixText from "./subgroup_matrix.wgsl" with { type: "text" };

interface PeakProblem {
  readonly workgroups: number;
  readonly trips: number;
}

export interface FmaProblem extends PeakProblem {
  readonly factor: number;
  readonly addend: number;
}

export interface SubgroupMatrixProblem extends PeakProblem {
  /** Which of the sixteen sums is stored, 0 to 15: `4 * i + j` is that of left `i` times right `j`. */
  readonly kept: number;
}

const FMA_LANES = 256;

/** `out[workgroups, 256]`: 32 numbers an invocation, each `trips` times through eight multiply-adds in f32, summed. */
export const fmaPeak: Kernel<object, FmaProblem> = {
  name: "peak/fma",
  sources: [{ file: "peak/fma.wgsl", text: fmaText }],
  bindings: { out: "read_write" },
  params: { trips: "u32", factor: "f32", addend: "f32" },
  header: () => ({ aliases: {}, consts: { LANES: FMA_LANES } }),
  workgroupBytes: () => 0,
  workgroupInvocations: () => FMA_LANES,
  values: (_, { trips, factor, addend }) => ({ trips, factor, addend }),
  grid: (_, p) => [p.workgroups, 1, 1],
  work(_, p) {
    const { flop, outBytes } = fmaWork(p);
    return { bytes: outBytes, flops: flop };
  },
};

/** What `fmaPeak` computes and writes. */
export function fmaWork({ workgroups, trips }: PeakProblem): { flop: number; outBytes: number } {
  const invocations = workgroups * FMA_LANES;
  return { flop: 2 * 8 * 32 * trips * invocations, outBytes: 4 * invocations };
}

const SUBGROUPS = 4;
/** Elements of a matrix, of one stored sum. */
const MATRIX = 16 * 16;

/** Bytes of the four left matrices, and of the four right ones, `[4, 16, 16]` f16. */
export const FACTOR_BYTES = 2 * 4 * MATRIX;

/** `out[workgroups, 4, 16, 16]`: of each subgroup one of its sixteen sums of products, `trips * left[i] · right[j]`. */
export const subgroupMatrixPeak: Kernel<object, SubgroupMatrixProblem> = {
  name: "peak/subgroup_matrix",
  sources: [{ file: "peak/subgroup_matrix.wgsl", text: subgroupMatrixText }],
  bindings: { left: "read", right: "read", out: "read_write" },
  params: { trips: "u32", kept: "u32" },
  header: () => ({ aliases: { elem: "f16" }, subgroupMatrix: true, consts: { SUBGROUPS } }),
  workgroupBytes: () => 0,
  workgroupInvocations: () => 32 * SUBGROUPS,
  values: (_, { trips, kept }) => ({ trips, kept }),
  grid: (_, p) => [p.workgroups, 1, 1],
  work(_, p) {
    const { flop, outBytes } = subgroupMatrixWork(p);
    return { bytes: 2 * FACTOR_BYTES + outBytes, flops: flop };
  },
};

/** What `subgroupMatrixPeak` computes and writes. */
export function subgroupMatrixWork({ workgroups, trips }: PeakProblem): { flop: number; outBytes: number } {
  const subgroups = workgroups * SUBGROUPS;
  return { flop: 2 * 16 * 16 * MATRIX * trips * subgroups, outBytes: 4 * MATRIX * subgroups };
}
