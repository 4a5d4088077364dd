/**
 * Block-sparse attention patterns as data: which blocks of keys each block of queries keeps. Nothing here reads
 * files or knows of a GPU.
 *
 * A block is `KV_BLOCK` tokens, of queries and of keys alike: row i is the queries of tokens 64 i to 64 i + 63,
 * column j the keys of tokens 64 j to 64 j + 63, and j <= i. Attention is causal within the diagonal block.
 * Sizes are given in tokens and rounded up to whole blocks. Of a window of w blocks the query's own is one: a
 * query sees from 64 (w - 1) + 1 to 64 w of its latest keys.
 */
import { LEAST_KEPT } from "../kernels/block_selection/block_selection.ts";
import { KV_BLOCK } from "../kernels/shared/shared.ts";
import { InputError, type LongformError, UsageError } from "../runtime/errors.ts";
import { fmix32 } from "../runtime/fmix32.ts";
import { printable } from "../runtime/printable.ts";

/** The patterns as they are written, for hints and help. */
export const PATTERN_GRAMMAR =
  "dense, local:W, sink:S+local:W, strided:W,K, bigbird:S,W,R, butterfly, topk:K or file:PATH";

const HINT = `use ${PATTERN_GRAMMAR}; in tokens, such as 4096 or 4k: W is the window of latest keys, ` +
  "S the first keys, R further keys drawn at random, K the stride of `strided` and all the keys of `topk`";

/**
 * A pattern with sizes in tokens, as given. Which causal blocks it keeps, where w is ⌈W / 64⌉ and so on:
 * - `dense`: all.
 * - `local`: i - j < w, the sliding window of Longformer (Beltagy et al. 2020).
 * - `sink+local`: the same, or j < s: the attention sinks of StreamingLLM (Xiao et al. 2023).
 * - `strided`: i - j < w, or k divides j, so that block 0 is kept: Sparse Transformers (Child et al. 2019), in
 *   blocks.
 * - `bigbird`: as `sink+local`, and r further blocks of each row at random, or all that are left where there
 *   are fewer: BigBird (Zaheer et al. 2020), causal and without its global rows.
 * - `butterfly`: with rows and columns counted in blocks of B tokens, i xor j is 0 or a power of two: the flat
 *   butterfly of Pixelated Butterfly (Dao et al. 2022), which block-sparse FlashAttention uses (Dao et al.
 *   2022, section 3.3).
 * - `topk`: decoding takes the first block, the two latest and those that matter most to the query, `keys`
 *   tokens in all; prefill is dense.
 * - `file`: a block mask, see `parseMask`.
 */
export type Pattern =
  | { readonly kind: "dense" }
  | { readonly kind: "local"; readonly window: number }
  | { readonly kind: "sink+local"; readonly sink: number; readonly window: number }
  | { readonly kind: "strided"; readonly window: number; readonly stride: number }
  | {
    readonly kind: "bigbird";
    readonly sink: number;
    readonly window: number;
    readonly random: number;
    readonly seed: number;
  }
  | { readonly kind: "butterfly"; readonly block: number }
  | { readonly kind: "topk"; readonly keys: number }
  | { readonly kind: "file"; readonly path: string };

/** A pattern whose blocks are known without a model or a file. */
export type StaticPattern = Exclude<Pattern, { readonly kind: "topk" | "file" }>;

/** Rows that a mask may have, a context of 64 Mi tokens; sizes of patterns end there too. */
const MAX_ROWS = 2 ** 20;
const MAX_TOKENS = MAX_ROWS * KV_BLOCK;
/** The first block, the two latest and one that is chosen. */
const LEAST_TOPK = LEAST_KEPT * KV_BLOCK;

/**
 * Reads a pattern as the command line has it. Names are in lower case; sizes may end in k or K, which means
 * 1024.
 * @throws UsageError which says what is wrong and in which number
 */
export function parsePattern(text: string): Pattern {
  const trimmed = text.trim();
  return readPattern(
    trimmed,
    (problem) => new UsageError(`The attention pattern \`${trimmed}\` ${problem}`, { hint: HINT }),
  );
}

