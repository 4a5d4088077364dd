import { type Kernel, type Op, op } from "../../runtime/kernel.ts";
import { foldedGrid, foldGrid, GRID_FOLD, mergeLanes, workgroupSum } from "../shared/shared.ts";
import text from "./divergence.wgsl" with { type: "text" };

export interface DivergenceVariant {
  /** Lanes of a row's workgroup, a multiple of 8 and at least 16: four times as many partial sums. */
  readonly lanes: number;
}

export interface DivergenceProblem {
  /** Rows of logits. */
  readonly rows: number;
  readonly vocab: number;
  /** Index into `targets` and `results` of the first row. */
  readonly firstRow: number;
}

/**
 * Compares two distributions for each row, P = softmax(logits[row]) and Q = softmax(other[row]): the negative
 * log-likelihood of the row's target token under both, KL(P‖Q) = Σ p (log p - log q), all in nats, and whether
 * both have the same largest logit, of equal ones that of the lowest token. `unpackDivergence` reads `results`.
 *
 * KL is never negative, and 0 for equal rows. A token that P excludes by -inf counts for nothing in it; one
 * that Q excludes, and to which P gives more than 0 in f32, makes it +inf.
 *
 * A row of `logits` or `other` with NaN or +inf, or of nothing but -inf, gives a KL that is not finite, does
 * not agree, and its own likelihood is not finite either: NaN in the case of NaN. The host must have checked
 * that targets are below `vocab`; one that is not counts as the last token, so that nothing outside the row is
 * read.
 */
export const divergence: Kernel<DivergenceVariant, DivergenceProblem> = {
  name: "divergence",
  sources: [{ file: "divergence/divergence.wgsl", text }, mergeLanes, foldedGrid, workgroupSum],
  bindings: { logits: "read", other: "read", targets: "read", results: "read_write" },
  params: { rows: "u32", vocab: "u32", first_row: "u32" },
  header: (v) => ({ aliases: {}, consts: { LANES: v.lanes, GRID_FOLD } }),
  workgroupBytes: (v) =>
    4 * 4 * 2 * v.lanes + // lane_max, lane_sum, lane_bits, lane_first
    4 * v.lanes, // lane_values
  workgroupInvocations: (v) => v.lanes,
  values: (_, p) => ({ rows: p.rows, vocab: p.vocab, first_row: p.firstRow }),
  grid: (_, p) => foldGrid(p.rows),
  work: (_, p) => ({ bytes: p.rows * (2 * 4 * p.vocab + DIVERGENCE_BYTES), flops: 0 }),
};

/** `unroll` is false on software adapters only, where the cost of a barrier grows with the lanes. */
export function divergenceCandidates(unroll: boolean): Op<DivergenceProblem>[] {
  return [op(divergence, { lanes: unroll ? 256 : 64 })];
}

/** Bytes of one row's entry of `results`. */
export const DIVERGENCE_BYTES = 16;

/** `results` by column, a row's number in each at the row's index. */
export interface Divergences {
  /** -log P(target) in nats. */
  readonly nll: Float32Array<ArrayBuffer>;
  /** -log Q(target) in nats. */
  readonly otherNll: Float32Array<ArrayBuffer>;
  /** KL(P‖Q) in nats. */
  readonly kl: Float32Array<ArrayBuffer>;
  /** 1 where P and Q have the same largest logit, else 0. */
  readonly agrees: Uint8Array<ArrayBuffer>;
}

/**
 * The first `count` entries of `results`.
 * @throws RangeError when there are fewer
 */
export function unpackDivergence(bytes: ArrayBuffer, count: number): Divergences {
  const view = new DataView(bytes, 0, DIVERGENCE_BYTES * count);
  const column = (field: number) =>
    Float32Array.from(
      { length: count },
      (_, row) => view.getFloat32(DIVERGENCE_BYTES * row + 4 * field, true),
    );
  return {
    nll: column(0),
    otherNll: column(1),
    kl: column(2),
    agrees: Uint8Array.from({ length: count }, (_, row) => view.getUint32(DIVERGENCE_BYTES * row + 12, true)),
  };
}
