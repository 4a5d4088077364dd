import {
  distinct,
  type Elem,
  type Kernel,
  type Op,
  op,
  type ShaderFile,
  sizeOf,
} from "../../runtime/kernel.ts";
import {
  type Epilogue,
  epilogueFile,
  EPILOGUES,
  type MatmulProblem,
  productWork,
  storeFile,
} from "../matmul/matmul.ts";
import {
  existingColumns,
  keptByAll,
  type KeptInHeads,
  KV_BLOCK,
  partialBytes,
  sequenceStruct,
  workgroupSum,
} from "../shared/shared.ts";
import finishSubgroupText from "./finish_subgroup.wgsl" with { type: "text" };
import finishWorkgroupText from "./finish_workgroup.wgsl" with { type: "text" };
import gemvText from "./gemv.wgsl" with { type: "text" };
import layerNormText from "./layer_norm.wgsl" with { type: "text" };
import layerNormBindingsText from "./layer_norm_bindings.wgsl" with { type: "text" };
import mergeText from "./merge.wgsl" with { type: "text" };
import mergeBindingsText from "./merge_bindings.wgsl" with { type: "text" };
import mergeSubgroupText from "./merge_subgroup.wgsl" with { type: "text" };
import mergeWorkgroupText from "./merge_workgroup.wgsl" with { type: "text" };
import momentsSubgroupText from "./moments_subgroup.wgsl" with { type: "text" };
import momentsWorkgroupText from "./moments_workgroup.wgsl" with { type: "text" };
import plainText from "./plain.wgsl" with { type: "text" };
import plainBindingsText from "./plain_bindings.wgsl" with { type: "text" };
import softwareText from "./software.wgsl" with { type: "text" };

/** What every kernel of the family can be compiled to. */
export interface GemvVariant {
  /** Storage of `w`; sums are in f32. `residual` adds to `out` in f32, the other epilogues store `elem`. */
  readonly elem: Elem;
  readonly epilogue: Epilogue;
  /** Columns of `x`, a multiple of four. */
  readonly inner: number;
  /** Rows of `x` that share one reading of `w`. */
  readonly rows: number;
  /** Four-column strips of one workgroup, a power of two. */
  readonly strip4: number;
  /** Groups of lanes that share each sum, a power of two. */
  readonly slices: number;
  /** Vectors of `x` that a lane takes a pass. */
  readonly steps: number;
}

export interface LayerNormGemvVariant extends GemvVariant {
  /** Columns that are normalised; the rest of `inner` is padding. */
  readonly width: number;
}

export interface MergeGemvVariant extends GemvVariant {
  readonly heads: number;
  readonly headDim4: number;
  /** Slices that a row has at most: that of the attention before. */
  readonly maxSplits: number;
}

export interface LayerNormGemvProblem extends MatmulProblem {
  readonly epsilon: number;
}

export interface MergeGemvProblem extends MatmulProblem {
  /** What the attention before attended to, for `work`; all blocks when left out. */
  readonly kept?: KeptInHeads | undefined;
}

/**
 * How a kernel of the family shares its work: `subgroup` adds up by shuffles among subgroups of 32 lanes, `workgroup`
 * through workgroup memory, and `software` does not share sums at all.
 */
const FORMS = ["subgroup", "workgroup", "software"] as const;
type Form = typeof FORMS[number];

const file = (name: string, text: string): ShaderFile => ({ file: `gemv/${name}.wgsl`, text });

const BODIES: Readonly<Record<Form, readonly ShaderFile[]>> = {
  subgroup: [file("gemv", gemvText), file("finish_subgroup", finishSubgroupText)],
  workgroup: [file("gemv", gemvText), file("finish_workgroup", finishWorkgroupText)],
  software: [file("software", softwareText)],
};

/** Lanes of a subgroup for the form that uses them. */
const SUBGROUP = 32;

/** What a kernel takes for `x`, and where it comes from. */
interface Prologue<V, P> {
  readonly name: string;
  readonly sources: Readonly<Record<Form, readonly ShaderFile[]>>;
  readonly bindings: Readonly<Record<string, "read" | "read_write">>;
  readonly params: Readonly<Record<string, "u32" | "f32">>;
  values(p: P): Readonly<Record<string, number>>;
  /** Bytes of what `x` is made of. */
  xBytes(v: V, p: P, lengths: readonly number[]): number;
  consts(v: V): Readonly<Record<string, number>>;
  workgroupBytes(v: V, form: Form): number;
}

