/** The cache on the device: what is written comes back, wherever its blocks and heads lie. */
import { afterAll, describe, expect, test } from "bun:test";
import { join } from "node:path";
import { KV_BLOCK } from "../../src/kernels/shared/shared.ts";
import { KvCache } from "../../src/kvcache/cache.ts";
import {
  headBytes,
  headRowBytes,
  type KvCacheShape,
  kvLayout,
  partSpecs,
  tableSpecs,
} from "../../src/kvcache/layout.ts";
import { fmix32 } from "../../src/runtime/fmix32.ts";
import { bufferBytes, download, type GpuBuffer } from "../../src/runtime/buffers.ts";
import type { Elem } from "../../src/runtime/kernel.ts";
import { temporaryFolder, writeTinyCheckpoint } from "../support/checkpoint.ts";
import { eachElem, testDevice } from "../support/device.ts";
import { loadModel } from "../support/model.ts";

const gpu = await testDevice();
const folder = temporaryFolder();
afterAll(folder.remove);

/** Around one block, and some. */
const LENGTHS = [1, 63, 64, 65, 200];
const CONTEXT = 256;
const TABLES: readonly (readonly [name: string, table: Uint32Array])[] = [
  ["in order", Uint32Array.of(0, 1, 2, 3)],
  ["in reverse", Uint32Array.of(3, 2, 1, 0)],
  ["with two neighbours", Uint32Array.of(2, 0, 1, 3)],
];

/** Heads of a width that needs padding in the model, here already padded: 12 columns. */
function shapeOf(elem: Elem): KvCacheShape {
  return { layers: 2, heads: 3, headDim4: 3, elem };
}

/** Bytes that differ by seed and by place. */
function pattern(seed: number, length: number): Uint8Array<ArrayBuffer> {
  return new Uint8Array(Uint32Array.from({ length: length / 4 }, (_, i) => fmix32(i ^ fmix32(seed))).buffer);
}

async function read(cache: KvCache, layer: number, which: "k" | "v", tokens: number): Promise<Buffer> {
  const slices: Buffer[] = [];
  for await (const bytes of cache.read(layer, which, tokens)) slices.push(Buffer.from(bytes)); // copies
  return Buffer.concat(slices);
}

async function readAll(cache: KvCache, tokens: number): Promise<Buffer> {
  const parts: Buffer[] = [];
  for (let layer = 0; layer < cache.layers; layer++) {
    for (const which of ["k", "v"] as const) parts.push(await read(cache, layer, which, tokens));
  }
  return Buffer.concat(parts);
}

/** Writes in slices of `sliceBytes`, from memory that is overwritten after each. */
async function write(
  cache: KvCache,
  layer: number,
  which: "k" | "v",
  tokens: number,
  bytes: Uint8Array,
  sliceBytes: number,
): Promise<void> {
  const slice = new Uint8Array(sliceBytes);
  for (let offset = 0; offset < bytes.length; offset += sliceBytes) {
    const part = bytes.subarray(offset, offset + sliceBytes);
    slice.set(part);
    await cache.write(layer, which, tokens, offset, slice.subarray(0, part.length));
    slice.fill(0xee);
  }
}

/** Bytes of the first `tokens` of `[heads, stored]` rows. */
function firstTokens(all: Uint8Array, shape: KvCacheShape, stored: number, tokens: number): Buffer {
  const row = headRowBytes(shape);
  return Buffer.concat(
    Array.from(
      { length: shape.heads },
      (_, head) => all.subarray(head * stored * row, (head * stored + tokens) * row),
    ),
  );
}

