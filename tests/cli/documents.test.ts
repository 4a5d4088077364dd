import { afterAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { mkdirSync, rmSync, symlinkSync, truncateSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import {
  type Collection,
  type InputDocument,
  type JsonlOptions,
  LineSplitter,
  openFiles,
  openJsonl,
} from "../../src/cli/documents.ts";
import { InputError, UsageError } from "../../src/runtime/errors.ts";
import { temporaryFolder } from "../support/checkpoint.ts";
import { deno, RUN_TIMEOUT_MS, runtimes } from "../support/cli.ts";

setDefaultTimeout(RUN_TIMEOUT_MS);

const folder = temporaryFolder();
afterAll(folder.remove);
let folders = 0;

/** A new folder with files by their paths. */
function tree(files: Readonly<Record<string, string | Uint8Array>>): string {
  const root = join(folder.path, `tree${folders++}`);
  mkdirSync(root);
  for (const [path, content] of Object.entries(files)) {
    mkdirSync(dirname(join(root, path)), { recursive: true });
    writeFileSync(join(root, path), content);
  }
  return root;
}

function jsonl(content: string | Uint8Array): string {
  return join(tree({ "in.jsonl": content }), "in.jsonl");
}

async function documentsOf(collection: Collection): Promise<InputDocument[]> {
  const documents: InputDocument[] = [];
  for await (const document of collection.documents()) documents.push(document);
  await collection.close();
  return documents;
}

async function filesIn(paths: readonly string[], hasExpected = false): Promise<InputDocument[]> {
  return await documentsOf(await openFiles(paths, { hasExpected }));
}

async function idsIn(...paths: string[]): Promise<(string | number)[]> {
  return (await filesIn(paths)).map(({ id }) => id);
}

async function recordsIn(content: string | Uint8Array, options: JsonlOptions = {}): Promise<InputDocument[]> {
  return await documentsOf(await openJsonl([jsonl(content)], options));
}

function rejection(promise: Promise<unknown>): Promise<unknown> {
  return promise.then(() => undefined, (error: unknown) => error);
}

describe("openFiles", () => {
  test("takes files as they are named, in that order", async () => {
    const root = tree({ "b.txt": "b\n", "a.txt": "\n naïve 東京 🎉\r\n", "[1]*.txt": "odd" });
    const names = ["b.txt", "a.txt", "[1]*.txt", "b.txt"].map((name) => join(root, name));
    expect(await filesIn(names)).toEqual([
      { index: 0, id: names[0]!, file: names[0]!, text: "b\n" },
      { index: 1, id: names[1]!, file: names[1]!, text: "\n naïve 東京 🎉\r\n" },
      { index: 2, id: names[2]!, file: names[2]!, text: "odd" },
      { index: 3, id: names[0]!, file: names[0]!, text: "b\n" },
    ]);
  });

  test("goes through folders, ordered by path, without hidden names", async () => {
    const root = tree({
      "b/2.txt": "x",
      "b/10.txt": "x",
      "a/z/deep.md": "x",
      "a.txt": "x",
      "B.txt": "x",
      ".hidden": "x",
      ".git/config": "x",
      "a/.cache/x": "x",
      "é/ü": "x",
    });
    mkdirSync(join(root, "empty"));
    const found = ["B.txt", "a.txt", "a/z/deep.md", "b/10.txt", "b/2.txt", "é/ü"];
    expect(await idsIn(root)).toEqual(found.map((path) => join(root, path)));
    expect(await idsIn(`${root}/`)).toEqual(found.map((path) => join(root, path)));
    expect(await idsIn(join(root, ".git"))).toEqual([join(root, ".git/config")]);
  });

  test("follows links to files, not links to folders, and says which lead nowhere", async () => {
    const root = tree({ "data/a.txt": "a", "data/sub/b.txt": "b", "elsewhere/c.txt": "c" });
    const data = join(root, "data");
    symlinkSync("../elsewhere/c.txt", join(data, "link.txt"));
    symlinkSync("../elsewhere", join(data, "linked"));
    symlinkSync("..", join(data, "sub/up"));
    symlinkSync(".", join(data, "self"));
    symlinkSync("loop", join(data, "loop"));
    symlinkSync("none", join(data, "nowhere"));
    const documents = await filesIn([data]);
    expect(documents.map(({ id }) => id)).toEqual(
      ["a.txt", "link.txt", "loop", "nowhere", "sub/b.txt"].map((path) => join(data, path)),
    );
    expect(documents[1]).toMatchObject({ text: "c" });
    expect(documents[2]).toMatchObject({ error: `Cannot read ${join(data, "loop")}: ELOOP` });
    expect(documents[3]).toMatchObject({
      error: `Cannot read ${join(data, "nowhere")}: there is no such file`,
    });
    expect(await idsIn(join(data, "linked"))).toEqual([join(data, "linked/c.txt")]);
  });

  test("takes patterns, and finds what Bun's own glob finds", async () => {
    const root = tree(Object.fromEntries(
      [
        "a.txt",
        "b.txt",
        "c.md",
        "a/1.txt",
        "a/2.txt",
        "a/b/1.txt",
        "b/1.md",
        "b/é東.txt",
        ".h/1.txt",
        "a/.h.txt",
      ]
        .concat(["x-1.txt", "x-2.txt", "x-10.txt", "a+b(c).txt", "q^.txt", "s p.txt", "deep/a/b/c/d.txt"])
        .map((path) => [path, "x"]),
    ));
    const patterns = [
      ...[
        "*.txt",
        "*",
        "?.txt",
        "[ab].txt",
        "[!a].txt",
        "[^a].txt",
        "[a-b].*",
        "x-?.txt",
        "x-*.txt",
        "x-[0-9].txt",
      ],
      ...[
        "**/*.txt",
        "**/1.txt",
        "a/**/1.txt",
        "**/b/*",
        "**/a/**/*.txt",
        "{a,b}/1.*",
        "{a,b,c}.{txt,md}",
        "**",
      ],
      ...["*/*.txt", "*/*/*.txt", "a+b*.txt", "q^*", "s *.txt", "b/??.txt", "{x-{1,2},c}.*"],
      ...["deep/**/d.txt", "deep/**/**/d.txt", "./*.md", "a/../*.md", ".h/*.txt", "*.{txt,md}"],
    ];
    for (const pattern of patterns) {
      const wanted = [...new Bun.Glob(pattern).scanSync({ cwd: root })].map((path) => join(root, path))
        .sort();
      expect({ pattern, found: await idsIn(`${root}/${pattern}`) }).toEqual({ pattern, found: wanted });
      expect(wanted.length).toBeGreaterThan(0);
    }
    // Bun's takes no slash in braces.
    expect(await idsIn(`${root}/a/{1,b/1,none}.txt`)).toEqual([
      join(root, "a/1.txt"),
      join(root, "a/b/1.txt"),
    ]);
    expect(await idsIn(`${root}/.*/*.txt`)).toEqual([join(root, ".h/1.txt")]);
    expect(await idsIn(`${root}/a/.*`)).toEqual([join(root, "a/.h.txt")]);
    expect(await idsIn(`${root}/[ab`, `${root}/*.md`).catch((error: Error) => error.message)).toBe(
      `No file matches ${root}/[ab`,
    );
  });

  test("refuses what has no files, before anything is read", async () => {
    const root = tree({ "a.txt": "x", "dot/.hidden": "x" });
    mkdirSync(join(root, "empty"));
    const cases = [
      [join(root, "none.txt"), `Cannot read ${join(root, "none.txt")}: there is no such file`],
      [join(root, "a.txt/b"), `Cannot read ${join(root, "a.txt/b")}: a part of its path is not a folder`],
      [join(root, "empty"), `There are no files in ${join(root, "empty")}`],
      [join(root, "dot"), `There are no files in ${join(root, "dot")}`],
      [join(root, "*.md"), `No file matches ${join(root, "*.md")}`],
      [join(root, "none/*"), `No file matches ${join(root, "none/*")}`],
      [join(root, "[z-a]"), "[z-a] is not a pattern: a range in brackets runs backwards"],
    ];
    for (const [path, message] of cases) {
      const error = await rejection(openFiles([join(root, "a.txt"), path!], { hasExpected: false }));
      expect(error).toBeInstanceOf(InputError);
      expect((error as InputError).message).toBe(message!);
      expect((error as InputError).hint).toBeString();
    }
    expect(await rejection(openFiles(["-", "-"], { hasExpected: false }))).toBeInstanceOf(UsageError);
    expect(await rejection(openFiles(["-"], { hasExpected: true }))).toBeInstanceOf(UsageError);
  });

  test("goes on behind files that cannot be used, and says why", async () => {
    const root = tree({
      "1 good": "x",
      "2 empty": "",
      "3 mark": "\ufeff",
      "4 blank": " \n",
      "5 marked": "\ufeffx\ufeff",
      "6 latin": Uint8Array.of(0x61, 0xe9, 0x62),
      "7 huge": "x",
      "8 vanished": "x",
      "9 zeros": "a\0b",
    });
    const at = (name: string) => join(root, name);
    truncateSync(at("7 huge"), 64 * 2 ** 20 + 1);
    const collection = await openFiles([root], { hasExpected: false });
    rmSync(at("8 vanished"));
    const outcomes = (await documentsOf(collection)).map((document) =>
      "error" in document ? document.error : "text" in document ? [document.text] : []
    );
    expect(outcomes).toEqual([
      ["x"],
      `${at("2 empty")} is empty`,
      `${at("3 mark")} is empty`,
      [" \n"],
      ["x\ufeff"],
      `${at("6 latin")} is not UTF-8 text: byte 1 begins no valid character`,
      `${at("7 huge")} is longer than 64 MiB`,
      `Cannot read ${at("8 vanished")}: there is no such file`,
      ["a\0b"],
    ]);
  });

  test("takes a document of 64 MiB", async () => {
    const root = tree({ "large.txt": Buffer.alloc(64 * 2 ** 20, "x") });
    const [document] = await filesIn([root]);
    expect((document as { text: string }).text.length).toBe(64 * 2 ** 20);
  });

  test("takes the label from the folder that a file lies in", async () => {
    const root = tree({ "pos/1.txt": "x", "neg/1.txt": "x", "neg/2024/1.txt": "", "top.txt": "x" });
    const documents = await filesIn([root], true);
    expect(documents.map((document) => "expected" in document ? document.expected : undefined)).toEqual([
      "neg",
      undefined,
      "pos",
      root.split("/").at(-1),
    ]);
    const [named] = await documentsOf(await openFiles(["package.json"], { hasExpected: true }));
    expect(named).toMatchObject({ expected: process.cwd().split("/").at(-1) });
  });

  test("knows how many there are, the largest, and how much has been read", async () => {
    const root = tree({ "1": "x".repeat(10), "2": "é".repeat(40), "3": "", "4": "x".repeat(10) });
    const collection = await openFiles([root], { hasExpected: false });
    expect(collection.total).toBe(4);
    expect(collection.largestBytes).toBe(80);
    expect(collection.share()).toBe(0);
    const shares: unknown[] = [];
    for await (const _ of collection.documents()) shares.push(collection.share());
    expect(shares).toEqual([0.1, 0.9, 0.9, 1]);
    await collection.close();

    truncateSync(join(root, "4"), 64 * 2 ** 20 + 1);
    expect((await openFiles([root], { hasExpected: false })).largestBytes).toBe(80);
    const empty = await openFiles([tree({ a: "" })], { hasExpected: false });
    expect([empty.total, empty.largestBytes, empty.share()]).toEqual([1, 0, 1]);
  });

  test("gives each shard its documents, with their places in the whole, and opens no others", async () => {
    const root = tree({ "a": "0", "b": "1111", "c": "2", "e": "44444", "f": "5" });
    const pipe = join(root, "pipe");
    // Opening it would wait for a writer.
    expect(Bun.spawnSync(["mkfifo", pipe]).exitCode).toBe(0);
    const paths = ["a", "b", "c", "pipe", "e", "f"].map((name) => join(root, name));
    const first = await openFiles(paths, { hasExpected: false, shard: { index: 0, count: 2 } });
    expect([first.total, first.largestBytes]).toEqual([3, 5]);
    expect((await documentsOf(first)).map(({ index, id }) => [index, id])).toEqual(
      [0, 2, 4].map((index) => [index, paths[index]!]),
    );
    const second = await openFiles(paths, { hasExpected: false, shard: { index: 1, count: 2 } });
    expect([second.total, second.largestBytes, second.share()]).toEqual([3, undefined, undefined]);
    await second.close();

    rmSync(pipe);
    const whole = await filesIn([root]);
    for (const count of [1, 2, 3, 5, 7]) {
      const parts: InputDocument[] = [];
      for (let index = 0; index < count; index++) {
        const collection = await openFiles([root], { hasExpected: false, shard: { index, count } });
        const documents = await documentsOf(collection);
        expect(collection.total).toBe(documents.length);
        expect(documents.every((document) => document.index % count === index)).toBe(true);
        parts.push(...documents);
      }
      expect(parts.sort((a, b) => a.index - b.index)).toEqual(whole);
    }
  });

  test("may be closed before it is read, or half read", async () => {
    const root = tree({ a: "x", b: "x" });
    await (await openFiles([root], { hasExpected: false })).close();
    const collection = await openFiles([root], { hasExpected: false });
    await collection.documents().next();
    await collection.close();
    await collection.close();
  });
});

describe("openJsonl", () => {
  test("takes texts and token ids, with ids of their own or the number of their line", async () => {
    const content = [
      '{"id": "a", "text": "naïve 東京 🎉\\n"}',
      "",
      '{"text": " ", "id": 7}',
      " \t\r",
      '\t{"text": "no id", "more": {"id": 1}} \r',
      '{"ids": [0, 50256, 4294967295]}',
      '{"id": null, "text": null, "ids": [1]}',
      '{"id": "", "text": "\\ufeffx", "ids": null}',
      '{"id": -0.5, "text": "x"}',
    ].join("\n");
    const documents = [
      { index: 0, id: "a", text: "naïve 東京 🎉\n" },
      { index: 1, id: 7, text: " " },
      { index: 2, id: 5, text: "no id" },
      { index: 3, id: 6, ids: [0, 50256, 4294967295] },
      { index: 4, id: 7, ids: [1] },
      { index: 5, id: "", text: "\ufeffx" },
      { index: 6, id: -0.5, text: "x" },
    ];
    expect(await recordsIn(content)).toEqual(documents);
    expect(await recordsIn(content + "\n")).toEqual(documents);
    expect(await recordsIn(content + "\n\n\n")).toEqual(documents);
    expect(await recordsIn("\ufeff" + content.replaceAll("\n", "\r\n"))).toEqual(documents);
    for (const blank of ["", "\n", " \r\n\n\t", "\ufeff", "\ufeff\n"]) {
      expect(await recordsIn(blank)).toEqual([]);
    }
  });

  const good = '{"id": "good", "text": "x"}';
  const cases: readonly (readonly [line: string | Uint8Array, error: RegExp, id?: string | number])[] = [
    ["{", /^line 2 is not JSON: ./],
    ["plain text", /^line 2 is not JSON: ./],
    ["\ufeff" + good, /^line 2 is not JSON: ./],
    [good + good, /^line 2 is not JSON: ./],
    ["x".repeat(100_000), /^line 2 is not JSON: .{1,200}$/s],
    [Uint8Array.of(0x7b, 0xff, 0x7d), /^line 2 is not UTF-8 text$/],
    ["[1]", /^line 2 is not a JSON object$/],
    ["null", /^line 2 is not a JSON object$/],
    ['"text"', /^line 2 is not a JSON object$/],
    ["7", /^line 2 is not a JSON object$/],
    ["{}", /^line 2 has neither "text" nor "ids"$/],
    ['{"id": "b"}', /^line 2 has neither "text" nor "ids"$/, "b"],
    ['{"id": "b", "text": null}', /^line 2 has neither "text" nor "ids"$/, "b"],
    ['{"id": "b", "text": 5}', /^line 2 has a "text" that is not a string$/, "b"],
    ['{"id": 9, "text": ["a"]}', /^line 2 has a "text" that is not a string$/, 9],
    ['{"id": "b", "text": ""}', /^line 2 has an empty "text"$/, "b"],
    ['{"id": "b", "text": "x", "ids": [1]}', /^line 2 has both "text" and "ids"$/, "b"],
    ['{"id": "b", "ids": []}', /^line 2 has an empty "ids"$/, "b"],
    ...["1", "{}", '"1"', "[-1]", "[1.5]", '["1"]', "[4294967296]", "[null]", "[[1]]", "true"].map((ids) =>
      [`{"id": "b", "ids": ${ids}}`, /^line 2 has "ids" that are not an array of token ids$/, "b"] as const
    ),
    ...["true", "[1]", "{}"].map((id) =>
      [`{"id": ${id}, "text": "x"}`, /^line 2 has an "id" that is neither a string nor a number$/] as const
    ),
    ...["9007199254740992", "-12345678901234567890", "1e999"].map((id) =>
      [
        `{"id": ${id}, "text": "x"}`,
        /^line 2 has an "id" that is too large for a number: put it in quotes$/,
      ] as const
    ),
  ];
  test("goes on behind lines that cannot be used, and says why", async () => {
    for (const [line, error, id = 2] of cases) {
      const [first, bad, last, ...rest] = await recordsIn(
        Buffer.concat([Buffer.from(good + "\n"), Buffer.from(line as string), Buffer.from("\n" + good)]),
      );
      expect(first).toEqual({ index: 0, id: "good", text: "x" });
      expect(bad).toEqual({ index: 1, id, error: expect.stringMatching(error) });
      expect(last).toEqual({ index: 2, id: "good", text: "x" });
      expect(rest).toEqual([]);
    }
  });

  test("takes the label from a field", async () => {
    const line = (label: string) => `{"id": "a", "text": "x", "label": ${label}}`;
    const labels = ['"b"', '""', "1", "0", "-2.5", "true", "false"];
    expect(await recordsIn(labels.map(line).join("\n"), { expected: "label" })).toEqual(
      ["b", "", "1", "0", "-2.5", "true", "false"].map((expected, index) => ({
        index,
        id: "a",
        text: "x",
        expected,
      })),
    );
    const wrong = ["[1]", "{}", "null"].map(line).concat('{"id": "a", "text": "x"}').join("\n");
    const other = 'has under "label" neither a string, a number nor a boolean';
    expect(await recordsIn(wrong, { expected: "label" })).toEqual([
      { index: 0, id: "a", error: `line 1 ${other}` },
      { index: 1, id: "a", error: `line 2 ${other}` },
      { index: 2, id: "a", error: 'line 3 has no expected label under "label"' },
      { index: 3, id: "a", error: 'line 4 has no expected label under "label"' },
    ]);
    expect(await recordsIn('{"text": "x"}', { expected: "toString" })).toMatchObject([
      { error: 'line 1 has no expected label under "toString"' },
    ]);
    expect(await recordsIn('{"ids": [1], "__proto__": "p"}', { expected: "__proto__" })).toEqual([
      { index: 0, id: 1, ids: [1], expected: "p" },
    ]);
  });

  test("names file and line where there are several files", async () => {
    const paths = ['{"text": "1"}', '\ufeff{"text": "2"}\n\n{}\n{"id": 5, "text": 1}\n', "", '{"ids": [3]}']
      .map(jsonl);
    const collection = await openJsonl(paths, {});
    expect([collection.total, collection.largestBytes, collection.share()]).toEqual([
      undefined,
      undefined,
      0,
    ]);
    expect(await documentsOf(collection)).toEqual([
      { index: 0, id: `${paths[0]}:1`, text: "1" },
      { index: 1, id: `${paths[1]}:1`, text: "2" },
      { index: 2, id: `${paths[1]}:3`, error: `${paths[1]}:3 has neither "text" nor "ids"` },
      { index: 3, id: 5, error: `${paths[1]}:4 has a "text" that is not a string` },
      { index: 4, id: `${paths[3]}:1`, ids: [3] },
    ]);
    expect(collection.share()).toBe(1);
  });

  test("gives each shard its documents, with their places in the whole", async () => {
    const lines = Array.from({ length: 23 }, (_, i) => i % 5 === 0 ? "oops\n\n" : `{"text": "${i}"}\n`).join(
      "",
    );
    const whole = await recordsIn(lines);
    for (const count of [1, 2, 3, 30]) {
      const parts: InputDocument[] = [];
      for (let index = 0; index < count; index++) {
        const documents = await recordsIn(lines, { shard: { index, count } });
        expect(documents.every((document) => document.index % count === index)).toBe(true);
        parts.push(...documents);
      }
      expect(parts.sort((a, b) => a.index - b.index)).toEqual(whole);
    }
  });

  test("reads a file of many pieces, and says how much it has read", async () => {
    const texts = Array.from({ length: 3000 }, (_, i) => `${i} naïve 東京 🎉 `.repeat(i % 50 + 1));
    const path = jsonl(texts.map((text) => JSON.stringify({ text }) + "\n").join(""));
    const collection = await openJsonl([path], {});
    let i = 0;
    let last = 0;
    for await (const document of collection.documents()) {
      expect(document).toEqual({ index: i, id: i + 1, text: texts[i++]! });
      expect(collection.share()!).toBeGreaterThanOrEqual(last);
      last = collection.share()!;
      if (i === 1) expect(last).toBeLessThan(0.3);
    }
    expect(i).toBe(3000);
    expect(last).toBe(1);
    await collection.close();
  });

  test("skips a line that is too long without holding it", async () => {
    const long = Buffer.alloc(64 * 2 ** 20 + 1, "x");
    const just = Buffer.alloc(64 * 2 ** 20 - '{"text":""}'.length, "x");
    const path = jsonl(Buffer.concat([
      Buffer.from('{"text": "a"}\n'),
      long,
      Buffer.from('\n{"text":"'),
      just,
      Buffer.from('"}'),
    ]));
    const [first, second, third, ...rest] = await documentsOf(await openJsonl([path], {}));
    expect(first).toEqual({ index: 0, id: 1, text: "a" });
    expect(second).toEqual({ index: 1, id: 2, error: "line 2 is longer than 64 MiB" });
    expect(third).toMatchObject({ index: 2, id: 3 });
    expect((third as { text: string }).text.length).toBe(just.length);
    expect(rest).toEqual([]);
    rmSync(path);
  });

  test("refuses files that cannot be read, before anything is read", async () => {
    const here = jsonl('{"text": "x"}');
    const missing = join(folder.path, "none.jsonl");
    for (
      const [path, message] of [
        [missing, `Cannot read ${missing}: there is no such file`],
        [folder.path, `Cannot read ${folder.path}: it is a folder`],
      ]
    ) {
      const error = await rejection(openJsonl([here, path!], {}));
      expect(error).toBeInstanceOf(InputError);
      expect((error as InputError).message).toBe(message!);
      expect((error as InputError).hint).toBeString();
    }
    expect(await rejection(openJsonl(["-", here, "-"], {}))).toBeInstanceOf(UsageError);
    const vanishing = jsonl('{"text": "x"}');
    const collection = await openJsonl([here, vanishing], {});
    rmSync(vanishing);
    expect(await rejection(documentsOf(collection))).toMatchObject({
      name: "InputError",
      message: `Cannot read ${vanishing}: there is no such file`,
    });
  });

  test("may be closed before it is read, or half read", async () => {
    const path = jsonl('{"text": "x"}\n'.repeat(100_000));
    await (await openJsonl([path], {})).close();
    const collection = await openJsonl([path], {});
    await collection.documents().next();
    await collection.close();
    await collection.close();
    expect(await collection.documents().next()).toEqual({ done: true, value: undefined });
  });
});

describe("LineSplitter", () => {
  /** Pushes the parts through one buffer, as a file is read, and copies what comes. */
  function split(parts: readonly Uint8Array[], maxBytes: number): [number, string | undefined][] {
    const splitter = new LineSplitter(maxBytes);
    const buffer = new Uint8Array(Math.max(0, ...parts.map((part) => part.length)));
    const lines: [number, string | undefined][] = [];
    const take = ({ number, bytes }: { number: number; bytes: Uint8Array | undefined }) =>
      lines.push([number, bytes && Buffer.from(bytes).toString("latin1")]);
    for (const part of parts) {
      buffer.fill(0x0a);
      buffer.set(part);
      for (const line of splitter.push(buffer.subarray(0, part.length))) take(line);
    }
    const last = splitter.end();
    if (last) take(last);
    return lines;
  }

  test("gives the same lines however the bytes are cut, without those that are too long", () => {
    for (
      const text of ["", "a", "\n", "\n\n", "ab\ncdefg\n\nhi", "abcde\nabcdef\nab\n", "abcdefghijkl", "abcde"]
    ) {
      const bytes = Buffer.from(text);
      const wanted = text.split("\n").map((line, i) => [i + 1, line.length > 5 ? undefined : line]);
      if (text === "" || text.endsWith("\n")) wanted.pop();
      for (let a = 0; a <= bytes.length; a++) {
        for (let b = a; b <= bytes.length; b++) {
          const parts = [bytes.subarray(0, a), bytes.subarray(a, b), bytes.subarray(b)];
          expect(split(parts, 5)).toEqual(wanted as [number, string | undefined][]);
        }
      }
      expect(split([...bytes].map((byte) => Uint8Array.of(byte)), 5)).toEqual(wanted as never);
    }
  });
});

describe("in a process of its own", () => {
  /** Prints what comes from the files that are named, or from JSON lines where none is. */
  const script = join(tree({}), "read.ts");
  writeFileSync(
    script,
    `import { openFiles, openJsonl } from ${
      JSON.stringify(join(import.meta.dir, "../../src/cli/documents.ts"))
    };
    import process from "node:process";
    const [mode, ...paths] = process.argv.slice(2);
    try {
      const collection = mode === "files"
        ? await openFiles(paths, { hasExpected: false })
        : await openJsonl(paths, {});
      const before = [collection.total ?? null, collection.largestBytes ?? null, collection.share() ?? null];
      if (mode === "wait") {
        const documents = collection.documents();
        console.log(JSON.stringify((await documents.next()).value));
        documents.next().catch(() => {});
        await new Promise((wake) => setTimeout(wake, 50));
        await collection.close();
        console.log("closed");
        process.exit();
      }
      const seen = [];
      let count = 0, characters = 0, most = 0, start = 0;
      for await (const document of collection.documents()) {
        if (mode !== "count") seen.push(document);
        count++;
        characters += document.text?.length ?? 0;
        if (count === 1000) start = process.memoryUsage().rss;
        if (count % 1000 === 0) most = Math.max(most, process.memoryUsage().rss);
      }
      await collection.close();
      console.log(JSON.stringify(mode === "count"
        ? { count, characters, growth: most - start }
        : { before, after: collection.share() ?? null, seen }));
    } catch (error) {
      console.log(JSON.stringify({ error: error.message }));
    }
    process.exit();`,
  );
  const command = (runtime: string) =>
    runtime === "bun"
      ? [process.execPath, script]
      : [deno!, "run", "-q", "--allow-read", "--allow-sys=systemMemoryInfo", script];
  const output = async (runtime: string, shell: string, ...args: readonly string[]): Promise<string> => {
    const child = Bun.spawn(["sh", "-c", shell, "sh", ...command(runtime), ...args], { stderr: "inherit" });
    return await new Response(child.stdout).text();
  };

  for (const runtime of runtimes) {
    test(`on ${runtime}: reads JSON lines from a pipe and from a redirected file`, async () => {
      const path = jsonl('{"id": "é", "text": "a"}\n\n{"ids": [1]}');
      const seen = [{ index: 0, id: "é", text: "a" }, { index: 1, id: 3, ids: [1] }];
      expect(JSON.parse(await output(runtime, `cat '${path}' | "$@"`, "jsonl"))).toEqual(
        { before: [null, null, null], after: null, seen },
      );
      expect(JSON.parse(await output(runtime, `"$@" < '${path}'`, "jsonl", "-"))).toEqual(
        { before: [null, null, 0], after: 1, seen },
      );
      expect(JSON.parse(await output(runtime, `"$@" < /`, "jsonl"))).toEqual(
        { error: "Cannot read standard input: it is a folder" },
      );
      const slowly =
        `(printf '{"text":"\\303'; sleep 0.1; printf '\\251"}\\n\\n'; sleep 0.1; printf '{}') | "$@"`;
      expect(JSON.parse(await output(runtime, slowly, "jsonl"))).toMatchObject(
        { seen: [{ id: 1, text: "é" }, { id: 3, error: 'line 3 has neither "text" nor "ids"' }] },
      );
    });

    test(`on ${runtime}: reads a document from a pipe, from a redirected file and from folders`, async () => {
      const root = tree({ a: "\ufeffé\n", b: "" });
      const file = (index: number, id: string, rest: object) => ({ index, id, file: id, ...rest });
      expect(JSON.parse(await output(runtime, `cat '${root}/a' | "$@"`, "files", root, "-"))).toEqual({
        before: [3, null, null],
        after: null,
        seen: [
          file(0, `${root}/a`, { text: "é\n" }),
          file(1, `${root}/b`, { error: `${root}/b is empty` }),
          file(2, "-", { text: "é\n" }),
        ],
      });
      expect(JSON.parse(await output(runtime, `"$@" < '${root}/a'`, "files", "-"))).toEqual(
        { before: [1, 6, 0], after: 1, seen: [file(0, "-", { text: "é\n" })] },
      );
      expect(JSON.parse(await output(runtime, `"$@" < /dev/null`, "files", "-"))).toMatchObject(
        { seen: [file(0, "-", { error: "standard input is empty" })] },
      );
      expect(JSON.parse(await output(runtime, `"$@"`, "files", `${root}/{a,b}`))).toMatchObject({
        before: [2, 6, 0],
      });
    });

    test(`on ${runtime}: closing ends a read that waits for standard input`, async () => {
      const child = Bun.spawn([...command(runtime), "wait"], { stdin: "pipe", stderr: "inherit" });
      child.stdin.write('{"text": "x"}\n');
      await child.stdin.flush();
      const text = await new Response(child.stdout).text();
      expect(text).toBe('{"index":0,"id":1,"text":"x"}\nclosed\n');
      await child.stdin.end();
    });

    test(`on ${runtime}: 200 MB of JSON lines take no more memory than the first`, async () => {
      const line = JSON.stringify({ id: "é", text: "x".repeat(978) });
      const bytes = Buffer.byteLength(line) + 1;
      const lines = Math.floor(200e6 / bytes);
      const text = await output(runtime, `yes '${line}' | head -c ${lines * bytes} | "$@"`, "count");
      const { count, characters, growth } = JSON.parse(text) as Record<string, number>;
      expect({ count, characters }).toEqual({ count: lines, characters: 978 * lines });
      expect(growth).toBeLessThan(100e6);
    });
  }
});
