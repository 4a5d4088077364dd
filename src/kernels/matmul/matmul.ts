import {
  type Elem,
  type Kernel,
  type Op,
  op,
  type ShaderFile,
  sizeOf,
  type Work,
} from "../../runtime/kernel.ts";
import { subgroupRows, tripsHelper, unrollConst } from "../shared/shared.ts";
import bindingsText from "./bindings.wgsl" with { type: "text" };
import epilogueText from "./epilogue.wgsl" with { type: "text" };
import storeText from "./store.wgsl" with { type: "text" };
import matrixBindingsText from "./subgroup_matrix_bindings.wgsl" with { type: "text" };
import subgroupMatrixText from "./subgroup_matrix.wgsl" with { type: "text" };
import subgroupText from "./subgroup.wgsl" with { type: "text" };
import tiledText from "./tiled.wgsl" with { type: "text" };

/** What is fused behind the product; the numbers are those in `epilogue.wgsl`. */
export const EPILOGUES = { bias: 0, bias_gelu: 1, residual: 2 } as const;
export type Epilogue = keyof typeof EPILOGUES;

export interface MatmulProblem {
  readonly rows: number;
  /** Length of the sums, a multiple of four. */
  readonly inner: number;
  /** Columns of `w` and `out`, a multiple of four. */
  readonly columns: number;
}

interface MatmulVariant {
  /** Storage of `x` and `w`; `residual` adds to `out` in f32, the other epilogues store `elem`. */
  readonly elem: Elem;
  readonly epilogue: Epilogue;
  /** See `shared/trips.wgsl`. */
  readonly unroll: boolean;
}

export interface TiledVariant extends MatmulVariant {
  readonly tileRows: number;
  readonly tileColumns: number;
  readonly tileInner: number;
  readonly threadRows: number;
}

export interface SubgroupVariant extends MatmulVariant {
  /** Lanes of the device's subgroups, 4 or 8: a quarter of a tile's columns. */
  readonly subgroup: number;
  /** One or four for each lane. */
  readonly tileRows: number;
}

/** A workgroup of `subgroupsM × subgroupsN` subgroups, each with a tile of 64×64. */
export interface SubgroupMatrixVariant {
  readonly epilogue: Epilogue;
  readonly subgroupsM: number;
  readonly subgroupsN: number;
}

/** Columns of `x` that the tensor-core kernel stages at a time: it takes multiples of them only. */
const MATRIX_TILE_INNER = 32;

const matrixBindings: ShaderFile = {
  file: "matmul/subgroup_matrix_bindings.wgsl",
  text: matrixBindingsText,
};
const bindings: ShaderFile = { file: "matmul/bindings.wgsl", text: bindingsText };
/** What is fused behind a product: `gelu_new` and the numbers of the epilogues. */
export const epilogueFile: ShaderFile = { file: "matmul/epilogue.wgsl", text: epilogueText };
/** Stores a finished sum with its epilogue. */
export const storeFile: ShaderFile = { file: "matmul/store.wgsl", text: storeText };

/** What a product moves and computes; `xBytes` are read for `x`. */
export function productWork(
  { elem, epilogue }: Pick<MatmulVariant, "elem" | "epilogue">,
  { rows, inner, columns }: MatmulProblem,
  xBytes = rows * inner * sizeOf(elem),
): Work {
  const outBytes = epilogue === "residual" ? 2 * 4 : sizeOf(elem);
  return {
    bytes: xBytes + inner * columns * sizeOf(elem) + 4 * columns + rows * columns * outBytes,
    flops: 2 * rows * inner * columns,
  };
}

const common = {
  bindings: { x: "read", w: "read", bias: "read", out: "read_write" },
  params: { rows: "u32", inner4: "u32", columns4: "u32", one: "u32" },
  values: (_: unknown, p: MatmulProblem) => ({
    rows: p.rows,
    inner4: p.inner / 4,
    columns4: p.columns / 4,
    one: 1,
  }),
  work: (v: MatmulVariant, p: MatmulProblem) => productWork(v, p),
} as const;

function header(v: MatmulVariant, consts: Readonly<Record<string, number>>) {
  const outElem = v.epilogue === "residual" ? "f32" : v.elem;
  return {
    aliases: { elem: v.elem, out_elem: outElem },
    consts: { EPILOGUE: EPILOGUES[v.epilogue], ...unrollConst(v.unroll), ...consts },
  };
}

/** `out[rows, columns] = epilogue(x[rows, inner] · w[inner, columns] + bias)` for any number of rows. */
export const tiledMatmul: Kernel<TiledVariant, MatmulProblem> = {
  name: "matmul/tiled",
  sources: [bindings, epilogueFile, storeFile, { file: "matmul/tiled.wgsl", text: tiledText }, tripsHelper],
  ...common,
  header: (v) =>
    header(v, {
      TILE_ROWS: v.tileRows,
      TILE_COLUMNS: v.tileColumns,
      TILE_INNER: v.tileInner,
      THREAD_ROWS: v.threadRows,
    }),
  workgroupBytes: (v) => 4 * v.tileInner * (v.tileRows + v.tileColumns), // x_tile + w_tile
  workgroupInvocations: (v) => (v.tileRows / v.threadRows) * (v.tileColumns / 4),
  grid: (v, p) => [Math.ceil(p.columns / v.tileColumns), Math.ceil(p.rows / v.tileRows), 1],
};

