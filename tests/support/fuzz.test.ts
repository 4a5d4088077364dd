/** The properties can fail: each kind of broken promise is noticed. */
import { describe, expect, test } from "bun:test";
import { InputError, LongformError } from "../../src/runtime/errors.ts";
import { judge, requireShowable } from "./fuzz.ts";
import { damagedBytes, damagedJson, hasRepeatedKey, jsonOf, textOf } from "./fuzz_input.ts";
import { countMemory } from "./fuzz_memory.ts";
import fc from "fast-check";

const SMALL = { inputBytes: 10 };

describe("judge", () => {
  test("returns values and errors that are fit to be shown", async () => {
    expect(await judge(SMALL, () => 5)).toEqual({ value: 5 });
    const error = new InputError("a is no b", { hint: "give a b" });
    expect(await judge(SMALL, () => Promise.reject(error))).toEqual({ error });
  });

  test("throws for any other error", async () => {
    const work = () => String(JSON.parse('{"toString":1}'));
    await expect(judge(SMALL, work)).rejects.toThrow("a TypeError, not a LongformError");
  });

  test("throws for a message that is none", async () => {
    const broken = (message: string) =>
      Object.defineProperty(new LongformError(""), "message", { value: message });
    for (
      const message of [
        "a\nb",
        "a\x1b[2J",
        "\u202ea",
        "",
        "x".repeat(3000),
        "a [object Object]",
        "a full stop.",
      ]
    ) {
      await expect(judge(SMALL, () => Promise.reject(broken(message)))).rejects.toThrow("the message");
    }
    expect(() => requireShowable("naïve 東京 😀")).not.toThrow();
  });

  test("throws for work without measure", async () => {
    const work = () => {
      const begun = performance.now();
      while (performance.now() - begun < 200);
    };
    await expect(judge({ ...SMALL, cpuMs: 1 }, work)).rejects.toThrow("ms of processor time");
  });
});

test("memory is counted by what asks for it, until it no longer is", () => {
  const before = Uint8Array;
  const memory = countMemory();
  const asked = (work: () => unknown) => {
    memory.take();
    work();
    return memory.take();
  };
  try {
    expect(asked(() => new Uint8Array(1000))).toBe(1000);
    expect(asked(() => new Float64Array(1000))).toBe(8000);
    expect(asked(() => new ArrayBuffer(7))).toBe(7);
    expect(asked(() => Buffer.alloc(9))).toBe(9);
    expect(asked(() => Buffer.allocUnsafe(9))).toBe(9);
    expect(asked(() => new Array(3))).toBe(24);
    expect(asked(() => Array.from({ length: 3 }))).toBe(24);
    expect(asked(() => "ab".repeat(50))).toBe(100);
    expect(asked(() => "ab".padEnd(50))).toBe(50);
    expect(asked(() => Uint8Array.of(1, 2, 3).subarray(1))).toBeLessThan(10);
    expect(new Uint8Array(1)).toBeInstanceOf(before);
  } finally {
    memory.stop();
  }
  expect(Uint8Array).toBe(before);
});

describe("damaged inputs", () => {
  const whole = { a: [1, { b: "text" }], c: null };

  test("are as a rule not what they were, and often still JSON", () => {
    const damaged = fc.sample(damagedJson(jsonOf(whole), ["a", "b"]), { numRuns: 500, seed: 1 });
    const texts = damaged.map(textOf);
    expect(new Set(texts).size).toBeGreaterThan(300);
    const parsed = texts.filter((text) => {
      try {
        JSON.parse(text);
        return true;
      } catch {
        return false;
      }
    });
    expect(parsed.length).toBeGreaterThan(300);
    expect(damaged.filter(hasRepeatedKey).length).toBeGreaterThan(10);
  });

  test("bytes are cut, changed and grown", () => {
    const bytes = Uint8Array.from({ length: 64 }, (_, i) => i);
    const lengths = fc.sample(damagedBytes(bytes), { numRuns: 300, seed: 1 }).map(({ length }) => length);
    expect(Math.min(...lengths)).toBeLessThan(10);
    expect(Math.max(...lengths)).toBeGreaterThan(80);
  });

  test("structure as it was is the text that it was", () => {
    expect(textOf(jsonOf(whole))).toBe(JSON.stringify(whole));
    expect(hasRepeatedKey(jsonOf(whole))).toBe(false);
  });
});
