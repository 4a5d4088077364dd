/** A model from a Hugging Face Hub into the cache: which files, in what order, and what they have to be. */
import { mkdir, readFile, readlink, stat, statfs } from "node:fs/promises";
import { basename, dirname, join } from "node:path";
import type { ListFileEntry } from "@huggingface/hub";
import { formatBytes } from "../runtime/buffers.ts";
import { HubError, LongformError, ModelError, OutputError } from "../runtime/errors.ts";
import { outputError, writeFileAtomically, writeLinkAtomically } from "./atomic_file.ts";
import { readConfig } from "./config.ts";
import {
  CONFIG,
  findSnapshot,
  firstMissing,
  formatModelId,
  hubCache,
  hubSwitch,
  isCommit,
  type ModelId,
  refPath,
  repoFolder,
  snapshotPath,
  TOKENIZER,
  TOKENIZER_CONFIG,
  weightFiles,
  WEIGHTS,
  WEIGHTS_INDEX,
} from "./hub.ts";
import { DEFAULT_TIMING, HubClient, type HubOptions, type HubTiming } from "./hub_client.ts";
import {
  downloadBlob,
  type FileStatus,
  hasSize,
  type HubFile,
  missingBytes,
  type OnBytes,
} from "./hub_download.ts";
import { MAX_JSON_BYTES } from "./json_file.ts";
import { shardNames } from "./safetensors.ts";
import { loadTokenizer } from "./tokenizer.ts";
import { quoteName } from "./weight_source.ts";

export interface PullOptions extends Omit<HubOptions, "timing"> {
  /** Called of each file that the cache does not have, with what there is of it at first, and with every part. */
  readonly onBytes: OnBytes;
  /** Shorter waits, for tests. */
  readonly timing?: Partial<HubTiming>;
}

export interface PulledFile {
  readonly name: string;
  readonly bytes: number;
  /** Absent of small files, of which the Hub has another checksum. */
  readonly sha256?: string;
  readonly status: FileStatus;
}

/** A model that is in the cache with all its files. */
export interface PulledModel {
  readonly commit: string;
  /** The folder to load it from. */
  readonly path: string;
  readonly files: readonly PulledFile[];
}

/**
 * Downloads what longform needs of a repository, unless the cache has it, and makes the cache's revision the Hub's. Small
 * files come first: a model that longform does not run is refused before its weights are downloaded.
 * @throws HubError when the Hub does not have it or cannot be reached, ModelError when it is not GPT-2 or lacks a file,
 * OutputError when the cache cannot be written, or the reason of the signal: what has been downloaded until then is kept
 */
export async function pullModel(id: ModelId, options: PullOptions): Promise<PulledModel> {
  if (hubSwitch("HF_HUB_OFFLINE")) return await pullOffline(id);
  const hub = await HubClient.open(id, { ...options, timing: { ...DEFAULT_TIMING, ...options.timing } });
  const commit = await askCommit(hub);
  const pull = new Pull(hub, commit, await askListing(hub, commit), options.onBytes);
  await pull.get(CONFIG);
  await readConfig(pull.path);
  await pull.get(TOKENIZER);
  if (pull.has(TOKENIZER_CONFIG)) await pull.get(TOKENIZER_CONFIG);
  await loadTokenizer(pull.path);
  const weights = await pull.weights();
  await pull.requireSpace(weights);
  for (const name of weights) await pull.get(name);
  await writeRef(id, commit);
  return { commit, path: pull.path, files: pull.files };
}

