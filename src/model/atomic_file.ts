/** Files that appear whole or not at all: written under another name beside their destination, then renamed. */
import { closeSync, constants, openSync, rmSync, symlinkSync } from "node:fs";
import { type FileHandle, lstat, open, readdir, realpath, rename, rm, stat } from "node:fs/promises";
import { dirname, join } from "node:path";
import { OutputError } from "../runtime/errors.ts";
import { ioReason } from "../runtime/io_error.ts";
import { fileErrorCode } from "./json_file.ts";

/** The file while it is written. */
export interface PendingFile {
  /** Writes all of `bytes` at `position`, in bytes from the start. @throws OutputError */
  write(bytes: Uint8Array, position: number): Promise<void>;
}

/** A new file, open for writing, in the folder of the one that it shall replace. */
interface Replacement {
  readonly file: FileHandle;
  readonly path: string;
  /** What it replaces: the path asked for, or the file that this is a link to. */
  readonly target: string;
}

/**
 * Writes a file of any size. What was at `path` before stays as it is until the new file is complete and on the disk;
 * whatever fails, `fill` included, nothing else is left behind. A process that is killed can leave a
 * `.longform-*.tmp` beside `path`, which is removed when a file is written there a day later.
 * @throws OutputError when the file cannot be written, and what `fill` throws
 */
export async function writeFileAtomically(
  path: string,
  fill: (file: PendingFile) => Promise<void>,
): Promise<void> {
  const replacement = await createReplacement(path);
  try {
    await fillAndClose(replacement.file, path, fill);
    await attempt(path, () => rename(replacement.path, replacement.target));
    temporaries.delete(replacement.path);
  } catch (error) {
    await discard(replacement.path);
    throw error;
  }
}

/**
 * Makes `path` a symbolic link, in place of whatever link or file is there.
 * @param target as it is written into the link
 * @throws OutputError
 */
export async function writeLinkAtomically(path: string, target: string): Promise<void> {
  const temporary = temporaryIn(dirname(path));
  try {
    await attempt(path, async () => {
      symlinkSync(target, temporary);
      temporaries.add(temporary);
      await rename(temporary, path);
    });
    temporaries.delete(temporary);
  } catch (error) {
    await discard(temporary);
    throw error;
  }
}

/**
 * Throws what `writeFileAtomically` would throw at once: to be called before long work whose result goes there.
 * @throws OutputError
 */
export async function requireWritable(path: string): Promise<void> {
  const replacement = await createReplacement(path);
  await replacement.file.close();
  await discard(replacement.path);
}

/**
 * Files and links of this process that have not got their names yet. They are made without other threads, one of which
 * could still do it after a signal has had them all removed.
 */
const temporaries = new Set<string>();

/** Not derived from the file's name, which may have the greatest length that there is. */
function temporaryIn(folder: string): string {
  return join(folder, `.longform-${crypto.randomUUID()}.tmp`);
}

/** Removes what is being written at this moment: to be called before the process ends without waiting for it. */
export function removeTemporaryFiles(): void {
  for (const path of temporaries) {
    try {
      rmSync(path, { force: true });
    } catch {
      // The process ends, whatever stays.
    }
  }
}

async function createReplacement(path: string): Promise<Replacement> {
  const { target, mode } = await destination(path);
  const folder = dirname(target);
  await removeAbandoned(folder);
  const temporary = temporaryIn(folder);
  return await attempt(path, async () => {
    closeSync(openSync(temporary, "wx", mode));
    temporaries.add(temporary);
    try {
      return { file: await open(temporary, constants.O_WRONLY), path: temporary, target };
    } catch (error) {
      await discard(temporary);
      throw error;
    }
  });
}

/** A file that nobody has written to for so long has no writer, on this machine or on another that shares its folder. */
const ABANDONED_MS = 24 * 60 * 60 * 1000;
const TEMPORARY_NAME = /^\.longform-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\.tmp$/;

/** Removes what killed processes have left in a folder. */
async function removeAbandoned(folder: string): Promise<void> {
  try {
    for (const name of await readdir(folder)) {
      if (!TEMPORARY_NAME.test(name)) continue;
      const path = join(folder, name);
      if (Date.now() - (await lstat(path)).mtimeMs > ABANDONED_MS) await discard(path);
    }
  } catch {
    // It is not ours to read or somebody else was faster, and no reason not to write.
  }
}

/** Where `path` leads, and the mode of the file that is there. */
async function destination(path: string): Promise<{ target: string; mode: number }> {
  let target: string;
  try {
    target = await realpath(path);
  } catch (error) {
    if (fileErrorCode(error) === "ENOENT") return { target: path, mode: 0o666 };
    throw outputError(path, error);
  }
  return await attempt(path, async () => {
    const found = await stat(target);
    // A rename would put a file in the place of /dev/null, too.
    if (!found.isFile()) {
      const what = found.isDirectory() ? "it is a folder" : "it is not a regular file";
      throw new OutputError(`Cannot write ${path}: ${what}`, { hint: "name a file" });
    }
    // Nor would it ask whether the file that it replaces is read-only.
    await (await open(target, "r+")).close();
    return { target, mode: found.mode & 0o777 };
  });
}

async function fillAndClose(
  file: FileHandle,
  path: string,
  fill: (file: PendingFile) => Promise<void>,
): Promise<void> {
  try {
    await fill({ write: (bytes, position) => attempt(path, () => writeFully(file, bytes, position)) });
    await attempt(path, () => file.sync());
  } finally {
    await attempt(path, () => file.close());
  }
}

async function writeFully(file: FileHandle, bytes: Uint8Array, position: number): Promise<void> {
  for (let done = 0; done < bytes.length;) {
    const { bytesWritten } = await file.write(bytes, done, bytes.length - done, position + done);
    done += bytesWritten;
  }
}

/** Removes a file; where that fails, the error that led here says more. */
async function discard(path: string): Promise<void> {
  await rm(path, { force: true }).catch(() => {});
  temporaries.delete(path);
}

async function attempt<T>(path: string, operation: () => Promise<T>): Promise<T> {
  try {
    return await operation();
  } catch (error) {
    throw error instanceof OutputError ? error : outputError(path, error);
  }
}

const FREE_SPACE = "free some space, or choose another disk";
const OTHER_FOLDER = "choose a folder that you may write to";

const HINTS: Readonly<Record<string, string>> = {
  EACCES: OTHER_FOLDER,
  EDQUOT: FREE_SPACE,
  ENAMETOOLONG: "choose a shorter name",
  ENOENT: "create the folder, or choose another",
  ENOSPC: FREE_SPACE,
  EPERM: OTHER_FOLDER,
  EROFS: OTHER_FOLDER,
};

/** A failed file operation as a sentence about `path`. */
export function outputError(path: string, error: unknown): OutputError {
  const code = fileErrorCode(error);
  const reason = code === "ENOENT" ? `there is no folder ${dirname(path)}` : ioReason(error);
  return new OutputError(`Cannot write ${path}: ${reason}`, {
    hint: HINTS[code] ?? "choose another file or disk",
    cause: error,
  });
}
