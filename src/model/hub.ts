/**
 * Repositories of the Hugging Face Hub by name, and the cache that they lie in on this machine: the one of Python's
 * `huggingface_hub`, so that what either has downloaded serves both. Nothing here touches the network.
 *
 * ```
 * CACHE/models--ORG--NAME/refs/main                    a branch's commit, 40 hexadecimal digits
 *                         snapshots/COMMIT/config.json -> ../../blobs/ETAG
 *                         blobs/ETAG                   SHA-256 of large files (LFS), Git's SHA-1 of others
 * ```
 * @see https://huggingface.co/docs/huggingface_hub/guides/manage-cache
 */
import { readFile, stat } from "node:fs/promises";
import { join, resolve } from "node:path";
import process from "node:process";
import { HubError, ModelError, UsageError } from "../runtime/errors.ts";
import { fileErrorCode } from "./json_file.ts";
import { DEFAULT_MODEL } from "./run_settings.ts";
import { shardNames } from "./safetensors.ts";
import { quoteName } from "./weight_source.ts";

/** A repository at a revision, both of them checked: joined to a folder, they stay inside it. */
export interface ModelId {
  /** `ORG/NAME`, or `NAME` for some of the oldest. */
  readonly repo: string;
  /** A branch, a tag, `refs/pr/N` or a commit. */
  readonly revision: string;
}

/** A commit of a repository in the cache. */
export interface Snapshot {
  readonly commit: string;
  /** Its folder; not every file of the commit need be there. */
  readonly path: string;
}

export const CONFIG = "config.json";
export const TOKENIZER = "tokenizer.json";
export const TOKENIZER_CONFIG = "tokenizer_config.json";
export const WEIGHTS = "model.safetensors";
export const WEIGHTS_INDEX = "model.safetensors.index.json";

/** The Hub's name for the default branch of every repository. */
const DEFAULT_REVISION = "main";
const COMMIT = /^[0-9a-f]{40}$/;

/** The Hub's own rules: https://github.com/huggingface/huggingface_hub, `validate_repo_id`. */
const REPO_PART = /^(?=.{1,96}$)\w(?:[\w.-]*\w)?$/;
/** Of what Git allows in the name of a branch or tag (git-check-ref-format), what is plain in a path and a URL. */
const REVISION = /^(?=.{1,200}$)[\w@+][\w@+.-]*(?:\/[\w@+][\w@+.-]*)*$/;

/** Whether a revision is a whole commit, which never changes. */
export function isCommit(revision: string): boolean {
  return COMMIT.test(revision);
}

/**
 * Reads `REPO` or `REPO@REVISION`.
 * @throws UsageError when it could be no repository's name
 */
export function parseModelId(text: string): ModelId {
  const id = asModelId(text);
  if (id) return id;
  throw new UsageError(`${quoteName(text)} is not the name of a repository`, {
    hint: "a repository is named ORG/NAME, such as openai-community/gpt2, and a revision ORG/NAME@REVISION",
  });
}

/** As `parseModelId`, with undefined for what is no name. */
function asModelId(text: string): ModelId | undefined {
  const at = text.indexOf("@");
  const repo = at < 0 ? text : text.slice(0, at);
  const revision = at < 0 ? DEFAULT_REVISION : text.slice(at + 1);
  const parts = repo.split("/");
  const isRepo = parts.length <= 2 && parts.every((part) => REPO_PART.test(part)) &&
    !/--|\.\.|\.git$/.test(repo);
  const isRevision = REVISION.test(revision) && !/\.\.|\.lock(\/|$)|\.(\/|$)/.test(revision);
  return isRepo && isRevision ? { repo, revision } : undefined;
}

/** As it is typed: `REPO`, with `@REVISION` behind it unless that is the default. */
export function formatModelId({ repo, revision }: ModelId): string {
  return revision === DEFAULT_REVISION ? repo : `${repo}@${revision}`;
}

/** A variable of the environment; an empty one counts as none. */
export function hubVariable(name: string): string | undefined {
  return process.env[name] || undefined;
}

/** As Python's `huggingface_hub` reads its switches. */
export function hubSwitch(name: string): boolean {
  return ["1", "ON", "YES", "TRUE"].includes(process.env[name]?.toUpperCase() ?? "");
}