/** Makes an error of what the text does wrong, a phrase that begins with its verb. */
type Refuse = (problem: string) => LongformError;

interface SizeSpec {
  /** As the grammar calls it. */
  readonly name: string;
  /** Tokens, at least. */
  readonly least: number;
  /** What a smaller one is. */
  readonly otherwise: string;
}

const WHOLE_BLOCK = { least: KV_BLOCK, otherwise: `smaller than a block of ${KV_BLOCK} tokens` };
const SOME = { least: 1, otherwise: "less than one token" };
const WINDOW: SizeSpec = { name: "W", ...WHOLE_BLOCK };
const SINK: SizeSpec = { name: "S", ...SOME };
const STRIDE: SizeSpec = { name: "K", ...WHOLE_BLOCK };
const RANDOM: SizeSpec = { name: "R", ...SOME };
const BUTTERFLY: SizeSpec = { name: "B", ...SOME };
const TOPK: SizeSpec = {
  name: "K",
  least: LEAST_TOPK,
  otherwise: `less than the ${LEAST_TOPK} tokens of the first block, the two latest and a chosen one`,
};

function readPattern(text: string, refuse: Refuse): Pattern {
  if (text === "") throw refuse("is empty");
  const colon = text.indexOf(":");
  const name = colon < 0 ? text : text.slice(0, colon);
  const rest = colon < 0 ? undefined : text.slice(colon + 1);
  switch (name) {
    case "dense":
      if (rest !== undefined) throw refuse("has a colon, and `dense` takes no sizes");
      return { kind: "dense" };
    case "local": {
      const [window] = readSizes(rest, [WINDOW], refuse);
      return { kind: "local", window: window! };
    }
    case "sink": {
      const match = /^([^+]*)\+local:([^]*)$/.exec(rest ?? "");
      if (!match) throw refuse("has a sink without a window: it must end in `+local:W`");
      const [sink] = readSizes(match[1], [SINK], refuse);
      const [window] = readSizes(match[2], [WINDOW], refuse);
      return { kind: "sink+local", sink: sink!, window: window! };
    }
    case "strided": {
      const [window, stride] = readSizes(rest, [WINDOW, STRIDE], refuse);
      return { kind: "strided", window: window!, stride: stride! };
    }
    case "bigbird": {
      const parts = rest?.split(",");
      const seed = parts?.length === 4 ? readSeed(parts.pop()!, refuse) : 0;
      const [sink, window, random] = readSizes(parts?.join(","), [SINK, WINDOW, RANDOM], refuse);
      return { kind: "bigbird", sink: sink!, window: window!, random: random!, seed };
    }
    case "butterfly": {
      if (rest === undefined) return { kind: "butterfly", block: KV_BLOCK };
      const [block] = readSizes(rest, [BUTTERFLY], refuse);
      return { kind: "butterfly", block: block! };
    }
    case "topk": {
      const [keys] = readSizes(rest, [TOPK], refuse);
      return { kind: "topk", keys: keys! };
    }
    case "file":
      if (!rest) throw refuse("names no file");
      return { kind: "file", path: rest };
    default:
      throw refuse(
        `begins with ${describe(name)}, which names no pattern` +
          (name === name.toLowerCase() ? "" : ": names are in lower case"),
      );
  }
}

function readSizes(text: string | undefined, specs: readonly SizeSpec[], refuse: Refuse): number[] {
  const wanted = specs.map(({ name }) => name).join(",");
  if (!text) throw refuse(`lacks ${wanted}`);
  const parts = text.split(",");
  if (parts.length !== specs.length) throw refuse(`has ${describe(text)} where ${wanted} belongs`);
  return specs.map((spec, i) => readSize(parts[i]!, spec, refuse));
}

