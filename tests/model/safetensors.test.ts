import { afterAll, describe, expect, test } from "bun:test";
import { existsSync, mkdirSync, readFileSync, rmSync, truncateSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { openCheckpoint, openSafetensors } from "../../src/model/safetensors.ts";
import { ModelError } from "../../src/runtime/errors.ts";
import {
  temporaryFolder,
  writeIndex,
  writeRawSafetensors,
  writeSafetensors,
  writeTinyCheckpoint,
} from "../support/checkpoint.ts";

const folder = temporaryFolder();
afterAll(folder.remove);

const NO_BYTES = new Uint8Array(0);
let folders = 0;

/** A fresh folder for one case. */
function newFolder(): string {
  const dir = join(folder.path, String(folders++));
  mkdirSync(dir);
  return dir;
}

/** The refusal, which must be a ModelError with a hint, one line, naming `path`. */
async function refusal(opening: Promise<{ close(): Promise<void> }>, path: string): Promise<ModelError> {
  const outcome = await opening.then((source) => source.close(), (error: unknown) => error);
  expect(outcome).toBeInstanceOf(ModelError);
  const error = outcome as ModelError;
  expect(error.message).toContain(path);
  expect(error.message).not.toContain("\n");
  expect(error.hint).toBeDefined();
  return error;
}

const bytes = (...values: number[]) => Uint8Array.from(values);
const entry = (dtype: unknown, shape: unknown, ...offsets: unknown[]) => ({
  dtype,
  shape,
  data_offsets: offsets,
});

describe("openSafetensors", () => {
  test("tensors, metadata and any range of their bytes are read back", async () => {
    const path = join(newFolder(), "ok.safetensors");
    writeSafetensors(path, [
      { name: "b", dtype: "U8", shape: [3], bytes: bytes(1, 2, 3) },
      { name: "a", dtype: "F16", shape: [1, 2], bytes: bytes(4, 5, 6, 7) },
      { name: "empty", dtype: "F32", shape: [0, 5], bytes: NO_BYTES },
      { name: "scalar", dtype: "I64", shape: [], bytes: bytes(8, 0, 0, 0, 0, 0, 0, 0) },
    ]);
    const source = await openSafetensors(path);
    expect(source.description).toBe(path);
    expect(source.metadata).toEqual(new Map([["format", "pt"]]));
    expect(source.tensors.get("a")).toEqual({
      name: "a",
      dtype: "F16",
      shape: [1, 2],
      byteLength: 4,
      file: path,
    });
    const into = new Uint8Array(3);
    await source.read("a", 1, into);
    expect(into).toEqual(bytes(5, 6, 7));
    await source.read("b", 0, into);
    expect(into).toEqual(bytes(1, 2, 3));
    await source.read("empty", 0, NO_BYTES);
    await expect(source.read("a", 2, into)).rejects.toThrow(RangeError);
    await expect(source.read("c", 0, into)).rejects.toThrow(RangeError);
    await source.close();
    await source.close();
  });

  test("a file without tensors is valid", async () => {
    const path = join(newFolder(), "none.safetensors");
    writeRawSafetensors(path, "{}", NO_BYTES);
    const source = await openSafetensors(path);
    expect(source.tensors.size).toBe(0);
    await source.close();
  });

  test("names that mean something in JavaScript are names like any other", async () => {
    const path = join(newFolder(), "proto.safetensors");
    writeRawSafetensors(path, `{"__proto__":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}`, bytes(9));
    const source = await openSafetensors(path);
    expect([...source.tensors.keys()]).toEqual(["__proto__"]);
    await source.close();
  });

  const damaged: [string, unknown, Uint8Array, string][] = [
    ["text that is no JSON", "{nope", NO_BYTES, "not valid JSON"],
    ["a header that starts with white space", " {}", NO_BYTES, `does not start with "{"`],
    ["an array for a header", "[]", NO_BYTES, `does not start with "{"`],
    ["an empty header", "", NO_BYTES, `does not start with "{"`],
    ["a header that is not UTF-8", bytes(0x7b, 0x22, 0xff, 0x22, 0x7d), NO_BYTES, "not valid UTF-8"],
    ["an entry that is no object", { t: 1 }, NO_BYTES, `"t"`],
    ["metadata that is no object", { __metadata__: [] }, NO_BYTES, "__metadata__"],
    ["metadata that is no string", { __metadata__: { k: 1 } }, NO_BYTES, `"k"`],
    ["a missing dtype", { t: { shape: [], data_offsets: [0, 0] } }, NO_BYTES, `"t"`],
    ["an unknown dtype", { t: entry("F17", [1], 0, 2) }, bytes(0, 0), `"F17"`],
    ["a missing shape", { t: { dtype: "U8", data_offsets: [0, 0] } }, NO_BYTES, `"t"`],
    ["a negative size", { t: entry("U8", [-1], 0, 1) }, bytes(0), "shape"],
    ["a fractional size", { t: entry("U8", [0.5], 0, 1) }, bytes(0), "shape"],
    ["a size in quotes", { t: entry("U8", ["1"], 0, 1) }, bytes(0), "shape"],
    ["a size beyond 2^53", { t: entry("U8", [2 ** 60], 0, 1) }, bytes(0), "shape"],
    [
      "sizes whose product overflows",
      { t: entry("U8", [2 ** 40, 2 ** 40], 0, 1) },
      bytes(0),
      "impossible shape",
    ],
    [
      "a product that overflows to zero in 64 bits",
      { t: entry("F32", [2 ** 32, 2 ** 32], 0, 0) },
      NO_BYTES,
      "impossible",
    ],
    ["one offset", { t: entry("U8", [1], 0) }, bytes(0), "data_offsets"],
    ["three offsets", { t: entry("U8", [1], 0, 1, 1) }, bytes(0), "data_offsets"],
    ["negative offsets", { t: entry("U8", [1], -1, 0) }, bytes(0), "data_offsets"],
    ["offsets that run backwards", { t: entry("U8", [1], 1, 0) }, bytes(0), "backwards"],
    ["fewer bytes than the shape needs", { t: entry("F32", [2], 0, 4) }, bytes(0, 0, 0, 0), "needs 8 bytes"],
    ["more bytes than the shape needs", { t: entry("U8", [1], 0, 2) }, bytes(0, 0), "needs 1 bytes"],
    ["half a byte", { t: entry("F4", [3], 0, 2) }, bytes(0, 0), "whole bytes"],
    ["offsets beyond the file", { t: entry("U8", [9], 0, 9) }, bytes(0), "ends inside tensor"],
    [
      "a huge tensor in a small file",
      { t: entry("U8", [2 ** 50], 0, 2 ** 50) },
      bytes(0),
      "ends inside tensor",
    ],
    ["a hole before the first tensor", { t: entry("U8", [1], 1, 2) }, bytes(0, 0), "1 bytes before tensor"],
    ["bytes after the last tensor", { t: entry("U8", [1], 0, 1) }, bytes(0, 0), "1 bytes after the last"],
    ["data without tensors", {}, bytes(0, 0), "2 bytes after the last"],
    [
      "a hole between tensors",
      { t: entry("U8", [1], 0, 1), u: entry("U8", [1], 2, 3) },
      bytes(0, 0, 0),
      `1 bytes before tensor "u"`,
    ],
    [
      "overlapping tensors",
      { t: entry("U8", [2], 0, 2), u: entry("U8", [2], 1, 3) },
      bytes(0, 0, 0),
      `"t" and "u"`,
    ],
    [
      "a tensor inside another",
      { t: entry("U8", [4], 0, 4), u: entry("U8", [1], 1, 2) },
      bytes(0, 0, 0, 0),
      `"t" and "u"`,
    ],
    [
      "sizes whose product overflows before a size of 0",
      { t: entry("U8", [2 ** 52, 2 ** 52, 0], 0, 0) },
      NO_BYTES,
      "impossible shape",
    ],
    [
      "more sizes than a message has room for",
      { t: entry("U8", new Array(5000).fill(1), 0, 2) },
      bytes(0, 0),
      "[1, 1, 1, 1, 1, 1, 1, 1 and 4992 more], but has 2",
    ],
    [
      "a tensor's type twice",
      `{"t":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}`,
      bytes(0),
      "more than once",
    ],
    [
      "a key of the metadata twice",
      `{"__metadata__":{"a":"1","a":"2"},"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}`,
      bytes(0),
      "more than once",
    ],
    [
      "the same tensor twice",
      `{"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"t":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}}`,
      bytes(0),
      "more than once",
    ],
  ];
  for (const [what, header, data, mention] of damaged) {
    test(`${what} is refused by name`, async () => {
      const path = join(newFolder(), "bad.safetensors");
      writeRawSafetensors(path, header, data);
      expect((await refusal(openSafetensors(path), path)).message).toContain(mention);
    });
  }

  test("colons, braces and escaped quotes inside names do not look like repeated keys", async () => {
    const path = join(newFolder(), "odd.safetensors");
    const names = [`a":{"`, "back\\", "x:y", "{[", `"`];
    writeSafetensors(path, names.map((name) => ({ name, dtype: "U8", shape: [1], bytes: bytes(1) })));
    const source = await openSafetensors(path);
    expect([...source.tensors.keys()]).toEqual(names);
    await source.close();
  });

  test("a file too short for a header length is refused", async () => {
    for (const length of [0, 7]) {
      const path = join(newFolder(), "short.safetensors");
      writeFileSync(path, new Uint8Array(length));
      expect((await refusal(openSafetensors(path), path)).message).toContain(`${length} bytes`);
    }
  });

  test("a header length beyond the file or the format's limit is refused without allocating it", async () => {
    const path = join(newFolder(), "long.safetensors");
    for (const claimed of [100n, 2n ** 40n, 2n ** 64n - 1n]) {
      writeRawSafetensors(path, "{}", NO_BYTES, claimed);
      expect((await refusal(openSafetensors(path), path)).message).toContain(`header of ${claimed} bytes`);
    }
    writeRawSafetensors(path, "{}", NO_BYTES, 100_000_001n);
    truncateSync(path, 200_000_000); // sparse: the bytes are there, but no header is that long
    expect((await refusal(openSafetensors(path), path)).message).toContain("the format allows 100000000");
  });

  test("every truncation of a file is refused", async () => {
    const { dir } = writeTinyCheckpoint(newFolder(), { config: { nLayer: 1, nEmbd: 2 } });
    const path = join(dir, "model.safetensors");
    const whole = readFileSync(path);
    for (let length = 0; length < whole.length; length += 13) {
      writeFileSync(path, whole.subarray(0, length));
      await refusal(openSafetensors(path), path);
    }
  });

  test("a file that shrinks after it was opened is an error of the tensor that was read", async () => {
    const path = join(newFolder(), "shrinks.safetensors");
    writeSafetensors(path, [{ name: "t", dtype: "U8", shape: [100], bytes: new Uint8Array(100) }]);
    const source = await openSafetensors(path);
    truncateSync(path, readFileSync(path).length - 50);
    const error = await source.read("t", 0, new Uint8Array(100)).catch((reason: unknown) => reason);
    expect(error).toBeInstanceOf(ModelError);
    expect((error as ModelError).message).toMatch(/shrinks\.safetensors ended while tensor "t" was read/);
    await source.close();
  });

  test("a Git LFS pointer is recognised", async () => {
    const path = join(newFolder(), "pointer.safetensors");
    writeFileSync(path, "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 548105171\n");
    const error = await refusal(openSafetensors(path), path);
    expect(error.message).toContain("Git LFS pointer");
    expect(error.hint).toContain("git lfs pull");
  });

  test("a missing file and a folder in its place are refused", async () => {
    const dir = newFolder();
    expect((await refusal(openSafetensors(join(dir, "none")), join(dir, "none"))).message).toContain(
      "no file",
    );
    expect((await refusal(openSafetensors(dir), dir)).message).toContain("not a regular file");
  });

  test("control characters of a hostile name do not reach the message", async () => {
    const path = join(newFolder(), "hostile.safetensors");
    writeRawSafetensors(path, { "\u001b[2J\u009b\u202e": 1 }, NO_BYTES);
    expect((await refusal(openSafetensors(path), path)).message).toMatch(/^[\x20-\x7e]+$/);
  });
});

describe("openCheckpoint", () => {
  const names = (dir: string) => [1, 2, 3].map((n) => join(dir, `model-0000${n}-of-00003.safetensors`));

  test("shards read like one file", async () => {
    const one = await openCheckpoint(writeTinyCheckpoint(newFolder()).dir);
    const sharded = await openCheckpoint(writeTinyCheckpoint(newFolder(), { shards: 3 }).dir);
    expect([...sharded.tensors.keys()].toSorted()).toEqual([...one.tensors.keys()].toSorted());
    for (const [name, { byteLength, shape }] of one.tensors) {
      const [a, b] = [new Uint8Array(byteLength), new Uint8Array(byteLength)];
      await one.read(name, 0, a);
      await sharded.read(name, 0, b);
      expect(b).toEqual(a);
      expect(sharded.tensors.get(name)!.shape).toEqual(shape);
    }
    await one.close();
    await sharded.close();
  });

  test("a missing folder is refused by name", async () => {
    const dir = join(folder.path, "nowhere");
    expect((await refusal(openCheckpoint(dir), dir)).message).toContain("no model folder");
  });

  test("a folder without weights is refused, with advice for pickled ones", async () => {
    const dir = newFolder();
    expect((await refusal(openCheckpoint(dir), dir)).message).toContain("no model.safetensors");
    writeFileSync(join(dir, "pytorch_model.bin"), "");
    expect((await refusal(openCheckpoint(dir), dir)).hint).toContain("convert");
  });

  test("a missing shard is refused by name", async () => {
    const { dir } = writeTinyCheckpoint(newFolder(), { shards: 3 });
    const missing = names(dir)[1]!;
    rmSync(missing);
    await refusal(openCheckpoint(dir), missing);
  });

  test("a damaged shard is refused by name", async () => {
    const { dir } = writeTinyCheckpoint(newFolder(), { shards: 3 });
    const cut = names(dir)[2]!;
    truncateSync(cut, 100);
    await refusal(openCheckpoint(dir), cut);
  });

  test("shards outside the folder are refused without being opened", async () => {
    const outside = join(newFolder(), "secret.safetensors");
    writeSafetensors(outside, [{ name: "t", dtype: "U8", shape: [1], bytes: bytes(1) }]);
    const escapes = [
      outside,
      "../0/secret.safetensors",
      "sub/x.safetensors",
      "..\\x.safetensors",
      "C:x.safetensors",
    ];
    const unprintable = ["a\0.safetensors", "\x9b2J.safetensors", "\u202e.safetensors", "\ud800.safetensors"];
    const long = `${"x".repeat(250)}.safetensors`;
    for (const shard of [...escapes, ...unprintable, long, "", "..", ".safetensors", "model.bin", 7, null]) {
      const dir = newFolder();
      writeIndex(dir, { t: shard });
      const error = await refusal(openCheckpoint(dir), join(dir, "model.safetensors.index.json"));
      expect(error.message).toContain(`tensor "t"`);
      expect(error.message).toContain("outside the model folder");
    }
    expect(existsSync(outside)).toBe(true);
  });

  test("a tensor that the index promises and the shard lacks is refused by name", async () => {
    const dir = newFolder();
    writeSafetensors(join(dir, "a.safetensors"), [{ name: "t", dtype: "U8", shape: [1], bytes: bytes(1) }]);
    writeIndex(dir, { t: "a.safetensors", u: "a.safetensors" });
    expect((await refusal(openCheckpoint(dir), join(dir, "a.safetensors"))).message).toContain(`"u"`);
  });

  test("a tensor in two shards is refused by name", async () => {
    const dir = newFolder();
    const tensor = (name: string) => ({ name, dtype: "U8", shape: [1], bytes: bytes(1) });
    writeSafetensors(join(dir, "a.safetensors"), [tensor("t")]);
    writeSafetensors(join(dir, "b.safetensors"), [tensor("t"), tensor("u")]);
    writeIndex(dir, { t: "a.safetensors", u: "b.safetensors" });
    expect((await refusal(openCheckpoint(dir), join(dir, "b.safetensors"))).message).toContain(`"t"`);
  });

  test("an index that is no JSON, or maps nothing, is refused by name", async () => {
    for (const text of ["{", "[]", "{}", `{"weight_map":[]}`, `{"weight_map":{}}`]) {
      const dir = newFolder();
      const index = join(dir, "model.safetensors.index.json");
      writeFileSync(index, text);
      await refusal(openCheckpoint(dir), index);
    }
  });
});
