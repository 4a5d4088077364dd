/** Hostile session files: nothing but what was saved is ever restored. */
import { afterAll } from "bun:test";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import fc from "fast-check";
import { type KvRows, openSession, saveSession, type SessionOrigin } from "../../src/model/session.ts";
import { temporaryFolder } from "../support/checkpoint.ts";
import { fuzz, judge, reportTallies } from "../support/fuzz.ts";
import {
  anyBytes,
  anyJson,
  bytesOf,
  damagedBytes,
  damagedJson,
  type Json,
  jsonOf,
  textOf,
} from "../support/fuzz_input.ts";

reportTallies();
const folder = temporaryFolder();
afterAll(folder.remove);
const path = join(folder.path, "fuzz.session");

const SHAPE = { layers: 2, heads: 2, headDim: 4, elem: "f16" } as const;
const ORIGIN: SessionOrigin = { model: "0123abcd", positions: "exact", attention: "sink:64+local:128" };
const TOKENS = 3;
const IDS = Uint32Array.of(4, 0, 2);
const LOGITS = Float32Array.of(0.5, -1, 2, 0, 7);
const ROW_BYTES = SHAPE.heads * TOKENS * SHAPE.headDim * 2;
const SAVED = new Map(
  ["0k", "0v", "1k", "1v"].map((name, i) =>
    [name, Uint8Array.from({ length: ROW_BYTES }, (_, j) => 37 * i + 11 * j)] as const
  ),
);

/** A cache in memory. */
function memoryRows(rows: ReadonlyMap<string, Uint8Array>): KvRows {
  return {
    ...SHAPE,
    async *read(layer, which) {
      await Promise.resolve();
      yield rows.get(`${layer}${which}`)!;
    },
    write(layer, which, _tokens, byteOffset, bytes) {
      rows.get(`${layer}${which}`)!.set(bytes, byteOffset);
    },
  };
}

await saveSession(path, { ...ORIGIN, ids: IDS, logits: LOGITS, rows: memoryRows(SAVED) });
const sound = new Uint8Array(readFileSync(path));
const headerBytes = Number(new DataView(sound.buffer).getBigUint64(0, true));
const header = JSON.parse(new TextDecoder().decode(sound.subarray(8, 8 + headerBytes))) as {
  __metadata__: Record<string, string>;
};
const data = sound.subarray(8 + headerBytes);

/** Opens the file as a run with this model does, and restores all of it. */
async function restoreAll() {
  const session = await openSession(path);
  if (!session) throw new Error("the file is there");
  try {
    session.check({ ...ORIGIN, ...SHAPE, vocabSize: LOGITS.length });
    const rows = new Map([...SAVED.keys()].map((name) => [name, new Uint8Array(ROW_BYTES)]));
    await session.restore(memoryRows(rows), session.tokens);
    return { ids: session.ids, logits: await session.logits(), rows };
  } finally {
    await session.close();
  }
}

async function checkFile(file: Uint8Array): Promise<void> {
  writeFileSync(path, file);
  const judged = await judge({ inputBytes: file.length }, restoreAll);
  if (!("value" in judged)) return;
  const { ids, logits, rows } = judged.value;
  const isSame = ids.join() === IDS.join() && logits.join() === LOGITS.join() &&
    [...SAVED].every(([name, bytes]) => rows.get(name)!.join() === bytes.join());
  if (!isSame) throw new Error("something else was restored than what was saved");
}

function fileOf(json: string, rest = data): Uint8Array {
  const bytes = bytesOf(json);
  const length = new Uint8Array(8);
  new DataView(length.buffer).setBigUint64(0, BigInt(bytes.length), true);
  return Buffer.concat([length, bytes, rest]);
}

fuzz("session: damaged bytes", { runs: 1500, arbitrary: damagedBytes(sound), check: checkFile });

const WORDS = [
  ...["h.0.k", "h.1.v", "h.2.k", "input_ids", "logits", "F16", "F32", "I32", "dtype", "shape"],
  ...["data_offsets"],
  ...["longform_session", "model", "positions", "attention", "crc32", "f32", "00000000", "exact"],
  ...["dense", "2"],
];

fuzz("session: a damaged header", {
  runs: 2000,
  arbitrary: damagedJson(jsonOf(header), WORDS).map(textOf),
  check: (text) => checkFile(fileOf(text)),
});

/** The checksums are JSON inside of JSON. */
function withChecksums(text: string): Json {
  return jsonOf({ ...header, __metadata__: { ...header.__metadata__, crc32: text } });
}

fuzz("session: damaged checksums", {
  runs: 800,
  arbitrary: fc.oneof(
    damagedJson(jsonOf(JSON.parse(header.__metadata__.crc32!)), WORDS).map(textOf),
    anyJson,
  ),
  check: (text) => checkFile(fileOf(textOf(withChecksums(text)))),
});

/** Shapes of one session, with its own sizes, over the same bytes. */
fuzz("session: other sizes in every tensor", {
  runs: 600,
  arbitrary: fc.record({
    layers: fc.nat(4),
    heads: fc.constantFrom(0, 1, 2, 3, 4, 2 ** 31, 2 ** 40),
    tokens: fc.constantFrom(0, 1, 3, 6, 2 ** 26, 2 ** 26 + 1, 2 ** 31),
    headDim: fc.constantFrom(0, 2, 4, 8, 2 ** 20),
    vocabSize: fc.constantFrom(0, 1, 5, 2 ** 31),
    elem: fc.constantFrom("F16", "F32"),
  }),
  check: async ({ layers, heads, tokens, headDim, vocabSize, elem }) => {
    let begin = 0;
    const entries: [string, unknown][] = [];
    const add = (name: string, dtype: string, shape: number[], size: number) => {
      const bytes = shape.reduce((product, one) => product * one, size);
      entries.push([name, { dtype, shape, data_offsets: [begin, begin += bytes] }]);
    };
    for (let layer = 0; layer < layers; layer++) {
      for (const which of ["k", "v"]) {
        add(`h.${layer}.${which}`, elem, [heads, tokens, headDim], elem === "F16" ? 2 : 4);
      }
    }
    add("input_ids", "I32", [tokens], 4);
    add("logits", "F32", [vocabSize], 4);
    const other = { __metadata__: header.__metadata__, ...Object.fromEntries(entries) };
    // Zeros of the length that the sizes ask for, where that is not absurd.
    await checkFile(fileOf(JSON.stringify(other), new Uint8Array(begin <= 1 << 16 ? begin : 0)));
  },
});

fuzz("session: any bytes", { runs: 300, arbitrary: anyBytes, check: checkFile });
