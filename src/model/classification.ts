/**
 * A label for each of many documents: by the checkpoint's score head, or, without training, by how likely the labels are
 * as texts behind the document (zero-shot, Brown et al. 2020). Documents are encoded ahead, packed, run and handed out in
 * their order, a bounded number of them at a time.
 */
import { InputError, UsageError } from "../runtime/errors.ts";
import { type Classifier, labelBranchRows, type PackedDocument, type PendingPack } from "./classifier.ts";
import type { ProblemType } from "./config.ts";
import type { EncodedText } from "./encoding_pool.ts";
import { type Gpt2, tooManyPositions } from "./gpt2.ts";
import { packedRows } from "./packing.ts";
import { positionLimit } from "./positions.ts";

/** How logits become scores: probabilities of one class of many, of each by itself, or themselves. */
export type Activation = "softmax" | "sigmoid" | "none";

/** What Hugging Face's text classification does with the logits of a head. */
export function activationOf(problemType: ProblemType | undefined, classes: number): Activation {
  if (problemType === "regression") return "none";
  return problemType === "multi_label_classification" || classes === 1 ? "sigmoid" : "softmax";
}

/** The checkpoint's own classes. */
export interface ScoreHead {
  readonly kind: "score";
  readonly labels: readonly string[];
  readonly activation: Activation;
}

/** Labels as texts. */
export interface LabelHead {
  readonly kind: "labels";
  readonly labels: readonly string[];
  /** Tokens of each label and what follows it in the template. */
  readonly texts: readonly Uint32Array[];
  /** Tokens of the template in front of the document, and between it and the label. */
  readonly before: Uint32Array;
  readonly between: Uint32Array;
  /** Subtracted from the likelihoods, `[labels]` in nats; undefined where they are not calibrated. */
  readonly baseline?: Float64Array | undefined;
}

export type Head = ScoreHead | LabelHead;

/** What is said of the beginning of a document, or of all of it. */
export interface Classification {
  /** Tokens of the document that it is about. */
  readonly tokens: number;
  /** Whether the document has more. */
  readonly truncated: boolean;
  /** The likeliest. */
  readonly label: string;
  /** For each label a probability; of a head for regression its output. */
  readonly scores: Readonly<Record<string, number>>;
  /** For each label the head's output, or its log-likelihood in nats, less the baseline. */
  readonly logits: Readonly<Record<string, number>>;
}

/** What is said of all of a document that was asked for. */
export interface ClassifiedDocument extends Classification {
  /** The same of each beginning, by increasing length: this is the last of them. */
  readonly beginnings: readonly Classification[];
  /** Milliseconds from when its pack was handed over until its result was there. */
  readonly ms: number;
  /** Documents of the pack; parts of them where they run in parts, by windows or lengths. */
  readonly batch: number;
  readonly encodeMs: number;
}

/** A document, and what became of it. */
export type Outcome<T> =
  | { readonly document: T; readonly classified: ClassifiedDocument }
  | { readonly document: T; readonly error: string };

/** A document to come. */
export interface SourceDocument<T> {
  readonly document: T;
  /** Bytes or characters, to bound what is in memory. */
  readonly size: number;
  /** Its first tokens; fails with an InputError for a document that has none or cannot be encoded. */
  encode(most: number): Promise<EncodedText>;
}

export interface ClassificationOptions {
  /**
   * Tokens to classify a document by, increasing: with several, each document is classified by each. All when left out.
   * Behind a template, no more than it leaves.
   */
  readonly lengths?: readonly number[] | undefined;
  /**
   * Tokens of windows that do not overlap, each from position 0: the score head's outputs are averaged over them, by their
   * tokens, in place of one long context. Undefined runs a document as it is.
   */
  readonly window?: number | undefined;
  /** Documents of a pack at most; as many as fit when left out. */
  readonly batch?: number | undefined;
  /** Documents that are encoded ahead of those that run. */
  readonly ahead: number;
  readonly signal?: AbortSignal | undefined;
}

