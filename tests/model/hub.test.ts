import { afterAll, afterEach, beforeEach, describe, expect, test } from "bun:test";
import { getHFHubCachePath, getRepoFolderName } from "@huggingface/hub";
import { mkdirSync, readdirSync, readFileSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import {
  findModel,
  findSnapshot,
  formatModelId,
  hubCache,
  parseModelId,
  repoFolder,
} from "../../src/model/hub.ts";
import { DEFAULT_MODEL } from "../../src/model/run_settings.ts";
import { HubError, ModelError, UsageError } from "../../src/runtime/errors.ts";
import { temporaryFolder, writeTinyCheckpoint } from "../support/checkpoint.ts";
import { withEnvironment } from "../support/environment.ts";

const folder = temporaryFolder();
afterAll(folder.remove);
const environment = withEnvironment(/^(HF_|HUGGING|XDG_|HOME$)/);
beforeEach(() => {
  environment.clear();
  process.env.HOME = join(folder.path, "home");
});
afterEach(environment.restore);

const COMMIT = "89abcdef0123456789abcdef0123456789abcdef";

describe("names", () => {
  const valid: readonly (readonly [text: string, repo: string, revision: string])[] = [
    ["gpt2", "gpt2", "main"],
    ["openai-community/gpt2", "openai-community/gpt2", "main"],
    ["A_b.c-d/E.f_g-1", "A_b.c-d/E.f_g-1", "main"],
    ["a/b@v1.0", "a/b", "v1.0"],
    ["a/b@refs/pr/1", "a/b", "refs/pr/1"],
    ["a/b@feature/x+y@2", "a/b", "feature/x+y@2"],
    [`a/b@${COMMIT}`, "a/b", COMMIT],
    [`${"o".repeat(96)}/${"n".repeat(96)}`, `${"o".repeat(96)}/${"n".repeat(96)}`, "main"],
  ];
  test.each(valid)("%s is one", (text, repo, revision) => {
    expect(parseModelId(text)).toEqual({ repo, revision });
    expect(formatModelId(parseModelId(text))).toBe(text);
  });

  const invalid = [
    ...[
      "",
      "/",
      "a/",
      "/a",
      "a/b/c",
      "/a/b",
      "./a",
      "../a",
      "a/..",
      "a/../b",
      "..",
      ".",
      "a/.b",
      "-a/b",
      "a/b-",
    ],
    ...[
      "a--b",
      "a/b--c",
      "a..b",
      "a/b.git",
      "a b/c",
      "a\\b",
      "a/b\0",
      "a/b\n",
      "ä/b",
      "~/b",
      "a:b",
      "%2e%2e/b",
    ],
    ...["n".repeat(97), "https://huggingface.co/gpt2", "a/b@", "a/b@..", "a/b@../x", "a/b@x/../y", "a/b@/x"],
    ...[
      "a/b@x/",
      "a/b@x//y",
      "a/b@.x",
      "a/b@x/.y",
      "a/b@-x",
      "a/b@x.lock",
      "a/b@x.lock/y",
      "a/b@x\\y",
      "a/b@x.",
    ],
    ...["a/b@x y", "a/b@x~1", "a/b@x^", "a/b@x:y", "a/b@x?y", "a/b@\u202e", `a/b@${"r".repeat(201)}`],
  ];
  test.each(invalid)("%j is none", (text) => {
    expect(() => parseModelId(text)).toThrow(UsageError);
  });

  test("whatever is a name stays inside the cache", () => {
    process.env.HF_HOME = join(folder.path, "inside");
    for (const [text] of valid) {
      const path = repoFolder(parseModelId(text));
      expect(dirname(path)).toBe(join(folder.path, "inside/hub"));
      expect(basename(path)).toBe(getRepoFolderName({ type: "model", name: parseModelId(text).repo }));
    }
  });
});

describe("the cache", () => {
  const places: readonly (readonly [string, Record<string, string>, string])[] = [
    ["HOME", {}, "/h/.cache/huggingface/hub"],
    ["XDG_CACHE_HOME", { XDG_CACHE_HOME: "/x" }, "/x/huggingface/hub"],
    ["HF_HOME", { XDG_CACHE_HOME: "/x", HF_HOME: "/f" }, "/f/hub"],
    ["HUGGINGFACE_HUB_CACHE", { HF_HOME: "/f", HUGGINGFACE_HUB_CACHE: "/g" }, "/g"],
    ["HF_HUB_CACHE", { HF_HOME: "/f", HUGGINGFACE_HUB_CACHE: "/g", HF_HUB_CACHE: "/c" }, "/c"],
  ];
  test.each(places)("lies where %s says", (_, variables, path) => {
    Object.assign(process.env, { HOME: "/h" }, variables);
    expect(hubCache()).toBe(path);
    // The library asks the system, not HOME, for the home folder.
    if (Object.keys(variables).length > 0) expect(getHFHubCachePath()).toBe(path);
  });

  test("a tilde is the home folder, and an empty variable none", () => {
    Object.assign(process.env, { HOME: "/h", HF_HOME: "~/models", HF_HUB_CACHE: "" });
    expect(hubCache()).toBe("/h/models/hub");
  });

  test("without a home folder has to be named", () => {
    delete process.env.HOME;
    expect(hubCache).toThrow(HubError);
    process.env.HF_HUB_CACHE = "/c";
    expect(hubCache()).toBe("/c");
  });
});

describe("a model by name", () => {
  let caches = 0;
  beforeEach(() => {
    process.env.HF_HUB_CACHE = join(folder.path, `cache ${caches++}`);
  });

  /** Puts a model into the cache, as Python does. @returns its snapshot */
  function cached(repo: string, revision: string | undefined, shards?: number): string {
    const root = repoFolder({ repo, revision: "main" });
    const made = join(folder.path, `made ${caches}`);
    writeTinyCheckpoint(made, shards === undefined ? {} : { shards });
    const snapshot = join(root, "snapshots", COMMIT);
    for (const part of [snapshot, join(root, "blobs")]) mkdirSync(part, { recursive: true });
    for (const [i, name] of readdirSync(made).entries()) {
      writeFileSync(join(root, "blobs", `blob${i}`), readFileSync(join(made, name)));
      symlinkSync(`../../blobs/blob${i}`, join(snapshot, name));
    }
    rmSync(made, { recursive: true });
    if (revision !== undefined) {
      mkdirSync(dirname(join(root, "refs", revision)), { recursive: true });
      writeFileSync(join(root, "refs", revision), COMMIT);
    }
    return snapshot;
  }

  test("is the embedded one without a name", async () => {
    expect(await findModel(undefined)).toBe(DEFAULT_MODEL);
  });

  test("is found by branch, tag and commit", async () => {
    const path = cached("org/name", "main");
    cached("org/other", "refs/pr/1");
    expect(await findModel("org/name")).toBe(path);
    expect(await findModel("org/name@main")).toBe(path);
    expect(await findModel(`org/name@${COMMIT}`)).toBe(path);
    expect(await findModel("org/other@refs/pr/1")).toContain("models--org--other");
    await expect(findModel("org/other")).rejects.toThrow(
      "There is no model folder org/other, and none of that",
    );
  });

  test("a folder of that name comes first", async () => {
    cached("org/name", "main");
    const before = process.cwd();
    mkdirSync(join(folder.path, "cwd/org/name"), { recursive: true });
    try {
      process.chdir(join(folder.path, "cwd"));
      expect(await findModel("org/name")).toBe("org/name");
    } finally {
      process.chdir(before);
    }
  });

  test("what is no repository's name is left for whoever opens the folder", async () => {
    for (const path of ["/nowhere/at/all", "./nowhere", "a/b/c", "../x"]) {
      expect(await findModel(path)).toBe(path);
    }
  });

  test("one that is not in the cache is for `pull`", async () => {
    const error = await findModel("org/name@v1").catch((e: unknown) => e);
    expect(error).toBeInstanceOf(ModelError);
    expect((error as ModelError).hint).toContain("`longform pull org/name@v1`");
  });

  test.each([["config.json", undefined], ["model.safetensors", undefined], [
    "model-00002-of-00003.safetensors",
    3,
  ]])("a snapshot without its %s is not complete", async (name, shards) => {
    const path = cached("org/name", "main", shards);
    expect(await findModel("org/name")).toBe(path);
    rmSync(join(path, name));
    await expect(findModel("org/name")).rejects.toThrow(
      `org/name is not complete in ${hubCache()}: there is no ${name}`,
    );
  });

  test("a link to a blob that was removed counts as missing", async () => {
    const path = cached("org/name", "main");
    rmSync(join(repoFolder(parseModelId("org/name")), "blobs"), { recursive: true });
    await expect(findModel("org/name")).rejects.toThrow("there is no config.json");
    expect(readdirSync(path).length).toBeGreaterThan(1);
  });

  test.each(["", "../../../../etc", COMMIT.toUpperCase(), COMMIT.slice(1), `${COMMIT}/..`])(
    "a ref that says %j leads nowhere",
    async (text) => {
      cached("org/name", "main");
      writeFileSync(join(repoFolder(parseModelId("org/name")), "refs/main"), text);
      expect(await findSnapshot(parseModelId("org/name"))).toBeUndefined();
      await expect(findModel("org/name")).rejects.toThrow("There is no model folder org/name");
    },
  );

  test("an index that leads out of the snapshot is refused", async () => {
    const path = cached("org/name", "main", 2);
    const index = join(path, "model.safetensors.index.json");
    rmSync(index);
    writeFileSync(index, JSON.stringify({ weight_map: { a: "../../../x.safetensors" } }));
    await expect(findModel("org/name")).rejects.toThrow("outside the model folder");
  });
});

test("the Hub's library is loaded by what downloads, and only then", () => {
  const src = join(import.meta.dir, "../../src");
  const users = readdirSync(src, { recursive: true, encoding: "utf8" })
    .filter((path) => path.endsWith(".ts"))
    .flatMap((path) => {
      const lines = readFileSync(join(src, path), "utf8").split("\n").filter((line) =>
        line.includes("@huggingface/hub")
      );
      return lines.map((line) => [path, /^import type |await import\(/.test(line)]);
    });
  expect(users.length).toBeGreaterThan(1);
  expect(new Set(users.map(([path]) => path))).toEqual(new Set(["model/hub_pull.ts"]));
  expect(users.every(([, isLazy]) => isLazy)).toBe(true);
});
