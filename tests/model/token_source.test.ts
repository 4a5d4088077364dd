import { describe, expect, test } from "bun:test";
import { join } from "node:path";
import { prepended, TextTokens, tokensOf, type TokenSource, upTo } from "../../src/model/token_source.ts";
import { createTokenizer, loadTokenizer } from "../../src/model/tokenizer.ts";
import { philox4x32 } from "../../src/model/sampling.ts";

const tokenizer = await loadTokenizer(join(import.meta.dir, "../../weights/classics-16k"));

const LINE = "It was the best of times, it was the worst of times – naïve 東京 🎉 don't!\r\n  ";
const text = LINE.repeat(5000);
const ids = Uint32Array.from(tokenizer.encode(text));
const byteLength = new TextEncoder().encode(text).length;

/** Seeded integers below n. */
function picker(seed: number): (n: number) => number {
  let calls = 0;
  return (n) => philox4x32([calls++, 0, 0, 0], [seed, 0])[0]! % n;
}

/** The text in pieces of up to `most` characters; `onPull` is called before each. */
async function* piecesOf(text: string, most: number, onPull = () => {}): AsyncGenerator<string> {
  const pick = picker(most);
  for (let at = 0; at < text.length;) {
    onPull();
    await Promise.resolve();
    const length = 1 + pick(most);
    yield text.slice(at, at + length);
    at += length;
  }
}

async function* failingBehind(text: string): AsyncGenerator<string> {
  yield* piecesOf(text, 30_000);
  throw new Error("the disk is on fire");
}

async function takeAll(source: TokenSource, most: () => number): Promise<Uint32Array> {
  const all: number[] = [];
  for (;;) {
    const count = most();
    const taken = await source.take(count);
    for (const id of taken) all.push(id);
    if (taken.length < count) {
      expect((await source.take(5)).length).toBe(0);
      return Uint32Array.from(all);
    }
    expect(taken.length).toBe(count);
  }
}

describe("tokensOf", () => {
  test("gives all ids in order, and none after them", async () => {
    const pick = picker(1);
    for (const list of [Uint32Array.of(), [7, 50_256, 4_294_967_295], ids.subarray(0, 1000)]) {
      expect(await takeAll(tokensOf(list), () => 1 + pick(300))).toEqual(Uint32Array.from(list));
      expect(await tokensOf(list).take(Infinity)).toEqual(Uint32Array.from(list));
    }
  });

  test("gives copies", async () => {
    const list = Uint32Array.of(1, 2, 3);
    (await tokensOf(list).take(3))[0] = 9;
    expect(list[0]).toBe(1);
  });
});

describe("upTo", () => {
  test("ends early, and leaves the rest in the source", async () => {
    const source = tokensOf([1, 2, 3, 4, 5]);
    expect(await takeAll(upTo(source, 3), () => 2)).toEqual(Uint32Array.of(1, 2, 3));
    expect(await source.take(9)).toEqual(Uint32Array.of(4, 5));
    expect(await upTo(tokensOf([1, 2]), 3).take(9)).toEqual(Uint32Array.of(1, 2));
  });
});

describe("prepended", () => {
  test("gives the head and then the rest", async () => {
    const pick = picker(2);
    for (const head of [0, 1, 5, 100]) {
      const source = prepended(ids.subarray(0, head), tokensOf(ids.subarray(head, 200)));
      expect(await takeAll(source, () => 1 + pick(20))).toEqual(ids.subarray(0, 200));
    }
  });
});

