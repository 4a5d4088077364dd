import { describe, expect, test } from "bun:test";
import { KV_BLOCK } from "../../src/kernels/shared/shared.ts";
import {
  headBytes,
  headRowBytes,
  kvBytesPerToken,
  type KvCacheShape,
  kvLayout,
  partSpecs,
  tableSpecs,
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

  test("gives each of several sequences whole blocks of its own", () => {
    for (const shape of SHAPES) {
      for (const context of CONTEXTS) {
        const one = kvLayout(shape, context, UNLIMITED);
        expect(one).toMatchObject({ sequences: 1, sequenceBlocks: one.blocks });
        for (const sequences of [1, 2, 7, 256]) {
          const layout = kvLayout(shape, context, UNLIMITED, sequences);
          expect(layout).toMatchObject({
            sequences,
            sequenceBlocks: one.blocks,
            blocks: sequences * one.blocks,
            ranges: [{ first: 0, heads: shape.heads }],
          });
          expect(headBytes(layout)).toBe(sequences * headBytes(one));
        }
      }
    }
  });

  test("divides heads by what all sequences take together", () => {
    const shape: KvCacheShape = { layers: 2, heads: 12, headDim4: 16, elem: "f16" };
    const head = headBytes(kvLayout(shape, 1000, UNLIMITED));
    const divided = kvLayout(shape, 1000, 12 * head, 4);
    expect(divided.ranges).toEqual(Array.from({ length: 4 }, (_, i) => ({ first: 3 * i, heads: 3 })));
    const alone = kvLayout(shape, 1000, 12 * head);
    expect(alone.ranges).toEqual([{ first: 0, heads: 12 }]);
    const sizes = [0, 1].flatMap((layer) =>
      divided.ranges.flatMap((range) => Object.values(partSpecs(divided, layer, range)))
    );
    expect(new Set(sizes.map(({ bytes }) => bytes))).toEqual(new Set([12 * head]));
    expect(new Set(sizes.map(({ label }) => label)).size).toBe(2 * 4 * 2);
    expect(sizes.at(-1)!.label).toBe("layer 1 values of heads 9 to 11");
  });

  test("counts bytes beyond 2^32 exactly", () => {
    const xl: KvCacheShape = { layers: 48, heads: 25, headDim4: 16, elem: "f16" };
    const layout = kvLayout(xl, 65536, 2 ** 27);
    expect(headRowBytes(xl)).toBe(128);
    expect(headBytes(layout)).toBe(8 << 20);
    expect(layout.ranges).toEqual([{ first: 0, heads: 13 }, { first: 13, heads: 12 }]);
    expect(kvBytesPerToken(xl)).toBe(2 * 48 * 1600 * 2);
    expect(kvBytesPerToken(xl) * 65536).toBe(20_132_659_200);
    expect(headBytes(kvLayout(xl, 2 ** 40, UNLIMITED))).toBe(2 ** 47);
    expect(headBytes(kvLayout(xl, 65536, UNLIMITED, 256))).toBe(2 ** 31);
  });
});

describe("tableSpecs", () => {
  const shape: KvCacheShape = { layers: 1, heads: 1, headDim4: 1, elem: "f32" };

  test("is one table for one sequence", () => {
    expect(tableSpecs(kvLayout(shape, 130, UNLIMITED))).toEqual([{ label: "block table", bytes: 12 }]);
  });

  test("is a table of all sequences and one of each", () => {
    expect(tableSpecs(kvLayout(shape, 130, UNLIMITED, 3))).toEqual([
      { label: "block table", bytes: 36 },
      { label: "block table of sequence 0", bytes: 12 },
      { label: "block table of sequence 1", bytes: 12 },
      { label: "block table of sequence 2", bytes: 12 },
    ]);
  });
});
