/**
 * `--session FILE`: the keys and values of a prompt, kept from one run to the next. A file that does not exist is written
 * behind the prefill; one that exists is only read: as much of it as the prompt begins with is restored, the rest of the
 * prompt is computed.
 */
import { attentionOf, type Sparsity } from "../kvcache/sparsity.ts";
import { requireWritable } from "../model/atomic_file.ts";
import type { GPT2Config } from "../model/config.ts";
import type { Prompt } from "../model/generation.ts";
import type { Gpt2 } from "../model/gpt2.ts";
import { paddedSizes } from "../model/memory_plan.ts";
import { describePositions, type Positions } from "../model/positions.ts";
import { commonPrefix, fingerprint, openSession, saveSession, type Session } from "../model/session.ts";
import { prepended, tokensOf, type TokenSource } from "../model/token_source.ts";
import type { WeightSource } from "../model/weight_source.ts";
import type { Elem } from "../runtime/kernel.ts";
import { type ProgressLine, writeNote } from "./output.ts";

export interface SessionReport {
  /** Tokens of the prompt that were restored and not computed. */
  readonly restored_tokens: number;
  readonly restore_ms: number | null;
  readonly save_ms: number | null;
}

/** The session file of a run, read or to be written. */
export class PromptSession {
  readonly #path: string;
  readonly #model: string;
  readonly #positions: Positions;
  readonly #attention: string;
  readonly #saved: Session | undefined;
  readonly #isQuiet: boolean;
  #restoredTokens = 0;
  #restoreMs: number | null = null;
  #saveMs: number | null = null;

  private constructor(
    path: string,
    model: string,
    positions: Positions,
    attention: string,
    saved: Session | undefined,
    isQuiet: boolean,
  ) {
    this.#path = path;
    this.#model = model;
    this.#positions = positions;
    this.#attention = attention;
    this.#saved = saved;
    this.#isQuiet = isQuiet;
  }

  /**
   * @throws ModelError when the file is damaged, or belongs to another model, element type, mapping of positions or
   * attention
   */
  static async open(
    path: string,
    run: {
      source: WeightSource;
      config: GPT2Config;
      elem: Elem;
      positions: Positions;
      sparsity: Sparsity;
      isQuiet: boolean;
    },
  ): Promise<PromptSession> {
    const { source, config, elem, positions, sparsity, isQuiet } = run;
    const attention = attentionOf(sparsity);
    const model = await fingerprint(source, config);
    const saved = await openSession(path);
    if (!saved) await requireWritable(path); // now, not after the prefill
    try {
      saved?.check({
        model,
        positions: describePositions(positions, saved.tokens),
        attention,
        elem,
        layers: config.nLayer,
        heads: config.nHead,
        headDim: paddedSizes(config).headDim,
        vocabSize: config.vocabSize,
      });
    } catch (error) {
      await saved?.close();
      throw error;
    }
    return new PromptSession(path, model, positions, attention, saved, isQuiet);
  }

  /** Restores what the session and the prompt have in common. */
  async begin(model: Gpt2, tokens: TokenSource, progress: ProgressLine): Promise<Prompt> {
    const saved = this.#saved;
    if (!saved) return { cached: [], rest: tokens };
    const starting = performance.now();
    const head = await tokens.take(saved.tokens);
    model.checkRoom(head.length);
    let common = commonPrefix(head, saved.ids);
    let rest: Prompt["rest"];
    if (common < head.length) {
      rest = prepended(head.subarray(common), tokens);
    } else if (common < saved.tokens) {
      // The prompt ends inside the session, whose logits are those of a later token: its last token runs again.
      common--;
      rest = tokensOf(head.subarray(common));
    } else {
      const next = await tokens.take(1);
      rest = next.length > 0 ? prepended(next, tokens) : { logits: await saved.logits() };
    }
    await saved.restore(model.cache, common, {
      onProgress: (done, total) => progress.show(`restoring ${Math.floor(100 * done / total)} %`),
    });
    progress.clear();
    model.cache.adopt(common);
    this.#restoredTokens = common;
    this.#restoreMs = performance.now() - starting;
    if (!this.#isQuiet) {
      writeNote(`note: ${common} of ${saved.tokens} tokens restored from ${this.#path}`);
    }
    return { cached: head.subarray(0, common), rest };
  }

  /** Writes the file after the prefill, unless there was one. */
  async save(
    model: Gpt2,
    ids: readonly number[],
    logits: Float32Array,
    progress: ProgressLine,
    signal: AbortSignal,
  ): Promise<void> {
    if (this.#saved) return;
    const starting = performance.now();
    const contents = {
      model: this.#model,
      positions: describePositions(this.#positions, ids.length),
      attention: this.#attention,
      ids: Uint32Array.from(ids),
      logits,
      rows: model.cache,
    };
    await saveSession(this.#path, contents, {
      signal,
      onProgress: (done, total) => progress.show(`saving the session ${Math.floor(100 * done / total)} %`),
    });
    progress.clear();
    this.#saveMs = performance.now() - starting;
  }

  report(): SessionReport {
    return {
      restored_tokens: this.#restoredTokens,
      restore_ms: this.#restoreMs,
      save_ms: this.#saveMs,
    };
  }

  async close(): Promise<void> {
    await this.#saved?.close();
  }
}
