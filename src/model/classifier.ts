/**
 * Runs packs of documents through the layers, and a head over the rows that stand for them. A pack is one forward pass over
 * many documents (or over chunks of one long document); the next may be handed over before its results are there.
 *
 * No row depends on what shares a pack with it: products, norms and heads take each row by itself, attention walks over a
 * document's own blocks (`packing.ts`), and rows come in whole blocks, so that the same kernels run whatever their number.
 */
import type { ModelKernels, Norm, RowPiece } from "../kernels/index.ts";
import { TOKEN_BYTES } from "../kernels/embedding/embedding.ts";
import { packSegments, type RowSegment, SEGMENT_BYTES } from "../kernels/segment_sum/segment_sum.ts";
import type { KvCache } from "../kvcache/cache.ts";
import { type GpuBuffer, type Readback, upload } from "../runtime/buffers.ts";
import type { Gpu } from "../runtime/device.ts";
import { Recorder } from "../runtime/pass.ts";
import type { Profiler } from "../runtime/profiler.ts";
import type { GPT2Config } from "./config.ts";
import type { ActivationName, ClassifyingName, ClassifyingPlan, MemoryPlan } from "./memory_plan.ts";
import { branchRows, documentPlaces, documentSegments, meanSums, packedRows } from "./packing.ts";

export type ClassifyingBuffers = Readonly<Record<ClassifyingName, GpuBuffer>>;

/** What a loaded model lends to its classifier. */
export interface ClassifierParts {
  readonly gpu: Gpu;
  readonly config: GPT2Config;
  readonly memory: MemoryPlan;
  readonly plan: ClassifyingPlan;
  readonly kernels: ModelKernels;
  readonly cache: KvCache;
  readonly profiler: Profiler | undefined;
  /** Attention walks over block lists, which are of one document: a pack has no other. */
  readonly isSparse: boolean;
  readonly buffers: ClassifyingBuffers;
  readonly activations: Readonly<
    Record<Extract<ActivationName, "x" | "final" | "logits" | "targets" | "nll" | "tokens">, GpuBuffer>
  >;
  readonly weights: {
    readonly ln_f: Norm;
    readonly lm_head: readonly RowPiece[];
    readonly score: readonly RowPiece[];
  };
  /** One for each pack in flight. */
  readonly readbacks: readonly Readback[];
  /** Writes tokens from the `at`th on, the first at position `first`. @throws InputError for one that there is not */
  readonly packTokens: (packed: DataView, at: number, ids: ArrayLike<number>, first: number) => void;
  /** The layers over the uploaded tokens and segments. */
  readonly recordLayers: (r: Recorder, rows: number, segments: Uint32Array) => void;
}

/** A document to be classified by the score head. */
export interface PackedDocument {
  /** Its tokens, at least one. */
  readonly ids: Uint32Array;
  /** Tokens of its beginnings that are classified, increasing; the last is all of it. */
  readonly lengths: readonly number[];
}

/** Work that was handed over; in a record, because awaiting a promise of a promise would wait for both. */
export interface PendingPack<T> {
  readonly result: Promise<T>;
}

export class Classifier {
  readonly #parts: ClassifierParts;
  #submitted = 0;
  /** The submission before the last of a long document: the queue never empties, nor does it fill without bound. */
  #earlier: Promise<void> | undefined;

  constructor(parts: ClassifierParts) {
    this.#parts = parts;
  }

  get plan(): ClassifyingPlan {
    return this.#parts.plan;
  }

  /** Rows of a pack of several documents and their labels at most; what is longer runs alone, in chunks of as many. */
  get packRows(): number {
    return this.#parts.isSparse ? 0 : this.#parts.memory.chunkTokens;
  }

