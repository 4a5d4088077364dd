/** The generation loop: logits to tokens to text, one step at a time. */
import type { Gpt2, PrefillOptions } from "./gpt2.ts";
import { createSampler, logSoftmaxTopK, type SamplingOptions, type TokenLogprob } from "./sampling.ts";
import { StopMatcher } from "./stop_matcher.ts";
import type { TokenSource } from "./token_source.ts";
import { StreamDecoder } from "./tokenizer.ts";

export type FinishReason = "length" | "eos" | "stop" | "interrupt";

/** What a generation continues. */
export interface Prompt {
  /** Tokens that are in the model's cache already. */
  readonly cached: ArrayLike<number>;
  /** The tokens behind them, or the logits after them when there are none. */
  readonly rest: TokenSource | { readonly logits: Float32Array };
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
  /** Ends the generation, between two chunks of the prompt or before the next step, as an interruption. */
  readonly signal?: AbortSignal;
  readonly onPrefillProgress?: PrefillOptions["onProgress"];
  /** Awaited between the prompt and the first token, with all of the prompt's tokens and the logits after them. */
  readonly onPrefilled?: (ids: readonly number[], logits: Float32Array) => Promise<void> | void;
}

export interface GeneratedToken {
  readonly id: number;
  /** The text that this token completes: empty while a character or a possible stop text is unfinished. */
  readonly text: string;
  readonly logprob?: number;
  readonly top?: readonly TokenLogprob[];
}

/**
 * Generates behind a prompt. The last item may carry text without being the last token's alone: what was held back.
 * @param bytesOf bytes of a token, or undefined to generate ids without text
 */
export async function* generate(
  model: Gpt2,
  prompt: Prompt,
  bytesOf: ((id: number) => Uint8Array) | undefined,
  options: GenerationOptions,
): AsyncGenerator<GeneratedToken, { finishReason: FinishReason; heldBack: string }> {
  const { maxTokens, sampling, eosIds, logprobs } = options;
  const sampler = createSampler(sampling);
  const decoder = bytesOf && new StreamDecoder({ bytesOf });
  const stops = new StopMatcher(options.stop);
  const seen = Array.from(prompt.cached);
  const finish = (finishReason: FinishReason) => {
    const tail = stops.push(decoder?.flush() ?? "");
    return { finishReason, heldBack: tail.emit + (tail.stopped ? "" : stops.flush()) };
  };

  let logits: Float32Array;
  try {
    logits = "logits" in prompt.rest
      ? prompt.rest.logits
      : await model.prefill(remembering(prompt.rest, seen), {
        signal: options.signal,
        ...(options.onPrefillProgress ? { onProgress: options.onPrefillProgress } : {}),
      });
    await options.onPrefilled?.(seen, logits);
  } catch (error) {
    if (options.signal?.aborted && error === options.signal.reason) return finish("interrupt");
    throw error;
  }
  for (let step = 0; step < maxTokens; step++) {
    if (options.signal?.aborted) return finish("interrupt");
    const id = sampler.next(logits, seen);
    if (eosIds.includes(id)) return finish("eos");
    seen.push(id);
    const { emit, stopped } = stops.push(decoder?.push(id) ?? "");
    yield { id, text: emit, ...(logprobs === undefined ? {} : logSoftmaxTopK(logits, logprobs, id)) };
    if (stopped) return { finishReason: "stop", heldBack: "" };
    if (model.length === model.context) break;
    if (step + 1 < maxTokens) logits = await model.decodeStep(id);
  }
  return finish("length");
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