describe("a cache gives back what was written", () => {
  eachElem(gpu, (elem) => {
    const shape = shapeOf(elem);
    const head = headBytes(kvLayout(shape, CONTEXT, 2 ** 30));
    for (const [buffers, most] of [["one buffer", 3], ["two buffers", 2], ["three buffers", 1]] as const) {
      for (const [order, table] of TABLES) {
        test(`${elem}, heads in ${buffers}, blocks ${order}`, async () => {
          const before = gpu.memory.totalBytes;
          const layout = kvLayout(shape, CONTEXT, most * head);
          expect(layout.ranges).toHaveLength(4 - most);
          const cache = await KvCache.create(gpu, layout, table);
          expect(cache).toMatchObject({
            layers: 2,
            heads: 3,
            headDim: 12,
            elem,
            length: 0,
            capacity: CONTEXT,
          });
          for (const tokens of LENGTHS) {
            const length = shape.heads * tokens * headRowBytes(shape);
            const wanted: Uint8Array[] = [];
            for (let layer = 0; layer < shape.layers; layer++) {
              for (const which of ["k", "v"] as const) {
                const bytes = pattern(wanted.length + 10 * tokens, length);
                wanted.push(bytes);
                // A multiple of 16 that ends inside rows, heads and blocks.
                await write(cache, layer, which, tokens, bytes, 16 * 37);
              }
            }
            cache.adopt(tokens);
            expect(cache.length).toBe(tokens);
            cache.truncate(0);
            const got = await readAll(cache, tokens);
            expect(got.equals(Buffer.concat(wanted))).toBe(true);
            // Fewer tokens are the first of each head.
            const fewer = Math.ceil(tokens / 2);
            const start = await read(cache, 1, "v", fewer);
            expect(start.equals(firstTokens(wanted[3]!, shape, tokens, fewer))).toBe(true);
          }
          cache.destroy();
          expect(gpu.memory.totalBytes).toBe(before);
        });
      }
    }
  });

  test("in slices of a few MiB, each good until the next is asked for", async () => {
    const shape: KvCacheShape = { layers: 1, heads: 3, headDim4: 16, elem: "f32" };
    const tokens = 27_307; // a prime, 20 MiB of keys
    const layout = kvLayout(shape, tokens, 2 * 27_328 * 256);
    const random = pattern(1, 4 * layout.blocks);
    // In order but for some: long runs of blocks, and breaks in them.
    const table = Uint32Array.from({ length: layout.blocks }, (_, block) => block);
    for (let i = 0; i < 20; i++) {
      const [a, b] = [random[2 * i]!, layout.blocks - 1 - random[2 * i + 1]!];
      [table[a], table[b]] = [table[b]!, table[a]!];
    }
    const cache = await KvCache.create(gpu, layout, table);
    const bytes = pattern(2, shape.heads * tokens * headRowBytes(shape));
    expect(bytes.length).toBeGreaterThan(20 << 20);
    await write(cache, 0, "k", tokens, bytes, 4 << 20);
    cache.adopt(tokens);
    const crossed: boolean[] = [];
    let offset = 0;
    for await (const slice of cache.read(0, "k", tokens)) {
      expect(slice.length).toBeLessThanOrEqual(4 << 20);
      crossed.push(Buffer.compare(slice, bytes.subarray(offset, offset + slice.length)) === 0);
      offset += slice.length;
    }
    expect(crossed).toEqual(Array.from({ length: Math.ceil(bytes.length / (4 << 20)) }, () => true));
    expect(offset).toBe(bytes.length);
    cache.destroy();
  });
});

