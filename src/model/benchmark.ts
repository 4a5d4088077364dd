/**
 * How fast a model's parts run on a device: kernels alone by the GPU's clock, whole runs by the wall's. Inputs are random,
 * and a kernel's result is compared with another kernel's on the same inputs before its time counts.
 */
import { copyBytes } from "../kernels/copy/copy.ts";
import { ATTENTION_ROWS, type FlashAttentionProblem } from "../kernels/flash_attention/flash_attention.ts";
import {
  candidates,
  type ChosenKernels,
  type KernelShape,
  type KvView,
  matmulRole,
  type Role,
} from "../kernels/index.ts";
import type { Epilogue, MatmulProblem } from "../kernels/matmul/matmul.ts";
import {
  FACTOR_BYTES,
  fmaPeak,
  fmaWork,
  subgroupMatrixPeak,
  subgroupMatrixWork,
} from "../kernels/peak/peak.ts";
import { type HeadRange, KV_BLOCK } from "../kernels/shared/shared.ts";
import {
  scoreBytes,
  scoreRanges,
  STANDARD_ATTENTION,
} from "../kernels/standard_attention/standard_attention.ts";
import { attendedByLists } from "../kvcache/attended.ts";
import { packLists } from "../kvcache/block_lists.ts";
import { KvCache } from "../kvcache/cache.ts";
import { kvLayout } from "../kvcache/layout.ts";
import { type BlockLists, density } from "../kvcache/patterns.ts";
import { hasLists, modelLists, sparsityDensity } from "../kvcache/sparsity.ts";
import { allocate, download, formatBytes, type GpuBuffer, upload } from "../runtime/buffers.ts";
import type { Capabilities, Gpu } from "../runtime/device.ts";
import { DoesNotFitError, LongformError } from "../runtime/errors.ts";
import { fmix32 } from "../runtime/fmix32.ts";
import { type Elem, type Op, sizeOf, supports } from "../runtime/kernel.ts";
import { Recorder } from "../runtime/pass.ts";
import { type ArithmeticUnit, Profiler } from "../runtime/profiler.ts";
import type { GPT2Config } from "./config.ts";
import { f16ToF32, f32ToF16 } from "./float16.ts";
import type { Gpt2 } from "./gpt2.ts";
import { kernelShape, kvShape, paddedSizes } from "./memory_plan.ts";
import { syntheticPrompt } from "./synthetic.ts";

export interface BenchmarkOptions {
  readonly elem: Elem;
  readonly chosen: ChosenKernels;
  /** Timed runs of each measurement, after a warm-up that is not timed. */
  readonly runs: number;
  /** Ends a measurement between two runs by throwing its reason. */
  readonly signal: AbortSignal;
  /** Called before each timed run, with its number from 1. */
  readonly onRun?: (run: number) => void;
}

/** What a result was compared with, and how far the two were apart. */
export interface Check {
  /** The other kernel, or variant. */
  readonly against: string;
  /** Largest difference, as a share of the largest value of its row. */
  readonly difference: number;
  /** What the difference may be. */
  readonly tolerance: number;
}

export interface Measurement {
  /** What ran; undefined for a whole model. */
  readonly kernel?: string;
  /** Milliseconds of each run; of one step for `decode`. */
  readonly ms: readonly number[];
  /** Tokens, operations and bytes, of that time. */
  readonly tokens: number;
  readonly flop: number;
  /** Least bytes of memory that are read and written; undefined where they say nothing about the time. */
  readonly bytes?: number;
  /** Bytes of GPU buffers while it ran. */
  readonly peakBytes: number;
  /** Of block-sparse attention: kept blocks as a share of the causal ones. */
  readonly density?: number;
  readonly check?: Check;
}

/** Two kernels disagree: one of them is wrong, and its speed says nothing. */
export class CheckFailed extends LongformError {
  readonly check: Check;
  readonly kernel: string;

  constructor(kernel: string, check: Check) {
    super(
      `${kernel} and ${check.against} differ by ${
        check.difference.toPrecision(2)
      } of a row's largest value, ` +
        `allowed is ${check.tolerance.toPrecision(2)}`,
    );
    this.kernel = kernel;
    this.check = check;
  }
}

/** The scores of standard attention are larger than the device's memory or bindings. */
export class ScoresDoNotFit extends DoesNotFitError {
  /** Bytes of all heads' scores. */
  readonly neededBytes: number;

  constructor(message: string, neededBytes: number, cause?: unknown) {
    super(message, cause === undefined ? {} : { cause });
    this.neededBytes = neededBytes;
  }
}

/** The four matrix products of a layer. */
export const GEMMS = ["c_attn", "c_proj", "c_fc", "mlp_c_proj"] as const;
export type GemmName = typeof GEMMS[number];

