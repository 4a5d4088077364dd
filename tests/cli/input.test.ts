import { describe, expect, test } from "bun:test";
import { decodeText } from "../../src/cli/input.ts";
import { InputError } from "../../src/runtime/errors.ts";

describe("decodeText", () => {
  test("keeps every valid text as it is, a byte order mark included", () => {
    for (const text of ["", "plain", "naïve – 東京 🎉", "\ufeffmarked", "a\0b\r\n"]) {
      expect(decodeText(new TextEncoder().encode(text), "it")).toBe(text);
    }
  });

  const cases: readonly (readonly [name: string, bytes: readonly number[], at: number])[] = [
    ["a byte that never occurs", [0x61, 0xff, 0x62], 1],
    ["Latin-1", [0x61, 0x62, 0xe9, 0x63], 2],
    ["Latin-1 at the end", [0x61, 0x62, 0xe9], 2],
    ["a lone continuation", [0x80], 0],
    ["a continuation too many", [0xc3, 0xa9, 0xa9], 2],
    ["a character cut short by the end", [0x61, 0xe2, 0x82], 1],
    ["a character cut short by a letter", [0xf0, 0x9f, 0x8e, 0x61], 0],
    ["an overlong form", [0x61, 0xc0, 0xaf], 1],
    ["half of a surrogate pair", [0x61, 0xed, 0xa0, 0x80], 1],
  ];
  for (const [name, bytes, at] of cases) {
    test(`names the byte where text ends: ${name}`, () => {
      for (const padding of [0, 1000]) {
        const padded = Uint8Array.from([...Array<number>(padding).fill(0x78), ...bytes]);
        expect(() => decodeText(padded, "it")).toThrow(InputError);
        expect(() => decodeText(padded, "it")).toThrow(`it is not UTF-8 text: byte ${padding + at} begins`);
      }
    });
  }
});
