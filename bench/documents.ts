/**
 * Documents of many lengths, cut from texts: JSON lines with an id, a text and, where the texts lie in folders, the folder as
 * the label. The same in every run.
 *
 *   bun bench/documents.ts --count 2000 --from 100 --to 16384 [--spread log|even] [--seed 1] TEXT… > documents.jsonl
 *   bun bench/documents.ts --windows 16384 TEXT… > windows.jsonl    # all whole windows of so many tokens, as ids
 */
import { readFileSync } from "node:fs";
import { basename, dirname } from "node:path";
import { parseArgs } from "node:util";
import { writeResult } from "../src/cli/output.ts";
import { DEFAULT_MODEL } from "../src/model/run_settings.ts";
import { uniform } from "../src/model/sampling.ts";
import { loadTokenizer } from "../src/model/tokenizer.ts";

/** Characters of a token in English books, to aim at a number of tokens. */
const CHARACTERS_PER_TOKEN = 3.9;

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    count: { type: "string", default: "2000" },
    from: { type: "string", default: "100" },
    to: { type: "string", default: "16384" },
    spread: { type: "string", default: "log" },
    seed: { type: "string", default: "1" },
    windows: { type: "string" },
  },
});
if (positionals.length === 0) throw new Error("name the texts to cut documents from");
const [count, from, to, seed] = [values.count, values.from, values.to, values.seed].map(Number) as [
  number,
  number,
  number,
  number,
];
const texts = positionals.map((path) => ({ path, text: readFileSync(path, "utf8") }));
if (values.windows === undefined) writeDocuments();
else await writeWindows(Number(values.windows));

async function writeWindows(tokens: number): Promise<void> {
  const tokenizer = await loadTokenizer(DEFAULT_MODEL);
  for (const { path, text } of texts) {
    const all = tokenizer.encode(text);
    for (let first = 0; first + tokens <= all.length; first += tokens) {
      const id = `${basename(path)}:${first}`;
      const record = { id, ids: all.slice(first, first + tokens), label: basename(dirname(path)) };
      writeResult(JSON.stringify(record) + "\n");
    }
  }
}

function writeDocuments(): void {
  for (let i = 0; i < count; i++) writeDocument(i);
}

function writeDocument(i: number): void {
  const [which, length, place] = [0, 1, 2].map((j) => uniform(seed, 3 * i + j)) as [number, number, number];
  const tokens = values.spread === "log" ? from * (to / from) ** length : from + (to - from) * length;
  const { path, text } = texts[Math.floor(which * texts.length)]!;
  const characters = Math.min(text.length, Math.round(tokens * CHARACTERS_PER_TOKEN));
  // At the beginning of a word.
  const start = text.indexOf(" ", Math.floor(place * (text.length - characters))) + 1;
  const record = { id: i, text: text.slice(start, start + characters), label: basename(dirname(path)) };
  writeResult(JSON.stringify(record) + "\n");
}