function lanesOf({ strip4, slices }: GemvVariant): number {
  return strip4 * slices;
}

/** Vectors of the software form's `x_tile`, which says why they are never fewer. */
function softwareTile({ rows, inner }: GemvVariant): number {
  return Math.max(rows * inner / 4, 33);
}

/** Bytes of `x_tile` and `partial`. */
function bodyBytes(v: GemvVariant, form: Form): number {
  if (form === "software") return 16 * softwareTile(v);
  const partial = form === "subgroup" ? v.rows * lanesOf(v) / SUBGROUP * v.strip4 : lanesOf(v);
  return 16 * (v.rows * v.slices * v.steps + partial);
}

function gemvKernel<V extends GemvVariant, P extends MatmulProblem>(
  prologue: Prologue<V, P>,
  form: Form,
): Kernel<V, P> {
  return {
    name: `gemv/${prologue.name}_${form}`,
    sources: [...prologue.sources[form], ...BODIES[form], epilogueFile, storeFile],
    bindings: { ...prologue.bindings, w: "read", bias: "read", out: "read_write" },
    params: { rows: "u32", columns4: "u32", ...prologue.params },
    paramsIn: "uniform",
    header: (v) => ({
      aliases: { elem: v.elem, out_elem: v.epilogue === "residual" ? "f32" : v.elem },
      ...(form === "subgroup" ? { subgroup: SUBGROUP } : {}),
      consts: {
        EPILOGUE: EPILOGUES[v.epilogue],
        INNER4: v.inner / 4,
        ROWS: v.rows,
        STRIP4: v.strip4,
        SLICES: v.slices,
        STEPS: v.steps,
        ...(form === "software" ? { X_TILE: softwareTile(v) } : {}),
        ...prologue.consts(v),
      },
    }),
    workgroupBytes: (v) => bodyBytes(v, form) + prologue.workgroupBytes(v, form),
    workgroupInvocations: lanesOf,
    values: (_, p) => ({ rows: p.rows, columns4: p.columns / 4, ...prologue.values(p) }),
    grid: (v, p) => [Math.ceil(p.columns / (4 * v.strip4)), Math.ceil(p.rows / v.rows), 1],
    work: (v, p, lengths) => productWork(v, p, prologue.xBytes(v, p, lengths)),
  };
}

function ofEachForm<V extends GemvVariant, P extends MatmulProblem>(
  prologue: Prologue<V, P>,
): Readonly<Record<Form, Kernel<V, P>>> {
  const [subgroup, workgroup, software] = FORMS.map((form) => gemvKernel(prologue, form));
  return { subgroup: subgroup!, workgroup: workgroup!, software: software! };
}

const plainFiles = [file("plain_bindings", plainBindingsText), file("plain", plainText)];
const layerNormFiles = [
  file("layer_norm_bindings", layerNormBindingsText),
  file("layer_norm", layerNormText),
  existingColumns,
];
const byWorkgroup = [...layerNormFiles, file("moments_workgroup", momentsWorkgroupText), workgroupSum];

/** `out[rows, columns] = epilogue(layerNorm(x) · w + bias)` for a residual stream `x[rows, inner]` in f32. */
export const layerNormGemv = ofEachForm<LayerNormGemvVariant, LayerNormGemvProblem>({
  name: "layer_norm",
  sources: {
    subgroup: [...layerNormFiles, file("moments_subgroup", momentsSubgroupText)],
    workgroup: byWorkgroup,
    software: byWorkgroup,
  },
  bindings: { x: "read", gain: "read", shift: "read" },
  params: { epsilon: "f32" },
  values: ({ epsilon }) => ({ epsilon }),
  xBytes: (_, { rows, inner }) => 4 * inner * (rows + 2), // x; gain, shift
  consts: ({ width }) => ({ WIDTH: width }),
  // moments and, but for subgroups, lane_values
  workgroupBytes: (v, form) => 16 * Math.ceil(v.rows / 2) + (form === "subgroup" ? 0 : 4 * lanesOf(v)),
});

const mergeFiles = [
  file("merge_bindings", mergeBindingsText),
  file("merge", mergeText),
  sequenceStruct,
];

