/** Arbitrary and damaged inputs: JSON as text, with what `JSON.stringify` never writes, and bytes. */
import fc from "fast-check";

/** JSON text by its structure: objects may have a key twice, and `raw` may be anything. */
export type Json =
  | { readonly kind: "raw"; readonly text: string }
  | { readonly kind: "list"; readonly items: readonly Json[] }
  | { readonly kind: "object"; readonly pairs: readonly (readonly [key: string, value: Json])[] };

export function jsonOf(value: unknown): Json {
  if (Array.isArray(value)) return { kind: "list", items: value.map(jsonOf) };
  if (typeof value !== "object" || value === null) return { kind: "raw", text: JSON.stringify(value) };
  return { kind: "object", pairs: Object.entries(value).map(([key, one]) => [key, jsonOf(one)]) };
}

export function textOf(json: Json): string {
  if (json.kind === "raw") return json.text;
  if (json.kind === "list") return `[${json.items.map(textOf).join(",")}]`;
  return `{${json.pairs.map(([key, value]) => `${JSON.stringify(key)}:${textOf(value)}`).join(",")}}`;
}

/** Texts that a terminal would obey, that paths, regular expressions and JavaScript give a meaning, and long ones. */
export const HOSTILE_TEXTS = [
  "",
  " ",
  "\0",
  "a\nerror: all is well",
  "\r\x1b[2K\x1b]0;title\x07\x1b[31m",
  "\x9b2J",
  "\x7f",
  "\u202egnp.exe",
  "\u2028\u2029\ufeff\u200b",
  "\ud800",
  "\udc00\ud83d",
  "\u{e0041}",
  "x".repeat(3000),
  "\x1b".repeat(3000),
  "__proto__",
  "constructor",
  "toString",
  "length",
  "../../etc/passwd",
  "/etc/passwd",
  "C:\\model.safetensors",
  "(a+)+$",
  "[",
  "%s%n",
  "1e999",
  "`$(id)`",
  "naïve 東京 👨‍👩‍👧",
];

const NUMBERS = [
  ...["0", "-0", "1", "2", "3", "-1", "0.5", "1e0", "7.0", "64", "128", "100000", "16777215", "16777216"],
  ...["2147483647", "2147483648", "4294967295", "4294967296", "1099511627776", "9007199254740991"],
  ...["9007199254740993", "-9007199254740992", "18446744073709551615", "1e16", "1e300", "1e999"],
  ...["-1e999", "1e-400"],
];
const NOT_JSON = [
  "NaN",
  "01",
  "+1",
  "0x10",
  "'a'",
  "undefined",
  "",
  "nul",
  "[1,]",
  '"\n"',
  '"\\x"',
  "/**/1",
  "\ufeff1",
];
const VALUES = [
  ...["null", "true", "false", "[]", "{}", "[[]]", "[null]", "[[1,2],[3]]", '{"":{}}'],
  ...[
    '{"toString":1}',
    '{"valueOf":null,"toString":null}',
    '{"__proto__":{"type":"BPE"}}',
    '{"length":4294967295}',
  ],
  ...['{"then":1}', '{"toJSON":1}', "[0,0]", "[-0]", "[1e999]", `[${"0,".repeat(2000)}0]`],
];

function nested(open: string, close: string, depth: number): string {
  return open.repeat(depth) + "0" + close.repeat(depth);
}

/** Deeper than recursion goes. */
const DEEP = [nested("[", "]", 60_000), nested('{"a":', "}", 60_000)];

export const hostileText: fc.Arbitrary<string> = fc.oneof(
  fc.constantFrom(...HOSTILE_TEXTS),
  fc.string({ unit: "binary", maxLength: 12 }),
);

/** One value's JSON text, seldom one that is not JSON. */
const hostileValue: fc.Arbitrary<Json> = fc.oneof(
  { weight: 200, arbitrary: fc.constantFrom(...NUMBERS, ...VALUES) },
  { weight: 100, arbitrary: hostileText.map((text) => JSON.stringify(text)) },
  { weight: 20, arbitrary: fc.constantFrom(...NOT_JSON) },
  { weight: 1, arbitrary: fc.constantFrom(...DEEP) },
).map((text) => ({ kind: "raw", text }));

