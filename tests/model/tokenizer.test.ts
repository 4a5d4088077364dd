import { describe, expect, test } from "bun:test";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import {
  createTokenizer,
  encodeUpTo,
  type GPT2Tokenizer,
  loadTokenizer,
  StreamDecoder,
} from "../../src/model/tokenizer.ts";
import { isWhiteSpace, UnitEncoder } from "../../src/model/unit_encoder.ts";
import { LongformError, ModelError } from "../../src/runtime/errors.ts";
import { loadTokenizerCases } from "../support/golden.ts";

const modelDir = join(dirname(fileURLToPath(import.meta.url)), "../../weights/classics-16k");
const tokenizer = await loadTokenizer(modelDir);
const endOfText = tokenizer.tokenToId("<|endoftext|>")!;
const original = JSON.parse(readFileSync(join(modelDir, "tokenizer.json"), "utf8")) as Record<
  string,
  unknown
>;

/** The tokenizer with parts of its tokenizer.json replaced. */
function build(changes: object, config?: object): GPT2Tokenizer {
  return createTokenizer({ tokenizer: { ...original, ...changes }, config, source: "test" });
}

/** A seeded generator of integers below n, good enough for choosing test inputs. */
function picker(seed: number): (n: number) => number {
  let state = seed >>> 0;
  return (n) => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return Math.floor(state / 2 ** 32 * n);
  };
}

function streamed(ids: readonly number[]): string[] {
  const decoder = new StreamDecoder(tokenizer);
  return [...ids.map((id) => decoder.push(id)), decoder.flush()];
}

describe("encode", () => {
  test("gives the recorded ids for all 200 reference strings", () => {
    const cases = loadTokenizerCases();
    expect(cases.length).toBe(200);
    for (const { text, ids } of cases) {
      expect({ text, ids: tokenizer.encode(text) }).toEqual({ text, ids: [...ids] });
    }
  });

  test("takes U+0085 as white space and U+FEFF as none, like the Rust tokenizers", () => {
    expect(tokenizer.encode("\u0085's")).toEqual([127, 228, 378]);
    expect(tokenizer.encode("\ufeff's")).toEqual([172, 120, 124, 7, 83]);
  });

  test("takes time in proportion to the text", () => {
    const word = "It was the best of times, it was the worst of times; 1859.\n";
    const millisecondsFor = (characters: number) => {
      const text = word.repeat(Math.ceil(characters / word.length));
      const start = performance.now();
      tokenizer.encode(text);
      return performance.now() - start;
    };
    millisecondsFor(10_000);
    const small = Math.min(...[1, 2, 3].map(() => millisecondsFor(20_000)));
    const large = Math.min(...[1, 2, 3].map(() => millisecondsFor(320_000)));
    expect(large / small).toBeLessThan(16 * 4); // quadratic would be 256
  });

  test("survives one word of 30,000 letters", () => {
    const text = "abcdefghij".repeat(3000);
    expect(tokenizer.decode(tokenizer.encode(text))).toBe(text);
  });
});

/** What the pre-tokenizer, added tokens and the cuts could take offence at. */
const FRAGMENTS = [
  ..."aZé漢ſ7٣½'-.!😀👍🏽\u0301\u200d\ufeff\0",
  ...["\ud83d", "\ude00"],
  ..."    \n\t\v\u0085\u00a0\u2003\u2028\u3000",
  ...["  ", "   ", "\n\n", "\r\n"],
  ...["don't", "'s", "we'll", "'re", "naïve", " the", "The ", "3.14", "1859", "...", "東京", "👨‍👩‍👧"],
  ...["<|endoftext|>", "<|endoftext|>", "<|endof", "text|>", "<a b>", "<a ", "b>", "<mask>", "é\u0301", "ﬁ"],
];

function randomText(pick: (n: number) => number, fragments: number): string {
  return Array.from({ length: fragments }, () => FRAGMENTS[pick(FRAGMENTS.length)]!).join("");
}

/** Cut anywhere, inside of surrogate pairs too; some pieces are empty. */
function randomPieces(pick: (n: number) => number, text: string): string[] {
  const longest = 1 + pick(12);
  const pieces: string[] = [];
  for (let at = 0; at < text.length;) {
    const length = pick(longest + 1);
    pieces.push(text.slice(at, at + length));
    at += length;
  }
  return pieces;
}

