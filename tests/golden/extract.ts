/**
 * Takes from a folder of full reference outputs the small parts that the tests need. The books are in `texts` beside it;
 * their tokens must be those of the recorded prompts.
 *
 *   bun tests/golden/extract.ts REFERENCE_DIR
 */
import { readFileSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { loadTokenizer } from "../../src/model/tokenizer.ts";
import { type NamedTensor, parseSafetensors, writeSafetensors } from "../support/safetensors.ts";

const SHORT_LOGIT_POSITIONS = [0, 15, 31, 47];
const PROMPT_LOGIT_POSITIONS: Readonly<Record<number, readonly number[]>> = {
  1024: [0, 127, 512, 1023],
  4096: [0, 1023, 2048, 4095],
  16384: [0, 4095, 8192, 16383],
};
const SYNTHETIC_CASES = ["gpt2", "gpt2-medium", "gpt2-16k", "gpt2-64k"];
const PERPLEXITY_TOKENS = 16384;
const CLASSIFY_TOKENS = 16384;

const referenceDir = process.argv[2];
if (referenceDir === undefined) {
  console.error("usage: bun tests/golden/extract.ts REFERENCE_DIR");
  process.exit(2);
}
const goldenDir = dirname(fileURLToPath(import.meta.url));
const tokenizer = await loadTokenizer(join(goldenDir, "../../weights/classics-16k"));
const tokensOfBook = new Map<string, Int32Array>();

copyJson("tokenizer.json", (all) => all);
extractShort();
extractPrompt(1024);
extractPrompt(4096);
extractPrompt(16384);
extractPerplexity();
extractClassify();
copyJson("greedy.json", (all) => ({ note: all.note, cases: all.cases.map(greedyFields) }));
copyJson("synthetic.json", (all) => ({
  ...all,
  cases: Object.fromEntries(SYNTHETIC_CASES.map((name) => [name, all.cases[name]])),
}));

function extractShort(): void {
  const { metadata, tensors } = parseSafetensors(readFileSync(join(referenceDir!, "short.safetensors")));
  const logits = rowsOf(tensors.logits!, SHORT_LOGIT_POSITIONS);
  const reduced = { ...tensors, logits, logit_positions: int32Tensor(SHORT_LOGIT_POSITIONS) };
  writeFileSync(join(goldenDir, "short.safetensors"), writeSafetensors(metadata, reduced));
}

function extractPrompt(tokens: number): void {
  const name = `prompt_${tokens}.safetensors`;
  const { metadata, tensors } = parseSafetensors(readFileSync(join(referenceDir!, name)));
  const start = Number(metadata.start_token);
  const ids = tokensOf(metadata.text!).subarray(start, start + tokens);
  if (!ids.every((id, i) => id === tensors.input_ids!.data[i])) {
    throw new Error(`${metadata.text} has other tokens than ${name}`);
  }
  const positions = PROMPT_LOGIT_POSITIONS[tokens]!;
  const recorded = [...tensors.positions!.data];
  const reduced = {
    ...tensors,
    logits: rowsOf(tensors.logits!, positions.map((position) => recorded.indexOf(position))),
    positions: int32Tensor(positions),
  };
  writeFileSync(join(goldenDir, name), writeSafetensors(metadata, reduced));
}

/** The sums as they are, and the tokens that they are of, one tensor a window. */
function extractPerplexity(): void {
  copyJson("perplexity.json", (all) => all);
  const { sum_nll } = JSON.parse(readFileSync(join(referenceDir!, "perplexity.json"), "utf8"));
  const windows = (sum_nll as Loose[]).map(({ text, window }) => {
    const first = window * PERPLEXITY_TOKENS;
    const data = tokensOf(text).slice(first, first + PERPLEXITY_TOKENS);
    if (data.length !== PERPLEXITY_TOKENS) throw new Error(`${text} has no whole window ${window}`);
    return [`${text}.${window}`, { shape: [data.length], data }] as const;
  });
  writeFileSync(
    join(goldenDir, "perplexity.safetensors"),
    writeSafetensors({}, Object.fromEntries(windows)),
  );
}

/** The logits as they are, and the first 16,384 tokens of each document, whose beginnings the others are of. */
function extractClassify(): void {
  copyJson("classify.json", ({ note, correct, cases }) => ({ note, correct, cases }));
  const { cases } = JSON.parse(readFileSync(join(referenceDir!, "classify.json"), "utf8"));
  const longest = (cases as Loose[]).filter(({ tokens }) => tokens === CLASSIFY_TOKENS);
  const documents = longest.map(({ text, start_token, tokens }) => {
    const data = tokensOf(text).slice(start_token, start_token + tokens);
    if (data.length !== tokens) throw new Error(`${text} has no ${tokens} tokens from ${start_token} on`);
    return [text, { shape: [data.length], data }] as const;
  });
  writeFileSync(join(goldenDir, "classify.safetensors"), writeSafetensors({}, Object.fromEntries(documents)));
}

/** The tokens of a whole book, without anything added. */
function tokensOf(text: string): Int32Array {
  let ids = tokensOfBook.get(text);
  if (!ids) {
    ids = Int32Array.from(tokenizer.encode(readFileSync(join(referenceDir!, "../texts", text), "utf8")));
    tokensOfBook.set(text, ids);
  }
  return ids;
}

function int32Tensor(values: readonly number[]): NamedTensor {
  return { shape: [values.length], data: Int32Array.from(values) };
}

function rowsOf(matrix: NamedTensor, rows: readonly number[]): NamedTensor {
  const [height, width] = matrix.shape as [number, number];
  const data = new Float32Array(rows.length * width);
  rows.forEach((row, i) => {
    if (row < 0 || row >= height) throw new Error(`row ${row} is not among the ${height} recorded`);
    data.set((matrix.data as Float32Array).subarray(row * width, (row + 1) * width), i * width);
  });
  return { shape: [rows.length, width], data };
}

// deno-lint-ignore no-explicit-any -- the reference files are trusted; golden.ts types what comes out
type Loose = any;

function greedyFields(all: Loose): Loose {
  const { text, start_token, prompt_ids, greedy_ids, second_ids, top_logit, gap } = all;
  return { text, start_token, prompt_ids, greedy_ids, second_ids, top_logit, gap };
}

function copyJson(name: string, reduce: (all: Loose) => Loose): void {
  const reduced = reduce(JSON.parse(readFileSync(join(referenceDir!, name), "utf8")));
  writeFileSync(join(goldenDir, name), JSON.stringify(reduced) + "\n");
}
