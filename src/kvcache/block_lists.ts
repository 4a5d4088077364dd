/**
 * How block lists lie in GPU memory. This is the only description; `shared/block_lists.wgsl` reads it.
 *
 * A buffer of u32 serves all heads of a layer: first, for each head, where its rows begin; heads that keep the same blocks
 * share them. From there two words a row and one behind the last: where the row's blocks begin, whole ones first, and where
 * those that are seen in part do. Each row ends where the next begins. Then the blocks of all rows.
 */
import type { BlockLists } from "./patterns.ts";

/** Words of one head's rows, blocks among them. */
function listWords(rows: number, blocks: number): number {
  return 2 * rows + 1 + blocks;
}

/**
 * Bytes of a layer's lists.
 * @param lists rows and kept blocks of the heads that keep different ones
 */
export function listBytes(heads: number, lists: readonly { rows: number; blocks: number }[]): number {
  const words = lists.reduce((sum, { rows, blocks }) => sum + listWords(rows, blocks), heads);
  // A word more: kernels look at the first block of a row, which the last may lack.
  return 4 * (words + 1);
}

/** A layer's lists, one for each head: the same object for heads that keep the same blocks. */
export function packLists(heads: readonly BlockLists[]): Uint32Array<ArrayBuffer> {
  const distinct = [...new Set(heads)];
  const sizes = distinct.map(({ rows, full, partial }) => ({
    rows,
    blocks: full.indices.length + partial.indices.length,
  }));
  const words = new Uint32Array(listBytes(heads.length, sizes) / 4);
  let at = heads.length;
  for (const [i, { rows, full, partial }] of distinct.entries()) {
    heads.forEach((lists, head) => {
      if (lists === distinct[i]) words[head] = at;
    });
    let block = at + 2 * rows + 1;
    for (let row = 0; row < rows; row++) {
      for (const { indptr, indices } of [full, partial]) {
        words[at++] = block;
        for (let n = indptr[row]!; n < indptr[row + 1]!; n++) words[block++] = indices[n]!;
      }
    }
    words[at] = block;
    at = block;
  }
  return words;
}
