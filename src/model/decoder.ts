/**
 * Decoding that stays on the GPU: a drawn token feeds the next step from GPU memory, so steps are handed over ahead of
 * their results, which come back through a ring of small buffers. What is drawn does not depend on how far ahead that is.
 *
 * A step costs the host some dispatches to encode and a few bytes to read; what it knows of the sequences (`KvCache`'s
 * lengths) follows the results, so steps whose results nobody asked for leave no trace: their rows of keys and values lie
 * behind the length, where the next step writes.
 */
import type { ModelKernels } from "../kernels/index.ts";
import {
  packPlaces,
  packSeen,
  RESULT_BYTES,
  unpackLogprobs,
  unpackResult,
} from "../kernels/sampling/sampling.ts";
import { packSequence, SEQUENCE_BYTES } from "../kernels/shared/shared.ts";
import type { KvCache } from "../kvcache/cache.ts";
import { type GpuBuffer, type Readback, upload } from "../runtime/buffers.ts";
import type { Gpu } from "../runtime/device.ts";
import { DispatchList, Recorder } from "../runtime/pass.ts";
import type { Profiler } from "../runtime/profiler.ts";
import type { GPT2Config } from "./config.ts";
import {
  type DecodingName,
  type DecodingPlan,
  stepResultBytes,
  STEPS_PER_SUBMISSION,
} from "./memory_plan.ts";
import { positionLimit, positionPlace, type Positions } from "./positions.ts";
import { type SamplingOptions, type TokenLogprob, unusableLogits } from "./sampling.ts";

export interface DecoderOptions {
  /** The seed belongs to each sequence, see `begin`. */
  readonly sampling: Omit<SamplingOptions, "seed">;
  /** Also report the log-probability of each token and of this many likeliest ones; at most what was planned for. */
  readonly logprobs?: number | undefined;
}

/** A token that came back. */
export interface DrawnToken {
  readonly sequence: number;
  readonly id: number;
  readonly logprob?: number;
  readonly top?: readonly TokenLogprob[];
}

export type DecodingBuffers = Readonly<Record<DecodingName, GpuBuffer>>;

/** What a loaded model lends to its decoders. */
export interface DecoderParts {
  readonly gpu: Gpu;
  readonly config: GPT2Config;
  readonly plan: DecodingPlan;
  /** Tokens of a sequence at most. */
  readonly context: number;
  readonly kernels: ModelKernels;
  readonly cache: KvCache;
  readonly profiler: Profiler | undefined;
  readonly buffers: DecodingBuffers;
  /** `[sequences, vocab]` f32 after a step; after a prefill its last row is the first here. */
  readonly logits: GpuBuffer;
  /** One for each submission in flight. */
  readonly readbacks: readonly Readback[];
  /** A step of all sequences, from `nextTokens` to `logits`. */
  readonly step: DispatchList;
  /** Makes what the step needs to know of a sequence's blocks when it begins. */
  readonly summarize: (r: Recorder, sequence: number) => void;
}

/** Work on the GPU whose results have not been read: steps one after another, or the draw behind a prefill. */
interface Submission {
  readonly steps: number;
  /** The sequences that it draws tokens for, each with what `#turns` was for it. */
  readonly draws: readonly { readonly sequence: number; readonly turn: number }[];
  /** Whether each step also appended a token to each of them. */
  readonly appends: boolean;
  readonly bytes: Promise<ArrayBuffer>;
  /** Steps whose results have been handed out. */
  taken: number;
}

/**
 * Draws tokens for the sequences of a model; one decoder of a model at a time. A step runs all of them: what the cache holds
 * of a sequence that has not begun, or has ended, is undefined after it.
 */
export class Decoder {
  readonly #parts: DecoderParts;
  readonly #options: DecoderOptions;
  readonly #drawLists = new Map<string, DispatchList>();
  readonly #submissions: Submission[] = [];
  #submitted = 0;
  /** Steps in flight. */
  #inFlight = 0;
  /** How often each sequence has begun or ended: results of an earlier turn are nobody's. */
  readonly #turns: number[];
  readonly #isRunning: boolean[];

  private constructor(parts: DecoderParts, options: DecoderOptions) {
    this.#parts = parts;
    this.#options = options;
    const { sequences } = parts.plan;
    this.#turns = new Array<number>(sequences).fill(0);
    this.#isRunning = new Array<boolean>(sequences).fill(false);
  }

