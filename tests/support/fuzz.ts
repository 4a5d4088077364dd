/**
 * Properties of whatever reads untrusted bytes: for any input, a value or a `LongformError` that is fit to be shown,
 * in bounded time and memory. `FUZZ_RUNS` asks for a long run; docs/fuzzing.md says what each property means.
 */
import { afterAll, test } from "bun:test";
import { URL } from "node:url";
import { Worker } from "node:worker_threads";
import fc from "fast-check";
import { LongformError } from "../../src/runtime/errors.ts";
import { countMemory, type MemoryCount } from "./fuzz_memory.ts";
import type { Watched } from "./fuzz_watch.ts";

/** Where nothing else is asked for: the same cases in every run, on every machine. */
const CI_SEED = 20261124;
const ASKED_RUNS = Number(process.env.FUZZ_RUNS ?? 0);
const SEED = Number(
  process.env.FUZZ_SEED ?? (ASKED_RUNS > 0 ? Math.floor(Math.random() * 2 ** 31) : CI_SEED),
);
const PATH = process.env.FUZZ_PATH;

/** Characters of a message, at most: a few names and two paths. */
const LONGEST_MESSAGE = 2100;
/** What takes up a terminal's line, moves its cursor or turns its text. */
const UNPRINTABLE = /[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/u;
/**
 * Processor time of one case, which garbage collection has its part in. Cases are some KB, which a parser whose work
 * grows with them is done with in milliseconds.
 */
const MOST_CPU_MS = 3000;
/** Characters of a failure's report. */
const LONGEST_REPORT = 6000;
/** For how long a case may run before it counts as one that never ends. */
const HANG_MS = 60_000;

/** What an input allows. */
export interface Allowance {
  /** Of the input. */
  readonly inputBytes: number;
  /** Bytes that may be asked for besides 64 for each of the input; 1 MiB unless given. */
  readonly constantBytes?: number;
  /** Processor time, in milliseconds. */
  readonly cpuMs?: number;
}

export type Judged<T> = { readonly value: T } | { readonly error: LongformError };

interface Tally {
  readonly name: string;
  cases: number;
  accepted: number;
  refused: number;
  /** Messages, without what is in quotes, numbers and paths. */
  readonly kinds: Set<string>;
  slowestMs: number;
  mostBytes: number;
  seconds: number;
}

const tallies: Tally[] = [];
let tally: Tally | undefined;
let memory: MemoryCount | undefined;

/** Runs the code under test on one input and holds it to the promise. @throws when it breaks it */
export async function judge<T>(allowance: Allowance, work: () => T | Promise<T>): Promise<Judged<T>> {
  const before = process.cpuUsage();
  memory?.take();
  const [outcome] = await Promise.allSettled([Promise.try(work)]);
  const bytes = memory?.take() ?? 0;
  const { user, system } = process.cpuUsage(before);
  const ms = (user + system) / 1000;
  const most = (allowance.constantBytes ?? 1 << 20) + 64 * allowance.inputBytes;
  if (bytes > most) {
    throw new Error(`asked for ${bytes} bytes of memory, an input of ${allowance.inputBytes} allows ${most}`);
  }
  if (ms > (allowance.cpuMs ?? MOST_CPU_MS)) throw new Error(`took ${ms.toFixed(0)} ms of processor time`);
  if (tally) {
    tally.mostBytes = Math.max(tally.mostBytes, bytes);
    tally.slowestMs = Math.max(tally.slowestMs, ms);
  }
  if (outcome.status === "fulfilled") {
    if (tally) tally.accepted++;
    return { value: outcome.value };
  }
  const error: unknown = outcome.reason;
  if (!(error instanceof LongformError)) {
    throw new Error(`a ${(error as Error)?.constructor?.name}, not a LongformError: ${String(error)}`, {
      cause: error,
    });
  }
  requireShowable(error.message);
  if (/\.$/.test(error.message)) throw new Error(`the message ends in a full stop: ${error.message}`);
  if (error.hint !== undefined) requireShowable(error.hint);
  if (tally) {
    tally.refused++;
    tally.kinds.add(
      error.message.replace(/"(?:[^"\\]|\\.)*"|`[^`]*`|\/\S+|[-\d.e+∞]+|\[[^\]]*\]/g, "#").slice(0, 120),
    );
  }
  return { error };
}