/** What a device can do at most, as kernels that do nothing else measure it. */
export interface DevicePeaks {
  /** Bytes a second, read and written. */
  readonly copyRate: number;
  /** Operations a second, a multiply-add being two; matrices undefined where the device has no tensor cores. */
  readonly rates: { readonly fma: number; readonly matrix: number | undefined };
  /** Milliseconds of a dispatch that does next to nothing behind another; undefined where the device has no timestamps. */
  readonly dispatchMs: number | undefined;
  /** Milliseconds that it adds to a dispatch to be timed by itself; 0 where the device has no timestamps. */
  readonly timestampMs: number;
}

/**
 * Differences that are allowed between two kernels, as shares of the row's largest value. Of products: four roundings to
 * the stored type, and what thousands of additions in f32 may lose. Of attention: some roundings more, because
 * probabilities are rounded on tensor cores, and scores and probabilities are stored by the standard one.
 */
const TOLERANCES = {
  gemm: { f16: 2 ** -9, f32: 2 ** -14 },
  flash: { f16: 2 ** -8, f32: 2 ** -14 },
  sparse: { f16: 2 ** -8, f32: 2 ** -14 },
  standard: { f16: 2 ** -7, f32: 2 ** -14 },
} as const satisfies Record<string, Readonly<Record<Elem, number>>>;

/** Rows that are compared: this many at the start, in the middle and at the end. */
const CHECKED_ROWS = 256;
/** Kernels that take less are run several times in a row: a GPU's clock ticks in microseconds. */
const LEAST_RUN_MS = 5;
const MOST_REPEATS = 100;
/** Tokens that are decoded in a run, at most. */
const DECODED_TOKENS = 128;
const GREEDY = { temperature: 0, topK: 0, topP: 1, minP: 0, repeatPenalty: 1 };
/** Bytes to copy: far more than caches hold. */
const COPIED_BYTES = 256 << 20;
const SOFTWARE_COPIED_BYTES = 64 << 20;
/** Dispatches, of this many bytes each, that show what timestamps cost; pairs of runs. */
const TIMED_DISPATCHES = 256;
const TIMED_BYTES = 4096;
const TIMED_RUNS = 9;
/** Kernels run for this long before they are timed; on software adapters once. */
const WARM_UP_MS = 200;
/**
 * Work of one dispatch that measures a peak. A large GPU takes two or three milliseconds for it, and has a hundred
 * workgroups for each multiprocessor, so that waiting for the last ones does not count.
 */
const PEAK_WORK = {
  matrix: { workgroups: 16_384, trips: 192 },
  fma: { workgroups: 16_384, trips: 64 },
} as const satisfies Record<ArithmeticUnit, object>;
const SOFTWARE_PEAK_WORK = { workgroups: 32, trips: 16 };

/** Measures one model's parts on one device. */
export class Benchmark {
  readonly #gpu: Gpu;
  readonly #config: GPT2Config;
  readonly #options: BenchmarkOptions;
  readonly #shape: KernelShape;
  readonly #stopwatch: Stopwatch;

  constructor(gpu: Gpu, config: GPT2Config, options: BenchmarkOptions) {
    this.#gpu = gpu;
    this.#config = config;
    this.#options = options;
    this.#shape = kernelShape(config, options.elem, gpu.caps);
    this.#stopwatch = new Stopwatch(gpu);
  }

  destroy(): void {
    this.#stopwatch.destroy();
  }