/** Text in documents that are encoded ahead, at most: one may have more. */
const AHEAD_SIZE = 32 << 20;
/** Documents whose results wait for those of earlier ones, at most; more where more fill the packs under way. */
const LEAST_WAITING = 1024;

/**
 * Classifies documents in order. A result does not depend on other documents.
 * @throws what the device fails with; what is wrong with a document is its outcome
 */
export async function* classifyDocuments<T>(
  model: Gpt2,
  head: Head,
  documents: AsyncIterable<SourceDocument<T>>,
  options: ClassificationOptions,
): AsyncGenerator<Outcome<T>, void> {
  const classifier = await model.classifier();
  checkHead(model, classifier, head);
  const limits = lengthLimits(model, head, options);
  const packs = new PackQueue(classifier, head, options);
  const { rows, inFlight } = classifier.plan;
  const mostWaiting = Math.max(LEAST_WAITING, (inFlight + 1) * rows);
  const ahead = new EncodingAhead(documents, limits.most, options);
  const waiting = new OutcomeQueue<T>();
  const abortion = abortionOf(options.signal);
  let failure: { readonly error: unknown } | undefined;
  try {
    for (;;) {
      yield* waiting.settled();
      options.signal?.throwIfAborted();
      const isFull = waiting.length >= mostWaiting;
      // With nothing under way a pack need not be full; with too much waiting it must not.
      if (isFull || (!ahead.isReady && packs.isIdle)) await packs.flush();
      if (isFull || !ahead.isReady) {
        const news = [...(isFull ? [] : [ahead.ready()]), ...(waiting.length > 0 ? [waiting.first()] : [])];
        await abortion.race(news);
        continue;
      }
      let next: Encoded<T> | undefined;
      try {
        next = await ahead.next();
      } catch (error) {
        failure = { error }; // thrown behind the outcomes of what came before
      }
      if (!next) break;
      const { document, encoded } = next;
      if (encoded instanceof InputError) {
        waiting.push(Promise.resolve({ document, error: encoded.message }));
        continue;
      }
      const problem = limits.problem(encoded);
      if (problem !== undefined) {
        waiting.push(Promise.resolve({ document, error: problem }));
        continue;
      }
      const work = workOf(encoded, head, { ...options, lengths: limits.lengths });
      const results: Promise<JobResult>[] = [];
      for (const job of work.jobs) {
        await packs.makeRoom(job);
        results.push(packs.add(job));
      }
      waiting.push(outcomeOf(document, encoded, head, work, results));
    }
    await packs.flush();
    while (waiting.length > 0) {
      await abortion.race([waiting.first()]);
      yield* waiting.settled();
    }
    if (failure) throw failure.error;
  } finally {
    abortion.forget();
    ahead.close();
    await packs.drain();
  }
}

interface Abortion {
  /** Waits for the first of these, or rejects with the signal's reason when that comes before. */
  race(news: readonly Promise<unknown>[]): Promise<void>;
  forget(): void;
}

function abortionOf(signal: AbortSignal | undefined): Abortion {
  let abort = () => {};
  const listener = () => abort();
  signal?.addEventListener("abort", listener);
  return {
    async race(news) {
      // A promise of its own for each wait: one for all of them would keep a reaction for every wait there ever was.
      const aborted = new Promise<never>((_, reject) => abort = () => reject(signal?.reason));
      if (signal?.aborted) abort();
      await Promise.race([...news, aborted]);
    },
    forget: () => signal?.removeEventListener("abort", listener),
  };
}

/** Tokens that template and label take, and how many that leaves to a document by the positions and in the cache. */
function roomOf(model: Gpt2, head: Head): { overhead: number; positions: number; cached: number } {
  const limit = positionLimit(model.positions);
  const { context } = model.plan;
  if (head.kind === "score") return { overhead: 0, positions: limit, cached: context };
  const template = head.before.length + head.between.length;
  const overhead = template + Math.max(...head.texts.map((ids) => ids.length - 1));
  const cached = context - labelBranchRows(head.texts) - template;
  return { overhead, positions: limit - overhead, cached };
}

