/**
 * Bytes that a run needs on the device, from sizes and limits alone: asked before anything is allocated, and what is
 * allocated afterwards is what it says, buffer by buffer.
 */
import { TOKEN_BYTES } from "../kernels/embedding/embedding.ts";
import { DIVERGENCE_BYTES } from "../kernels/divergence/divergence.ts";
import { ATTENTION_ROWS, takesMatrices } from "../kernels/flash_attention/flash_attention.ts";
import type { KernelShape } from "../kernels/index.ts";
import { logprobsBytes, PLACE_BYTES, RESULT_BYTES, seenBytes } from "../kernels/sampling/sampling.ts";
import { SEGMENT_BYTES } from "../kernels/segment_sum/segment_sum.ts";
import { KV_BLOCK, mostSplits, SEQUENCE_BYTES } from "../kernels/shared/shared.ts";
import {
  kvBytesPerToken,
  type KvCacheShape,
  type KvLayout,
  kvLayout,
  listSpecs,
  partSpecs,
  selectedSpecs,
  tableSpecs,
} from "../kvcache/layout.ts";
import { DENSE, hasLists, type Sparsity } from "../kvcache/sparsity.ts";
import { bufferBytes, formatBytes, type Purpose } from "../runtime/buffers.ts";
import type { Capabilities } from "../runtime/device.ts";
import { DoesNotFitError } from "../runtime/errors.ts";
import { type Elem, parametersBytes, sizeOf } from "../runtime/kernel.ts";
import { UPLOAD_STAGE_BYTES, UPLOAD_STAGES } from "../runtime/upload_ring.ts";
import type { GPT2Config } from "./config.ts";

/**
 * Tokens of a prompt that go through the layers at a time: a quarter of the context between these bounds. Larger chunks
 * fill a GPU better (docs/long_context.md), and a quarter keeps activations far below the cache that grows with them.
 */
const LEAST_CHUNK_TOKENS = 2048;
const MOST_CHUNK_TOKENS = 16_384;
/** On a CPU they gain nothing, and a chunk is what an interruption and the progress wait for. */
const SOFTWARE_CHUNK_TOKENS = 1024;
/** Fewer than this starve any device; only tiny binding limits lead below the bounds above. */
const SMALLEST_CHUNK_TOKENS = 64;
/** Logits of many rows held at a time. */
const LOGITS_BYTES = 32 << 20;

/** Padded sizes: rows of four elements are what the kernels read, and padding is zero everywhere. */
export interface PaddedSizes {
  readonly width: number;
  readonly headDim: number;
  /** All heads side by side: `nHead * headDim`, padded. */
  readonly headsWidth: number;
  readonly inner: number;
}

export function pad4(n: number): number {
  return 4 * Math.ceil(n / 4);
}

export function paddedSizes(config: GPT2Config): PaddedSizes {
  const headDim = pad4(config.headDim);
  return {
    width: pad4(config.nEmbd),
    headDim,
    headsWidth: config.nHead * headDim,
    inner: pad4(config.nInner),
  };
}

export function kvShape(config: GPT2Config, elem: Elem): KvCacheShape {
  return {
    layers: config.nLayer,
    heads: config.nHead,
    headDim4: paddedSizes(config).headDim / 4,
    elem,
  };
}

/** What the kernels need to know of a model on a device. */
export function kernelShape(
  config: GPT2Config,
  elem: Elem,
  caps: Pick<Capabilities, "isSoftware">,
  { sequences = 1, selectableBlocks = 0 }: Partial<Pick<KernelShape, "sequences" | "selectableBlocks">> = {},
): KernelShape {
  const { heads, headDim4 } = kvShape(config, elem);
  const { inner } = paddedSizes(config);
  const width = config.nEmbd;
  return { elem, width, heads, headDim4, inner, sequences, selectableBlocks, unroll: !caps.isSoftware };
}