  /** Bytes a second, read and written, of a kernel that copies a large buffer: the fastest of the runs. */
  async copyRate(): Promise<number> {
    const { caps, pipelines } = this.#gpu;
    const wanted = caps.isSoftware ? SOFTWARE_COPIED_BYTES : COPIED_BYTES;
    const bytes = Math.min(wanted, caps.maxBindingBytes, caps.maxBufferBytes);
    const variant = {};
    await pipelines.prepare(copyBytes, variant);
    return await withBuffers(this.#gpu, async (buffer) => {
      const source = await buffer("source of copies", bytes);
      const out = await buffer("copies", bytes);
      const ms = await this.#time((r) => r.dispatch(copyBytes, variant, { bytes }, { source, out }));
      return copyBytes.work(variant, { bytes }, []).bytes / (Math.min(...ms) / 1000);
    });
  }

  /** All rates of the device. */
  async peaks(): Promise<DevicePeaks> {
    const matrix = this.#hasMatrixUnits ? await this.peakRate("matrix") : undefined;
    return {
      copyRate: await this.copyRate(),
      rates: { fma: await this.peakRate("fma"), matrix },
      ...await this.#dispatchTimes(),
    };
  }

  /** From dispatches that do next to nothing, in one pass and in passes of their own: medians of some pairs of runs. */
  async #dispatchTimes(): Promise<Pick<DevicePeaks, "dispatchMs" | "timestampMs">> {
    if (!this.#gpu.caps.timestamps) return { dispatchMs: undefined, timestampMs: 0 };
    const variant = {};
    await this.#gpu.pipelines.prepare(copyBytes, variant);
    const together = new Profiler(this.#gpu, { unit: "passes" });
    const apart = new Profiler(this.#gpu, { unit: "dispatches" });
    try {
      return await withBuffers(this.#gpu, async (buffer) => {
        const source = await buffer("source of copies", TIMED_BYTES);
        const out = await buffer("copies", TIMED_BYTES);
        const timed = async (profiler: Profiler) => {
          profiler.reset();
          const r = new Recorder(this.#gpu, "benchmark", { profiler });
          for (let i = 0; i < TIMED_DISPATCHES; i++) {
            r.dispatch(copyBytes, variant, { bytes: TIMED_BYTES }, { source, out });
          }
          r.submit();
          await profiler.settle();
          return profiler.report().gpu.totalMs / TIMED_DISPATCHES;
        };
        const dispatches: number[] = [];
        const timestamps: number[] = [];
        for (let i = 0; i < TIMED_RUNS; i++) {
          const dispatchMs = await timed(together);
          dispatches.push(dispatchMs);
          timestamps.push(await timed(apart) - dispatchMs);
        }
        const median = (values: readonly number[]) => values.toSorted((a, b) => a - b)[TIMED_RUNS >> 1]!;
        return { dispatchMs: median(dispatches), timestampMs: Math.max(0, median(timestamps)) };
      });
    } finally {
      together.destroy();
      apart.destroy();
    }
  }

  get #hasMatrixUnits(): boolean {
    return supports(subgroupMatrixPeak, {}, this.#gpu.caps) === true;
  }

  /** What most arithmetic of a run is done by: tensor cores for f16 where the device has them. */
  get peakUnit(): ArithmeticUnit {
    return this.#options.elem === "f16" && this.#hasMatrixUnits ? "matrix" : "fma";
  }

  /** Operations a second of arithmetic from registers, a multiply-add being two: the fastest of the runs. */
  async peakRate(unit = this.peakUnit): Promise<number> {
    const { caps, pipelines } = this.#gpu;
    const variant = {};
    const isMatrix = unit === "matrix";
    const work = caps.isSoftware ? SOFTWARE_PEAK_WORK : PEAK_WORK[unit];
    const { flop, outBytes } = isMatrix ? subgroupMatrixWork(work) : fmaWork(work);
    const ms = await withBuffers(this.#gpu, async (buffer) => {
      const out = await buffer("results from registers", outBytes);
      if (!isMatrix) {
        await pipelines.prepare(fmaPeak, variant);
        // From x to 1 - x and back: the numbers neither grow nor vanish.
        const problem = { ...work, factor: -1, addend: 1 };
        return await this.#time((r) => r.dispatch(fmaPeak, variant, problem, { out }));
      }
      await pipelines.prepare(subgroupMatrixPeak, variant);
      const left = await buffer("left matrices", FACTOR_BYTES);
      const right = await buffer("right matrices", FACTOR_BYTES);
      fillRandom(left, "f16", 1);
      fillRandom(right, "f16", 2);
      const problem = { ...work, kept: 0 };
      return await this.#time((r) => r.dispatch(subgroupMatrixPeak, variant, problem, { left, right, out }));
    });
    return flop / (Math.min(...ms) / 1000);
  }

  /** One of a layer's matrix products over `rows` rows. */
  async gemm(name: GemmName, rows: number): Promise<Measurement> {
    const { elem } = this.#options;
    const { inner, columns, epilogue } = this.#gemmSizes(name);
    const role = matmulRole(epilogue, rows);
    // Few rows may have one kernel only; those for many rows can do what it does.
    const { chosen, other } = await this.#prepare(role, matmulRole(epilogue, Infinity));
    const stored: Elem = epilogue === "residual" ? "f32" : elem;
    return await withBuffers(this.#gpu, async (buffer) => {
      const x = await buffer("x", rows * inner * sizeOf(elem));
      const w = await buffer("w", inner * columns * sizeOf(elem));
      const bias = await buffer("bias", 4 * columns);
      const out = await buffer("out", rows * columns * sizeOf(stored));
      const peakBytes = this.#gpu.memory.totalBytes;
      fillRandom(x, elem, 1);
      fillRandom(w, elem, 2, 1 / Math.sqrt(inner));
      fillRandom(bias, "f32", 3);
      const run = ({ kernel, variant }: Op<MatmulProblem>, rows: number, x: GpuBuffer, out: GpuBuffer) =>
        this.#submit((r) => r.dispatch(kernel, variant, { rows, inner, columns }, { x, w, bias, out }));
      run(chosen, rows, x, out);
      const check = await this.#check(chosen, other, TOLERANCES.gemm[stored], {
        rows,
        out,
        stored,
        columns,
        run: (first, count) =>
          withBuffers(this.#gpu, async (buffer) => {
            const someX = await buffer("some of x", count * inner * sizeOf(elem));
            const someOut = await buffer("some of out", count * columns * sizeOf(stored));
            const rowBytes = inner * sizeOf(elem);
            this.#submit((r) => r.copy(x, first * rowBytes, someX, 0, count * rowBytes));
            run(other, count, someX, someOut);
            return await readRows(someOut, 0, count, columns, stored);
          }),
      });
      const problem = { rows, inner, columns };
      const ms = await this.#time((r) =>
        r.dispatch(chosen.kernel, chosen.variant, problem, { x, w, bias, out })
      );
      const { bytes, flops: flop } = chosen.kernel.work(chosen.variant, problem, []);
      return {
        kernel: chosen.kernel.name,
        ms,
        tokens: rows,
        flop,
        bytes,
        peakBytes,
        check,
      };
    });
  }

  /** The prefill attention of one layer over a whole context. */
  async flashAttention(tokens: number): Promise<Measurement> {
    const { chosen, other } = await this.#prepare("attention");
    return await this.#withAttention(tokens, async (tensors) => {
      const peakBytes = this.#gpu.memory.totalBytes;
      const record = (r: Recorder) => this.#recordFlash(r, chosen, tensors, 0, tokens);
      const check = await this.#checkAttention(chosen, other, TOLERANCES.flash, tensors, record);
      const ms = await this.#time(record);
      return { kernel: chosen.kernel.name, ms, tokens, flop: this.#attentionFlop(tokens), peakBytes, check };
    });
  }

  /** The same over the blocks of `lists`, which has a row for each block of the context, in all heads alike. */
  async sparseAttention(tokens: number, lists: BlockLists): Promise<Measurement> {
    const { chosen, other } = await this.#prepare("sparseAttention");
    return await this.#withAttention(tokens, (tensors) =>
      withBuffers(this.#gpu, async (buffer) => {
        const words = packLists(new Array<BlockLists>(this.#shape.heads).fill(lists));
        const listBuffer = await buffer("block lists", words.byteLength);
        upload(listBuffer, words);
        const sparse = { ...tensors, kv: { ...tensors.kv, lists: listBuffer } };
        const peakBytes = this.#gpu.memory.totalBytes;
        const record = (r: Recorder) => this.#recordFlash(r, chosen, sparse, 0, tokens);
        const check = await this.#checkAttention(chosen, other, TOLERANCES.sparse, sparse, record);
        const ms = await this.#time(record);
        const flop = this.#sparseFlop(lists, tokens);
        return { kernel: chosen.kernel.name, ms, tokens, flop, peakBytes, density: density([lists]), check };
      }));
  }

  /**
   * The same by the textbook, with all heads' scores in memory.
   * @throws ScoresDoNotFit when they are more than the device has or binds
   */
  async standardAttention(tokens: number): Promise<Measurement> {
    const { elem, heads, headDim4, unroll } = this.#shape;
    const { caps, pipelines, memory } = this.#gpu;
    const most = Math.min(caps.maxBufferBytes, caps.maxBindingBytes);
    const neededBytes = heads * scoreBytes(tokens, elem);
    const needs = `The scores of standard attention need ${formatBytes(neededBytes)} (${neededBytes} bytes)`;
    if (scoreBytes(tokens, elem) > most) {
      throw new ScoresDoNotFit(
        `${needs}, ${formatBytes(scoreBytes(tokens, elem))} a head, this device binds at most ${
          formatBytes(most)
        }`,
        neededBytes,
      );
    }
    const variant = { elem, heads, headDim4, unroll };
    await Promise.all(STANDARD_ATTENTION.map((kernel) => pipelines.prepare(kernel, variant)));
    const { chosen: other } = await this.#prepare("attention");
    await this.#gpu.idle(); // what earlier measurements have freed is free then
    return await this.#withAttention(tokens, async (tensors) => {
      const { memoryBytes = Infinity } = caps;
      if (memory.totalBytes + neededBytes > memoryBytes) {
        throw new ScoresDoNotFit(`${needs}, this device has ${formatBytes(memoryBytes)}`, neededBytes);
      }
      return await withBuffers(this.#gpu, async (buffer) => {
        const { qkv, kv, out, scale } = tensors;
        const steps: ((r: Recorder) => void)[] = [];
        for (const { range: cached, k, v } of kv.parts) {
          for (const range of scoreRanges(cached, tokens, elem, most)) {
            const bytes = range.heads * scoreBytes(tokens, elem);
            const scores = await buffer(scoresLabel(range), bytes).catch((error: unknown) => {
              if (!(error instanceof DoesNotFitError)) throw error;
              throw new ScoresDoNotFit(`${needs}: the GPU is out of memory`, neededBytes, error);
            });
            const problem = { tokens, blocks: kv.blocks, range, cached, scale };
            const buffers = { qkv, k, v, block_table: kv.table, scores, out };
            steps.push((r) => {
              for (const kernel of STANDARD_ATTENTION) r.dispatch(kernel, variant, problem, buffers);
            });
          }
        }
        const peakBytes = memory.totalBytes;
        const record = (r: Recorder) => steps.forEach((step) => step(r));
        const standard = { kernel: { name: "standard_attention" } };
        const check = await this.#checkAttention(standard, other, TOLERANCES.standard, tensors, record);
        const ms = await this.#time(record);
        return {
          kernel: "standard_attention",
          ms,
          tokens,
          flop: this.#attentionFlop(tokens),
          // Of the visible half: scores are written, read, read again and written as probabilities, and read.
          bytes: 5 * heads * tokens * (tokens + 1) / 2 * sizeOf(elem),
          peakBytes,
          check,
        };
      });
    });
  }

  /** A whole model over a prompt as long as `tokens`, with its attention; its cache holds the prompt afterwards. */
  async prefill(model: Gpt2, tokens: number): Promise<Measurement> {
    const { signal } = this.#options;
    const prompt = syntheticPrompt(tokens, this.#config.vocabSize);
    const ms = await this.#runs(async () => {
      model.truncate(0);
      const starting = performance.now();
      await model.prefill(prompt, { signal });
      return performance.now() - starting;
    });
    const { nLayer, nHead, nEmbd, vocabSize } = this.#config;
    const { sparsity } = model;
    const shared = tokens * this.#layersFlop() + 2 * vocabSize * nEmbd;
    const peakBytes = this.#gpu.memory.totalBytes;
    if (!hasLists(sparsity)) {
      return { ms, tokens, flop: shared + nLayer * this.#attentionFlop(tokens), peakBytes };
    }
    const rows = Math.ceil(tokens / KV_BLOCK);
    const lists = modelLists(sparsity, { layers: nLayer, heads: nHead }, rows);
    const flop = shared + lists.reduce((sum, one) => sum + this.#sparseFlop(one, tokens) / nHead, 0);
    return { ms, tokens, flop, peakBytes, density: density(lists) };
  }

  /**
   * Tokens drawn greedily up to a context of `tokens` in each of the model's sequences, as many ahead as it allows; a run's
   * time is that of one step.
   */
  async decode(model: Gpt2, tokens: number): Promise<Measurement> {
    const { signal, elem } = this.#options;
    const { nLayer, nEmbd, vocabSize } = this.#config;
    const { cache } = model;
    const { sequences } = cache;
    const prompt = syntheticPrompt(tokens, vocabSize);
    const decoded = Math.min(DECODED_TOKENS, Math.floor(tokens / 4));
    const prefilled = tokens - decoded;
    for (let sequence = 0; sequence < sequences; sequence++) {
      if (cache.lengthOf(sequence) >= prefilled) continue;
      model.truncate(0, sequence);
      await model.prefill(prompt.subarray(0, prefilled), { sequence, signal });
    }
    const decoder = await model.decoder({ sampling: GREEDY });
    const ms = await this.#runs(async () => {
      for (let sequence = 0; sequence < sequences; sequence++) {
        model.truncate(prefilled, sequence);
        decoder.begin(sequence, [], 0);
        await decoder.next();
      }
      const starting = performance.now();
      for (let drawn = 0; drawn < decoded; drawn++) {
        signal.throwIfAborted();
        decoder.stepAhead(Math.min(decoder.mostInFlight, decoded - drawn));
        await decoder.next();
      }
      const elapsed = performance.now() - starting;
      await decoder.discard();
      return elapsed / decoded;
    });
    const { headsWidth } = paddedSizes(this.#config);
    const matrices = this.#layersFlop() / 2 + vocabSize * nEmbd;
    const share = decodeDensity(model, tokens);
    return {
      ms,
      tokens: sequences,
      flop: sequences * (2 * matrices + nLayer * 4 * nEmbd * share * tokens),
      bytes: sizeOf(elem) * (matrices + sequences * nLayer * 2 * headsWidth * share * tokens),
      peakBytes: this.#gpu.memory.totalBytes,
      ...(model.sparsity.pattern.kind === "dense" ? {} : { density: share }),
    };
  }

  /** Operations of all layers' matrix products for one token. */
  #layersFlop(): number {
    const { nLayer, nEmbd, nInner } = this.#config;
    return 2 * nLayer * (4 * nEmbd * nEmbd + 2 * nEmbd * nInner);
  }

  /** Operations of both products of attention over the visible half of the square. */
  #attentionFlop(tokens: number): number {
    const { nHead, headDim } = this.#config;
    return 4 * nHead * headDim * tokens * (tokens + 1) / 2;
  }

  /** The same over the blocks of lists, in all heads alike. */
  #sparseFlop(lists: BlockLists, tokens: number): number {
    const { nHead, headDim } = this.#config;
    return 4 * nHead * headDim * attendedByLists([lists], { qLen: tokens, firstPosition: 0 }).pairs;
  }

  #gemmSizes(name: GemmName): { inner: number; columns: number; epilogue: Epilogue } {
    const { width, headsWidth, inner } = paddedSizes(this.#config);
    switch (name) {
      case "c_attn":
        return { inner: width, columns: 3 * headsWidth, epilogue: "bias" };
      case "c_proj":
        return { inner: headsWidth, columns: width, epilogue: "residual" };
      case "c_fc":
        return { inner: width, columns: inner, epilogue: "bias_gelu" };
      case "mlp_c_proj":
        return { inner, columns: width, epilogue: "residual" };
    }
  }

  /** The kernel of a role and another to compare it with, of that role or one alike, compiled. */
  async #prepare<R extends Role>(role: R, alike: R = role) {
    const { caps, pipelines } = this.#gpu;
    const chosen = this.#options.chosen[role];
    const all = candidates(this.#shape);
    const others = [...all[role], ...all[alike]] as readonly (typeof chosen)[];
    const other = otherCandidate(others, chosen, caps);
    await Promise.all([chosen, other].map(({ kernel, variant }) => pipelines.prepare(kernel, variant)));
    return { chosen, other };
  }

  /** Random queries, keys and values of a layer as the model would hold them, and room for the result. */
  async #withAttention<T>(tokens: number, use: (tensors: AttentionTensors) => Promise<T>): Promise<T> {
    const { elem } = this.#options;
    const { maxBufferBytes, maxBindingBytes } = this.#gpu.caps;
    const { headsWidth, headDim } = paddedSizes(this.#config);
    const shape = { ...kvShape(this.#config, elem), layers: 1 };
    return await withBuffers(this.#gpu, async (buffer) => {
      const qkv = await buffer("qkv", 3 * headsWidth * paddedRows(tokens) * sizeOf(elem));
      const out = await buffer("attention", tokens * headsWidth * sizeOf(elem));
      const layout = kvLayout(shape, tokens, Math.min(maxBufferBytes, maxBindingBytes));
      const cache = await KvCache.create(this.#gpu, layout);
      try {
        const kv = cache.layer(0);
        fillRandom(qkv, elem, 1);
        kv.parts.forEach(({ k, v }, part) => {
          fillRandom(k, elem, 2 + 2 * part);
          fillRandom(v, elem, 3 + 2 * part);
        });
        return await use({ tokens, qkv, out, kv, headsWidth, scale: 1 / Math.sqrt(headDim) });
      } finally {
        cache.destroy();
      }
    });
  }

  #recordFlash(
    r: Recorder,
    { kernel, variant }: Op<FlashAttentionProblem>,
    { qkv, out, kv, scale }: Pick<AttentionTensors, "qkv" | "out" | "kv" | "scale">,
    firstPosition: number,
    qLen: number,
  ): void {
    const { blocks, table, lists } = kv;
    for (const { range, k, v } of kv.parts) {
      const problem = { qLen, firstPosition, blocks, range, scale };
      const sparse = lists ? { block_lists: lists } : {};
      r.dispatch(kernel, variant, problem, { qkv, k, v, block_table: table, out, ...sparse });
    }
  }

  /** Runs an attention over the context and compares it with another, for which the rows are chunks behind a cache. */
  async #checkAttention(
    chosen: { readonly kernel: { readonly name: string }; readonly variant?: object },
    other: Op<FlashAttentionProblem>,
    tolerances: Readonly<Record<Elem, number>>,
    tensors: AttentionTensors,
    record: (r: Recorder) => void,
  ): Promise<Check> {
    const { elem } = this.#options;
    const { tokens: rows, qkv, out, kv, scale, headsWidth } = tensors;
    this.#submit(record);
    const rowBytes = 3 * headsWidth * sizeOf(elem);
    return await this.#check(chosen, other, tolerances[elem], {
      rows,
      out,
      stored: elem,
      columns: headsWidth,
      run: (first, count) =>
        withBuffers(this.#gpu, async (buffer) => {
          const someQkv = await buffer("some of qkv", paddedRows(count) * rowBytes);
          const someOut = await buffer("some of attention", count * headsWidth * sizeOf(elem));
          this.#submit((r) => {
            r.copy(qkv, first * rowBytes, someQkv, 0, count * rowBytes);
            this.#recordFlash(r, other, { qkv: someQkv, out: someOut, kv, scale }, first, count);
          });
          return await readRows(someOut, 0, count, headsWidth, elem);
        }),
    });
  }

  /** @throws CheckFailed when the results are further apart than the tolerance */
  async #check(
    chosen: { readonly kernel: { readonly name: string }; readonly variant?: object },
    other: Op<never>,
    tolerance: number,
    results: ComparedResults,
  ): Promise<Check> {
    const { rows, out, columns, stored, run } = results;
    let difference = 0;
    for (const [first, count] of sampledRows(rows)) {
      this.#options.signal.throwIfAborted();
      const got = await readRows(out, first, count, columns, stored);
      difference = Math.max(difference, largestDifference(got, await run(first, count), columns));
    }
    const check = { against: describeOther(chosen, other), difference, tolerance };
    // Written so that NaN fails.
    if (!(difference <= tolerance)) throw new CheckFailed(chosen.kernel.name, check);
    return check;
  }

  #submit(record: (r: Recorder) => void): void {
    const r = new Recorder(this.#gpu, "benchmark");
    record(r);
    r.submit();
  }

  /** Milliseconds of each run of recorded work; short work is repeated and averaged. */
  async #time(record: (r: Recorder) => void): Promise<number[]> {
    let repeats = 1;
    const time = async () => {
      const ms = await this.#stopwatch.time((r) => {
        for (let i = 0; i < repeats; i++) record(r);
      });
      return ms / repeats;
    };
    return await this.#runs(time, async () => {
      // A GPU that has had nothing to do lowers its clock, and takes many milliseconds of work to raise it again: what
      // is measured before that can be four times too slow.
      const until = performance.now() + (this.#gpu.caps.isSoftware ? 0 : WARM_UP_MS);
      do {
        this.#options.signal.throwIfAborted();
        const ms = await time();
        repeats = Math.min(MOST_REPEATS, Math.max(1, Math.ceil(LEAST_RUN_MS / ms)));
      } while (performance.now() < until);
    });
  }

  /** The results of the timed runs, after a warm-up: one run more if nothing else. */
  async #runs(run: () => Promise<number>, warmUp: () => Promise<unknown> = run): Promise<number[]> {
    const { runs, signal, onRun } = this.#options;
    await warmUp();
    const ms: number[] = [];
    for (let i = 1; i <= runs; i++) {
      signal.throwIfAborted();
      onRun?.(i);
      ms.push(await run());
    }
    return ms;
  }
}

