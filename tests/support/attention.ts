/** What the two attention kernels' tests share: inputs, their layouts on the GPU, the plain algorithm, its conditioning. */
import { type HeadRange, KV_BLOCK } from "../../src/kernels/shared/shared.ts";
import type { BlockLists, Csr } from "../../src/kvcache/patterns.ts";
import type { Elem } from "../../src/runtime/kernel.ts";
import { maxAbs } from "./compare.ts";
import { rounded } from "./device.ts";
import { normalArray, uniformArray } from "./random.ts";

export interface AttentionShape {
  readonly heads: number;
  readonly headDim: number;
  /** Queries; the last of them sees all keys. */
  readonly qLen: number;
  readonly firstPosition: number;
  readonly scale: number;
}

/** `q [qLen, heads, headDim]`, `k` and `v [kvLen, heads, headDim]`, rounded to the stored type. */
export interface AttentionInputs {
  readonly q: ArrayLike<number>;
  readonly k: ArrayLike<number>;
  readonly v: ArrayLike<number>;
}

export function shapeOf(heads: number, headDim: number, qLen: number, firstPosition: number): AttentionShape {
  return { heads, headDim, qLen, firstPosition, scale: 1 / Math.sqrt(headDim) };
}

export function randomInputs(shape: AttentionShape, elem: Elem, seed: number): AttentionInputs {
  const width = shape.heads * shape.headDim;
  const kvLen = shape.firstPosition + shape.qLen;
  return {
    q: rounded(normalArray(seed, shape.qLen * width, 0, 1.5), elem),
    k: rounded(normalArray(seed + 1, kvLen * width, 0, 1.5), elem),
    v: rounded(normalArray(seed + 2, kvLen * width), elem),
  };
}

/** QKV rows `[qLen, 3, heads, headDim4 · 4]` with NaN for keys and values, which attention reads from the cache. */
export function packQueries(q: ArrayLike<number>, { heads, headDim, qLen }: AttentionShape): Float64Array {
  const stride = 4 * Math.ceil(headDim / 4);
  const out = new Float64Array(qLen * 3 * heads * stride).fill(NaN);
  for (let i = 0; i < qLen; i++) {
    for (let h = 0; h < heads; h++) {
      for (let d = 0; d < stride; d++) {
        const value = d < headDim ? q[(i * heads + h) * headDim + d]! : 0;
        out[(3 * i * heads + h) * stride + d] = value;
      }
    }
  }
  return out;
}

/**
 * A block table with room for `kvLen` keys and two blocks more: neighbours in position are none in memory, so a kernel
 * that does not ask the table is found out.
 */
export function scrambledTable(kvLen: number): Uint32Array {
  const blocks = Math.ceil(kvLen / KV_BLOCK) + 2;
  const table = Uint32Array.from({ length: blocks }, (_, i) => i);
  const draws = uniformArray(blocks, blocks, 0, 1);
  for (let i = blocks - 1; i > 0; i--) {
    const j = Math.floor(draws[i]! * (i + 1));
    [table[i], table[j]] = [table[j]!, table[i]!];
  }
  return table;
}

/** Where position `j` of a head is in the cache. */
export function cacheRow(table: Uint32Array, head: number, j: number): number {
  return (head * table.length + table[Math.floor(j / KV_BLOCK)]!) * KV_BLOCK + j % KV_BLOCK;
}

/**
 * Keys or values `[kvLen, heads, headDim]` of a range of heads as the cache holds them, `[heads of the range, blocks,
 * KV_BLOCK, headDim4 · 4]`; NaN past kvLen.
 */
export function packCache(
  rows: ArrayLike<number>,
  { heads, headDim }: AttentionShape,
  table: Uint32Array,
  range: HeadRange = { first: 0, heads },
): Float64Array {
  const stride = 4 * Math.ceil(headDim / 4);
  const kvLen = rows.length / (heads * headDim);
  const out = new Float64Array(range.heads * table.length * KV_BLOCK * stride).fill(NaN);
  for (let h = 0; h < range.heads; h++) {
    for (let j = 0; j < kvLen; j++) {
      for (let d = 0; d < stride; d++) {
        const value = d < headDim ? rows[(j * heads + range.first + h) * headDim + d]! : 0;
        out[cacheRow(table, h, j) * stride + d] = value;
      }
    }
  }
  return out;
}

