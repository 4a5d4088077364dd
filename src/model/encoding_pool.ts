/** Encodes many texts on threads of their own: the one that drives the GPU does not stop for them. */
import { Worker } from "node:worker_threads";
import { InputError, LongformError, ModelError } from "../runtime/errors.ts";
import { programFile } from "../runtime/program_files.ts";
import { encodeUpTo, type FirstIds, type GPT2Tokenizer, loadTokenizer } from "./tokenizer.ts";

export interface EncodedText extends FirstIds {
  /** What encoding took the thread that did it. */
  readonly encodeMs: number;
}

/** What a thread is asked for, several at a time. */
export interface EncodingRequest {
  readonly text: string;
  /** Ids wanted, at the most. */
  readonly most: number;
}

/** That the tokenizer is loaded, or why it is not; then what came of each request of a message, in order. */
export type EncodingReply = "ready" | Failure | readonly (EncodedText | Failure)[];

/** An error on its way to another thread, where its class does not arrive. */
export interface Failure {
  readonly name: string;
  readonly message: string;
  readonly stack: string | undefined;
  readonly hint: string | undefined;
  readonly detail: string | undefined;
}

interface Job extends EncodingRequest {
  readonly resolve: (encoded: EncodedText) => void;
  readonly reject: (error: Error) => void;
}

interface Thread {
  readonly worker: Worker;
  /** What it was sent and has not answered, by message, oldest first. */
  readonly jobs: Job[][];
  isReady: boolean;
}

/** Messages that a thread has at a time: it works on the second while its reply to the first is under way. */
const IN_FLIGHT = 2;

/**
 * Characters that a message is filled up to where texts wait, about a millisecond's work. A message takes both
 * threads some tens of microseconds, as much as the encoding of a text of a thousand characters.
 */
const MESSAGE_LENGTH = 1 << 15;

/**
 * Threads for a machine of so many cores. Each encodes millions of tokens a second of words that it has met, but a tenth
 * of that of others, and has to meet them on its own: while all are new, eight threads keep an H100 fed with a small model.
 * Half of the cores are left to the thread that submits work to the GPU, to the driver's and to reading; with fewer than
 * four cores, threads would take turns with those.
 */
export function defaultEncodingWorkers(cores: number): number {
  return cores < 4 ? 0 : Math.min(8, Math.floor(cores / 2));
}

/** Hands texts to the threads in the order in which they come; the ids arrive in any order. */
export class EncodingPool {
  /** Threads; where there are none, the one that calls `encode` does the work before the call returns. */
  readonly workers: number;
  readonly #tokenizer: GPT2Tokenizer | undefined;
  readonly #threads: readonly Thread[];
  readonly #waiting = new Queue<Job>();
  readonly #opened = Promise.withResolvers<void>();
  /** Why nothing is encoded any more. */
  #failure: Error | undefined;
  #ended: Promise<unknown> = Promise.resolve();