/** What attention reads and writes, of one layer. */
interface AttentionTensors {
  readonly tokens: number;
  /** `[tokens, 3, heads, headDim]` and some rows more; its keys and values are not read. */
  readonly qkv: GpuBuffer;
  /** `[tokens, heads, headDim]` */
  readonly out: GpuBuffer;
  readonly kv: KvView;
  readonly headsWidth: number;
  readonly scale: number;
}

interface ComparedResults {
  readonly rows: number;
  /** `[rows, columns]`, computed */
  readonly out: GpuBuffer;
  readonly columns: number;
  readonly stored: Elem;
  /** Some rows by the other kernel. */
  readonly run: (first: number, count: number) => Promise<Float32Array>;
}

/** Rows that attention may read, also where tiles of queries begin anywhere in a block. */
function paddedRows(rows: number): number {
  return ATTENTION_ROWS * Math.ceil((rows + KV_BLOCK - 1) / ATTENTION_ROWS);
}

/** The share of a context's blocks that its last token attends to in decoding, over all layers and heads. */
function decodeDensity({ sparsity, config: { nLayer, nHead } }: Gpt2, tokens: number): number {
  const rows = Math.ceil(tokens / KV_BLOCK);
  const model = { layers: nLayer, heads: nHead };
  if (!hasLists(sparsity)) return sparsityDensity(sparsity, model, rows);
  const lists = modelLists(sparsity, model, rows);
  const ofLast = (indptr: Uint32Array) => indptr[rows]! - indptr[rows - 1]!;
  const kept = lists.reduce(
    (sum, { full, partial }) => sum + ofLast(full.indptr) + ofLast(partial.indptr),
    0,
  );
  return kept / (lists.length * rows);
}