/** The part of a device's capabilities that says what fits. */
export type MemoryLimits =
  & Pick<Capabilities, "isSoftware" | "maxBufferBytes" | "maxBindingBytes" | "memoryBytes">
  & Partial<Pick<Capabilities, "subgroupMatrix">>;

/** Sequences of a cache where two kinds of attention are compared: the dense one's and the sparse one's. */
const COMPARED_SEQUENCES = 2;

/** Steps of decoding that are handed to the GPU together, at most. */
export const STEPS_PER_SUBMISSION = 4;

/** What a run that generates asks for. */
export interface DecodingPlan {
  /** Sequences that are decoded together. */
  readonly sequences: number;
  /** Steps that may be under way at a time. */
  readonly inFlight: number;
  /** Report the log-probability of each token and of this many likeliest ones. */
  readonly logprobs?: number | undefined;
}

/** What stands for a document: its last token's row, or the mean of all, behind the last layer norm. */
export type Pooling = "last" | "mean";

/** What a run that classifies documents asks for. */
export interface ClassifyingPlan {
  /** Rows of the score head; undefined to do without it. */
  readonly classes: number | undefined;
  readonly pooling: Pooling;
  /** Rows at most that the score head is applied to for one pack of documents. */
  readonly rows: number;
  /** The same for the output head, where labels are texts whose likelihoods are wanted; 0 where they are not. */
  readonly labelRows: number;
  /** Beginnings of each document that are classified, for which a mean takes room. */
  readonly lengths: number;
  /** Packs that may be under way at a time. */
  readonly inFlight: number;
}

export interface PlanOptions {
  /** Tokens of each sequence to hold keys and values for. */
  readonly context: number;
  readonly elem: Elem;
  /** Also room for the logits of many rows at a time and their likelihoods. */
  readonly scoring?: boolean;
  /** Tokens that go through the layers at a time, at most; the plan's choice when left out. */
  readonly chunkTokens?: number;
  /** Also room for generating; a run without it only reads. */
  readonly decoding?: DecodingPlan | undefined;
  /** Also room for packs of documents; the context, which they share, is in whole blocks of the cache then. */
  readonly classifying?: ClassifyingPlan | undefined;
  /** What is attended to; every key when left out. */
  readonly sparsity?: Sparsity;
  /** Also room for dense attention over the same tokens, to compare with; goes with `scoring`. */
  readonly comparing?: boolean;
  /** The output head is a table of its own. */
  readonly untiedHead?: boolean;
}

export interface PlannedBuffer {
  readonly label: string;
  readonly purpose: Purpose;
  readonly bytes: number;
}

export interface MemoryPlan {
  readonly context: number;
  readonly elem: Elem;
  /** Tokens that go through the layers at a time. */
  readonly chunkTokens: number;
  /** Rows whose logits are held at a time when a text is scored. */
  readonly logitRows: number;
  readonly kv: KvLayout;
  readonly activations: Readonly<Record<ActivationName, PlannedBuffer>>;
  /** Undefined without `decoding`. */
  readonly decoding: Readonly<Record<DecodingName, PlannedBuffer>> | undefined;
  /** Undefined without `comparing`. */
  readonly comparison: Readonly<Record<ComparisonName, PlannedBuffer>> | undefined;
  /** Undefined without `classifying`. */
  readonly classifying: Readonly<Record<ClassifyingName, PlannedBuffer>> | undefined;
  /** Everything, the activations among it. */
  readonly buffers: readonly PlannedBuffer[];
  readonly bytes: Readonly<Record<Purpose, number>>;
  readonly totalBytes: number;
  /** Growth with the context: keys and values of one token. */
  readonly bytesPerToken: number;
}

export type ActivationName =
  | "tokens" // [chunk, 3] u32: id, row of wpe, weight
  | "x" // [chunk, width] f32: the residual stream
  | "normed" // [chunk, width]
  | "qkv" // [chunk, 3, heads, headDim]
  | "attended" // [chunk, heads, headDim]
  | "hidden" // [chunk, inner]
  | "final" // [logitRows, width] f32, after ln_f; a row for each decoded sequence at least
  | "logits" // [logitRows, vocab] f32; the same
  | "targets" // [chunk] u32: the tokens that follow
  | "nll"; // [chunk] f32

