/**
 * A process that runs for long: thousands of short generations and classifications, then sessions, a stream of
 * documents and loads, with memory and handles looked at in even steps. docs/long_haul.md says how to read it.
 *
 *     bun bench/long_haul.ts [--generations 10000] [--classifications 2000] [--documents 10000]
 *       [--sessions 200] [--loads 400] [--samples 100] [--context 1024] [--model DIR] [--out FILE.json]
 *       [--commit ID]
 *
 * The same with `deno run -A`. The model needs a score head. Progress goes to stderr, and what there is so far into
 * the file of `--out`, after every sample. Ends with 1 when something grew; a result that changed ends the run.
 */
import { mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { parseArgs } from "node:util";
import { setFlagsFromString } from "node:v8";
import { runInNewContext } from "node:vm";
import {
  type ClassifyOptions,
  type GenerateOptions,
  load,
  type LoadOptions,
  type Longform,
  LongformError,
} from "../mod.ts";
import { DEFAULT_MODEL } from "../src/model/run_settings.ts";
import { uniform } from "../src/model/sampling.ts";
import { openSession, saveSession } from "../src/model/session.ts";
import { driverBytes, formatMiB } from "./process.ts";
import { provenance, writeResult } from "./provenance.ts";

type Unit = "bytes" | "handles" | "objects" | "ms";

/** What is looked at. */
const METRICS = {
  rss: ["resident set", "bytes"],
  anonymous: ["of that, anonymous", "bytes"],
  native: ["of that, outside of the JavaScript engine", "bytes"],
  heap: ["JavaScript heap", "bytes"],
  external: ["memory that JavaScript objects hold outside of it", "bytes"],
  objects: ["JavaScript objects", "objects"],
  ledger: ["GPU buffers, by the ledger", "bytes"],
  ledgerPeak: ["their peak", "bytes"],
  driver: ["GPU memory in use, by the driver", "bytes"],
  buffers: ["GPU buffers not destroyed", "handles"],
  bufferObjects: ["GPU buffers not collected", "handles"],
  bindGroups: ["bind groups", "handles"],
  pipelines: ["pipelines", "handles"],
  encoders: ["command encoders", "handles"],
  descriptors: ["open files", "handles"],
  threads: ["threads", "handles"],
  mappings: ["memory mappings", "handles"],
  timers: ["timers", "handles"],
  listeners: ["listeners", "handles"],
  operation: ["time of an operation", "ms"],
  probe: ["time of the probe", "ms"],
} as const satisfies Record<string, readonly [label: string, unit: Unit]>;
export type Metric = keyof typeof METRICS;
const NAMES = Object.keys(METRICS) as Metric[];

/** Null where the runtime or the system does not tell. */
export type Values = Readonly<Record<Metric, number | null>>;

export interface Sample {
  /** Operations of the phase before it, and the time they took. */
  readonly operations: number;
  readonly ms: number;
  readonly values: Values;
}

/**
 * What devices were asked to make and somebody still holds. Counts by wrapping a device's methods, and by
 * finalizers: most of these objects have no `destroy`.
 */
export class Handles {
  /** Buffers that were created and not destroyed. */
  buffers = 0;
  readonly #held = new Map<string, number>();
  readonly #collected = new FinalizationRegistry<string>((method) => this.#count(method, -1));

  watch(device: GPUDevice): void {
    const methods = device as unknown as Record<string, (descriptor: unknown) => object>;
    for (
      const method of [
        "createBuffer",
        "createBindGroup",
        "createComputePipelineAsync",
        "createCommandEncoder",
      ]
    ) {
      const create = methods[method]!.bind(device);
      methods[method] = (descriptor) => {
        const made = create(descriptor);
        if (made instanceof Promise) made.then((object) => this.#track(method, object), () => {});
        else this.#track(method, made);
        return made;
      };
    }
  }

  /** Objects of a method of the device that the garbage collector has not taken. */
  held(method: string): number {
    return this.#held.get(method) ?? 0;
  }

  #track(method: string, made: object): void {
    this.#count(method, 1);
    this.#collected.register(made, method);
    if (method !== "createBuffer") return;
    this.buffers++;
    const buffer = made as GPUBuffer;
    const destroy = buffer.destroy.bind(buffer);
    buffer.destroy = () => {
      this.buffers--;
      buffer.destroy = destroy;
      return destroy();
    };
  }

  #count(method: string, change: number): void {
    this.#held.set(method, this.held(method) + change);
  }
}