/** A path from a variable, where `~` is the home folder. @throws HubError where that is not known */
export function hubPath(path: string): string {
  if (path !== "~" && !path.startsWith("~/")) return resolve(path);
  const home = hubVariable("HOME");
  if (home === undefined) {
    throw new HubError("There is no home folder to keep downloads in: HOME is not set", {
      hint: "set HF_HOME to a folder for them",
    });
  }
  return join(resolve(home), path.slice(1));
}

/** Hugging Face's folder of this user: `HF_HOME`, by default in the user's cache. */
export function hubHome(): string {
  return hubPath(
    hubVariable("HF_HOME") ?? join(hubVariable("XDG_CACHE_HOME") ?? "~/.cache", "huggingface"),
  );
}

/** The folder that repositories are cached in: `HF_HUB_CACHE`, by default `hub` in Hugging Face's folder. */
export function hubCache(): string {
  const path = hubVariable("HF_HUB_CACHE") ?? hubVariable("HUGGINGFACE_HUB_CACHE");
  return path === undefined ? join(hubHome(), "hub") : hubPath(path);
}

/** A repository's folder in the cache. */
export function repoFolder({ repo }: ModelId): string {
  return join(hubCache(), `models--${repo.replace("/", "--")}`);
}

/** Where the cache keeps the commit of a branch or tag. */
export function refPath(id: ModelId): string {
  return join(repoFolder(id), "refs", id.revision);
}

/** The folder of a commit in the cache. */
export function snapshotPath(id: ModelId, commit: string): string {
  return join(repoFolder(id), "snapshots", commit);
}

/** The commit of a revision as the cache has it; undefined where it has none. */
export async function findSnapshot(id: ModelId): Promise<Snapshot | undefined> {
  const commit = isCommit(id.revision) ? id.revision : await readRef(refPath(id));
  if (commit === undefined || !COMMIT.test(commit)) return undefined;
  const path = snapshotPath(id, commit);
  return await exists(path) ? { commit, path } : undefined;
}

async function readRef(path: string): Promise<string | undefined> {
  try {
    return (await readFile(path, "utf8")).trim();
  } catch {
    return undefined; // as good as none: a pull writes it anew
  }
}

/** Files that a model's folder needs for its weights, in order, those that are missing among them. */
export async function weightFiles(dir: string): Promise<string[]> {
  if (await exists(join(dir, WEIGHTS)) || !await exists(join(dir, WEIGHTS_INDEX))) return [WEIGHTS];
  return [WEIGHTS_INDEX, ...await shardNames(join(dir, WEIGHTS_INDEX))];
}

/** The first of the files that is not in the folder. */
export async function firstMissing(dir: string, files: readonly string[]): Promise<string | undefined> {
  for (const file of files) if (!await exists(join(dir, file))) return file;
  return undefined;
}

async function exists(path: string): Promise<boolean> {
  return await stat(path).then(() => true, (error: unknown) => {
    if (["ENOENT", "ENOTDIR"].includes(fileErrorCode(error))) return false;
    return true; // something is there, and whoever reads it says what is wrong with it
  });
}

/**
 * The folder of a model: `model` itself where there is such a folder, else what a pull, or Python, has cached of the
 * repository of that name; the embedded model when undefined.
 * @throws ModelError where the cache has no such repository, or not all of its files
 */
export async function findModel(model: string | undefined): Promise<string> {
  if (model === undefined) return DEFAULT_MODEL;
  if (await exists(model)) return model;
  const id = asModelId(model);
  if (!id) return model; // whoever opens it says that there is none
  const hint = `\`longform pull ${model}\` downloads it from the Hugging Face Hub`;
  const snapshot = await findSnapshot(id);
  if (!snapshot) {
    throw new ModelError(`There is no model folder ${model}, and none of that name in ${hubCache()}`, {
      hint,
    });
  }
  const { path } = snapshot;
  const missing = await firstMissing(path, [CONFIG, ...await weightFiles(path)]);
  if (missing !== undefined) {
    throw new ModelError(`${model} is not complete in ${hubCache()}: there is no ${missing}`, { hint });
  }
  return path;
}