  /**
   * The score head over documents.
   * @returns after everything is handed over; `result` has the logits `[classes]` of each beginning, in order
   */
  async classify(
    pack: readonly PackedDocument[],
    signal?: AbortSignal,
  ): Promise<PendingPack<Float32Array[]>> {
    const { kernels, plan, buffers, weights } = this.#parts;
    const classes = plan.classes!;
    const places = documentPlaces(pack.map(({ ids }) => ids.length));
    const beginnings = pack.map(({ lengths }) => lengths);
    const rows = beginnings.reduce((sum, lengths) => sum + lengths.length, 0);
    if (rows > plan.rows) throw new RangeError(`${rows} rows are more than the ${plan.rows} of a pack`);
    const pooling = plan.pooling === "mean"
      ? this.#meanPooling(places, beginnings)
      : this.#lastPooling(pack, places);
    const tokens = this.#documentTokens(pack.map(({ ids }) => ids), places);
    const last = await this.#run(tokens, documentSegments(places), pooling.record, pack.length, signal);
    pooling.finish(last);
    kernels.scoreHead(last, buffers.features, weights.score, buffers.classLogits, { rows, classes });
    return this.#submit(
      last,
      buffers.classLogits,
      4 * rows * classes,
      (bytes) => Array.from({ length: rows }, (_, i) => new Float32Array(bytes, 4 * i * classes, classes)),
    );
  }

  /**
   * The likelihoods of texts behind documents. Documents and texts are one pass: a text is a branch of its document, without
   * its last token, behind which nothing is asked.
   * @param labels tokens of each text, at least one
   * @returns `result` has, for each document, `log p(label | document)` in nats of each label
   */
  async scoreLabels(
    pack: readonly Uint32Array[],
    labels: readonly Uint32Array[],
    signal?: AbortSignal,
  ): Promise<PendingPack<Float64Array[]>> {
    const { buffers, activations, plan, isSparse } = this.#parts;
    const lengths = pack.map((ids) => ids.length);
    const places = documentPlaces(lengths);
    const behind = places.at(-1)!;
    const labelTokens = labels.reduce((sum, ids) => sum + ids.length, 0);
    const count = pack.length * labelTokens;
    if (count > plan.labelRows) {
      throw new RangeError(`${count} rows are more than the ${plan.labelRows} of a pack`);
    }
    const branches = branchRows(places, lengths, labels.map((ids) => ids.length - 1));
    if (isSparse && branches.rows > 0) {
      throw new RangeError(
        "Block lists are of one document: there are no labels of several tokens behind it",
      );
    }

    // Row `g` of what the head reads predicts token `j` of a label: the document's last row its first, its own rows the others.
    const fromDocuments: RowSegment[] = [];
    const fromBranches: RowSegment[] = [];
    const targets = new Uint32Array(count);
    let g = 0;
    pack.forEach((_, i) =>
      labels.forEach((ids, l) => {
        const firstRow = behind + branches.firstRows[i * labels.length + l]!;
        ids.forEach((id, j) => {
          const segment = { rows: 1, row: g, scale: 1 };
          if (j === 0) fromDocuments.push({ ...segment, first: places[i]! + lengths[i]! - 1 });
          else fromBranches.push({ ...segment, first: firstRow + j - 1 });
          targets[g++] = id;
        });
      })
    );
    const gathered = [...fromDocuments, ...fromBranches];
    upload(buffers.rowSegments, packSegments(gathered));
    upload(activations.targets, targets);
    const tokens = this.#documentTokens(pack, places, branches.rows);
    pack.forEach((ids, i) =>
      labels.forEach((label, l) => {
        const first = behind + branches.firstRows[i * labels.length + l]!;
        this.#parts.packTokens(tokens, first, label.subarray(0, -1), ids.length);
      })
    );
    const segments = new Uint32Array(4 * (behind + branches.rows));
    segments.set(documentSegments(places));
    segments.set(branches.segments, 4 * behind);
    const last = await this.#run(tokens, segments, this.#gather(gathered), pack.length, signal);
    this.#recordLikelihoods(last, count);
    return this.#submit(last, activations.nll, 4 * count, (bytes) => {
      const nll = new Float32Array(bytes);
      let at = 0;
      return pack.map(() =>
        Float64Array.from(labels, (ids) => {
          let sum = 0;
          for (let j = 0; j < ids.length; j++) sum -= nll[at++]!;
          return sum;
        })
      );
    });
  }

  /** The tokens of documents where they lie in a pack, with so many rows behind them that are yet to be filled. */
  #documentTokens(
    pack: readonly Uint32Array[],
    places: readonly number[],
    rowsBehind = 0,
  ): DataView<ArrayBuffer> {
    const tokens = new DataView(new ArrayBuffer(TOKEN_BYTES * (places.at(-1)! + rowsBehind)));
    pack.forEach((ids, i) => this.#parts.packTokens(tokens, places[i]!, ids, 0));
    return tokens;
  }

  /**
   * Runs the rows of a pack from an empty cache, in chunks where one document has more, all but the last of which are handed
   * over.
   * @param tokens of each row, as the embedding reads them
   * @param segments what each row attends to, `[rows, 4]`
   * @param record records what is made of the rows from `first` on, which are in `x`
   * @returns a recorder with the last chunk
   */
  async #run(
    tokens: DataView<ArrayBuffer>,
    segments: Uint32Array<ArrayBuffer>,
    record: (r: Recorder, first: number, rows: number) => void,
    documents: number,
    signal: AbortSignal | undefined,
  ): Promise<Recorder> {
    const { cache, activations, buffers, memory, isSparse } = this.#parts;
    const rows = segments.length / 4;
    const { chunkTokens } = memory;
    if (documents > 1 && rows > this.packRows) {
      throw new RangeError(`${rows} rows are more than the ${this.packRows} of a pack`);
    }
    cache.truncate(0);
    for (let first = 0;; first += chunkTokens) {
      signal?.throwIfAborted();
      const count = Math.min(chunkTokens, rows - first);
      upload(activations.tokens, new DataView(tokens.buffer, TOKEN_BYTES * first, TOKEN_BYTES * count));
      const own = segments.subarray(4 * first, 4 * (first + count));
      if (!isSparse) upload(buffers.segments, own);
      const r = this.#recorder("documents");
      r.beginStep(`rows ${first} to ${first + count - 1}`);
      this.#parts.recordLayers(r, count, own);
      r.enter("heads");
      record(r, first, count);
      if (first + count === rows) return r;
      r.submit();
      await this.#pace();
    }
  }

  /** Waits until no more than one submission besides the last is under way. */
  async #pace(): Promise<void> {
    const last = this.#parts.gpu.idle();
    last.catch(() => {}); // whoever waits for the result is told
    await this.#earlier;
    this.#earlier = last;
  }

  /** The last row of each beginning, normalised. */
  #lastPooling(pack: readonly PackedDocument[], places: readonly number[]) {
    const { kernels, buffers, weights } = this.#parts;
    const rows = pack.flatMap(({ ids, lengths }, i) =>
      lengths.map((length) => places[i]! + this.#lastRealToken(ids, length))
    );
    const gathered = rows.map((first, row) => ({ first, rows: 1, row, scale: 1 }));
    upload(buffers.rowSegments, packSegments(gathered));
    return {
      record: this.#gather(gathered),
      finish: (r: Recorder) =>
        kernels.finalNorm(r, buffers.pooled, weights.ln_f, buffers.features, 0, rows.length),
    };
  }

  /**
   * The place of the token that stands for the first `length`: the last that is no padding, the first where all are, as
   * `GPT2ForSequenceClassification` chooses it.
   */
  #lastRealToken(ids: Uint32Array, length: number): number {
    const { padTokenId } = this.#parts.config;
    let last = length - 1;
    while (last > 0 && ids[last] === padTokenId) last--;
    return last;
  }

  /** The mean of the normalised rows of each beginning. */
  #meanPooling(places: readonly number[], beginnings: readonly (readonly number[])[]) {
    const { kernels, buffers, weights, activations } = this.#parts;
    const { pieces, means } = meanSums(places, beginnings);
    const { rowSegments, normedRows } = buffers;
    return {
      record: (r: Recorder, first: number, rows: number) => {
        const some = pieces.filter((piece) => piece.first >= first && piece.first < first + rows);
        // Rows are counted within a chunk.
        upload(rowSegments, packSegments(some.map((piece) => ({ ...piece, first: piece.first - first }))));
        kernels.finalNorm(r, activations.x, weights.ln_f, normedRows, 0, rows);
        const sums = { segments: some.length, firstSegment: 0, summedRows: () => unionRows(some) };
        kernels.segmentSum(r, normedRows, rowSegments, buffers.pieces, sums);
      },
      finish: (r: Recorder) => {
        // Behind all pieces: what the chunk before reads must stay as it is until it has run.
        upload(rowSegments, packSegments(means), SEGMENT_BYTES * pieces.length);
        const sums = {
          segments: means.length,
          firstSegment: pieces.length,
          summedRows: () => pieces.length,
        };
        kernels.segmentSum(r, buffers.pieces, rowSegments, buffers.features, sums);
      },
    };
  }

  /** Gathers those of `segments`, single rows in increasing order, that lie in the rows of a chunk. */
  #gather(segments: readonly RowSegment[]) {
    return (r: Recorder, first: number, rows: number): void => {
      const from = segments.findIndex((segment) => segment.first >= first);
      if (from < 0) return;
      let end = from;
      while (end < segments.length && segments[end]!.first < first + rows) end++;
      // Rows are counted within a chunk, of which there is more than one only where a document is alone.
      if (first > 0) {
        const moved = segments.slice(from, end).map((segment) => ({
          ...segment,
          first: segment.first - first,
        }));
        upload(this.#parts.buffers.rowSegments, packSegments(moved), SEGMENT_BYTES * from);
      }
      const { kernels, activations, buffers: { rowSegments, pooled } } = this.#parts;
      const gathered = {
        segments: end - from,
        firstSegment: from,
        summedRows: () => unionRows(segments.slice(from, end)),
      };
      kernels.segmentSum(r, activations.x, rowSegments, pooled, gathered);
    };
  }

  /** The likelihoods of `targets` after the pooled rows, some rows of logits at a time. */
  #recordLikelihoods(r: Recorder, count: number): void {
    const { kernels, buffers, weights, activations, memory, config } = this.#parts;
    const { vocabSize: vocab } = config;
    const { final, logits, targets, nll } = activations;
    for (let first = 0; first < count; first += memory.logitRows) {
      const rows = Math.min(memory.logitRows, count - first);
      kernels.finalNorm(r, buffers.pooled, weights.ln_f, final, first, rows);
      kernels.scoreHead(r, final, weights.lm_head, logits, { rows, classes: vocab });
      kernels.nll(r, logits, targets, nll, { rows, vocab, firstRow: first });
    }
  }

  #submit<T>(
    r: Recorder,
    results: GpuBuffer,
    byteLength: number,
    unpack: (bytes: ArrayBuffer) => T,
  ): PendingPack<T> {
    const { readbacks } = this.#parts;
    const readback = readbacks[this.#submitted++ % readbacks.length]!;
    r.copy(results, 0, readback, 0, byteLength);
    r.submit();
    const read = async () => {
      const bytes = await readback.read();
      return unpack(bytes);
    };
    const result = read();
    result.catch(() => {}); // whoever asks for it is told
    return { result };
  }

  #recorder(label: string): Recorder {
    return new Recorder(this.#parts.gpu, label, { profiler: this.#parts.profiler });
  }
}

/** Rows that labels take as the branches of a document, without the last token of each. */
export function labelBranchRows(labels: readonly Uint32Array[]): number {
  return packedRows(labels.reduce((sum, ids) => sum + ids.length - 1, 0));
}

/** Different rows of segments of which those that overlap begin at the same row. */
function unionRows(segments: readonly RowSegment[]): number {
  const most = new Map<number, number>();
  for (const { first, rows } of segments) most.set(first, Math.max(most.get(first) ?? 0, rows));
  return [...most.values()].reduce((sum, rows) => sum + rows, 0);
}
