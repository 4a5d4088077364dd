/**
 * Byte-level BPE as GPT-2 uses it: text to ids by `@huggingface/tokenizers`, ids to bytes by our own table.
 *
 * Decoding never asks the library: it cleans up spaces before punctuation by default, and it decodes each call on its
 * own, which breaks characters whose bytes lie in two tokens. Joining the raw bytes of the tokens is exact.
 */
import { join } from "node:path";
import { ByteLevelPreTokenizer, SequencePreTokenizer, Tokenizer } from "@huggingface/tokenizers";
import { InputError, ModelError } from "../runtime/errors.ts";
import { describeJson, fileErrorCode, isJsonObject, type JsonObject, readJsonObject } from "./json_file.ts";
import { isWhiteSpace, UnitEncoder } from "./unit_encoder.ts";
import { quoteName } from "./weight_source.ts";

/** Text to token ids and back; `decode(encode(text)) === text` for every well-formed string. */
export interface GPT2Tokenizer {
  /** Highest id + 1, added tokens included; a checkpoint may have more rows than this. */
  readonly vocabSize: number;
  /** Ids of the text; the text of an added token such as `<|endoftext|>` gives its id, nothing else is added. */
  encode(text: string): number[];
  /**
   * Encodes one text that arrives in pieces.
   * @param batch characters to collect before they are encoded: as many as make the number of calls not matter
   */
  encoder(batch?: number): PieceEncoder;
  /** The text of the ids, nothing stripped; bytes that are no UTF-8 become U+FFFD as in every UTF-8 decoder. */
  decode(ids: readonly number[]): string;
  /** The raw bytes of one token, to be read only; empty for an id that has no token (padded vocabularies). */
  bytesOf(id: number): Uint8Array;
  /** The id of a token as `tokenizer.json` spells it (`"Ġthe"`, `"<|endoftext|>"`). */
  tokenToId(token: string): number | undefined;
}

/** A token that is found in the text before anything else is. */
interface AddedToken {
  readonly id: number;
  readonly content: string;
  /** Takes the white space in front of it, or behind it, too. */
  readonly lstrip: boolean;
  readonly rstrip: boolean;
  readonly normalized: boolean;
  readonly special: boolean;
}

type Vocabulary = Readonly<Record<string, number>>;
type Merge = readonly [left: string, right: string];

/** The parts of a tokenizer.json that are used, checked. */
interface ByteLevelBpe {
  readonly vocab: Vocabulary;
  /** Of tokens whose join is a token, all of `vocab`. */
  readonly merges: readonly Merge[];
  readonly unkToken: string | null;
  /** Neighbours that are unknown are one unknown token. */
  readonly fusesUnknown: boolean;
  /** A word that is a token is not made of merges. */
  readonly ignoresMerges: boolean;
  readonly normalizer: JsonObject | null;
  readonly preTokenizer: JsonObject;
}

/** Parsed `tokenizer.json` and `tokenizer_config.json`; `source` is the folder to name in errors. */
export interface TokenizerFiles {
  readonly tokenizer: unknown;
  readonly config?: unknown;
  readonly source: string;
}

/**
 * GPT-2's pre-tokenizer with Unicode's White_Space where the library has `\s`: in JavaScript `\s` leaves out U+0085
 * and takes in U+FEFF, in the Rust tokenizers (Oniguruma) it is the other way round.
 */
const GPT2_PATTERN =
  /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+/gu;

const SPACE = 0x20;

/** GPT-2 spells byte b of a token as one character: itself where it prints in Latin-1, else U+0100, U+0101, … in order. */
const BYTE_OF_CHAR = byteAlphabet();

function byteAlphabet(): ReadonlyMap<string, number> {
  const alphabet = new Map<string, number>();
  let next = 0x100;
  for (let byte = 0; byte < 256; byte++) {
    const printable = (byte > 0x20 && byte < 0x7f) || (byte > 0xa0 && byte !== 0xad);
    alphabet.set(String.fromCharCode(printable ? byte : next++), byte);
  }
  return alphabet;
}

/**
 * How the library is told to spell the bytes that are not printable ASCII: an added token may be "é", which in GPT-2's
 * alphabet is byte 0xe9, and the library tells tokens apart by their spelling alone.
 */
const SPELLINGS: readonly string[] = [...BYTE_OF_CHAR].toSorted(([, a], [, b]) => a - b)
  .map(([char, byte]) => byte > SPACE && byte < 0x7f ? char : String.fromCharCode(0xe000 + byte));

