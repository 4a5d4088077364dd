import { afterAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { appendFileSync, chmodSync, truncateSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { decodePieces, openText, readIds, readPrompt, type TextInput } from "../../src/cli/input.ts";
import { InputError } from "../../src/runtime/errors.ts";
import { temporaryFolder } from "../support/checkpoint.ts";
import { deno, RUN_TIMEOUT_MS, runtimes } from "../support/cli.ts";

setDefaultTimeout(RUN_TIMEOUT_MS);

const folder = temporaryFolder();
afterAll(folder.remove);
let files = 0;

function written(content: string | Uint8Array): string {
  const path = join(folder.path, String(files++));
  writeFileSync(path, content);
  return path;
}

/** Every chunk in the same buffer, as a file is read. */
async function* chunksOf(bytes: Uint8Array, cuts: readonly number[]): AsyncGenerator<Uint8Array> {
  const buffer = new Uint8Array(bytes.length);
  for (const [i, start] of [0, ...cuts].entries()) {
    await Promise.resolve();
    const chunk = bytes.subarray(start, cuts[i] ?? bytes.length);
    buffer.fill(0xff);
    buffer.set(chunk);
    yield buffer.subarray(0, chunk.length);
  }
}

async function collected(pieces: AsyncIterable<string>): Promise<string[]> {
  const all: string[] = [];
  for await (const piece of pieces) all.push(piece);
  return all;
}

async function textOf(input: TextInput): Promise<string> {
  const pieces = await collected(input.pieces);
  await input.close();
  expect(pieces).not.toContain("");
  return pieces.join("");
}

/** All ways to cut `length` bytes at up to two places. */
function allCuts(length: number): number[][] {
  const places = Array.from({ length: length + 1 }, (_, i) => i);
  return [[], ...places.map((a) => [a]), ...places.flatMap((a) => places.slice(a).map((b) => [a, b]))];
}

describe("decodePieces", () => {
  test("gives every valid text as it is, however it is cut, in whole characters", async () => {
    for (const text of ["", "plain", "naïve – 東京 🎉", "\ufeffmarked", "a\0b\r\n", "🎉\u{10ffff}é"]) {
      const bytes = new TextEncoder().encode(text);
      for (const cuts of allCuts(bytes.length)) {
        const pieces = await collected(decodePieces(chunksOf(bytes, cuts), "it"));
        expect(pieces.join("")).toBe(text);
        for (const piece of pieces) expect(piece.isWellFormed()).toBe(true);
        expect(pieces).not.toContain("");
      }
    }
  });

  const cases: readonly (readonly [name: string, bytes: readonly number[], at: number])[] = [
    ["a byte that never occurs", [0x61, 0xff, 0x62], 1],
    ["Latin-1", [0x61, 0x62, 0xe9, 0x63], 2],
    ["Latin-1 at the end", [0x61, 0x62, 0xe9], 2],
    ["a lone continuation", [0x80], 0],
    ["continuations alone", [0x61, 0x80, 0x80, 0x80, 0x80], 1],
    ["a continuation too many", [0xc3, 0xa9, 0xa9], 2],
    ["a character cut short by the end", [0x61, 0xe2, 0x82], 1],
    ["a long character cut short by the end", [0xc3, 0xa9, 0xf0, 0x9f, 0x8e], 2],
    ["a character cut short by a letter", [0xf0, 0x9f, 0x8e, 0x61], 0],
    ["a character cut short by a character", [0x61, 0xf0, 0x9f, 0xc3, 0xa9], 1],
    ["an overlong form", [0x61, 0xc0, 0xaf], 1],
    ["a long overlong form at the end", [0x61, 0xf0, 0x80], 1],
    ["half of a surrogate pair", [0x61, 0xed, 0xa0, 0x80], 1],
    ["a code point past the last", [0x61, 0xf4, 0x90, 0x80, 0x80], 1],
  ];
  for (const [name, bytes, at] of cases) {
    test(`names the byte of the input where text ends: ${name}`, async () => {
      const message = (offset: number) => `it is not UTF-8 text: byte ${offset} begins no valid character`;
      for (const cuts of allCuts(bytes.length)) {
        const error = await rejection(
          collected(decodePieces(chunksOf(Uint8Array.from(bytes), cuts), "it")),
        );
        expect(error).toBeInstanceOf(InputError);
        expect({ cuts, message: (error as Error).message }).toEqual({ cuts, message: message(at) });
      }
      const padded = Uint8Array.from([...Array<number>(1000).fill(0x78), ...bytes]);
      for (const cuts of [[], [500], [1000], [999, 1001]]) {
        await expect(collected(decodePieces(chunksOf(padded, cuts), "it"))).rejects.toThrow(
          message(1000 + at),
        );
      }
    });
  }
});

describe("openText", () => {
  test("reads a file that is many pieces long", async () => {
    const text = "naïve – 東京 🎉 don't\n".repeat(30_000);
    const path = written(text);
    const input = await openText(path);
    expect(input.name).toBe(path);
    expect(input.byteLength).toBe(Buffer.byteLength(text));
    const pieces = await collected(input.pieces);
    await input.close();
    expect(pieces.length).toBeGreaterThan(3);
    expect(pieces.join("")).toBe(text);
  });

  test("names the byte of the whole file", async () => {
    for (const at of [0, 1, 262_143, 262_144, 300_000, 524_287, 599_999]) {
      const bytes = new Uint8Array(600_000).fill(0x61);
      bytes[at] = 0xe9;
      const input = await openText(written(bytes));
      expect(await rejection(collected(input.pieces))).toMatchObject({
        message: `${input.name} is not UTF-8 text: byte ${at} begins no valid character`,
      });
      await input.close();
    }
  });

  test("drops one newline at the end where it is told to", async () => {
    const cases = [["a\n", "a"], ["a\r\n", "a"], ["a\n\n", "a\n"], ["a\r\n\r\n", "a\r\n"], [
      "a\r\r\n",
      "a\r",
    ]];
    const unchanged = ["a", "a\r", "a\nb", "a\r\nb", "\ra", "a\n ", "a\n\r"];
    const empty = ["", "\n", "\r\n"];
    for (
      const [content, text] of [
        ...cases,
        ...unchanged.map((text) => [text, text]),
        ...empty.map((e) => [e, ""]),
      ]
    ) {
      for (const padding of [0, 262_142, 262_143, 262_144]) {
        const path = written("x".repeat(padding) + content);
        expect(await textOf(await openText(path, { dropsFinalNewline: true })))
          .toBe("x".repeat(padding) + text);
        expect(await textOf(await openText(path))).toBe("x".repeat(padding) + content);
      }
    }
  });

  test("says that a file was cut short, and ends at the size it had where it grew", async () => {
    const path = written("x".repeat(600_000));
    const shrinking = await openText(path);
    truncateSync(path, 300_000);
    expect(await rejection(textOf(shrinking))).toMatchObject({
      name: "InputError",
      message: `Cannot read ${path}: it was cut short while it was read`,
    });
    await shrinking.close();
    const growing = await openText(path);
    appendFileSync(path, "é");
    expect((await textOf(growing)).length).toBe(300_000);
  });

  test("reads files whose size the system does not know", async () => {
    const input = await openText("/proc/self/status");
    expect(input.byteLength).toBeUndefined();
    expect(await textOf(input)).toContain("VmRSS");
  });

  test("says why a file cannot be read", async () => {
    const missing = join(folder.path, "none.txt");
    expect(await rejection(openText(missing))).toMatchObject({
      name: "InputError",
      message: `Cannot read ${missing}: there is no such file`,
    });
    const input = await openText(folder.path);
    expect(await rejection(collected(input.pieces))).toMatchObject({
      name: "InputError",
      message: `Cannot read ${folder.path}: it is a folder`,
    });
    await input.close();
  });

  test.skipIf(process.getuid?.() === 0)("says that permission is denied", async () => {
    const path = written("x");
    chmodSync(path, 0);
    expect(await rejection(openText(path))).toMatchObject({
      message: `Cannot read ${path}: permission is denied`,
    });
  });

  test("may be closed before it is read, or half read", async () => {
    const path = written("x".repeat(600_000));
    await (await openText(path)).close();
    const input = await openText(path);
    await input.pieces[Symbol.asyncIterator]().next();
    await input.close();
  });
});

describe("readPrompt", () => {
  const none = { prompt: undefined, file: undefined, ids: undefined };

  test("takes an argument as it is", async () => {
    expect(await readPrompt({ ...none, prompt: "a\n" })).toEqual({ text: "a\n" });
  });

  test("opens a file", async () => {
    const path = written("x".repeat(600_000) + "\r\n");
    const prompt = await readPrompt({ ...none, file: path }) as { input: TextInput };
    expect(prompt.input).toMatchObject({ name: path, byteLength: 600_002 });
    expect(await textOf(prompt.input)).toBe("x".repeat(600_000));
  });

  test("refuses files without text, or that begin as none", async () => {
    for (const content of ["", "\n", "\r\n"]) {
      const path = written(content);
      expect(await rejection(readPrompt({ ...none, file: path }))).toMatchObject({
        name: "InputError",
        message: `The prompt is empty: ${path} holds no text`,
      });
    }
    await expect(readPrompt({ ...none, file: written(Uint8Array.of(0x61, 0xff, 0x62)) })).rejects.toThrow(
      "byte 1 begins",
    );
    await expect(readPrompt({ ...none, file: folder.path })).rejects.toThrow("it is a folder");
  });

  test("reads ids", async () => {
    expect(await readPrompt({ ...none, ids: written(" [1, 2]\n") })).toEqual({ ids: [1, 2] });
  });
});

describe("readIds", () => {
  test("reads an array of many pieces", async () => {
    const ids = Array.from({ length: 100_000 }, (_, i) => i);
    expect(await readIds(written(JSON.stringify(ids)))).toEqual(ids);
    expect(await readIds(written("[0, 4294967295]"))).toEqual([0, 4294967295]);
  });

  test("says what is wrong", async () => {
    const cases: readonly (readonly [content: string | Uint8Array, message: string])[] = [
      ["", "is not JSON"],
      ["[1, 2", "is not JSON"],
      ["{}", "is not a JSON array of token ids"],
      ["[-1]", "is not a JSON array of token ids"],
      ["[1.5]", "is not a JSON array of token ids"],
      ["[4294967296]", "is not a JSON array of token ids"],
      ['["a"]', "is not a JSON array of token ids"],
      [Uint8Array.of(0x5b, 0xff), "is not UTF-8 text: byte 1 begins"],
    ];
    for (const [content, message] of cases) {
      const path = written(content);
      await expect(readIds(path)).rejects.toThrow(InputError);
      await expect(readIds(path)).rejects.toThrow(`${path} ${message}`);
    }
    const empty = written("[]");
    await expect(readIds(empty)).rejects.toThrow(`The prompt is empty: ${empty} holds no token ids`);
  });
});

describe("standard input", () => {
  /** Prints what became of `-` as JSON. */
  const script = written(`
    import { readPrompt } from ${JSON.stringify(join(import.meta.dir, "../../src/cli/input.ts"))};
    import process from "node:process";
    try {
      const { input } = await readPrompt({ prompt: "-" });
      let text = "";
      for await (const piece of input.pieces) text += piece;
      await input.close();
      console.log(JSON.stringify({ name: input.name, size: input.byteLength ?? null, text }));
    } catch (error) {
      console.log(JSON.stringify({ error: error.message }));
    }
    process.exit();
  `);
  const text = "naïve – 東京 🎉 don't\n".repeat(10_000);

  for (const runtime of runtimes) {
    const command = runtime === "bun"
      ? [process.execPath, script]
      : [deno!, "run", "-q", "--allow-read", "--ext=ts", script];
    const read = async (shell: string, stdin: string | Uint8Array): Promise<unknown> => {
      const child = Bun.spawn(["sh", "-c", shell, "sh", ...command], {
        stdin: Buffer.from(stdin),
        stderr: "inherit",
      });
      return JSON.parse(await new Response(child.stdout).text());
    };

    test(`on ${runtime}: is read from a pipe and from a file`, async () => {
      const expected = { name: "standard input", size: null, text: text.slice(0, -1) };
      expect(await read(`"$@"`, text)).toEqual(expected);
      expect(await read(`"$@" < ${written(text)}`, "")).toEqual(expected);
      expect(await read(`(printf 'a\\303'; sleep 0.2; printf '\\251\\r'; sleep 0.2; echo) | "$@"`, ""))
        .toEqual({ ...expected, text: "aé" });
    });

    test(`on ${runtime}: says what is wrong`, async () => {
      const notUtf8 = "standard input is not UTF-8 text: byte 3 begins no valid character";
      expect(await read(`"$@"`, Uint8Array.of(0x61, 0x62, 0x63, 0xe2, 0x82))).toEqual({ error: notUtf8 });
      expect(await read(`"$@"`, "\n")).toEqual({
        error: "The prompt is empty: standard input holds no text",
      });
      expect(await read(`"$@" < /`, "")).toEqual({ error: "Cannot read standard input: it is a folder" });
    });
  }
});

function rejection(promise: Promise<unknown>): Promise<unknown> {
  return promise.then(() => undefined, (error: unknown) => error);
}
