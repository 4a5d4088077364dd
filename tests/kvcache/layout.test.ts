import { describe, expect, test } from "bun:test";
import { KV_BLOCK } from "../../src/kernels/shared/shared.ts";
import {
  headBytes,
  headRowBytes,
  kvBytesPerToken,
  type KvCacheShape,
  kvLayout,
} from "../../src/kvcache/layout.ts";
import type { Elem } from "../../src/runtime/kernel.ts";

const SHAPES: readonly KvCacheShape[] = [1, 2, 3, 12, 16, 20, 25].flatMap((heads) =>
  [1, 3, 16].flatMap((headDim4) =>
    (["f32", "f16"] as Elem[]).map((elem) => ({ layers: 2, heads, headDim4, elem }))
  )
);
/** No limit: a number of bytes that nothing reaches. */
const UNLIMITED = Number.MAX_SAFE_INTEGER;
const CONTEXTS = [1, 63, 64, 65, 1000, 65536];

describe("kvLayout", () => {
  for (const context of CONTEXTS) {
    test(`divides the heads of ${context} tokens over as few buffers as fit, evenly`, () => {
      for (const shape of SHAPES) {
        const head = headBytes(kvLayout(shape, context, UNLIMITED));
        for (
          const most of [1, head - 1, head, head + 1, 1.5 * head, 2 * head, 3.9 * head, 7 * head, UNLIMITED]
        ) {
          const layout = kvLayout(shape, context, most);
          const { ranges } = layout;
          // Every head is in one range, in order.
          let covered = 0;
          for (const { first, heads } of ranges) {
            expect(first).toBe(covered);
            covered += heads;
          }
          expect(covered).toBe(shape.heads);
          // As few as can be, and all but the last alike, so that none is more than its share.
          const fitting = Math.max(1, Math.min(shape.heads, Math.floor(most / head)));
          expect(ranges.length).toBe(Math.ceil(shape.heads / fitting));
          const share = Math.ceil(shape.heads / ranges.length);
          expect(ranges.slice(0, -1).every((range) => range.heads === share)).toBe(true);
          expect(ranges.at(-1)!.heads).toBeGreaterThanOrEqual(1);
          expect(ranges.at(-1)!.heads).toBeLessThanOrEqual(share);
          for (const range of ranges) {
            if (range.heads > 1) expect(range.heads * headBytes(layout)).toBeLessThanOrEqual(most);
          }
        }
      }
    });

    test(`has room for ${context} tokens in whole blocks, and for less than a block more`, () => {
      for (const shape of SHAPES) {
        const { blocks } = kvLayout(shape, context, UNLIMITED);
        expect(blocks * KV_BLOCK).toBeGreaterThanOrEqual(context);
        expect(blocks * KV_BLOCK).toBeLessThan(context + KV_BLOCK);
      }
    });
  }

  test("counts bytes beyond 2^32 exactly", () => {
    const xl: KvCacheShape = { layers: 48, heads: 25, headDim4: 16, elem: "f16" };
    const layout = kvLayout(xl, 65536, 2 ** 27);
    expect(headRowBytes(xl)).toBe(128);
    expect(headBytes(layout)).toBe(8 << 20);
    expect(layout.ranges).toEqual([{ first: 0, heads: 13 }, { first: 13, heads: 12 }]);
    expect(kvBytesPerToken(xl)).toBe(2 * 48 * 1600 * 2);
    expect(kvBytesPerToken(xl) * 65536).toBe(20_132_659_200);
    expect(headBytes(kvLayout(xl, 2 ** 40, UNLIMITED))).toBe(2 ** 47);
  });
});