/** @throws InputError where labels, or they and their template, leave no room for a document */
export function checkHead(model: Gpt2, classifier: Classifier, head: Head): void {
  if (head.kind === "score") return;
  const tokens = head.texts.reduce((sum, ids) => sum + ids.length, 0);
  const { labelRows } = classifier.plan;
  if (tokens > labelRows) {
    throw new InputError(`The labels have ${tokens} tokens together, there is room for ${labelRows}`, {
      hint: "give fewer labels, or shorter ones",
    });
  }
  const { overhead, positions, cached } = roomOf(model, head);
  if (Math.min(positions, cached) < 1) {
    throw new InputError(
      `The template and a label have ${overhead} tokens, which leaves none to a document`,
      {
        hint: "give a shorter template",
      },
    );
  }
}

/** Tokens of a document that a run takes, and what is wrong with one that has too many. */
function lengthLimits(model: Gpt2, head: Head, { lengths, window }: ClassificationOptions) {
  const { vocabSize } = model.config;
  const { positions, cached } = roomOf(model, head);
  const room = window === undefined ? Math.min(positions, cached) : Infinity;
  // A template leaves less to documents: they are cut to what it leaves.
  const cut = head.kind === "labels" ? lengths?.map((length) => Math.min(length, room)) : lengths;
  const most = cut?.at(-1);
  const longest = window ?? most;
  if (longest !== undefined && longest > Math.min(positions, cached)) {
    throw longest > positions
      ? tooManyPositions(`A document of ${longest} tokens`, model.positions)
      : new InputError(`There is room for documents of ${cached} tokens, not of ${longest}`, {
        hint: "plan for more with `--context`",
      });
  }
  return {
    lengths: cut,
    /** One more than there is room for tells that a document has too many. */
    most: most ?? room + 1,
    problem({ ids }: EncodedText): string | undefined {
      if (ids.length === 0) return "the document is empty: it has no tokens";
      const wrong = ids.findIndex((id) => id >= vocabSize);
      if (wrong >= 0) return `token ${wrong} is ${ids[wrong]}, the model's ids go from 0 to ${vocabSize - 1}`;
      if (most !== undefined || ids.length <= room) return undefined;
      return `the document has more than the ${room} tokens that there is room for: \`--max-tokens\` cuts it, ` +
        (room < positions ? "`--context` makes room" : "`--positions` goes beyond the model's");
    },
  };
}

/** One thing to run: a document with its beginnings, or one beginning within a template. */
interface Job extends PackedDocument {
  /** Rows of its result. */
  readonly results: number;
}

interface JobResult {
  /** `[results][labels]` */
  readonly logits: readonly ArrayLike<number>[];
  readonly ms: number;
  readonly batch: number;
}

/** The lengths that a document of so many tokens is classified by, each once. */
function beginningsOf(tokens: number, lengths: readonly number[] | undefined): number[] {
  return [...new Set((lengths ?? [tokens]).map((length) => Math.min(length, tokens)))];
}

/** A beginning of a document, and the rows of its jobs' results that its own is the mean of, by their tokens. */
interface Beginning {
  readonly tokens: number;
  readonly rows: readonly { readonly row: number; readonly weight: number }[];
}

/** What is run for a document, and what is made of it. */
interface Work {
  readonly jobs: readonly Job[];
  readonly beginnings: readonly Beginning[];
}

function workOf({ ids }: EncodedText, head: Head, { lengths, window }: ClassificationOptions): Work {
  const tokens = beginningsOf(ids.length, lengths);
  const single = (row: number) => [{ row, weight: 1 }];
  if (head.kind === "score") {
    if (window !== undefined) return windowsOf(ids, tokens, window);
    const jobs = [{ ids, lengths: tokens, results: tokens.length }];
    return { jobs, beginnings: tokens.map((count, row) => ({ tokens: count, rows: single(row) })) };
  }
  const jobs = tokens.map((length) => {
    const { before, between } = head;
    const all = new Uint32Array(before.length + length + between.length);
    all.set(before);
    all.set(ids.subarray(0, length), before.length);
    all.set(between, before.length + length);
    return { ids: all, lengths: [all.length], results: 1 };
  });
  return { jobs, beginnings: tokens.map((count, row) => ({ tokens: count, rows: single(row) })) };
}