describe("a cache", () => {
  const layout = kvLayout(shapeOf("f32"), 65, 2 ** 30);

  test("counts its tokens and never more than it has room for", async () => {
    const cache = await KvCache.create(gpu, layout);
    expect(cache.capacity).toBe(2 * KV_BLOCK);
    cache.advance(100);
    expect(cache.length).toBe(100);
    expect(() => cache.advance(29)).toThrow("100 + 29 tokens are more than the cache's 128");
    cache.advance(28);
    cache.truncate(7);
    expect(cache.length).toBe(7);
    expect(() => cache.truncate(8)).toThrow(RangeError);
    expect(() => cache.truncate(-1)).toThrow(RangeError);
    expect(() => cache.layer(2)).toThrow(RangeError);
    cache.truncate(0);
    expect(cache.length).toBe(0);
    cache.destroy();
  });

  test("that is read only in part frees what it read with", async () => {
    const cache = await KvCache.create(gpu, layout);
    const before = gpu.memory.totalBytes;
    for await (const _ of cache.read(0, "k", 100)) break;
    expect(gpu.memory.totalBytes).toBe(before);
    cache.destroy();
  });

  test("that is destroyed while it is written leaves nothing allocated", async () => {
    const before = gpu.memory.totalBytes;
    const cache = await KvCache.create(gpu, layout);
    await cache.write(0, "k", 65, 0, new Uint8Array(48 * 65));
    cache.destroy();
    expect(gpu.memory.totalBytes).toBe(before);
  });

  test("that cannot be bound leaves nothing allocated", async () => {
    const before = gpu.memory.totalBytes;
    const most = Math.min(gpu.caps.maxBindingBytes, gpu.caps.maxBufferBytes);
    const tooLarge = kvLayout(
      shapeOf("f32"),
      Math.ceil(most / headRowBytes(shapeOf("f32"))) + KV_BLOCK,
      most,
    );
    await expect(KvCache.create(gpu, tooLarge)).rejects.toThrow("Cannot bind");
    expect(gpu.memory.totalBytes).toBe(before);
    // Nor an error scope, which would swallow what goes wrong later.
    await expect(gpu.device.popErrorScope()).rejects.toThrow();
  });
});

