/**
 * Text to ids: by the library alone, by `encodeUpTo` as it meets the words and when it knows them all, and by
 * `EncodingPool` with threads that know them. All must give the same ids.
 *
 *     bun bench/tokenizer.ts FILE.txt ... [--model DIR] [--document 16000] [--workers 0,1,2,4]
 *         [--out FILE.json] [--commit ID]
 *
 * Files are cut into documents of so many characters. On Deno: `deno run -A bench/tokenizer.ts FILE.txt ...`.
 */
import { readFileSync } from "node:fs";
import { availableParallelism } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { EncodingPool } from "../src/model/encoding_pool.ts";
import { readJsonObject } from "../src/model/json_file.ts";
import { createTokenizer, encodeUpTo, type GPT2Tokenizer, loadTokenizer } from "../src/model/tokenizer.ts";
import { provenance, writeResult } from "./provenance.ts";

const { values, positionals: files } = parseArgs({
  allowPositionals: true,
  options: {
    model: { type: "string", default: "weights/classics-16k" },
    document: { type: "string", default: "16000" },
    workers: { type: "string", default: "0,1,2,4" },
    commit: { type: "string" },
    out: { type: "string" },
  },
});
if (files.length === 0) throw new Error("Name the text files to encode");

const ROUNDS = 5;
const documentLength = Number(values.document);
const documents = files.flatMap((file) => {
  const text = readFileSync(file, "utf8");
  const count = Math.ceil(text.length / documentLength);
  return Array.from({ length: count }, (_, i) => text.slice(i * documentLength, (i + 1) * documentLength));
});
const bytes = documents.reduce((sum, text) => sum + new TextEncoder().encode(text).length, 0);

type Encode = () => readonly Uint32Array[] | Promise<readonly Uint32Array[]>;

const rows: {
  how: string;
  mbPerSecond: { median: number; min: number; max: number };
  tokensPerSecond: number;
}[] = [];
let expected: readonly Uint32Array[] | undefined;
let tokens = 0;

/** @param prepare called before each round, and not timed */
async function measure(how: string, prepare: () => Encode | Promise<Encode>): Promise<void> {
  const speeds: number[] = [];
  for (let round = 0; round < ROUNDS; round++) {
    const encode = await prepare();
    const starting = performance.now();
    const ids = await encode();
    speeds.push(bytes / 1000 / (performance.now() - starting));
    expected ??= ids;
    tokens = ids.reduce((sum, { length }) => sum + length, 0);
    const differs = ids.findIndex((some, i) => some.join() !== expected![i]!.join());
    if (differs >= 0) throw new Error(`${how} gives document ${differs} other ids than the library`);
  }
  speeds.sort((a, b) => a - b);
  const [median, min, max] = [speeds[ROUNDS >> 1]!, speeds[0]!, speeds.at(-1)!];
  const tokensPerSecond = Math.round(median * 1e6 * tokens / bytes);
  rows.push({ how, mbPerSecond: { median, min, max }, tokensPerSecond });
  const range = `${median.toFixed(1)} (${min.toFixed(1)} to ${max.toFixed(1)})`;
  console.log(`| ${how} | ${range} | ${(tokensPerSecond / 1e6).toFixed(2)} |`);
}

function encodeWith(tokenizer: GPT2Tokenizer): Encode {
  return () => documents.map((text) => encodeUpTo(tokenizer, text, Infinity).ids);
}

/** A tokenizer that hands the library whole texts: a cut could split one of its tokens, which no text has. */
async function loadLibrary(): Promise<GPT2Tokenizer> {
  const json = await readJsonObject(join(values.model, "tokenizer.json"));
  const { vocabSize } = await loadTokenizer(values.model);
  const token = { id: vocabSize, content: "\u{10fffd} \u{10fffd}", special: true };
  const listed = Array.isArray(json.added_tokens) ? json.added_tokens as object[] : [];
  return createTokenizer({ tokenizer: { ...json, added_tokens: [...listed, token] }, source: values.model });
}

console.log("| how | MB/s (median of 5, range) | million tokens/s |\n| --- | --- | --- |");
const library = await loadLibrary();
await measure("library", () => encodeWith(library));
await measure("new words", async () => encodeWith(await loadTokenizer(values.model)));
const tokenizer = await loadTokenizer(values.model);
await encodeWith(tokenizer)();
await measure("known words", () => encodeWith(tokenizer));
for (const workers of values.workers.split(",").map(Number)) {
  const pool = await EncodingPool.open(values.model, workers);
  const encode: Encode = async () => {
    const all = await Promise.all(documents.map((text) => pool.encode(text, Infinity)));
    return all.map(({ ids }) => ids);
  };
  // Each thread has to meet the words, and which documents it gets is up to chance.
  for (let round = 0; round < 2 * workers + 1; round++) await encode();
  await measure(`pool, ${workers} ${workers === 1 ? "thread" : "threads"}`, () => encode);
  await pool.close();
}
if (values.out) {
  const cores = availableParallelism();
  writeResult(values.out, { cores, ...provenance(values.commit), documentLength, bytes, tokens, rows });
}
