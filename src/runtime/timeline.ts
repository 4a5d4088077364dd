/** What the host does and when, for `--profile` and `--trace`: spans of work by track, and memory as it changes. */
import type { Purpose } from "./buffers.ts";

/**
 * Where spans belong. Of one track several may be under way at a time (pipelines compile side by side); those of the
 * others follow one another or nest.
 */
export type Track =
  /** Parts of the run, from opening the device to decoding. */
  | "phases"
  /** Reading files, and converting what they hold. */
  | "files"
  | "tokenization"
  | "compilation"
  /** Recording dispatches. */
  | "encoding"
  /** Handing command buffers over. */
  | "submission"
  | "uploads"
  /** Waiting for results until they are on the host: the GPU's work is part of it. */
  | "readbacks";

/** Milliseconds on the clock of `performance.now()`, which starts with the process. */
export interface Span {
  readonly track: Track;
  readonly name: string;
  readonly startMs: number;
  readonly endMs: number;
  /** Moved by it; 0 where nothing is. */
  readonly bytes: number;
}

/** Bytes of GPU buffers by what they are for, from a moment on. */
export interface MemorySample {
  readonly atMs: number;
  readonly bytes: Readonly<Record<Purpose, number>>;
}

/** The spans of a track, or of one name on it, together. */
export interface SpanTotal {
  readonly spans: number;
  /** Sum of their times. */
  readonly ms: number;
  /** Time in which at least one was under way. */
  readonly busyMs: number;
  readonly bytes: number;
}

/** Spans and samples that are kept at most: about 200 MB, and as much again while they are written. */
const MOST_KEPT = 1_000_000;

/** Ends a span; `bytes` are what it has moved. */
export type EndSpan = (bytes?: number) => void;

interface RunningTotal {
  spans: number;
  ms: number;
  busyMs: number;
  bytes: number;
  underWay: number;
  busySince: number;
}

/** Collects spans of one process. Whoever has no timeline pays for none of it. */
export class Timeline {
  /** In the order in which they ended. */
  readonly spans: Span[] = [];
  readonly memory: MemorySample[] = [];
  readonly #keepsAll: boolean;
  readonly #totals = new Map<Track, RunningTotal>();
  #dropped = 0;

  /** @param keepsAll every span and sample, for a trace; otherwise totals, and the spans of `phases` */
  constructor({ keepsAll }: { readonly keepsAll: boolean }) {
    this.#keepsAll = keepsAll;
  }

  /** Begins a span that ends with a call of what is returned. */
  begin(track: Track, name: string): EndSpan {
    const running = this.#totalOf(track);
    const startMs = performance.now();
    if (running.underWay++ === 0) running.busySince = startMs;
    return (bytes = 0) => {
      const endMs = performance.now();
      running.spans++;
      running.ms += endMs - startMs;
      running.bytes += bytes;
      if (--running.underWay === 0) running.busyMs += endMs - running.busySince;
      if (this.#keepsAll || track === "phases") {
        this.#keep(this.spans, { track, name, startMs, endMs, bytes });
      }
    };
  }

  /** Adds a span that has just ended. */
  add(track: Track, name: string, ms: number): void {
    const endMs = performance.now();
    const total = this.#totalOf(track);
    total.spans++;
    total.ms += ms;
    total.busyMs += ms;
    if (this.#keepsAll) this.#keep(this.spans, { track, name, startMs: endMs - ms, endMs, bytes: 0 });
  }

  /** A span around work that is waited for. */
  async during<T>(track: Track, name: string, work: () => Promise<T>): Promise<T> {
    const end = this.begin(track, name);
    try {
      return await work();
    } finally {
      end();
    }
  }

  /** Notes what is allocated from now on. */
  sampleMemory(bytes: Readonly<Record<Purpose, number>>): void {
    if (this.#keepsAll) this.#keep(this.memory, { atMs: performance.now(), bytes: { ...bytes } });
  }

  total(track: Track): SpanTotal {
    const { spans, ms, busyMs, bytes } = this.#totals.get(track) ??
      { spans: 0, ms: 0, busyMs: 0, bytes: 0 };
    return { spans, ms, busyMs, bytes };
  }

  /** Begins the sums of all tracks anew; what is under way counts when it ends. */
  resetTotals(): void {
    const now = performance.now();
    for (const total of this.#totals.values()) {
      Object.assign(total, { spans: 0, ms: 0, busyMs: 0, bytes: 0, busySince: now });
    }
  }

  /** Spans and samples that there was no room for. */
  get dropped(): number {
    return this.#dropped;
  }

  /** The innermost part of the run that was under way at a moment; undefined outside of all. */
  phaseAt(ms: number): string | undefined {
    const around = this.spans.filter((s) => s.track === "phases" && s.startMs <= ms && ms <= s.endMs);
    return around.reduce<Span | undefined>((a, b) => a && a.startMs > b.startMs ? a : b, undefined)?.name;
  }

  #totalOf(track: Track): RunningTotal {
    let total = this.#totals.get(track);
    if (!total) {
      total = { spans: 0, ms: 0, busyMs: 0, bytes: 0, underWay: 0, busySince: 0 };
      this.#totals.set(track, total);
    }
    return total;
  }

  #keep<T>(list: T[], item: T): void {
    if (list.length < MOST_KEPT) list.push(item);
    else this.#dropped++;
  }
}

/** A span around work that is waited for, where somebody wants to know; the work alone otherwise. */
export async function timed<T>(
  timeline: Timeline | undefined,
  track: Track,
  name: string,
  work: () => Promise<T>,
): Promise<T> {
  return timeline ? await timeline.during(track, name, work) : await work();
}