export type ComparisonName =
  | "otherX" // [chunk, width] f32: the residual stream with dense attention
  | "otherLogits" // [logitRows, vocab] f32, from there
  | "divergences"; // [chunk] Divergence

export type ClassifyingName =
  | "segments" // [chunk, 4] u32: what each row of a pack attends to
  | "rowSegments" // [mostRowSegments] RowSegment: the rows that a head is applied to, and what a mean adds up
  | "normedRows" // [chunk, width] f32, after ln_f, for a mean
  | "pieces" // [mostPieces, width] f32: sums of at most KV_BLOCK rows each, for a mean
  | "pooled" // [max(rows, labelRows), width] f32: rows of the residual stream
  | "features" // [rows, width] f32: what a head is applied to
  | "classLogits"; // [rows, classes] f32

export type DecodingName =
  | "sequences" // [sequences] Sequence
  | "nextTokens" // [sequences, 3] u32, as tokens: what the next step runs
  | "places" // [context, 2] u32: row of wpe and weight of each position
  | "seen" // [sequences, vocab / 32] u32: a bit for each token that the repetition penalty applies to
  | "partialOut" // [sequences, mostSplits, heads, headDim] f32
  | "partialMl" // [sequences, mostSplits, heads, 2] f32
  | "results" // [STEPS_PER_SUBMISSION, sequences] Result: a submission copies its results before the next one runs
  | "logprobs"; // [STEPS_PER_SUBMISSION, sequences, 1 + logprobs, 2] u32

/** Bytes of what one row of a pack attends to. */
const PACK_SEGMENT_BYTES = 16;

/** Bytes that a step leaves for the host, the result of each sequence and then its log-probabilities. */
export function stepResultBytes(
  { sequences, logprobs }: DecodingPlan,
): { results: number; logprobs: number } {
  return {
    results: RESULT_BYTES * sequences,
    logprobs: logprobs === undefined ? 0 : logprobsBytes(logprobs) * sequences,
  };
}

/**
 * Bytes of the parameters of a decoding step's kernels: four products, attention, which differs by the heads that share a
 * buffer and, if the model's scale does, by layer, and the choice of blocks, which differs by the heads.
 */
export function decodeParametersBytes(
  { nLayer, nHead, scaleAttnByInverseLayerIdx }: GPT2Config,
  { pattern }: Sparsity = DENSE,
): number {
  const selections = pattern.kind === "topk" ? nHead : 0;
  return parametersBytes(4 + nHead * (scaleAttnByInverseLayerIdx ? nLayer : 1) + selections);
}

/**
 * Plans a run; whether it fits is `checkFits`' question.
 * @param limits decide how tables and heads are divided over buffers, and how large a chunk may be
 */
export function planMemory(config: GPT2Config, options: PlanOptions, limits: MemoryLimits): MemoryPlan {
  const { context, elem, scoring = false } = options;
  const most = mostBytes(limits);
  const sequences = options.comparing ? COMPARED_SEQUENCES : options.decoding?.sequences;
  const kv = kvLayout(kvShape(config, elem), context, most, sequences, options.sparsity);
  const chunkTokens = chooseChunk(config, options, limits);
  const isScored = scoring || (options.classifying?.labelRows ?? 0) > 0;
  const logitRows = isScored ? chooseLogitRows(config, chunkTokens, most) : 1;
  const activations = planActivations(config, options, {
    chunkTokens,
    logitRows,
    queryRows: queryRows(chunkTokens, kv, limits),
  });
  const comparison = options.comparing ? planComparison(config, { chunkTokens, logitRows }) : undefined;
  const decoding = options.decoding && planDecoding(config, options, options.decoding);
  const classifying = options.classifying &&
    planClassifying(config, options.classifying, { context, chunkTokens });
  const buffers = [
    ...planWeights(config, options, most),
    ...planCache(kv),
    ...Object.values(activations),
    ...Object.values(comparison ?? {}),
    ...Object.values(decoding ?? {}),
    ...Object.values(classifying ?? {}),
    ...planStaging(config, options, chunkTokens),
  ];
  const bytes: Record<Purpose, number> = { weights: 0, kv: 0, activations: 0, staging: 0 };
  for (const buffer of buffers) bytes[buffer.purpose] += buffer.bytes;
  return {
    context,
    elem,
    chunkTokens,
    logitRows,
    kv,
    activations,
    decoding,
    comparison,
    classifying,
    buffers,
    bytes,
    totalBytes: bytes.weights + bytes.kv + bytes.activations + bytes.staging,
    bytesPerToken: kvBytesPerToken(kv.shape, kv.sparsity),
  };
}

