/**
 * One file of a Hub into the cache: resumed where an earlier download stopped, checked by size and checksum, and under
 * its name only when it is whole.
 *
 * What is under way lies at `blobs/ETAG.longform-XXXXXXXX.incomplete`, a name of its own for every process that writes.
 * A process takes over what another has left by renaming it, which works for one of those that try: no two write the same
 * file, whatever locks the file system knows. Whoever writes dates the file anew all the time, and is waited for as long as
 * that goes on. Should one be taken for dead and wake up, both write the same bytes to the same places, since the name of a
 * blob is its checksum, and whoever is done first has it.
 */
import { createHash, type Hash } from "node:crypto";
import { type FileHandle, open, readdir, rename, rm, stat, utimes } from "node:fs/promises";
import { basename, dirname, join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { formatBytes } from "../runtime/buffers.ts";
import { HubError, OutputError } from "../runtime/errors.ts";
import { outputError } from "./atomic_file.ts";
import { type HubClient, TransientHubError, type Watch } from "./hub_client.ts";
import { fileErrorCode } from "./json_file.ts";

/** A file as the Hub lists it. */
export interface HubFile {
  readonly name: string;
  readonly bytes: number;
  /** Hexadecimal; also the name of the blob. */
  readonly checksum: string;
  /** SHA-256 of the file, which Git LFS has of large ones, or Git's SHA-1 of its length and itself. */
  readonly algorithm: "sha256" | "git-sha1";
}

/** How a file came to be in the cache; `resumed` has bytes from an earlier run. */
export type FileStatus = "cached" | "downloaded" | "resumed";

/** Called with the bytes that are there; `resumed` of them are from an earlier run. */
export type OnBytes = (file: HubFile, bytes: number, resumed: number) => void;

/** An attempt that brought so much was not in vain. */
const PROGRESS_BYTES = 1 << 20;
const READ_BYTES = 1 << 22;
/** How often a file is dated anew in the time after which it would count as left. */
const BEATS = 4;

/**
 * Gets a file of a commit to `blob`, unless it is there with the right size.
 * @throws HubError, OutputError, or the reason of the user's signal: what has been downloaded until then is kept
 */
export async function downloadBlob(
  hub: HubClient,
  commit: string,
  file: HubFile,
  blob: string,
  onBytes: OnBytes,
): Promise<FileStatus> {
  for (let isSecond = false;;) {
    if (await hasSize(blob, file.bytes)) return "cached";
    const partial = await PartialFile.open(hub, file, blob);
    if (!partial) continue; // another process has just finished it
    const resumed = partial.bytes;
    try {
      await fill(hub, commit, partial, (bytes) => onBytes(file, bytes, resumed));
      const checksum = partial.checksum();
      if (checksum === file.checksum) {
        if (await partial.install(blob)) return resumed > 0 ? "resumed" : "downloaded";
        continue;
      }
      await partial.discard();
      if (isSecond) {
        throw new HubError(`${file.name} arrived damaged twice and was removed`, {
          hint: "try again, and without a proxy or a mirror if there is one",
          detail: `its checksum is ${checksum}, the Hub lists ${file.checksum}`,
        });
      }
      isSecond = true;
      hub.options.onNotice(
        `${file.name} arrived damaged and was removed: downloading it again from the start`,
      );
    } finally {
      await partial.release();
    }
  }
}

/** Whether a file is there and has so many bytes. */
export async function hasSize(path: string, bytes: number): Promise<boolean> {
  return await stat(path).then((found) => found.isFile() && found.size === bytes, () => false);
}

/** Bytes that are yet to be downloaded. */
export async function missingBytes(file: HubFile, blob: string): Promise<number> {
  if (await hasSize(blob, file.bytes)) return 0;
  return file.bytes - Math.max(0, ...(await partialsOf(blob)).map(({ bytes }) => bytes));
}

/** Downloads what a partial file lacks, in as many attempts as it takes. */
async function fill(
  hub: HubClient,
  commit: string,
  partial: PartialFile,
  onBytes: (bytes: number) => void,
): Promise<void> {
  const url = hub.fileUrl(commit, partial.file.name);
  /** The most bytes that there have been: what is downloaded once more is no progress. */
  let most = 0;
  const report = (bytes: number) => {
    most = Math.max(most, bytes);
    onBytes(bytes);
  };
  report(partial.bytes);
  await hub.retrying(
    async () => {
      if (partial.bytes < partial.file.bytes) {
        await hub.watched((watch) => receive(hub, url, partial, watch, report));
      }
    },
    () => Math.floor(most / PROGRESS_BYTES),
  );
}

/** Appends what one request brings; bytes that may be of something else are never joined to those that are there. */
async function receive(
  hub: HubClient,
  url: URL,
  partial: PartialFile,
  watch: Watch,
  onBytes: (bytes: number) => void,
): Promise<void> {
  const { name, bytes, checksum } = partial.file;
  const hint = "try again; where it stays, ask who runs the Hub or the mirror";
  const { response, linkedEtag } = await hub.get(url, rangeHeaders(partial), watch);
  if (linkedEtag !== undefined && linkedEtag !== checksum) {
    throw hub.nonsense(`another ${name} than it lists`);
  }
  const { host } = new URL(response.url);
  const isRest = response.status === 206 &&
    response.headers.get("content-range") === `bytes ${partial.bytes}-${bytes - 1}/${bytes}`;
  if (!isRest) await partial.restart();
  if (!isRest && response.status !== 200) {
    throw new TransientHubError(`${host} does not send the part of ${name} that it was asked for`, { hint });
  }
  partial.source = response.headers.get("etag");
  for await (const part of hub.body(response, watch)) {
    if (partial.bytes + part.byteLength > bytes) {
      await partial.restart();
      throw new TransientHubError(`${host} sends more of ${name} than it has`, { hint });
    }
    await partial.append(part);
    onBytes(partial.bytes);
  }
  if (partial.bytes < bytes) {
    throw new TransientHubError(`${host} sent ${partial.bytes} of ${bytes} bytes of ${name}`, { hint });
  }
}

/** Asks for what is lacking, and, where bytes came in this run, for all if that is no longer what they are of. */
function rangeHeaders({ bytes, source }: PartialFile): Record<string, string> {
  if (bytes === 0) return {};
  // Weak tags do not vouch for single bytes (RFC 9110, section 13.1.5).
  return { range: `bytes=${bytes}-`, ...source?.startsWith('"') && { "if-range": source } };
}

/** The first bytes of a file, which this process alone writes. */
class PartialFile {
  readonly file: HubFile;
  /** Bytes that are there. */
  bytes = 0;
  /** The entity tag, at the place that they come from, of those that came in this run. */
  source: string | null = null;
  readonly #path: string;
  readonly #handle: FileHandle;
  readonly #beat: ReturnType<typeof setInterval>;
  #hash: Hash;
  #isOpen = true;

  private constructor(file: HubFile, path: string, handle: FileHandle, restMs: number) {
    this.file = file;
    this.#path = path;
    this.#handle = handle;
    this.#hash = startHash(file);
    this.#beat = setInterval(() => {
      const now = new Date();
      utimes(path, now, now).catch(() => {}); // taken over
    }, restMs / BEATS);
  }

  /**
   * Opens what an earlier run has left, or an empty file; waits while another process downloads the same.
   * @returns undefined when it has done so
   */
  static async open(hub: HubClient, file: HubFile, blob: string): Promise<PartialFile | undefined> {
    const { signal, timing } = hub.options;
    const path = `${blob}.longform-${crypto.randomUUID().slice(0, 8)}.incomplete`;
    try {
      const handle = await claim(hub, file, blob, path);
      if (!handle) return undefined;
      const partial = new PartialFile(file, path, handle, timing.restMs);
      try {
        await partial.#readBack(signal);
        return partial;
      } catch (error) {
        await partial.release();
        throw error;
      }
    } catch (error) {
      throw fileErrorCode(error) === "" ? error : outputError(blob, error);
    }
  }

  async append(part: Uint8Array): Promise<void> {
    try {
      for (let done = 0; done < part.byteLength;) {
        const { bytesWritten } = await this.#handle.write(
          part,
          done,
          part.byteLength - done,
          this.bytes + done,
        );
        done += bytesWritten;
      }
    } catch (error) {
      throw this.#writeError(error);
    }
    this.#hash.update(part);
    this.bytes += part.byteLength;
  }

  /** Forgets all bytes. */
  async restart(): Promise<void> {
    if (this.bytes === 0) return;
    try {
      await this.#handle.truncate(0);
    } catch (error) {
      throw this.#writeError(error);
    }
    this.#hash = startHash(this.file);
    this.bytes = 0;
  }

  /** The checksum of all bytes, once. */
  checksum(): string {
    return this.#hash.digest("hex");
  }

  /** Puts the file in its place. @returns false when another process has taken it over */
  async install(blob: string): Promise<boolean> {
    try {
      await this.#handle.sync();
      await this.#close();
      await rename(this.#path, blob);
      return true;
    } catch (error) {
      if (fileErrorCode(error) === "ENOENT") return false;
      throw this.#writeError(error);
    }
  }

  /** Removes the file. */
  async discard(): Promise<void> {
    await this.#close();
    await rm(this.#path, { force: true }).catch(() => {}); // whoever takes it over finds it damaged
  }

  /** Leaves the file, if it is still open, for whoever comes next, who need not wait to see that nobody writes it. */
  async release(): Promise<void> {
    if (!this.#isOpen) return;
    if (this.bytes === 0) return await this.discard();
    await this.#close();
    await utimes(this.#path, 0, 0).catch(() => {}); // it is waited for then
  }

  async #close(): Promise<void> {
    if (!this.#isOpen) return;
    this.#isOpen = false;
    clearInterval(this.#beat);
    await this.#handle.close().catch(() => {}); // `install` has asked before whether all is on the disk
  }

  /** Reads what is there, for the checksum to go on from. */
  async #readBack(signal: AbortSignal): Promise<void> {
    const { size } = await this.#handle.stat();
    const buffer = new Uint8Array(Math.min(size, READ_BYTES));
    for (let bytesRead = -1; bytesRead !== 0; this.bytes += bytesRead) {
      signal.throwIfAborted();
      ({ bytesRead } = await this.#handle.read(buffer, 0, buffer.byteLength, this.bytes));
      this.#hash.update(buffer.subarray(0, bytesRead));
    }
    if (this.bytes > this.file.bytes) await this.restart();
  }

  #writeError(error: unknown): OutputError {
    if (!["ENOSPC", "EDQUOT"].includes(fileErrorCode(error))) return outputError(this.#path, error);
    const { name, bytes } = this.file;
    return new OutputError(`There is no space left for ${name} in ${dirname(this.#path)}`, {
      hint: `free ${formatBytes(bytes - this.bytes)} there and run this again: it goes on behind the ${
        formatBytes(this.bytes)
      } that it has`,
      cause: error,
    });
  }
}

function startHash({ algorithm, bytes }: HubFile): Hash {
  if (algorithm === "sha256") return createHash("sha256");
  return createHash("sha1").update(`blob ${bytes}\0`);
}

interface FoundPartial {
  readonly path: string;
  readonly bytes: number;
  readonly mtimeMs: number;
}

/** What this program has begun of a blob and not finished, in this process or another. */
async function partialsOf(blob: string): Promise<FoundPartial[]> {
  const names = await readdir(dirname(blob)).catch(() => []);
  const own = names.filter((name) =>
    name.startsWith(`${basename(blob)}.longform-`) && name.endsWith(".incomplete")
  );
  const found = await Promise.all(own.map(async (name) => {
    const path = join(dirname(blob), name);
    return await stat(path).then(({ size, mtimeMs }) => [{ path, bytes: size, mtimeMs }], () => []);
  }));
  return found.flat();
}

/** Makes `path` the one partial file of a blob. @returns undefined when another process has finished the blob */
async function claim(
  hub: HubClient,
  file: HubFile,
  blob: string,
  path: string,
): Promise<FileHandle | undefined> {
  const { signal, timing, onNotice } = hub.options;
  const wait = (ms: number) => delay(ms, undefined, { signal }).catch(() => signal.throwIfAborted());
  for (let hasSaid = false;;) {
    const before = await partialsOf(blob);
    if (before.length === 0) {
      const handle = await open(path, "wx+");
      const isDone = await hasSize(blob, file.bytes);
      if (!isDone && (await partialsOf(blob)).length === 1) return handle;
      await handle.close();
      await rm(path, { force: true });
      if (isDone) return undefined;
      // Two began at once: both step back, and one comes first.
      await wait(timing.restMs * Math.random());
      continue;
    }
    // Those that were left in order are dated 0.
    if (before.some(({ mtimeMs }) => mtimeMs !== 0)) {
      await wait(timing.restMs);
      if (await hasSize(blob, file.bytes)) return undefined;
      const after = await partialsOf(blob);
      const isSame = (a: FoundPartial) => before.some((b) => a.path === b.path && a.mtimeMs === b.mtimeMs);
      if (!after.every(isSame)) {
        if (!hasSaid) onNotice(`another process is downloading ${file.name}: waiting for it`);
        hasSaid = true;
        continue;
      }
    }
    const [largest, ...others] = before.toSorted((a, b) => b.bytes - a.bytes);
    try {
      const now = new Date();
      await utimes(largest!.path, now, now); // before it is ours: nobody else shall see it as left
      await rename(largest!.path, path);
    } catch (error) {
      if (fileErrorCode(error) === "ENOENT") continue; // somebody else has it
      throw error;
    }
    for (const other of others) await rm(other.path, { force: true });
    return await open(path, "r+");
  }
}
