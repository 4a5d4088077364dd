/**
 * Where the program's own files are: in its checkout, or inside the executable that scripts/compile.ts makes of it.
 * Bun gives files inside an executable paths that `stat`, `readFile` and `openAsBlob` take, but `open` does not.
 */
import { openAsBlob } from "node:fs";
import { open } from "node:fs/promises";
import { fileURLToPath, URL } from "node:url";

/** Put in the place of this name by scripts/compile.ts; nothing has it otherwise. */
declare const LONGFORM_EXECUTABLE: true;

/** Whether the program is such an executable. */
export const IS_EXECUTABLE = typeof LONGFORM_EXECUTABLE !== "undefined";

/** The folder of main.ts. In an executable all modules are one, and that is where it seems to be. */
const ROOT = new URL(IS_EXECUTABLE ? "./" : "../../", import.meta.url);

/** @param path from the folder of main.ts, with slashes */
export function programFile(path: string): URL {
  return new URL(path, ROOT);
}

/** What changes when a file is written to. */
export interface FileVersion {
  readonly size: number;
  readonly mtimeMs?: number;
}

/** What reading a file at given places takes of a `FileHandle`. */
export interface ReadableFile {
  /** @returns also when the file was last written to, where it can be */
  stat(): Promise<FileVersion>;
  read(
    into: Uint8Array,
    offset: number,
    length: number,
    position: number,
  ): Promise<{ readonly bytesRead: number }>;
  close(): Promise<void>;
}

/**
 * Opens a file, one inside the executable too: of that no more is copied into memory than is read.
 * @throws as `open` of node:fs
 */
export async function openForReading(path: string): Promise<ReadableFile> {
  const isInside = IS_EXECUTABLE && path.startsWith(fileURLToPath(ROOT));
  return isInside ? readableBlob(await openAsBlob(path)) : await open(path, "r");
}

function readableBlob(blob: Blob): ReadableFile {
  return {
    stat: () => Promise.resolve(blob),
    async read(into, offset, length, position) {
      const bytes = new Uint8Array(await blob.slice(position, position + length).arrayBuffer());
      into.set(bytes, offset);
      return { bytesRead: bytes.byteLength };
    },
    close: () => Promise.resolve(),
  };
}