/** The chunk for a context, shorter where its widest rows of activations would not fit one binding. */
function chooseChunk(config: GPT2Config, options: PlanOptions, limits: MemoryLimits): number {
  const { context, elem } = options;
  const { width, headsWidth, inner } = paddedSizes(config);
  const widest = Math.max(4 * width, sizeOf(elem) * Math.max(3 * headsWidth, inner), TOKEN_BYTES);
  const longest = limits.isSoftware ? SOFTWARE_CHUNK_TOKENS : MOST_CHUNK_TOKENS;
  let chunk = Math.min(LEAST_CHUNK_TOKENS, longest);
  while (chunk < longest && chunk < context / 4) chunk *= 2;
  chunk = options.chunkTokens ?? chunk;
  const { sparsity = DENSE } = options;
  const cache = { shape: kvShape(config, elem), sparsity };
  const bytes = (tokens: number) =>
    Math.max(tokens * widest, queryRows(tokens, cache, limits) * 3 * headsWidth * sizeOf(elem));
  while (chunk > SMALLEST_CHUNK_TOKENS && bytes(chunk) > mostBytes(limits)) {
    chunk = Math.ceil(chunk / 2);
  }
  // Packs are in whole blocks, and so is their context.
  if (options.classifying) chunk = KV_BLOCK * Math.max(1, Math.floor(chunk / KV_BLOCK));
  return Math.min(context, chunk);
}

/** The largest buffer that a kernel can bind whole. */
function mostBytes({ maxBufferBytes, maxBindingBytes }: MemoryLimits): number {
  return Math.min(maxBufferBytes, maxBindingBytes);
}

function chooseLogitRows({ vocabSize }: GPT2Config, chunkTokens: number, most: number): number {
  return Math.max(1, Math.min(chunkTokens, Math.floor(Math.min(LOGITS_BYTES, most) / (4 * vocabSize))));
}

/**
 * Rows of the qkv buffer: the tensor-core kernel reads whole tiles of queries, and one that walks lists begins the second
 * tile anywhere behind the first row.
 */
function queryRows(
  chunkTokens: number,
  { shape: { elem, headDim4 }, sparsity }: Pick<KvLayout, "shape" | "sparsity">,
  limits: MemoryLimits,
): number {
  if (!limits.subgroupMatrix || !takesMatrices(elem, headDim4)) return chunkTokens;
  const before = hasLists(sparsity) ? KV_BLOCK - 1 : 0;
  return ATTENTION_ROWS * Math.ceil((chunkTokens + before) / ATTENTION_ROWS);
}