describe("a cache of several sequences", () => {
  /** Three sequences of two blocks, in two buffers of heads a layer. */
  const sequences = 3;
  const shape = shapeOf("f32");
  const layout = kvLayout(shape, 65, 2 * sequences * headBytes(kvLayout(shape, 65, 2 ** 30)), sequences);
  const order = Uint32Array.of(5, 0, 2, 4, 1, 3);
  const blocksOf = (sequence: number) => [...order.subarray(2 * sequence, 2 * sequence + 2)];

  async function stored(buffer: GpuBuffer, entries: number): Promise<number[]> {
    return [...new Uint32Array(await download(buffer), 0, entries)];
  }

  test("takes what was planned, buffer by buffer, and frees it", async () => {
    const before = gpu.memory.totalBytes;
    expect(layout).toMatchObject({ sequences: 3, sequenceBlocks: 2, blocks: 6 });
    expect(layout.ranges).toHaveLength(2);
    const planned = [
      ...tableSpecs(layout),
      ...[0, 1].flatMap((layer) =>
        layout.ranges.flatMap((range) => Object.values(partSpecs(layout, layer, range)))
      ),
    ];
    const cache = await KvCache.create(gpu, layout);
    expect(gpu.memory.totalBytes - before).toBe(
      planned.reduce((sum, { bytes }) => sum + bufferBytes(bytes), 0),
    );
    cache.destroy();
    expect(gpu.memory.totalBytes).toBe(before);
  });

  test("counts the tokens of each on its own", async () => {
    const cache = await KvCache.create(gpu, layout);
    const lengths = () => [0, 1, 2].map((sequence) => cache.lengthOf(sequence));
    expect(cache).toMatchObject({ sequences: 3, capacity: 2 * KV_BLOCK, length: 0 });
    cache.advance(100, 1);
    cache.advance(5);
    cache.advance(1, 2);
    expect(lengths()).toEqual([5, 100, 1]);
    expect(cache.length).toBe(5);
    cache.advance(28, 1);
    expect(() => cache.advance(1, 1)).toThrow("128 + 1 tokens are more than the cache's 128");
    cache.truncate(7, 1);
    expect(() => cache.truncate(8, 1)).toThrow("Cannot cut 7 tokens to 8");
    expect(() => cache.truncate(6)).toThrow("Cannot cut 5 tokens to 6");
    cache.truncate(0);
    expect(lengths()).toEqual([0, 7, 1]);
    cache.destroy();
  });

  test("has no sequence beyond those it was made for", async () => {
    const cache = await KvCache.create(gpu, layout);
    const one = await KvCache.create(gpu, kvLayout(shape, 65, 2 ** 30));
    for (const [made, sequence] of [[cache, 3], [cache, 0.5], [one, 1]] as const) {
      for (
        const use of [
          () => made.lengthOf(sequence),
          () => made.advance(1, sequence),
          () => made.truncate(0, sequence),
          () => void made.layer(0, sequence),
        ]
      ) {
        expect(use).toThrow(RangeError);
        expect(use).toThrow(`The cache has no sequence ${sequence}`);
      }
    }
    expect(() => cache.layerOfAll(2)).toThrow("The cache has no layer 2");
    cache.destroy();
    one.destroy();
  });

  for (const [title, given] of [["in order", undefined], ["in any order", order]] as const) {
    test(`gives each its own blocks of the pool, ${title}`, async () => {
      const cache = await KvCache.create(gpu, layout, given);
      const wanted = given ? [...given] : [0, 1, 2, 3, 4, 5];
      for (const layer of [0, 1]) {
        const all = cache.layerOfAll(layer);
        expect(all).toMatchObject({ blocks: 6, tableBlocks: 2 });
        expect(await stored(all.table, 6)).toEqual(wanted);
        for (let sequence = 0; sequence < sequences; sequence++) {
          const view = cache.layer(layer, sequence);
          // Keys and values are in buffers that all share; only the table says whose they are.
          expect(view.parts).toBe(all.parts);
          expect(view.blocks).toBe(6);
          expect(await stored(view.table, 2)).toEqual(wanted.slice(2 * sequence, 2 * sequence + 2));
        }
      }
      expect(cache.layer(0).parts).not.toBe(cache.layer(1).parts);
      cache.destroy();
    });
  }

  test("of a single sequence has one table for both views", async () => {
    const cache = await KvCache.create(gpu, kvLayout(shape, 65, 2 ** 30), Uint32Array.of(1, 0));
    expect(cache.layer(0, 0).table).toBe(cache.layerOfAll(0).table);
    expect(cache.layerOfAll(0)).toMatchObject({ blocks: 2, tableBlocks: 2 });
    expect(await stored(cache.layer(0).table, 2)).toEqual([1, 0]);
    cache.destroy();
  });

  test("reads and writes the first without touching the others", async () => {
    const cache = await KvCache.create(gpu, layout, order);
    const tokens = 2 * KV_BLOCK;
    const bytes = pattern(3, shape.heads * tokens * headRowBytes(shape));
    await write(cache, 1, "v", tokens, bytes, 16 * 37);
    cache.adopt(tokens);
    expect((await read(cache, 1, "v", tokens)).equals(bytes)).toBe(true);
    expect([0, 1, 2].map((sequence) => cache.lengthOf(sequence))).toEqual([tokens, 0, 0]);
    for (const { range, v } of cache.layer(1).parts) {
      const written = new Uint8Array(await download(v));
      const blockBytes = KV_BLOCK * headRowBytes(shape);
      for (let at = 0; at < range.heads * layout.blocks; at++) {
        const block = written.subarray(at * blockBytes, (at + 1) * blockBytes);
        const isFirst = blocksOf(0).includes(at % layout.blocks);
        expect({ at, isEmpty: block.every((byte) => byte === 0) }).toEqual({ at, isEmpty: !isFirst });
      }
    }
    cache.destroy();
  });

  eachElem(gpu, (elem) => {
    test(`${elem}: holds for each what it would hold alone, wherever the blocks lie`, async () => {
      const dir = writeTinyCheckpoint(join(folder.path, `several-${elem}`), {
        config: { nLayer: 2, nHead: 3, nEmbd: 30, nPositions: 300, vocabSize: 101 },
      }).dir;
      const texts = [100, 3, 65].map((length, seed) =>
        Array.from({ length }, (_, i) => (7 * i + 31 * seed) % 101)
      );
      const context = 2 * KV_BLOCK;
      const alone = await loadModel(gpu, dir, { context, elem });
      const model = await loadModel(gpu, dir, {
        context,
        elem,
        blockTable: order,
        decoding: { sequences, inFlight: 1 },
      });
      // The last twice: a sequence that ends makes room for another.
      for (
        const [sequence, ids] of [[0, texts[1]!], [2, texts[2]!], [1, texts[1]!], [0, texts[0]!]] as const
      ) {
        model.truncate(0, sequence);
        await model.prefill(ids, { sequence });
      }
      const { cache } = model;
      expect([0, 1, 2].map((sequence) => cache.lengthOf(sequence))).toEqual([100, 3, 65]);
      for (const [sequence, ids] of texts.entries()) {
        alone.truncate(0);
        await alone.prefill(ids);
        for (const layer of [0, 1]) {
          for (const which of ["k", "v"] as const) {
            const wanted = await read(alone.cache, layer, which, ids.length);
            const rows = await rowsOf(cache, layer, which, blocksOf(sequence), ids.length);
            expect({ sequence, layer, which, isEqual: rows.equals(wanted) })
              .toEqual({ sequence, layer, which, isEqual: true });
          }
        }
      }
      alone.destroy();
      model.destroy();
    });
  });

  /** The rows of a sequence's first tokens, `[heads, tokens, headDim]`, as the layout is described. */
  async function rowsOf(
    cache: KvCache,
    layer: number,
    which: "k" | "v",
    table: readonly number[],
    tokens: number,
  ): Promise<Buffer> {
    const { parts, blocks } = cache.layer(layer);
    const row = headRowBytes({ ...shape, headDim4: cache.headDim / 4, elem: cache.elem });
    const rows: Uint8Array[] = [];
    for (const part of parts) {
      const bytes = new Uint8Array(await download(part[which]));
      for (let head = 0; head < part.range.heads; head++) {
        for (let position = 0; position < tokens; position++) {
          const block = head * blocks + table[Math.floor(position / KV_BLOCK)]!;
          const at = (block * KV_BLOCK + position % KV_BLOCK) * row;
          rows.push(bytes.subarray(at, at + row));
        }
      }
    }
    return Buffer.concat(rows);
  }
});

