/**
 * Finds stop strings in text that arrives in pieces. The result does not depend on where the pieces are cut: the first
 * stop string to be complete ends the text (of two that end together, the longer), and the text before it is all that
 * is emitted. Text that may still turn out to begin a stop string is held back.
 */
export class StopMatcher {
  readonly #stops: readonly string[];
  readonly #longest: number;
  #held = "";
  #stopped = false;

  /** @param stops empty strings are ignored */
  constructor(stops: readonly string[]) {
    this.#stops = stops.filter((stop) => stop !== "");
    this.#longest = Math.max(0, ...this.#stops.map((stop) => stop.length));
  }

  /** The text that is now certain; once `stopped`, everything further is ignored. */
  push(text: string): { emit: string; stopped: boolean } {
    if (this.#stopped) return { emit: "", stopped: true };
    const seen = this.#held + text;
    const end = this.#startOfFirstMatch(seen);
    if (end !== undefined) {
      this.#stopped = true;
      this.#held = "";
      return { emit: seen.slice(0, end), stopped: true };
    }
    const certain = seen.length - this.#possiblePrefixLength(seen);
    this.#held = seen.slice(certain);
    return { emit: seen.slice(0, certain), stopped: false };
  }

  /** At the end of the stream: what was held back for a stop string that never came. */
  flush(): string {
    const rest = this.#held;
    this.#held = "";
    return rest;
  }

  /** Where the stop string that is complete first begins. */
  #startOfFirstMatch(text: string): number | undefined {
    let best: { start: number; end: number } | undefined;
    for (const stop of this.#stops) {
      const start = text.indexOf(stop);
      if (start < 0) continue;
      const end = start + stop.length;
      if (best === undefined || end < best.end || (end === best.end && start < best.start)) {
        best = { start, end };
      }
    }
    return best?.start;
  }

  /** Length of the longest end of the text that begins a stop string. */
  #possiblePrefixLength(text: string): number {
    for (let length = Math.min(this.#longest - 1, text.length); length > 0; length--) {
      const tail = text.slice(-length);
      if (this.#stops.some((stop) => stop.length > length && stop.startsWith(tail))) return length;
    }
    return 0;
  }
}