/** A signal that is never aborted, as that of a server that does not end, and who listens to it. */
export class SharedSignal {
  readonly signal: AbortSignal = new AbortController().signal;
  listeners = 0;

  constructor() {
    const { signal } = this;
    const add = signal.addEventListener.bind(signal);
    const remove = signal.removeEventListener.bind(signal);
    signal.addEventListener = (...args: Parameters<typeof add>) => {
      this.listeners++;
      add(...args);
    };
    signal.removeEventListener = (...args: Parameters<typeof remove>) => {
      this.listeners--;
      remove(...args);
    };
  }
}

/** Timers that have been set from now on, and have neither fired nor been cleared. */
function watchTimers(): ReadonlySet<unknown> {
  const pending = new Set<unknown>();
  const { setTimeout: set, clearTimeout: clear } = globalThis;
  globalThis.setTimeout = ((callback: (...args: unknown[]) => void, ms?: number, ...args: unknown[]) => {
    const timer = set(() => {
      pending.delete(timer);
      callback(...args);
    }, ms);
    pending.add(timer);
    return timer;
  }) as typeof setTimeout;
  globalThis.clearTimeout = ((timer: Parameters<typeof clear>[0]) => {
    pending.delete(timer);
    clear(timer);
  }) as typeof clearTimeout;
  return pending;
}

/** Frequent words of English books. */
const WORDS = [
  "the of and to a in that he was it his with as had for her at be not on but she you him is my all",
  "said so from they me were this have by or one would when there which what no been who night house",
  "hand door day face eyes life heart room sea love ship",
].join(" ").split(" ");
const LABELS = [["crime", "romance"], ["sea", "city", "country"], ["happy", "sad"]];
const SEED = 9;

/** A number from 0 up to 1 for each use in each operation, the same in every run. */
function chance(operation: number, use: number): number {
  return uniform(SEED, 32 * operation + use);
}

/** A whole number of `[from, to]` in the same way. */
function pick(from: number, to: number, operation: number, use: number): number {
  return from + Math.floor((to - from + 1) * chance(operation, use));
}

/** Text of which every other word is new: what remembers words must not remember all of them. */
function words(count: number, operation: number, use: number): string {
  return Array.from({ length: count }, (_, i) => {
    const place = 4096 * operation + i;
    if (i % 2 === 0) return WORDS[pick(0, WORDS.length - 1, place, use)]!;
    const letters = Array.from(
      { length: 6 },
      (_, j) => String.fromCharCode(97 + Math.floor(26 * uniform(use, 8 * place + j))),
    );
    return letters.join("");
  }).join(" ");
}

/** How a caller may treat a generation; those of a kind that is named more often come more often. */
const KINDS = "greedy greedy greedy sampled sampled stopped abandoned aborted refused".split(" ");

/** What was run and how it ended, counted. */
export type Tally = Record<string, number>;

function count(tally: Tally, what: string): void {
  tally[what] = (tally[what] ?? 0) + 1;
}