describe("TextTokens", () => {
  test("gives the ids of the whole text, however it is read and taken", async () => {
    const pick = picker(3);
    for (const most of [7, 3_000, 200_000, text.length]) {
      const tokens = new TextTokens(tokenizer.encoder(), piecesOf(text, most));
      expect(await takeAll(tokens, () => 1 + pick(5000))).toEqual(ids);
      const all = new TextTokens(tokenizer.encoder(), piecesOf(text, most));
      expect(await all.take(Infinity)).toEqual(ids);
    }
  });

  test("gives nothing of no text", async () => {
    const tokens = new TextTokens(tokenizer.encoder(), piecesOf("", 1));
    expect((await tokens.take(5)).length).toBe(0);
    expect(tokens.isExact).toBe(true);
    expect(tokens.bound()).toBe(0);
  });

  test("reads no further than it is asked to", async () => {
    let read = 0;
    const tokens = new TextTokens(tokenizer.encoder(1000), piecesOf(text, 1000, () => read++));
    expect((await tokens.take(0)).length).toBe(0);
    expect(read).toBe(0);
    await tokens.take(1);
    const forOne = read;
    expect(forOne).toBeLessThan(10);
    await tokens.take(100);
    expect(read).toBe(forOne);
    await tokens.take(1000);
    expect(read).toBeLessThan(30);
  });

  test("encodes a long piece part by part", async () => {
    const tokens = new TextTokens(tokenizer.encoder(), oneOf(text), byteLength);
    await tokens.take(1);
    expect(tokens.isExact).toBe(false);
    expect(tokens.bound()).toBeLessThan(byteLength - 30_000);
    expect(tokens.bound()).toBeGreaterThan(byteLength - 70_000);
  });

  test("bounds the number of tokens ever closer, and in the end exactly", async () => {
    for (const most of [50, 3_000, 100_000]) {
      const tokens = new TextTokens(tokenizer.encoder(2000), piecesOf(text, most), byteLength);
      expect(tokens.bound()).toBe(byteLength);
      for (let last = byteLength, taken = 0;;) {
        const { length } = await tokens.take(1999);
        taken += length;
        const bound = tokens.bound();
        expect(bound).toBeLessThanOrEqual(last);
        expect(bound).toBeGreaterThanOrEqual(ids.length);
        last = bound;
        if (length < 1999) break;
        expect(tokens.estimate()).toBeCloseTo(ids.length, -3);
      }
      expect(tokens.isExact).toBe(true);
      expect(tokens.bound()).toBe(ids.length);
      expect(tokens.estimate()).toBe(ids.length);
    }
  });

  test("is bounded by the bytes when each of them is a token", async () => {
    const dense = "\u0001🎉\u0001 ".repeat(100);
    const { length } = tokenizer.encode(dense);
    const tokens = new TextTokens(tokenizer.encoder(1), piecesOf(dense, 1), 700);
    for (;;) {
      expect(tokens.bound()).toBeGreaterThanOrEqual(length);
      if ((await tokens.take(1)).length === 0) break;
    }
    expect(tokens.bound()).toBe(length);
  });

  test("knows no bound of a pipe, or where the tokenizer adds to the text", async () => {
    const { model, pre_tokenizer } = await Bun.file(
      join(import.meta.dir, "../../weights/classics-16k/tokenizer.json"),
    ).json() as Record<string, object>;
    const spaced = createTokenizer({
      tokenizer: { model, pre_tokenizer: { ...pre_tokenizer, add_prefix_space: true } },
      source: "test",
    });
    const pipe = new TextTokens(tokenizer.encoder(), piecesOf(text, 9000));
    const prefixed = new TextTokens(spaced.encoder(), piecesOf(text, 9000), byteLength);
    for (const tokens of [pipe, prefixed]) {
      await tokens.take(1);
      expect(tokens.bound()).toBe(Infinity);
      expect(tokens.estimate()).toBeUndefined();
      await tokens.lookAhead(Infinity);
      expect(tokens.estimate()).toBe(tokens.bound());
    }
    expect(pipe.bound()).toBe(ids.length);
    expect(prefixed.bound()).toBe(spaced.encode(text).length);
  });

  test("looks ahead as far as it is told, and keeps what it finds", async () => {
    let read = 0;
    const tokens = new TextTokens(tokenizer.encoder(1000), piecesOf(text, 1000, () => read++), byteLength);
    await tokens.lookAhead(20_000);
    expect(tokens.isExact).toBe(false);
    expect(tokens.bound()).toBeLessThan(byteLength - 5_000);
    const before = read;
    await tokens.lookAhead(20_000);
    await tokens.take(1000);
    expect(read).toBe(before);
    await tokens.lookAhead(byteLength + 1);
    expect(tokens.isExact).toBe(true);
    expect(tokens.bound()).toBe(ids.length);
    expect(await tokens.take(Infinity)).toEqual(ids.subarray(1000));
  });

  test("may look ahead while tokens are taken", async () => {
    const tokens = new TextTokens(tokenizer.encoder(), piecesOf(text, 10_000));
    const ahead = tokens.lookAhead(Infinity);
    expect(await takeAll(tokens, () => 3000)).toEqual(ids);
    await ahead;
  });

  test("fails for good where the text cannot be read on", async () => {
    const tokens = new TextTokens(tokenizer.encoder(1), failingBehind("It was the best"), 1e6);
    expect((await tokens.take(2)).length).toBe(2);
    for (const call of [() => tokens.take(100), () => tokens.lookAhead(Infinity), () => tokens.take(100)]) {
      await expect(call()).rejects.toThrow("on fire");
    }
    expect(tokens.isExact).toBe(false);
    expect((await tokens.take(1)).length).toBe(1);
  });

  test("counts the time spent encoding", async () => {
    const tokens = new TextTokens(tokenizer.encoder(), piecesOf(text, 10_000));
    expect(tokens.encodeMs).toBe(0);
    const starting = performance.now();
    await tokens.lookAhead(Infinity);
    expect(tokens.encodeMs).toBeGreaterThan(0);
    expect(tokens.encodeMs).toBeLessThanOrEqual(performance.now() - starting);
  });
});

async function* oneOf(piece: string): AsyncGenerator<string> {
  await Promise.resolve();
  yield piece;
}
