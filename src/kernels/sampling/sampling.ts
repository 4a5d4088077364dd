import { type Grid, type Kernel, type Op, op, type ShaderFile, type Work } from "../../runtime/kernel.ts";
import type { PositionPlace } from "../embedding/embedding.ts";
import { sequenceStruct, tripsHelper, unrollConst, workgroupSum } from "../shared/shared.ts";
import bindingsText from "./bindings.wgsl" with { type: "text" };
import drawText from "./draw.wgsl" with { type: "text" };
import greedyText from "./greedy.wgsl" with { type: "text" };
import logprobsText from "./logprobs.wgsl" with { type: "text" };
import penaltyText from "./penalty.wgsl" with { type: "text" };
import philoxText from "./philox.wgsl" with { type: "text" };
import recordText from "./record.wgsl" with { type: "text" };
import resultText from "./result.wgsl" with { type: "text" };
import scanText from "./scan.wgsl" with { type: "text" };

export interface SamplingVariant {
  /** Lanes of a sequence's workgroup, a multiple of 32, at least 64: two groups. */
  readonly lanes: number;
  /** Logits that a lane loads at a time. */
  readonly loads: number;
  /** See `shared/trips.wgsl`. */
  readonly unroll: boolean;
}

/** Where rows of logits, and the results, belong. */
interface SamplingPlace {
  /** Below 2^24. */
  readonly vocab: number;
  /** Sequences that there are. */
  readonly sequences: number;
  /** Those of this dispatch: row r of the logits is of sequence `firstSequence + r`. */
  readonly firstSequence: number;
  readonly rows: number;
  /** Which of the results, `[slots, sequences]`, this step writes. */
  readonly slot: number;
}

/** What the options mean: `src/model/sampling.ts`. */
export interface DrawProblem extends SamplingPlace {
  /** Greedy kernels ignore it, and the filters; the others need it above 0. */
  readonly temperature: number;
  readonly topK: number;
  readonly topP: number;
  readonly minP: number;
  readonly repeatPenalty: number;
  /** Positions that `places` holds: a sequence's length stays below. */
  readonly capacity: number;
}

export interface LogprobsProblem extends SamplingPlace {
  /** How many of the likeliest tokens are listed. */
  readonly top: number;
}

const file = (name: string, text: string): ShaderFile => ({ file: `sampling/${name}.wgsl`, text });

const scan = file("scan", scanText);
const result = file("result", resultText);
const shared = [file("bindings", bindingsText), result, scan, file("penalty", penaltyText)];

const drawing = {
  bindings: {
    logits: "read",
    seen: "read_write",
    sequences: "read_write",
    places: "read",
    tokens: "read_write",
    results: "read_write",
  },
  header: (v: SamplingVariant) => header(v),
  workgroupInvocations: (v: SamplingVariant) => v.lanes,
  grid: (_: unknown, p: DrawProblem): Grid => [p.rows, 1, 1],
  // One reading of the logits, however many passes over them the filters take.
  work: (_: unknown, { rows, vocab, repeatPenalty }: DrawProblem): Work => ({
    bytes: rows * (4 * vocab + (repeatPenalty === 1 ? 0 : seenBytes(vocab)) + RESULT_BYTES),
    flops: 0,
  }),
} as const;

const drawingParams = {
  vocab: "u32",
  repeat_penalty: "f32",
  inverse_penalty: "f32",
  capacity: "u32",
  first_sequence: "u32",
  sequence_count: "u32",
  slot: "u32",
  one: "u32",
} as const;

function header({ lanes, loads, unroll }: SamplingVariant) {
  return { aliases: {}, consts: { LANES: lanes, LOADS: loads, ...unrollConst(unroll) } };
}

/** Bytes of `lane_words`. */
function scanBytes({ lanes }: SamplingVariant): number {
  return 16 * lanes;
}

function drawingValues(p: DrawProblem) {
  return {
    vocab: p.vocab,
    repeat_penalty: p.repeatPenalty,
    inverse_penalty: 1 / p.repeatPenalty,
    capacity: p.capacity,
    first_sequence: p.firstSequence,
    sequence_count: p.sequences,
    slot: p.slot,
    one: 1,
  };
}

/** The largest score of each row, the lowest id of equals; whatever draws counts its sequence on. */
export const greedy: Kernel<SamplingVariant, DrawProblem> = {
  name: "sampling/greedy",
  sources: [...shared, file("record", recordText), file("greedy", greedyText), sequenceStruct, tripsHelper],
  ...drawing,
  params: drawingParams,
  workgroupBytes: scanBytes,
  values: (_, p) => drawingValues(p),
};

const LARGEST = 2 ** 127 * (2 - 2 ** -23);
const SMALLEST = 2 ** -126;

/** `x` as a finite f32 that no device takes for 0. */
function normal(x: number): number {
  return Math.min(Math.max(x, SMALLEST), LARGEST);
}

const LIST = 256;