/** Runs the `i`th generation. @throws when it ended in another way than it should */
export async function generateOne(
  longform: Longform,
  i: number,
  { signal }: SharedSignal,
  tally: Tally,
): Promise<void> {
  const kind = KINDS[pick(0, KINDS.length - 1, i, 0)]!;
  count(tally, kind);
  if (kind === "refused") return await refuseOne(longform, i, tally);
  const abortion = new AbortController();
  const options: GenerateOptions = {
    maxTokens: pick(2, 8, i, 1),
    signal: kind === "aborted" ? abortion.signal : signal,
    stop: kind === "stopped" ? [WORDS[pick(0, WORDS.length - 1, i, 2)]!, ",", "."] : [],
    ...(kind === "sampled"
      ? {
        seed: i,
        // New in each: nothing may be kept for all settings that ever were.
        temperature: 0.5 + chance(i, 3),
        topK: pick(1, 100, i, 4),
        topP: 0.5 + chance(i, 5) / 2,
        repeatPenalty: 1 + chance(i, 6) / 4,
      }
      : { temperature: 0 }),
  };
  const abortAt = pick(0, 2, i, 7);
  if (kind === "aborted" && abortAt === 0) abortion.abort();
  const generation = longform.generate(words(pick(1, 8, i, 8), i, 9), options);
  for (let pieces = 1;; pieces++) {
    const { value, done } = await generation.next();
    if (done) return count(tally, `ended by ${value.finishReason}`);
    if (kind === "aborted" && pieces === abortAt) abortion.abort();
    if (kind === "abandoned") {
      await generation.return({ finishReason: "interrupt" });
      return count(tally, "ended by its reader");
    }
  }
}

/** Asks for what cannot be. @throws when it is done all the same */
async function refuseOne(longform: Longform, i: number, tally: Tally): Promise<void> {
  const { model, config } = longform;
  const prompts: readonly (string | number[])[] = [
    "",
    [config.vocabSize],
    [1, 2, -1],
    // What fits of it runs before it is known to be too long, which takes seconds without a GPU.
    ...(i % 20 === 0 ? [new Array<number>(model.context + 1).fill(1)] : []),
  ];
  try {
    await longform.generate(prompts[pick(0, prompts.length - 1, i, 10)]!).next();
  } catch (error) {
    if (!(error instanceof LongformError)) throw error;
    return count(tally, `ended by ${error.name}`);
  }
  throw new Error(`Generation ${i} was to be refused`);
}

/** Runs the `i`th classification, of one document. @throws when it failed */
export async function classifyOne(
  longform: Longform,
  i: number,
  { signal }: SharedSignal,
  tally: Tally,
): Promise<void> {
  const labels = i % 2 === 0 ? undefined : LABELS[pick(0, LABELS.length - 1, i, 11)];
  count(tally, labels ? "classified by labels" : "classified by the score head");
  await classifyText(longform, words(pick(5, 200, i, 12), i, 13), { labels, signal });
}

/** The logits of a text. @throws when it cannot be classified */
async function classifyText(longform: Longform, text: string, options: ClassifyOptions): Promise<unknown> {
  const [outcome] = await Array.fromAsync(longform.classify([{ text }], options));
  if (!outcome || "error" in outcome) throw new Error(outcome?.error);
  return outcome.classified.logits;
}

async function* documents(total: number): AsyncGenerator<{ readonly text: string }> {
  for (let i = 0; i < total; i++) yield { text: words(pick(1, 8, i, 14), i, 15) };
}

/** Saves the keys and values of a prompt to a file and restores them. */
async function sessionOne(longform: Longform, path: string, i: number, tally: Tally): Promise<void> {
  const { model } = longform;
  const ids = (await longform.tokenizer()).encode(words(pick(50, 150, i, 16), i, 17));
  model.truncate(0);
  const logits = await model.prefill(ids);
  const origin = { model: "long haul", positions: "exact", attention: "dense" };
  await saveSession(path, { ...origin, ids: Uint32Array.from(ids), logits, rows: model.cache });
  model.truncate(0);
  const session = (await openSession(path))!;
  try {
    await session.restore(model.cache, ids.length);
    model.cache.adopt(ids.length);
  } finally {
    await session.close();
  }
  count(tally, "saved and restored");
}

/** Loads a model, classifies a document now and then, and closes it; every other load fails. */
export async function loadOne(options: LoadOptions, i: number, tally: Tally): Promise<void> {
  const failing: readonly LoadOptions[] = [
    {
      ...options,
      // In the middle: buffers are allocated, and kernels compile.
      onLoad: () => {
        throw new LongformError("The caller does not want it any more");
      },
    },
    { ...options, model: join(options.model!, "no-such-folder") },
    { ...options, adapter: "no-such-adapter" },
    { ...options, sparsity: "no-such-pattern" },
  ];
  const failure = i % 2 === 1 ? failing[(i - 1) / 2 % failing.length] : undefined;
  try {
    const longform = await load(failure ?? { ...options, encodingWorkers: i % 8 === 0 ? 1 : 0 });
    if (i % 4 === 0) await classifyOne(longform, i, new SharedSignal(), {});
    await longform.close();
  } catch (error) {
    if (!failure || !(error instanceof LongformError)) throw error;
    return count(tally, `not loaded for ${error.name}`);
  }
  if (failure) throw new Error(`Load ${i} was to fail`);
  count(tally, "loaded and closed");
}