/**
 * `out[rows, columns] = epilogue(x · w + bias)` where `x[rows, heads, headDim]` is the attention of one query a row,
 * merged from the slices of `flash_decode/split_kv`.
 */
export const mergeGemv = ofEachForm<MergeGemvVariant, MergeGemvProblem>({
  name: "merge",
  sources: {
    subgroup: [...mergeFiles, file("merge_subgroup", mergeSubgroupText)],
    workgroup: [...mergeFiles, file("merge_workgroup", mergeWorkgroupText)],
    software: [...mergeFiles, file("merge_workgroup", mergeWorkgroupText)],
  },
  bindings: { partial_out: "read", partial_ml: "read", sequences: "read" },
  params: {},
  values: () => ({}),
  xBytes: (v, { rows, kept = keptByAll(v.heads) }, lengths) =>
    partialBytes(v, rows * v.heads, lengths.flatMap(kept)),
  consts: ({ heads, headDim4, maxSplits }) => ({
    HEADS: heads,
    HEAD_DIM4: headDim4,
    KV_BLOCK,
    MAX_SPLITS: maxSplits,
  }),
  workgroupBytes: (v) =>
    4 * v.rows * v.heads * v.maxSplits + // slice_weights
    16 * Math.ceil(v.rows * v.heads / 4), // slice_counts
});

/** `out[rows, columns] = epilogue(x · w + bias)` for a tensor `x[rows, inner]`. */
export const plainGemv = ofEachForm<GemvVariant, MatmulProblem>({
  name: "plain",
  sources: { subgroup: plainFiles, workgroup: plainFiles, software: plainFiles },
  bindings: { x: "read" },
  params: {},
  values: () => ({}),
  xBytes: ({ elem }, { rows, inner }) => rows * inner * sizeOf(elem),
  consts: () => ({}),
  workgroupBytes: () => 0,
});

/** What of a variant is chosen for a device. */
type GemvShape = Pick<GemvVariant, "rows" | "strip4" | "slices" | "steps">;

/**
 * Candidates in order of preference.
 * @param sizes rows of `x`; `unroll` is false on software adapters only; lanes of a workgroup at most, 1,024 if left out
 */
export function gemvCandidates<V extends GemvVariant, P extends MatmulProblem>(
  kernels: Readonly<Record<Form, Kernel<V, P>>>,
  own: Omit<V, keyof GemvShape>,
  sizes: { readonly rows: number; readonly unroll: boolean; readonly mostLanes?: number },
): Op<P>[] {
  const { rows, unroll, mostLanes = 1024 } = sizes;
  const ops = (form: Form, shapes: readonly GemvShape[]) =>
    shapes.map((shape) => op(kernels[form], { ...own, ...shape } as unknown as V));
  // Up to eight rows would be one tile of eight: two of four are as many workgroups more.
  const tileRows = rows > 8 ? 8 : Math.min(4, 2 ** Math.ceil(Math.log2(rows)));
  const { inner } = own;
  const hardware = [mostLanes, 256].map((lanes) => hardwareShape(inner, tileRows, lanes));
  const smallest = hardwareShape(inner, 1, 256);
  return distinct([
    ...(unroll ? [] : ops("software", [{ rows: tileRows, ...SOFTWARE }, { rows: 1, ...SOFTWARE }])),
    ...(unroll ? ops("subgroup", hardware) : []),
    ...ops("workgroup", [...hardware, smallest]),
  ]);
}

const SOFTWARE = { strip4: 8, slices: 1, steps: 1 };
/** 32 bytes of f16 of each row of `w`, which memory is read in: with less, half of what is fetched is not used. */
const STRIP4 = 4;
/** Rows of `w` that a lane has in flight, divided by four. */
const STEPS = 3;
/** A lane's rows of `w`, divided by four, must stay in registers, of which there are 64 with 1,024 lanes. */
const MOST_STEPS = 8;

function hardwareShape(inner: number, rows: number, mostLanes: number): GemvShape {
  const vectors = inner / 4;
  // Eight rows of sums fill the registers that more lanes would need.
  const lanes = rows > 4 ? Math.min(256, mostLanes) : mostLanes;
  let slices = 16;
  while (STRIP4 * slices < lanes && slices * STEPS < vectors) slices *= 2;
  const steps = rows > 1 ? 1 : Math.min(MOST_STEPS, Math.ceil(vectors / slices));
  return { rows, strip4: STRIP4, slices, steps };
}