/** Any JSON, valid nearly always. */
export const anyJson: fc.Arbitrary<string> = fc.oneof(
  { weight: 4, arbitrary: fc.json({ maxDepth: 3 }) },
  { weight: 4, arbitrary: hostileValue.map(textOf) },
  {
    weight: 1,
    arbitrary: fc.dictionary(hostileText, fc.jsonValue({ maxDepth: 2 })).map((one) => JSON.stringify(one)),
  },
);

const JSON_EDITS = [
  ...["replace", "replace", "copy", "remove", "repeat", "rename", "insert", "wrap", "swap"],
] as const;

interface JsonEdit {
  readonly kind: typeof JSON_EDITS[number];
  /** Which of its values, counted in the order of the text, over and over. */
  readonly at: number;
  readonly other: number;
  readonly value: Json;
  readonly key: string;
}

const jsonEdit: fc.Arbitrary<JsonEdit> = fc.record({
  kind: fc.constantFrom(...JSON_EDITS),
  at: fc.nat(9999),
  other: fc.nat(9999),
  value: hostileValue,
  key: hostileText,
});

/**
 * The JSON with one to four values replaced, copied to another place, removed, repeated under the same key, renamed,
 * put in, wrapped or swapped.
 */
export function damagedJson(whole: Json, words: readonly string[] = []): fc.Arbitrary<Json> {
  const edits = fc.array(
    words.length === 0 ? jsonEdit : fc.oneof(
      jsonEdit,
      // What the format itself gives a meaning, in the wrong place.
      fc.record({ edit: jsonEdit, word: fc.constantFrom(...words) }).map(({ edit, word }) => ({
        ...edit,
        value: { kind: "raw" as const, text: JSON.stringify(word) },
        key: word,
      })),
    ),
    { minLength: 1, maxLength: 4 },
  );
  return edits.map((list) => list.reduce(edited, whole));
}

function edited(whole: Json, edit: JsonEdit): Json {
  const places = placesOf(whole);
  const at = edit.at % places.length;
  const other = valueAt(whole, edit.other % places.length);
  switch (edit.kind) {
    case "replace":
      return withValue(whole, at, () => [edit.value]);
    case "copy":
      return withValue(whole, at, () => [other]);
    case "swap": {
      const own = valueAt(whole, at);
      const place = edit.other % places.length;
      // Inside of one another there is nothing to swap.
      if (place <= at || place < at + placesOf(own).length) return withValue(whole, at, () => [other]);
      return withValue(withValue(whole, place, () => [own]), at, () => [other]);
    }
    case "remove":
      return withValue(whole, at, () => []);
    case "repeat":
      return withValue(whole, at, (value) => [value, other]);
    case "wrap":
      return withValue(whole, at, (value) => [{ kind: "list", items: [value] }]);
    case "insert":
    case "rename":
      return withValue(whole, at, (value) => [withPair(value, edit)]);
  }
}

function withPair(value: Json, { kind, key, other, value: own }: JsonEdit): Json {
  if (value.kind === "list") return { ...value, items: [...value.items, own] };
  if (value.kind === "raw") return own;
  const chosen = value.pairs.length === 0 ? 0 : other % value.pairs.length;
  if (kind === "insert" || value.pairs.length === 0) return { ...value, pairs: [...value.pairs, [key, own]] };
  return { ...value, pairs: value.pairs.map(([name, one], i) => [i === chosen ? key : name, one]) };
}

/** All values of it, itself the first, in the order of the text. */
function placesOf(json: Json): Json[] {
  if (json.kind === "raw") return [json];
  const children = json.kind === "list" ? json.items : json.pairs.map(([, value]) => value);
  return [json, ...children.flatMap(placesOf)];
}

function valueAt(json: Json, place: number): Json {
  return placesOf(json)[place]!;
}

