/** What kernels say that they move and compute, against plain loops that count it. */
import { afterAll, describe, expect, test } from "bun:test";
import {
  keptBySelection,
  selectCandidates,
  summarizeCandidates,
} from "../../src/kernels/block_selection/block_selection.ts";
import { selectReference } from "../../src/kernels/block_selection/reference.ts";
import { copyBytes } from "../../src/kernels/copy/copy.ts";
import { divergenceCandidates } from "../../src/kernels/divergence/divergence.ts";
import { positionRows, tokenRows } from "../../src/kernels/embedding/embedding.ts";
import {
  type AttendedKeys,
  attentionCandidates,
  type AttentionWalk,
  packAttended,
} from "../../src/kernels/flash_attention/flash_attention.ts";
import {
  type DecodeBlocks,
  splitKvCandidates,
  topkSplitKvCandidates,
} from "../../src/kernels/flash_decode/flash_decode.ts";
import { gemvCandidates, layerNormGemv, mergeGemv, plainGemv } from "../../src/kernels/gemv/gemv.ts";
import {
  candidates,
  type DecodeBuffers,
  type KernelShape,
  ModelKernels,
  type Role,
} from "../../src/kernels/index.ts";
import { kvAppend } from "../../src/kernels/kv_append/kv_append.ts";
import { layerNorm } from "../../src/kernels/layer_norm/layer_norm.ts";
import { manyRowsCandidates, oneRowCandidates } from "../../src/kernels/lm_head/lm_head.ts";
import { EPILOGUES, matmulCandidates } from "../../src/kernels/matmul/matmul.ts";
import { nllCandidates } from "../../src/kernels/nll/nll.ts";
import { fmaPeak, subgroupMatrixPeak } from "../../src/kernels/peak/peak.ts";
import { drawCandidates, greedyCandidates, logprobsCandidates } from "../../src/kernels/sampling/sampling.ts";
import { segmentSum } from "../../src/kernels/segment_sum/segment_sum.ts";
import { type KeptBlocks, KV_BLOCK } from "../../src/kernels/shared/shared.ts";
import {
  attentionScores,
  attentionSoftmax,
  attentionValues,
} from "../../src/kernels/standard_attention/standard_attention.ts";
import { attendedByLists, keptByLists } from "../../src/kvcache/attended.ts";
import { KvCache } from "../../src/kvcache/cache.ts";
import { kvLayout } from "../../src/kvcache/layout.ts";
import { type BlockLists, blockLists, parseMask } from "../../src/kvcache/patterns.ts";
import { branchRows, documentPlaces, documentSegments } from "../../src/model/packing.ts";
import type { GpuBuffer } from "../../src/runtime/buffers.ts";
import { openDevice } from "../../src/runtime/device.ts";
import { fmix32 } from "../../src/runtime/fmix32.ts";
import { type Elem, type Op, op, sizeOf, type Work } from "../../src/runtime/kernel.ts";
import type { Dispatcher } from "../../src/runtime/pass.ts";
import { normalArray } from "../support/random.ts";

const ELEMS = ["f16", "f32"] as const;
const HEADS = 3;
const RANGES = [{ first: 0, heads: 3 }, { first: 1, heads: 2 }];

/** Counts what a loop touches: every row of a tensor once, however often it is named. */
class Tally {
  bytes = 0;
  flops = 0;
  readonly #touched = new Set<string>();