const byteLevel = original.pre_tokenizer as object;

function added(...tokens: object[]) {
  return {
    added_tokens: [
      ...original.added_tokens as object[],
      ...tokens.map((token, i) => ({ id: 8192 + i, normalized: false, special: true, ...token })),
    ],
  };
}

/** Words that come again and again, beside the fragments. */
function randomProse(pick: (n: number) => number, words: number): string {
  const spaces = [" ", " ", " ", "  ", "\n", "\r\n", "\t", "\u3000", ""];
  const word = () =>
    pick(3) === 0
      ? randomText(pick, 1 + pick(3))
      : "abcdefgh".slice(pick(4), 4 + pick(5)).repeat(1 + pick(2));
  return Array.from({ length: words }, () => spaces[pick(spaces.length)]! + word()).join("");
}

describe("encode unit by unit", () => {
  /** A token that no text here has and that a cut could split: the library gets every text as a whole. */
  const uncuttable = { content: "\u{10fffd} \u{10fffd}" };
  const variants: readonly (readonly [name: string, changes: object[], prefix?: boolean])[] = [
    ["GPT-2's", []],
    ["added tokens of white space", [{ content: "  " }, { content: "\n" }, { content: " b" }]],
    ["added tokens inside of words", [{ content: "cd" }, { content: "é" }, {
      content: "<mask>",
      normalized: true,
    }]],
    ["a space in front", [], true],
    ["a space in front and added tokens", [{ content: "  " }, { content: " b" }, { content: "cd" }], true],
  ];

  for (const [name, tokens, prefix = false] of variants) {
    test(`gives the library's ids of the whole text: ${name}`, () => {
      const config = { add_prefix_space: prefix };
      const units = build(added(...tokens), config);
      const whole = build(added(...tokens, uncuttable), config);
      expect([...whole.encoder(1).push("a b")]).toEqual([]);
      expect([...units.encoder(1).push("a b")]).not.toEqual([]);
      const pick = picker(6);
      for (let round = 0; round < 600; round++) {
        const text = pick(2) === 0 ? randomText(pick, pick(60)) : randomProse(pick, pick(40));
        expect({ text, ids: units.encode(text) }).toEqual({ text, ids: whole.encode(text) });
      }
    });
  }

  test("finds characters without tokens in every unit, every time", () => {
    const small = build({
      model: { type: "BPE", vocab: { a: 0, b: 1, Ġ: 2 }, merges: [] },
      added_tokens: [],
    });
    for (let round = 0; round < 3; round++) {
      expect(small.encode("ab a b")).toEqual([0, 1, 2, 0, 2, 1]);
      expect(() => small.encode("a b ac b")).toThrow("has no tokens for some characters");
    }
  });

  test("knows white space as Unicode does", () => {
    const pattern = /\p{White_Space}/u;
    const differences = Array.from({ length: 0x10000 }, (_, unit) => unit)
      .filter((unit) => isWhiteSpace(unit) !== pattern.test(String.fromCharCode(unit)));
    expect(differences).toEqual([]);
    let beyond = "";
    for (let codePoint = 0x10000; codePoint < 0x110000; codePoint++) {
      beyond += String.fromCodePoint(codePoint);
    }
    expect(pattern.test(beyond)).toBe(false);
  });
});