/** What the cache has, if that is all. */
async function pullOffline(id: ModelId): Promise<PulledModel> {
  const snapshot = await findSnapshot(id);
  const needed = snapshot ? [CONFIG, TOKENIZER, ...await weightFiles(snapshot.path)] : [];
  if (!snapshot || await firstMissing(snapshot.path, needed) !== undefined) {
    throw new HubError(`${formatModelId(id)} is not complete in ${hubCache()}, and HF_HUB_OFFLINE is set`, {
      hint: "unset HF_HUB_OFFLINE to download it",
    });
  }
  const hasTokenizerConfig = await firstMissing(snapshot.path, [TOKENIZER_CONFIG]) === undefined;
  const names = hasTokenizerConfig ? needed.toSpliced(2, 0, TOKENIZER_CONFIG) : needed;
  const files = await Promise.all(names.map(async (name): Promise<PulledFile> => {
    const path = join(snapshot.path, name);
    const blob = basename(await readlink(path).catch(() => ""));
    const sha256 = /^[0-9a-f]{64}$/.test(blob) ? { sha256: blob } : {};
    return { name, bytes: (await stat(path)).size, ...sha256, status: "cached" };
  }));
  return { ...snapshot, files };
}

/** The library reads the Hub's answers; whatever it makes of wrong ones is an error of the Hub. */
async function understood<T>(hub: HubClient, question: Promise<T>): Promise<T> {
  try {
    return await question;
  } catch (error) {
    hub.options.signal.throwIfAborted();
    throw error instanceof LongformError ? error : hub.nonsense("an answer that is not a Hub's", error);
  }
}

/** What every question to the library has; the token is for `fetch` to add, where it belongs. */
function connection(hub: HubClient): { readonly hubUrl: string; readonly fetch: typeof fetch } {
  return { hubUrl: hub.endpoint, fetch: hub.fetch as typeof fetch };
}

async function askCommit(hub: HubClient): Promise<string> {
  const { modelInfo } = await import("@huggingface/hub");
  const { repo, revision } = hub.id;
  const question = modelInfo({ name: repo, revision, additionalFields: ["sha"], ...connection(hub) });
  const { sha } = await understood(hub, question);
  if (typeof sha === "string" && isCommit(sha) && (sha === revision || !isCommit(revision))) return sha;
  throw hub.nonsense(`no commit of ${formatModelId(hub.id)}`);
}

/** The files in the repository's own folder, by name. */
async function askListing(hub: HubClient, commit: string): Promise<Map<string, ListFileEntry>> {
  const { listFiles } = await import("@huggingface/hub");
  const repo = { type: "model", name: hub.id.repo } as const;
  const listing = new Map<string, ListFileEntry>();
  const read = async () => {
    for await (const entry of listFiles({ repo, revision: commit, ...connection(hub) })) {
      if (entry.type === "file") listing.set(entry.path, entry);
    }
  };
  await understood(hub, read());
  return listing;
}

/** One commit of a repository on its way into the cache. */
class Pull {
  /** The commit's folder in the cache. */
  readonly path: string;
  readonly files: PulledFile[] = [];
  readonly #hub: HubClient;
  readonly #commit: string;
  readonly #listing: ReadonlyMap<string, ListFileEntry>;
  readonly #onBytes: OnBytes;

  constructor(hub: HubClient, commit: string, listing: ReadonlyMap<string, ListFileEntry>, onBytes: OnBytes) {
    this.path = snapshotPath(hub.id, commit);
    this.#hub = hub;
    this.#commit = commit;
    this.#listing = listing;
    this.#onBytes = onBytes;
  }

  has(name: string): boolean {
    return this.#listing.has(name);
  }

  /** Gets a file into the commit's folder. */
  async get(name: string): Promise<void> {
    const file = this.#file(name);
    const path = join(this.path, name);
    const status = await hasSize(path, file.bytes) ? "cached" : await this.#download(file, path);
    const sha256 = file.algorithm === "sha256" ? { sha256: file.checksum } : {};
    this.files.push({ name, bytes: file.bytes, ...sha256, status });
  }

