/**
 * The generation loop: tokens come back from the GPU, which is some steps ahead, and become text. Where the text ends,
 * what ran ahead is forgotten.
 */
import type { DrawnToken } from "./decoder.ts";
import type { Gpt2, PrefillOptions } from "./gpt2.ts";
import type { SamplingOptions } from "./sampling.ts";
import { StopMatcher } from "./stop_matcher.ts";
import type { TokenSource } from "./token_source.ts";
import { StreamDecoder } from "./tokenizer.ts";

export type FinishReason = "length" | "eos" | "stop" | "interrupt";

/** What a generation continues. */
export interface Prompt {
  /** Tokens that are in the model's cache already. */
  readonly cached: ArrayLike<number>;
  /** The tokens behind them, or the logits after them when there are none. */
  readonly rest: TokenSource | { readonly logits: Float32Array<ArrayBuffer> };
}

export interface GenerationOptions {
  readonly maxTokens: number;
  readonly sampling: SamplingOptions;
  /** Texts that end the generation; they are not part of it. */
  readonly stop: readonly string[];
  /** Tokens that end it; empty to go on after them. */
  readonly eosIds: readonly number[];
  /** Also report the log-probability of each token and of this many likeliest ones. */
  readonly logprobs?: number | undefined;
  /** Results that may be under way at a time, at most what the model was loaded for, which is also the default. */
  readonly inFlight?: number | undefined;
  /** Ends the generation, between two chunks of the prompt or before the next step, as an interruption. */
  readonly signal?: AbortSignal;
  readonly onPrefillProgress?: PrefillOptions["onProgress"];
  /** Awaited between the prompt and the first token, with all of the prompt's tokens and the logits after them. */
  readonly onPrefilled?: (ids: readonly number[], logits: Float32Array) => Promise<void> | void;
}

export interface GeneratedToken extends Omit<DrawnToken, "sequence"> {
  /** The text that this token completes: empty while a character or a possible stop text is unfinished. */
  readonly text: string;
}

/**
 * Generates behind a prompt, in the model's first sequence. The last item may carry text without being the last token's
 * alone: what was held back. Afterwards the cache holds the prompt and all tokens but the last, or all but the one that
 * ended it.
 * @param bytesOf bytes of a token, or undefined to generate ids without text
 */
export async function* generate(
  model: Gpt2,
  prompt: Prompt,
  bytesOf: ((id: number) => Uint8Array) | undefined,
  options: GenerationOptions,
): AsyncGenerator<GeneratedToken, { finishReason: FinishReason; heldBack: string }> {
  const { maxTokens, sampling, eosIds, logprobs } = options;
  const decoder = await model.decoder({ sampling, logprobs });
  const text = new TextStream(bytesOf, options.stop);
  const seen = Array.from(prompt.cached);
  const { rest } = prompt;
  const restored = "logits" in rest ? rest.logits : undefined;
  try {
    const logits = "logits" in rest ? rest.logits : await model.prefill(remembering(rest, seen), {
      signal: options.signal,
      ...(options.onPrefillProgress ? { onProgress: options.onPrefillProgress } : {}),
    });
    await options.onPrefilled?.(seen, logits);
  } catch (error) {
    if (options.signal?.aborted && error === options.signal.reason) return text.finish("interrupt");
    throw error;
  }
  // The last token of a full context is drawn, but nothing runs behind it.
  const most = Math.min(maxTokens, model.context - model.length + 1);
  const depth = Math.min(options.inFlight ?? decoder.mostInFlight, decoder.mostInFlight);
  const endDecoding = model.timeline?.begin("phases", "decode");
  try {
    if (most > 0) decoder.begin(0, seen, sampling.seed, restored);
    for (let drawn = 0; drawn < most; drawn++) {
      if (options.signal?.aborted) return text.finish("interrupt");
      // One step more each time: the first tokens do not wait until many steps are handed over.
      const ahead = Math.min(depth, drawn + 2, most - drawn);
      decoder.stepAhead(ahead);
      const { sequence: _, ...token } = (await decoder.next())[0]!;
      if (eosIds.includes(token.id)) return text.finish("eos");
      const { emit, stopped } = text.push(token.id);
      yield { ...token, text: emit };
      if (stopped) return { finishReason: "stop", heldBack: "" };
    }
    return text.finish("length");
  } finally {
    await decoder.discard();
    endDecoding?.();
  }
}

/** Tokens to the text that is certain. */
export class TextStream {
  readonly #decoder: StreamDecoder | undefined;
  readonly #stops: StopMatcher;

  /** @param bytesOf bytes of a token, or undefined for tokens without text */
  constructor(bytesOf: ((id: number) => Uint8Array) | undefined, stop: readonly string[]) {
    this.#decoder = bytesOf && new StreamDecoder({ bytesOf });
    this.#stops = new StopMatcher(stop);
  }

  push(id: number): { emit: string; stopped: boolean } {
    return this.#stops.push(this.#decoder?.push(id) ?? "");
  }

  finish(finishReason: FinishReason): { finishReason: FinishReason; heldBack: string } {
    const tail = this.#stops.push(this.#decoder?.flush() ?? "");
    return { finishReason, heldBack: tail.emit + (tail.stopped ? "" : this.#stops.flush()) };
  }
}

/** Hands the tokens on and adds them to a list. */
function remembering(source: TokenSource, seen: number[]): TokenSource {
  return {
    async take(most) {
      const ids = await source.take(most);
      for (const id of ids) seen.push(id);
      return ids;
    },
  };
}