function readSize(text: string, { name, least, otherwise }: SizeSpec, refuse: Refuse): number {
  const match = /^(\d+)([kK]?)$/.exec(text);
  if (!match) {
    throw refuse(`has ${describe(text)} for ${name}, which is no number of tokens such as 4096 or 4k`);
  }
  const tokens = Number(match[1]) * (match[2] ? 1024 : 1);
  if (tokens < least) throw refuse(`has ${tokens} for ${name}, ${otherwise}`);
  if (tokens > MAX_TOKENS) throw refuse(`has more than ${MAX_TOKENS} tokens for ${name}`);
  return tokens;
}

function readSeed(text: string, refuse: Refuse): number {
  const seed = /^\d+$/.test(text) ? Number(text) : NaN;
  if (seed < 2 ** 32) return seed;
  throw refuse(`has ${describe(text)} for SEED, which is no whole number from 0 to ${2 ** 32 - 1}`);
}

/** The pattern in its shortest form with plain numbers: `parsePattern` gives an equal one back. */
export function patternName(pattern: Pattern): string {
  switch (pattern.kind) {
    case "dense":
      return "dense";
    case "local":
      return `local:${pattern.window}`;
    case "sink+local":
      return `sink:${pattern.sink}+local:${pattern.window}`;
    case "strided":
      return `strided:${pattern.window},${pattern.stride}`;
    case "bigbird": {
      const { sink, window, random, seed } = pattern;
      return `bigbird:${sink},${window},${random}${seed === 0 ? "" : `,${seed}`}`;
    }
    case "butterfly":
      return pattern.block === KV_BLOCK ? "butterfly" : `butterfly:${pattern.block}`;
    case "topk":
      return `topk:${pattern.keys}`;
    case "file":
      return `file:${pattern.path}`;
  }
}

export function isStatic(pattern: Pattern): pattern is StaticPattern {
  return pattern.kind !== "topk" && pattern.kind !== "file";
}

/** Compressed sparse rows: row i has `indices[indptr[i]]` to `indices[indptr[i + 1] - 1]`, ascending. */
export interface Csr {
  /** Of each row, and behind the last. */
  readonly indptr: Uint32Array<ArrayBuffer>;
  /** Columns. */
  readonly indices: Uint32Array<ArrayBuffer>;
}

/** Blocks that a head keeps. */
export interface BlockLists {
  readonly rows: number;
  /** Blocks that every query of the row sees all keys of: j < i. */
  readonly full: Csr;
  /** Blocks that need the causal mask: the diagonal, j = i, where it is kept. */
  readonly partial: Csr;
}

/** The columns `first`, `first + step`, … below `end`. */
interface Run {
  readonly first: number;
  readonly end: number;
  readonly step: number;
}

function run(first: number, end: number, step = 1): Run {
  return { first, end, step };
}

/** The lists of a pattern for the first `rows` rows, in time that grows with the blocks kept. */
export function blockLists(pattern: StaticPattern, rows: number): BlockLists {
  return listsOf(rows, (row) => rowRuns(pattern, row));
}

/** @param runsOf the columns of a row, ascending and causal */
function listsOf(rows: number, runsOf: (row: number) => readonly Run[]): BlockLists {
  const most = rows * (rows - 1) / 2;
  const full = { indptr: new Uint32Array(rows + 1), indices: new Uint32Array(rows) };
  const partial = { indptr: new Uint32Array(rows + 1), indices: new Uint32Array(rows) };
  let whole = 0;
  let diagonal = 0;
  for (let row = 0; row < rows; row++) {
    if (whole + row > full.indices.length) {
      const grown = new Uint32Array(Math.min(most, 2 * (whole + row)));
      grown.set(full.indices);
      full.indices = grown;
    }
    for (const { first, end, step } of runsOf(row)) {
      for (let column = first; column < end; column += step) {
        if (column < row) full.indices[whole++] = column;
        else partial.indices[diagonal++] = column;
      }
    }
    full.indptr[row + 1] = whole;
    partial.indptr[row + 1] = diagonal;
  }
  full.indices = cut(full.indices, whole);
  partial.indices = cut(partial.indices, diagonal);
  return { rows, full, partial };
}

/** The beginning of an array, without the memory of the rest. */
function cut(array: Uint32Array<ArrayBuffer>, length: number): Uint32Array<ArrayBuffer> {
  return length === array.length ? array : array.slice(0, length);
}