describe("UnitEncoder", () => {
  /** Gives each character its code as an id, and remembers what it was asked. */
  function characters(capacity?: number) {
    const asked: string[] = [];
    const encoder = new UnitEncoder(
      (unit) => {
        asked.push(unit);
        return [...unit].map((char) => char.codePointAt(0)!);
      },
      isWhiteSpace,
      capacity,
    );
    const encode = (text: string) => String.fromCodePoint(...encoder.encode(text));
    return { asked, encode };
  }

  test("asks for each unit once", () => {
    const { asked, encode } = characters();
    expect(encode("")).toBe("");
    for (let round = 0; round < 2; round++) {
      expect(encode("so so\n\n so\u0085😀 so  ")).toBe("so so\n\n so\u0085😀 so  ");
    }
    expect(asked).toEqual(["so", " so", "\n\n so", "\u0085😀", "  "]);
  });

  test("does not remember units of more than 64 code units", () => {
    const { asked, encode } = characters();
    const kept = "a".repeat(64);
    for (const text of [kept, kept, `${kept}b`, `${kept}b`, kept]) expect(encode(text)).toBe(text);
    expect(asked).toEqual([kept, `${kept}b`, `${kept}b`]);
  });

  test("forgets without harm, whichever of its arrays is full first", () => {
    const pick = picker(7);
    const { asked, encode } = characters(64);
    for (const longest of [3, 30, 64]) {
      const words = Array.from({ length: 500 }, (_, i) => `${i}`.padEnd(1 + pick(longest), "é漢"));
      for (let round = 0; round < 300; round++) {
        const text = Array.from({ length: 30 }, () => words[pick(words.length)]!).join(" ");
        expect(encode(text)).toBe(text);
      }
    }
    const before = asked.length;
    encode("the same words come again");
    encode("the same words come again");
    expect(asked.length).toBe(before + 5);
    for (const length of [1, 60, 190]) {
      const encoder = new UnitEncoder((unit) => new Array<number>(length).fill(unit.length), () => true, 64);
      for (let i = 0; i < 1000; i++) {
        expect(encoder.encode("a".repeat(i % 40))).toEqual(
          new Uint32Array(i % 40 === 0 ? 0 : length).fill(i % 40),
        );
      }
    }
  });

  test("keeps neither a text alive nor all the units it was ever given", () => {
    const encoder = new UnitEncoder(() => [1], isWhiteSpace);
    const used = () => {
      Bun.gc(true);
      return process.memoryUsage().rss;
    };
    const encodeTexts = (from: number) => {
      const word = "x".repeat(1 << 20);
      for (let i = from; i < from + 200; i++) {
        const units = Array.from({ length: 1000 }, (_, j) => `${i}-${j}-units-of-their-own`).join(" ");
        expect(encoder.encode(`${word} ${units}`).length).toBe(1001);
      }
    };
    encodeTexts(0);
    const before = used();
    encodeTexts(200);
    expect(used() - before).toBeLessThan(50e6); // 200 MB of text
  }, 20_000);
});