  /** Names of the files with weights; gets the index, where there are several. */
  async weights(): Promise<readonly string[]> {
    if (this.has(WEIGHTS)) return [WEIGHTS];
    const { repo } = this.#hub.id;
    if (!this.has(WEIGHTS_INDEX)) {
      throw new ModelError(`${repo} has no ${WEIGHTS} and no ${WEIGHTS_INDEX}`, {
        hint: this.has("pytorch_model.bin")
          ? "its weights are a pickle, which can run code: load it with transformers, call " +
            "save_pretrained(dir, safe_serialization=True), and pass `--model` that folder"
          : "choose a repository with safetensors",
      });
    }
    await this.get(WEIGHTS_INDEX);
    const shards = await shardNames(join(this.path, WEIGHTS_INDEX));
    const missing = shards.find((name) => !this.has(name));
    if (missing === undefined) return shards;
    throw new ModelError(`${repo} has no ${quoteName(missing)}, which its ${WEIGHTS_INDEX} names`, {
      hint: "the repository is incomplete: choose another, or another revision",
    });
  }

  /** @throws OutputError when the disk has no space for what these files lack */
  async requireSpace(names: readonly string[]): Promise<void> {
    let needed = 0;
    for (const file of names.map((name) => this.#file(name))) {
      if (!await hasSize(join(this.path, file.name), file.bytes)) {
        needed += await missingBytes(file, this.#blob(file));
      }
    }
    const folder = hubCache();
    const free = await statfs(folder).then(({ bavail, bsize }) => bavail * bsize, () => Infinity);
    if (needed <= free) return;
    throw new OutputError(
      `${formatBytes(needed)} are to be downloaded to ${folder}, ${formatBytes(free)} are free`,
      {
        hint: "free some space there, or set HF_HOME to a folder on another disk",
      },
    );
  }

  #blob({ checksum }: HubFile): string {
    return join(repoFolder(this.#hub.id), "blobs", checksum);
  }

  async #download(file: HubFile, path: string): Promise<FileStatus> {
    const blob = this.#blob(file);
    for (const folder of [dirname(blob), this.path]) {
      await mkdir(folder, { recursive: true }).catch((error: unknown) => {
        throw outputError(folder, error);
      });
    }
    const status = await downloadBlob(this.#hub, this.#commit, file, blob, this.#onBytes);
    const link = join("../../blobs", file.checksum);
    if (await readlink(path).catch(() => undefined) !== link) await writeLinkAtomically(path, link);
    return status;
  }

  /** What the listing says of a file. */
  #file(name: string): HubFile {
    const entry = this.#listing.get(name);
    if (!entry) {
      throw new ModelError(`${this.#hub.id.repo} has no ${name}`, {
        hint: `longform needs ${CONFIG}, ${TOKENIZER} and ${WEIGHTS}: choose a repository that has them`,
      });
    }
    const checksum = entry.lfs?.oid ?? entry.oid ?? "";
    const isListed = Number.isSafeInteger(entry.size) && entry.size >= 0 &&
      (entry.lfs ? /^[0-9a-f]{64}$/ : /^[0-9a-f]{40}$/).test(checksum);
    if (!isListed) throw this.#hub.nonsense(`no size and no checksum of ${name}`);
    if (name.endsWith(".json") && entry.size > MAX_JSON_BYTES) {
      throw new ModelError(`${name} of ${this.#hub.id.repo} is too large: ${formatBytes(entry.size)}`, {
        hint: "choose another repository",
      });
    }
    return { name, bytes: entry.size, checksum, algorithm: entry.lfs ? "sha256" : "git-sha1" };
  }
}

/** Notes the commit of a branch or tag, as Python does; last, so that a revision in the cache is a whole one. */
async function writeRef(id: ModelId, commit: string): Promise<void> {
  if (isCommit(id.revision)) return;
  const path = refPath(id);
  if (await readFile(path, "utf8").catch(() => "") === commit) return;
  try {
    await mkdir(dirname(path), { recursive: true });
  } catch (error) {
    throw outputError(path, error);
  }
  await writeFileAtomically(path, (file) => file.write(new TextEncoder().encode(commit), 0));
}
