import { afterAll, describe, expect, test } from "bun:test";
import {
  chmodSync,
  closeSync,
  existsSync,
  ftruncateSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  statSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { crc32 } from "node:zlib";
import { requireWritable, writeFileAtomically } from "../../src/model/atomic_file.ts";
import { configFromSizes, type GPT2Config } from "../../src/model/config.ts";
import { encodeSafetensorsHeader, openCheckpoint, openSafetensors } from "../../src/model/safetensors.ts";
import {
  commonPrefix,
  fingerprint,
  type KvRows,
  openSession,
  saveSession,
  type SessionContents,
  type SessionShape,
  sessionTensors,
} from "../../src/model/session.ts";
import { fmix32 } from "../../src/runtime/fmix32.ts";
import { ModelError, OutputError } from "../../src/runtime/errors.ts";
import {
  type FileTensor,
  temporaryFolder,
  type TinyOptions,
  writeRawSafetensors,
  writeSafetensors,
  writeTinyCheckpoint,
} from "../support/checkpoint.ts";
import { deno, denoTest } from "../support/cli.ts";

const folder = temporaryFolder();
afterAll(folder.remove);

let folders = 0;

/** A fresh folder for one case. */
function newFolder(): string {
  const dir = join(folder.path, String(folders++));
  mkdirSync(dir);
  return dir;
}

type RowShape = Pick<SessionShape, "layers" | "heads" | "headDim" | "elem">;

/** A cache in memory: rows of `tokens` tokens, by `layer` and "k" or "v". */
interface MemoryRows extends KvRows {
  readonly stored: ReadonlyMap<string, Uint8Array>;
}

function rowBytes({ headDim, elem }: RowShape): number {
  return headDim * (elem === "f16" ? 2 : 4);
}

/** A cache that holds `tokens` tokens of seeded bytes, or zeros for a seed of 0. */
function memoryRows(shape: RowShape, tokens: number, seed = 1, sliceBytes = 1 << 20): MemoryRows {
  const row = rowBytes(shape);
  const stored = new Map<string, Uint8Array>();
  for (let tensor = 0; tensor < 2 * shape.layers; tensor++) {
    const words = new Uint32Array(shape.heads * tokens * row / 4);
    if (seed !== 0) { for (let i = 0; i < words.length; i++) words[i] = fmix32(i ^ (seed + 977 * tensor)); }
    stored.set(`${tensor >> 1}${"kv"[tensor % 2]}`, new Uint8Array(words.buffer));
  }
  return {
    ...shape,
    stored,
    async *read(layer, which, wanted) {
      const bytes = firstTokens(stored.get(`${layer}${which}`)!, shape, tokens, wanted);
      const slice = new Uint8Array(sliceBytes);
      for (let offset = 0; offset < bytes.length; offset += sliceBytes) {
        const part = bytes.subarray(offset, offset + sliceBytes);
        await Promise.resolve();
        slice.fill(0xee); // the slice before this one is no longer valid
        slice.set(part);
        yield slice.subarray(0, part.length);
      }
    },
    write(layer, which, wanted, byteOffset, bytes) {
      expect(wanted).toBe(tokens);
      const all = stored.get(`${layer}${which}`)!;
      expect(byteOffset % 16).toBe(0);
      if (byteOffset + bytes.length < all.length) expect(bytes.length % 16).toBe(0);
      expect(bytes.length).toBeGreaterThan(0);
      all.set(bytes, byteOffset);
    },
  };
}

/** The first `wanted` tokens out of `[heads, tokens, headDim]`. */
function firstTokens(all: Uint8Array, shape: RowShape, tokens: number, wanted: number): Uint8Array {
  const [stride, length] = [tokens * rowBytes(shape), wanted * rowBytes(shape)];
  const heads = Array.from(
    { length: shape.heads },
    (_, head) => all.subarray(head * stride, head * stride + length),
  );
  return Buffer.concat(heads);
}

const SMALL: RowShape = { layers: 2, heads: 3, headDim: 12, elem: "f32" };
const VOCAB = 11;

function contents(
  shape: RowShape,
  tokens: number,
  seed = 1,
): SessionContents & { readonly rows: MemoryRows } {
  return {
    model: "0123abcd",
    positions: "exact",
    attention: "dense",
    ids: Uint32Array.from({ length: tokens }, (_, i) => fmix32(i) % VOCAB),
    logits: Float32Array.from({ length: VOCAB }, (_, i) => Math.fround(Math.sin(i + seed))),
    rows: memoryRows(shape, tokens, seed),
  };
}

/** What a run that saved `contents` asks a session to fit. */
function runOf({ model, positions, attention, rows, logits }: SessionContents) {
  const { layers, heads, headDim, elem } = rows;
  return { model, positions, attention, layers, heads, headDim, elem, vocabSize: logits.length };
}

/** A saved session's path and what it was made of. */
async function saved(shape = SMALL, tokens = 7) {
  const path = join(newFolder(), "prefix.session");
  const made = contents(shape, tokens);
  await saveSession(path, made);
  return { path, made };
}

/** Everything a session gives: whatever is wrong with a file must show by the end of this. */
async function readAll(path: string, made: SessionContents) {
  const session = (await openSession(path))!;
  try {
    session.check(runOf(made));
    const rows = memoryRows(session.shape, session.tokens, 0);
    await session.restore(rows, session.tokens);
    return { ids: session.ids, stored: rows.stored, logits: await session.logits() };
  } finally {
    await session.close();
  }
}

/** The refusal, which must be a ModelError with a hint, one line, naming `path`. */
async function refusal(reading: Promise<unknown>, path: string): Promise<ModelError> {
  const error = await reading.then(() => undefined, (reason: unknown) => reason);
  expect(error).toBeInstanceOf(ModelError);
  const { message, hint } = error as ModelError;
  expect(message).toContain(path);
  expect(message).not.toContain("\n");
  expect(hint).toBeDefined();
  expect(hint).not.toContain("download");
  return error as ModelError;
}

describe("a session", () => {
  const shapes: [RowShape, number][] = [
    [{ layers: 1, heads: 1, headDim: 4, elem: "f16" }, 1],
    [{ layers: 1, heads: 1, headDim: 4, elem: "f32" }, 1],
    [SMALL, 7],
    [{ layers: 3, heads: 5, headDim: 20, elem: "f16" }, 33],
    [{ layers: 1, heads: 2, headDim: 64, elem: "f16" }, 129],
  ];
  for (const [shape, tokens] of shapes) {
    test(`of ${tokens} tokens and ${JSON.stringify(shape)} comes back bit for bit`, async () => {
      const { path, made } = await saved(shape, tokens);
      const { ids, stored, logits } = await readAll(path, made);
      expect(ids).toEqual(made.ids);
      expect(logits).toEqual(made.logits as Float32Array<ArrayBuffer>);
      expect(stored).toEqual(made.rows.stored);
    });

    test(`of ${tokens} tokens and ${JSON.stringify(shape)} gives its beginning`, async () => {
      const { path, made } = await saved(shape, tokens);
      const session = (await openSession(path))!;
      for (const wanted of new Set([0, 1, tokens >> 1, tokens - 1])) {
        const rows = memoryRows(shape, wanted, 0);
        await session.restore(rows, wanted);
        for (const [name, all] of made.rows.stored) {
          const expected = firstTokens(all, shape, tokens, wanted);
          expect(Buffer.compare(rows.stored.get(name)!, expected)).toBe(0);
        }
      }
      await session.close();
    });
  }

  test("of many slices comes back, whole and in part, with its progress", async () => {
    const shape: RowShape = { layers: 1, heads: 5, headDim: 36, elem: "f32" };
    const tokens = 12_347; // 8.9 MB a tensor
    const { path, made } = await saved(shape, tokens);
    const session = (await openSession(path))!;
    const total = 2 * made.rows.stored.get("0k")!.length;
    for (const wanted of [tokens, tokens - 1, 6001]) {
      const rows = memoryRows(shape, wanted, 0);
      const steps: number[] = [];
      await session.restore(rows, wanted, {
        onProgress: (done, of) => (expect(of).toBe(total), steps.push(done)),
      });
      expect(steps.length).toBeGreaterThan(4);
      expect(steps).toEqual(steps.toSorted((a, b) => a - b));
      expect(steps.at(-1)).toBe(total);
      for (const [name, all] of made.rows.stored) {
        expect(Buffer.compare(rows.stored.get(name)!, firstTokens(all, shape, tokens, wanted))).toBe(0);
      }
    }
    await session.close();
  });

  test("is a safetensors file that says what it holds", async () => {
    const { path, made } = await saved({ layers: 2, heads: 3, headDim: 12, elem: "f16" }, 7);
    const source = await openSafetensors(path);
    const found = [...source.tensors.values()].map(({ name, dtype, shape }) => [name, dtype, shape]);
    expect(found).toEqual([
      ["h.0.k", "F16", [3, 7, 12]],
      ["h.0.v", "F16", [3, 7, 12]],
      ["h.1.k", "F16", [3, 7, 12]],
      ["h.1.v", "F16", [3, 7, 12]],
      ["input_ids", "I32", [7]],
      ["logits", "F32", [VOCAB]],
    ]);
    const { crc32: checksums, ...rest } = Object.fromEntries(source.metadata);
    expect(rest).toEqual({
      longform_session: "1",
      model: "0123abcd",
      dtype: "f16",
      positions: "exact",
      attention: "dense",
    });
    const keys = crc32(made.rows.stored.get("1k")!).toString(16).padStart(8, "0");
    expect(JSON.parse(checksums!)["h.1.k"]).toBe(keys);
    await source.close();
  });

  test("is saved as the same bytes from slices of any size", async () => {
    const dir = newFolder();
    const files = [1, 16, 1000].map((sliceBytes) => {
      const made = { ...contents(SMALL, 7), rows: memoryRows(SMALL, 7, 1, sliceBytes) };
      const path = join(dir, String(sliceBytes));
      return saveSession(path, made).then(() => readFileSync(path));
    });
    const [first, ...others] = await Promise.all(files);
    for (const other of others) expect(other.equals(first!)).toBe(true);
  });

  test("can be saved from a view of larger arrays", async () => {
    const path = join(newFolder(), "view");
    const made = contents(SMALL, 7);
    const ids = new Uint32Array(20).fill(3).subarray(5, 12);
    const logits = new Float32Array(40).fill(0.5).subarray(2, 2 + VOCAB);
    await saveSession(path, { ...made, ids, logits });
    const read = await readAll(path, made);
    expect(read.ids).toEqual(new Uint32Array(7).fill(3));
    expect(read.logits).toEqual(new Float32Array(VOCAB).fill(0.5));
  });

  test("replaces the one before, which an open reader still sees", async () => {
    const { path, made } = await saved();
    chmodSync(path, 0o600);
    const before = (await openSession(path))!;
    const next = contents(SMALL, 9, 2);
    await saveSession(path, next);
    expect((await readAll(path, next)).stored).toEqual(next.rows.stored);
    expect(statSync(path).mode & 0o777).toBe(0o600);
    const rows = memoryRows(SMALL, 7, 0);
    await before.restore(rows, 7);
    expect(rows.stored).toEqual(made.rows.stored);
    await before.close();
    await before.close();
  });

  test("does not exist where there is no file or folder", async () => {
    expect(await openSession(join(newFolder(), "none"))).toBeUndefined();
    expect(await openSession(join(newFolder(), "nowhere", "none"))).toBeUndefined();
  });

  denoTest("that Deno saved is read here, and the other way round", async () => {
    const { path, made } = await saved();
    const again = join(newFolder(), "again");
    const module = pathToFileURL(join(import.meta.dir, "../../src/model/session.ts"));
    const script = `
      const { openSession, saveSession } = await import(${JSON.stringify(module)});
      const session = await openSession(${JSON.stringify(path)});
      const parts = new Map();
      const rows = { ...session.shape,
        write: (i, which, n, at, bytes) => void parts.set(i + which, bytes.slice()),
        async *read(i, which) { yield parts.get(i + which); } };
      await session.restore(rows, session.tokens);
      const { ids, origin } = session;
      await saveSession(${JSON.stringify(again)}, { ...origin, ids, logits: await session.logits(), rows });
      await session.close();`;
    const config = join(import.meta.dir, "../../deno.json");
    const flags = ["run", "-q", "--config", config, "--allow-read", "--allow-write", "--allow-ffi"];
    const child = Bun.spawn([deno!, ...flags, "-"], { stdin: Buffer.from(script), stderr: "pipe" });
    expect(await new Response(child.stderr).text()).toBe("");
    expect(await child.exited).toBe(0);
    expect(readFileSync(again).equals(readFileSync(path))).toBe(true);
    expect((await readAll(again, made)).stored).toEqual(made.rows.stored);
  });
});

describe("sizes beyond 2^32", () => {
  const xl: SessionShape = {
    layers: 48,
    heads: 25,
    headDim: 64,
    elem: "f16",
    tokens: 65_536,
    vocabSize: 50_257,
  };

  test("gpt2-xl at 64K has 20 GB without a gap", () => {
    const bytes = encodeSafetensorsHeader(sessionTensors(xl));
    const header = JSON.parse(new TextDecoder().decode(bytes.subarray(8)));
    delete header.__metadata__;
    let reached = 0;
    for (const { data_offsets: [begin, end] } of Object.values<{ data_offsets: [number, number] }>(header)) {
      expect(begin).toBe(reached);
      reached = end;
    }
    expect(reached).toBe(48 * 2 * 25 * 65_536 * 64 * 2 + 65_536 * 4 + 50_257 * 4);
    expect(header["h.47.v"].data_offsets[0]).toBe(95 * 209_715_200);
  });

  test("tokens and logits are found behind 4 GiB of rows", async () => {
    const path = join(newFolder(), "sparse.session");
    const shape: SessionShape = { ...xl, layers: 12, heads: 12, tokens: 120_000, vocabSize: VOCAB };
    const { ids, logits } = contents(SMALL, shape.tokens);
    const tensors = sessionTensors(shape);
    const tail = [ids, logits].map((array) => new Uint8Array(array.buffer as ArrayBuffer));
    const hex = (bytes: Uint8Array) => crc32(bytes).toString(16).padStart(8, "0");
    const checksums = Object.fromEntries(tensors.map(({ name }) => [name, "00000000"]));
    const header = encodeSafetensorsHeader(tensors, {
      longform_session: "1",
      model: "m",
      dtype: "f16",
      positions: "exact",
      attention: "dense",
      crc32: JSON.stringify({ ...checksums, input_ids: hex(tail[0]!), logits: hex(tail[1]!) }),
    });
    const rowsEnd = header.length + 12 * 12 * 2 * 120_000 * 128;
    expect(rowsEnd).toBeGreaterThan(2 ** 32);
    const file = openSync(path, "w");
    writeSync(file, header, 0, header.length, 0);
    ftruncateSync(file, rowsEnd + tail[0]!.length + tail[1]!.length); // sparse: takes no space
    writeSync(file, tail[0]!, 0, tail[0]!.length, rowsEnd);
    writeSync(file, tail[1]!, 0, tail[1]!.length, rowsEnd + tail[0]!.length);
    closeSync(file);
    const session = (await openSession(path))!;
    expect(session.shape).toEqual(shape);
    expect(session.ids).toEqual(ids);
    expect(await session.logits()).toEqual(logits as Float32Array<ArrayBuffer>);
    await session.close();
  });
});

describe("damage", () => {
  test("every truncation is refused", async () => {
    const { path } = await saved();
    const whole = readFileSync(path);
    for (let length = 0; length < whole.length; length += 29) {
      writeFileSync(path, whole.subarray(0, length));
      await refusal(openSession(path), path);
    }
  });

  test("bytes behind the end are refused", async () => {
    const { path } = await saved();
    truncateSync(path, statSync(path).size + 1);
    expect((await refusal(openSession(path), path)).message).toContain("after the last tensor");
  });

  test("a changed bit in any tensor is found by the tensor's name, also in tokens that are not wanted", async () => {
    const { path, made } = await saved();
    const whole = readFileSync(path);
    const headerBytes = 8 + Number(whole.readBigUInt64LE(0));
    let end = headerBytes;
    for (const { name, byteLength } of sessionTensors({ ...SMALL, tokens: 7, vocabSize: VOCAB })) {
      for (const at of [end, end + byteLength - 1]) {
        const bytes = Buffer.from(whole);
        bytes[at]! ^= 1;
        writeFileSync(path, bytes);
        expect((await refusal(readAll(path, made), path)).message).toBe(
          `Tensor "${name}" in ${path} is damaged: its bytes are not those that were saved`,
        );
        if (!name.startsWith("h.")) continue;
        const session = (await openSession(path))!;
        await refusal(session.restore(memoryRows(SMALL, 1, 0), 1), path);
        await session.close();
      }
      end += byteLength;
    }
    expect(end).toBe(whole.length);
  });

  test("a changed bit in the header is found, or changes nothing", async () => {
    const { path, made } = await saved();
    const whole = readFileSync(path);
    const headerBytes = 8 + Number(whole.readBigUInt64LE(0));
    for (let at = 0; at < headerBytes; at++) {
      const bytes = Buffer.from(whole);
      bytes[at]! ^= 1 << (at % 7);
      writeFileSync(path, bytes);
      const read = await readAll(path, made).catch((error: unknown) => error);
      if (read instanceof ModelError) continue;
      expect(read).toEqual({ ids: made.ids, stored: made.rows.stored, logits: made.logits });
    }
  });

  test("a file that is cut short while it is read is refused", async () => {
    const { path } = await saved();
    const session = (await openSession(path))!;
    truncateSync(path, statSync(path).size - 500);
    const error = await session.restore(memoryRows(SMALL, 7, 0), 7).catch((reason: unknown) => reason);
    expect((error as ModelError).message).toMatch(/prefix\.session was changed while it was read$/);
    await session.close();
  });
});

describe("a file that is no session", () => {
  const metadata = (tensors: readonly { readonly name: string; readonly bytes: Uint8Array }[]) => ({
    longform_session: "1",
    model: "m",
    dtype: "f16",
    positions: "exact",
    attention: "dense",
    crc32: JSON.stringify(Object.fromEntries(
      tensors.map(({ name, bytes }) => [name, crc32(bytes).toString(16).padStart(8, "0")]),
    )),
  });
  const tensor = (name: string, dtype: string, shape: number[], bytes: number): FileTensor => ({
    name,
    dtype,
    shape,
    bytes: new Uint8Array(bytes),
  });
  const keys = tensor("h.0.k", "F16", [1, 2, 4], 16);
  const values = tensor("h.0.v", "F16", [1, 2, 4], 16);
  const ids = tensor("input_ids", "I32", [2], 8);
  const logits = tensor("logits", "F32", [1], 4);
  const good = [keys, values, ids, logits];

  /** Writes these tensors under a session's metadata, changed as given. */
  function written(tensors: readonly FileTensor[], change: Record<string, string | undefined> = {}): string {
    const path = join(newFolder(), "odd.session");
    const header = encodeSafetensorsHeader(
      tensors.map((entry) => ({ ...entry, byteLength: entry.bytes.length })),
      JSON.parse(JSON.stringify({ ...metadata(tensors), ...change })),
    );
    writeFileSync(path, Buffer.concat([header, ...tensors.map(({ bytes }) => bytes)]));
    return path;
  }

  test("but made of the right parts is one", async () => {
    const session = (await openSession(written(good)))!;
    expect(session.shape).toEqual({
      layers: 1,
      heads: 1,
      headDim: 4,
      elem: "f16",
      tokens: 2,
      vocabSize: 1,
    });
    await session.close();
  });

  const foreign: [string, readonly FileTensor[], Record<string, string | undefined>, string][] = [
    ["without the format's name", good, { longform_session: undefined }, "but not a session"],
    ["of another version", good, { longform_session: "2" }, `version "2"`],
    ["without a model", good, { model: undefined }, "without model"],
    ["without positions", good, { positions: undefined }, "without positions"],
    ["without a type", good, { dtype: undefined }, "without dtype"],
    ["of another type than it says", good, { dtype: "f32" }, `"f32", but holds F16`],
    ["of a type that does not exist", good, { dtype: "f\u001b8" }, "holds F16"],
    ["without checksums", good, { crc32: undefined }, "without crc32"],
    ["with checksums that are no JSON", good, { crc32: "{" }, `checksum of tensor "h.0.k"`],
    ["with checksums that are a list", good, { crc32: "[1]" }, `checksum of tensor "h.0.k"`],
    ["with a checksum that is a number", good, { crc32: `{"h.0.k":1}` }, `checksum of tensor "h.0.k"`],
    ["without tensors", [], {}, `"input_ids"`],
    ["without layers", [ids, logits], {}, `"input_ids"`],
    ["without values", [keys, ids, logits], {}, `without tensor "h.0.v"`],
    ["without tokens", [keys, values, logits], {}, `without tensor "input_ids"`],
    ["without logits", [keys, values, ids], {}, `without tensor "logits"`],
    [
      "without its first layer",
      [{ ...keys, name: "h.1.k" }, { ...values, name: "h.1.v" }, ids, logits],
      {},
      `"h.0.k"`,
    ],
    ["with one tensor more", [...good, tensor("more", "U8", [1], 1)], {}, `without tensor "h.1.k"`],
    [
      "with values of another type",
      [keys, tensor("h.0.v", "F32", [1, 2, 4], 32), ids, logits],
      {},
      "F32 [1, 2, 4]",
    ],
    ["of a type that no run has", [tensor("h.0.k", "BF16", [1, 2, 4], 16), values, ids, logits], {}, "BF16"],
    [
      "with values of another shape",
      [keys, tensor("h.0.v", "F16", [1, 4, 2], 16), ids, logits],
      {},
      "[1, 4, 2]",
    ],
    ["with rows without heads", [tensor("h.0.k", "F16", [2, 4], 16), values, ids, logits], {}, `"h.0.k"`],
    [
      "with more tokens than rows",
      [keys, values, tensor("input_ids", "I32", [3], 12), logits],
      {},
      "I32 [3]",
    ],
    [
      "with tokens of another type",
      [keys, values, tensor("input_ids", "U32", [2], 8), logits],
      {},
      "U32 [2]",
    ],
    [
      "with logits in thousands of dimensions",
      [keys, values, ids, tensor("logits", "F32", new Array(5000).fill(1), 4)],
      {},
      "F32 [1, 1, 1, 1, 1, 1, 1, 1 and 4992 more]",
    ],
    [
      "with logits in two dimensions",
      [keys, values, ids, tensor("logits", "F32", [1, 1], 4)],
      {},
      "F32 [1, 1]",
    ],
    [
      "of no tokens",
      [
        tensor("h.0.k", "F16", [1, 0, 4], 0),
        tensor("h.0.v", "F16", [1, 0, 4], 0),
        tensor("input_ids", "I32", [0], 0),
        logits,
      ],
      {},
      "of 0 tokens",
    ],
    [
      "with a token outside its vocabulary",
      [keys, values, { ...ids, bytes: Uint8Array.of(0, 0, 0, 0, 7, 0, 0, 0) }, logits],
      {},
      "the token 7, outside its vocabulary of 1",
    ],
    [
      "with a negative token",
      [keys, values, { ...ids, bytes: new Uint8Array(8).fill(255) }, logits],
      {},
      "outside its vocabulary of 1",
    ],
  ];
  for (const [what, tensors, change, mention] of foreign) {
    test(`${what} is refused`, async () => {
      const path = written(tensors, change);
      const { message } = await refusal(openSession(path), path);
      expect(message).toContain(mention);
      expect(message).toMatch(/^[\x20-\x7e]+$/);
    });
  }

  test("a model given by mistake is refused as such", async () => {
    const path = join(writeTinyCheckpoint(join(newFolder(), "model")).dir, "model.safetensors");
    expect((await refusal(openSession(path), path)).message).toBe(
      `${path} is a safetensors file, but not a session`,
    );
  });

  test("a file of anything else is refused", async () => {
    const path = join(newFolder(), "text");
    for (const text of ["", "short", "Once upon a time there was a prompt.", "version https://git-lfs"]) {
      writeFileSync(path, text);
      await refusal(openSession(path), path);
    }
    writeRawSafetensors(path, "{}", new Uint8Array(0), 2n ** 63n);
    expect((await refusal(openSession(path), path)).message).toContain("header of 9223372036854775808 bytes");
    writeSafetensors(path, []);
    expect((await refusal(openSession(path), path)).message).toContain("not a session");
  });

  test("a folder, and a path through a file, are refused", async () => {
    const dir = newFolder();
    await refusal(openSession(dir), dir);
    const path = join(dir, "file");
    writeFileSync(path, "");
    await refusal(openSession(join(path, "inside")), path);
  });

  test.skipIf(process.getuid?.() === 0)("a file that may not be read is refused", async () => {
    const { path } = await saved();
    chmodSync(path, 0o200);
    const error = await refusal(openSession(path), path);
    expect(error.message).toContain("permission denied");
    expect(error.hint).toContain("permissions");
  });
});

describe("check", () => {
  const SIZES = "2 layers of 3 heads of 12 columns and 11 logits";
  const refusals: [string, object, string, string | undefined][] = [
    ["model", { model: "ffff" }, "was saved with another model", "pass the model that it was saved with"],
    ["type", { elem: "f16" }, "was saved in f32, this run is in f16", "use `--dtype f32`, or another file"],
    [
      "mapping of positions",
      { positions: "interpolate 1024 to 4096" },
      `was saved with the positions "exact", this run has "interpolate 1024 to 4096"`,
      "use `--positions exact` as it was saved with, or another file",
    ],
    [
      "attention",
      { attention: "local:1024" },
      `was saved with the attention "dense", this run has "local:1024"`,
      "use the `--sparsity` that it was saved with, or another file",
    ],
    [
      "number of layers",
      { layers: 3 },
      `holds ${SIZES}, the model has 3 layers of 3 heads of 12 columns and 11 logits`,
      undefined,
    ],
    [
      "number of heads",
      { heads: 1 },
      `holds ${SIZES}, the model has 2 layers of 1 heads of 12 columns and 11 logits`,
      undefined,
    ],
    [
      "head size",
      { headDim: 16 },
      `holds ${SIZES}, the model has 2 layers of 3 heads of 16 columns and 11 logits`,
      undefined,
    ],
    [
      "vocabulary",
      { vocabSize: 12 },
      `holds ${SIZES}, the model has 2 layers of 3 heads of 12 columns and 12 logits`,
      undefined,
    ],
  ];
  for (const [what, change, message, hint] of refusals) {
    test(`refuses another ${what}`, async () => {
      const { path, made } = await saved();
      const session = (await openSession(path))!;
      session.check(runOf(made));
      const checking = Promise.try(() => session.check({ ...runOf(made), ...change }));
      const error = await refusal(checking, path);
      expect(error.message).toBe(`${path} ${message}`);
      expect(error.exitCode).toBe(1);
      if (hint !== undefined) expect(error.hint).toContain(hint);
      await session.close();
    });
  }

  test("gives no advice in words of the file", async () => {
    const path = join(newFolder(), "hostile.session");
    const made = { ...contents(SMALL, 7), positions: "`--model /tmp/evil`" };
    await saveSession(path, made);
    const session = (await openSession(path))!;
    const checking = Promise.try(() => session.check({ ...runOf(made), positions: "exact" }));
    expect((await refusal(checking, path)).hint).toBe(
      "use the `--positions` as it was saved with, or another file",
    );
    await session.close();
  });

  test("a cache that does not fit, or too many tokens, are mistakes of the caller", async () => {
    const { path } = await saved();
    const session = (await openSession(path))!;
    for (const change of [{ layers: 1 }, { heads: 2 }, { headDim: 8 }, { elem: "f16" } as const]) {
      await expect(session.restore(memoryRows({ ...SMALL, ...change }, 7), 7)).rejects.toThrow(RangeError);
    }
    for (const tokens of [-1, 0.5, 8, NaN]) {
      await expect(session.restore(memoryRows(SMALL, 7), tokens)).rejects.toThrow(RangeError);
    }
    await session.close();
  });
});

describe("saveSession that fails", () => {
  /** The folder must hold nothing but what was there before: an older session. */
  async function unchanged(work: (path: string) => Promise<unknown>): Promise<unknown> {
    const { path } = await saved();
    const before = readFileSync(path);
    const error = await work(path).then(() => undefined, (reason: unknown) => reason);
    expect(readdirSync(join(path, ".."))).toEqual(["prefix.session"]);
    expect(readFileSync(path).equals(before)).toBe(true);
    return error;
  }

  test("by an abort leaves the file before as it was", async () => {
    const controller = new AbortController();
    const next = contents(SMALL, 9, 2);
    let calls = 0;
    const error = await unchanged((path) =>
      saveSession(path, next, {
        signal: controller.signal,
        onProgress: () => ++calls === 3 && controller.abort("enough"),
      })
    );
    expect(error).toBe("enough");
    expect(calls).toBe(3);
    expect(await unchanged((path) => saveSession(path, next, { signal: AbortSignal.abort("early") }))).toBe(
      "early",
    );
  });

  test("by an error of the cache passes that on", async () => {
    const lost = new Error("the device was lost");
    const made = contents(SMALL, 9, 2);
    const rows: KvRows = {
      ...made.rows,
      async *read(layer, which, tokens) {
        if (layer === 1) throw lost;
        yield* made.rows.read(layer, which, tokens);
      },
    };
    expect(await unchanged((path) => saveSession(path, { ...made, rows }))).toBe(lost);
  });

  test("by a cache that gives too much or too little writes nothing", async () => {
    const made = contents(SMALL, 9, 2);
    for (const bytes of [0, 16, 9 * 3 * 12 * 4 + 4]) {
      const rows: KvRows = {
        ...made.rows,
        async *read() {
          await Promise.resolve();
          yield new Uint8Array(bytes);
        },
      };
      expect(await unchanged((path) => saveSession(path, { ...made, rows }))).toBeInstanceOf(RangeError);
    }
    expect(await unchanged((path) => saveSession(path, contents(SMALL, 0)))).toBeInstanceOf(RangeError);
  });

  test("by a limit on the size of files, half way, leaves nothing", async () => {
    // As near to a full disk as a test can come without owning one; the signal would end the process.
    const dir = newFolder();
    const path = join(dir, "large");
    const module = join(import.meta.dir, "../../src/model/session.ts");
    const script = `
      import { saveSession } from ${JSON.stringify(module)};
      const rows = { layers: 1, heads: 1, headDim: 1024, elem: "f32",
        async *read() { for (let i = 0; i < 64; i++) yield new Uint8Array(1 << 16); } };
      const ids = new Uint32Array(1024), logits = new Float32Array(4);
      await saveSession(${
      JSON.stringify(path)
    }, { model: "m", positions: "p", attention: "dense", ids, logits, rows })
        .catch((error) => console.log(error.name + ": " + error.message + "; " + error.hint));`;
    const shell = `trap "" XFSZ; ulimit -f 1024; exec "$@"`;
    const child = Bun.spawn(["sh", "-c", shell, "sh", process.execPath, "run", "-"], {
      stdin: Buffer.from(script),
      stdout: "pipe",
    });
    expect(await new Response(child.stdout).text()).toBe(
      `OutputError: Cannot write ${path}: the file would be too large; choose another file or disk\n`,
    );
    expect(readdirSync(dir)).toEqual([]);
  });
});

describe("writeFileAtomically", () => {
  /** The refusal, the same from `requireWritable`: an OutputError with a hint, one line, naming `path`. */
  async function refused(path: string): Promise<OutputError> {
    const errors = await Promise.all([
      writeFileAtomically(path, (file) => file.write(new Uint8Array(1), 0)),
      requireWritable(path),
    ].map((work) => work.then(() => undefined, (reason: unknown) => reason)));
    const [error, early] = errors as OutputError[];
    expect(error).toBeInstanceOf(OutputError);
    expect(early?.message).toBe(error!.message);
    expect(error!.message).toStartWith(`Cannot write ${path}: `);
    expect(error!.message).not.toContain("\n");
    expect(error!.hint).toBeDefined();
    return error!;
  }

  test("writes anywhere in the file, and leaves nothing else", async () => {
    const dir = newFolder();
    const path = join(dir, "n".repeat(255)); // as long as names can be
    await writeFileAtomically(path, async (file) => {
      await file.write(Uint8Array.of(3, 4), 2);
      await file.write(Uint8Array.of(1, 2), 0);
      expect(existsSync(path)).toBe(false);
    });
    expect([...readFileSync(path)]).toEqual([1, 2, 3, 4]);
    expect(readdirSync(dir)).toHaveLength(1);
  });

  test("writes through a link, which stays one", async () => {
    const dir = newFolder();
    writeFileSync(join(dir, "real"), "old");
    symlinkSync("real", join(dir, "link"));
    await writeFileAtomically(join(dir, "link"), (file) => file.write(Buffer.from("new"), 0));
    expect(readFileSync(join(dir, "real"), "utf8")).toBe("new");
    expect(readdirSync(dir).toSorted()).toEqual(["link", "real"]);
  });

  test("refuses a folder that does not exist, and a file in a folder's place", async () => {
    const dir = newFolder();
    expect((await refused(join(dir, "none", "x"))).message).toEndWith(
      `there is no folder ${join(dir, "none")}`,
    );
    writeFileSync(join(dir, "file"), "");
    expect((await refused(join(dir, "file", "x"))).message).toEndWith("a part of its path is not a folder");
  });

  test("refuses a folder and a device, which a rename would replace", async () => {
    const dir = newFolder();
    expect((await refused(dir)).message).toEndWith("it is a folder");
    expect((await refused("/dev/null")).message).toEndWith("it is not a regular file");
    expect(statSync("/dev/null").isCharacterDevice()).toBe(true);
  });

  test.skipIf(process.platform !== "linux")("refuses a folder that not even root may write to", async () => {
    const error = await refused("/sys/prefix.session");
    expect(error.message).toMatch(/permission is denied|the disk is read-only|does not permit/);
    expect(error.hint).toBe("choose a folder that you may write to");
  });

  test.skipIf(process.getuid?.() === 0)("refuses a read-only file and a read-only folder", async () => {
    const dir = newFolder();
    const path = join(dir, "kept");
    writeFileSync(path, "kept");
    chmodSync(path, 0o400);
    expect((await refused(path)).message).toEndWith("permission is denied");
    chmodSync(dir, 0o500);
    expect((await refused(join(dir, "new"))).message).toEndWith("permission is denied");
    chmodSync(dir, 0o700);
    expect(readdirSync(dir)).toEqual(["kept"]);
  });

  test("requireWritable leaves no trace", async () => {
    const dir = newFolder();
    writeFileSync(join(dir, "old"), "old");
    await requireWritable(join(dir, "old"));
    await requireWritable(join(dir, "new"));
    expect(readdirSync(dir)).toEqual(["old"]);
    expect(readFileSync(join(dir, "old"), "utf8")).toBe("old");
  });
});

describe("fingerprint", () => {
  async function of(options: TinyOptions = {}, change: Partial<GPT2Config> = {}): Promise<string> {
    const { dir, config } = writeTinyCheckpoint(newFolder(), options);
    const source = await openCheckpoint(dir);
    try {
      return await fingerprint(source, { ...config, ...change });
    } finally {
      await source.close();
    }
  }

  test("is the same for the same weights, however they are sharded", async () => {
    const one = await of();
    expect(one).toMatch(/^[0-9a-f]{64}$/);
    expect(await of()).toBe(one);
    expect(await of({ shards: 3 })).toBe(one);
  });

  test("differs for other weights, their type, their names and what is computed with them", async () => {
    const others = await Promise.all([
      of(),
      of({ seed: 2 }),
      of({ dtype: "F16" }),
      of({ prefix: "" }),
      of({ inject: { tensor: "h.1.mlp.c_proj.bias", element: 0, value: 0.25 } }),
      of({ inject: { tensor: "h.1.mlp.c_proj.bias", element: 7, value: 0.25 } }),
      of({}, { layerNormEpsilon: 1e-6 }),
      of({}, { nHead: 4, headDim: 2 }),
      of({}, { scaleAttnByInverseLayerIdx: true }),
    ]);
    expect(new Set(others).size).toBe(others.length);
  });

  test("does not depend on what is never computed with", async () => {
    expect(await of({}, { eosTokenId: [3], bosTokenId: 4, id2label: ["a"] })).toBe(await of());
  });

  test("sees both ends of a tensor, not its middle", async () => {
    const config = { ...configFromSizes({ nLayer: 1, nHead: 1, nEmbd: 4, nPositions: 8, vocabSize: 5000 }) };
    const embedding = (element: number) =>
      of({ config, inject: { tensor: "wte.weight", element, value: 9 } });
    const [none, first, middle, last] = await Promise.all([
      of({ config }),
      embedding(0),
      embedding(9999),
      embedding(19999),
    ]);
    expect(new Set([none, first, last]).size).toBe(3);
    expect(middle).toBe(none!);
  });
});

test("commonPrefix counts equal tokens from the start", () => {
  expect(commonPrefix([], [])).toBe(0);
  expect(commonPrefix([1, 2, 3], Uint32Array.of(1, 2, 4))).toBe(2);
  expect(commonPrefix(Uint32Array.of(1, 2), [1, 2, 3])).toBe(2);
  expect(commonPrefix([2, 1], [1, 1])).toBe(0);
});