describe("read agrees with what the kernels wrote", () => {
  const dir = writeTinyCheckpoint(join(folder.path, "model"), {
    config: { nLayer: 2, nHead: 3, nEmbd: 30, nPositions: 300, vocabSize: 101 },
  }).dir;

  eachElem(gpu, (elem) => {
    test(`${elem}: in a prefill and in decode, with any table`, async () => {
      const tokens = Array.from({ length: 200 }, (_, i) => (7 * i) % 101);
      const kept: Buffer[] = [];
      for (const blockTable of [undefined, Uint32Array.of(3, 1, 0, 2)]) {
        const model = await loadModel(gpu, dir, { context: CONTEXT, elem, ...blockTable && { blockTable } });
        await model.prefill(tokens);
        await model.decodeStep(5);
        const { cache } = model;
        const all = await readAll(cache, 201);
        kept.push(all);
        // As the layout is described: [heads, blocks, KV_BLOCK, headDim], blocks by the table.
        const table = blockTable ?? [0, 1, 2, 3];
        const row = headRowBytes({ layers: 2, heads: 3, headDim4: cache.headDim / 4, elem });
        const [{ k, v } = {}] = cache.layer(1).parts;
        for (const [which, buffer] of [["k", k], ["v", v]] as const) {
          const stored = new Uint8Array(await download(buffer!));
          const rows: Uint8Array[] = [];
          for (let head = 0; head < 3; head++) {
            for (let position = 0; position < 201; position++) {
              const block = head * 4 + table[Math.floor(position / KV_BLOCK)]!;
              const at = (block * KV_BLOCK + position % KV_BLOCK) * row;
              rows.push(stored.subarray(at, at + row));
            }
          }
          expect((await read(cache, 1, which, 201)).equals(Buffer.concat(rows))).toBe(true);
        }
        model.destroy();
      }
      expect(kept[0]!.some((byte) => byte !== 0)).toBe(true);
      expect(kept[1]!.equals(kept[0]!)).toBe(true);
    });
  });
});