/** What an error or a note may print: one line of bounded length that does nothing to a terminal. */
export function requireShowable(text: string): void {
  const problem = UNPRINTABLE.test(text)
    ? "prints a control character"
    : text.length > LONGEST_MESSAGE
    ? `has ${text.length} characters`
    : text.includes("[object ")
    ? "prints an object"
    : text.trim() === ""
    ? "is empty"
    : undefined;
  if (problem !== undefined) throw new Error(`the message ${problem}: ${JSON.stringify(text.slice(0, 300))}`);
}

export interface Fuzz<T> {
  /** Cases unless `FUZZ_RUNS` asks for more. */
  readonly runs: number;
  /** Of the cases that `FUZZ_RUNS` asks for, how many this property has: fewer where one takes long. */
  readonly share?: number;
  readonly arbitrary: fc.Arbitrary<T>;
  /** Throws what is wrong. */
  readonly check: (input: T) => void | Promise<void>;
}

/** A test of a property. Its failure says how to run the smallest case that was found again. */
export function fuzz<T>(name: string, { runs, share = 1, arbitrary, check }: Fuzz<T>): void {
  const numRuns = ASKED_RUNS > 0 ? Math.ceil(share * ASKED_RUNS) : runs;
  test(name, async () => {
    const { beats, watcher } = watch();
    watcher.postMessage(name);
    const own: Tally = {
      name,
      cases: 0,
      accepted: 0,
      refused: 0,
      kinds: new Set(),
      slowestMs: 0,
      mostBytes: 0,
      seconds: 0,
    };
    tally = own;
    const starting = performance.now();
    const property = fc.asyncProperty(arbitrary, async (input) => {
      own.cases = Atomics.add(beats, 0, 1);
      Atomics.store(beats, 1, 1);
      try {
        await check(input);
      } finally {
        Atomics.store(beats, 1, 0);
      }
    });
    Atomics.store(beats, 0, 0);
    memory = countMemory();
    const details = await fc.check(property, {
      seed: SEED,
      numRuns,
      ...(PATH === undefined ? {} : { path: PATH, endOnFailure: true }),
    }).finally(() => memory?.stop());
    tally = undefined;
    own.cases++;
    own.seconds = (performance.now() - starting) / 1000;
    tallies.push(own);
    if (!details.failed) return;
    const again = `FUZZ_SEED=${details.seed} FUZZ_PATH=${details.counterexamplePath} FUZZ_RUNS=${
      ASKED_RUNS > 0 ? ASKED_RUNS : numRuns
    }`;
    const reason = String(details.errorInstance);
    const report = shortened(escaped(`${reason}\n${await fc.asyncDefaultReportMessage(details)}`));
    throw new Error(`${report}\n\nrun it again: ${again} bun test ${Bun.main} -t ${JSON.stringify(name)}`, {
      cause: details.errorInstance,
    });
  }, ASKED_RUNS > 0 ? 24 * 3_600_000 : 60_000);
}

/** A counterexample may be a deep one. */
function shortened(text: string): string {
  return text.length > LONGEST_REPORT ? `${text.slice(0, LONGEST_REPORT)}…` : text;
}

/** A counterexample is not to do to this terminal what it was made for. */
function escaped(text: string): string {
  return text.replace(/[^\P{C}\n]/gu, (char) => `\\u{${char.codePointAt(0)!.toString(16)}}`);
}

let watching: { readonly beats: Int32Array<SharedArrayBuffer>; readonly watcher: Worker } | undefined;

/** The thread that ends a process which hangs, one for all properties. */
function watch() {
  if (watching) return watching;
  const beats = new Int32Array(new SharedArrayBuffer(8));
  const workerData: Watched = { beats, ms: HANG_MS };
  const watcher = new Worker(new URL("./fuzz_watch.ts", import.meta.url), { workerData });
  watcher.unref();
  return watching = { beats, watcher };
}

/** Prints, in a long run, what each property of the file did; to be called once in each. */
export function reportTallies(): void {
  afterAll(() => {
    if (ASKED_RUNS === 0) return;
    // The files of a run share this module.
    for (
      const { name, cases, accepted, refused, kinds, slowestMs, mostBytes, seconds } of tallies.splice(0)
    ) {
      console.log(
        [
          name.padEnd(58),
          `${cases} cases`,
          `seed ${SEED}`,
          `${accepted} accepted`,
          `${refused} refused in ${kinds.size} ways`,
          `slowest ${slowestMs.toFixed(0)} ms`,
          `most memory ${(mostBytes / 1024).toFixed(0)} KiB`,
          `${seconds.toFixed(1)} s`,
        ].join("; "),
      );
    }
  });
}