function blocksOf(tokens: number): number {
  return Math.ceil(tokens / KV_BLOCK);
}

/** The columns of one row, ascending. */
function rowRuns(pattern: StaticPattern, row: number): Run[] {
  if (pattern.kind === "dense") return [run(0, row + 1)];
  if (pattern.kind === "butterfly") return butterflyRuns(blocksOf(pattern.block), row);
  const from = Math.max(0, row + 1 - blocksOf(pattern.window));
  const window = run(from, row + 1);
  switch (pattern.kind) {
    case "local":
      return [window];
    case "strided":
      return [run(0, from, blocksOf(pattern.stride)), window];
    case "sink+local":
      return [run(0, Math.min(from, blocksOf(pattern.sink))), window];
    case "bigbird": {
      const sink = Math.min(from, blocksOf(pattern.sink));
      const drawn = drawBlocks(pattern.seed, row, blocksOf(pattern.random), from - sink);
      return [run(0, sink), ...drawn.map((block) => run(sink + block, sink + block + 1)), window];
    }
  }
}

/** @param size blocks of KV_BLOCK tokens in one of the butterfly's */
function butterflyRuns(size: number, row: number): Run[] {
  const own = Math.floor(row / size);
  const columns = [own];
  // Of the numbers that differ from it in one bit, those that lack one of its bits are smaller than it.
  for (let bit = 1; bit <= own; bit *= 2) if (own & bit) columns.unshift(own - bit);
  return columns.map((column) => run(column * size, Math.min((column + 1) * size, row + 1)));
}

/**
 * `count` of the numbers from 0 to `among - 1`, ascending, or all if there are no more: Floyd's sampling
 * without repetition (Bentley and Floyd 1987). The nth draw of a row hashes seed, row and n, so that every
 * machine draws the same however many rows there are. A draw takes some numbers more often than others, by a
 * share below `among` / 2³².
 */
function drawBlocks(seed: number, row: number, count: number, among: number): number[] {
  if (among <= count) return Array.from({ length: among }, (_, i) => i);
  const key = fmix32(fmix32(seed) ^ row);
  const drawn = new Set<number>();
  for (let last = among - count; last < among; last++) {
    const bits = fmix32(key + Math.imul(drawn.size + 1, 0x9e3779b1));
    const candidate = Math.floor(bits * (last + 1) / 2 ** 32);
    drawn.add(drawn.has(candidate) ? last : candidate);
  }
  return [...Uint32Array.from(drawn).sort()];
}

/**
 * Blocks that a pattern, or an entry of a mask, keeps of `rows` rows at most: what memory is planned for, in a time that
 * does not grow with the rows.
 */
export function mostBlocks(kept: StaticPattern | MaskRows, rows: number): number {
  return Math.min(rows * (rows + 1) / 2, mostUncut(kept, rows));
}

function mostUncut(kept: StaticPattern | MaskRows, rows: number): number {
  switch (kept.kind) {
    case "dense":
      return Infinity;
    case "local":
      return rows * blocksOf(kept.window);
    case "sink+local":
      return rows * (blocksOf(kept.sink) + blocksOf(kept.window));
    case "strided":
      return rows * (blocksOf(kept.window) + Math.ceil(rows / blocksOf(kept.stride)));
    case "bigbird":
      return rows * (blocksOf(kept.sink) + blocksOf(kept.window) + blocksOf(kept.random));
    case "butterfly": {
      const size = blocksOf(kept.block);
      // A number has as many bits to lose as it has.
      return rows * size * (1 + Math.ceil(Math.log2(rows / size + 1)));
    }
    case "rows":
      return kept.rows.reduce((sum, { length }) => sum + length, 0) * kept.size ** 2;
  }
}

/** Blocks of one head, those of the diagonal among them. */
export function keptBlocks({ full, partial }: BlockLists): number {
  return full.indices.length + partial.indices.length;
}

