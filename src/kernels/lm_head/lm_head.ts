import {
  type Elem,
  type Grid,
  type Kernel,
  type Op,
  op,
  type ShaderFile,
  sizeOf,
} from "../../runtime/kernel.ts";
import type { RowRange } from "../embedding/embedding.ts";
import { foldGrid, GRID_FOLD, tripsHelper, unrollConst } from "../shared/shared.ts";
import bindingsText from "./bindings.wgsl" with { type: "text" };
import splitDotText from "./split_dot.wgsl" with { type: "text" };
import subgroupText from "./subgroup.wgsl" with { type: "text" };

export interface SplitDotVariant {
  readonly elem: Elem;
  /** Rows of `x` that share one reading of the head. */
  readonly rows: number;
  /** Tokens of one workgroup. */
  readonly vocabTile: number;
  readonly lanesPerToken: number;
}

export interface LmHeadProblem {
  readonly rows: number;
  /** Columns of `x` and the head, a multiple of four. */
  readonly inner: number;
  readonly vocab: number;
  /** The tokens whose rows the bound piece holds. */
  readonly piece: RowRange;
}

export interface SubgroupLmHeadVariant {
  readonly elem: Elem;
  /** Lanes of the device's subgroups, 4 or 8: rows and tokens of a workgroup. */
  readonly subgroup: number;
  /** See `shared/trips.wgsl`. */
  readonly unroll: boolean;
}

const bindings: ShaderFile = { file: "lm_head/bindings.wgsl", text: bindingsText };

const common = {
  bindings: { x: "read", w: "read", logits: "read_write" },
  params: { rows: "u32", inner4: "u32", vocab: "u32", first_token: "u32", piece_rows: "u32", one: "u32" },
  values: (_: unknown, p: LmHeadProblem) => ({
    rows: p.rows,
    inner4: p.inner / 4,
    vocab: p.vocab,
    first_token: p.piece.first,
    piece_rows: p.piece.rows,
    one: 1,
  }),
  work: ({ elem }: { readonly elem: Elem }, { rows, inner, piece }: LmHeadProblem) => ({
    bytes: 4 * rows * (inner + piece.rows) + piece.rows * inner * sizeOf(elem), // x, logits, w
    flops: 2 * rows * piece.rows * inner,
  }),
} as const;

/** Tiles of tokens folded into x and z, because a large vocabulary has more than a dimension holds; rows along y. */
function tileGrid(tokenTiles: number, rowTiles: number): Grid {
  const [x, z] = foldGrid(tokenTiles);
  return [x, rowTiles, z];
}

/** `logits[rows, vocab] = x · headᵀ` in f32, for one piece of the head. */
export const splitDotLmHead: Kernel<SplitDotVariant, LmHeadProblem> = {
  name: "lm_head/split_dot",
  sources: [bindings, { file: "lm_head/split_dot.wgsl", text: splitDotText }],
  ...common,
  header: (v) => ({
    aliases: { elem: v.elem },
    consts: { ROWS: v.rows, VOCAB_TILE: v.vocabTile, LANES_PER_TOKEN: v.lanesPerToken, GRID_FOLD },
  }),
  workgroupBytes: (v) => 4 * v.rows * v.vocabTile * v.lanesPerToken, // partial
  workgroupInvocations: (v) => v.vocabTile * v.lanesPerToken,
  grid: (v, p) => tileGrid(Math.ceil(p.piece.rows / v.vocabTile), Math.ceil(p.rows / v.rows)),
};

/** The same for many rows, on software Vulkan. */
export const subgroupLmHead: Kernel<SubgroupLmHeadVariant, LmHeadProblem> = {
  name: "lm_head/subgroup",
  sources: [bindings, { file: "lm_head/subgroup.wgsl", text: subgroupText }, tripsHelper],
  ...common,
  header: (v) => ({
    aliases: { elem: v.elem },
    subgroup: v.subgroup,
    consts: { ...unrollConst(v.unroll), GRID_FOLD },
  }),
  workgroupBytes: () => 0,
  workgroupInvocations: (v) => v.subgroup,
  grid: (v, p) => tileGrid(Math.ceil(p.piece.rows / v.subgroup), Math.ceil(p.rows / v.subgroup)),
};

/** For one row, as in decoding: it reads the head once. */
export function oneRowCandidates(elem: Elem): Op<LmHeadProblem>[] {
  return [op(splitDotLmHead, { elem, rows: 1, vocabTile: 8, lanesPerToken: 16 })];
}

/** For many rows, as in scoring, which share a reading of the head; `unroll` is false on software adapters only. */
export function manyRowsCandidates(elem: Elem, unroll: boolean): Op<LmHeadProblem>[] {
  const forSoftware = [8, 4].map((subgroup) => op(subgroupLmHead, { elem, subgroup, unroll }));
  return [
    ...(unroll ? [] : forSoftware),
    op(splitDotLmHead, { elem, rows: 8, vocabTile: 8, lanesPerToken: 16 }),
  ];
}