/** Words that the tokenizer's library remembers, and then some. */
const REMEMBERED = 10_500;
/** Documents of as many tokens as a small context holds. */
const LONG_WORDS = 250;

/** Has the tokenizers of prompts and of documents meet as many words as they remember: they grow until then. */
async function fillMemories(longform: Longform): Promise<void> {
  const apart = 1 << 16;
  (await longform.tokenizer()).encode(words(2 * REMEMBERED, apart, 18));
  const texts = Array.from(
    { length: Math.ceil(2 * REMEMBERED / LONG_WORDS) },
    (_, i) => ({ text: words(LONG_WORDS, apart + i, 19) }),
  );
  for await (const outcome of longform.classify(texts)) {
    if ("error" in outcome) throw new Error(outcome.error);
  }
}

/** Whether the same requests still have the same results, and how long a generation takes. */
class Probe {
  #expected: string | undefined;

  /** @returns milliseconds of the generation @throws when a result is not that of the first run */
  async run(longform: Longform): Promise<number> {
    const starting = performance.now();
    const options = { maxTokens: 8, temperature: 0, ignoreEos: true };
    const pieces = await Array.fromAsync(longform.generate("It was the best of times, it was the", options));
    const ms = performance.now() - starting;
    const found = JSON.stringify([
      pieces,
      await classifyText(longform, "The ship went down with all hands.", {}),
      await classifyText(longform, "The ship went down with all hands.", { labels: LABELS[0] }),
      await longform.score("It was the worst of times."),
    ]);
    this.#expected ??= found;
    if (found !== this.#expected) throw new Error(`The probe's results are ${found}, were ${this.#expected}`);
    return ms;
  }
}

/** Collects all garbage there is now. */
const collect: () => void = (() => {
  const { Bun: bun } = globalThis as { Bun?: { gc(force: boolean): void } };
  if (bun) return () => bun.gc(true);
  setFlagsFromString("--expose-gc");
  return runInNewContext("gc") as () => void;
})();

/** JavaScript objects on the heap; null where the runtime does not count them. */
const objectCount: () => number | null = await (async () => {
  if (!("Bun" in globalThis)) return () => null;
  const { heapStats } = await import("bun:jsc");
  return () => heapStats().objectCount;
})();

/** What a function finds, or null where there is no /proc. */
function ifThere<T>(look: () => T): T | null {
  try {
    return look();
  } catch {
    return null;
  }
}

/**
 * Memory that is no file's. JavaScriptCore reserves the address space of its heap and of its code by the GiB, and
 * gives pages back when it likes; V8 has no such mapping to tell it by.
 */
function anonymousBytes(): { readonly all: number; readonly native: number | null } {
  let [all, native, size] = [0, 0, 0];
  const lines = /^([0-9a-f]+)-([0-9a-f]+) |^Anonymous: +(\d+) kB/gm;
  for (const [, from, to, kib] of readFileSync("/proc/self/smaps", "utf8").matchAll(lines)) {
    if (kib === undefined) {
      size = parseInt(to!, 16) - parseInt(from!, 16);
      continue;
    }
    all += 1024 * Number(kib);
    if (size < 2 ** 30) native += 1024 * Number(kib);
  }
  return { all, native: "Bun" in globalThis ? native : null };
}

/** Looks at the process. */
export class Sampler {
  readonly handles = new Handles();
  readonly shared = new SharedSignal();
  readonly #probe = new Probe();
  readonly #timers: ReadonlySet<unknown>;