  touch(bytes: number, tensor: string, ...row: number[]): void {
    const name = `${tensor} ${row}`;
    if (!this.#touched.has(name)) this.bytes += bytes;
    this.#touched.add(name);
  }

  get work(): Work {
    return { bytes: this.bytes, flops: this.flops };
  }
}

function workOf<P>({ kernel, variant }: Op<P>, problem: P, lengths: readonly number[] = []): Work {
  return kernel.work(variant, problem, lengths);
}

/** Expects the same of all variants, of which there must be some. */
function expectAll<P>(
  ops: readonly Op<P>[],
  problem: P,
  wanted: Work,
  lengths: readonly number[] = [],
): void {
  expect(ops.length).toBeGreaterThan(0);
  for (const one of ops) {
    const { name } = one.kernel;
    expect({ name, ...workOf(one, problem, lengths) }).toEqual({ name, ...wanted });
  }
}

function sum(works: readonly Work[]): Work {
  return works.reduce((a, b) => ({ bytes: a.bytes + b.bytes, flops: a.flops + b.flops }), {
    bytes: 0,
    flops: 0,
  });
}

/** Whether a head keeps a block of keys for a block of queries. */
type Keeps = (head: number, row: number, column: number) => boolean;

/** In some heads no diagonal, in others no block at all for some rows. */
const RAGGED: Keeps = (head, row, column) =>
  head === 2 ? row !== 1 && column % 2 === 0 : fmix32(100 * head + 10 * row + column) % 3 > 0;
const MASKS: Readonly<Record<string, Keeps>> = {
  "every block": () => true,
  "a window": (_, row, column) => row - column < 2,
  "ragged rows": RAGGED,
};

/** The lists of each head, by the layout that `patterns.ts` describes. */
function listsOf(keeps: Keeps, rows: number): BlockLists[] {
  const csr = (isKept: (row: number, column: number) => boolean) => {
    const indptr = new Uint32Array(rows + 1);
    const indices: number[] = [];
    for (let row = 0; row < rows; row++) {
      for (let column = 0; column <= row; column++) if (isKept(row, column)) indices.push(column);
      indptr[row + 1] = indices.length;
    }
    return { indptr, indices: Uint32Array.from(indices) };
  };
  return Array.from({ length: HEADS }, (_, head) => ({
    rows,
    full: csr((row, column) => column < row && keeps(head, row, column)),
    partial: csr((row, column) => column === row && keeps(head, row, column)),
  }));
}

describe("prefill attention", () => {
  const HEAD_DIM = 64;
  const CHUNKS = [1, 63, 64, 65, 130].flatMap((qLen) =>
    [0, 63, 64, 100].map((firstPosition) => ({ qLen, firstPosition }))
  );

  /** Scores and values of the pairs that a head's query sees, rows of `HEAD_DIM` columns. */
  function attentionTally(
    elem: Elem,
    { range, qLen, firstPosition }: {
      readonly range: { readonly first: number; readonly heads: number };
      readonly qLen: number;
      readonly firstPosition: number;
    },
    sees: (head: number, position: number, key: number) => boolean,
  ): Work {
    const tally = new Tally();
    const rowBytes = HEAD_DIM * sizeOf(elem);
    for (let head = range.first; head < range.first + range.heads; head++) {
      for (let position = firstPosition; position < firstPosition + qLen; position++) {
        tally.touch(rowBytes, "q", head, position);
        tally.touch(rowBytes, "out", head, position);
        for (let key = 0; key <= position; key++) {
          if (!sees(head, position, key)) continue;
          tally.touch(rowBytes, "k", head, key);
          tally.touch(rowBytes, "v", head, key);
          tally.flops += 2 * HEAD_DIM; // the score
          tally.flops += 2 * HEAD_DIM; // its share of the output
        }
      }
    }
    return tally.work;
  }

  const opsOf = (elem: Elem, walk: AttentionWalk) =>
    [true, false].flatMap((unroll) => attentionCandidates(elem, HEADS, HEAD_DIM / 4, unroll, walk));
  const problemOf = (chunk: { qLen: number; firstPosition: number }, range: typeof RANGES[number]) => ({
    ...chunk,
    range,
    blocks: 4,
    scale: 1,
  });

  for (const elem of ELEMS) {
    test(`${elem}: dense`, () => {
      for (const range of RANGES) {
        for (const chunk of CHUNKS) {
          const problem = problemOf(chunk, range);
          expectAll(opsOf(elem, "all"), problem, attentionTally(elem, problem, () => true));
        }
      }
    });
  }

  for (const [name, keeps] of Object.entries(MASKS)) {
    test(`lists of ${name}`, () => {
      const lists = listsOf(keeps, 4);
      for (const range of RANGES) {
        for (const chunk of CHUNKS) {
          const problem = problemOf(chunk, range);
          const own = lists.slice(range.first, range.first + range.heads);
          const wanted = attentionTally(
            "f16",
            problem,
            (head, position, key) => keeps(head, Math.floor(position / KV_BLOCK), Math.floor(key / KV_BLOCK)),
          );
          const attended = () => attendedByLists(own, chunk);
          expectAll(opsOf("f16", "lists"), { ...problem, attended }, wanted);
        }
      }
    });
  }

  test("heads that share a list count it for each", () => {
    const [lists] = listsOf(RAGGED, 4);
    const chunk = { qLen: 130, firstPosition: 63 };
    const one = attendedByLists([lists!], chunk);
    expect(one.pairs).toBeGreaterThan(0);
    expect(attendedByLists([lists!, lists!, lists!], chunk)).toEqual({
      pairs: 3 * one.pairs,
      keys: 3 * one.keys,
    });
  });

  test("chunks compute what the whole does", () => {
    const [dense] = opsOf("f32", "all");
    const [range] = RANGES;
    const flops = (qLen: number, firstPosition: number) =>
      workOf(dense!, problemOf({ qLen, firstPosition }, range!)).flops;
    expect(flops(63, 0) + flops(65, 63) + flops(1, 128)).toBe(flops(129, 0));
  });

  describe("packs", () => {
    const sees = (segments: Uint32Array, firstPosition: number) =>
    (
      _head: number,
      position: number,
      key: number,
    ) => {
      const at = 4 * (position - firstPosition);
      return (key >= segments[at]! && key < segments[at + 1]!) || key >= segments[at + 3]!;
    };
    const expectPack = (segments: Uint32Array, firstPosition = 0) => {
      for (const range of RANGES) {
        const problem = problemOf({ qLen: segments.length / 4, firstPosition }, range);
        const wanted = attentionTally("f16", problem, sees(segments, firstPosition));
        const attended = () => packAttended(segments, problem);
        expectAll(opsOf("f16", "segments"), { ...problem, attended }, wanted);
      }
    };

    test("of documents", () => expectPack(documentSegments(documentPlaces([1, 64, 65]))));

    test("of a document's second chunk", () => expectPack(documentSegments([0, 192]).subarray(4 * 64), 64));

    test("of documents with branches, which see a document and not each other", () => {
      const lengths = [70, 3];
      const places = documentPlaces(lengths);
      const branches = branchRows(places, lengths, [2, 0, 5, 1]);
      const segments = [...documentSegments(places), ...branches.segments];
      expectPack(Uint32Array.from(segments));
      // The branches alone, behind their documents.
      expectPack(branches.segments, places.at(-1));
    });
  });

  test("without what lists and segments leave, queries and results alone count", () => {
    for (const walk of ["lists", "segments"] as const) {
      const problem = problemOf({ qLen: 65, firstPosition: 64 }, RANGES[1]!);
      expectAll(opsOf("f16", walk), problem, { bytes: 2 * 65 * 2 * HEAD_DIM * 2, flops: 0 });
    }
  });
});

describe("standard attention", () => {
  for (const tokens of [1, 63, 65]) {
    test(`over ${tokens} tokens: the visible scores are written, replaced and read`, () => {
      const v = { elem: "f16", heads: HEADS, headDim4: 2, unroll: true } as const;
      const tallies = { scores: new Tally(), softmax: new Tally(), values: new Tally() };
      const { scores, softmax, values } = tallies;
      for (let head = 0; head < 2; head++) {
        for (let query = 0; query < tokens; query++) {
          for (let key = 0; key <= query; key++) {
            scores.touch(2, "scores", head, query, key);
            scores.touch(16, "q", head, query);
            scores.touch(16, "k", head, key);
            scores.flops += 2 * 8;
            softmax.touch(2, "scores", head, query, key);
            softmax.touch(2, "probabilities", head, query, key);
            values.touch(2, "probabilities", head, query, key);
            values.touch(16, "v", head, key);
            values.touch(16, "out", head, query);
            values.flops += 2 * 8;
          }
        }
      }
      const heads = { first: 1, heads: 2 };
      const problem = { tokens, blocks: 2, range: heads, cached: heads, scale: 1 };
      expectAll([op(attentionScores, v)], problem, scores.work);
      expectAll([op(attentionSoftmax, v)], problem, softmax.work);
      expectAll([op(attentionValues, v)], problem, values.work);
    });
  }
});

/** Blocks of keys that a sequence's new token attends to in a head, ascending. */
type BlocksOf = (sequence: number, head: number) => readonly number[];

/** Which of a head's slices a block is in, in the order of those that are kept: `shared/splits.wgsl`. */
function sliceOf(place: number, count: number, maxSplits: number): number {
  return Math.floor(place / Math.ceil(count / maxSplits));
}

describe("decode attention", () => {
  const HEAD_DIM = 32;
  const LENGTHS = [[1], [64], [65], [400], [449], [1000], [1, 64, 65, 1000]];
  const SPLITS = [4, 32];
  /** Of 400 tokens both keep all seven blocks; the last of 449 has just begun. */
  const RULES = [{ keep: 5, leastBlocks: 8 }, { keep: 7, leastBlocks: 4 }];

  function touchPartials(tally: Tally, sequence: number, head: number, count: number, maxSplits: number) {
    for (let slice = 0; slice < maxSplits; slice++) tally.touch(8, "partial_ml", sequence, slice, head);
    // Whoever sees nothing at all leaves one slice, of zeros.
    tally.touch(4 * HEAD_DIM, "partial_out", sequence, 0, head);
    for (let i = 0; i < count; i++) {
      tally.touch(4 * HEAD_DIM, "partial_out", sequence, sliceOf(i, count, maxSplits), head);
    }
  }

  function decodeTally(
    elem: Elem,
    range: { readonly first: number; readonly heads: number },
    lengths: readonly number[],
    maxSplits: number,
    blocksOf: BlocksOf,
  ): Work {
    const tally = new Tally();
    const rowBytes = HEAD_DIM * sizeOf(elem);
    for (const [sequence, length] of lengths.entries()) {
      for (let head = range.first; head < range.first + range.heads; head++) {
        for (const third of ["q", "new k", "new v"]) tally.touch(rowBytes, third, sequence, head);
        for (const row of ["appended k", "appended v"]) tally.touch(rowBytes, row, sequence, head);
        const blocks = blocksOf(sequence, head);
        touchPartials(tally, sequence, head, blocks.length, maxSplits);
        for (let key = 0; key < length; key++) {
          if (!blocks.includes(Math.floor(key / KV_BLOCK))) continue;
          tally.flops += 2 * 2 * HEAD_DIM;
          if (key === length - 1) continue; // at hand
          tally.touch(rowBytes, "k", sequence, head, key);
          tally.touch(rowBytes, "v", sequence, head, key);
        }
      }
    }
    return tally.work;
  }

  function rowOf(length: number): number {
    return Math.floor((length - 1) / KV_BLOCK);
  }

  const opsOf = (elem: Elem, maxSplits: number, blocks: DecodeBlocks) =>
    [true, false].flatMap((unroll) =>
      splitKvCandidates(elem, HEADS, HEAD_DIM / 4, unroll, maxSplits, blocks)
    );
  const problemOf = (sequences: number, range: typeof RANGES[number]) => ({
    sequences,
    blocks: 64,
    tableBlocks: 16,
    scale: 1,
    range,
  });
  /** The product behind, of what all heads left. */
  const mergesOf = (elem: Elem, sequences: number, maxSplits: number) =>
    [true, false].flatMap((unroll) =>
      gemvCandidates(mergeGemv, {
        elem,
        epilogue: "residual",
        inner: HEADS * HEAD_DIM,
        heads: HEADS,
        headDim4: HEAD_DIM / 4,
        maxSplits,
      }, { rows: sequences, unroll })
    );

  function mergeTally(elem: Elem, lengths: readonly number[], maxSplits: number, blocksOf: BlocksOf): Work {
    const tally = new Tally();
    const columns = 20;
    for (const sequence of lengths.keys()) {
      for (let head = 0; head < HEADS; head++) {
        touchPartials(tally, sequence, head, blocksOf(sequence, head).length, maxSplits);
      }
      for (let column = 0; column < columns; column++) {
        tally.touch(4, "bias", column);
        tally.touch(4, "out before", sequence, column);
        tally.touch(4, "out", sequence, column);
        for (let k = 0; k < HEADS * HEAD_DIM; k++) {
          tally.touch(sizeOf(elem), "w", k, column);
          tally.flops += 2;
        }
      }
    }
    return tally.work;
  }

  function expectDecode(
    elem: Elem,
    lengths: readonly number[],
    blocks: DecodeBlocks,
    blocksOf: BlocksOf,
    keptOf?: (length: number) => readonly KeptBlocks[],
  ): void {
    for (const maxSplits of SPLITS) {
      for (const range of RANGES) {
        const kept = keptOf &&
          ((length: number) => keptOf(length).slice(range.first, range.first + range.heads));
        const wanted = decodeTally(elem, range, lengths, maxSplits, blocksOf);
        expectAll(
          opsOf(elem, maxSplits, blocks),
          { ...problemOf(lengths.length, range), kept },
          wanted,
          lengths,
        );
      }
      expectAll(
        mergesOf(elem, lengths.length, maxSplits),
        { rows: lengths.length, inner: HEADS * HEAD_DIM, columns: 20, kept: keptOf },
        mergeTally(elem, lengths, maxSplits, blocksOf),
        lengths,
      );
    }
  }

  for (const lengths of LENGTHS) {
    for (const elem of ELEMS) {
      test(`${elem}: all keys of ${lengths}, and the product that merges their slices`, () => {
        const blocksOf: BlocksOf = (sequence) => [...Array(rowOf(lengths[sequence]!) + 1).keys()];
        expectDecode(elem, lengths, "all", blocksOf);
      });
    }

    for (const [name, keeps] of Object.entries(MASKS)) {
      test(`of ${lengths} the keys that lists of ${name} leave`, () => {
        const lists = listsOf(keeps, 16);
        const blocksOf: BlocksOf = (sequence, head) => {
          const row = rowOf(lengths[sequence]!);
          return [...Array(row + 1).keys()].filter((column) => keeps(head, row, column));
        };
        expectDecode("f16", lengths, "listed", blocksOf, (length) => keptByLists(lists, length));
      });
    }

    for (const rule of RULES) {
      test(`of ${lengths} the keys that are selected, ${rule.keep} blocks, and what selects them`, () => {
        const summaries = normalArray(1, 16 * 2 * HEAD_DIM);
        const selections = lengths.map((length) =>
          selectReference(normalArray(length, HEAD_DIM), summaries, { ...rule, length: length - 1 })
        );
        const blocksOf: BlocksOf = (sequence) => selections[sequence]!.chosen;
        expectDecode("f16", lengths, "selected", blocksOf, keptBySelection(rule, HEADS));

        for (const range of RANGES) {
          const selecting = new Tally();
          const scoring = new Tally();
          const searched = new Tally();
          for (const [sequence, length] of lengths.entries()) {
            const { scores, chosen } = selections[sequence]!;
            for (let head = range.first; head < range.first + range.heads; head++) {
              selecting.touch(4, "count", sequence, head);
              for (const block of chosen) selecting.touch(4, "selected", sequence, head, block);
              for (const [block, score] of scores.entries()) {
                if (chosen.length === scores.length || score === Infinity) continue;
                for (const tally of [selecting, scoring]) {
                  tally.touch(2 * HEAD_DIM, "q", sequence, head);
                  tally.touch(2 * 2 * HEAD_DIM, "mean and spread", sequence, head, block);
                  tally.flops += 2 * 2 * HEAD_DIM;
                }
                for (const tally of [scoring, searched]) tally.touch(4, "score", sequence, head, block);
              }
              const before = length - 1;
              if (before === 0 || before % KV_BLOCK > 0) continue;
              for (const tally of [selecting, scoring]) {
                for (let key = before - KV_BLOCK; key < before; key++) {
                  tally.touch(2 * HEAD_DIM, "k", sequence, head, key);
                }
                tally.touch(2 * 2 * HEAD_DIM, "new mean and spread", sequence, head);
              }
            }
          }
          const problem = { ...problemOf(lengths.length, range), ...rule };
          const onSoftware = selectCandidates("f16", HEADS, HEAD_DIM / 4, 1024, false);
          const onGpus = selectCandidates("f16", HEADS, HEAD_DIM / 4, 1024, true);
          expectAll(onSoftware, problem, selecting.work, lengths);
          expectAll(onGpus, problem, scoring.work, lengths);
          for (const maxSplits of SPLITS) {
            expectAll(
              topkSplitKvCandidates("f16", HEADS, HEAD_DIM / 4, true, maxSplits, 1024),
              problem,
              sum([decodeTally("f16", range, lengths, maxSplits, blocksOf), searched.work]),
              lengths,
            );
          }
        }
      });
    }
  }

  test("of sequences of unknown length, queries, new rows and sums alone count", () => {
    const bytes = 4 * 3 * (5 * 2 * HEAD_DIM + 8 * 32);
    for (const blocks of ["all", "listed", "selected"] as const) {
      expectAll(opsOf("f16", 32, blocks), problemOf(4, RANGES[0]!), { bytes, flops: 0 });
    }
    const merged = { rows: 4, inner: 96, columns: 20 };
    const product = 96 * 20 * 2 + 4 * 20 + 4 * 20 * 2 * 4;
    const wanted = { bytes: product + 4 * 3 * 8 * 32, flops: 2 * 4 * 96 * 20 };
    expectAll(mergesOf("f16", 4, 32), merged, wanted);
  });
});

describe("matrix products", () => {
  const SIZES = [1, 5].flatMap((rows) =>
    [[12, 8], [32, 96]].map(([inner, columns]) => ({
      rows,
      inner: inner!,
      columns: columns!,
    }))
  );

  function productTally(
    { elem, epilogue }: { readonly elem: Elem; readonly epilogue: keyof typeof EPILOGUES },
    { rows, inner, columns }: typeof SIZES[number],
    x: Elem,
  ): Tally {
    const tally = new Tally();
    for (let row = 0; row < rows; row++) {
      for (let column = 0; column < columns; column++) {
        for (let k = 0; k < inner; k++) {
          tally.touch(sizeOf(x), "x", row, k);
          tally.touch(sizeOf(elem), "w", k, column);
          tally.flops += 2;
        }
        tally.touch(4, "bias", column);
        tally.touch(epilogue === "residual" ? 4 : sizeOf(elem), "out", row, column);
        if (epilogue === "residual") tally.touch(4, "out before", row, column);
      }
    }
    return tally;
  }

  for (const elem of ELEMS) {
    for (const epilogue of Object.keys(EPILOGUES) as (keyof typeof EPILOGUES)[]) {
      test(`${elem} ${epilogue}`, () => {
        for (const size of SIZES) {
          const { rows, inner } = size;
          const wanted = productTally({ elem, epilogue }, size, elem).work;
          const v = { elem, epilogue, inner };
          for (const unroll of [true, false]) {
            const isWide = inner % 32 === 0;
            expectAll(matmulCandidates(elem, epilogue, unroll, isWide), size, wanted);
            expectAll(gemvCandidates(plainGemv, v, { rows, unroll }), size, wanted);
            const normed = productTally({ elem, epilogue }, size, "f32");
            for (let k = 0; k < inner; k++) {
              for (const tensor of ["gain", "shift"]) normed.touch(4, tensor, k);
            }
            const ops = gemvCandidates(layerNormGemv, { ...v, width: inner - 1 }, { rows, unroll });
            expectAll(ops, { ...size, epsilon: 1 }, normed.work);
          }
        }
      });
    }

    test(`${elem}: a head in pieces`, () => {
      for (const rows of [1, 9]) {
        const problems = [{ first: 0, rows: 65 }, { first: 65, rows: 1 }].map((piece) => ({
          rows,
          inner: 12,
          vocab: 66,
          piece,
        }));
        const ops = [...oneRowCandidates(elem), ...manyRowsCandidates(elem, false)];
        for (const problem of problems) {
          const tally = new Tally();
          for (let row = 0; row < rows; row++) {
            for (let token = 0; token < problem.piece.rows; token++) {
              for (let k = 0; k < 12; k++) {
                tally.touch(4, "x", row, k);
                tally.touch(sizeOf(elem), "w", token, k);
                tally.flops += 2;
              }
              tally.touch(4, "logits", row, token);
            }
          }
          expectAll(ops, problem, tally.work);
        }
      }
    });
  }
});

describe("tensors that are streamed", () => {
  /** Of which bytes are left out: they only say which rows are meant, and how many. */
  const LEFT_OUT = ["block_table", "segments", "tokens", "targets", "sequences", "places", "seen", "results"];

  interface Streamed<P> {
    readonly op: Op<P>;
    readonly problem: P;
    /** Of each binding the elements that are read or written, and bytes of one. */
    readonly tensors: Readonly<Record<string, readonly [elements: number, bytes: number]>>;
    readonly flops?: number;
  }

  function streamed<P>(name: string, { op, problem, tensors, flops = 0 }: Streamed<P>): void {
    test(name, () => {
      const bytes = Object.values(tensors).reduce((total, [elements, size]) => total + elements * size, 0);
      expect(workOf(op, problem)).toEqual({ bytes, flops });
      const bindings = Object.keys(op.kernel.bindings);
      expect(Object.keys(tensors).filter((tensor) => !bindings.includes(tensor))).toEqual([]);
      expect(bindings.filter((binding) => !Object.hasOwn(tensors, binding) && !LEFT_OUT.includes(binding)))
        .toEqual([]);
    });
  }

  // Rows of 30 columns are stored as 32.
  streamed("layer norm to f16", {
    op: op(layerNorm, { outElem: "f16", width: 30 }),
    problem: { rows: 65, firstRow: 3, epsilon: 1 },
    tensors: { x: [65 * 32, 4], gain: [32, 4], shift: [32, 4], out: [65 * 32, 2] },
  });
  streamed("layer norm to f32", {
    op: op(layerNorm, { outElem: "f32", width: 32 }),
    problem: { rows: 1, firstRow: 0, epsilon: 1 },
    tensors: { x: [32, 4], gain: [32, 4], shift: [32, 4], out: [32, 4] },
  });
  streamed("keys and values of some heads", {
    op: op(kvAppend, { elem: "f16", heads: 3, headDim4: 2 }),
    problem: { tokens: 65, firstPosition: 63, blocks: 4, range: { first: 1, heads: 2 } },
    tensors: { qkv: [65 * 2 * 2 * 8, 2], k: [65 * 2 * 8, 2], v: [65 * 2 * 8, 2] },
  });
  streamed("token embeddings", {
    op: op(tokenRows, { elem: "f16", width4: 8 }),
    problem: { tokens: 65, piece: { first: 0, rows: 100 } },
    tensors: { rows: [65 * 32, 2], x: [65 * 32, 4] },
  });
  streamed("position embeddings are added", {
    op: op(positionRows, { elem: "f16", width4: 8 }),
    problem: { tokens: 65, piece: { first: 0, rows: 100 } },
    tensors: { rows: [65 * 32, 2], x: [2 * 65 * 32, 4] },
  });
  streamed("a table has no more rows than it has", {
    op: op(positionRows, { elem: "f16", width4: 8 }),
    problem: { tokens: 65, piece: { first: 0, rows: 10 } },
    tensors: { rows: [10 * 32, 2], x: [2 * 65 * 32, 4] },
  });
  streamed("a quarter of a table", {
    op: op(tokenRows, { elem: "f32", width4: 8 }),
    problem: { tokens: 60, piece: { first: 25, rows: 25 }, tableRows: 100 },
    tensors: { rows: [15 * 32, 4], x: [15 * 32, 4] },
  });
  streamed("gathered rows", {
    op: op(segmentSum, {}),
    problem: { segments: 7, firstSegment: 2, width: 32 },
    tensors: { x: [7 * 32, 4], out: [7 * 32, 4] },
  });
  streamed("sums of rows", {
    op: op(segmentSum, {}),
    problem: { segments: 7, firstSegment: 2, width: 32, summedRows: () => 100 },
    tensors: { x: [100 * 32, 4], out: [7 * 32, 4] },
  });
  streamed("likelihoods", {
    op: nllCandidates(true)[0]!,
    problem: { rows: 3, vocab: 65, firstRow: 1 },
    tensors: { logits: [3 * 65, 4], nll: [3, 4] },
  });
  streamed("divergences", {
    op: divergenceCandidates(true)[0]!,
    problem: { rows: 3, vocab: 65, firstRow: 1 },
    tensors: { logits: [3 * 65, 4], other: [3 * 65, 4], results: [3, 16] },
  });
  const draw = {
    vocab: 65,
    sequences: 4,
    firstSequence: 1,
    rows: 3,
    slot: 0,
    temperature: 1,
    topK: 40,
    topP: 0.9,
    minP: 0,
    repeatPenalty: 1,
    capacity: 64,
  };
  for (const one of [greedyCandidates(true)[0]!, drawCandidates(true)[0]!]) {
    streamed(`${one.kernel.name}: one reading of the logits`, {
      op: one,
      problem: draw,
      tensors: { logits: [3 * 65, 4], results: [3, 12] },
    });
    streamed(`${one.kernel.name} with a penalty: what was seen, too`, {
      op: one,
      problem: { ...draw, repeatPenalty: 1.1 },
      tensors: { logits: [3 * 65, 4], seen: [3 * 3, 4], results: [3, 12] },
    });
  }
  streamed("log-probabilities", {
    op: logprobsCandidates(true)[0]!,
    problem: { ...draw, top: 5 },
    tensors: { logits: [3 * 65, 4], logprobs: [3 * 6, 8] },
  });
  streamed("summaries of blocks", {
    op: summarizeCandidates("f16", 2, true)[0]!,
    problem: {
      blocks: 9,
      tableBlocks: 3,
      sequence: 1,
      firstBlock: 0,
      count: 3,
      range: { first: 1, heads: 2 },
    },
    tensors: { k: [3 * 2 * 64 * 8, 2], summaries: [3 * 2 * 2 * 8, 2] },
  });
  streamed("a copy", {
    op: op(copyBytes, {}),
    problem: { bytes: 160 },
    tensors: { source: [10, 16], out: [10, 16] },
  });
  // Of each invocation 32 numbers, eight multiply-adds a trip.
  streamed("multiply-adds from registers", {
    op: op(fmaPeak, {}),
    problem: { workgroups: 3, trips: 5, factor: 1, addend: 0 },
    tensors: { out: [3 * 256, 4] },
    flops: 3 * 256 * 32 * 5 * 8 * 2,
  });
  // Of each of four subgroups sixteen products of 16×16 matrices a trip.
  streamed("products from registers", {
    op: op(subgroupMatrixPeak, {}),
    problem: { workgroups: 3, trips: 5, kept: 0 },
    tensors: { left: [4 * 256, 2], right: [4 * 256, 2], out: [3 * 4 * 256, 4] },
    flops: 3 * 4 * 5 * 16 * 2 * 16 ** 3,
  });
});

describe("every candidate of a model like gpt2", () => {
  const range = { first: 0, heads: 12 };
  const place = { vocab: 50_257, firstSequence: 0, rows: 8, sequences: 8, slot: 0 };
  const draw = { ...place, topK: 0, topP: 1, minP: 0, repeatPenalty: 1, capacity: 65_536 };
  const rows = { first: 0, rows: 50_257 };
  const chunk = { qLen: 2048, firstPosition: 2048, blocks: 8192, range, scale: 1 };
  const attended = (): AttendedKeys => ({ pairs: 12 * 65 * 64, keys: 12 * 64 });
  const step = { sequences: 8, blocks: 8192, tableBlocks: 1024, range };
  const kept = keptBySelection({ keep: 32, leastBlocks: 64 }, 12);
  const rule = { keep: 32, leastBlocks: 64 };
  const product = { rows: 2048, inner: 768, columns: 768 };
  const decoded = { rows: 8, inner: 768, columns: 768 };
  const problems: Readonly<Record<Role, object>> = {
    tokenRows: { tokens: 2048, piece: rows },
    positionRows: { tokens: 2048, piece: { first: 0, rows: 1024 } },
    layerNorm: { rows: 2048, firstRow: 0, epsilon: 1e-5 },
    finalNorm: { rows: 1, firstRow: 2047, epsilon: 1e-5 },
    matmulBias: { ...product, columns: 2304 },
    matmulBiasGelu: { ...product, columns: 3072 },
    matmulResidual: product,
    smallMatmulBias: { ...product, rows: 17 },
    smallMatmulBiasGelu: { ...product, rows: 17 },
    smallMatmulResidual: { ...product, rows: 17 },
    kvAppend: { tokens: 2048, firstPosition: 2048, blocks: 8192, range },
    attention: chunk,
    sparseAttention: { ...chunk, attended },
    packedAttention: { ...chunk, attended },
    decodeQkv: { ...decoded, columns: 2304, epsilon: 1e-5 },
    decodeAttention: { ...step, scale: 1 },
    sparseDecodeAttention: { ...step, scale: 1, kept },
    topkDecodeAttention: { ...step, scale: 1, ...rule, kept },
    summarizeBlocks: { blocks: 8192, tableBlocks: 1024, sequence: 0, firstBlock: 0, count: 64, range },
    selectBlocks: { ...step, ...rule },
    decodeProjection: decoded,
    decodeHidden: { ...decoded, columns: 3072, epsilon: 1e-5 },
    decodeOutput: { ...decoded, inner: 3072 },
    greedy: { ...draw, temperature: 0 },
    draw: { ...draw, temperature: 1 },
    logprobs: { ...place, top: 5 },
    lmHeadOne: { rows: 1, inner: 768, vocab: 50_257, piece: rows },
    lmHeadMany: { rows: 64, inner: 768, vocab: 50_257, piece: rows },
    nll: { rows: 64, vocab: 50_257, firstRow: 0 },
    divergence: { rows: 64, vocab: 50_257, firstRow: 0 },
    segmentSum: { segments: 8, firstSegment: 0, width: 768 },
  };
  const lengths = [1, 64, 65, 1000, 4097, 10_000, 65_536, 2];
  const SHAPE = { width: 768, heads: 12, headDim4: 16, inner: 3072, sequences: 8, selectableBlocks: 1024 };
  for (const elem of ELEMS) {
    for (const unroll of [true, false]) {
      test(`${elem}${unroll ? "" : " on software"} moves the same bytes as the others of its role`, () => {
        for (const [role, ops] of Object.entries(candidates({ elem, unroll, ...SHAPE }))) {
          const works = ops.map((one) => workOf(one as Op<object>, problems[role as Role], lengths));
          for (const { bytes, flops } of works) {
            expect([role, Number.isSafeInteger(bytes) && bytes > 0]).toEqual([role, true]);
            expect([role, Number.isSafeInteger(flops) && flops >= 0]).toEqual([role, true]);
          }
          expect([role, new Set(works.map((work) => JSON.stringify(work))).size]).toEqual([role, 1]);
        }
      });
    }
  }
});

describe("what a model's kernels are told on the null backend", () => {
  const SHAPE = { width: 96, heads: HEADS, headDim4: 8, inner: 128, sequences: 2, selectableBlocks: 16 };
  const opening = openDevice({ nullBackend: true });
  afterAll(async () => (await opening).destroy());
  const mask = parseMask(
    JSON.stringify({
      masks: [{ heads: [2], rows: [[0], [0], [1, 2], [3], [0, 4], [0]] }],
      default: "local:128",
    }),
    "mask.json",
  );
  const none = {} as GpuBuffer;
  const decoding: DecodeBuffers = { qkv: none, sequences: none, partialOut: none, partialMl: none };
  const layer = { w: none, bias: none, inner: 96, columns: 96 };

  /** Kernels that write down the work of what they dispatch instead of running it. */
  async function setUp(lengths: readonly number[] = []) {
    const gpu = await opening;
    const shape: KernelShape = { elem: "f32", unroll: true, ...SHAPE };
    const works: Record<string, Work[]> = {};
    const dispatcher: Dispatcher = {
      enter() {},
      dispatch(kernel, v, p) {
        (works[kernel.name.split("/")[0]!] ??= []).push(kernel.work(v, p, lengths));
      },
    };
    return { gpu, kernels: new ModelKernels(gpu, shape), dispatcher, works };
  }

  /** A cache whose heads are in two buffers. */
  async function sparseCache(gpu: Awaited<ReturnType<typeof openDevice>>): Promise<KvCache> {
    const layout = { layers: 2, heads: HEADS, headDim4: 8, elem: "f32" } as const;
    const bytes = 2 * 12 * KV_BLOCK * 32 * 4;
    const pattern = { kind: "file", path: "mask.json" } as const;
    return await KvCache.create(gpu, kvLayout(layout, 6 * KV_BLOCK, bytes, 2, { pattern, mask, sha256: "" }));
  }

  const keeps: Keeps = (head, row, column) =>
    head === 2 ? [[0], [0], [1, 2], [3], [0, 4], [0]][row]!.includes(column) : row - column < 2;

  test("prefill attention counts what the cache's lists leave its heads", async () => {
    const { gpu, kernels, dispatcher, works } = await setUp();
    const cache = await sparseCache(gpu);
    try {
      const view = cache.layer(1);
      expect(view.parts.map(({ range }) => range.heads)).toEqual([2, 1]);
      const p = { qLen: 100, firstPosition: 70, scale: 1 };
      kernels.attention(dispatcher, none, view, none, p);
      const lists = listsOf(keeps, 6);
      expect(works["flash_attention"]).toEqual([lists.slice(0, 2), lists.slice(2)].map((heads) => {
        const { pairs, keys } = attendedByLists(heads, p);
        return { bytes: (2 * 100 * heads.length + 2 * keys) * 32 * 4, flops: 4 * 32 * pairs };
      }));
    } finally {
      cache.destroy();
    }
  });

  test("decoding counts what they leave a sequence's newest token, and the slices of that", async () => {
    const lengths = [65, 384];
    const { gpu, kernels, dispatcher, works } = await setUp(lengths);
    const cache = await sparseCache(gpu);
    try {
      const view = cache.layerOfAll(1);
      kernels.decodeAttention(dispatcher, decoding, view, { sequences: 2, scale: 1 });
      kernels.mergedGemv(dispatcher, decoding, layer, none, 2, view);
      // Of 65 tokens local heads see all, and head 2 block 0; of 384 they see two blocks, and it block 0.
      expect(works["flash_decode"]!.map(({ flops }) => flops)).toEqual([
        4 * 32 * 2 * (65 + 128),
        4 * 32 * 2 * 64,
      ]);
      // Blocks are slices of their own here.
      const slices = 2 * (2 + 2) + 1 + 1;
      const product = 4 * (96 * 96 + 96 + 2 * 2 * 96);
      const maxima = 8 * 16 * 2 * HEADS;
      expect(works["gemv"]).toEqual([{ bytes: product + maxima + slices * 32 * 4, flops: 2 * 2 * 96 * 96 }]);
    } finally {
      cache.destroy();
    }
  });

  test("decoding counts blocks that are selected", async () => {
    const { kernels, dispatcher, works } = await setUp([1000, 100]);
    const range = { first: 0, heads: HEADS };
    const parts = [{ range, k: none, v: none, summaries: none }];
    const view = { parts, table: none, blocks: 32, tableBlocks: 16, lists: undefined, selected: none };
    const selection = { keep: 4, leastBlocks: 8 };
    kernels.decodeAttention(dispatcher, decoding, view, { sequences: 2, scale: 1 }, selection);
    kernels.mergedGemv(dispatcher, decoding, layer, none, 2, view, selection);
    // Three whole blocks and 40 keys of the last; all of the other sequence.
    expect(works["flash_decode"]!.map(({ flops }) => flops)).toEqual([4 * 32 * HEADS * (3 * 64 + 40 + 100)]);
    const product = 4 * (96 * 96 + 96 + 2 * 2 * 96);
    const merged = 8 * 16 * 2 * HEADS + (4 + 2) * HEADS * 32 * 4;
    expect(works["gemv"]!.map(({ bytes }) => bytes)).toEqual([product + merged]);
  });

  test("a pack counts what its view says, and pieces of a table count once together", async () => {
    const { kernels, dispatcher, works } = await setUp();
    const range = { first: 0, heads: HEADS };
    const segments = documentSegments(documentPlaces([3, 65]));
    const view = {
      parts: [{ range, k: none, v: none }],
      table: none,
      blocks: 4,
      lists: undefined,
      segments: none,
      attended: (p: { range: typeof range; firstPosition: number }) => packAttended(segments, p),
    };
    kernels.attention(dispatcher, none, view, none, { qLen: 192, firstPosition: 0, scale: 1 });
    expect(works["flash_attention"]!.map(({ flops }) => flops)).toEqual([
      4 * 32 * HEADS * (64 * 65 / 2 + 128 * 129 / 2),
    ]);
    const piece = (first: number, rows: number) => ({ first, rows, buffer: none });
    kernels.embed(dispatcher, none, [piece(0, 32), piece(32, 16)], [piece(0, 48)], none, 24);
    expect(sum(works["embedding"]!)).toEqual({ bytes: 24 * 96 * 4 * (1 + 1 + 1 + 2), flops: 0 });
  });

  test("a pattern's lists are those that attention is told of", () => {
    const lists = blockLists({ kind: "local", window: 128 }, 6);
    const p = { qLen: 100, firstPosition: 70 };
    const [head] = listsOf(keeps, 6);
    expect(attendedByLists([lists], p)).toEqual(attendedByLists([head!], p));
  });
});
