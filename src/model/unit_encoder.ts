/**
 * Encodes a text unit by unit and remembers the units' ids. A unit reaches from one place where the text may be
 * cut to the next: mostly a word with the white space in front of it, so that most units have come before.
 */
import { fmix32 } from "../runtime/fmix32.ts";

/** UTF-16 code units of the longest unit that is remembered: a text without white space is one unit. */
const LONGEST = 64;

/**
 * Units that are remembered, in 5 MiB, before all of them are forgotten. In 150 MB of code and prose in random
 * order such a memory lacks 25% of the units, one that forgets half of them at a time 23%, one of twice the
 * size 22%, and one without end 11%.
 */
const CAPACITY = 1 << 16;

/** Unicode's White_Space, all of which lies in the BMP, by its UTF-16 code unit. */
export function isWhiteSpace(code: number): boolean {
  if (code < 0x80) return code === 0x20 || (code >= 0x09 && code <= 0x0d);
  if (code < 0x1680) return code === 0x85 || code === 0xa0;
  return code === 0x1680 || (code >= 0x2000 && code <= 0x200a) || code === 0x2028 || code === 0x2029 ||
    code === 0x202f || code === 0x205f || code === 0x3000;
}

/** Gives the ids of texts, for a tokenizer where those are the ids of the units, one after the other. */
export class UnitEncoder {
  readonly #encodeUnit: (unit: string) => readonly number[];
  readonly #mayCutBefore: (code: number) => boolean;
  readonly #memory: UnitMemory;

  /**
   * @param mayCutBefore whether this white space, a UTF-16 code unit, may begin a unit behind something else
   * @param capacity units to remember: a power of two, 64 or more
   */
  constructor(
    encodeUnit: (unit: string) => readonly number[],
    mayCutBefore: (code: number) => boolean,
    capacity = CAPACITY,
  ) {
    this.#encodeUnit = encodeUnit;
    this.#mayCutBefore = mayCutBefore;
    this.#memory = new UnitMemory(capacity);
  }

  /** The ids of the text; throws what `encodeUnit` throws. */
  encode(text: string): Uint32Array<ArrayBuffer> {
    const ids = new IdList(text.length >>> 2);
    let start = 0;
    let hash = 0;
    let isSpace = true;
    for (let at = 0; at < text.length; at++) {
      const code = text.charCodeAt(at);
      const wasSpace = isSpace;
      isSpace = isWhiteSpace(code);
      if (isSpace && !wasSpace && this.#mayCutBefore(code)) {
        this.#encodeUnitInto(ids, text, start, at, hash);
        start = at;
        hash = 0;
      }
      hash = Math.imul(hash ^ code, 0x01000193); // FNV-1a, 16 bits at a time
    }
    if (start < text.length) this.#encodeUnitInto(ids, text, start, text.length, hash);
    return ids.toArray();
  }

  #encodeUnitInto(ids: IdList, text: string, start: number, end: number, hash: number): void {
    const isKept = end - start <= LONGEST;
    const mixed = fmix32(hash);
    if (isKept && this.#memory.appendIds(ids, text, start, end, mixed)) return;
    const encoded = Uint32Array.from(this.#encodeUnit(text.slice(start, end)));
    ids.append(encoded, 0, encoded.length);
    if (isKept) this.#memory.add(text, start, end, mixed, encoded);
  }
}

/** Ids one after the other, in an array that grows. */
class IdList {
  #ids: Uint32Array<ArrayBuffer>;
  #length = 0;

  constructor(expected: number) {
    this.#ids = new Uint32Array(expected + 64);
  }

  append(from: Uint32Array, start: number, end: number): void {
    const length = this.#length + end - start;
    if (length > this.#ids.length) {
      const grown = new Uint32Array(2 * length);
      grown.set(this.#ids);
      this.#ids = grown;
    }
    for (let i = start, to = this.#length; i < end; i++, to++) this.#ids[to] = from[i]!;
    this.#length = length;
  }

  toArray(): Uint32Array<ArrayBuffer> {
    return this.#ids.slice(0, this.#length);
  }
}

/** Slots that are looked at for a unit. Half of all stay free, so that few units find none of theirs free. */
const MOST_PROBES = 32;

/**
 * The ids of units, in a hash table with linear probing (Knuth, The Art of Computer Programming 3, section 6.4,
 * algorithm L). It holds characters in place of strings: looking for a unit then makes no string, which is some
 * four times as fast as a `Map`, and a string that is a slice of a text would keep all of the text alive.
 */
class UnitMemory {
  readonly #capacity: number;
  /** 1 + the number of the entry, 0 where there is none. */
  readonly #slots: Uint32Array;
  /** By entry; its characters and ids end where those of the next begin. */
  readonly #hashes: Uint32Array;
  readonly #charStarts: Uint32Array;
  readonly #idStarts: Uint32Array;
  /** For 16 code units and 8 ids an entry, on average. */
  readonly #chars: Uint16Array;
  readonly #ids: Uint32Array;
  #count = 0;

  constructor(capacity: number) {
    this.#capacity = capacity;
    this.#slots = new Uint32Array(2 * capacity);
    this.#hashes = new Uint32Array(capacity);
    this.#charStarts = new Uint32Array(capacity + 1);
    this.#idStarts = new Uint32Array(capacity + 1);
    this.#chars = new Uint16Array(16 * capacity);
    this.#ids = new Uint32Array(8 * capacity);
  }

  /** Appends the ids of `text.slice(start, end)`, if they are known. */
  appendIds(to: IdList, text: string, start: number, end: number, hash: number): boolean {
    for (let probe = 0; probe < MOST_PROBES; probe++) {
      const entry = this.#slots[(hash + probe) & (this.#slots.length - 1)]! - 1;
      if (entry < 0) return false;
      if (this.#hashes[entry] === hash && this.#equals(entry, text, start, end)) {
        to.append(this.#ids, this.#idStarts[entry]!, this.#idStarts[entry + 1]!);
        return true;
      }
    }
    return false;
  }

  #equals(entry: number, text: string, start: number, end: number): boolean {
    const first = this.#charStarts[entry]!;
    if (this.#charStarts[entry + 1]! - first !== end - start) return false;
    for (let i = 0; i < end - start; i++) {
      if (this.#chars[first + i] !== text.charCodeAt(start + i)) return false;
    }
    return true;
  }

  /** Keeps the ids of a unit that is not known; where there is no room, everything else is forgotten first. */
  add(text: string, start: number, end: number, hash: number, ids: Uint32Array): void {
    if (
      this.#count === this.#capacity || this.#charStarts[this.#count]! + end - start > this.#chars.length ||
      this.#idStarts[this.#count]! + ids.length > this.#ids.length
    ) {
      this.#slots.fill(0);
      this.#count = 0;
    }
    const slot = this.#freeSlot(hash);
    if (slot === undefined) return;
    const entry = this.#count++;
    const firstChar = this.#charStarts[entry]!;
    for (let i = 0; i < end - start; i++) this.#chars[firstChar + i] = text.charCodeAt(start + i);
    this.#charStarts[entry + 1] = firstChar + end - start;
    this.#ids.set(ids, this.#idStarts[entry]!);
    this.#idStarts[entry + 1] = this.#idStarts[entry]! + ids.length;
    this.#hashes[entry] = hash;
    this.#slots[slot] = entry + 1;
  }

  #freeSlot(hash: number): number | undefined {
    for (let probe = 0; probe < MOST_PROBES; probe++) {
      const slot = (hash + probe) & (this.#slots.length - 1);
      if (this.#slots[slot] === 0) return slot;
    }
    return undefined;
  }
}