  /** @param timers those that are pending */
  constructor(timers: ReadonlySet<unknown> = new Set()) {
    this.#timers = timers;
  }

  /** @param isIdle whether the model can take the probe */
  async sample(longform: Longform, isIdle: boolean): Promise<Values> {
    const probe = isIdle ? await this.#probe.run(longform) : null;
    // Twice: what finalizers let go of is garbage afterwards.
    for (let i = 0; i < 2; i++) {
      collect();
      await new Promise((resolve) => setTimeout(resolve, 10));
    }
    const { rss, heapUsed, external } = process.memoryUsage();
    const { memory } = longform.gpu;
    const { handles, shared } = this;
    const anonymous = ifThere(anonymousBytes);
    const listening = process.eventNames().map((name) => process.listenerCount(name as "exit"));
    return {
      rss,
      anonymous: anonymous && anonymous.all,
      native: anonymous && anonymous.native,
      heap: heapUsed,
      external,
      objects: objectCount(),
      ledger: memory.totalBytes,
      ledgerPeak: memory.peakBytes,
      driver: driverBytes(),
      buffers: handles.buffers,
      bufferObjects: handles.held("createBuffer"),
      bindGroups: handles.held("createBindGroup"),
      pipelines: handles.held("createComputePipelineAsync"),
      encoders: handles.held("createCommandEncoder"),
      descriptors: ifThere(() => readdirSync("/proc/self/fd").length),
      threads: ifThere(() => readdirSync("/proc/self/task").length),
      mappings: ifThere(() => readFileSync("/proc/self/maps", "utf8").split("\n").length - 1),
      timers: this.#timers.size,
      listeners: listening.reduce((sum, n) => sum + n, shared.listeners),
      operation: null,
      probe,
    };
  }
}

/** Runs a phase's operations with samples in even steps, of which the first comes before any. */
export async function haul(
  operations: number,
  samples: number,
  run: (i: number) => Promise<void>,
  sample: () => Promise<Values>,
  onSample: (samples: readonly Sample[]) => void = () => {},
): Promise<Sample[]> {
  const taken: Sample[] = [];
  const every = Math.max(1, Math.floor(operations / samples));
  let ms = 0;
  for (let i = 0; i <= operations; i++) {
    if (i % every === 0 || i === operations) {
      const last = taken.at(-1);
      const operation = last ? (ms - last.ms) / (i - last.operations) : null;
      taken.push({ operations: i, ms, values: { ...await sample(), operation } });
      onSample(taken);
    }
    if (i === operations) break;
    const starting = performance.now();
    await run(i);
    ms += performance.now() - starting;
  }
  return taken;
}

export interface Trend {
  /** Change an operation, by least squares. */
  readonly slope: number;
  /** Half of the width of its 95 % confidence interval. */
  readonly uncertainty: number;
}

/**
 * The straight line through points, by least squares. Neighbouring samples are alike, and count for fewer than as
 * many independent ones: by the lag-1 autocorrelation of what is off the line (Santer et al. 2000).
 */
export function trendOf(points: readonly (readonly [x: number, y: number])[]): Trend {
  const n = points.length;
  const sum = (of: (x: number, y: number) => number) => points.reduce((all, [x, y]) => all + of(x, y), 0);
  const [meanX, meanY] = [sum((x) => x) / n, sum((_, y) => y) / n];
  const spread = sum((x) => (x - meanX) ** 2);
  const slope = sum((x, y) => (x - meanX) * (y - meanY)) / spread;
  const off = points.map(([x, y]) => y - meanY - slope * (x - meanX));
  const squares = off.reduce((all, e) => all + e * e, 0);
  if (squares === 0) return { slope, uncertainty: 0 };
  const lagged = off.slice(1).reduce((all, e, i) => all + e * off[i]!, 0);
  const correlation = Math.min(Math.max(lagged / squares, 0), 0.9);
  const independent = Math.max(n * (1 - correlation) / (1 + correlation), 4);
  return { slope, uncertainty: 2 * Math.sqrt(squares / (independent - 2) / spread) };
}

/** `unclear`: the samples scatter too much to tell. */
export type Verdict = "flat" | "grows" | "unclear";

export function judge({ slope, uncertainty }: Trend, bound: number): Verdict {
  if (slope + uncertainty < bound) return "flat";
  return slope - uncertainty > 0 ? "grows" : "unclear";
}

/** One line of the table. */
export interface Row extends Trend {
  readonly metric: Metric;
  /** Of the first sample, that in the middle, the last, and the largest of all. */
  readonly first: number;
  readonly middle: number;
  readonly last: number;
  readonly most: number;
  /** What the slope makes of a day of such operations without a pause. */
  readonly day: number;
  /** Change an operation that the verdict allows. */
  readonly bound: number;
  readonly verdict: Verdict;
}

/**
 * What may be added an operation: less than a leak would leave (docs/long_haul.md).
 * @param weight of the operation, as a multiple of a generation
 */
function boundOf(unit: Unit, weight: number): number {
  return { bytes: 1024, handles: 0.001, objects: 0.5, ms: 0 }[unit] * weight;
}

/** The second half of the samples judged: the first fills caches and heaps. */
export function rowsOf(samples: readonly Sample[], weight: number): Row[] {
  const half = samples.slice(samples.length >> 1);
  const end = samples.at(-1)!;
  const operations = end.operations - half[0]!.operations;
  return NAMES.flatMap((metric): Row[] => {
    const known = (all: readonly Sample[]) =>
      all.flatMap(({ operations, values }) => {
        const value = values[metric];
        return value === null ? [] : [[operations, value] as const];
      });
    const points = known(half);
    if (points.length < 4) return [];
    const all = known(samples).map(([, y]) => y);
    const trend = trendOf(points);
    const unit = METRICS[metric][1];
    // Time may grow by a tenth.
    const mean = points.reduce((sum, [, y]) => sum + y, 0) / points.length;
    const bound = unit === "ms" ? mean / 10 / operations : boundOf(unit, weight);
    return [{
      metric,
      first: all[0]!,
      middle: points[0]![1],
      last: all.at(-1)!,
      most: Math.max(...all),
      ...trend,
      day: trend.slope * DAY_MS * end.operations / end.ms,
      bound,
      verdict: judge(trend, bound),
    }];
  });
}

const DAY_MS = 24 * 3600 * 1000;

/** One phase: operations of a kind, and what they are run on. */
interface Phase {
  readonly name: string;
  readonly operations: number;
  /** Of an operation in what it makes and lets go of, as a multiple of a generation. */
  readonly weight: number;
  /** Whether the model can take the probe between operations. */
  readonly isIdle: boolean;
  readonly run: (i: number) => Promise<void>;
}

function format(unit: Unit, value: number | null): string {
  if (value === null) return "-";
  if (unit === "bytes") return `${formatMiB(value)} MiB`;
  return unit === "ms" ? `${value.toFixed(1)} ms` : `${Number(value.toFixed(1))}`;
}

/** Samples as a file holds them: a line for each. */
function linesOf(samples: readonly Sample[]): { readonly columns: string; readonly samples: string[] } {
  return {
    columns: ["operations", "ms", ...NAMES].join(),
    samples: samples.map(({ operations, ms, values }) =>
      [operations, ms, ...NAMES.map((name) => values[name])].map((value) =>
        value === null ? "" : Number(value.toFixed(1))
      ).join()
    ),
  };
}

function printProgress({ name, operations: all }: Phase, { operations, ms, values }: Sample): void {
  const shown = (["rss", "heap", "objects", "buffers", "pipelines", "descriptors", "threads"] as const)
    .map((metric) => `${metric} ${format(METRICS[metric][1], values[metric])}`);
  console.error(`${name}: ${operations} of ${all}, ${(ms / 1000).toFixed(0)} s: ${shown.join(", ")}`);
}

function printTable(name: string, { operations, ms }: Sample, rows: readonly Row[]): void {
  console.log(`\n${name}: ${operations} in ${(ms / 60_000).toFixed(1)} min\n`);
  console.log("| | first | middle | last | most | per 1,000 | a day without a pause | |");
  console.log("| --- | --- | --- | --- | --- | --- | --- | --- |");
  for (const { metric, first, middle, last, most, slope, uncertainty, day, verdict } of rows) {
    const [label, unit] = METRICS[metric];
    const cells = [first, middle, last, most].map((value) => format(unit, value));
    const change = `${format(unit, 1000 * slope)} ± ${format(unit, 1000 * uncertainty)}`;
    const daily = unit === "ms" ? "" : format(unit, day);
    console.log(`| ${[label, ...cells, change, daily, verdict].join(" | ")} |`);
  }
}

async function main(): Promise<void> {
  const { values } = parseArgs({
    options: {
      generations: { type: "string", default: "10000" },
      classifications: { type: "string", default: "2000" },
      documents: { type: "string", default: "10000" },
      sessions: { type: "string", default: "200" },
      loads: { type: "string", default: "400" },
      samples: { type: "string", default: "100" },
      context: { type: "string", default: "1024" },
      model: { type: "string", default: DEFAULT_MODEL },
      out: { type: "string" },
      commit: { type: "string" },
    },
  });
  const generations = Number(values.generations);
  const classifications = Number(values.classifications);
  const streamed = Number(values.documents);
  const samples = Number(values.samples);
  const sampler = new Sampler(watchTimers());
  const { shared, handles } = sampler;
  const options: LoadOptions = {
    model: values.model,
    context: Number(values.context),
    onOpened: ({ device }) => handles.watch(device),
  };
  const longform = await load(options);
  const folder = mkdtempSync(join(tmpdir(), "longform-long-haul-"));
  const stream = longform.classify(documents(streamed), { signal: shared.signal });
  const tally: Tally = {};
  if (generations > 0) await fillMemories(longform);
  const phases: readonly Phase[] = [
    {
      name: "generations, with classifications between them",
      operations: generations,
      weight: 1,
      isIdle: true,
      async run(i) {
        await generateOne(longform, i, shared, tally);
        const due = (done: number) => Math.floor(done * classifications / generations);
        for (let c = due(i); c < due(i + 1); c++) await classifyOne(longform, c, shared, tally);
      },
    },
    {
      name: "sessions saved and restored",
      operations: Number(values.sessions),
      weight: 64,
      isIdle: true,
      run: (i) => sessionOne(longform, join(folder, "session"), i, tally),
    },
    {
      name: "documents of one stream",
      operations: streamed,
      weight: 1,
      isIdle: false,
      async run(i) {
        const { value } = await stream.next();
        if (!value || "error" in value) throw new Error(value?.error);
        count(tally, "classified in a stream");
        if (i + 1 === streamed) await stream.return();
      },
    },
    {
      name: "loads",
      operations: Number(values.loads),
      weight: 64,
      isIdle: true,
      run: (i) => loadOne(options, i, tally),
    },
  ];
  const { name: adapter, driver } = longform.gpu.caps;
  const origin = { adapter, driver, ...provenance(values.commit), elem: longform.model.elem, tally };
  const done: object[] = [];
  let verdicts: Verdict[] = [];
  try {
    for (const phase of phases.filter(({ operations }) => operations > 0)) {
      const { name, operations, weight, isIdle, run } = phase;
      const record = (taken: readonly Sample[]) => {
        const recorded = { name, operations, rows: rowsOf(taken, weight), ...linesOf(taken) };
        if (values.out) writeResult(values.out, { ...origin, phases: [...done, recorded] });
        return recorded;
      };
      const taken = await haul(operations, samples, run, () => sampler.sample(longform, isIdle), (soFar) => {
        printProgress(phase, soFar.at(-1)!);
        record(soFar);
      });
      const recorded = record(taken);
      done.push(recorded);
      printTable(name, taken.at(-1)!, recorded.rows);
      verdicts = [...verdicts, ...recorded.rows.map(({ verdict }) => verdict)];
    }
    console.log(`\n${Object.entries(tally).map(([what, n]) => `${n} ${what}`).join(", ")}`);
    if (verdicts.includes("grows")) process.exitCode = 1;
  } finally {
    await longform.close();
    rmSync(folder, { recursive: true });
  }
}

if (import.meta.main) await main();
