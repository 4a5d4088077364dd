/** Hostile weights: the header of a safetensors file, ranges of its data, and the index of several files. */
import { afterAll } from "bun:test";
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import fc from "fast-check";
import { openCheckpoint, openSafetensors } from "../../src/model/safetensors.ts";
import type { WeightSource } from "../../src/model/weight_source.ts";
import { temporaryFolder, writeRawSafetensors, writeSafetensors } from "../support/checkpoint.ts";
import { fuzz, judge, reportTallies, requireShowable } from "../support/fuzz.ts";
import {
  anyBytes,
  anyJson,
  bytesOf,
  damagedBytes,
  damagedJson,
  hasRepeatedKey,
  jsonOf,
  textOf,
} from "../support/fuzz_input.ts";

reportTallies();
const folder = temporaryFolder();
afterAll(folder.remove);
const path = join(folder.path, "fuzz.safetensors");

const DATA = Uint8Array.from({ length: 50 }, (_, i) => i);
const entry = (dtype: string, shape: number[], begin: number, end: number) => ({
  dtype,
  shape,
  data_offsets: [begin, end],
});
const HEADER = {
  __metadata__: { format: "pt", made: "here" },
  "h.0.weight": entry("F32", [2, 3], 0, 24),
  "h.0.bias": entry("F16", [3], 24, 30),
  empty: entry("BF16", [0, 5], 30, 30),
  scalar: entry("I64", [], 30, 38),
  packed: entry("F4", [2, 12], 38, 50),
};
const WORDS = [
  ...["__metadata__", "dtype", "shape", "data_offsets", "F32", "F16", "F4", "F6_E2M3", "U8", "BOOL"],
  ...["empty"],
];

/** Bits of the types, from the format's reference implementation. */
const BITS: Readonly<Record<string, bigint>> = {
  ...Object.fromEntries(["BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"].map((name) => [name, 8n])),
  ...Object.fromEntries(["F8_E5M2FNUZ", "F8_E4M3FNUZ"].map((name) => [name, 8n])),
  ...Object.fromEntries(["I16", "U16", "F16", "BF16"].map((name) => [name, 16n])),
  ...Object.fromEntries(["I32", "U32", "F32"].map((name) => [name, 32n])),
  ...Object.fromEntries(["I64", "U64", "F64", "C64"].map((name) => [name, 64n])),
  F4: 4n,
  F6_E2M3: 6n,
  F6_E3M2: 6n,
};

/** Whether bytes that were accepted obey the format, computed without rounding. */
function requireFormat(file: Uint8Array, source: WeightSource): void {
  const length = Number(new DataView(file.buffer, file.byteOffset).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(file.subarray(8, 8 + length))) as Record<
    string,
    { dtype: string; shape: number[]; data_offsets: [number, number] }
  >;
  const places: [begin: bigint, end: bigint][] = [];
  const names = Object.keys(header).filter((name) => name !== "__metadata__");
  if (names.length !== source.tensors.size) {
    throw new Error(`${source.tensors.size} of ${names.length} tensors`);
  }
  for (const name of names) {
    const { dtype, shape, data_offsets: [begin, end] } = header[name]!;
    let elements = 1n;
    for (const size of shape) {
      elements *= BigInt(size);
      if (elements >= 2n ** 64n) throw new Error(`the elements of ${JSON.stringify(name)} overflow 64 bits`);
    }
    const bits = elements * BITS[dtype]!;
    if (bits !== 8n * BigInt(end - begin)) throw new Error(`${JSON.stringify(name)} has ${bits} bits`);
    if (source.tensors.get(name)!.byteLength !== end - begin) throw new Error(`${name} has other bytes`);
    places.push([BigInt(begin), BigInt(end)]);
  }
  places.sort(([a, aEnd], [b, bEnd]) => Number(a - b) || Number(aEnd - bEnd));
  let reached = 0n;
  for (const [begin, end] of places) {
    if (begin !== reached) throw new Error(`a gap or an overlap at byte ${reached}`);
    reached = end;
  }
  if (reached !== BigInt(file.length - 8 - length)) throw new Error(`the data end at byte ${reached}`);
}

/** Opens, reads every tensor whole, closes. */
async function readAll(): Promise<WeightSource> {
  const source = await openSafetensors(path);
  try {
    for (const { name, byteLength } of source.tensors.values()) {
      await source.read(name, 0, new Uint8Array(byteLength));
    }
    return source;
  } finally {
    await source.close();
  }
}

async function checkFile(file: Uint8Array): Promise<void> {
  writeFileSync(path, file);
  const judged = await judge({ inputBytes: file.length }, readAll);
  if ("value" in judged) requireFormat(file, judged.value);
}

function fileOf(header: string, claimed?: bigint, data = DATA): Uint8Array {
  writeRawSafetensors(path, bytesOf(header), data, claimed);
  return readFileSync(path);
}

fuzz("safetensors: damaged bytes", {
  runs: 1500,
  arbitrary: damagedBytes(fileOf(JSON.stringify(HEADER))),
  check: checkFile,
});

fuzz("safetensors: a damaged header", {
  runs: 1800,
  arbitrary: damagedJson(jsonOf(HEADER), WORDS)
    .map((header) => ({ text: textOf(header), repeatsKey: hasRepeatedKey(header) })),
  check: async ({ text, repeatsKey }) => {
    const file = fileOf(text);
    writeFileSync(path, file);
    const judged = await judge({ inputBytes: file.length }, readAll);
    if (!("value" in judged)) return;
    requireFormat(file, judged.value);
    if (repeatsKey) throw new Error("a key that is there twice was accepted");
  },
});