function planActivations(
  config: GPT2Config,
  { elem, scoring = false, decoding, classifying }: PlanOptions,
  { chunkTokens, logitRows, queryRows }: { chunkTokens: number; logitRows: number; queryRows: number },
): Readonly<Record<ActivationName, PlannedBuffer>> {
  const { width, headsWidth, inner } = paddedSizes(config);
  const sequences = decoding?.sequences ?? 1;
  const rows = Math.max(chunkTokens, sequences);
  const headRows = Math.max(logitRows, sequences);
  const stored = sizeOf(elem);
  const scored = Math.max(scoring ? chunkTokens : 1, classifying?.labelRows ?? 0);
  const buffer = (label: string, bytes: number) => planned(label, "activations", bytes);
  return {
    tokens: buffer("tokens", TOKEN_BYTES * chunkTokens),
    x: buffer("residual stream", 4 * rows * width),
    normed: buffer("layer norm", stored * chunkTokens * width),
    qkv: buffer("qkv", stored * Math.max(queryRows, sequences) * 3 * headsWidth),
    attended: buffer("attention", stored * chunkTokens * headsWidth),
    hidden: buffer("mlp", stored * rows * inner),
    final: buffer("final layer norm", 4 * headRows * width),
    logits: buffer("logits", 4 * headRows * config.vocabSize),
    targets: buffer("targets", 4 * scored),
    nll: buffer("negative log-likelihoods", 4 * scored),
  };
}

function planComparison(
  config: GPT2Config,
  { chunkTokens, logitRows }: { chunkTokens: number; logitRows: number },
): Readonly<Record<ComparisonName, PlannedBuffer>> {
  const buffer = (label: string, bytes: number) => planned(label, "activations", bytes);
  return {
    otherX: buffer("residual stream of dense attention", 4 * chunkTokens * paddedSizes(config).width),
    otherLogits: buffer("logits of dense attention", 4 * logitRows * config.vocabSize),
    divergences: buffer("divergences", DIVERGENCE_BYTES * chunkTokens),
  };
}

/** Sums that the means of a pack are made of, at most: those of whole blocks, and the rest of each document's beginnings. */
function mostPieces(
  { pooling, rows, lengths }: ClassifyingPlan,
  { context, chunkTokens }: { context: number; chunkTokens: number },
): number {
  return pooling === "mean" ? lengths * Math.ceil(Math.max(context, chunkTokens) / KV_BLOCK) + rows : 0;
}

function planClassifying(
  config: GPT2Config,
  plan: ClassifyingPlan,
  sizes: { context: number; chunkTokens: number },
): Readonly<Record<ClassifyingName, PlannedBuffer>> {
  const { classes = 0, pooling, rows, labelRows } = plan;
  const pooled = Math.max(rows, labelRows);
  const rowBytes = 4 * paddedSizes(config).width;
  const pieces = mostPieces(plan, sizes);
  const buffer = (label: string, bytes: number) => planned(label, "activations", bytes);
  return {
    segments: buffer("segments of a pack", PACK_SEGMENT_BYTES * sizes.chunkTokens),
    rowSegments: buffer("rows of interest", SEGMENT_BYTES * (pooled + pieces)),
    normedRows: buffer("layer norm of a pack", pooling === "mean" ? rowBytes * sizes.chunkTokens : 0),
    pieces: buffer("sums of rows", rowBytes * pieces),
    pooled: buffer("pooled rows", rowBytes * pooled),
    features: buffer("features", rowBytes * rows),
    classLogits: buffer("logits of classes", 4 * rows * classes),
  };
}

/** Bytes that come back of a pack: a logit for each class of each row, or a likelihood for each row. */
export function packResultBytes({ classes = 0, rows, labelRows }: ClassifyingPlan): number {
  return 4 * Math.max(rows * classes, labelRows);
}

function planDecoding(
  config: GPT2Config,
  { context }: PlanOptions,
  decoding: DecodingPlan,
): Readonly<Record<DecodingName, PlannedBuffer>> {
  const { sequences } = decoding;
  const slices = sequences * mostSplits(sequences);
  const step = stepResultBytes(decoding);
  const buffer = (label: string, bytes: number) => planned(label, "activations", bytes);
  return {
    sequences: buffer("sequences", SEQUENCE_BYTES * sequences),
    nextTokens: buffer("next tokens", TOKEN_BYTES * sequences),
    places: buffer("places of positions", PLACE_BYTES * context),
    seen: buffer("tokens seen", seenBytes(config.vocabSize) * sequences),
    partialOut: buffer("attention splits", 4 * slices * paddedSizes(config).headsWidth),
    partialMl: buffer("attention split statistics", 8 * slices * config.nHead),
    results: buffer("drawn tokens", step.results * STEPS_PER_SUBMISSION),
    logprobs: buffer("log-probabilities", step.logprobs * STEPS_PER_SUBMISSION),
  };
}

