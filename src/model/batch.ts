/**
 * Offline generation: many prompts, several of them decoded together, so that they share each reading of the weights. A
 * sequence that ends makes room for the next prompt at once (continuous batching).
 */
import type { Decoder, DrawnToken } from "./decoder.ts";
import { type FinishReason, type GenerationOptions, TextStream } from "./generation.ts";
import type { Gpt2 } from "./gpt2.ts";
import type { TokenLogprob } from "./sampling.ts";

export interface BatchOptions
  extends Omit<GenerationOptions, "onPrefillProgress" | "onPrefilled" | "inFlight"> {
  /** Called when a prompt is in the cache, with its tokens and milliseconds. */
  readonly onPrefilled?: (tokens: number, ms: number) => void;
  /** Called with each token that came back. */
  readonly onToken?: () => void;
}

/** A prompt and what followed it. */
export interface BatchResult {
  /** Which of the prompts. */
  readonly index: number;
  readonly text: string;
  readonly tokens: readonly number[];
  /** Of each token, when they were asked for. */
  readonly logprobs: readonly { readonly logprob: number; readonly top: readonly TokenLogprob[] }[];
  readonly finishReason: FinishReason;
}

/** The seed of a prompt: that of the run for the first, so that one prompt gives what it gives alone. */
export function seedOf(seed: number, index: number): number {
  return (seed + index) % 2 ** 53;
}

/**
 * Generates behind each of the prompts. A result does not depend on what it shared a step with, and is that of any other
 * batch of the same size.
 * @param prompts token ids, none empty, each with room in the model's context
 * @returns results as they are finished; after an interruption those of the prompts that were under way
 */
export async function* generateBatch(
  model: Gpt2,
  prompts: readonly ArrayLike<number>[],
  bytesOf: ((id: number) => Uint8Array) | undefined,
  options: BatchOptions,
): AsyncGenerator<BatchResult, void> {
  const { sampling, logprobs, signal } = options;
  const decoder = await model.decoder({ sampling, logprobs });
  const slots: (Generation | undefined)[] = new Array(decoder.sequences).fill(undefined);
  let begun = 0;
  const endGeneration = model.timeline?.begin("phases", "generate");
  try {
    for (;;) {
      // Every free slot takes a prompt; a first token needs room among the results on their way.
      let free = slots.findIndex((slot) => slot === undefined);
      while (!signal?.aborted && free >= 0 && begun < prompts.length && hasRoom(decoder)) {
        const prompt = prompts[begun]!;
        const started = await begin(model, decoder, free, prompt, begun, bytesOf, options);
        if (!started) break;
        slots[free] = started;
        begun++;
        if (started.isDone) {
          slots[free] = undefined;
          decoder.end(free);
          yield started.result();
        }
        free = slots.findIndex((slot) => slot === undefined);
      }
      if (signal?.aborted) {
        for (const slot of slots) if (slot) yield slot.interrupt();
        return;
      }
      if (slots.every((slot) => slot === undefined)) return;
      // Steps beyond what every sequence still lacks would be for nothing.
      const lacking = Math.max(...slots.map((slot) => slot?.lacking ?? 0));
      decoder.stepAhead(Math.min(decoder.mostInFlight, lacking));
      for (const token of await decoder.next()) {
        const slot = slots[token.sequence]!;
        options.onToken?.();
        slot.take(token);
        if (!slot.isDone) continue;
        slots[token.sequence] = undefined;
        decoder.end(token.sequence);
        yield slot.result();
      }
    }
  } finally {
    await decoder.discard();
    endGeneration?.();
  }
}

function hasRoom(decoder: Decoder): boolean {
  return decoder.inFlight < decoder.mostInFlight;
}

/** Puts a prompt into a slot; undefined when an interruption came first. */
async function begin(
  model: Gpt2,
  decoder: Decoder,
  sequence: number,
  prompt: ArrayLike<number>,
  index: number,
  bytesOf: ((id: number) => Uint8Array) | undefined,
  options: BatchOptions,
): Promise<Generation | undefined> {
  const { signal } = options;
  const starting = performance.now();
  model.truncate(0, sequence);
  try {
    await model.prefill(prompt, { sequence, signal });
  } catch (error) {
    if (signal?.aborted && error === signal.reason) return undefined;
    throw error;
  }
  options.onPrefilled?.(prompt.length, performance.now() - starting);
  const generation = new Generation(index, model.context - prompt.length + 1, bytesOf, options);
  if (!generation.isDone) decoder.begin(sequence, prompt, seedOf(options.sampling.seed, index));
  return generation;
}

/** The tokens of one prompt so far. */
class Generation {
  readonly #index: number;
  readonly #most: number;
  readonly #options: BatchOptions;
  readonly #text: TextStream;
  readonly #tokens: number[] = [];
  readonly #logprobs: { logprob: number; top: readonly TokenLogprob[] }[] = [];
  #emitted = "";
  #finishReason: FinishReason | undefined;

  constructor(
    index: number,
    room: number,
    bytesOf: ((id: number) => Uint8Array) | undefined,
    options: BatchOptions,
  ) {
    this.#index = index;
    this.#most = Math.min(options.maxTokens, room);
    this.#options = options;
    this.#text = new TextStream(bytesOf, options.stop);
    if (this.#most === 0) this.#finishReason = "length";
  }

  get isDone(): boolean {
    return this.#finishReason !== undefined;
  }

  /** Tokens that have not come back. */
  get lacking(): number {
    return this.#most - this.#tokens.length;
  }

  take({ id, logprob, top }: DrawnToken): void {
    if (this.#options.eosIds.includes(id)) return this.#finish("eos");
    this.#tokens.push(id);
    if (logprob !== undefined && top) this.#logprobs.push({ logprob, top });
    const { emit, stopped } = this.#text.push(id);
    this.#emitted += emit;
    if (stopped) this.#finishReason = "stop";
    else if (this.#tokens.length === this.#most) this.#finish("length");
  }

  interrupt(): BatchResult {
    this.#finish("interrupt");
    return this.result();
  }

  result(): BatchResult {
    return {
      index: this.#index,
      text: this.#emitted,
      tokens: this.#tokens,
      logprobs: this.#logprobs,
      finishReason: this.#finishReason!,
    };
  }

  #finish(reason: FinishReason): void {
    this.#finishReason = reason;
    this.#emitted += this.#text.finish(reason).heldBack;
  }
}