  /** Compiles what draws the tokens, unless that is done, and makes everything ready to begin. */
  static async create(parts: DecoderParts, options: DecoderOptions): Promise<Decoder> {
    const { logprobs } = options;
    if (logprobs !== undefined && logprobs > (parts.plan.logprobs ?? -1)) {
      throw new Error(
        `The model was loaded for ${parts.plan.logprobs} log-probabilities, not for ${logprobs}`,
      );
    }
    await parts.kernels.prepare(drawRoles(options));
    return new Decoder(parts, options);
  }

  /** Sequences whose tokens are drawn together. */
  get sequences(): number {
    return this.#parts.plan.sequences;
  }

  /** Steps whose results are yet to be read. */
  get inFlight(): number {
    return this.#inFlight;
  }

  /** Steps that may be under way at a time. */
  get mostInFlight(): number {
    return this.#parts.plan.inFlight;
  }

  /**
   * Draws the first token of a sequence behind its prefill, which must be the last that ran.
   * @param seen the tokens that the repetition penalty applies to
   * @param logits those after the last token of the sequence where no prefill left them on the GPU
   */
  begin(sequence: number, seen: ArrayLike<number>, seed: number, logits?: Float32Array<ArrayBuffer>): void {
    const { buffers, cache, config } = this.#parts;
    this.#checkRoom(1);
    // The draw counts one on: to the position of the token that it draws.
    const state = { length: cache.lengthOf(sequence) - 1, step: 0, seed };
    upload(buffers.sequences, packSequence(state), SEQUENCE_BYTES * sequence);
    const bits = packSeen(seen, config.vocabSize);
    upload(buffers.seen, bits, bits.byteLength * sequence);
    if (logits) upload(this.#parts.logits, logits);
    this.#turns[sequence]!++;
    this.#isRunning[sequence] = true;
    this.#submit(1, [sequence], false, (r, slot) => {
      this.#parts.summarize(r, sequence);
      r.replay(this.#drawList(slot, sequence, 1));
    });
  }

