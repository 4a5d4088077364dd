/** What the properties promise of the parsers, of the program itself: one sentence, its exit code, in time. */
import { afterAll, expect, setDefaultTimeout, test } from "bun:test";
import { closeSync, ftruncateSync, mkdirSync, openSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { temporaryFolder, writeIndex } from "../support/checkpoint.ts";
import { expectFailure, RUN_TIMEOUT_MS, runCli, runtimes, writeTinyModel } from "../support/cli.ts";

setDefaultTimeout(2 * RUN_TIMEOUT_MS);

const folder = temporaryFolder();
afterAll(folder.remove);
let folders = 0;

/** What is refused is refused before a GPU is asked for. */
const env = { VK_DRIVER_FILES: "/nonexistent", VK_ICD_FILENAMES: undefined, VK_ADD_DRIVER_FILES: undefined };
const ESCAPE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e";

/** A tiny model with one of its JSON files changed. */
function spoiled(file: string, change: (json: Record<string, unknown>) => unknown): string {
  const { dir } = writeTinyModel(join(folder.path, String(folders++)));
  const path = join(dir, file);
  const changed = change(JSON.parse(readFileSync(path, "utf8")) as Record<string, unknown>);
  writeFileSync(path, typeof changed === "string" ? changed : JSON.stringify(changed));
  return dir;
}

function deep(levels: number): string {
  return "[".repeat(levels) + "]".repeat(levels);
}

const tokenizerParts = (part: object) =>
  spoiled("tokenizer.json", (json) => ({
    ...json,
    pre_tokenizer: { type: "Sequence", pretokenizers: [part, json.pre_tokenizer] },
  }));

const models: readonly (readonly [name: string, make: () => string, message: RegExp])[] = [
  [
    "a size nested deeper than any recursion goes",
    () =>
      spoiled(
        "config.json",
        (json) =>
          JSON.stringify({ ...json, n_layer: 0 }).replace('"n_layer":0', `"n_layer":${deep(200_000)}`),
      ),
    /n_layer an array, wanted a whole number/,
  ],
  [
    "another architecture by a name that a terminal would obey",
    () => spoiled("config.json", (json) => ({ ...json, model_type: ESCAPE })),
    /describes a "\\u001b\]0;owned/,
  ],
  [
    "a tokenizer of pieces without a length, which would have no end",
    () => tokenizerParts({ type: "FixedLength", length: 0 }),
    /its pre-tokenizer has the part "FixedLength"/,
  ],
  [
    "a tokenizer with a regular expression that takes for ever",
    () =>
      tokenizerParts({ type: "Split", behavior: "Isolated", invert: false, pattern: { Regex: "(a+)+$" } }),
    /its pre-tokenizer has the part "Split" by more than a text/,
  ],
  [
    "a tokenizer whose type has no text",
    () =>
      spoiled(
        "tokenizer.json",
        (json) => ({ ...json, model: { ...json.model as object, type: JSON.parse('{"toString":1}') } }),
      ),
    /its model is an object/,
  ],
  [
    "a shard by a name that a terminal would obey",
    () => {
      const dir = spoiled("config.json", (json) => json);
      writeFileSync(join(dir, "model.safetensors.index.json"), "");
      writeIndex(dir, { "wte.weight": `${ESCAPE}.safetensors` });
      return dir;
    },
    /places tensor "wte.weight" in "\\u001b/,
  ],
];

for (const [name, make, message] of models) {
  test(`${name}: exit code 1`, async () => {
    const dir = make();
    if (name.startsWith("a shard")) await Bun.file(join(dir, "model.safetensors")).delete();
    const result = await runCli(["generate", "-m", dir, "-n", "1", "a".repeat(40)], { env });
    expectFailure(result, 1, message);
    expect(result.stderr).not.toMatch(/[^\P{C}\n]/u);
  });
}

for (const runtime of runtimes) {
  test(`on ${runtime}: -v shows no cause and no stack that a terminal would obey`, async () => {
    const dir = spoiled("config.json", () => `{"model_type": ${ESCAPE}}`);
    const { code, notes } = await runCli(["generate", "-v", "-m", dir, "x"], { runtime, env });
    expect(code).toBe(1);
    expect(notes).toMatch(/\ncause: SyntaxError/);
    expect(notes).not.toMatch(/[^\P{C}\n]/u);
  });

  test(`on ${runtime}: arguments of several lines and thousands of letters: exit code 2, one line`, async () => {
    const long = "x".repeat(60_000);
    for (
      const args of [["generate", "x", "--top-k", `1\n${ESCAPE}`], [`a\nb ${long}`], [
        "generate",
        `--${long}\n`,
      ]]
    ) {
      const result = await runCli(args, { runtime, env });
      expectFailure(result, 2, /^error: /);
      expect(result.notes.length).toBeLessThan(5000);
    }
  });

  test(`on ${runtime}: results of another adapter, with names that a terminal would obey`, async () => {
    const row = {
      phase: "gemm",
      variant: ESCAPE,
      context: 1,
      dtype: "f16",
      ms: { min: 1, median: 1, max: 1 },
    };
    const paths = ["a", ESCAPE].map((adapter, i) => {
      const path = join(folder.path, `${runtime}-${i}.json`);
      writeFileSync(
        path,
        JSON.stringify({
          adapter,
          driver: "",
          runtime: "",
          version: "",
          model: ESCAPE,
          rows: [row, { ...row, context: 2 + i }],
        }),
      );
      return path;
    });
    const { code, stdout, notes } = await runCli(["bench", "compare", ...paths], { runtime, env });
    expect(code).toBe(0);
    expect(notes).toContain("the adapter differs: a in ");
    expect(stdout).toContain("\\u001b]0;owned");
    expect(stdout + notes).not.toMatch(/[^\P{C}\n]/u);
  });
}

test("a file of ids that no text holds: exit code 1 before it is read", async () => {
  const { dir } = writeTinyModel(join(folder.path, String(folders++)));
  const path = join(folder.path, "ids.json");
  const file = openSync(path, "w");
  ftruncateSync(file, 6 * 2 ** 30);
  closeSync(file);
  for (const args of [["--ids", path], ["--prompts", path]]) {
    expectFailure(
      await runCli(["generate", "-m", dir, ...args], { env }),
      1,
      /ids\.json is longer than 256 MiB/,
    );
  }
});

test("a folder of documents whose names a terminal would obey", async () => {
  const { dir } = writeTinyModel(join(folder.path, String(folders++)), {
    classes: 2,
    config: { id2label: ["a", ESCAPE] },
  });
  const documents = join(folder.path, "documents");
  mkdirSync(documents);
  writeFileSync(join(documents, `${ESCAPE}.txt`), "");
  writeFileSync(join(documents, "b.txt"), "some words");
  const { code, stdout } = await runCli(["classify", "-m", dir, documents]);
  expect(code).toBe(1);
  expect(stdout).toMatch(/\\u202e\.txt: error: .*\\u202e\.txt is empty\n/);
  expect(stdout).not.toMatch(/[^\P{C}\n]/u);
});