/** Parts of a normalizer: of each, what it makes of a text has a length in proportion to it, in such a time. */
const NORMALIZERS = ["NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents"];
/** Those of a pre-tokenizer besides splitting at a text. */
const PRE_TOKENIZERS = ["ByteLevel", "Digits", "Punctuation"];
/** A few times those of any published tokenizer. */
const MOST_PARTS = 16;
/** Characters of a token: encoding takes a time that grows with the longest one. Published ones have 128. */
const LONGEST_TOKEN = 1024;
/** Ids index an array: four times those of the largest vocabulary that is published. */
const MOST_IDS = 2 ** 20;

/** Reads `tokenizer.json`, and `tokenizer_config.json` where there is one, from a model folder. */
export async function loadTokenizer(dir: string): Promise<GPT2Tokenizer> {
  const tokenizer = await readOptionalJson(join(dir, "tokenizer.json"));
  if (tokenizer === undefined) {
    throw new ModelError(`No tokenizer.json in ${dir}`, {
      hint: "a model folder holds config.json, tokenizer.json and model.safetensors; " +
        "with `--ids` a model runs without a tokenizer",
    });
  }
  const config = await readOptionalJson(join(dir, "tokenizer_config.json"));
  return createTokenizer({ tokenizer, config, source: dir });
}

/** The parsed file; `undefined` if there is none. */
async function readOptionalJson(path: string): Promise<JsonObject | undefined> {
  try {
    return await readJsonObject(path);
  } catch (error) {
    if (error instanceof ModelError && fileErrorCode(error.cause) === "ENOENT") return undefined;
    throw error;
  }
}

/** Builds the tokenizer from parsed files; anything that is not byte-level BPE is a ModelError. */
export function createTokenizer(files: TokenizerFiles): GPT2Tokenizer {
  const { source } = files;
  const json = isJsonObject(files.tokenizer) ? files.tokenizer : {};
  const config = isJsonObject(files.config) ? files.config : {};
  const parts = byteLevelBpe(json, source);
  const { vocab } = parts;
  const addedTokens = allAddedTokens(json, config, source);
  const library = buildLibrary(parts, addedTokens, config, source);

  const bytes = packBytes(vocab, addedTokens, source);
  const missesBytes = [...BYTE_OF_CHAR.keys()].some((char) => vocab[char] === undefined);
  const addedIds = new Map(addedTokens.map(({ content, id }) => [content, id]));

  const bytesOf = (id: number): Uint8Array => {
    const start = bytes.offsets[id];
    const end = bytes.offsets[id + 1];
    return start === undefined || end === undefined ? new Uint8Array(0) : bytes.data.subarray(start, end);
  };
  const decode = (ids: readonly number[]): string =>
    new TextDecoder("utf-8", { ignoreBOM: true }).decode(joinBytes(ids, bytesOf));
  const encodeWhole = (text: string): number[] => {
    const { ids } = library.encode(text, { add_special_tokens: false });
    // A small vocabulary trained without the 256 single bytes cannot spell every text, and the library drops the rest.
    if (missesBytes && !decode(ids).endsWith(text.toWellFormed())) {
      throw new InputError(`The tokenizer in ${source} has no tokens for some characters of the text`, {
        hint:
          "its vocabulary lacks some of the 256 single-byte tokens; use a model whose tokenizer has them all",
      });
    }
    return ids;
  };
  const rules = pieceRules(library, parts, addedTokens);
  const units = rules.cutsBefore && new UnitEncoder(encodeWhole, rules.cutsBefore);
  const encode = (text: string) => units ? units.encode(text) : Uint32Array.from(encodeWhole(text));

  return {
    vocabSize: bytes.offsets.length - 1,
    encode: (text) => Array.from(encode(text)),
    encoder: (batch = 1 << 16) => new PieceEncoder(encode, rules, batch),
    decode,
    bytesOf,
    tokenToId: (token) => addedIds.get(token) ?? (Object.hasOwn(vocab, token) ? vocab[token] : undefined),
  };
}