function planCache(kv: KvLayout): PlannedBuffer[] {
  const specs = [...tableSpecs(kv), ...listSpecs(kv), ...selectedSpecs(kv)];
  for (let layer = 0; layer < kv.shape.layers; layer++) {
    for (const range of kv.ranges) {
      const { k, v, summaries } = partSpecs(kv, layer, range);
      specs.push(k, v, ...(summaries ? [summaries] : []));
    }
  }
  return specs.map(({ label, bytes }) => planned(label, "kv", bytes));
}

function planStaging(
  config: GPT2Config,
  { scoring = false, comparing = false, sparsity, decoding, classifying }: PlanOptions,
  chunkTokens: number,
): PlannedBuffer[] {
  const { vocabSize } = config;
  const step = decoding && stepResultBytes(decoding);
  const resultBytes = step ? STEPS_PER_SUBMISSION * (step.results + step.logprobs) : 0;
  const results = planned("readback of drawn tokens", "staging", resultBytes);
  const nll = planned("readback of negative log-likelihoods", "staging", 4 * chunkTokens);
  const divergences = planned("readback of divergences", "staging", DIVERGENCE_BYTES * chunkTokens);
  return [
    ...Array.from({ length: UPLOAD_STAGES }, () => planned("uploads", "staging", UPLOAD_STAGE_BYTES)),
    planned("readback of logits", "staging", 4 * vocabSize),
    ...(scoring ? [nll, nll] : []),
    ...(comparing ? [divergences, divergences] : []),
    ...new Array<PlannedBuffer>(decoding?.inFlight ?? 0).fill(results),
    ...new Array<PlannedBuffer>(classifying?.inFlight ?? 0).fill(
      planned("readback of a pack", "staging", classifying ? packResultBytes(classifying) : 0),
    ),
    ...(decoding ? [planned("parameters", "staging", decodeParametersBytes(config, sparsity))] : []),
  ];
}

function planWeights(
  config: GPT2Config,
  { elem, untiedHead = false, classifying }: PlanOptions,
  most: number,
) {
  const { width, headsWidth, inner } = paddedSizes(config);
  const buffers: PlannedBuffer[] = [];
  const table = (name: string, rows: number) => {
    for (const piece of rowPieces(rows, width * sizeOf(elem), most)) {
      buffers.push(planned(pieceLabel(name, rows, piece), "weights", piece.rows * width * sizeOf(elem)));
    }
  };
  const vector = (name: string, size: number) => buffers.push(planned(name, "weights", 4 * size));
  const norm = (name: string) => {
    vector(`${name}.weight`, width);
    vector(`${name}.bias`, width);
  };
  const linear = (name: string, rows: number, columns: number) => {
    buffers.push(planned(`${name}.weight`, "weights", rows * columns * sizeOf(elem)));
    vector(`${name}.bias`, columns);
  };
  table("wte.weight", config.vocabSize);
  table("wpe.weight", config.nPositions);
  for (let i = 0; i < config.nLayer; i++) {
    norm(`h.${i}.ln_1`);
    linear(`h.${i}.attn.c_attn`, width, 3 * headsWidth);
    linear(`h.${i}.attn.c_proj`, headsWidth, width);
    norm(`h.${i}.ln_2`);
    linear(`h.${i}.mlp.c_fc`, width, inner);
    linear(`h.${i}.mlp.c_proj`, inner, width);
  }
  norm("ln_f");
  if (untiedHead) table("lm_head.weight", config.vocabSize);
  if (classifying?.classes !== undefined) table("score.weight", classifying.classes);
  return buffers;
}

