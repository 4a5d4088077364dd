/**
 * Finds shared libraries as glibc's dynamic linker does (ld.so(8)), without loading them: which file a name
 * leads to, and what would keep that file from being loaded.
 */
import process from "node:process";
import type { Host } from "./host.ts";

export interface SharedLibrary {
  readonly path: string;
  /** Why it does not load; undefined when nothing is known against it. */
  readonly problem: string | undefined;
}

/** Folders that are searched last, with or without a distribution's multiarch folders. */
const DEFAULT_FOLDERS: Readonly<Record<string, readonly string[]>> = {
  x64: ["/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/lib64", "/lib", "/usr/lib"],
  arm64: ["/lib/aarch64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/lib64", "/usr/lib64", "/lib", "/usr/lib"],
};

/** Numbers of the processors in an ELF header (`e_machine`). */
const ELF_MACHINES: Readonly<Record<string, number>> = { x64: 62, arm64: 183 };
const ELF_HEADER_BYTES = 64;
const ELF_MAGIC = 0x7f454c46;
const ELF_CLASS_64 = 2;
const SEGMENT_LOAD = 1;
const SEGMENT_DYNAMIC = 2;
const TAG_NEEDED = 1;
const TAG_STRTAB = 5;
const TAG_STRSZ = 10;
const TAG_RUNPATH = 29;
/** Far more than the names in a driver take; a header that asks for more is damaged. */
const MOST_TABLE_BYTES = 64 << 20;

interface DynamicSegment {
  readonly needed: readonly string[];
  readonly runpath: readonly string[];
}

export class DynamicLinker {
  readonly #host: Host;
  #cache: ReadonlyMap<string, readonly string[]> | undefined;

  constructor(host: Host) {
    this.#host = host;
  }

  /** The library that `dlopen` takes for a path or a bare name; undefined where there is none. */
  find(name: string): SharedLibrary | undefined {
    const found = this.#locate(name, []);
    if (!found || found.problem !== undefined) return found;
    const { needed, runpath } = this.#readDynamicSegment(found.path);
    const folders = runpath.map((folder) => originOf(folder, found.path));
    const missing = needed.find((other) => {
      const there = this.#locate(other, folders);
      return !there || there.problem !== undefined;
    });
    return missing === undefined ? found : { ...found, problem: `it needs ${missing}, which is missing` };
  }

  /** The first file that the linker does not pass over: one that is damaged ends its search as well. */
  #locate(name: string, runpath: readonly string[]): SharedLibrary | undefined {
    const paths = name.includes("/") ? [name] : [
      ...[...this.#libraryPath(), ...runpath].map((folder) => `${folder}/${name}`),
      ...this.#cached(name),
      ...DEFAULT_FOLDERS[process.arch]?.map((folder) => `${folder}/${name}`) ?? [],
    ];
    for (const path of paths) {
      if (!this.#host.exists(path)) continue;
      const header = this.#read(path, 0, ELF_HEADER_BYTES);
      if (header.byteLength < ELF_HEADER_BYTES) return { path, problem: "the file is too short" };
      if (header.getUint32(0) !== ELF_MAGIC) return { path, problem: "it is not an ELF file" };
      const isOurs = header.getUint8(4) === ELF_CLASS_64 &&
        header.getUint16(18, true) === ELF_MACHINES[process.arch];
      if (isOurs) return { path, problem: undefined };
    }
    return undefined;
  }

  /** The folders of LD_LIBRARY_PATH. */
  #libraryPath(): string[] {
    return (this.#host.variable("LD_LIBRARY_PATH") ?? "").split(/[:;]/).filter((folder) => folder !== "");
  }

  #cached(name: string): readonly string[] {
    this.#cache ??= parseLinkerCache(this.#host.bytes(CACHE, 0, this.#host.fileBytes(CACHE)));
    return this.#cache.get(name) ?? [];
  }