/** The heads in one buffer, and the same heads in two where there are several. */
export function headRanges(heads: number, split: boolean): HeadRange[] {
  const half = Math.ceil(heads / 2);
  return split && heads > 1
    ? [{ first: 0, heads: half }, { first: half, heads: heads - half }]
    : [{ first: 0, heads }];
}

/** Whether a head's query at a position attends to a key at or before it. */
export type Sees = (head: number, position: number, key: number) => boolean;

/** Textbook causal attention, every operation in f32: dot products, scale, maximum, exp, sum, weighted sum, division. */
export function plainAttention(
  { q, k, v }: AttentionInputs,
  shape: AttentionShape,
  sees: Sees = () => true,
): Float32Array {
  const { heads, headDim, qLen, firstPosition } = shape;
  const { fround } = Math;
  const scale = fround(shape.scale);
  const width = heads * headDim;
  const out = new Float32Array(qLen * width);
  const sums = new Float32Array(headDim);
  for (let i = 0; i < qLen; i++) {
    for (let h = 0; h < heads; h++) {
      const query = i * width + h * headDim;
      const scores = new Float32Array(firstPosition + i + 1).fill(-Infinity);
      let m = -Infinity;
      for (let j = 0; j < scores.length; j++) {
        if (!sees(h, firstPosition + i, j)) continue;
        let dot = 0;
        const key = j * width + h * headDim;
        for (let d = 0; d < headDim; d++) dot = fround(dot + fround(q[query + d]! * k[key + d]!));
        scores[j] = dot * scale;
        m = Math.max(m, scores[j]!);
      }
      if (m === -Infinity) continue;
      let l = 0;
      sums.fill(0);
      for (let j = 0; j < scores.length; j++) {
        const p = fround(Math.exp(fround(scores[j]! - m)));
        const value = j * width + h * headDim;
        l = fround(l + p);
        for (let d = 0; d < headDim; d++) sums[d] = sums[d]! + fround(p * v[value + d]!);
      }
      for (let d = 0; d < headDim; d++) out[query + d] = sums[d]! / l;
    }
  }
  return out;
}

/**
 * Size of the intermediates of each row, for the floor of the tolerance. Weights are positive and add up to one, so the
 * output adds up terms no larger than the largest value. Where scores are so large that their own rounding decides the
 * weights (`hard`), that comes on top: scores off by δ move weights by at most δ/2 in all, and δ is relative to
 * Σ|q||k| · scale, however small their difference.
 */
export function attentionMagnitude(
  { q, k, v }: AttentionInputs,
  shape: AttentionShape,
  hard = false,
): (row: number) => number {
  const { heads, headDim, firstPosition, scale } = shape;
  const largestValue = maxAbs(v);
  return (row) => {
    let score = 0;
    for (let j = 0; hard && j <= firstPosition + row; j++) {
      for (let h = 0; h < heads; h++) {
        let sum = 0;
        for (let d = 0; d < headDim; d++) {
          sum += Math.abs(q[(row * heads + h) * headDim + d]! * k[(j * heads + h) * headDim + d]!);
        }
        score = Math.max(score, sum * scale);
      }
    }
    return largestValue * (1 + score);
  };
}

/**
 * Lists for `rows` blocks of queries, one for each head, of the blocks that `keeps` accepts.
 * @param keeps asked for blocks of keys that are not behind the queries' own
 */