/** With none, one or several values in the place of one. */
function withValue(whole: Json, place: number, change: (value: Json) => readonly Json[]): Json {
  let count = 0;
  const visit = (json: Json): readonly Json[] => {
    if (count++ === place) {
      count += placesOf(json).length - 1;
      return change(json);
    }
    if (json.kind === "list") return [{ ...json, items: json.items.flatMap(visit) }];
    if (json.kind === "raw") return [json];
    const pairs = json.pairs.flatMap(([key, value]) => visit(value).map((one) => [key, one] as const));
    return [{ ...json, pairs }];
  };
  return visit(whole)[0] ?? { kind: "raw", text: "" };
}

/** Whether an object in it has a key twice. */
export function hasRepeatedKey(json: Json): boolean {
  if (json.kind === "raw") return false;
  if (json.kind === "list") return json.items.some(hasRepeatedKey);
  return new Set(json.pairs.map(([key]) => key)).size < json.pairs.length ||
    json.pairs.some(([, value]) => hasRepeatedKey(value));
}

const BYTE_EDITS = ["flip", "set", "cut", "insert", "delete", "repeat", "length"] as const;

const byteEdit = fc.record({
  kind: fc.constantFrom(...BYTE_EDITS),
  /** Of the length: the first bytes, which say most, come up as often as all the rest. */
  at: fc.oneof(fc.double({ min: 0, max: 1, noNaN: true }), fc.double({ min: 0, max: 0.02, noNaN: true })),
  length: fc.nat(40),
  byte: fc.nat(255),
  bytes: fc.oneof(
    fc.uint8Array({ maxLength: 9 }),
    fc.constantFrom(...HOSTILE_TEXTS, "\ufeff", "\r\n", "\n").map((text) => new TextEncoder().encode(text)),
  ),
  /** For a length of 64 bits. */
  number: fc.oneof(
    fc.constantFrom(0n, 1n, 7n, 8n, 2n ** 31n, 2n ** 32n, 2n ** 40n, 2n ** 53n, 2n ** 63n, 2n ** 64n - 1n),
    fc.bigInt({ min: 0n, max: 4096n }),
  ),
});

type ByteEdit = typeof byteEdit extends fc.Arbitrary<infer T> ? T : never;

/** The bytes with one to four places flipped, overwritten, cut off, put in, taken out or repeated. */
export function damagedBytes(whole: Uint8Array): fc.Arbitrary<Uint8Array> {
  return fc.array(byteEdit, { minLength: 1, maxLength: 4 }).map((edits) => edits.reduce(editedBytes, whole));
}

function editedBytes(bytes: Uint8Array, edit: ByteEdit): Uint8Array {
  const at = Math.min(bytes.length, Math.floor(edit.at * bytes.length));
  const [before, after] = [bytes.subarray(0, at), bytes.subarray(at)];
  switch (edit.kind) {
    case "flip":
    case "set": {
      const changed = Uint8Array.from(bytes);
      if (at < bytes.length) {
        changed[at] = edit.kind === "set" ? edit.byte : changed[at]! ^ (1 << (edit.byte % 8));
      }
      return changed;
    }
    case "cut":
      return Uint8Array.from(before);
    case "insert":
      return Buffer.concat([before, edit.bytes, after]);
    case "delete":
      return Buffer.concat([before, after.subarray(edit.length)]);
    case "repeat":
      return Buffer.concat([before, after.subarray(0, edit.length), after]);
    case "length": {
      const changed = Uint8Array.from(bytes);
      if (changed.length >= 8) new DataView(changed.buffer).setBigUint64(0, edit.number, true);
      return changed;
    }
  }
}

/** Bytes that have nothing to do with any format, and the least that some formats take. */
export const anyBytes: fc.Arbitrary<Uint8Array> = fc.oneof(
  fc.uint8Array({ maxLength: 64 }),
  fc.constantFrom(
    "",
    "\ufeff",
    "{}",
    "[]",
    "null",
    "\x02\0\0\0\0\0\0\0{}",
    "version https://git-lfs.github.com/spec",
  )
    .map(bytesOf),
);

export function bytesOf(text: string): Uint8Array {
  return new TextEncoder().encode(text);
}