/** Kept blocks as a share of the causal ones, rows (rows + 1) / 2, of all lists; 1 where there are no rows. */
export function density(lists: readonly BlockLists[]): number {
  let kept = 0;
  let causal = 0;
  for (const one of lists) {
    kept += keptBlocks(one);
    causal += one.rows * (one.rows + 1) / 2;
  }
  return causal === 0 ? 1 : kept / causal;
}

/** Blocks written out row by row. */
export interface MaskRows {
  readonly kind: "rows";
  /** Blocks of KV_BLOCK tokens in one of the mask's. */
  readonly size: number;
  /** Columns of each row in the mask's blocks, ascending. */
  readonly rows: readonly (readonly number[])[];
}

export interface MaskEntry {
  /** File and place for messages: `mask.json: masks[2]`. */
  readonly where: string;
  /** Undefined means all. */
  readonly layers: readonly number[] | undefined;
  readonly heads: readonly number[] | undefined;
  readonly kept: StaticPattern | MaskRows;
}

/** A mask file. */
export interface BlockMask {
  /** The first that names a layer and head counts; the last names all. */
  readonly entries: readonly MaskEntry[];
}

type JsonObject = Readonly<Record<string, unknown>>;

const ROWS_HINT = "list the blocks of keys that each block of queries keeps, as in [[0], [0, 1], [0, 2]]";
const FORM_HINT = 'write {"rows": [[0], [0, 1], ...]} or {"default": "local:1024", "masks": [...]}';
const ENTRY_HINT =
  'write {"layers": [0, 1], "heads": [0], "rows": [[0], [0, 1], ...]}, or "pattern" for "rows"';

/**
 * Reads a block mask, of one of two forms:
 *
 * `{"block": 64, "rows": [[0], [0, 1], [0, 2]]}`: `rows[i]` lists the blocks of keys that block i of queries
 * keeps, in any order and none twice, in all layers and heads. A row may be empty: its queries see nothing, and
 * get zeros.
 *
 * `{"block": 64, "default": "sink:64+local:1024", "masks": [{"layers": [0, 1], "heads": [0], "rows": […]},
 * {"layers": [2], "pattern": "dense"}]}`: the first of `masks` that names a layer and head counts; one without
 * `layers`, or `heads`, names all. It has rows or a pattern, any but `topk` and `file`. Heads that none names
 * have the pattern `default`, dense if that is left out.
 *
 * `block` is a multiple of 64 tokens, 64 if it is left out; of a larger block all causal blocks of 64 are kept.
 * There are at most 2²⁰ rows.
 *
 * @param path names the file in messages
 * @throws InputError which names the file and the place in it, such as `masks[2].rows[17]`
 */
export function parseMask(text: string, path: string): BlockMask {
  let json: unknown;
  try {
    json = JSON.parse(text);
  } catch (error) {
    const detail = printable((error as Error).message);
    throw new InputError(`${path} is not valid JSON`, { hint: FORM_HINT, detail, cause: error });
  }
  const object = readObject(json, path, ["block", "rows", "default", "masks"], FORM_HINT);
  const { block, rows, default: otherwise, masks } = object;
  requireOne(object, ["rows", "masks"], path, FORM_HINT);
  const size = block === undefined ? 1 : readBlock(block, `${path}: block`);
  if (masks === undefined) {
    if (otherwise !== undefined) {
      throw new InputError(`${path} has "default" and "rows", which are for all layers and heads`, {
        hint: `leave "default" away, or write "masks"`,
      });
    }
    const kept = readRows(rows, `${path}: rows`, size);
    return { entries: [{ where: `${path}: rows`, layers: undefined, heads: undefined, kept }] };
  }
  const entries = readArray(masks, `${path}: masks`, "mask", FORM_HINT, 1);
  const kept = otherwise === undefined
    ? { kind: "dense" } as const
    : readStatic(otherwise, `${path}: default`);
  return {
    entries: [
      ...entries.map((mask, i) => readEntry(mask, `${path}: masks[${i}]`, size)),
      { where: `${path}: default`, layers: undefined, heads: undefined, kept },
    ],
  };
}