/**
 * Lists of random blocks, each row's own and of the others as many as make `share` of the row: what the cost of
 * block-sparse attention is measured with where no pattern is asked for.
 */
export function randomLists(rows: number, share: number): BlockLists {
  const kept = Array.from({ length: rows }, (_, row) => {
    const others = Math.min(row, Math.round(share * (row + 1) - 1));
    if (others <= 0) return [];
    const byDraw = Array.from({ length: row }, (_, block) => ({ block, draw: fmix32(row * rows + block) }));
    return byDraw.sort((a, b) => a.draw - b.draw).slice(0, others).map(({ block }) => block)
      .sort((a, b) => a - b);
  });
  const full = { indptr: new Uint32Array(rows + 1), indices: Uint32Array.from(kept.flat()) };
  kept.forEach((blocks, row) => full.indptr[row + 1] = full.indptr[row]! + blocks.length);
  const diagonal = Uint32Array.from({ length: rows + 1 }, (_, row) => row);
  return { rows, full, partial: { indptr: diagonal, indices: diagonal.slice(0, rows) } };
}

function scoresLabel({ first, heads }: HeadRange): string {
  return `scores of heads ${first} to ${first + heads - 1}`;
}

/**
 * What to compare a kernel with: of the candidates that run the last, which is the simplest, if it is another kernel;
 * otherwise another kernel, or at least another variant.
 * @throws DoesNotFitError where there is no other: an unchecked result has no speed
 */