/** A token of each row, drawn at random from what the filters leave. */
export const draw: Kernel<SamplingVariant, DrawProblem> = {
  name: "sampling/draw",
  sources: [
    ...shared,
    file("record", recordText),
    file("draw", drawText),
    file("philox", philoxText),
    sequenceStruct,
    tripsHelper,
  ],
  ...drawing,
  params: {
    ...drawingParams,
    inverse_temperature: "f32",
    top_k: "u32",
    top_p: "f32",
    top_p_depth: "f32",
    min_p_distance: "f32",
  },
  workgroupBytes: (v) =>
    scanBytes(v) +
    16 * Math.ceil((v.lanes + v.lanes / 32) / 4) + // sums
    16 + // picked
    16 + // random
    16 + // last_kept
    3 * 4 * LIST, // list_scores, list_ids, list_weights
  values: (_, p) => ({
    ...drawingValues(p),
    inverse_temperature: normal(1 / p.temperature),
    top_k: p.topK > 0 ? Math.min(p.topK, p.vocab) : p.vocab,
    top_p: p.topP,
    // Tokens further below the largest have less than 1 / e of the weight that top-p leaves out, all of them together.
    top_p_depth: normal(p.temperature * (Math.log(p.vocab / Math.max(1 - p.topP, 2 ** -24)) + 1)),
    // A token of minP times the largest weight has a score that far above the largest.
    min_p_distance: Math.max(p.temperature * Math.log(p.minP), -LARGEST),
  }),
};

/** Log-probabilities of the drawn tokens and of the likeliest: after `greedy` or `draw`, whose results it reads. */
export const logprobs: Kernel<SamplingVariant, LogprobsProblem> = {
  name: "sampling/logprobs",
  sources: [result, scan, file("logprobs", logprobsText), workgroupSum, tripsHelper],
  bindings: { logits: "read", results: "read", logprobs: "read_write" },
  params: {
    vocab: "u32",
    first_sequence: "u32",
    sequence_count: "u32",
    slot: "u32",
    top: "u32",
    one: "u32",
  },
  header,
  workgroupBytes: (v) => scanBytes(v) + 4 * v.lanes, // lane_values
  workgroupInvocations: (v) => v.lanes,
  values: (_, p) => ({
    vocab: p.vocab,
    first_sequence: p.firstSequence,
    sequence_count: p.sequences,
    slot: p.slot,
    top: p.top,
    one: 1,
  }),
  grid: (_, p) => [p.rows, 1, 1],
  work: (_, p) => ({ bytes: p.rows * (4 * p.vocab + logprobsBytes(p.top)), flops: 0 }),
};

/** A row is read by one multiprocessor, as fast as it has loads under way; on software adapters a barrier costs more. */
function variants(unroll: boolean): SamplingVariant[] {
  return unroll
    ? [{ lanes: 1024, loads: 8, unroll }, { lanes: 256, loads: 8, unroll }]
    : [{ lanes: 64, loads: 1, unroll }];
}

export function greedyCandidates(unroll: boolean): Op<DrawProblem>[] {
  return variants(unroll).map((v) => op(greedy, v));
}

export function drawCandidates(unroll: boolean): Op<DrawProblem>[] {
  return variants(unroll).map((v) => op(draw, v));
}

export function logprobsCandidates(unroll: boolean): Op<LogprobsProblem>[] {
  return variants(unroll).map((v) => op(logprobs, v));
}

/** Bytes of what says which tokens of one sequence the repetition penalty applies to. */
export function seenBytes(vocab: number): number {
  return 4 * Math.ceil(vocab / 32);
}

/** `seen` of one sequence; ids outside the vocabulary are left out, ids may repeat. */
export function packSeen(ids: ArrayLike<number>, vocab: number): Uint32Array<ArrayBuffer> {
  const words = new Uint32Array(Math.ceil(vocab / 32));
  for (let i = 0; i < ids.length; i++) {
    const id = ids[i]!;
    if (id < vocab) words[id >>> 5]! |= 1 << (id & 31);
  }
  return words;
}

/** Bytes of one entry of `places`. */
export const PLACE_BYTES = 8;

/** `places`: where the embedding of each position lies. */
export function packPlaces(places: readonly PositionPlace[]): DataView<ArrayBuffer> {
  const view = new DataView(new ArrayBuffer(PLACE_BYTES * places.length));
  places.forEach(({ place, weight }, position) => {
    view.setUint32(PLACE_BYTES * position, place, true);
    view.setFloat32(PLACE_BYTES * position + 4, weight, true);
  });
  return view;
}

/** Bytes of one entry of `results`. */
export const RESULT_BYTES = 12;

/** What makes logits useless, by the number that the kernels give it. */
const PROBLEMS = [undefined, "contain NaN", "contain infinity", "are all -infinity"] as const;

/** A drawn token; 0 when there is a problem, and then `at` is the first token id at which the logits have it. */
export interface Result {
  readonly id: number;
  readonly problem: typeof PROBLEMS[number];
  readonly at: number;
}

/** The result at the beginning of `view`. */
export function unpackResult(view: DataView): Result {
  return {
    id: view.getUint32(0, true),
    problem: PROBLEMS[view.getUint32(4, true)],
    at: view.getUint32(8, true),
  };
}

const LOGPROB_BYTES = 8;

/** Bytes of one sequence's log-probabilities: of the drawn token, and of the `top` likeliest. */
export function logprobsBytes(top: number): number {
  return LOGPROB_BYTES * (1 + top);
}

/** Stands for the tokens that a list is longer than the vocabulary by. */
const NO_TOKEN = 2 ** 32 - 1;

/** One sequence's log-probabilities (natural logarithms): the drawn token, then the likeliest in decreasing order. */
export function unpackLogprobs(view: DataView): { readonly id: number; readonly logprob: number }[] {
  const entries = Array.from({ length: view.byteLength / LOGPROB_BYTES }, (_, i) => ({
    id: view.getUint32(LOGPROB_BYTES * i, true),
    logprob: view.getFloat32(LOGPROB_BYTES * i + 4, true),
  }));
  return entries.filter(({ id }) => id !== NO_TOKEN);
}