  /**
   * Hands over steps until `ahead` are in flight. While at least half of that are, it waits until there is room for several:
   * steps that share a submission cost less than one submission each. In a step every sequence's last token runs and its
   * next is drawn.
   */
  stepAhead(ahead: number): void {
    if (this.#inFlight > Math.max(ahead / 2, ahead - STEPS_PER_SUBMISSION)) return;
    const running = this.#isRunning.flatMap((isRunning, sequence) => isRunning ? [sequence] : []);
    while (this.#inFlight < ahead) {
      const steps = Math.min(ahead - this.#inFlight, STEPS_PER_SUBMISSION);
      this.#submit(steps, running, true, (r, slot) => {
        r.replay(this.#parts.step);
        r.replay(this.#drawList(slot, 0, this.sequences));
      });
    }
  }

  /**
   * Waits for the results of the oldest step, and counts what it appended.
   * @returns a token for each sequence that ran then and has not ended since
   * @throws DeviceError when logits cannot be sampled from
   */
  async next(): Promise<DrawnToken[]> {
    const submission = this.#submissions[0];
    if (!submission) throw new Error("Nothing is in flight");
    const bytes = await submission.bytes;
    const step = submission.taken++;
    this.#inFlight--;
    if (submission.taken === submission.steps) this.#submissions.shift();
    const drawn: DrawnToken[] = [];
    for (const { sequence, turn } of submission.draws) {
      if (turn !== this.#turns[sequence]) continue;
      if (submission.appends) this.#parts.cache.advance(1, sequence);
      drawn.push(this.#tokenOf(bytes, step, sequence));
    }
    return drawn;
  }

  /** Ends a sequence: what is in flight for it is nobody's, as if it had not run. */
  end(sequence: number): void {
    this.#turns[sequence]!++;
    this.#isRunning[sequence] = false;
  }

  /** Ends all sequences, and waits for what is in flight. */
  async discard(): Promise<void> {
    for (let sequence = 0; sequence < this.sequences; sequence++) this.end(sequence);
    while (this.#inFlight > 0) await this.next();
  }

  /** Tokens of each sequence behind this many steps more than those in flight. */
  #lengthsAt(steps: number): number[] {
    const { cache } = this.#parts;
    const appended = this.#submissions.reduce(
      (sum, { appends, steps, taken }) => sum + (appends ? steps - taken : 0),
      0,
    );
    // Sequences that have ended go on to the last row, and write there.
    return Array.from(
      { length: this.sequences },
      (_, i) => Math.min(cache.lengthOf(i) + appended + steps, this.#parts.context),
    );
  }

  #checkRoom(steps: number): void {
    if (this.#inFlight + steps > this.mostInFlight) {
      throw new Error("There is no room for more steps in flight");
    }
  }

  #submit(
    steps: number,
    draws: readonly number[],
    appends: boolean,
    record: (r: Recorder, slot: number) => void,
  ): void {
    const { gpu, profiler, plan, readbacks, buffers } = this.#parts;
    this.#checkRoom(steps);
    // There are no more submissions in flight than steps.
    const readback = readbacks[this.#submitted++ % plan.inFlight]!;
    const r = new Recorder(gpu, appends ? "decode" : "first token", { profiler });
    for (let step = 0; step < steps; step++) {
      if (profiler) {
        const lengths = this.#lengthsAt(appends ? step + 1 : 0);
        r.beginStep(this.sequences === 1 ? `token ${lengths[0]}` : "tokens", lengths);
      }
      record(r, step);
    }
    const sizes = stepResultBytes(plan);
    r.copy(buffers.results, 0, readback, 0, steps * sizes.results);
    if (this.#options.logprobs !== undefined) {
      r.copy(buffers.logprobs, 0, readback, STEPS_PER_SUBMISSION * sizes.results, steps * sizes.logprobs);
    }
    r.submit();
    const bytes = readback.read();
    bytes.catch(() => {}); // whoever asks for the result is told
    const turns = draws.map((sequence) => ({ sequence, turn: this.#turns[sequence]! }));
    this.#submissions.push({ steps, draws: turns, appends, bytes, taken: 0 });
    this.#inFlight += steps;
  }

  /** A sequence's token of one of a submission's steps. */
  #tokenOf(bytes: ArrayBuffer, step: number, sequence: number): DrawnToken {
    const { plan } = this.#parts;
    const sizes = stepResultBytes(plan);
    const result = unpackResult(
      new DataView(bytes, step * sizes.results + RESULT_BYTES * sequence, RESULT_BYTES),
    );
    if (result.problem !== undefined) throw unusableLogits(result.problem, result.at);
    const { logprobs } = this.#options;
    if (logprobs === undefined) return { sequence, id: result.id };
    const one = sizes.logprobs / plan.sequences;
    const at = STEPS_PER_SUBMISSION * sizes.results + step * sizes.logprobs + one * sequence;
    const [drawn, ...top] = unpackLogprobs(new DataView(bytes, at, one));
    return { sequence, id: result.id, logprob: drawn!.logprob, top: top.slice(0, logprobs) };
  }

  /** Draws for `rows` sequences from the first rows of the logits, made once for each place of results. */
  #drawList(slot: number, firstSequence: number, rows: number): DispatchList {
    const key = `${slot},${firstSequence},${rows}`;
    const known = this.#drawLists.get(key);
    if (known) return known;
    const { gpu, kernels, buffers, logits, config, context, plan } = this.#parts;
    const { sampling, logprobs } = this.#options;
    const list = new DispatchList(gpu);
    list.enter("draw");
    const where = { vocab: config.vocabSize, sequences: plan.sequences, rows, firstSequence, slot };
    kernels.draw(list, logits, buffers, { ...where, ...sampling, capacity: context });
    if (logprobs !== undefined) {
      kernels.logprobs(list, logits, buffers, { ...where, top: plan.logprobs! });
    }
    this.#drawLists.set(key, list);
    return list;
  }
}

/** Roles of drawing tokens. */
export function drawRoles({ sampling, logprobs }: DecoderOptions) {
  const draw = sampling.temperature === 0 ? "greedy" as const : "draw" as const;
  return logprobs === undefined ? [draw] : [draw, "logprobs" as const];
}

/** Where each position up to the context takes its embedding: what the sampler gives the next token. */
export function packPositions(positions: Positions, context: number): DataView<ArrayBuffer> {
  const last = Math.min(context, positionLimit(positions)) - 1;
  return packPlaces(Array.from({ length: context }, (_, p) => positionPlace(positions, Math.min(p, last))));
}