  private constructor(threads: readonly Thread[], tokenizer?: GPT2Tokenizer) {
    this.workers = threads.length;
    this.#threads = threads;
    this.#tokenizer = tokenizer;
    if (tokenizer) this.#opened.resolve();
    for (const thread of threads) {
      thread.worker.on("message", (reply: EncodingReply) => this.#take(thread, reply));
      thread.worker.on("error", (error: unknown) => this.#fail(threadEnded(String(error))));
      thread.worker.on("exit", (code: number) => this.#fail(threadEnded(`exit code ${code}`)));
    }
  }

  /**
   * Loads the tokenizer of a model folder, once for each thread. Resolves when the first thread has it, 0.1 s
   * later than it would be loaded here; the others join in when they have it.
   * @throws ModelError as `loadTokenizer`
   */
  static async open(dir: string, workers: number): Promise<EncodingPool> {
    if (workers === 0) return new EncodingPool([], await loadTokenizer(dir));
    const script = programFile("src/model/encoding_worker.ts");
    const threads = Array.from({ length: workers }, (): Thread => ({
      worker: new Worker(script, { workerData: dir }),
      jobs: [],
      isReady: false,
    }));
    const pool = new EncodingPool(threads);
    await pool.#opened.promise;
    return pool;
  }

  /**
   * The ids of the text's first `most` tokens.
   * @throws InputError as `encodeUpTo`; LongformError once a thread has ended by itself
   */
  encode(text: string, most: number): Promise<EncodedText> {
    return new Promise((resolve, reject) => {
      if (this.#failure) throw this.#failure;
      if (this.#tokenizer) return resolve(encodeTimed(this.#tokenizer, text, most));
      this.#waiting.push({ text, most, resolve, reject });
      this.#assign();
    });
  }

  /** Ends the threads and rejects what they have not encoded. Idle threads keep no process from ending. */
  async close(): Promise<void> {
    this.#fail(new Error("The encoding pool is closed"));
    await this.#ended;
  }

  #take(thread: Thread, reply: EncodingReply): void {
    if (this.#failure) return;
    if (reply === "ready") {
      thread.isReady = true;
      this.#opened.resolve();
      // From here on only a text that waits for its ids keeps the process alive.
      for (const { worker, jobs } of this.#threads) if (jobs.length === 0) worker.unref();
    } else if ("message" in reply) {
      return this.#fail(errorOf(reply));
    } else {
      thread.jobs.shift()!.forEach(({ resolve, reject }, i) => {
        const result = reply[i]!;
        if ("ids" in result) resolve(result);
        else reject(errorOf(result));
      });
      if (thread.jobs.length === 0) thread.worker.unref();
    }
    this.#assign();
  }

  /** Sends what waits to the threads that have least to do. */
  #assign(): void {
    const ready = this.#threads.filter(({ isReady }) => isReady);
    while (this.#waiting.length > 0) {
      const thread = ready.reduce((least, other) => other.jobs.length < least.jobs.length ? other : least);
      if (thread.jobs.length === IN_FLIGHT) return;
      const jobs: Job[] = [];
      for (let length = 0; length < MESSAGE_LENGTH && this.#waiting.length > 0;) {
        const job = this.#waiting.shift();
        length += job.text.length;
        jobs.push(job);
      }
      if (thread.jobs.length === 0) thread.worker.ref();
      thread.jobs.push(jobs);
      thread.worker.postMessage(jobs.map(({ text, most }): EncodingRequest => ({ text, most })));
    }
  }

  /** Rejects everything from now on, and what is under way. The first reason is the one to tell. */
  #fail(error: Error): void {
    if (this.#failure) return;
    this.#failure = error;
    this.#opened.reject(error);
    for (const { jobs } of this.#threads) for (const { reject } of jobs.splice(0).flat()) reject(error);
    while (this.#waiting.length > 0) this.#waiting.shift().reject(error);
    this.#ended = Promise.all(this.#threads.map(({ worker }) => worker.terminate()));
  }
}

export function encodeTimed(tokenizer: GPT2Tokenizer, text: string, most: number): EncodedText {
  const starting = performance.now();
  const first = encodeUpTo(tokenizer, text, most);
  return { ...first, encodeMs: performance.now() - starting };
}

/** The error that a thread met, in the class that callers look for. */
function errorOf({ name, message, stack, hint, detail }: Failure): Error {
  const options = { ...hint !== undefined && { hint }, ...detail !== undefined && { detail } };
  if (name === "InputError") return new InputError(message, options);
  if (name === "ModelError") return new ModelError(message, options);
  return Object.assign(new Error(message), { name, stack });
}

function threadEnded(reason: string): LongformError {
  return new LongformError(`A thread that encodes text has ended: ${reason}`, {
    hint: "the machine may be short of memory: leave it more, or give it shorter texts",
  });
}

/** First in, first out, in constant time: a long array is moved whenever its first element is taken. */
class Queue<T> {
  #items: (T | undefined)[] = [];
  #taken = 0;

  get length(): number {
    return this.#items.length - this.#taken;
  }

  push(item: T): void {
    this.#items.push(item);
  }

  /** @throws unless there is one */
  shift(): T {
    const item = this.#items[this.#taken]!;
    this.#items[this.#taken++] = undefined;
    if (2 * this.#taken >= this.#items.length) {
      this.#items = this.#items.slice(this.#taken);
      this.#taken = 0;
    }
    return item;
  }
}