/** Windows that do not overlap, the last of a beginning shorter; beginnings share those that they have whole. */
function windowsOf(ids: Uint32Array, tokens: readonly number[], window: number): Work {
  const jobs: Job[] = [];
  const jobAt = (first: number, end: number) => {
    const part = ids.subarray(first, end);
    return jobs.push({ ids: part, lengths: [part.length], results: 1 }) - 1;
  };
  const whole = Array.from(
    { length: Math.floor(tokens.at(-1)! / window) },
    (_, i) => jobAt(i * window, (i + 1) * window),
  );
  const beginnings = tokens.map((count) => {
    const rows = whole.slice(0, Math.floor(count / window)).map((row) => ({ row, weight: window / count }));
    const rest = count % window;
    if (rest > 0) rows.push({ row: jobAt(count - rest, count), weight: rest / count });
    return { tokens: count, rows };
  });
  return { jobs, beginnings };
}

async function outcomeOf<T>(
  document: T,
  { ids, truncated, encodeMs }: EncodedText,
  head: Head,
  work: Work,
  results: readonly Promise<JobResult>[],
): Promise<Outcome<T>> {
  const all = await Promise.all(results);
  const { ms, batch } = all.at(-1)!;
  const logits = all.flatMap((result) => result.logits);
  if (logits.some((row) => !Array.from(row).every(Number.isFinite))) {
    return {
      document,
      error: "its logits are not finite: try `--dtype f32`; if that does not help, the checkpoint is damaged",
    };
  }
  const beginnings = work.beginnings.map(({ tokens, rows }) => {
    const mean = Array.from(
      logits[0]!,
      (_, i) => rows.reduce((sum, { row, weight }) => sum + weight * logits[row]![i]!, 0),
    );
    return classificationOf(head, mean, tokens, tokens < ids.length || truncated);
  });
  return { document, classified: { ...beginnings.at(-1)!, beginnings, ms, batch, encodeMs } };
}

function classificationOf(
  head: Head,
  row: readonly number[],
  tokens: number,
  truncated: boolean,
): Classification {
  const baseline = head.kind === "labels" ? head.baseline : undefined;
  const logits = row.map((logit, i) => logit - (baseline?.[i] ?? 0));
  const best = logits.reduce((at, logit, i) => logit > logits[at]! ? i : at, 0);
  const scores = activate(logits, head.kind === "labels" ? "softmax" : head.activation);
  const named = (values: readonly number[]) =>
    Object.fromEntries(head.labels.map((label, i) => [label, values[i]!]));
  return { tokens, truncated, label: head.labels[best]!, scores: named(scores), logits: named(logits) };
}

/** Scores from logits, in f64. */
export function activate(logits: readonly number[], activation: Activation): number[] {
  if (activation === "none") return [...logits];
  if (activation === "sigmoid") return logits.map((x) => 1 / (1 + Math.exp(-x)));
  const largest = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  const weights = logits.map((x) => Math.exp(x - largest));
  const sum = weights.reduce((a, b) => a + b, 0);
  return weights.map((weight) => weight / sum);
}

/** A job whose pack has not been handed over. */
interface OpenJob {
  readonly job: Job;
  resolve(result: JobResult): void;
  reject(error: unknown): void;
}

/** Fills packs with jobs in order, and keeps some under way. */
class PackQueue {
  readonly #classifier: Classifier;
  readonly #head: Head;
  readonly #options: ClassificationOptions;
  /** Of all labels, and rows of them as branches of one document. */
  readonly #labelTokens: number;
  readonly #branchRows: number;
  #open: OpenJob[] = [];
  #openRows = 0;
  #openResults = 0;
  #inFlight: Promise<unknown>[] = [];

