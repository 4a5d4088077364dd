/**
 * How far a run is from the recorded references, as rows of a table: what was compared, the largest error, and the
 * bound it is held to. The tests fail on the bounds, `scripts/accuracy.ts` prints the table; `docs/numerics.md` argues
 * them.
 */
import { readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { layerNormReference } from "../../src/kernels/layer_norm/reference.ts";
import { configFromSizes, type GPT2Config, readConfig } from "../../src/model/config.ts";
import { convertElements } from "../../src/model/float16.ts";
import { perplexity, scoreDocument, totalScore } from "../../src/model/scoring.ts";
import { tokensOf } from "../../src/model/token_source.ts";
import type { WeightSource } from "../../src/model/weight_source.ts";
import { Gpt2, type Gpt2Options } from "../../src/model/gpt2.ts";
import type { ClassifyingPlan } from "../../src/model/memory_plan.ts";
import { openCheckpoint } from "../../src/model/safetensors.ts";
import { syntheticPrompt, syntheticSource } from "../../src/model/synthetic.ts";
import { fmix32 } from "../../src/runtime/fmix32.ts";
import type { Gpu } from "../../src/runtime/device.ts";
import { Readback } from "../../src/runtime/buffers.ts";
import type { Elem } from "../../src/runtime/kernel.ts";
import type { Tap } from "../../src/runtime/pass.ts";
import {
  type ClassifiedLength,
  classifyDrift,
  loadClassify,
  loadGreedy,
  loadPerplexity,
  loadPrompt,
  loadShort,
  loadSynthetic,
  type RecordedLength,
  type SyntheticCase,
  type SyntheticGolden,
} from "./golden.ts";
import { DECODING } from "./model.ts";

/** One comparison: passes when `error <= bound`. */
export interface AccuracyRow {
  readonly what: string;
  readonly error: number;
  readonly bound: number;
}

const MODEL = join(dirname(fileURLToPath(import.meta.url)), "../../weights/classics-16k");

/** A drift of PyTorch's own half precision run, measured against its float32 run: largest absolute differences. */
interface HalfPrecisionDrift {
  readonly short: {
    readonly embedding: number;
    readonly blocks: readonly number[];
    readonly lnF: number;
    readonly logits: number;
  };
  readonly prompt: Readonly<Record<`${RecordedLength}`, { readonly logits: number; readonly nll: number }>>;
  readonly classify: Readonly<Record<`${ClassifiedLength}`, number>>;
}

function loadHalfPrecisionDrift(): HalfPrecisionDrift {
  return JSON.parse(
    readFileSync(join(dirname(fileURLToPath(import.meta.url)), "../golden/half_precision.json"), "utf8"),
  );
}

/**
 * The rule for every bound: our distance to the truth is at most twice that of the plain algorithm in the same
 * precision.
 *
 * In f32 the truth is the float64 run, and `f32Drift` is how far PyTorch's float32 run, our reference, is from it.
 * PyTorch adds in at least 16 partial sums, a plain loop in one; rounding errors grow with the square root of a sum's
 * length, so the plain algorithm is off by 4 drifts. Twice that, and one for the reference's own error, makes 9; and
 * one unit in the last place of the largest value, because both results are stored in f32.
 *
 * In f16 the plain algorithm is PyTorch's own float16 run, `f16Drift` away; the reference's error does not count
 * beside it.
 */
function boundOf(elem: Elem, f32Drift: number, f16Drift: number, largestValue: number): number {
  return elem === "f32" ? 9 * f32Drift + 2 ** -23 * largestValue : 2 * f16Drift;
}

function magnitude(values: ArrayLike<number>): number {
  return largest(Array.from(values, Math.abs));
}

export function maxAbsDifference(got: ArrayLike<number>, wanted: ArrayLike<number>): number {
  if (got.length < wanted.length) return NaN;
  let largest = 0;
  for (let i = 0; i < wanted.length; i++) {
    const error = Math.abs(got[i]! - wanted[i]!);
    // A NaN anywhere is the result: it compares false with every bound.
    if (Number.isNaN(error)) return NaN;
    if (error > largest) largest = error;
  }
  return largest;
}

/** Runs `use` with classics-16k on the device. */
export async function withClassics<T>(
  gpu: Gpu,
  elem: Elem,
  context: number,
  use: (model: Gpt2) => Promise<T>,
  options: Partial<Gpt2Options> = {},
): Promise<T> {
  const source = await openCheckpoint(MODEL);
  try {
    const model = await Gpt2.load(gpu, source, await readConfig(MODEL), {
      context,
      elem,
      decoding: DECODING,
      ...options,
    });
    try {
      return await use(model);
    } finally {
      model.destroy();
    }
  } finally {
    await source.close();
  }
}

/** Collects f32 tensors that the graph shows on its way. */
export class TensorTap {
  readonly #gpu: Gpu;
  readonly #bytes: number;
  readonly #readbacks = new Map<string, Readback>();

  /** @param bytes how much of each tensor to keep */
  constructor(gpu: Gpu, bytes: number) {
    this.#gpu = gpu;
    this.#bytes = bytes;
  }

  readonly tap: Tap = (name, buffer, recorder) => {
    const bytes = Math.min(this.#bytes, buffer.byteLength);
    const readback = new Readback(this.#gpu, name, bytes);
    recorder.copy(buffer, 0, readback, 0, bytes);
    this.#readbacks.set(name, readback);
  };

  async read(): Promise<Map<string, Float32Array>> {
    const tensors = new Map<string, Float32Array>();
    for (const [name, readback] of this.#readbacks) {
      tensors.set(name, new Float32Array(await readback.read()));
      readback.destroy();
    }
    return tensors;
  }
}

/** The residual stream after the embedding and every block, and the logits, of the 48-token prompt. */
export async function shortAccuracy(gpu: Gpu, elem: Elem): Promise<AccuracyRow[]> {
  const golden = loadShort();
  const drift = loadHalfPrecisionDrift().short;
  const f32 = golden.maxAbsDiffToFloat64;
  return await withClassics(gpu, elem, golden.inputIds.length, async (model) => {
    const taps = new TensorTap(gpu, golden.embedding.byteLength);
    const logits = new Map<number, Float32Array>();
    await model.prefill(golden.inputIds, {
      tap: taps.tap,
      onLogits: (token, row) => logits.set(token, row),
    });
    const got = await taps.read();
    const row = (what: string, wanted: Float32Array, f32Drift: number, f16Drift: number): AccuracyRow => ({
      what: `48 tokens, ${what}`,
      error: maxAbsDifference(got.get(what)!, wanted),
      bound: boundOf(elem, f32Drift, f16Drift, magnitude(wanted)),
    });
    const last = golden.lnF.subarray(-model.config.nEmbd);
    return [
      row("embedding", golden.embedding, f32.embedding, drift.embedding),
      ...golden.blocks.map((block, i) => row(`block_${i}`, block, f32.blocks[i]!, drift.blocks[i]!)),
      row("ln_f", last, f32.lnF, drift.lnF),
      {
        what: "48 tokens, logits",
        error: largest([...golden.logits].map(([p, wanted]) => maxAbsDifference(logits.get(p)!, wanted))),
        bound: boundOf(elem, f32.logits, drift.logits, largest([...golden.logits.values()].map(magnitude))),
      },
    ];
  }, { scoring: true });
}

/**
 * Logits rows and the NLL of every token of a long prompt, all computed on the GPU.
 * @param tokens of the recorded ones to run; the last of them is one whose logits are recorded
 */
export async function promptAccuracy(
  gpu: Gpu,
  elem: Elem,
  recorded: RecordedLength,
  tokens: number = recorded,
): Promise<AccuracyRow[]> {
  const golden = loadPrompt(recorded);
  const goldenNll = golden.nll.subarray(0, tokens - 1);
  const drift = loadHalfPrecisionDrift().prompt[`${recorded}`];
  return await withClassics(gpu, elem, tokens, async (model) => {
    const errors: number[] = [];
    const nll = new Float32Array(tokens - 1);
    const lastRow = await model.prefill(golden.inputIds.subarray(0, tokens), {
      onLogits: (token, row) => errors.push(maxAbsDifference(row, golden.logits.get(token)!)),
      wantsLogits: (token) => golden.logits.has(token),
      onNll: (first, values) => nll.set(values, first - 1),
    });
    errors.push(maxAbsDifference(lastRow, golden.logits.get(tokens - 1)!));
    const largestLogit = largest([...golden.logits.values()].map(magnitude));
    const logitBound = boundOf(elem, golden.maxAbsLogitDiffToFloat64, drift.logits, largestLogit);
    return [
      { what: `${tokens} tokens, logits`, error: largest(errors), bound: logitBound },
      {
        what: `${tokens} tokens, NLL of each token`,
        error: maxAbsDifference(nll, goldenNll),
        // An NLL is a logit less a log-sum-exp, which moves by no more than the largest logit error.
        bound: elem === "f32" ? 2 * logitBound : 2 * drift.nll,
      },
      {
        what: `${tokens} tokens, mean NLL, relative`,
        error: Math.abs(mean(nll) / (tokens === recorded ? golden.meanNll : mean(goldenNll)) - 1),
        bound: elem === "f32" ? 1e-5 : 1e-3,
      },
    ];
  }, { scoring: true });
}

function mean(values: Float32Array): number {
  return values.reduce((sum, value) => sum + value, 0) / values.length;
}

/** Room for 32 documents of several lengths in a pack, and for a few labels as texts. */
export const CLASSIFYING: ClassifyingPlan = {
  classes: 25,
  pooling: "last",
  rows: 128,
  labelRows: 512,
  lengths: 4,
  inFlight: 2,
};

/** How many of the documents a length of them is classified right by, here and by the recorded logits. */
export interface ClassifyAccuracy {
  readonly tokens: ClassifiedLength;
  readonly right: number;
  readonly recorded: number;
  readonly documents: number;
}

/** Classification logits of documents at several lengths, each document run once, and how many labels are right. */
export async function classifyAccuracy(
  gpu: Gpu,
  elem: Elem,
  lengths: readonly ClassifiedLength[],
  most = Infinity,
): Promise<{ rows: AccuracyRow[]; right: ClassifyAccuracy[] }> {
  const documents = loadClassify().slice(0, most);
  const drift = loadHalfPrecisionDrift().classify;
  const longest = lengths.at(-1)!;
  return await withClassics(gpu, elem, longest, async (model) => {
    const classifier = await model.classifier();
    const got: Float32Array[][] = [];
    for (const { inputIds } of documents) {
      const ids = Uint32Array.from(inputIds.subarray(0, longest));
      got.push(await (await classifier.classify([{ ids, lengths }])).result);
    }
    const largestIn = (row: ArrayLike<number>) => Array.from(row).indexOf(largest(Array.from(row)));
    const rows = lengths.map((tokens, i) => ({
      what: `${tokens} tokens, classification logits of ${documents.length} documents`,
      error: largest(documents.map(({ logits }, d) => maxAbsDifference(got[d]![i]!, logits[tokens]))),
      bound: boundOf(
        elem,
        classifyDrift(tokens),
        drift[`${tokens}`],
        largest(documents.map(({ logits }) => magnitude(logits[tokens]))),
      ),
    }));
    const right = lengths.map((tokens, i) => ({
      tokens,
      right: documents.filter(({ label }, d) => largestIn(got[d]![i]!) === label).length,
      recorded: documents.filter(({ label, logits }) => largestIn(logits[tokens]) === label).length,
      documents: documents.length,
    }));
    return { rows, right };
  }, { decoding: undefined, classifying: CLASSIFYING });
}

/** Largest relative difference to a recorded perplexity. */
export const PERPLEXITY_BOUNDS: Readonly<Record<Elem, number>> = { f32: 0.002, f16: 0.005 };

export interface PerplexityRow {
  readonly elem: Elem;
  readonly context: RecordedLength;
  readonly books: number;
  readonly perplexity: number;
  readonly recorded: number;
  /** Relative. */
  readonly error: number;
  readonly tokensPerSecond: number;
}

/** Perplexity of the first recorded books, cut into windows of `context` tokens, as `score` computes it. */
export async function perplexityAccuracy(
  gpu: Gpu,
  elem: Elem,
  context: RecordedLength,
  books: number,
): Promise<PerplexityRow> {
  const windows = loadPerplexity().windows.slice(0, books);
  return await withClassics(gpu, elem, context, async (model) => {
    const starting = performance.now();
    const scores = [];
    for (const { inputIds } of windows) {
      scores.push(await scoreDocument(model, tokensOf(inputIds), { window: context }));
    }
    const total = totalScore(scores);
    const recorded = Math.exp(windows.reduce((sum, { sumNll }) => sum + sumNll[context], 0) / total.scored);
    return {
      elem,
      context,
      books: windows.length,
      perplexity: perplexity(total)!,
      recorded,
      error: Math.abs(perplexity(total)! / recorded - 1),
      tokensPerSecond: 1000 * total.tokens / (performance.now() - starting),
    };
  }, { scoring: true });
}

/** Result of following the recorded greedy continuations. */
export interface GreedyResult {
  readonly prompts: number;
  readonly steps: number;
  /** Steps where our choice was the recorded runner-up, allowed because the reference's gap is below the tolerance. */
  readonly closeCalls: number;
  /** The largest gap at which our choice differed; an error when it is not below the tolerance. */
  readonly worstGap: number;
  readonly tokens: readonly (readonly number[])[];
}

/**
 * Decodes the recorded greedy prompts up to `maxPromptTokens`, following the recorded tokens, so that every step is
 * compared even behind a close call.
 */
export async function greedyAccuracy(gpu: Gpu, elem: Elem, maxPromptTokens: number): Promise<GreedyResult> {
  const cases = loadGreedy().filter((c) => c.promptIds.length <= maxPromptTokens);
  const context = Math.max(...cases.map((c) => c.promptIds.length + c.greedyIds.length));
  return await withClassics(gpu, elem, context, async (model) => {
    let steps = 0;
    let closeCalls = 0;
    let worstGap = 0;
    const tokens: number[][] = [];
    for (const golden of cases) {
      model.truncate(0);
      let logits = await model.prefill(golden.promptIds);
      const chosen: number[] = [];
      for (let step = 0; step < golden.greedyIds.length; step++) {
        const id = argmax(logits);
        chosen.push(id);
        steps++;
        if (id !== golden.greedyIds[step]) {
          closeCalls++;
          worstGap = Math.max(worstGap, id === golden.secondIds[step] ? golden.gap[step]! : Infinity);
        }
        if (step + 1 < golden.greedyIds.length) logits = await model.decodeStep(golden.greedyIds[step]!);
      }
      tokens.push(chosen);
    }
    return { prompts: cases.length, steps, closeCalls, worstGap, tokens };
  });
}

/** Largest difference of two logits rows that still lets either of two tokens win: twice the bound on one logit. */
export function greedyGapTolerance(elem: Elem): number {
  const golden = loadPrompt(4096);
  const largestLogit = largest([...golden.logits.values()].map(magnitude));
  const drift = loadHalfPrecisionDrift().prompt["4096"].logits;
  return 2 * boundOf(elem, golden.maxAbsLogitDiffToFloat64, drift, largestLogit);
}

/** The residual stream of a prompt of many chunks: whole after the last block, single rows after the others. */
class ResidualTap {
  readonly #gpu: Gpu;
  readonly #config: GPT2Config;
  readonly #chunkTokens: number;
  readonly #tokens: number;
  readonly #positions: readonly number[];
  readonly #chunks = new Map<string, number>();
  readonly #parts: { name: string; position: number; readback: Readback }[] = [];

  constructor(
    gpu: Gpu,
    config: GPT2Config,
    of: { chunkTokens: number; tokens: number; positions: readonly number[] },
  ) {
    this.#gpu = gpu;
    this.#config = config;
    this.#chunkTokens = of.chunkTokens;
    this.#tokens = of.tokens;
    this.#positions = of.positions;
  }

  readonly tap: Tap = (name, buffer, recorder) => {
    if (!name.startsWith("block_")) return;
    const first = (this.#chunks.get(name) ?? 0) * this.#chunkTokens;
    this.#chunks.set(name, first / this.#chunkTokens + 1);
    const rows = Math.min(this.#chunkTokens, this.#tokens - first);
    const keep = (position: number, count: number) => {
      const bytes = 4 * count * this.#config.nEmbd;
      const readback = new Readback(this.#gpu, name, bytes);
      recorder.copy(buffer, 4 * (position - first) * this.#config.nEmbd, readback, 0, bytes);
      this.#parts.push({ name, position, readback });
    };
    if (name === `block_${this.#config.nLayer - 1}`) keep(first, rows);
    else {
      for (const position of this.#positions) {
        if (position >= first && position < first + rows) keep(position, 1);
      }
    }
  };

  /** Rows by block and position, and everything after the last block, `[tokens, width]`. */
  async read(): Promise<{ row(block: number, position: number): Float32Array; last: Float32Array }> {
    const { nEmbd, nLayer } = this.#config;
    const rows = new Map<string, Float32Array>();
    const last = new Float32Array(this.#tokens * nEmbd);
    for (const { name, position, readback } of this.#parts) {
      const values = new Float32Array(await readback.read());
      readback.destroy();
      if (name === `block_${nLayer - 1}`) last.set(values, position * nEmbd);
      else rows.set(`${name} ${position}`, values);
    }
    const row = (block: number, position: number) =>
      block === nLayer - 1
        ? last.subarray(position * nEmbd, (position + 1) * nEmbd)
        : rows.get(`block_${block} ${position}`)!;
    return { row, last };
  }
}

/** A published shape with weights made from integers, against logits and hidden states recorded on a GPU in float32. */
export async function syntheticAccuracy(gpu: Gpu, elem: Elem, shape: SyntheticCase): Promise<AccuracyRow[]> {
  const golden = loadSynthetic(shape);
  const config = configFromSizes(golden.config);
  const { vocabSize, nEmbd, nLayer } = config;
  const source = syntheticSource(config);
  const model = await Gpt2.load(gpu, source, config, { context: golden.tokens, elem, scoring: true });
  try {
    const taps = new ResidualTap(gpu, config, { ...golden, chunkTokens: model.plan.chunkTokens });
    const rows = new Map<number, Float32Array>();
    await model.prefill(syntheticPrompt(golden.tokens, vocabSize), {
      tap: taps.tap,
      onLogits: (token, row) => rows.set(token, row),
      wantsLogits: (token) => golden.positions.includes(token),
    });
    const residual = await taps.read();
    const errors = { logits: 0, logsumexp: 0, argmax: 0, rms: 0 };
    golden.rows.forEach(({ position, logsumexp, topIds, topLogits, columns }) => {
      const row = rows.get(position)!;
      const top = maxAbsDifference(topIds.map((id) => row[id]!), topLogits);
      const sampled = maxAbsDifference(golden.vocabColumns.map((id) => row[id]!), columns);
      errors.logits = largest([errors.logits, top, sampled]);
      errors.logsumexp = largest([errors.logsumexp, Math.abs(logSumExp(row) - logsumexp)]);
      if (argmax(row) !== topIds[0] && topLogits[0]! - topLogits[1]! > errors.logits) errors.argmax++;
    });
    golden.positions.forEach((position, p) => {
      for (let block = 0; block < nLayer; block++) {
        const x = residual.row(block, position);
        const rms = Math.sqrt(x.reduce((sum, value) => sum + value * value, 0) / nEmbd);
        errors.rms = largest([errors.rms, Math.abs(rms / golden.afterBlock.rms[p]![block]! - 1)]);
      }
    });
    const { maxAbsLogitDiff, maxAbsHiddenDiff, hiddenRms, logitStd } = golden.float64Check;
    const drift = golden.halfPrecisionDrift.float16.maxAbsLogitDiff;
    const bound = boundOf(elem, maxAbsLogitDiff, drift, magnitude(golden.rows[0]!.topLogits));
    // Layer norm makes a relative error of the residual stream an absolute one of the hidden state, and the head makes
    // that one of the logits, both in units of their spread; an average over many elements is off by no more than they.
    const relativeBound = elem === "f32" ? 9 * maxAbsHiddenDiff / hiddenRms : 2 * drift / logitStd;
    const final = await finalHidden(residual.last, source, config);
    return [
      { what: `${shape}, logits`, error: errors.logits, bound },
      { what: `${shape}, log-sum-exp`, error: errors.logsumexp, bound },
      { what: `${shape}, rows with another clear argmax`, error: errors.argmax, bound: 0 },
      { what: `${shape}, RMS after each block, relative`, error: errors.rms, bound: relativeBound },
      {
        what: `${shape}, checksums of all hidden states, relative`,
        error: checksumError(final, golden.finalHidden),
        bound: relativeBound,
      },
    ];
  } finally {
    model.destroy();
    await source.close();
  }
}

/** The state after ln_f of every position, from the residual stream behind the last block. */
async function finalHidden(x: Float32Array, source: WeightSource, config: GPT2Config): Promise<Float64Array> {
  const vector = async (name: string) => {
    const bytes = new Uint8Array(source.tensors.get(name)!.byteLength);
    await source.read(name, 0, bytes);
    return new Float32Array(convertElements(bytes, "F16", "f32").bytes.slice().buffer);
  };
  const [gain, shift] = [await vector("transformer.ln_f.weight"), await vector("transformer.ln_f.bias")];
  return layerNormReference(x, gain, shift, config.nEmbd, config.layerNormEpsilon);
}

/**
 * Largest difference to the recorded sums over 64 equal runs of positions, as a share of a run's sum of magnitudes: an
 * error in any one row shows.
 */
function checksumError(hidden: Float64Array, golden: SyntheticGolden["finalHidden"]): number {
  const size = hidden.length / golden.sum.length;
  const errors = golden.sum.map((sum, run) => {
    const totals = { sum: 0, abs: 0, signed: 0 };
    for (let j = 0; j < size; j++) {
      const value = hidden[run * size + j]!;
      totals.sum += value;
      totals.abs += Math.abs(value);
      totals.signed += value * (1 - 2 * (fmix32((j ^ 0x2545f491) >>> 0) & 1));
    }
    const differences = [
      totals.sum - sum,
      totals.abs - golden.sumAbs[run]!,
      totals.signed - golden.signed[run]!,
    ];
    return magnitude(differences) / golden.sumAbs[run]!;
  });
  return largest(errors);
}

/** The largest of some magnitudes; NaN if one of them is. */
function largest(values: readonly number[]): number {
  return values.reduce((a, b) => Math.max(a, b), 0);
}

export function argmax(row: Float32Array): number {
  let best = 0;
  for (let i = 1; i < row.length; i++) if (row[i]! > row[best]!) best = i;
  return best;
}

function logSumExp(row: Float32Array): number {
  const max = row[argmax(row)]!;
  let sum = 0;
  for (const value of row) sum += Math.exp(value - max);
  return max + Math.log(sum);
}