  #read(path: string, offset: number, length: number): DataView {
    const bytes = this.#host.bytes(path, offset, Math.min(length, MOST_TABLE_BYTES)) ?? new Uint8Array();
    return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  }

  #readDynamicSegment(path: string): DynamicSegment {
    try {
      return parseDynamicSegment((offset, length) => this.#read(path, offset, length));
    } catch (error) {
      if (error instanceof RangeError) return { needed: [], runpath: [] }; // cut off: nothing is known
      throw error;
    }
  }
}

function originOf(folder: string, library: string): string {
  return folder.replace(/\$\{?ORIGIN\}?/, library.slice(0, library.lastIndexOf("/")));
}

/**
 * The libraries that an ELF file names (elf(5)): its program headers lead to the dynamic segment, whose tags
 * give places in a table of strings.
 * @throws RangeError where the file ends too soon
 */
function parseDynamicSegment(read: (offset: number, length: number) => DataView): DynamicSegment {
  const header = read(0, ELF_HEADER_BYTES);
  const u64 = (view: DataView, offset: number) => Number(view.getBigUint64(offset, true));
  const size = header.getUint16(54, true);
  const count = header.getUint16(56, true);
  const table = read(u64(header, 32), size * count);
  const segments = Array.from({ length: count }, (_, i) => ({
    type: table.getUint32(size * i, true),
    offset: u64(table, size * i + 8),
    address: u64(table, size * i + 16),
    bytes: u64(table, size * i + 32),
  }));
  const dynamic = segments.find(({ type }) => type === SEGMENT_DYNAMIC);
  if (!dynamic) return { needed: [], runpath: [] };
  const entries = read(dynamic.offset, dynamic.bytes);
  const values = (tag: number): number[] => {
    const all = Array.from({ length: Math.floor(dynamic.bytes / 16) }, (_, i) => 16 * i);
    return all.filter((at) => u64(entries, at) === tag).map((at) => u64(entries, at + 8));
  };
  const address = values(TAG_STRTAB)[0] ?? 0;
  const home = segments.find((segment) =>
    segment.type === SEGMENT_LOAD && address >= segment.address && address < segment.address + segment.bytes
  );
  if (!home) return { needed: [], runpath: [] };
  const strings = read(home.offset + address - home.address, values(TAG_STRSZ)[0] ?? 0);
  const text = (at: number) => cString(strings, at);
  return {
    needed: values(TAG_NEEDED).map(text),
    runpath: values(TAG_RUNPATH).flatMap((at) => text(at).split(":")),
  };
}

/** @throws RangeError where no zero ends it */
function cString(view: DataView, at: number): string {
  let end = at;
  while (view.getUint8(end) !== 0) end++;
  return new TextDecoder().decode(new Uint8Array(view.buffer, view.byteOffset + at, end - at));
}

const CACHE = "/etc/ld.so.cache";
const CACHE_MAGIC = "glibc-ld.so.cache1.1";
const CACHE_HEADER_BYTES = 48;
const CACHE_ENTRY_BYTES = 24;

/**
 * The paths of each name in /etc/ld.so.cache, glibc's `struct cache_file_new` (sysdeps/generic/dl-cache.h): a
 * header, then entries whose second and third words are the places of a name and of its path.
 */
function parseLinkerCache(bytes: Uint8Array = new Uint8Array()): Map<string, string[]> {
  const paths = new Map<string, string[]>();
  // Some systems still write the old format in front of it.
  const start = new TextDecoder("latin1").decode(bytes).indexOf(CACHE_MAGIC);
  if (start < 0) return paths;
  const view = new DataView(bytes.buffer, bytes.byteOffset + start, bytes.byteLength - start);
  try {
    const count = view.getUint32(CACHE_MAGIC.length, true);
    for (let i = 0; i < count; i++) {
      const entry = CACHE_HEADER_BYTES + CACHE_ENTRY_BYTES * i;
      const name = cString(view, view.getUint32(entry + 4, true));
      const path = cString(view, view.getUint32(entry + 8, true));
      paths.set(name, [...paths.get(name) ?? [], path]);
    }
  } catch (error) {
    if (!(error instanceof RangeError)) throw error; // of a damaged cache, what there is
  }
  return paths;
}