describe("encoder", () => {
  const model = original.model as { vocab: Record<string, number>; merges: [string, string][] };
  const withoutWords = Object.fromEntries(
    Object.entries(model.vocab).filter(([token]) => token.length === 1 || !/[aeh]/.test(token)),
  );

  const encodable: readonly (readonly [name: string, tokenizer: GPT2Tokenizer])[] = [
    ["GPT-2's", tokenizer],
    [
      "a pre-tokenizer in a sequence",
      build({ pre_tokenizer: { type: "Sequence", pretokenizers: [byteLevel] } }),
    ],
    ["added tokens of white space", build(added({ content: "  " }, { content: "\n" }, { content: " b" }))],
    ["an added token that normalizing would change", build(added({ content: "<mask>", normalized: true }))],
    ["a space in front", build({}, { add_prefix_space: true })],
  ];
  const notInPieces: readonly (readonly [name: string, tokenizer: GPT2Tokenizer])[] = [
    ["an added token with a space inside", build(added({ content: "<a b>" }))],
    ["an added token with a line break behind it", build(added({ content: "<mask>\n" }))],
    ["an added token that eats what is before it", build(added({ content: "<mask>", lstrip: true }))],
    ["an added token that eats what follows it", build(added({ content: "<mask>", rstrip: true }))],
    ["a normalizer", build({ normalizer: { type: "NFKC" } })],
    [
      "a normalizer that works at the ends",
      build({ normalizer: { type: "Strip", strip_left: true, strip_right: true } }),
    ],
    ["no pattern", build({ pre_tokenizer: { ...byteLevel, use_regex: false } })],
    [
      "another pre-tokenizer in front",
      build({
        pre_tokenizer: {
          type: "Sequence",
          pretokenizers: [
            { type: "Split", pattern: { String: "e " }, behavior: "Isolated", invert: false },
            byteLevel,
          ],
        },
      }),
    ],
    [
      "another pre-tokenizer behind",
      build({
        pre_tokenizer: {
          type: "Sequence",
          pretokenizers: [byteLevel, { type: "Digits", individual_digits: true }],
        },
      }),
    ],
    [
      "unknown tokens that are one",
      build({
        model: {
          ...model,
          vocab: withoutWords,
          merges: model.merges.filter((merge) =>
            [...merge, merge.join("")].every((token) => token in withoutWords)
          ),
          unk_token: "<|endoftext|>",
          fuse_unk: true,
        },
      }),
    ],
  ];

  for (const [name, tokenizer] of [...encodable, ...notInPieces]) {
    test(`gives the ids of the whole text however it is cut: ${name}`, () => {
      const pick = picker(4);
      for (let round = 0; round < 300; round++) {
        const text = randomText(pick, pick(60));
        const pieces = randomPieces(pick, text);
        const encoder = tokenizer.encoder(1 + pick(20));
        const ids = [...pieces.flatMap((piece) => [...encoder.push(piece)]), ...encoder.end()];
        expect({ pieces, ids }).toEqual({ pieces, ids: tokenizer.encode(text) });
      }
    });
  }

  test("encodes before the end where that is safe, and only there", () => {
    const pushed = ({ encoder }: GPT2Tokenizer) => encoder(1).push("It was the best of times");
    for (const [name, tokenizer] of encodable) {
      expect({ name, ids: [...pushed(tokenizer)] }).toEqual({
        name,
        ids: tokenizer.encode("It was the best of"),
      });
    }
    for (const [name, tokenizer] of notInPieces) {
      expect({ name, ids: [...pushed(tokenizer)] }).toEqual({ name, ids: [] });
    }
  });

  test("cuts before the first of several white spaces, and after no white space at the start", () => {
    const encoder = tokenizer.encoder(1);
    expect([...encoder.push("  ")]).toEqual([]);
    expect([...encoder.push("\n")]).toEqual([]);
    expect([...encoder.push("a\r")]).toEqual(tokenizer.encode("  \na"));
    expect([...encoder.push("\n ")]).toEqual([]);
    expect([...encoder.push("b")]).toEqual([]);
    expect([...encoder.end()]).toEqual(tokenizer.encode("\r\n b"));
  });

  test("knows how many bytes have come and how many of them wait", () => {
    const pick = picker(5);
    for (let round = 0; round < 100; round++) {
      const text = randomText(pick, 40).toWellFormed();
      const encoder = tokenizer.encoder(10);
      let encoded = 0;
      for (const piece of randomPieces(pick, text)) {
        for (const id of encoder.push(piece)) encoded += tokenizer.bytesOf(id).length;
        expect(encoder.pushedBytes - encoder.heldBytes).toBe(encoded);
      }
      expect(encoder.pushedBytes).toBe(Buffer.byteLength(text));
      encoder.end();
      expect(encoder.heldBytes).toBe(0);
    }
  });

  test("says whether a token can be less than a byte of the text", () => {
    const bounded = [...encodable, ...notInPieces].filter(([, { encoder }]) => encoder().isByteBounded);
    expect(bounded.map(([name]) => name)).toEqual([
      "GPT-2's",
      "a pre-tokenizer in a sequence",
      "added tokens of white space",
      "an added token that normalizing would change",
      "an added token with a space inside",
      "an added token with a line break behind it",
      "an added token that eats what is before it",
      "an added token that eats what follows it",
      "no pattern",
      "unknown tokens that are one",
    ]);
  });

  test("encodes tiny pieces in large batches", () => {
    const text = "It was the best of times, it was the worst of times\n".repeat(3000);
    const encoder = tokenizer.encoder();
    const batches = [...text].map((char) => encoder.push(char)).filter((ids) => ids.length > 0);
    expect(batches.length).toBe(Math.floor(text.length / 2 ** 16));
    expect([...batches.flatMap((ids) => [...ids]), ...encoder.end()]).toEqual(tokenizer.encode(text));
  });

  test("takes time in proportion to a text without white space", () => {
    const piece = "東京。".repeat(1000);
    const millisecondsFor = (pieces: number) => {
      const encoder = tokenizer.encoder();
      const start = performance.now();
      for (let i = 0; i < pieces; i++) encoder.push(piece);
      const elapsed = performance.now() - start;
      expect(encoder.heldBytes).toBe(9000 * pieces);
      return elapsed;
    };
    millisecondsFor(100);
    const small = Math.min(...[1, 2, 3].map(() => millisecondsFor(100)));
    const large = Math.min(...[1, 2, 3].map(() => millisecondsFor(800)));
    expect(large / small).toBeLessThan(8 * 4); // quadratic would be 64
  });

  test("finds characters without tokens in each piece", () => {
    const small = build({
      model: { type: "BPE", vocab: { a: 0, b: 1, Ġ: 2 }, merges: [] },
      added_tokens: [],
    });
    const encoder = small.encoder(1);
    expect([...encoder.push("ab a"), ...encoder.push(" b")]).toEqual([0, 1, 2, 0]);
    expect(() => encoder.push("c ")).toThrow("has no tokens for some characters");
    expect(() => encoder.end()).not.toThrow();
  });
});