function otherCandidate<P>(all: readonly Op<P>[], chosen: Op<P>, caps: Capabilities): Op<P> {
  const runnable = all.filter(({ kernel, variant }) => supports(kernel, variant, caps) === true);
  return runnable.findLast(({ kernel }) => kernel.name !== chosen.kernel.name) ??
    runnable.findLast(({ variant }) => JSON.stringify(variant) !== JSON.stringify(chosen.variant)) ??
    fail(`There is no other kernel on ${caps.name} to compare ${chosen.kernel.name} with`);
}

function fail(message: string): never {
  throw new DoesNotFitError(message, { hint: "use a larger context" });
}

/** The other kernel's name, with what sets it apart where that is the same. */
function describeOther(
  chosen: { readonly kernel: { readonly name: string }; readonly variant?: object },
  other: Op<never>,
): string {
  const { name } = other.kernel;
  if (name !== chosen.kernel.name) return name;
  const own = new Map(Object.entries(chosen.variant ?? {}));
  const settings = Object.entries(other.variant).filter(([key, value]) => own.get(key) !== value);
  return `${name} (${settings.map(([key, value]) => `${key} ${String(value)}`).join(", ")})`;
}

/** Ranges at the start, in the middle and at the end, or all rows where those would meet. */
function sampledRows(rows: number): (readonly [first: number, count: number])[] {
  if (rows <= 3 * CHECKED_ROWS) return [[0, rows]];
  const middle = Math.floor((rows - CHECKED_ROWS) / 2);
  return [0, middle, rows - CHECKED_ROWS].map((first) => [first, CHECKED_ROWS] as const);
}