/** Checks that this is byte-level BPE of which all is understood. */
function byteLevelBpe(json: JsonObject, source: string): ByteLevelBpe {
  const { model } = json;
  if (!isJsonObject(model)) throw notByteLevel(source, "it has no `model`");
  if ((model.type ?? "BPE") !== "BPE") throw notByteLevel(source, `its model is ${describeJson(model.type)}`);
  if (!isJsonObject(model.vocab) || !Array.isArray(model.merges)) {
    throw notByteLevel(source, "its model has no `vocab` and `merges`");
  }
  const affix = ["continuing_subword_prefix", "continuing_subword_suffix", "end_of_word_suffix"]
    .find((key) => (model[key] ?? "") !== "");
  if (affix !== undefined) {
    throw notByteLevel(source, `its model has the ${affix} ${describeJson(model[affix])}`);
  }
  const unkToken = model.unk_token ?? null;
  if (unkToken !== null && typeof unkToken !== "string") {
    throw notByteLevel(source, `its unk_token is ${describeJson(unkToken)}`);
  }
  const vocab = checkVocabulary(model.vocab, source);
  return {
    vocab,
    merges: checkMerges(model.merges, vocab, source),
    unkToken,
    fusesUnknown: model.fuse_unk === true,
    ignoresMerges: model.ignore_merges === true,
    normalizer: checkNormalizer(json.normalizer ?? null, source),
    preTokenizer: checkPreTokenizer(json.pre_tokenizer, source),
  };
}

function checkVocabulary(vocab: JsonObject, source: string): Vocabulary {
  const ids = new Set<number>();
  for (const token of Object.keys(vocab)) {
    const id = vocab[token];
    if (!isTokenId(id)) throw notByteLevel(source, `${quoteName(token)} has the id ${describeJson(id)}`);
    if (token.length > LONGEST_TOKEN) {
      throw notByteLevel(source, `${quoteName(token)} has ${token.length} characters`);
    }
    if (ids.has(id)) throw notByteLevel(source, `${quoteName(token)} has the id ${id}, as another token has`);
    ids.add(id);
  }
  return vocab as Vocabulary;
}

/** A merge is `"a b"` or `["a", "b"]`. */
function checkMerges(merges: readonly unknown[], vocab: Vocabulary, source: string): Merge[] {
  const tokens = new Set(Object.keys(vocab));
  return merges.map((merge, i) => {
    const [left, right, ...rest]: unknown[] = typeof merge === "string"
      ? merge.split(" ")
      : Array.isArray(merge)
      ? merge
      : [];
    if (typeof left !== "string" || typeof right !== "string" || rest.length > 0) {
      throw notByteLevel(source, `merge ${i} is ${describeJson(merge)}, no two tokens`);
    }
    if (tokens.has(left) && tokens.has(right) && tokens.has(left + right)) return [left, right];
    // Text would be lost: what a merge makes could not be given an id.
    const missing = [left, right, left + right].find((token) => !tokens.has(token))!;
    throw notByteLevel(source, `merge ${i} has ${quoteName(missing)}, which is no token`);
  });
}

function checkNormalizer(normalizer: unknown, source: string): JsonObject | null {
  if (normalizer === null) return null;
  for (const part of partsOf(normalizer, "normalizers")) {
    if (isJsonObject(part) && NORMALIZERS.some((type) => type === part.type)) continue;
    throw notByteLevel(source, `its normalizer has ${describePart(part)}`);
  }
  return normalizer as JsonObject;
}

function checkPreTokenizer(preTokenizer: unknown, source: string): JsonObject {
  const parts = partsOf(preTokenizer, "pretokenizers");
  if (parts.filter((part) => isJsonObject(part) && part.type === "ByteLevel").length !== 1) {
    throw notByteLevel(source, "its pre-tokenizer is not ByteLevel");
  }
  for (const part of parts) {
    if (isJsonObject(part) && (PRE_TOKENIZERS.some((type) => type === part.type) || isPlainSplit(part))) {
      continue;
    }
    throw notByteLevel(source, `its pre-tokenizer has ${describePart(part)}`);
  }
  return preTokenizer as JsonObject;
}

/** The parts of a sequence, or the only one; something that is no part where they are no list, or too long a one. */
function partsOf(whole: unknown, key: "normalizers" | "pretokenizers"): readonly unknown[] {
  if (!isJsonObject(whole) || whole.type !== "Sequence") return [whole];
  const parts = whole[key];
  return Array.isArray(parts) && parts.length <= MOST_PARTS ? parts : [[]];
}

/** Splits at a text, which stays: by no regular expression, which could be one that never ends. */
function isPlainSplit({ type, pattern, behavior, invert = false }: JsonObject): boolean {
  return type === "Split" && behavior === "Isolated" && invert === false && isJsonObject(pattern) &&
    Object.keys(pattern).join() === "String" && typeof pattern.String === "string" && pattern.String !== "";
}

