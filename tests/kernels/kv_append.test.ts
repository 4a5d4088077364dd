import { describe, test } from "bun:test";
import { kvAppend } from "../../src/kernels/kv_append/kv_append.ts";
import { GRID_FOLD, KV_BLOCK } from "../../src/kernels/shared/shared.ts";
import { type Elem, op } from "../../src/runtime/kernel.ts";
import { cacheRow, headRanges, scrambledTable } from "../support/attention.ts";
import { expectSame } from "../support/compare.ts";
import { eachElem, rounded, runOp, tensor, testDevice, thenNan } from "../support/device.ts";
import { normalArray } from "../support/random.ts";

const gpu = await testDevice();

interface Case {
  readonly elem: Elem;
  readonly heads: number;
  readonly headDim: number;
  readonly tokens: number;
  readonly firstPosition?: number;
}

/** What the cache holds before: the rows around the new ones must keep it. */
const BEFORE = -7;

async function checkAppend(c: Case): Promise<void> {
  const { elem, heads, headDim, tokens, firstPosition = 0 } = c;
  const width = heads * headDim;
  const table = scrambledTable(firstPosition + tokens);
  const qkv = rounded(normalArray(1, tokens * 3 * width), elem);
  for (const range of [...headRanges(heads, false), ...headRanges(heads, true)]) {
    const before = new Float32Array(range.heads * table.length * KV_BLOCK * headDim).fill(BEFORE);
    const { k, v } = await runOp(
      gpu,
      op(kvAppend, { elem, heads, headDim4: headDim / 4 }),
      { tokens, firstPosition, blocks: table.length, range },
      {
        qkv: tensor(elem, thenNan(qkv, 3 * width)),
        block_table: tensor("u32", table),
        k: tensor(elem, before),
        v: tensor(elem, before),
      },
    );
    for (const [third, got] of [[1, k!], [2, v!]] as const) {
      const wanted = before.slice();
      for (let t = 0; t < tokens; t++) {
        for (let h = 0; h < range.heads; h++) {
          const from = (3 * t + third) * width + (range.first + h) * headDim;
          wanted.set(qkv.subarray(from, from + headDim), cacheRow(table, h, firstPosition + t) * headDim);
        }
      }
      expectSame(got, wanted);
    }
  }
}

describe("kv_append", () => {
  eachElem(gpu, (elem) => {
    for (const tokens of [1, 63, 64, 65, 97, 257, 1025]) {
      test(`${elem} tokens=${tokens} are copied, the rest of the cache stays`, () =>
        checkAppend({ elem, heads: 3, headDim: 8, tokens, firstPosition: 5 }));
    }
    for (const [heads, headDim] of [[1, 4], [5, 4], [1, 128], [3, 80]] as const) {
      test(`${elem} heads=${heads} headDim=${headDim}`, async () => {
        await checkAppend({ elem, heads, headDim, tokens: 33 });
        await checkAppend({ elem, heads, headDim, tokens: 1, firstPosition: 40 });
      });
    }
    for (const tokens of [GRID_FOLD + 1, 2 * GRID_FOLD + 1]) {
      test(`${elem} tokens=${tokens} over a folded grid`, () =>
        checkAppend({ elem, heads: 1, headDim: 4, tokens }));
    }
  });
});