/** Over all rows, as a share of the row's largest wanted value; NaN counts as infinity. */
function largestDifference(got: Float32Array, wanted: Float32Array, columns: number): number {
  let worst = 0;
  for (let first = 0; first < wanted.length; first += columns) {
    let largest = 0;
    let difference = 0;
    for (let i = first; i < first + columns; i++) {
      largest = Math.max(largest, Math.abs(wanted[i]!));
      const apart = Math.abs(got[i]! - wanted[i]!);
      difference = Number.isNaN(apart) ? Infinity : Math.max(difference, apart);
    }
    if (difference > 0) worst = Math.max(worst, difference / largest);
  }
  return worst;
}

async function readRows(
  buffer: GpuBuffer,
  first: number,
  rows: number,
  columns: number,
  stored: Elem,
): Promise<Float32Array> {
  const rowBytes = columns * sizeOf(stored);
  const bytes = await download(buffer, first * rowBytes, rows * rowBytes);
  return stored === "f16" ? Float32Array.from(new Uint16Array(bytes), f16ToF32) : new Float32Array(bytes);
}

/** Runs something with buffers that are freed behind it. */
async function withBuffers<T>(
  gpu: Gpu,
  use: (buffer: (label: string, bytes: number) => Promise<GpuBuffer>) => Promise<T>,
): Promise<T> {
  const created: GpuBuffer[] = [];
  try {
    return await use(async (label, bytes) => {
      const buffer = await allocate(gpu, label, "activations", bytes);
      created.push(buffer);
      return buffer;
    });
  } finally {
    for (const buffer of created) buffer.destroy();
  }
}