function readEntry(json: unknown, where: string, size: number): MaskEntry {
  const object = readObject(json, where, ["layers", "heads", "rows", "pattern"], ENTRY_HINT);
  const { layers, heads, rows, pattern } = object;
  requireOne(object, ["rows", "pattern"], where, ENTRY_HINT);
  return {
    where,
    layers: layers === undefined ? undefined : readPlaces(layers, `${where}.layers`, "layer"),
    heads: heads === undefined ? undefined : readPlaces(heads, `${where}.heads`, "head"),
    kept: rows === undefined
      ? readStatic(pattern, `${where}.pattern`)
      : readRows(rows, `${where}.rows`, size),
  };
}

function readObject(json: unknown, where: string, keys: readonly string[], hint: string): JsonObject {
  if (typeof json !== "object" || json === null || Array.isArray(json)) {
    throw new InputError(`${where} is ${describe(json)}, not an object`, { hint });
  }
  const unknown = Object.keys(json).filter((key) => !keys.includes(key));
  if (unknown.length > 0) {
    const named = unknown.slice(0, 3).map(describe).join(", ");
    const more = unknown.length > 3 ? ` and ${unknown.length - 3} more` : "";
    throw new InputError(`${where} has no use for ${named}${more}`, {
      hint: `the keys are ${keys.join(", ")}`,
    });
  }
  return json as JsonObject;
}

function requireOne(object: JsonObject, keys: readonly [string, string], where: string, hint: string): void {
  const [a, b] = keys.map((key) => Object.hasOwn(object, key));
  if (a !== b) return;
  const [first, second] = keys;
  const problem = a ? `both "${first}" and "${second}"` : `neither "${first}" nor "${second}"`;
  throw new InputError(`${where} has ${problem}`, { hint });
}

/** Blocks of KV_BLOCK tokens in one of the mask's. */
function readBlock(value: unknown, where: string): number {
  if (typeof value === "number" && value > 0 && value <= MAX_TOKENS && value % KV_BLOCK === 0) {
    return value / KV_BLOCK;
  }
  throw new InputError(
    `${where} is ${describe(value)}, which is no multiple of ${KV_BLOCK} from ${KV_BLOCK} to ${MAX_TOKENS}`,
    { hint: `give the tokens of a block, such as ${KV_BLOCK} or ${2 * KV_BLOCK}` },
  );
}

function readStatic(value: unknown, where: string): StaticPattern {
  if (typeof value !== "string") {
    throw new InputError(`${where} is ${describe(value)}, not a pattern in quotes`, { hint: HINT });
  }
  const refuse = (problem: string) =>
    new InputError(`${where} is ${describe(value)}, which ${problem}`, { hint: HINT });
  const pattern = readPattern(value.trim(), refuse);
  if (isStatic(pattern)) return pattern;
  throw refuse(pattern.kind === "topk" ? "has no blocks before decoding" : "is another file");
}

function readRows(value: unknown, where: string, size: number): MaskRows {
  const array = readArray(value, where, "row", ROWS_HINT, 1);
  if (array.length > MAX_ROWS) {
    throw new InputError(`${where} has ${array.length} rows, and at most ${MAX_ROWS} are read`, {
      hint: "leave out the rows behind the context that is run, or use larger blocks",
    });
  }
  const rows = array.map((row, i) => {
    const columns = readNumbers(row, `${where}[${i}]`, "block", ROWS_HINT, 0);
    const beyond = columns.at(-1);
    if (beyond === undefined || beyond <= i) return columns;
    throw new InputError(
      `${where}[${i}] has block ${beyond}, which is behind its own: query block ${i} sees ` +
        (i === 0 ? "block 0" : `blocks 0 to ${i}`),
      { hint: ROWS_HINT },
    );
  });
  return { kind: "rows", size, rows };
}

function readPlaces(value: unknown, where: string, noun: "layer" | "head"): readonly number[] {
  const hint = `list ${noun}s by number, from 0, as in [0, 1]; leave the key out to name all`;
  return readNumbers(value, where, noun, hint, 1);
}