describe("encodeUpTo", () => {
  const long = "It was the best of times, it was the worst of times – naïve 東京 🎉 don't!\r\n  ".repeat(
    20_000,
  );

  test("gives the first ids, and says whether there are more", () => {
    const pick = picker(8);
    const tokenizers = [
      tokenizer,
      build({}, { add_prefix_space: true }),
      build({ normalizer: { type: "NFKC" } }),
    ];
    for (const tokenizer of tokenizers) {
      for (let round = 0; round < 200; round++) {
        const text = randomText(pick, pick(round % 10 === 0 ? 3000 : 60));
        const ids = tokenizer.encode(text);
        for (
          const most of [0, 1, pick(ids.length + 1), ids.length - 1, ids.length, ids.length + 1, Infinity]
        ) {
          const wanted = Math.max(0, most);
          expect(encodeUpTo(tokenizer, text, wanted)).toEqual({
            ids: Uint32Array.from(ids.slice(0, wanted)),
            truncated: ids.length > wanted,
          });
        }
      }
    }
  });

  test("encodes a long text no further than it has to", () => {
    const ids = tokenizer.encode(long);
    for (const most of [1, 1000, 10_000, 100_000]) {
      let encoder = tokenizer.encoder();
      const first = encodeUpTo({ encoder: (batch) => encoder = tokenizer.encoder(batch) }, long, most);
      expect(first).toEqual({ ids: Uint32Array.from(ids.slice(0, most)), truncated: true });
      expect(encoder.pushedBytes).toBeLessThan(1500 + 10 * most);
    }
  });

  test("gives arrays of their own size, to be transferred", () => {
    const { ids } = encodeUpTo(tokenizer, long, 1000);
    expect(ids.buffer.byteLength).toBe(4000);
  });
});

describe("decode", () => {
  test("gives back text that a clean-up would change", () => {
    for (
      const text of ["do n't .", " , ' s", "a ' b", "I 'm here !", "  two  spaces  ", "tab\t.", "x ? y ! z ,"]
    ) {
      expect(tokenizer.decode(tokenizer.encode(text))).toBe(text);
    }
  });

  test("gives back NULs, CRLF, BOMs, emoji and combining marks", () => {
    const texts = [
      "\0",
      "a\0\0b",
      "a\r\nb\r\n\r\n",
      "\ufeffstart",
      "a\ufeff",
      "👨‍👩‍👧‍👦 ok",
      "🇫🇷",
      "e\u0301\u0301",
      "\u{10ffff}",
      "\ufffd",
    ];
    for (const text of texts) expect(tokenizer.decode(tokenizer.encode(text))).toBe(text);
  });

  test("gives back random Unicode", () => {
    const pick = picker(1);
    const tops = [0x80, 0x300, 0x3000, 0xd800, 0x110000];
    for (let round = 0; round < 500; round++) {
      let text = "";
      for (let i = pick(40); i > 0; i--) {
        const codePoint = pick(tops[pick(tops.length)]!);
        if (codePoint < 0xd800 || codePoint > 0xdfff) text += String.fromCodePoint(codePoint);
      }
      expect(tokenizer.decode(tokenizer.encode(text))).toBe(text);
    }
  });

  test("shows a lone surrogate, which no UTF-8 can hold, as U+FFFD", () => {
    expect(tokenizer.decode(tokenizer.encode("a\ud800b"))).toBe("a\ufffdb");
  });

  test("of no ids is the empty text", () => expect(tokenizer.decode([])).toBe(""));

  test("skips ids beyond the vocabulary, as in padded checkpoints", () => {
    const ids = tokenizer.encode("Hello");
    expect(tokenizer.decode([...ids, tokenizer.vocabSize, 1e9, -1])).toBe("Hello");
  });
});

