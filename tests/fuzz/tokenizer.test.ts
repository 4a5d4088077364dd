/** Hostile tokenizer.json and tokenizer_config.json, and texts for those that are accepted. */
import { afterAll } from "bun:test";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import fc from "fast-check";
import { createTokenizer, type GPT2Tokenizer, loadTokenizer } from "../../src/model/tokenizer.ts";
import { temporaryFolder } from "../support/checkpoint.ts";
import { fuzz, judge, reportTallies } from "../support/fuzz.ts";
import {
  anyBytes,
  anyJson,
  bytesOf,
  damagedBytes,
  damagedJson,
  hostileText,
  jsonOf,
  textOf,
} from "../support/fuzz_input.ts";

reportTallies();
const folder = temporaryFolder();
afterAll(folder.remove);

/** GPT-2's spelling of the 256 bytes. */
const BYTES = Array.from({ length: 256 }, (_, byte) => byte)
  .map((byte) => (byte > 0x20 && byte < 0x7f) || (byte > 0xa0 && byte !== 0xad));
let next = 0x100;
const ALPHABET = BYTES.map((isPrintable, byte) => String.fromCharCode(isPrintable ? byte : next++));
const MERGED = ["he", "ll", "hell", "hello", "Ġhello", "aa", "aaaa", "Ġa", "ĠĠ"];
const MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello", "a a", "aa aa", "Ġ a", "Ġ Ġ"];
const TOKENIZER = {
  version: "1.0",
  truncation: null,
  padding: null,
  added_tokens: [
    {
      id: 265,
      content: "<|endoftext|>",
      single_word: false,
      lstrip: false,
      rstrip: false,
      normalized: false,
      special: true,
    },
  ],
  normalizer: null,
  pre_tokenizer: { type: "ByteLevel", add_prefix_space: false, trim_offsets: true, use_regex: true },
  post_processor: { type: "ByteLevel", add_prefix_space: true, trim_offsets: false, use_regex: true },
  decoder: { type: "ByteLevel" },
  model: {
    type: "BPE",
    dropout: null,
    unk_token: null,
    continuing_subword_prefix: "",
    end_of_word_suffix: "",
    fuse_unk: false,
    byte_fallback: false,
    ignore_merges: false,
    merges: MERGES,
    vocab: Object.fromEntries([...ALPHABET, ...MERGED].map((token, id) => [token, id])),
  },
};
const small = {
  ...TOKENIZER.model,
  merges: ["a a", "aa aa", "a b"],
  vocab: { a: 0, b: 1, aa: 2, aaaa: 3, ab: 4, Ġ: 5 },
};
const SMALL = {
  ...TOKENIZER,
  model: small,
  added_tokens: [{ id: 6, content: "<|endoftext|>", special: true }],
};
const OF_PARTS = {
  ...SMALL,
  pre_tokenizer: {
    type: "Sequence",
    pretokenizers: [
      { type: "Split", pattern: { String: "ab" }, behavior: "Isolated", invert: false },
      { type: "Digits", individual_digits: true },
      TOKENIZER.pre_tokenizer,
    ],
  },
};
const NORMALIZED = {
  ...SMALL,
  normalizer: { type: "Sequence", normalizers: [{ type: "NFC" }, { type: "Lowercase" }] },
};
const WORDS = [
  ...["ByteLevel", "BPE", "WordPiece", "Unigram", "Sequence", "Split", "Replace", "Prepend"],
  ...["FixedLength", "Metaspace", "Whitespace", "WhitespaceSplit", "Punctuation", "Digits"],
  ...["BertPreTokenizer", "Precompiled", "Strip", "NFKD", "type", "pattern", "Regex", "String"],
  ...["behavior", "invert", "length", "content", "prepend", "pretokenizers", "normalizers", "vocab"],
  ...["merges", "unk_token", "fuse_unk", "id", "a", "b", "Ġ", "end_of_word_suffix"],
  ...["continuing_subword_suffix", "ignore_merges", "byte_fallback", "add_prefix_space", "lstrip"],
  ...["added_tokens", "normalized", "special", "use_regex", "added_tokens_decoder", "(a+)+b", "a a"],
  ...["a b", "b b", "a  a", " "],
];

