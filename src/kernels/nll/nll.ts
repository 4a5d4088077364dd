import { type Kernel, type Op, op } from "../../runtime/kernel.ts";
import { foldedGrid, foldGrid, GRID_FOLD, mergeLanes } from "../shared/shared.ts";
import text from "./nll.wgsl" with { type: "text" };

export interface NllVariant {
  /** Lanes of a row's workgroup, a multiple of 8: as many partial sums. */
  readonly lanes: number;
}

export interface NllProblem {
  /** Rows of logits. */
  readonly rows: number;
  readonly vocab: number;
  /** Index into `targets` and `nll` of the first row. */
  readonly firstRow: number;
}

/**
 * Negative log-likelihood of each row's target token in nats: `log Σ exp(logits[row]) - logits[row, target]`.
 *
 * A row with NaN among its logits gives NaN; one with +inf, or of nothing but -inf, gives something that is not finite.
 * The host must have checked that targets are below `vocab`; one that is not counts as the last token, so that nothing
 * outside the row is read.
 */
export const nll: Kernel<NllVariant, NllProblem> = {
  name: "nll",
  sources: [{ file: "nll/nll.wgsl", text }, mergeLanes, foldedGrid],
  bindings: { logits: "read", targets: "read", nll: "read_write" },
  params: { rows: "u32", vocab: "u32", first_row: "u32" },
  header: (v) => ({ aliases: {}, consts: { LANES: v.lanes, GRID_FOLD } }),
  workgroupBytes: (v) => 3 * 4 * v.lanes, // lane_max, lane_sum, lane_bits
  workgroupInvocations: (v) => v.lanes,
  values: (_, p) => ({ rows: p.rows, vocab: p.vocab, first_row: p.firstRow }),
  grid: (_, p) => foldGrid(p.rows),
  work: (_, p) => ({ bytes: 4 * p.rows * (p.vocab + 1), flops: 0 }),
};

/** `unroll` is false on software adapters only, where the cost of a barrier grows with the lanes. */
export function nllCandidates(unroll: boolean): Op<NllProblem>[] {
  return [op(nll, { lanes: unroll ? 256 : 64 })];
}