/** Twice a prime: repeated over and over, no two rows of a tensor begin at the same place soon. */
const NOISE_LENGTH = 2 * 131_071;
let noise: Float32Array | undefined;

/** Numbers from a normal distribution (Box and Muller 1958). */
function normalNoise(): Float32Array {
  const uniform = (i: number) => (fmix32(i) + 0.5) / 2 ** 32;
  return Float32Array.from({ length: NOISE_LENGTH }, (_, i) => {
    return Math.sqrt(-2 * Math.log(uniform(2 * i))) * Math.cos(2 * Math.PI * uniform(2 * i + 1));
  });
}

/** Fills a buffer with normal numbers; each `stream` begins at another place. */
function fillRandom(buffer: GpuBuffer, stored: Elem, stream: number, deviation = 1): void {
  noise ??= normalNoise();
  const start = stream * 40_009 % NOISE_LENGTH;
  const values = Float32Array.from(noise, (_, i) => deviation * noise![(start + i) % NOISE_LENGTH]!);
  const bytes = new Uint8Array((stored === "f16" ? Uint16Array.from(values, f32ToF16) : values).buffer);
  for (let at = 0; at < buffer.byteLength; at += bytes.length) {
    upload(buffer, bytes.subarray(0, Math.min(bytes.length, buffer.byteLength - at)), at);
  }
}

/** Times submissions by the GPU's clock, or around them by the wall's where the device has no timestamps. */
class Stopwatch {
  readonly #gpu: Gpu;
  readonly #profiler: Profiler | undefined;

  constructor(gpu: Gpu) {
    this.#gpu = gpu;
    // Not dispatch by dispatch: each timestamp would add microseconds of its own.
    this.#profiler = gpu.caps.timestamps ? new Profiler(gpu, { unit: "passes" }) : undefined;
  }

  /** Milliseconds of what is recorded. */
  async time(record: (r: Recorder) => void): Promise<number> {
    const before = this.#gpuMs();
    const r = new Recorder(this.#gpu, "benchmark", { profiler: this.#profiler });
    record(r);
    await this.#gpu.idle();
    const starting = performance.now();
    r.submit();
    if (!this.#profiler) {
      await this.#gpu.idle();
      return performance.now() - starting;
    }
    await this.#profiler.settle();
    return this.#gpuMs() - before;
  }

  #gpuMs(): number {
    return this.#profiler?.report().gpu.kernelsMs ?? 0;
  }

  destroy(): void {
    this.#profiler?.destroy();
  }
}
