/** What block lists leave to queries, counted: how much of its keys attention cannot do without. */
import type { AttendedKeys } from "../kernels/flash_attention/flash_attention.ts";
import { causalPairs, type KeptBlocks, KV_BLOCK } from "../kernels/shared/shared.ts";
import type { BlockLists, Csr } from "./patterns.ts";

/** Which queries attend: `qLen` of them from `firstPosition` on. */
interface Queries {
  readonly qLen: number;
  readonly firstPosition: number;
}

/**
 * What queries attend to in some heads, over all of them.
 * @param heads the lists of each, the same object where they are the same
 */
export function attendedByLists(heads: readonly BlockLists[], queries: Queries): AttendedKeys {
  let pairs = 0;
  let keys = 0;
  for (const lists of new Set(heads)) {
    const same = heads.filter((one) => one === lists).length;
    const attended = attendedInHead(lists, queries);
    pairs += same * attended.pairs;
    keys += same * attended.keys;
  }
  return { pairs, keys };
}

function attendedInHead({ full, partial }: BlockLists, { qLen, firstPosition }: Queries): AttendedKeys {
  const end = firstPosition + qLen;
  const isKept = new Uint8Array(Math.ceil(end / KV_BLOCK));
  let pairs = 0;
  for (let row = Math.floor(firstPosition / KV_BLOCK); row < isKept.length; row++) {
    const first = Math.max(firstPosition, row * KV_BLOCK);
    const count = Math.min(end, (row + 1) * KV_BLOCK) - first;
    for (const column of columnsOf(full, row)) isKept[column] = 1;
    for (const column of columnsOf(partial, row)) isKept[column] = 1;
    pairs += columnsOf(full, row).length * count * KV_BLOCK +
      columnsOf(partial, row).length * causalPairs(count, first - row * KV_BLOCK);
  }
  const keys = isKept.reduce(
    (sum, kept, block) => sum + kept * Math.min(KV_BLOCK, end - block * KV_BLOCK),
    0,
  );
  return { pairs, keys };
}

/** Blocks that the newest token of a sequence of `length` tokens attends to in each head. */
export function keptByLists(heads: readonly BlockLists[], length: number): KeptBlocks[] {
  const row = Math.floor((length - 1) / KV_BLOCK);
  return heads.map(({ full, partial }) => ({
    before: columnsOf(full, row).length,
    own: columnsOf(partial, row).length > 0,
  }));
}

function columnsOf({ indptr, indices }: Csr, row: number): Uint32Array {
  return indices.subarray(indptr[row]!, indptr[row + 1]!);
}