fuzz("safetensors: any JSON for a header, any length", {
  runs: 800,
  arbitrary: fc.tuple(
    anyJson,
    fc.option(fc.bigInt({ min: 0n, max: 2n ** 64n - 1n }), { nil: undefined }),
    fc.constantFrom(DATA, new Uint8Array(0)),
  ),
  check: ([header, claimed, data]) => checkFile(fileOf(header, claimed, data)),
});

fuzz("safetensors: any bytes", { runs: 400, arbitrary: anyBytes, check: checkFile });

/** Sizes that fit, mostly, and sizes whose product is beyond any number or would be. */
const sizes = fc.oneof(
  { weight: 3, arbitrary: fc.array(fc.nat(4), { maxLength: 3 }) },
  { weight: 1, arbitrary: fc.array(fc.constantFrom(0, 1, 2 ** 20, 2 ** 32, 2 ** 53 - 1), { maxLength: 12 }) },
);
const MOST_DATA = 4096;

fuzz("safetensors: any dtypes, shapes and offsets", {
  runs: 1500,
  arbitrary: fc.array(
    fc.record({
      dtype: fc.constantFrom(...Object.keys(BITS)),
      shape: sizes,
      // Mostly where it should be, so that much is accepted.
      shift: fc.oneof({ weight: 8, arbitrary: fc.constant(0) }, {
        weight: 1,
        arbitrary: fc.integer({ min: -9, max: 9 }),
      }),
    }),
    { maxLength: 4 },
  ),
  check: async (tensors) => {
    let reached = 0;
    const header = Object.fromEntries(tensors.map(({ dtype, shape, shift }, i) => {
      const begin = Math.max(0, reached + shift);
      const bytes = Math.floor(shape.reduce((a, b) => a * b, 1) * Number(BITS[dtype]) / 8);
      reached = Math.min(MOST_DATA, begin + bytes);
      return [`t${i}`, entry(dtype, shape, begin, reached)];
    }));
    writeRawSafetensors(path, header, new Uint8Array(reached));
    await checkFile(readFileSync(path));
  },
});

fuzz("safetensors: ranges of a file that is cut short while it is open", {
  runs: 300,
  arbitrary: fc.record({
    left: fc.oneof(fc.nat(50), fc.constant(50)),
    offset: fc.nat(24),
    length: fc.nat(24),
  }),
  check: async ({ left, offset, length }) => {
    const file = fileOf(JSON.stringify(HEADER));
    writeFileSync(path, file);
    const source = await openSafetensors(path);
    try {
      const wanted = Math.min(length, 24 - offset);
      const into = new Uint8Array(wanted);
      // All of it left is a file that has not changed.
      if (left < 50) writeFileSync(path, file.subarray(0, file.length - 50 + left));
      const judged = await judge({ inputBytes: file.length }, () => source.read("h.0.weight", offset, into));
      // A file that has changed may be refused as a whole, but what is read of it is what it was.
      if (!("value" in judged)) return;
      if (offset + wanted > left && wanted > 0) throw new Error(`${wanted} bytes at ${offset} of ${left}`);
      if (!into.every((byte, i) => byte === offset + i)) throw new Error("other bytes");
    } finally {
      await source.close();
    }
  },
});

const INDEX = {
  metadata: { total_size: 6 },
  weight_map: {
    a: "model-00001-of-00002.safetensors",
    b: "model-00002-of-00002.safetensors",
    c: "model-00002-of-00002.safetensors",
  },
};
const sharded = join(folder.path, "sharded");
mkdirSync(sharded);
const U8 = { dtype: "U8", shape: [2], bytes: Uint8Array.of(1, 2) };
writeSafetensors(join(sharded, "model-00001-of-00002.safetensors"), [{ ...U8, name: "a" }]);
writeSafetensors(join(sharded, "model-00002-of-00002.safetensors"), [{ ...U8, name: "b" }, {
  ...U8,
  name: "c",
}]);
const indexPath = join(sharded, "model.safetensors.index.json");

async function checkIndex(index: Uint8Array): Promise<void> {
  writeFileSync(indexPath, index);
  const judged = await judge({ inputBytes: index.length + 400 }, async () => {
    const source = await openCheckpoint(sharded);
    await source.close();
    return [...source.tensors.values()];
  });
  if (!("value" in judged)) return;
  for (const { file } of judged.value) {
    requireShowable(file);
    if (!file.startsWith(`${sharded}/`) || file.slice(sharded.length + 1).includes("/")) {
      throw new Error(file);
    }
  }
}

const SHARD_WORDS = [
  ...["weight_map", "model-00001-of-00002.safetensors", "../fuzz.safetensors", "/etc/x.safetensors"],
  ...["a", "b"],
  ...[
    "\x9b2J.safetensors",
    "\u202e.safetensors",
    `${"x".repeat(5000)}.safetensors`,
    "..safetensors",
    ".safetensors",
  ],
];

fuzz("sharded index: damaged JSON", {
  runs: 1000,
  arbitrary: damagedJson(jsonOf(INDEX), SHARD_WORDS).map(textOf),
  check: (text) => checkIndex(bytesOf(text)),
});

fuzz("sharded index: damaged bytes and any JSON", {
  runs: 600,
  arbitrary: fc.oneof(damagedBytes(bytesOf(JSON.stringify(INDEX))), anyJson.map(bytesOf), anyBytes),
  check: checkIndex,
});