const TEXTS = ["hello hello", "aaaaaaa ab  a\n", "a".repeat(300), "b1 22 <|endoftext|>é漢😀", " \ud83d "];

/** Whether encoding is what it promises: ids of the vocabulary, and the text again unless something normalizes it. */
function requireSound(tokenizer: GPT2Tokenizer, text: string, isExact: boolean): void {
  const ids = tokenizer.encode(text);
  const isId = (id: unknown) =>
    Number.isInteger(id) && (id as number) >= 0 && (id as number) < tokenizer.vocabSize;
  if (!ids.every(isId)) throw new Error(`the ids ${JSON.stringify(ids)} of ${JSON.stringify(text)}`);
  if (isExact && tokenizer.decode(ids) !== text.toWellFormed()) {
    throw new Error(`${JSON.stringify(text)} comes back as ${JSON.stringify(tokenizer.decode(ids))}`);
  }
  const encoder = tokenizer.encoder(1);
  const pieces = [...[...text].flatMap((piece) => [...encoder.push(piece)]), ...encoder.end()];
  if (pieces.join() !== ids.join()) throw new Error(`${JSON.stringify(text)} has other ids in pieces`);
}

interface Files {
  /** JSON text, valid or not. */
  readonly tokenizer: string;
  readonly config: string;
}

/** Whether nothing in the files may change a text. */
function keepsText({ tokenizer, config }: Files): boolean {
  const { normalizer = null } = parsed(tokenizer) as { normalizer?: unknown };
  return normalizer === null && !/(?:strip|add_prefix_space)":(?!false)/.test(tokenizer + config);
}

async function checkFiles(files: Files, texts: readonly string[]): Promise<void> {
  const [tokenizer, config] = [parsed(files.tokenizer), parsed(files.config)];
  if (tokenizer === undefined) return;
  const inputBytes = files.tokenizer.length + files.config.length;
  // What remembers units has 6 MiB, whatever the file is, and ids index an array of 4 MiB at most.
  const allowance = { inputBytes, constantBytes: 16 << 20 };
  const judged = await judge(allowance, () => createTokenizer({ tokenizer, config, source: "a folder" }));
  if (!("value" in judged)) return;
  const isExact = keepsText(files);
  for (const text of texts) {
    const more = { ...allowance, inputBytes: inputBytes + text.length };
    await judge(more, () => requireSound(judged.value, text, isExact));
  }
}

function parsed(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

const BASES = [
  ["GPT-2's", TOKENIZER, 200],
  ["small", SMALL, 700],
  ["of parts", OF_PARTS, 500],
  ["normalized", NORMALIZED, 300],
] as const;
const CONFIGS = ["{}", '{"add_prefix_space":true}', '{"added_tokens_decoder":{"7":{"content":"<a>"}}}'];

for (const [name, base, runs] of BASES) {
  fuzz(`tokenizer.json, ${name}: damaged JSON`, {
    runs,
    share: name === "GPT-2's" ? 0.3 : 1,
    arbitrary: fc.tuple(
      damagedJson(jsonOf(base), WORDS).map(textOf),
      fc.constantFrom(...CONFIGS),
      hostileText,
    ),
    check: ([tokenizer, config, text]) => checkFiles({ tokenizer, config }, [...TEXTS, text]),
  });
}

const CONFIG = {
  add_prefix_space: false,
  added_tokens_decoder: {
    "6": { content: "<|endoftext|>", special: true },
    "7": { content: "<b>", lstrip: false },
  },
  model_max_length: 1024,
};

fuzz("tokenizer_config.json: damaged JSON", {
  runs: 120,
  share: 0.2,
  arbitrary: damagedJson(jsonOf(CONFIG), WORDS).map(textOf),
  check: (config) => checkFiles({ tokenizer: JSON.stringify(SMALL), config }, TEXTS),
});

fuzz("tokenizer.json: damaged bytes and any JSON, from a file", {
  runs: 600,
  arbitrary: fc.oneof(damagedBytes(bytesOf(JSON.stringify(SMALL))), anyJson.map(bytesOf), anyBytes),
  check: async (bytes) => {
    writeFileSync(join(folder.path, "tokenizer.json"), bytes);
    await judge({ inputBytes: bytes.length, constantBytes: 16 << 20 }, () => loadTokenizer(folder.path));
  },
});