function describePart(part: unknown): string {
  if (!isJsonObject(part)) return describeJson(part);
  return `the part ${describeJson(part.type)}${part.type === "Split" ? " by more than a text" : ""}`;
}

function notByteLevel(source: string, why: string): ModelError {
  return new ModelError(`The tokenizer in ${source} is not byte-level BPE: ${why}`, {
    hint:
      "GPT-2 checkpoints carry a byte-level BPE tokenizer.json; the model folder may belong to another architecture",
  });
}

/** `added_tokens` of tokenizer.json, and those that only tokenizer_config.json lists (`added_tokens_decoder`). */
function allAddedTokens(json: JsonObject, config: JsonObject, source: string): AddedToken[] {
  const listed = (Array.isArray(json.added_tokens) ? json.added_tokens : []) as unknown[];
  const known = new Set(listed.map((token) => isJsonObject(token) ? token.content : undefined));
  const extra = Object.entries(isJsonObject(config.added_tokens_decoder) ? config.added_tokens_decoder : {})
    .flatMap(([id, token]) =>
      isJsonObject(token) && !known.has(token.content) ? [{ ...token, id: Number(id) }] : []
    );
  return [...listed, ...extra].map((token) => {
    if (!isJsonObject(token) || !isTokenId(token.id) || typeof token.content !== "string") {
      throw notByteLevel(source, "an added token lacks an id or its text");
    }
    const { id, content, special = false } = token;
    if (content === "" || content.length > LONGEST_TOKEN || !content.isWellFormed()) {
      throw notByteLevel(
        source,
        `the added token ${id} is ${quoteName(content)}, which is no text to look for`,
      );
    }
    return {
      id,
      content,
      lstrip: token.lstrip === true,
      rstrip: token.rstrip === true,
      special: special === true,
      normalized: typeof token.normalized === "boolean" ? token.normalized : special !== true,
    };
  });
}

/** The parts with every byte spelled as in SPELLINGS. */
function respell(parts: ByteLevelBpe, addedTokens: readonly AddedToken[], source: string): ByteLevelBpe {
  const respelled = (token: string) =>
    token.replace(/[^!-~]/g, (char) => SPELLINGS[BYTE_OF_CHAR.get(char) ?? -1] ?? char);
  const vocab = Object.fromEntries(Object.entries(parts.vocab).map(([token, id]) => [respelled(token), id]));
  const lookalike = addedTokens.find(({ content }) =>
    !Object.hasOwn(parts.vocab, content) && Object.hasOwn(vocab, content)
  );
  if (lookalike) {
    throw notByteLevel(source, `the added token ${quoteName(lookalike.content)} is spelled as bytes are`);
  }
  return {
    ...parts,
    vocab,
    merges: parts.merges.map(([left, right]) => [respelled(left), respelled(right)]),
    unkToken: parts.unkToken === null ? null : respelled(parts.unkToken),
  };
}

/**
 * Gives the library nothing that is not checked. Without the post-processor, so that no template can add tokens; without
 * the decoder, which we never call.
 */
function buildLibrary(
  parts: ByteLevelBpe,
  addedTokens: readonly AddedToken[],
  config: JsonObject,
  source: string,
): Tokenizer {
  // To spell all tokens anew takes as long as everything else here, and GPT-2 has no such added token.
  const looksLikeBytes = addedTokens.some(({ content }) => /[^ -~]/.test(content));
  const { vocab, merges, unkToken } = looksLikeBytes ? respell(parts, addedTokens, source) : parts;
  const library = new Tokenizer({
    normalizer: parts.normalizer,
    pre_tokenizer: parts.preTokenizer,
    post_processor: null,
    decoder: null,
    added_tokens: addedTokens,
    model: {
      type: "BPE",
      vocab,
      merges,
      unk_token: unkToken,
      fuse_unk: parts.fusesUnknown,
      ignore_merges: parts.ignoresMerges,
    },
  }, {});
  for (const part of preTokenizers(library)) {
    if (!(part instanceof ByteLevelPreTokenizer)) continue;
    part.pattern = GPT2_PATTERN; // the library's is not exact
    if (looksLikeBytes) part.byte_encoder = { ...SPELLINGS };
    // That of tokenizer_config.json, where given, overrides tokenizer.json's.
    if (typeof config.add_prefix_space === "boolean") part.add_prefix_space = config.add_prefix_space;
  }
  return library;
}

