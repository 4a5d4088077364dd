/**
 * Where the documents of a pack lie: one behind the other in the rows of a chunk, which are places in the cache too, each
 * beginning on a block of it, so that no tile of attention has two of them and a document's result is, bit for bit, what
 * it is alone. Behind them may come branches: continuations that all attend to one document, and not to each other, as the
 * branches of a tree do (tree attention, Miao et al. 2023, SpecInfer, section 4.2).
 */
import type { RowSegment } from "../kernels/segment_sum/segment_sum.ts";
import { KV_BLOCK } from "../kernels/shared/shared.ts";

/** Rows that so many tokens take in a pack: whole blocks of the cache. */
export function packedRows(tokens: number): number {
  return KV_BLOCK * Math.ceil(tokens / KV_BLOCK);
}

/** The first row of each document, and behind the last one the number of all rows. */
export function documentPlaces(lengths: readonly number[]): number[] {
  const places = [0];
  for (const length of lengths) places.push(places.at(-1)! + packedRows(length));
  return places;
}

/** Writes what a row of a pack attends to, as `flash_attention/walk_segments.wgsl` reads it. */
function setSegment(
  segments: Uint32Array,
  row: number,
  { sharedFirst = 0, sharedEnd = 0, ownFirst, start }: {
    readonly sharedFirst?: number;
    readonly sharedEnd?: number;
    readonly ownFirst: number;
    readonly start: number;
  },
): void {
  segments[4 * row] = sharedFirst;
  segments[4 * row + 1] = sharedEnd;
  segments[4 * row + 2] = ownFirst;
  segments[4 * row + 3] = start;
}

/** The segments of documents' rows, `[rows, 4]`: each row attends to its own document. */
export function documentSegments(places: readonly number[]): Uint32Array<ArrayBuffer> {
  const segments = new Uint32Array(4 * places.at(-1)!);
  for (let i = 0; i + 1 < places.length; i++) {
    const first = places[i]!;
    for (let row = first; row < places[i + 1]!; row++) {
      setSegment(segments, row, { ownFirst: first, start: first });
    }
  }
  return segments;
}

/** Continuations of the documents of a pack, as rows behind theirs. */
export interface Branches {
  /** Of all documents' branches, in whole blocks for each document. */
  readonly rows: number;
  /** `[rows, 4]`, as `documentSegments`. */
  readonly segments: Uint32Array<ArrayBuffer>;
  /** The first row of each branch, in the order of documents and then of branches. */
  readonly firstRows: readonly number[];
}

/**
 * Branches behind the documents at `places`, the same number of tokens for each document's.
 * @param lengths tokens of each document
 * @param branchLengths tokens of each of its branches, 0 for one that has no row
 */
export function branchRows(
  places: readonly number[],
  lengths: readonly number[],
  branchLengths: readonly number[],
): Branches {
  const total = branchLengths.reduce((sum, length) => sum + length, 0);
  const rowsEach = packedRows(total);
  const rows = rowsEach * lengths.length;
  const segments = new Uint32Array(4 * rows);
  const firstRows: number[] = [];
  const behind = places.at(-1)!;
  lengths.forEach((length, i) => {
    const ownRow = i * rowsEach;
    const shared = { sharedFirst: places[i]!, sharedEnd: places[i]! + length, ownFirst: behind + ownRow };
    let row = ownRow;
    for (const branch of branchLengths) {
      const start = behind + row;
      firstRows.push(row);
      for (const end = row + branch; row < end; row++) setSegment(segments, row, { ...shared, start });
    }
    // Rows that fill the block are nobody's: each attends to the document and itself.
    for (; row < ownRow + rowsEach; row++) setSegment(segments, row, { ...shared, start: behind + row });
  });
  return { rows, segments, firstRows };
}

/** What adds up the rows of documents' beginnings: sums of blocks, by the row that they begin at, then the means. */
export interface MeanSums {
  /** Of rows of the pack, in increasing order of `first`. */
  readonly pieces: readonly RowSegment[];
  /** Of pieces, one for each beginning in the order of documents and lengths. */
  readonly means: readonly RowSegment[];
}

/**
 * The means over the first rows of documents.
 * @param beginnings for each document the lengths of its beginnings
 */
export function meanSums(places: readonly number[], beginnings: readonly (readonly number[])[]): MeanSums {
  const pieces: RowSegment[] = [];
  const means: RowSegment[] = [];
  beginnings.forEach((lengths, i) => {
    for (const length of lengths) {
      means.push({
        first: pieces.length,
        rows: packedRows(length) / KV_BLOCK,
        row: means.length,
        scale: 1 / length,
      });
      for (let first = 0; first < length; first += KV_BLOCK) {
        const rows = Math.min(KV_BLOCK, length - first);
        pieces.push({ first: places[i]! + first, rows, row: pieces.length, scale: 1 });
      }
    }
  });
  return { pieces: pieces.sort((a, b) => a.first - b.first), means };
}