/** Whole numbers from 0, ascending and none twice. */
function readNumbers(value: unknown, where: string, noun: string, hint: string, least: number): number[] {
  const numbers = readArray(value, where, noun, hint, least).map((entry) => {
    if (typeof entry !== "number" || !Number.isSafeInteger(entry)) {
      throw new InputError(`${where} has ${describe(entry)}, which is no whole number`, { hint });
    }
    if (entry < 0) throw new InputError(`${where} has ${noun} ${entry}, and ${noun}s count from 0`, { hint });
    return entry;
  });
  numbers.sort((a, b) => a - b);
  const repeated = numbers.find((entry, i) => i > 0 && entry === numbers[i - 1]);
  if (repeated === undefined) return numbers;
  throw new InputError(`${where} has ${noun} ${repeated} more than once`, { hint });
}

/** @param least 1 where an empty array is an error */
function readArray(value: unknown, where: string, noun: string, hint: string, least: number): unknown[] {
  if (!Array.isArray(value)) {
    throw new InputError(`${where} is ${describe(value)}, not an array of ${noun}s`, { hint });
  }
  if (value.length < least) throw new InputError(`${where} is empty`, { hint });
  return value;
}

/** Longest string shown in a message. */
const MAX_SHOWN = 100;

/** A JSON value on one line of a message, shortened. */
function describe(value: unknown): string {
  if (Array.isArray(value)) return "an array";
  if (typeof value === "object" && value !== null) return "an object";
  if (typeof value !== "string") return String(value);
  return printable(JSON.stringify(value.slice(0, MAX_SHOWN))) + (value.length > MAX_SHOWN ? "…" : "");
}

/** The entry that counts for each of a layer's heads. */
export function maskEntries(mask: BlockMask, layer: number, heads: number): MaskEntry[] {
  return Array.from(
    { length: heads },
    (_, head) =>
      mask.entries.find((one) =>
        (one.layers?.includes(layer) ?? true) && (one.heads?.includes(head) ?? true)
      )!,
  );
}

/** The lists that each entry gave last: every layer and head of an entry has the same object. */
const latest = new WeakMap<MaskEntry, BlockLists>();

/**
 * The lists of a layer's heads, `heads` of them. Heads that the same entry of the mask is for have the same
 * object, in every layer for as long as `rows` is the same, so that it can be stored once.
 * @throws InputError when a mask that counts here has fewer rows
 */
export function maskLists(mask: BlockMask, layer: number, heads: number, rows: number): BlockLists[] {
  return maskEntries(mask, layer, heads).map((entry) => {
    let lists = latest.get(entry);
    if (lists?.rows !== rows) {
      lists = entryLists(entry, rows);
      latest.set(entry, lists);
    }
    return lists;
  });
}

function entryLists({ where, kept }: MaskEntry, rows: number): BlockLists {
  if (kept.kind !== "rows") return blockLists(kept, rows);
  const { size, rows: own } = kept;
  const covered = own.length * size;
  if (rows > covered) {
    throw new InputError(
      `${where} covers ${covered * KV_BLOCK} tokens, and ${rows * KV_BLOCK} are needed`,
      { hint: `add rows to its ${own.length}, or run at most ${covered * KV_BLOCK} tokens` },
    );
  }
  return listsOf(
    rows,
    (row) =>
      own[Math.floor(row / size)]!.map((column) =>
        run(column * size, Math.min((column + 1) * size, row + 1))
      ),
  );
}

/** @throws InputError when the mask names a layer or head that a model of these sizes lacks */
export function checkMask(mask: BlockMask, layers: number, heads: number): void {
  for (const entry of mask.entries) {
    checkPlaces(entry.layers, `${entry.where}.layers`, "layer", layers);
    checkPlaces(entry.heads, `${entry.where}.heads`, "head", heads);
  }
}

function checkPlaces(
  places: readonly number[] | undefined,
  where: string,
  noun: string,
  count: number,
): void {
  const last = places?.at(-1) ?? 0;
  if (last < count) return;
  throw new InputError(`${where} names ${noun} ${last}, and the model has ${noun}s 0 to ${count - 1}`, {
    hint: "make the mask for this model, or leave the number out",
  });
}
