/** Made-up machines for what looks at a machine's files: a folder that stands for `/`. */
import { mkdirSync, symlinkSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";

/** ELF numbers (elf(5)) of this processor and another. */
const MACHINES = process.arch === "arm64" ? { own: 183, other: 62 } : { own: 62, other: 183 };

/** A file's content; `null` makes a folder, `{ link }` a symbolic link. */
export type MadeUpFile = string | Uint8Array | null | { readonly link: string };

/** Writes files below a folder by their absolute paths. */
export function writeMachine(root: string, files: Readonly<Record<string, MadeUpFile>>): string {
  for (const [path, content] of Object.entries(files)) {
    const real = join(root, path);
    mkdirSync(content === null ? real : dirname(real), { recursive: true });
    if (content === null) continue;
    if (typeof content === "string" || content instanceof Uint8Array) writeFileSync(real, content);
    else symlinkSync(content.link, real);
  }
  return root;
}

/** A Vulkan driver's manifest. */
export function manifest(library: string, apiVersion = "1.3.300"): string {
  return JSON.stringify({
    file_format_version: "1.0.0",
    ICD: { library_path: library, api_version: apiVersion },
  });
}

export interface MadeUpLibrary {
  /** Made for another processor. */
  readonly isForeign?: boolean;
  /** Names of the libraries that it is loaded with. */
  readonly needed?: readonly string[];
  readonly runpath?: string;
  /** What else is in it. */
  readonly text?: string;
}

/** A shared library as far as its headers go. One that needs nothing has nothing that is loaded. */
export function library(
  { isForeign = false, needed = [], runpath, text = "" }: MadeUpLibrary = {},
): Uint8Array {
  const names = [...needed, ...(runpath === undefined ? [] : [runpath])];
  const strings = new TextEncoder().encode(["", ...names, ""].join("\0"));
  const placeOf = (i: number) => 1 + names.slice(0, i).join("").length + i;
  const headers = 64;
  const segments = names.length > 0 ? 2 : 0;
  const tables = headers + 56 * segments;
  const tags: [tag: number, value: number][] = [
    ...needed.map((_, i): [number, number] => [1, placeOf(i)]), // DT_NEEDED
    ...(runpath === undefined ? [] : [[29, placeOf(needed.length)] as [number, number]]), // DT_RUNPATH
  ];
  // Addresses are places in the file, 0x1000 higher.
  const stringsAt = tables + 16 * (tags.length + 3);
  tags.push([5, 0x1000 + stringsAt], [10, strings.length], [0, 0]); // DT_STRTAB, DT_STRSZ, DT_NULL
  const end = stringsAt + strings.length;
  const file = new Uint8Array(end);
  const view = new DataView(file.buffer);
  const u64 = (at: number, value: number) => view.setBigUint64(at, BigInt(value), true);
  view.setUint32(0, 0x7f454c46);
  view.setUint8(4, 2); // 64 bits
  view.setUint16(16, 3, true); // a shared object
  view.setUint16(18, isForeign ? MACHINES.other : MACHINES.own, true);
  u64(32, headers);
  view.setUint16(54, 56, true);
  view.setUint16(56, segments, true);
  if (segments > 0) {
    const segment = (i: number, type: number, offset: number, bytes: number) => {
      const at = headers + 56 * i;
      view.setUint32(at, type, true);
      u64(at + 8, offset);
      u64(at + 16, 0x1000 + offset);
      u64(at + 32, bytes);
    };
    segment(0, 1, 0, end); // PT_LOAD
    segment(1, 2, tables, 16 * tags.length); // PT_DYNAMIC
    tags.forEach(([tag, value], i) => {
      u64(tables + 16 * i, tag);
      u64(tables + 16 * i + 8, value);
    });
    file.set(strings, stringsAt);
  }
  return new Uint8Array([...file, ...new TextEncoder().encode(text)]);
}

/** An /etc/ld.so.cache of names and their paths. */
export function linkerCache(entries: readonly (readonly [name: string, path: string])[]): Uint8Array {
  const strings = new TextEncoder().encode(entries.flat().map((text) => `${text}\0`).join(""));
  const stringsAt = 48 + 24 * entries.length;
  const file = new Uint8Array(stringsAt + strings.length);
  const view = new DataView(file.buffer);
  file.set(new TextEncoder().encode("glibc-ld.so.cache1.1"));
  view.setUint32(20, entries.length, true);
  view.setUint32(24, strings.length, true);
  let at = stringsAt;
  entries.forEach(([name, path], i) => {
    view.setUint32(48 + 24 * i + 4, at, true);
    view.setUint32(48 + 24 * i + 8, at + name.length + 1, true);
    at += name.length + path.length + 2;
  });
  file.set(strings, stringsAt);
  return file;
}