function preTokenizers({ pre_tokenizer: top }: Tokenizer): readonly unknown[] {
  return top instanceof SequencePreTokenizer ? top.tokenizers : [top];
}

/** How a text may be encoded before all of it is there. */
interface PieceRules {
  /**
   * Whether a cut may lie before this white space, a UTF-16 code unit, if there is none in front of it; undefined
   * where no cut is safe.
   */
  readonly cutsBefore: ((code: number) => boolean) | undefined;
  /** No text has more tokens than UTF-8 bytes. */
  readonly isByteBounded: boolean;
}

/**
 * No match of GPT2_PATTERN goes on from a character that is no white space to one that is, and none looks behind itself:
 * a text may be cut between the two, unless something else in the tokenizer looks further than the pattern does.
 */
function pieceRules(library: Tokenizer, bpe: ByteLevelBpe, added: readonly AddedToken[]): PieceRules {
  const parts = preTokenizers(library);
  const byteLevel = parts[0];
  if (library.normalizer !== null || parts.length !== 1 || !(byteLevel instanceof ByteLevelPreTokenizer)) {
    return { cutsBefore: undefined, isByteBounded: false };
  }
  const canSpanCut = added.some(({ content, lstrip, rstrip }) =>
    /\P{White_Space}\p{White_Space}/u.test(content) || lstrip || rstrip
  );
  const isCuttable = !canSpanCut && !bpe.fusesUnknown && byteLevel.use_regex;
  // `add_prefix_space` puts a space before every text that does not begin with one.
  const cutsBefore = byteLevel.add_prefix_space ? (code: number) => code === SPACE : isWhiteSpace;
  return { cutsBefore: isCuttable ? cutsBefore : undefined, isByteBounded: !byteLevel.add_prefix_space };
}

/** All tokens' bytes end to end: token i is `data[offsets[i] .. offsets[i + 1])`. */
function packBytes(
  vocab: Vocabulary,
  added: readonly AddedToken[],
  source: string,
) {
  const spelled = new Map(Object.entries(vocab).map(([token, id]) => [id, token]));
  const special = new Map(added.map(({ id, content }) => [id, new TextEncoder().encode(content)]));
  let size = 0;
  let length = 0;
  for (const [id, token] of spelled) (size = Math.max(size, id + 1), length += token.length);
  for (const [id, content] of special) (size = Math.max(size, id + 1), length += content.length);

  const data = new Uint8Array(length);
  const offsets = new Uint32Array(size + 1);
  let at = 0;
  for (let id = 0; id < size; id++) {
    const content = special.get(id);
    if (content !== undefined) {
      data.set(content, at);
      at += content.length;
    } else {
      for (const char of spelled.get(id) ?? "") {
        const byte = BYTE_OF_CHAR.get(char);
        if (byte === undefined) {
          throw notByteLevel(source, `token ${id} is ${quoteName(spelled.get(id)!)}, not spelled in bytes`);
        }
        data[at++] = byte;
      }
    }
    offsets[id + 1] = at;
  }
  return { data, offsets };
}

function joinBytes(ids: readonly number[], bytesOf: (id: number) => Uint8Array): Uint8Array {
  const parts = ids.map(bytesOf);
  const joined = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    joined.set(part, at);
    at += part.length;
  }
  return joined;
}

/**
 * Text of a stream of tokens. A character whose bytes are not all there yet waits for the next token, so no piece ends
 * in half a character; all pieces and the flush together equal `decode` of all ids.
 */
export class StreamDecoder {
  readonly #tokenizer: Pick<GPT2Tokenizer, "bytesOf">;
  readonly #decoder = new TextDecoder("utf-8", { ignoreBOM: true });

  constructor(tokenizer: Pick<GPT2Tokenizer, "bytesOf">) {
    this.#tokenizer = tokenizer;
  }

  /** The text that this token completes; empty while a character is unfinished. */
  push(id: number): string {
    return this.#decoder.decode(this.#tokenizer.bytesOf(id), { stream: true });
  }

  /** U+FFFD if the stream ended inside a character, else nothing; afterwards the decoder starts afresh. */
  flush(): string {
    return this.#decoder.decode();
  }
}

/**
 * Ids of a text that arrives in pieces, cut anywhere: all results in order are the ids that `encode` gives for the whole
 * text. Encodes up to a place where a cut changes nothing, and holds back the rest.
 */