describe("bytesOf", () => {
  test("gives the raw bytes of part of a character", () => {
    const parts = tokenizer.encode("😀").map((id) => [...tokenizer.bytesOf(id)]);
    expect(parts.length).toBeGreaterThan(1);
    expect(parts.flat()).toEqual([...new TextEncoder().encode("😀")]);
  });

  test("gives the text of a special token", () => {
    expect(new TextDecoder().decode(tokenizer.bytesOf(endOfText))).toBe("<|endoftext|>");
  });

  test("covers each of the 256 bytes by a token of its own", () => {
    const single = new Set<number>();
    for (let id = 0; id < tokenizer.vocabSize; id++) {
      const bytes = tokenizer.bytesOf(id);
      if (bytes.length === 1) single.add(bytes[0]!);
    }
    expect(single.size).toBe(256);
  });
});

describe("StreamDecoder", () => {
  test("equals decode for random ids, flush included", () => {
    const pick = picker(2);
    for (let round = 0; round < 500; round++) {
      const ids = Array.from({ length: pick(30) }, () => pick(pick(2) === 0 ? 300 : tokenizer.vocabSize));
      expect(streamed(ids).join("")).toBe(tokenizer.decode(ids));
    }
  });

  test("never shows U+FFFD for a character that lies in several tokens", () => {
    const pick = picker(3);
    const letters = [..."aé漢😀👍🏽ß \n"];
    for (let round = 0; round < 200; round++) {
      const text = Array.from({ length: 20 }, () => letters[pick(letters.length)]!).join("");
      const pieces = streamed(tokenizer.encode(text));
      expect(pieces.join("")).toBe(text);
      for (const piece of pieces) {
        expect(piece).not.toContain("\ufffd");
        expect(piece.isWellFormed()).toBe(true);
      }
    }
  });

  test("shows U+FFFD for an unfinished character only when flushed, and starts afresh", () => {
    const [first] = tokenizer.encode("😀");
    const decoder = new StreamDecoder(tokenizer);
    expect(decoder.push(first!)).toBe("");
    expect(decoder.flush()).toBe("\ufffd");
    expect(tokenizer.encode("ok").map((id) => decoder.push(id)).join("")).toBe("ok");
  });

  test("keeps a byte order mark", () => {
    expect(streamed(tokenizer.encode("\ufeffa")).join("")).toBe("\ufeffa");
  });
});