/** The same on tensor cores, in f16, for `inner` a multiple of 32 and `columns` of eight. */
export const subgroupMatrixMatmul: Kernel<SubgroupMatrixVariant, MatmulProblem> = {
  name: "matmul/subgroup_matrix",
  sources: [matrixBindings, epilogueFile, { file: "matmul/subgroup_matrix.wgsl", text: subgroupMatrixText }],
  bindings: common.bindings,
  params: { rows: "u32", inner8: "u32", columns8: "u32" },
  values: (_, p) => ({ rows: p.rows, inner8: p.inner / 8, columns8: p.columns / 8 }),
  header: (v) => ({
    aliases: { elem: "f16" },
    subgroupMatrix: true,
    consts: {
      EPILOGUE: EPILOGUES[v.epilogue],
      SUBGROUPS_M: v.subgroupsM,
      SUBGROUPS_N: v.subgroupsN,
    },
  }),
  workgroupBytes(v) {
    const { rows, columns } = matrixTile(v);
    return 16 * (rows * (MATRIX_TILE_INNER / 8 + 1) + MATRIX_TILE_INNER * (columns / 8 + 1)); // arena
  },
  workgroupInvocations: (v) => 32 * v.subgroupsM * v.subgroupsN,
  grid(v, p) {
    const { rows, columns } = matrixTile(v);
    return [Math.ceil(p.columns / columns), Math.ceil(p.rows / rows), 1];
  },
  work: ({ epilogue }, p) => productWork({ elem: "f16", epilogue }, p),
};

function matrixTile({ subgroupsM, subgroupsN }: SubgroupMatrixVariant) {
  return { rows: 64 * subgroupsM, columns: 64 * subgroupsN };
}

/** The same for any number of rows, on software Vulkan. */
export const subgroupMatmul: Kernel<SubgroupVariant, MatmulProblem> = {
  name: "matmul/subgroup",
  sources: [
    bindings,
    epilogueFile,
    storeFile,
    { file: "matmul/subgroup.wgsl", text: subgroupText },
    subgroupRows,
    tripsHelper,
  ],
  ...common,
  header: (v) => ({ ...header(v, { TILE_ROWS: v.tileRows }), subgroup: v.subgroup }),
  workgroupBytes: () => 0,
  workgroupInvocations: (v) => v.subgroup,
  grid: (v, p) => [Math.ceil(p.columns / (4 * v.subgroup)), Math.ceil(p.rows / v.tileRows), 1],
};

/**
 * Candidates for many rows, in order of preference.
 * @param unroll false on software adapters only
 * @param isWide all widths are multiples of 32
 */
export function matmulCandidates(
  elem: Elem,
  epilogue: Epilogue,
  unroll: boolean,
  isWide: boolean,
): Op<MatmulProblem>[] {
  const forSoftware = [8, 4].flatMap((subgroup) =>
    [4 * subgroup, subgroup].map((tileRows) =>
      op(subgroupMatmul, { elem, epilogue, unroll, subgroup, tileRows })
    )
  );
  return [
    ...(unroll ? [] : forSoftware),
    ...(elem === "f16" && isWide ? [op(subgroupMatrixMatmul, subgroupMatrixVariant(epilogue))] : []),
    ...tiledVariants(elem, epilogue, unroll).map((v) => op(tiledMatmul, v)),
  ];
}

/** Candidates for the few rows of a short prompt, where large tiles would be mostly padding. */
export function smallMatmulCandidates(elem: Elem, epilogue: Epilogue, unroll: boolean): Op<MatmulProblem>[] {
  return matmulCandidates(elem, epilogue, unroll, false).filter(({ variant }) =>
    !("tileRows" in variant) || (variant as TiledVariant).tileRows <= 16
  );
}

/** Tiles of 128×128: what an H100 was fastest with (docs/benchmarks.md). */
export function subgroupMatrixVariant(epilogue: Epilogue): SubgroupMatrixVariant {
  return { epilogue, subgroupsM: 2, subgroupsN: 2 };
}

/** Tiles in order of preference for many rows. */
export function tiledVariants(elem: Elem, epilogue: Epilogue, unroll: boolean): TiledVariant[] {
  return [
    { elem, epilogue, unroll, tileRows: 64, tileColumns: 64, tileInner: 16, threadRows: 4 },
    { elem, epilogue, unroll, tileRows: 16, tileColumns: 64, tileInner: 16, threadRows: 4 },
  ];
}