  constructor(classifier: Classifier, head: Head, options: ClassificationOptions) {
    this.#classifier = classifier;
    this.#head = head;
    this.#options = options;
    const texts = head.kind === "labels" ? head.texts : [];
    this.#labelTokens = texts.reduce((sum, ids) => sum + ids.length, 0);
    this.#branchRows = labelBranchRows(texts);
    const { lengths } = classifier.plan;
    const wanted = options.lengths?.length ?? 1;
    if (head.kind === "score" && options.window === undefined && wanted > lengths) {
      throw new UsageError(
        `The model was loaded to classify documents by ${lengths} ${
          lengths === 1 ? "length" : "lengths"
        } each, not by ${wanted}`,
      );
    }
  }

  /** Nothing is under way. */
  get isIdle(): boolean {
    return this.#inFlight.length === 0;
  }

  /** Hands the open pack over if the job does not fit. */
  async makeRoom(job: Job): Promise<void> {
    if (this.#open.length > 0 && !this.#fits(job)) await this.flush();
  }

  /** Puts a job into the open pack, which has room for it. @returns its result to be */
  add(job: Job): Promise<JobResult> {
    this.#openRows += packedRows(job.ids.length);
    this.#openResults += job.results;
    const added = new Promise<JobResult>((resolve, reject) => this.#open.push({ job, resolve, reject }));
    added.catch(() => {}); // whoever asks for it is told
    return added;
  }

  #fits(job: Job): boolean {
    const { packRows, plan } = this.#classifier;
    const count = this.#open.length + 1;
    const rows = this.#openRows + packedRows(job.ids.length);
    const branchRows = this.#branchRows * count;
    return count <= (this.#options.batch ?? Infinity) && rows + branchRows <= packRows &&
      (this.#head.kind === "labels"
        ? this.#labelTokens * count <= plan.labelRows
        : this.#openResults + job.results <= plan.rows);
  }

  /** Hands the open pack over, once there is room for one more under way. */
  async flush(): Promise<void> {
    if (this.#open.length === 0) return;
    const { plan } = this.#classifier;
    while (this.#inFlight.length >= plan.inFlight) await this.#inFlight[0];
    const pack = this.#open;
    this.#clear();
    const starting = performance.now();
    let pending: PendingPack<readonly (readonly ArrayLike<number>[])[]>;
    try {
      pending = await this.#submit(pack.map(({ job }) => job));
    } catch (error) {
      for (const { reject } of pack) reject(error);
      throw error;
    }
    const done = pending.result.then((results) => {
      const ms = performance.now() - starting;
      pack.forEach(({ resolve }, i) => resolve({ logits: results[i]!, ms, batch: pack.length }));
    }, (error: unknown) => {
      for (const { reject } of pack) reject(error);
    }).finally(() => this.#inFlight.splice(this.#inFlight.indexOf(done), 1));
    this.#inFlight.push(done);
  }

  #clear(): void {
    this.#open = [];
    this.#openRows = 0;
    this.#openResults = 0;
  }

  async #submit(jobs: readonly Job[]): Promise<PendingPack<readonly (readonly ArrayLike<number>[])[]>> {
    const { signal } = this.#options;
    if (this.#head.kind === "labels") {
      const { result } = await this.#classifier.scoreLabels(
        jobs.map(({ ids }) => ids),
        this.#head.texts,
        signal,
      );
      return { result: result.then((rows) => rows.map((row) => [row])) };
    }
    const { result } = await this.#classifier.classify(jobs, signal);
    return {
      result: result.then((rows) => {
        let at = 0;
        return jobs.map(({ results }) => rows.slice(at, at += results));
      }),
    };
  }

  /** Waits for what is under way; forgets what is not. */
  async drain(): Promise<void> {
    this.#clear();
    await Promise.all(this.#inFlight);
  }
}

/** A document whose tokens are there, or why they are not. */
interface Encoded<T> {
  readonly document: T;
  readonly encoded: EncodedText | InputError;
}

/** Encodes documents ahead of those that are asked for, in order. */
class EncodingAhead<T> {
  readonly #documents: AsyncIterator<SourceDocument<T>>;
  readonly #most: number;
  readonly #ahead: number;
  /** What is asked for ahead, oldest first, with whether it is there. */
  readonly #queue: { readonly size: number; readonly encoded: Promise<Encoded<T>>; isSettled: boolean }[] =
    [];
  #size = 0;
  #isEnded = false;
  #filling: Promise<void> | undefined;
  #failure: { readonly error: unknown } | undefined;

  constructor(documents: AsyncIterable<SourceDocument<T>>, most: number, { ahead }: ClassificationOptions) {
    this.#documents = documents[Symbol.asyncIterator]();
    this.#most = most;
    this.#ahead = ahead;
    this.#fill();
  }

  /** Whether `next` has something at once: a document, the end or a failure. */
  get isReady(): boolean {
    const first = this.#queue[0];
    return first ? first.isSettled : this.#isEnded;
  }

  /** Resolves when `isReady`. */
  async ready(): Promise<void> {
    while (!this.isReady) await (this.#queue[0]?.encoded.catch(() => {}) ?? this.#filling); // `next` throws
  }

  /** The next document; undefined at the end. @throws what reading the collection fails with */
  async next(): Promise<Encoded<T> | undefined> {
    while (this.#queue.length === 0 && !this.#isEnded) await this.#filling;
    const first = this.#queue.shift();
    if (!first) {
      if (this.#failure) throw this.#failure.error;
      return undefined;
    }
    this.#size -= first.size;
    this.#fill();
    return await first.encoded;
  }

  /** Asks for no more. */
  close(): void {
    this.#isEnded = true;
    // It may be waiting for a pipe that never delivers.
    this.#documents.return?.().catch(() => {});
  }

  #fill(): void {
    this.#filling ??= this.#fillOne().finally(() => {
      this.#filling = undefined;
      if (!this.#isEnded && this.#hasRoom()) this.#fill();
    });
  }

  #hasRoom(): boolean {
    return this.#queue.length === 0 || (this.#queue.length < this.#ahead && this.#size < AHEAD_SIZE);
  }

  async #fillOne(): Promise<void> {
    if (this.#isEnded || !this.#hasRoom()) return;
    try {
      const { value, done } = await this.#documents.next();
      if (done) {
        this.#isEnded = true;
        return;
      }
      const { document, size } = value;
      const encoded = value.encode(this.#most).then(
        (result) => ({ document, encoded: result }),
        (error: unknown) => {
          if (error instanceof InputError) return { document, encoded: error };
          throw error;
        },
      );
      encoded.catch(() => {}); // whoever asks for it is told
      const entry = { size, encoded, isSettled: false };
      const settle = () => entry.isSettled = true;
      encoded.then(settle, settle);
      this.#queue.push(entry);
      this.#size += size;
    } catch (error) {
      this.#isEnded = true;
      this.#failure = { error };
    }
  }
}

/** Outcomes in the order of their documents. */
class OutcomeQueue<T> {
  readonly #queue: { readonly outcome: Promise<Outcome<T>>; settled: Outcome<T> | undefined }[] = [];

  get length(): number {
    return this.#queue.length;
  }

  push(outcome: Promise<Outcome<T>>): void {
    const entry: { outcome: Promise<Outcome<T>>; settled: Outcome<T> | undefined } = {
      outcome,
      settled: undefined,
    };
    outcome.then((value) => entry.settled = value, () => {}); // `first` throws it
    this.#queue.push(entry);
  }

  /** Waits for the oldest. */
  async first(): Promise<void> {
    await this.#queue[0]?.outcome;
  }

  /** Takes out those that are there, up to the first that is not. */
  *settled(): Generator<Outcome<T>> {
    while (this.#queue[0]?.settled) yield this.#queue.shift()!.settled!;
  }
}