/** Whole rows of a table in as few pieces as `most` bytes a buffer allow. */
export function rowPieces(rows: number, rowBytes: number, most: number): { first: number; rows: number }[] {
  const pieceRows = Math.max(1, Math.floor(most / rowBytes));
  return Array.from({ length: Math.ceil(rows / pieceRows) }, (_, i) => ({
    first: i * pieceRows,
    rows: Math.min(pieceRows, rows - i * pieceRows),
  }));
}

export function pieceLabel(name: string, rows: number, piece: { first: number; rows: number }): string {
  return piece.rows === rows ? name : `${name} rows ${piece.first} to ${piece.first + piece.rows - 1}`;
}

function planned(label: string, purpose: Purpose, bytes: number): PlannedBuffer {
  return { label, purpose, bytes: bufferBytes(bytes) };
}

/** Why a plan does not fit, in a sentence's end; undefined when it does. */
function misfit({ buffers, totalBytes, context }: MemoryPlan, limits: MemoryLimits): string | undefined {
  const most = mostBytes(limits);
  // Staging is copied from and to, never bound.
  const tooLarge = buffers.find(({ bytes, purpose }) => bytes > most && purpose !== "staging");
  if (tooLarge) {
    return `"${tooLarge.label}" takes ${
      formatBytes(tooLarge.bytes)
    } for ${context} tokens, this device binds at most ${formatBytes(most)}`;
  }
  if (limits.memoryBytes === undefined || totalBytes <= limits.memoryBytes) return undefined;
  return `it takes ${formatBytes(totalBytes)}, this device has ${formatBytes(limits.memoryBytes)}`;
}

/** Contexts beyond this are of no interest: `largestContext` searches up to here. */
const MOST_CONTEXT = 2 ** 30;

/**
 * The longest context that fits, in whole blocks of the cache.
 * @returns tokens, 0 when not even one block fits; may exceed the model's positions
 */
export function largestContext(
  config: GPT2Config,
  options: Omit<PlanOptions, "context">,
  limits: MemoryLimits,
): number {
  const fits = (blocks: number) => {
    const context = blocks * KV_BLOCK;
    return misfit(planMemory(config, { ...options, context }, limits), limits) === undefined;
  };
  let fitting = 0;
  let failing = MOST_CONTEXT / KV_BLOCK;
  while (failing - fitting > 1) {
    const middle = Math.floor((fitting + failing) / 2);
    if (fits(middle)) fitting = middle;
    else failing = middle;
  }
  return fitting * KV_BLOCK;
}

/** @throws DoesNotFitError naming the largest context that does fit, in each element type */
export function checkFits(
  config: GPT2Config,
  options: PlanOptions,
  plan: MemoryPlan,
  caps: MemoryLimits & Pick<Capabilities, "f16">,
): void {
  const why = misfit(plan, caps);
  if (why === undefined) return;
  throw new DoesNotFitError(
    `A context of ${options.context} tokens does not fit in ${options.elem}: ${why}`,
    {
      hint: contextHint(config, options, caps),
    },
  );
}

/** What to do when a run does not fit: the largest context by element type. */
export function contextHint(
  config: GPT2Config,
  options: Omit<PlanOptions, "context">,
  caps: MemoryLimits & Pick<Capabilities, "f16">,
): string {
  const { elem } = options;
  const largest = largestContext(config, options, caps);
  const inF16 = elem === "f32" && caps.f16 ? largestContext(config, { ...options, elem: "f16" }, caps) : 0;
  const other = inF16 > largest ? `\`--dtype f16\` for up to ${inF16}` : "";
  if (largest === 0) {
    return other
      ? `use ${other} tokens`
      : "the model itself is too large for this device: use another `--adapter`";
  }
  return `use \`--context ${largest}\`, the largest that fits in ${elem}` + (other ? `, or ${other}` : "");
}
