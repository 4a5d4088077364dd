import { type Elem, type Kernel, sizeOf } from "../../runtime/kernel.ts";
import { existingColumns, foldedGrid, foldGrid, GRID_FOLD, workgroupSum } from "../shared/shared.ts";
import text from "./layer_norm.wgsl" with { type: "text" };

export interface LayerNormVariant {
  readonly outElem: Elem;
  /** Columns that are normalised; rows are padded with zeros to a multiple of four. */
  readonly width: number;
}

export interface LayerNormProblem {
  readonly rows: number;
  /** Row of `x` that becomes row 0 of `out`. */
  readonly firstRow: number;
  readonly epsilon: number;
}

const LANES = 64;

/** LayerNorm (Ba et al. 2016) of f32 rows with f32 gain and shift, stored as `outElem`. */
export const layerNorm: Kernel<LayerNormVariant, LayerNormProblem> = {
  name: "layer_norm",
  sources: [{ file: "layer_norm/layer_norm.wgsl", text }, foldedGrid, workgroupSum, existingColumns],
  bindings: { x: "read", gain: "read", shift: "read", out: "read_write" },
  params: { rows: "u32", first_row: "u32", epsilon: "f32" },
  header: (v) => ({ aliases: { out_elem: v.outElem }, consts: { WIDTH: v.width, LANES, GRID_FOLD } }),
  workgroupBytes: () => 4 * LANES,
  workgroupInvocations: () => LANES,
  values: (_, p) => ({ rows: p.rows, first_row: p.firstRow, epsilon: p.epsilon }),
  grid: (_, p) => foldGrid(p.rows),
  work({ outElem, width }, { rows }) {
    const columns = 4 * Math.ceil(width / 4);
    return { bytes: columns * (rows * (4 + sizeOf(outElem)) + 2 * 4), flops: 0 }; // x, out; gain, shift
  },
};