export class PieceEncoder {
  /** No text has more tokens than UTF-8 bytes. */
  readonly isByteBounded: boolean;
  readonly #encode: (text: string) => Uint32Array<ArrayBuffer>;
  readonly #cutsBefore: PieceRules["cutsBefore"];
  readonly #batch: number;
  #held: string[] = [];
  #heldLength = 0;
  #heldBytes = 0;
  #pushedBytes = 0;
  /** The text's last UTF-16 code unit so far; white space before the first, where no cut may lie. */
  #lastUnit = SPACE;

  constructor(encode: (text: string) => Uint32Array<ArrayBuffer>, rules: PieceRules, batch: number) {
    this.#encode = encode;
    this.#cutsBefore = rules.cutsBefore;
    this.#batch = batch;
    this.isByteBounded = rules.isByteBounded;
  }

  /** UTF-8 bytes of the text so far. */
  get pushedBytes(): number {
    return this.#pushedBytes;
  }

  /** UTF-8 bytes of its end that has given no ids yet. */
  get heldBytes(): number {
    return this.#heldBytes;
  }

  /** The next ids, often none; InputError as for `encode`. */
  push(text: string): Uint32Array<ArrayBuffer> {
    const cut = this.#heldLength + text.length < this.#batch ? undefined : this.#lastCut(text);
    this.#pushedBytes += utf8Length(text);
    if (text !== "") this.#lastUnit = text.charCodeAt(text.length - 1);
    if (cut === undefined) {
      this.#hold(text);
      return new Uint32Array(0);
    }
    this.#hold(text.slice(0, cut));
    const ids = this.end();
    this.#hold(text.slice(cut));
    return ids;
  }

  /** The last ids. */
  end(): Uint32Array<ArrayBuffer> {
    const text = this.#held.join("");
    this.#held = [];
    this.#heldLength = 0;
    this.#heldBytes = 0;
    return this.#encode(text);
  }

  #hold(text: string): void {
    this.#held.push(text);
    this.#heldLength += text.length;
    this.#heldBytes += utf8Length(text);
  }

  /** The index in `text`, which comes next, of the last cut. */
  #lastCut(text: string): number | undefined {
    if (this.#cutsBefore === undefined) return undefined;
    for (let at = text.length - 1; at >= 0; at--) {
      if (!this.#cutsBefore(text.charCodeAt(at))) continue;
      if (!isWhiteSpace(at > 0 ? text.charCodeAt(at - 1) : this.#lastUnit)) return at;
    }
    return undefined;
  }
}

/** The first ids of a text. */
export interface FirstIds {
  readonly ids: Uint32Array<ArrayBuffer>;
  /** The text has more tokens than these. */
  readonly truncated: boolean;
}

/** UTF-16 code units that `encodeUpTo` encodes in one go, at the most: some milliseconds. */
const SLICE = 1 << 16;

/**
 * The ids of the first `most` tokens of a text, without those of the rest of a long one unless no cut is safe. Throws
 * InputError as `encode` does, for the part that it encodes.
 */
export function encodeUpTo(
  tokenizer: Pick<GPT2Tokenizer, "encoder">,
  text: string,
  most: number,
): FirstIds {
  // Prose has four characters a token; where they are fewer, the next slices are asked.
  const slice = Math.min(SLICE, Math.max(1024, 4 * most));
  const encoder = tokenizer.encoder(slice);
  const batches: Uint32Array[] = [];
  let known = 0;
  const keep = (batch: Uint32Array) => {
    batches.push(batch);
    known += batch.length;
  };
  for (let at = 0; at < text.length && known <= most; at += slice) {
    keep(encoder.push(text.slice(at, at + slice)));
  }
  if (known <= most) keep(encoder.end());

  const ids = new Uint32Array(Math.min(known, most));
  let filled = 0;
  for (const batch of batches) {
    const part = batch.subarray(0, ids.length - filled);
    ids.set(part, filled);
    filled += part.length;
  }
  return { ids, truncated: known > most };
}

/** UTF-8 bytes of the text. Each half of a pair counts as two of its four, so the sum over pieces is that of the whole. */
function utf8Length(text: string): number {
  let bytes = 0;
  for (let i = 0; i < text.length; i++) {
    const unit = text.charCodeAt(i);
    bytes += unit < 0x80 ? 1 : unit < 0x800 || (unit & 0xf800) === 0xd800 ? 2 : 3;
  }
  return bytes;
}

function isTokenId(value: unknown): value is number {
  return Number.isInteger(value) && (value as number) >= 0 && (value as number) < MOST_IDS;
}