export function listsWhere(
  heads: number,
  rows: number,
  keeps: (head: number, row: number, block: number) => boolean,
): BlockLists[] {
  const csr = (columns: readonly (readonly number[])[]): Csr => ({
    indptr: Uint32Array.from({ length: rows + 1 }, (_, row) => columns.slice(0, row).flat().length),
    indices: Uint32Array.from(columns.flat()),
  });
  return Array.from({ length: heads }, (_, head) => {
    const kept = Array.from(
      { length: rows },
      (_, row) =>
        Array.from({ length: row + 1 }, (_, block) => block).filter((block) => keeps(head, row, block)),
    );
    return {
      rows,
      full: csr(kept.map((blocks, row) => blocks.filter((block) => block < row))),
      partial: csr(kept.map((blocks, row) => blocks.filter((block) => block === row))),
    };
  });
}

/** What heads with these lists see. */
export function seenBy(heads: readonly BlockLists[]): Sees {
  const kept = heads.map(({ rows, full, partial }) =>
    Array.from({ length: rows }, (_, row) =>
      new Set([full, partial].flatMap(({ indptr, indices }) => [
        ...indices.subarray(indptr[row]!, indptr[row + 1]!),
      ])))
  );
  return (head, position, key) =>
    kept[head]![Math.floor(position / KV_BLOCK)]!.has(Math.floor(key / KV_BLOCK));
}

/** What a query of a pack sees, in places of the cache (`walk_segments.wgsl`). */
export interface Segment {
  readonly sharedFirst: number;
  readonly sharedEnd: number;
  readonly ownFirst: number;
  readonly start: number;
}

/** Segments as the kernels read them. */
export function packSegments(segments: readonly Segment[]): Uint32Array {
  return Uint32Array.from(segments.flatMap((s) => [s.sharedFirst, s.sharedEnd, s.ownFirst, s.start]));
}

/** What queries with these segments see, the first of which is at `firstPosition`. */
export function seenInPack(segments: readonly Segment[], firstPosition: number): Sees {
  return (_, position, key) => {
    const { sharedFirst, sharedEnd, start } = segments[position - firstPosition]!;
    return (sharedFirst <= key && key < sharedEnd) || start <= key;
  };
}

/** Queries of one call with their segments. */
export interface Pack {
  readonly firstPosition: number;
  readonly segments: readonly Segment[];
  /** Where each document or branch begins in the cache. */
  readonly places: readonly number[];
}

/** The next place at which a group begins. */
export function nextGroup(place: number): number {
  return KV_BLOCK * Math.ceil(place / KV_BLOCK);
}

/** Documents of these lengths, each in groups of its own, the rest of which is as if it went on. */
export function packDocuments(lengths: readonly number[], firstPosition = 0): Pack {
  const segments: Segment[] = [];
  const places = lengths.map((length) => {
    const place = nextGroup(firstPosition + segments.length);
    while (firstPosition + segments.length < place) segments.push(segments.at(-1)!);
    const segment = { sharedFirst: place, sharedEnd: place, ownFirst: place, start: place };
    for (let i = 0; i < length; i++) segments.push(segment);
    return place;
  });
  return { firstPosition, segments, places };
}

/**
 * Branches of documents that are in the cache, side by side behind it.
 * @param documents where each begins and ends in the cache, and the lengths of its branches; the rest of its last group
 * are branches of one token
 */
export function packBranches(
  documents: readonly { first: number; end: number; branches: readonly number[] }[],
): Pack {
  const firstPosition = nextGroup(Math.max(...documents.map(({ end }) => end)));
  const segments: Segment[] = [];
  const places: number[] = [];
  for (const { first, end, branches } of documents) {
    const starts: number[] = [];
    const base = nextGroup(firstPosition + segments.length);
    while (firstPosition + segments.length < base) {
      const place = firstPosition + segments.length;
      segments.push({ ...segments.at(-1)!, start: place });
    }
    for (const length of branches) {
      places.push(base + starts.length);
      starts.push(...new Array<number>(length).fill(base + starts.length));
    }
    starts.forEach((start, i) => {
      const ownFirst = KV_BLOCK * Math.floor(starts[i - i % KV_BLOCK]! / KV_BLOCK);
      segments.push({ sharedFirst: first, sharedEnd: end, ownFirst, start });
    });
  }
  return { firstPosition, segments, places };
}