describe("the tokenizer files", () => {
  test("a post-processor that adds special tokens adds none here", () => {
    const special = { SpecialToken: { id: "<|endoftext|>", type_id: 0 } };
    const sequence = { Sequence: { id: "A", type_id: 0 } };
    const template = {
      type: "TemplateProcessing",
      single: [special, sequence, special],
      pair: [special, sequence, special],
      special_tokens: { "<|endoftext|>": { id: "<|endoftext|>", ids: [0], tokens: ["<|endoftext|>"] } },
    };
    const templated = build({ post_processor: template }, { add_bos_token: true, add_eos_token: true });
    expect(templated.encode("Hello")).toEqual(tokenizer.encode("Hello"));
  });

  test("clean_up_tokenization_spaces changes nothing", () => {
    const cleaning = build({}, { clean_up_tokenization_spaces: true });
    expect(cleaning.decode(cleaning.encode("do n't ."))).toBe("do n't .");
  });

  test("add_prefix_space of tokenizer_config.json overrides tokenizer.json's", () => {
    expect(build({}, { add_prefix_space: true }).encode("a")).toEqual(tokenizer.encode(" a"));
  });

  test("merges written as strings mean the same as pairs", () => {
    const model = original.model as { merges: [string, string][] };
    const joined = build({ model: { ...model, merges: model.merges.map((pair) => pair.join(" ")) } });
    const text = "It is a truth universally acknowledged";
    expect(joined.encode(text)).toEqual(tokenizer.encode(text));
  });

  test("added tokens of tokenizer_config.json alone are tokens too", () => {
    const extended = build({}, { added_tokens_decoder: { "8192": { content: "<|user|>", special: true } } });
    expect(extended.encode("a<|user|>")).toEqual([...tokenizer.encode("a"), 8192]);
    expect(extended.vocabSize).toBe(8193);
    expect(extended.decode([8192])).toBe("<|user|>");
  });

  test("optional parts may be missing", () => {
    const { model, pre_tokenizer } = original;
    const bare = createTokenizer({ tokenizer: { model, pre_tokenizer }, source: "test" });
    expect(bare.encode("Hello world")).toEqual(tokenizer.encode("Hello world"));
  });

  test("text that a vocabulary without all bytes cannot spell is an error, not lost", () => {
    const small = build({
      model: { type: "BPE", vocab: { a: 0, b: 1, ab: 2 }, merges: [["a", "b"]] },
      added_tokens: [],
    });
    expect(small.encode("abb")).toEqual([2, 1]);
    expect(() => small.encode("abc")).toThrow("has no tokens for some characters");
  });

  test("anything but byte-level BPE is refused with a reason and a hint", () => {
    const metaspace = { type: "Metaspace", replacement: "▁" };
    const refused: [string, () => unknown, string][] = [
      ["WordPiece", () => build({ model: { type: "WordPiece", vocab: {} } }), `its model is "WordPiece"`],
      ["no model", () => build({ model: null }), "it has no `model`"],
      ["no merges", () => build({ model: { type: "BPE", vocab: {} } }), "no `vocab` and `merges`"],
      ["Metaspace", () => build({ pre_tokenizer: metaspace }), "its pre-tokenizer is not ByteLevel"],
      [
        "words",
        () => build({ model: { type: "BPE", vocab: { "▁the": 1 }, merges: [] } }),
        "not spelled in bytes",
      ],
      ["ids", () => build({ model: { type: "BPE", vocab: { a: 1e12 }, merges: [] } }), "has the id"],
      // 64 MiB for a file of some bytes.
      [
        "a large id",
        () => build({ model: { type: "BPE", vocab: { a: 2 ** 20 }, merges: [] } }),
        "has the id 1048576",
      ],
      [
        "two tokens of one id",
        () => build({ model: { type: "BPE", vocab: { a: 1, b: 1 }, merges: [] } }),
        `"b" has the id 1, as another token has`,
      ],
      [
        "a long token",
        () => build({ model: { vocab: { ["a".repeat(2000)]: 1 }, merges: [] } }),
        "has 2000 characters",
      ],
      [
        "a merge into no token, whose text would be lost",
        () => build({ model: { vocab: { a: 0, b: 1 }, merges: ["a b"] } }),
        `merge 0 has "ab", which is no token`,
      ],
      [
        "a merge of three",
        () => build({ model: { vocab: { a: 0 }, merges: ["a a a"] } }),
        `merge 0 is "a a a", no two tokens`,
      ],
      [
        "a suffix of words",
        () => build({ model: { vocab: {}, merges: [], end_of_word_suffix: "</w>" } }),
        `its model has the end_of_word_suffix "</w>"`,
      ],
      [
        "an unknown token that is no text",
        () => build({ model: { vocab: {}, merges: [], unk_token: { toString: 1 } } }),
        "its unk_token is an object",
      ],
      [
        "values without a text of their own",
        () => build({ model: { type: JSON.parse('{"toString":1}'), vocab: {}, merges: [] } }),
        "its model is an object",
      ],
      [
        "an added token that is long",
        () => build(added({ content: "a".repeat(2000) })),
        "no text to look for",
      ],
      [
        "an added token that is half a character",
        () => build(added({ content: "\ud800" })),
        "no text to look for",
      ],
      [
        "an added token without a text",
        () => build(added({ id: 9000 })),
        "an added token lacks an id or its text",
      ],
      [
        "an added token that looks like a byte",
        () => build(added({ content: "\ue0e9" })),
        "is spelled as bytes are",
      ],
      ["an array", () => createTokenizer({ tokenizer: [], source: "test" }), "it has no `model`"],
    ];
    for (const [name, make, reason] of refused) {
      const error = errorOf(make);
      expect({ name, is: error instanceof ModelError, hint: (error as LongformError).hint !== undefined })
        .toEqual({ name, is: true, hint: true });
      expect(String(error)).toContain(reason);
    }
  });

  const isolated = { type: "Split", behavior: "Isolated", invert: false };
  const foreign: [name: string, part: object, reason: string][] = [
    // Of these, the first takes for ever for a text of 40 letters, the second for every text.
    [
      "a regular expression",
      { ...isolated, pattern: { Regex: "(a+)+$" } },
      `the part "Split" by more than a text`,
    ],
    ["pieces of no length", { type: "FixedLength", length: 0 }, `the part "FixedLength"`],
    [
      "pieces that are left out",
      { ...isolated, pattern: { String: "a" }, behavior: "Removed" },
      `the part "Split"`,
    ],
    ["a split by nothing", { ...isolated, pattern: { String: "" } }, `the part "Split"`],
    ["a replacement", { type: "Replace", pattern: { String: "a" }, content: "aa" }, `the part "Replace"`],
    ["a sequence in it", { type: "Sequence", pretokenizers: [] }, `the part "Sequence"`],
    ["no type", {}, "the part undefined"],
  ];
  for (const [name, part, reason] of foreign) {
    test(`a pre-tokenizer with ${name} is refused`, () => {
      const sequence = { type: "Sequence", pretokenizers: [part, byteLevel] };
      expect(String(errorOf(() => build({ pre_tokenizer: sequence })))).toContain(
        `its pre-tokenizer has ${reason}`,
      );
    });
  }

  test("a normalizer that makes texts longer, or has no end of parts, is refused", () => {
    const doubling = { type: "Replace", pattern: { String: "a" }, content: "aa" };
    for (const normalizer of [doubling, { type: "Sequence", normalizers: Array(30).fill(doubling) }]) {
      expect(String(errorOf(() => build({ normalizer })))).toContain("its normalizer has");
    }
    const many = { type: "Sequence", normalizers: Array(1000).fill({ type: "NFC" }) };
    expect(String(errorOf(() => build({ normalizer: many })))).toContain("its normalizer has an array");
    let deep: object = { type: "NFC" };
    for (let i = 0; i < 100_000; i++) deep = { type: "Sequence", normalizers: [deep] };
    expect(String(errorOf(() => build({ normalizer: deep })))).toContain(`the part "Sequence"`);
  });

  test("an added token is not taken for the byte that GPT-2 spells like it", () => {
    const accented = build(added({ content: "é" }));
    expect(accented.encode("é")).toEqual([8192]);
    for (const text of ["骨", "é骨é"]) expect(accented.decode(accented.encode(text))).toBe(text); // 0xe9 0xaa 0xa8
    expect(accented.tokenToId("é")).toBe(8192);
    expect(accented.tokenToId("Ġthe")).toBe(tokenizer.tokenToId("Ġthe")!);
    expect(accented.tokenToId("toString")).toBeUndefined();
  });

  test("a model without a type is BPE, as GPT-2's first tokenizer.json is", () => {
    const { type: _type, ...model } = original.model as { type: string };
    expect(build({ model }).encode("Hello world")).toEqual(tokenizer.encode("Hello world"));
  });

  test("a missing or damaged file is a ModelError that names it", async () => {
    const dir = mkdtempSync(join(tmpdir(), "tokenizer-"));
    try {
      expect(String(await rejection(loadTokenizer(dir)))).toContain(`No tokenizer.json in ${dir}`);
      writeFileSync(join(dir, "tokenizer.json"), '{"model": ');
      const error = await rejection(loadTokenizer(dir));
      expect(error).toBeInstanceOf(ModelError);
      expect(String(error)).toContain("is not valid JSON");
      expect(String(error)).toContain(join(dir, "tokenizer.json"));
    } finally {
      rmSync(dir, { recursive: true });
    }
  });
});

function errorOf(make: () => unknown): unknown {
  try {
    make();
  } catch (error) {
    return error;
  }
  return undefined;
}

function rejection(promise: Promise<unknown>): Promise<unknown> {
  return promise.then(() => undefined, (error: unknown) => error);
}
