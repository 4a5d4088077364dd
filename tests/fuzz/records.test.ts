/** Hostile documents: UTF-8, lines, JSON records, prompts, token ids, and results that a run goes on behind. */
import { afterAll } from "bun:test";
import { readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import fc from "fast-check";
import { type InputDocument, LineSplitter, openFiles, openJsonl } from "../../src/cli/documents.ts";
import { readLines } from "../../src/cli/generate_batch.ts";
import { decodePieces, openText, readIds } from "../../src/cli/input.ts";
import { ResultFile } from "../../src/cli/result_file.ts";
import { temporaryFolder } from "../support/checkpoint.ts";
import { fuzz, judge, reportTallies, requireShowable } from "../support/fuzz.ts";
import {
  anyBytes,
  anyJson,
  bytesOf,
  damagedBytes,
  damagedJson,
  HOSTILE_TEXTS,
  hostileText,
  jsonOf,
  textOf,
} from "../support/fuzz_input.ts";

reportTallies();
const folder = temporaryFolder();
afterAll(folder.remove);
const path = join(folder.path, "input");

/** The buffer that a file is read through, and a text's or a chunk's copy. */
const READING = 4 << 20;

/**
 * Where bytes stop being UTF-8, by table 3-7 of the Unicode Standard (section 3.9): of a character that is broken, its
 * first byte. The text's length where all is well.
 */
function firstNotUtf8(bytes: Uint8Array): number {
  for (let at = 0; at < bytes.length;) {
    const [lead, second] = [bytes[at]!, bytes[at + 1] ?? 0];
    const length = lead < 0x80
      ? 1
      : lead < 0xc2
      ? 0
      : lead < 0xe0
      ? 2
      : lead < 0xf0
      ? 3
      : lead < 0xf5
      ? 4
      : 0;
    const least = lead === 0xe0 ? 0xa0 : lead === 0xf0 ? 0x90 : 0x80;
    const most = lead === 0xed ? 0x9f : lead === 0xf4 ? 0x8f : 0xbf;
    const rest = bytes.subarray(at + 1, at + Math.max(1, length));
    const isWhole = length > 0 && rest.length === length - 1 &&
      (length === 1 || (second >= least && second <= most)) && rest.every((byte) => (byte & 0xc0) === 0x80);
    if (!isWhole) return at;
    at += length;
  }
  return bytes.length;
}

/** Bytes near UTF-8: every kind of lead and continuation, and the edges of their ranges. */
const nearUtf8 = fc.oneof(
  fc.array(
    fc.constantFrom(
      ...[0x00, 0x41, 0x7f, 0x80, 0x8f, 0x90, 0x9f, 0xa0, 0xbf, 0xc0, 0xc2, 0xdf, 0xe0, 0xe2, 0xed, 0xef],
      ...[0xf0, 0xf3, 0xf4, 0xf5, 0xf8, 0xff],
    ),
    { maxLength: 12 },
  ).map((bytes) => Uint8Array.from(bytes)),
  fc.string({ unit: "binary", maxLength: 12 }).chain((text) => damagedBytes(bytesOf(text))),
  fc.string({ unit: "binary", maxLength: 12 }).map(bytesOf),
);
const cuts = fc.array(fc.integer({ min: 1, max: 5 }), { minLength: 1, maxLength: 6 });

/** The bytes in chunks of these lengths, over and over, in one buffer that each is written to again. */
function* chunksOf(bytes: Uint8Array, lengths: readonly number[]): Generator<Uint8Array> {
  const buffer = new Uint8Array(8);
  for (let at = 0, i = 0; at < bytes.length; i++) {
    const chunk = bytes.subarray(at, at + lengths[i % lengths.length]!);
    buffer.set(chunk);
    yield buffer.subarray(0, chunk.length);
    buffer.fill(0xee);
    at += chunk.length;
  }
}

async function* asynchronous<T>(values: Iterable<T>): AsyncGenerator<T> {
  yield* values;
}

fuzz("UTF-8 in chunks: the same text, or the byte where it ends", {
  runs: 3000,
  arbitrary: fc.tuple(nearUtf8, cuts),
  check: async ([bytes, lengths]) => {
    const pieces: string[] = [];
    const judged = await judge({ inputBytes: bytes.length }, async () => {
      for await (const piece of decodePieces(asynchronous(chunksOf(bytes, lengths)), "the input")) {
        pieces.push(piece);
      }
    });
    const valid = firstNotUtf8(bytes);
    if ("error" in judged) {
      const place = Number(/byte (\d+) begins no valid character/.exec(judged.error.message)?.[1]);
      if (place !== valid) throw new Error(`${judged.error.message}: it is byte ${valid}`);
    } else if (valid < bytes.length) throw new Error(`byte ${valid} was accepted`);
    const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    const text = pieces.join("");
    const whole = decoder.decode(bytes.subarray(0, valid));
    if ("value" in judged ? text !== whole : !whole.startsWith(text)) throw new Error("another text");
    if (pieces.some((piece) => piece === "" || !piece.isWellFormed())) throw new Error("half a character");
  },
});

fuzz("lines in chunks: the same as of the whole", {
  runs: 2000,
  arbitrary: fc.tuple(fc.array(fc.constantFrom(0x0a, 0x0d, 0x41, 0x42), { maxLength: 40 }), cuts, fc.nat(6)),
  check: async ([content, lengths, most]) => {
    const bytes = Uint8Array.from(content);
    const lines: (string | undefined)[] = [];
    await judge({ inputBytes: bytes.length }, () => {
      const splitter = new LineSplitter(most);
      const add = ({ number, bytes }: { number: number; bytes: Uint8Array | undefined }) => {
        lines.push(bytes && Buffer.from(bytes).toString("latin1"));
        if (number !== lines.length) throw new Error(`line ${lines.length} has the number ${number}`);
      };
      for (const chunk of chunksOf(bytes, lengths)) for (const line of splitter.push(chunk)) add(line);
      const last = splitter.end();
      if (last) add(last);
    });
    const whole = Buffer.from(bytes).toString("latin1").split("\n");
    if (whole.at(-1) === "") whole.pop();
    const expected = whole.map((line) => line.length > most ? undefined : line);
    if (JSON.stringify(lines) !== JSON.stringify(expected)) {
      throw new Error(JSON.stringify([lines, expected]));
    }
  },
});

fuzz("text files: the newline at the end and nothing else is dropped", {
  runs: 500,
  arbitrary: fc.tuple(hostileText, fc.constantFrom("", "\n", "\r\n", "\r", "\n\n", "\r\r\n")),
  check: async ([text, end]) => {
    const bytes = bytesOf(text + end);
    writeFileSync(path, bytes);
    const judged = await judge({ inputBytes: bytes.length, constantBytes: READING }, async () => {
      const input = await openText(path, { dropsFinalNewline: true });
      const pieces: string[] = [];
      for await (const piece of input.pieces) pieces.push(piece);
      await input.close();
      return pieces.join("");
    });
    if (!("value" in judged)) throw judged.error;
    const whole = (text + end).toWellFormed();
    if (judged.value !== whole.replace(/\r?\n$/, "")) throw new Error(JSON.stringify(judged.value));
  },
});

async function documentsOf(paths: readonly string[], isJsonl: boolean): Promise<InputDocument[]> {
  const collection = isJsonl
    ? await openJsonl(paths, { expected: "label" })
    : await openFiles(paths, { hasExpected: true });
  const documents: InputDocument[] = [];
  try {
    for await (const document of collection.documents()) documents.push(document);
  } finally {
    await collection.close();
  }
  return documents;
}

function requireSound(document: InputDocument, index: number): void {
  if (document.index !== index) throw new Error(`document ${index} has the index ${document.index}`);
  if (typeof document.id !== "string" && !Number.isSafeInteger(Math.trunc(document.id))) {
    throw new Error("its id");
  }
  if ("error" in document) return requireShowable(document.error);
  if ("text" in document && (typeof document.text !== "string" || document.text === "")) {
    throw new Error("no text");
  }
  if (
    "ids" in document && !(document.ids.length > 0 && document.ids.every((id) => id >= 0 && id < 2 ** 32))
  ) {
    throw new Error("its ids");
  }
  if (typeof document.expected !== "string") throw new Error("no expected label");
}

const RECORD = { id: "a", text: "It was the best of times", label: "classics", more: { ids: [1, 2] } };
const IDS_RECORD = { id: 7, ids: [464, 2068, 0], label: 1 };
const RECORD_WORDS = ["id", "text", "ids", "label", "prompt", "__proto__", "hasOwnProperty"];
const record = fc.oneof(
  damagedJson(jsonOf(RECORD), RECORD_WORDS).map(textOf),
  damagedJson(jsonOf(IDS_RECORD), RECORD_WORDS).map(textOf),
  anyJson,
  fc.constantFrom("", " \t", JSON.stringify(RECORD), ...HOSTILE_TEXTS),
);
const lineEnd = fc.constantFrom("\n", "\n", "\r\n", "\n\n");
const recordFile = fc.tuple(
  fc.constantFrom("", "", "\ufeff"),
  fc.array(fc.tuple(record, lineEnd), { minLength: 1, maxLength: 4 }),
).map(([mark, lines]) => mark + lines.flat().join(""));

fuzz("classify --jsonl: a document for each line that is not blank", {
  runs: 1500,
  arbitrary: fc.oneof(
    { weight: 5, arbitrary: recordFile.map(bytesOf) },
    {
      weight: 1,
      arbitrary: damagedBytes(bytesOf(`${JSON.stringify(RECORD)}\n${JSON.stringify(IDS_RECORD)}\n`)),
    },
    { weight: 1, arbitrary: anyBytes },
  ),
  check: async (bytes) => {
    writeFileSync(path, bytes);
    const judged = await judge(
      { inputBytes: bytes.length, constantBytes: READING },
      () => documentsOf([path], true),
    );
    if (!("value" in judged)) throw judged.error;
    judged.value.forEach(requireSound);
    const lines = Buffer.from(bytes).toString("latin1").replace(/^\xef\xbb\xbf/, "").split("\n")
      .filter((line) => /[^ \t\r]/.test(line));
    if (judged.value.length !== lines.length) {
      throw new Error(`${judged.value.length} of ${lines.length} lines`);
    }
  },
});

fuzz("classify FILE: any bytes and any name are a document, or an error of one", {
  runs: 400,
  arbitrary: fc.tuple(
    fc.oneof(nearUtf8, anyBytes),
    fc.string({ unit: "binary", minLength: 1, maxLength: 20 }).map((name) => name.replace(/[/\0]/g, "_")),
  ),
  check: async ([bytes, name]) => {
    // Names that are patterns, or stand for folders, or have a spelling of their own in the file system, have tests of
    // their own.
    if (/^[.-]|[*?[{]/.test(name) || !name.isWellFormed()) return;
    const file = join(folder.path, name);
    writeFileSync(file, bytes);
    const judged = await judge(
      { inputBytes: bytes.length, constantBytes: READING },
      () => documentsOf([file], false),
    );
    rmSync(file);
    if (!("value" in judged)) throw judged.error;
    judged.value.forEach(requireSound);
    if (judged.value.length !== 1) throw new Error(`${judged.value.length} documents`);
  },
});

const PROMPT = { id: "a", prompt: "Once upon a time" };

fuzz("generate --prompts: a prompt or an error for each line that is not empty", {
  runs: 1500,
  arbitrary: fc.oneof(
    fc.array(
      fc.tuple(fc.oneof(damagedJson(jsonOf(PROMPT), RECORD_WORDS).map(textOf), anyJson), lineEnd),
      { maxLength: 4 },
    ).map((lines) => bytesOf(`${JSON.stringify(PROMPT)}\n${lines.flat().join("")}`)),
    recordFile.map(bytesOf),
    anyBytes,
  ),
  check: async (bytes) => {
    writeFileSync(path, bytes);
    const judged = await judge({ inputBytes: bytes.length, constantBytes: READING }, () => readLines(path));
    if (!("value" in judged)) return;
    const text = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
    const lines = text.split("\n").filter((line) => line.trim() !== "");
    if (judged.value.length !== lines.length) {
      throw new Error(`${judged.value.length} of ${lines.length} lines`);
    }
    for (const line of judged.value) {
      if ("error" in line) requireShowable(line.error);
      else if (typeof line.text !== "string") throw new Error("no text");
      // What is printed must name the record that it is of.
      if (JSON.stringify(line.id) === "null") throw new Error("an id that is lost when it is written");
    }
  },
});

fuzz("--ids: token ids or an error", {
  runs: 1500,
  arbitrary: fc.oneof(
    damagedJson(jsonOf([464, 2068, 7586, 0])).map(textOf).map(bytesOf),
    damagedBytes(bytesOf("[464, 2068, 7586, 0]")),
    anyJson.map(bytesOf),
    anyBytes,
  ),
  check: async (bytes) => {
    writeFileSync(path, bytes);
    const judged = await judge({ inputBytes: bytes.length, constantBytes: READING }, () => readIds(path));
    if (!("value" in judged)) return;
    const parsed: unknown = JSON.parse(new TextDecoder().decode(bytes));
    if (JSON.stringify(judged.value) !== JSON.stringify(parsed)) throw new Error("other ids");
    if (judged.value.length === 0 || judged.value.some((id) => !Number.isInteger(id) || id < 0)) {
      throw new Error("ids");
    }
  },
});

const LABELS = ["crime", "romance"];
const RESULTS = [
  {
    id: "a",
    tokens: 3,
    label: "crime",
    scores: { crime: 0.9, romance: 0.1 },
    logits: { crime: 2, romance: 0 },
  },
  { id: 2, error: "line 2 is not JSON" },
  {
    id: "c",
    tokens: 1,
    label: "romance",
    scores: { romance: 1, crime: 0 },
    logits: { romance: 9, crime: 1 },
  },
];
const resultText = RESULTS.map((result) => `${JSON.stringify(result)}\n`).join("");

fuzz("--out --resume: complete results stay, anything else is refused and left alone", {
  runs: 1500,
  arbitrary: fc.oneof(
    damagedBytes(bytesOf(resultText)),
    fc.tuple(damagedJson(jsonOf(RESULTS[0]), ["id", "logits", "error", ...LABELS]), fc.boolean()).map((
      [json, isLast],
    ) => bytesOf(isLast ? `${resultText}${textOf(json)}` : `${textOf(json)}\n${resultText}`)),
    anyJson.map((json) => bytesOf(`${resultText}${json}\n`)),
    anyBytes,
  ),
  check: async (bytes) => {
    writeFileSync(path, bytes);
    const judged = await judge({ inputBytes: bytes.length, constantBytes: READING }, async () => {
      const file = await ResultFile.open(path, { resume: true, labels: LABELS });
      try {
        const { done } = file;
        for (let i = 0; i < done; i++) file.matches(RESULTS[i]?.id ?? "none");
        file.finishSkipping();
        return done;
      } finally {
        await file.close();
      }
    });
    const left = readFileSync(path);
    const complete = Buffer.from(bytes).lastIndexOf("\n") + 1;
    if ("value" in judged) {
      if (!left.equals(bytes.subarray(0, complete))) throw new Error("other bytes than the complete lines");
      const lines = left.toString("latin1").split("\n").length - 1;
      if (judged.value !== lines) throw new Error(`${judged.value} of ${lines} results`);
    } else if (!left.equals(bytes) && !left.equals(bytes.subarray(0, complete))) {
      throw new Error("a file that was refused was changed");
    }
  },
});
