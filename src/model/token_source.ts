/** Where a prompt's tokens come from: a list of ids, or a text that is encoded as they are asked for. */
import type { Timeline } from "../runtime/timeline.ts";
import type { PieceEncoder } from "./tokenizer.ts";

/** Tokens in order, made as they are asked for. */
export interface TokenSource {
  /** The next tokens: `most` of them, fewer only at the end, none after it. */
  take(most: number): Promise<Uint32Array>;
}

/** Characters that are encoded in one go, some tens of milliseconds. */
const SLICE = 1 << 16;

/** Hands out ids that are there already. */
export function tokensOf(ids: ArrayLike<number>): TokenSource {
  let taken = 0;
  return {
    take(most) {
      const start = taken;
      taken = Math.min(ids.length, start + most);
      return Promise.resolve(Uint32Array.from({ length: taken - start }, (_, i) => ids[start + i]!));
    },
  };
}

/**
 * Encodes pieces of text no further ahead than is asked for. What fails, reading or encoding, fails every later call
 * that would need more of the text. Its methods may overlap; `take`s that do get their tokens in no certain order.
 */
export class TextTokens implements TokenSource {
  readonly #encoder: PieceEncoder;
  readonly #pieces: AsyncIterator<string>;
  readonly #totalBytes: number;
  readonly #timeline: Timeline | undefined;
  /** The piece that is being encoded, from `#at` on. */
  #piece = "";
  #at = 0;
  #encoding: Promise<void> = Promise.resolve();
  #encodeMs = 0;
  #isExact = false;
  /** Untaken ids, oldest first. */
  #batches: Uint32Array[] = [];
  #known = 0;
  #taken = 0;

  /** @param totalBytes UTF-8 bytes of all pieces, or a limit that they keep to, if one is known */
  constructor(
    encoder: PieceEncoder,
    pieces: AsyncIterable<string>,
    totalBytes = Infinity,
    timeline?: Timeline,
  ) {
    this.#timeline = timeline;
    this.#encoder = encoder;
    this.#pieces = pieces[Symbol.asyncIterator]();
    this.#totalBytes = encoder.isByteBounded ? totalBytes : Infinity;
  }

  async take(most: number): Promise<Uint32Array> {
    while (!this.#isExact && this.#known - this.#taken < most) await this.#encodeMore();
    const ids = new Uint32Array(Math.min(most, this.#known - this.#taken));
    for (let filled = 0; filled < ids.length;) {
      const batch = this.#batches[0]!;
      const part = batch.subarray(0, ids.length - filled);
      ids.set(part, filled);
      filled += part.length;
      if (part.length < batch.length) this.#batches[0] = batch.subarray(part.length);
      else this.#batches.shift();
    }
    this.#taken += ids.length;
    return ids;
  }

  /** Encodes until the text ends or `bytes` of its UTF-8 are read in all; `take` hands out the ids as ever. */
  async lookAhead(bytes: number): Promise<void> {
    while (!this.#isExact && this.#encoder.pushedBytes < bytes) await this.#encodeMore();
  }

  /**
   * The most tokens that there can be, taken ones included: the number there is once the text has ended, until then one
   * for each byte that has not given its tokens; Infinity where no size is known or the tokenizer may add to the text.
   */
  bound(): number {
    if (this.#isExact) return this.#known;
    return this.#known + this.#encoder.heldBytes + this.#totalBytes - this.#encoder.pushedBytes;
  }

  /** Tokens that are known so far, taken ones included. */
  get known(): number {
    return this.#known;
  }

  /** The number of tokens, judged by the text so far while it has not ended; undefined where its size is not known. */
  estimate(): number | undefined {
    if (this.#isExact) return this.#known;
    const encodedBytes = this.#encoder.pushedBytes - this.#encoder.heldBytes;
    if (this.#totalBytes === Infinity || encodedBytes === 0) return undefined;
    return Math.round(this.#known / encodedBytes * this.#totalBytes);
  }

  /** The text has ended, so that `bound` is the number of tokens. */
  get isExact(): boolean {
    return this.#isExact;
  }

  /** Milliseconds spent encoding so far; reading not included. */
  get encodeMs(): number {
    return this.#encodeMs;
  }

  /** One call after the other. Behind one that failed, all fail. */
  #encodeMore(): Promise<void> {
    this.#encoding = this.#encoding.then(() => this.#encodeSlice());
    return this.#encoding;
  }

  async #encodeSlice(): Promise<void> {
    if (this.#isExact) return;
    if (this.#at >= this.#piece.length) {
      const next = await this.#pieces.next();
      if (next.done) {
        this.#keep(() => this.#encoder.end());
        this.#isExact = true;
        return;
      }
      this.#piece = next.value;
      this.#at = 0;
    }
    const slice = this.#piece.slice(this.#at, this.#at += SLICE);
    this.#keep(() => this.#encoder.push(slice));
  }

  #keep(encode: () => Uint32Array): void {
    const starting = performance.now();
    const ids = encode();
    const elapsedMs = performance.now() - starting;
    this.#encodeMs += elapsedMs;
    this.#timeline?.add("tokenization", "text", elapsedMs);
    if (ids.length > 0) this.#batches.push(ids);
    this.#known += ids.length;
  }
}

/** The next tokens of a source, `most` at the most; what is left stays in it. */
export function upTo(source: TokenSource, most: number): TokenSource {
  let left = most;
  return {
    async take(count) {
      const ids = await source.take(Math.min(count, left));
      left -= ids.length;
      return ids;
    },
  };
}

/** Tokens that were taken already, in front of the rest. */
export function prepended(head: Uint32Array, rest: TokenSource): TokenSource {
  const front = tokensOf(head);
  return {
    async take(most) {
      const first = await front.take(most);
      const more = first.length < most ? await rest.take(most - first.length) : new Uint32Array(0);
      if (first.length === 0 || more.length === 0) return first.length === 0 ? more : first;
      const ids = new Uint32Array(first.length + more.length);
      ids.set(first);
      ids.set(more, first.length);
      return ids;
    },
  };
}
