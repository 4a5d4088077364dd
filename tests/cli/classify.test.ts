/** `classify` as users run it: files, folders and records in, labels out, on any number of processes. */
import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { appendFileSync, existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { nllReference } from "../../src/kernels/nll/reference.ts";
import { activate } from "../../src/model/classification.ts";
import { referenceForward } from "../../src/model/reference.ts";
import { maxAbsDifference } from "../support/accuracy.ts";
import { temporaryFolder } from "../support/checkpoint.ts";
import {
  cliCommand,
  denoTest,
  expectFailure,
  RUN_TIMEOUT_MS,
  runCli,
  type RunOptions,
  type RunResult,
  runShell,
  type Runtime,
  runtimes,
  withoutNotices,
  writeTinyModel,
} from "../support/cli.ts";
import { logitTolerance, readReference } from "../support/model.ts";

setDefaultTimeout(2 * RUN_TIMEOUT_MS);

type Numbers = Readonly<Record<string, number>>;

/** What is said of a beginning of a document. */
interface Verdict {
  readonly tokens: number;
  readonly truncated: boolean;
  readonly label: string;
  readonly scores: Numbers;
  readonly logits: Numbers;
}

/** What is printed for a document that could be classified, as the documentation has it. */
interface Result extends Verdict {
  readonly id: string | number;
  readonly file?: string;
  readonly expected?: string;
  readonly by_length?: readonly (Verdict & { readonly max_tokens: number })[];
  readonly batch: number;
  readonly timings: Readonly<Record<string, number | null>>;
}

const folder = temporaryFolder();
afterAll(folder.remove);
const CLASSES = ["class 0", "class 1", "class 2"];
/** Positions of the model; a character is a token. */
const POSITIONS = 512;
const checkpoint = writeTinyModel(join(folder.path, "tiny"), {
  classes: CLASSES.length,
  config: { nPositions: POSITIONS },
});
const model = checkpoint.dir;
const base = ["classify", "-m", model, "--dtype", "f32"];
let paths = 0;

function newPath(): string {
  return join(folder.path, `results ${paths++}.jsonl`);
}

function written(name: string, content: string | Uint8Array): string {
  const path = join(folder.path, name);
  mkdirSync(dirname(path), { recursive: true });
  writeFileSync(path, content);
  return path;
}

function idsOf(text: string): number[] {
  return [...text].map((char) => char === "\n" ? 95 : char.charCodeAt(0) - 0x20);
}

function jsonLines(records: readonly object[]): string {
  return records.map((record) => JSON.stringify(record) + "\n").join("");
}

/** The objects of an output that is nothing but lines of JSON. */
function parsedLines<T = Result>(text: string): T[] {
  expect(text).toMatch(/^(\{[^\n]*\}\n)*$/);
  return text.split("\n").slice(0, -1).map((line) => JSON.parse(line));
}

/** What does not depend on the run: neither times nor what shared a pass. */
function verdict({ batch: _batch, timings: _timings, ...rest }: Result) {
  return rest;
}

function verdictsOf(text: string) {
  return parsedLines(text).map(verdict);
}

/** What is said of a text, without where it came from. */
function judgement({ tokens, truncated, label, scores, logits }: Verdict): Verdict {
  return { tokens, truncated, label, scores, logits };
}

async function succeeded(args: readonly string[], options?: RunOptions): Promise<RunResult> {
  const result = await runCli([...base, ...args], options);
  expect({ code: result.code, notes: result.notes }).toEqual({
    code: 0,
    notes: expect.not.stringContaining("error"),
  });
  return result;
}

async function classified(args: readonly string[], options?: RunOptions): Promise<Result[]> {
  return JSON.parse((await succeeded([...args, "--json"], options)).stdout);
}

// Folders named after labels, as a dataset is laid out.
const DOCUMENTS: Readonly<Record<string, string>> = {
  "set/class 0/one.txt": "hello world, this is a text\n",
  "set/class 0/two.txt": "x".repeat(300),
  "set/class 1/one.txt": "and another one",
  "set/class 1/deep/two.md": "It was the best of times",
  "set/class 2/.hidden": "never read",
};
for (const [name, text] of Object.entries(DOCUMENTS)) written(name, text);
const set = join(folder.path, "set");
const inSet = (...names: string[]) => names.map((name) => join(set, name));
const ALL = inSet("class 0/one.txt", "class 0/two.txt", "class 1/deep/two.md", "class 1/one.txt");
const LONG = "class 0/two.txt";

/** Texts of 1 to 300 characters, the same in each run. */
const RECORDS = Array.from({ length: 40 }, (_, i) => ({
  id: `document ${i}`,
  text: Array.from({ length: 1 + (97 * i) % 300 }, (_, j) => String.fromCharCode(97 + (i * j + j) % 26)).join(
    "",
  ),
}));
const records = written("records.jsonl", jsonLines(RECORDS));

describe("classify", () => {
  let results: Result[];
  let lines: Result[];
  beforeAll(async () => {
    results = await classified([join(set, "class 0"), join(set, "class 1")]);
    lines = parsedLines((await succeeded(["--jsonl", records])).stdout);
  });

  test("--json is an array with the documented keys, with sane numbers", () => {
    expect(results.map(({ id, file }) => ({ id, file }))).toEqual(
      ALL.map((path) => ({ id: path, file: path })),
    );
    for (const result of results) {
      expect(Object.keys(result)).toEqual(
        ["id", "file", "tokens", "truncated", "label", "scores", "logits", "batch", "timings"],
      );
      const { tokens, truncated, label, scores, logits, batch, timings, file } = result;
      expect({ tokens, truncated }).toEqual({ tokens: readFileSync(file!).length, truncated: false });
      expect([Object.keys(scores), Object.keys(logits)]).toEqual([CLASSES, CLASSES]);
      expect(Object.values(scores)).toEqual(activate(Object.values(logits), "softmax"));
      expect(scores[label]).toBe(Math.max(...Object.values(scores)));
      expect(batch).toBeWithin(1, ALL.length + 1);
      const { load_ms, tokenize_ms, prefill_ms, prefill_tokens_per_s, ...others } = timings;
      expect(others).toEqual({ first_token_ms: null, decode_ms: null, decode_tokens_per_s: null });
      for (const ms of [load_ms, tokenize_ms, prefill_ms]) expect(ms).toBeGreaterThan(0);
      if (batch > 1) expect(prefill_tokens_per_s).toBeNull();
      else expect(prefill_tokens_per_s).toBeCloseTo(1000 * tokens / prefill_ms!, 6);
    }
  });

  test("logits are those of the CPU reference", async () => {
    const { parameters, config } = await readReference(model);
    const scoring = new Map([...parameters, ["lm_head.weight", checkpoint.values.get("score.weight")!]]);
    for (const { file, logits } of results) {
      const wanted = referenceForward(scoring, config, idsOf(readFileSync(file!, "utf8"))).logits;
      const last = wanted.slice(-CLASSES.length);
      expect(maxAbsDifference(Object.values(logits), last)).toBeLessThan(logitTolerance("f32", wanted));
    }
  });

  test("prints a line a document, and what it cost to stderr; nothing there with -q", async () => {
    const { stdout, stderr, notes } = await succeeded([set]);
    const percent = String.raw`\d+\.\d %`;
    const line = ({ file, label, tokens }: Result) =>
      `${file}: ${label} ${percent} \\(class \\d ${percent}\\), ${tokens} tokens\n`;
    expect(stdout).toMatch(new RegExp(`^${results.map(line).join("")}$`));
    expect(withoutNotices(notes)).toMatch(
      /^4 documents, 367 tokens in .*: [\d,.]+ documents\/s, [\d,.]+ tokens\/s(, GPU at work .*)?; .* memory\n$/,
    );
    for (const control of ["\x1b", "\r"]) expect(stdout + stderr).not.toContain(control);
    for (const runtime of runtimes) {
      expect(await runCli([...base, set, "-q"], { runtime })).toMatchObject({ code: 0, stdout, notes: "" });
    }
  });

  test("takes files, patterns and a pipe in their order, and a document twice", async () => {
    const text = "It was the best of times";
    const args = [join(set, "class 1/one.txt"), "-", join(set, "class */*.txt"), join(set, "**/*.md")];
    const given = await classified(args, { stdin: text });
    const names = inSet("class 1/one.txt", "", "class 0/one.txt", "class 0/two.txt", "class 1/one.txt");
    const wanted = [names[0]!, "-", ...names.slice(2), join(set, "class 1/deep/two.md")];
    expect(given.map(({ id }) => id)).toEqual(wanted);
    for (const result of given) {
      const path = result.id === "-" ? join(set, "class 1/deep/two.md") : result.id;
      expect(judgement(result)).toEqual(judgement(results.find(({ id }) => id === path)!));
    }
  });

  test("takes token ids, as a document or in records", async () => {
    const [first] = results;
    const ids = idsOf(DOCUMENTS["set/class 0/one.txt"]!);
    const file = written("ids.json", JSON.stringify(ids));
    const [listed, ...none] = await classified(["--ids", file]);
    expect(none).toEqual([]);
    expect(Object.keys(listed!)).not.toContain("file");
    expect(listed!.id).toBe(file);
    expect(judgement(listed!)).toEqual(judgement(first!));
    const { stdout } = await succeeded(["--jsonl"], { stdin: jsonLines([{ id: 1, ids }]) });
    expect(verdictsOf(stdout)).toEqual([{ id: 1, ...judgement(first!) }]);
  });

  test("--jsonl prints a line a record in their order, however they are encoded and packed", async () => {
    expect(lines.map(({ id, tokens }) => ({ id, tokens }))).toEqual(
      RECORDS.map(({ id, text }) => ({ id, tokens: text.length })),
    );
    expect(Math.max(...lines.map(({ batch }) => batch))).toBeGreaterThan(1);
    const stdin = jsonLines(RECORDS);
    const wanted = lines.map(verdict);
    const alone = parsedLines((await succeeded(["--jsonl", "--batch", "1"], { stdin })).stdout);
    expect(alone.map(({ batch }) => batch)).toEqual(RECORDS.map(() => 1));
    expect(alone.map(verdict)).toEqual(wanted);
    for (const workers of ["0", "2"]) {
      const { stdout } = await succeeded(["--jsonl", "--workers", workers, "--batch", "3"], { stdin });
      expect(verdictsOf(stdout)).toEqual(wanted);
    }
  });

  denoTest("Deno gives the same results as Bun", async () => {
    const { stdout } = await succeeded(["--jsonl", records], { runtime: "deno" });
    expect(verdictsOf(stdout)).toEqual(lines.map(verdict));
    const files = await classified([set], { runtime: "deno" });
    expect(files.map(verdict)).toEqual(results.map(verdict));
  });

  test("answers a record while its reader waits for that before it sends the next", async () => {
    const child = Bun.spawn([...cliCommand(), ...base, "--jsonl", "-q"], { stdin: "pipe", stderr: "ignore" });
    const reader = child.stdout.getReader();
    for (const { id, text } of RECORDS.slice(0, 3)) {
      child.stdin.write(jsonLines([{ id, text }]));
      await child.stdin.flush();
      const { value } = await reader.read();
      expect(parsedLines(new TextDecoder().decode(value))).toMatchObject([{ id }]);
    }
    await child.stdin.end();
    expect(await child.exited).toBe(0);
  });

  test("--max-tokens cuts; with several it gives each, which is what the cut text alone gives", async () => {
    const long = DOCUMENTS[`set/${LONG}`]!;
    const paths = [4, 64, 300].map((tokens) => written(`cut/${tokens}.txt`, long.slice(0, tokens)));
    const alone = await classified(paths);
    const [cut, short] = await classified([join(set, LONG), paths[0]!, "-n", "64"]);
    expect(verdict(cut!)).toEqual({ ...verdict(alone[1]!), ...fileOf(join(set, LONG)), truncated: true });
    expect(verdict(short!)).toEqual(verdict(alone[0]!));
    const both = await classified([join(set, LONG), paths[1]!, "--max-tokens", "64,400,4"]);
    for (const { by_length: byLength, ...whole } of both) {
      expect(byLength!.map(({ max_tokens }) => max_tokens)).toEqual([4, 64, 400]);
      expect(judgement(byLength![2]!)).toEqual(judgement(whole));
      for (const [i, { tokens }] of byLength!.entries()) {
        const isAll = tokens === whole.tokens && !whole.truncated;
        const same = alone.find((other) => other.tokens === tokens)!;
        expect(judgement(byLength![i]!)).toEqual({ ...judgement(same), truncated: !isAll });
      }
    }
    expect(both.map(({ by_length }) => by_length!.map(({ tokens }) => tokens))).toEqual([
      [4, 64, 300],
      [4, 64, 64],
    ]);
    const { stdout } = await succeeded([join(set, LONG), "-n", "64", "-q"]);
    expect(stdout).toEndWith(", first 64 tokens\n");
  });

  test("--window averages over windows, each as a document of its own", async () => {
    const text = RECORDS.map((record) => record.text).join("").slice(0, POSITIONS + 288);
    const sizes = [256, 256, 256, 32];
    const pieces = sizes.map((size, i) => ({ id: i, text: text.slice(256 * i, 256 * i + size) }));
    const stdin = jsonLines([{ id: "long", text }, ...pieces]);
    const { stdout } = await succeeded(["--jsonl", "--window", "256"], { stdin });
    const [long, ...parts] = verdictsOf(stdout);
    expect(long).toMatchObject({ id: "long", tokens: POSITIONS + 288, truncated: false });
    for (const label of CLASSES) {
      const mean = parts.reduce((sum, { logits }, i) => sum + logits[label]! * sizes[i]!, 0) / text.length;
      expect(long!.logits[label]).toBeCloseTo(mean, 6);
    }
  });

  test("--labels chooses the likeliest text, whatever the checkpoint's head", async () => {
    const labels = ["yes", "no way"];
    const template = "Q: {text}\\n\\nA: {label}.";
    const file = join(set, "class 1/one.txt");
    const args = [file, "--labels", " yes ,no way", "--template", template];
    const [plain] = await classified(args);
    const { parameters, config } = await readReference(model);
    const before = idsOf(`Q: ${readFileSync(file, "utf8")}\n\nA:`);
    const likelihoods = labels.map((label) => {
      const ids = [...before, ...idsOf(` ${label}.`)];
      const { logits } = referenceForward(parameters, config, ids);
      return -[...nllReference(logits, ids.slice(1), config.vocabSize)].slice(before.length - 1)
        .reduce((sum, nll) => sum + nll, 0);
    });
    const bound = 10 * logitTolerance("f32", [1]);
    expect(plain!.tokens).toBe(15);
    expect(Object.keys(plain!.logits)).toEqual(labels);
    expect(maxAbsDifference(Object.values(plain!.logits), likelihoods)).toBeLessThan(bound);
    expect(Object.values(plain!.scores)).toEqual(activate(Object.values(plain!.logits), "softmax"));

    // Each label is moved by the same for all documents.
    const calibrated = await classified([...args, join(set, "class 0/one.txt"), "--calibrate"]);
    const uncalibrated = await classified([...args, join(set, "class 0/one.txt"), "-n", "400"]);
    const moved = calibrated.map(({ logits }, i) =>
      labels.map((label) => uncalibrated[i]!.logits[label]! - logits[label]!)
    );
    expect(maxAbsDifference(moved[0]!, moved[1]!)).toBeLessThan(1e-9);
    expect(moved[0]!.every((by) => by < 0)).toBe(true);

    const headless = writeTinyModel(join(folder.path, "headless"), { config: { nPositions: POSITIONS } }).dir;
    const [same] = await classified(["-m", headless, ...args]);
    expect(verdict(same!)).toEqual(verdict(plain!));
  });

  test("--sparsity and --pooling change what they should, and are told of", async () => {
    const [dense] = results.filter(({ file }) => file === join(set, LONG));
    const out = newPath();
    const args = [join(set, LONG), "--sparsity", "local:64", "-c", "512", "--out", out, "--json"];
    const { sparsity } = JSON.parse((await succeeded(args)).stdout);
    expect(sparsity).toMatchObject({ pattern: "local:64", density: expect.any(Number) });
    const [sparse] = verdictsOf(readFileSync(out, "utf8"));
    expect(sparse!.logits).not.toEqual(dense!.logits);
    const [mean] = await classified([join(set, LONG), "--pooling", "mean"]);
    expect(mean!.logits).not.toEqual(dense!.logits);
  });

  test("--profile prints a table of kernels, or puts it into the report of a file", async () => {
    for (const json of [[], ["--json"]]) {
      const { notes } = await succeeded([set, "--profile", ...json]);
      expect(notes).toMatch(/^kernel +calls +ms +% .*\n(\S+ .*\d+ .*(memory|compute)\n)+\n/m);
    }
    const { stdout, notes } = await succeeded([set, "--profile", "--out", newPath(), "--json"]);
    expect(notes).not.toContain("calls");
    const { profile, gpu_busy } = JSON.parse(stdout);
    expect(gpu_busy).toBeNull();
    expect(profile.kernels[0]).toMatchObject({
      kernel: expect.any(String),
      calls: expect.any(Number),
      gpu_ms: expect.any(Number),
    });
    expect(profile.host.tokenization.count).toBe(ALL.length);
  });

  test("--help shows the options", async () => {
    const { stdout } = await runCli(["classify", "--help"]);
    for (
      const option of ["--jsonl", "--max-tokens", "--labels", "--expected", "--eval", "--out", "--resume"]
    ) {
      expect(stdout).toContain(` ${option} `);
    }
    expect(stdout).toContain("longform classify --jsonl --out labels.jsonl --resume < documents.jsonl");
  });
});

function fileOf(path: string) {
  return { id: path, file: path };
}

describe("a record that cannot be classified", () => {
  const invalid = Buffer.concat([
    Buffer.from('{"id": "latin1", "text": "na'),
    Uint8Array.of(0xef),
    Buffer.from('ve"}\n'),
  ]);
  const good = { id: "é 😀", text: "hello" };
  const input = Buffer.concat([
    Buffer.from(jsonLines([good])),
    Buffer.from("no JSON\n\n"),
    invalid,
    Buffer.from(jsonLines([
      { id: "no text" },
      { id: 5, text: "" },
      { text: 5 },
      { id: "long", text: "x".repeat(POSITIONS + 1) },
      { id: "foreign", text: "naïve" },
      { id: "outside", ids: [1, 97] },
      { id: "unlabelled", text: "hello" },
      { id: "mislabelled", text: "hello", author: "class 3" },
      { id: "full", text: "x".repeat(POSITIONS), author: "class 2" },
    ])),
    Buffer.from('{"text": "hello"}'), // without a newline
  ]);
  const errors = {
    2: expect.stringMatching(/^line 2 is not JSON: ./),
    4: "line 4 is not UTF-8 text",
    "no text": 'line 5 has neither "text" nor "ids"',
    5: 'line 6 has an empty "text"',
    7: 'line 7 has a "text" that is not a string',
    long: "the document has more than the 512 tokens that there is room for: `--max-tokens` cuts it, " +
      "`--positions` goes beyond the model's",
    foreign: expect.stringMatching(/has no tokens for some characters/),
    outside: "token 1 is 97, the model's ids go from 0 to 96",
  };
  const failed = (id: string | number) => ({ id, error: errors[id as keyof typeof errors] });

  for (const runtime of runtimes) {
    test(`on ${runtime}: is a line with its error, in its place; exit code 1`, async () => {
      const result = await runCli([...base, "--jsonl", "-q"], { runtime, stdin: input });
      expect(result.notes).toBe("error: 8 of 13 documents could not be classified\n");
      expect(result.code).toBe(1);
      const found = parsedLines<object>(result.stdout);
      expect(found).toEqual([
        expect.objectContaining({ id: good.id, tokens: 5 }),
        ...[2, 4, "no text", 5, 7, "long", "foreign", "outside"].map(failed),
        expect.objectContaining({ id: "unlabelled", tokens: 5 }),
        expect.objectContaining({ id: "mislabelled", tokens: 5 }),
        expect.objectContaining({ id: "full", tokens: POSITIONS, truncated: false }),
        expect.objectContaining({ id: 14, tokens: 5 }),
      ]);
      const { logits } = found[0] as Result;
      expect(found.at(-1)).toMatchObject({ logits });
    });
  }

  test("because of its expected label is one, too", async () => {
    const result = await runCli([...base, "--jsonl", "--expected", "author"], { stdin: input });
    expect(result.code).toBe(1);
    const found = parsedLines<{ id: string | number; error?: string }>(result.stdout);
    expect(found.filter(({ error }) => error === undefined)).toEqual([
      expect.objectContaining({ id: "full", expected: "class 2" }),
    ]);
    const errorOf = (wanted: string) => found.find(({ id }) => id === wanted)!.error;
    expect(errorOf("unlabelled")).toBe('line 11 has no expected label under "author"');
    expect(errorOf("mislabelled")).toBe('the expected label "class 3" is none of the 3 labels');
    expect(withoutNotices(result.notes)).toMatch(/\nerror: 12 of 13 documents could not be classified\n$/);
  });

  test("may be cut to what there is room for", async () => {
    const stdin = jsonLines([{ id: "long", text: "x".repeat(POSITIONS + 1) }]);
    const [cut] = verdictsOf((await succeeded(["--jsonl", "-n", "512"], { stdin })).stdout);
    expect(cut).toMatchObject({ id: "long", tokens: POSITIONS, truncated: true });
    const repeated = ["--jsonl", "--positions", "repeat", "-c", "600"];
    const [whole] = verdictsOf((await succeeded(repeated, { stdin })).stdout);
    expect(whole).toMatchObject({ id: "long", tokens: POSITIONS + 1, truncated: false });
  });

  test("may be a file among others", async () => {
    const bad = written("bad/latin1.txt", Uint8Array.of(0x61, 0xe9, 0x63));
    const empty = written("bad/none.txt", "");
    const good = written("bad/others.txt", "hello");
    const result = await runCli([...base, dirname(bad), "--json"]);
    expect(result.code).toBe(1);
    expect(JSON.parse(result.stdout)).toEqual([
      { ...fileOf(bad), error: expect.stringContaining("latin1.txt is not UTF-8 text: byte 1") },
      { ...fileOf(empty), error: `${empty} is empty` },
      expect.objectContaining({ ...fileOf(good), tokens: 5 }),
    ]);
    expect(withoutNotices(result.notes)).toBe("error: 2 of 3 documents could not be classified\n");
    const { stdout } = await runCli([...base, dirname(bad)]);
    expect(stdout).toMatch(/^\S+latin1\.txt: error: \S+ is not UTF-8 text: .*\n.*: error: .*\n.*: class /);
  });
});

describe("classify --eval", () => {
  const names = ["class 0/one.txt", LONG, "class 1/one.txt"];
  const folders = inSet(...names);
  let table: string;
  let report: { results: Result[]; evaluations: { max_tokens: number | null; evaluation: Evaluated }[] };
  interface Evaluated {
    readonly documents: number;
    readonly accuracy: number;
    readonly confusion: { readonly labels: string[]; readonly counts: number[][] };
  }

  beforeAll(async () => {
    table = (await succeeded([...folders, "--eval", "-q"])).stdout;
    report = JSON.parse((await succeeded([...folders, "--eval", "--json"])).stdout);
  });

  test("compares labels with folders: a table, or a document with --json", () => {
    const { results, evaluations } = report;
    expect(results.map(({ expected }) => expected)).toEqual(["class 0", "class 0", "class 1"]);
    expect(evaluations).toHaveLength(1);
    const [{ max_tokens, evaluation }] = evaluations as [typeof evaluations[0]];
    const right = results.filter(({ label, expected }) => label === expected).length;
    expect({ max_tokens, documents: evaluation.documents }).toEqual({ max_tokens: null, documents: 3 });
    expect(evaluation.accuracy).toBe(right / 3);
    for (const { label, expected } of results) {
      const { labels, counts } = evaluation.confusion;
      const count = results.filter((other) => other.label === label && other.expected === expected).length;
      expect(counts[labels.indexOf(expected!)]![labels.indexOf(label)]).toBe(count);
    }
    expect(table).toMatch(new RegExp(`^${folders.map((path) => `${path}: class .*\n`).join("")}\naccuracy `));
    expect(table).toContain(`accuracy ${(100 * right / 3).toFixed(2)} % (95 % interval`);
    expect(table).toContain("rows: expected, columns: predicted\n");
  });

  test("or with a field of records, by each length; the table leaves stdout to the lines", async () => {
    const stdin = jsonLines(names.map((name, id) => ({
      id,
      text: DOCUMENTS[`set/${name}`],
      true: dirname(name),
    })));
    const out = newPath();
    const args = ["--jsonl", "--expected", "true", "-n", "8,512"];
    const piped = await succeeded(args, { stdin });
    const lines = parsedLines(piped.stdout);
    expect(lines.map(({ label, expected }) => ({ label, expected }))).toEqual(
      report.results.map(({ label, expected }) => ({ label, expected })),
    );
    const wanted = table.slice(table.indexOf("accuracy")).trimEnd();
    expect(piped.notes).toContain(wanted);
    expect(piped.notes).toMatch(/\n +512 .*\n/);
    const filed = await succeeded([...args, "--out", out], { stdin });
    expect(filed.stdout).toContain(wanted);
    expect(verdictsOf(readFileSync(out, "utf8"))).toEqual(lines.map(verdict));
    const { evaluations } = JSON.parse(
      (await succeeded([...args, "--out", newPath(), "--json"], { stdin })).stdout,
    ) as typeof report;
    expect(evaluations.map(({ max_tokens }) => max_tokens)).toEqual([8, 512]);
    expect(evaluations[1]!.evaluation).toEqual(report.evaluations[0]!.evaluation);
    expect(evaluations[0]!.evaluation.accuracy).toBe(
      lines.filter(({ by_length, expected }) => by_length![0]!.label === expected).length / 3,
    );
  });
});

/** Complete lines of a file. */
function linesIn(path: string): number {
  return existsSync(path) ? readFileSync(path).filter((byte) => byte === 0x0a).length : 0;
}

/**
 * Runs on records that do not end until the results have so many lines, then sends the signal: however fast the
 * device is, the run is not over.
 * @returns the exit code; null for a killed process
 */
async function runUntil(
  lines: number,
  signal: NodeJS.Signals,
  { input, out, runtime, args = [] }: {
    readonly input: string;
    readonly out: string;
    readonly runtime: Runtime;
    readonly args?: readonly string[];
  },
): Promise<{ readonly code: number | null; readonly stderr: string }> {
  const command = [...cliCommand({ runtime }), ...base, "--jsonl", "--out", out, ...args];
  const child = Bun.spawn(command, { stdin: "pipe", stdout: "ignore", stderr: "pipe" });
  child.stdin.write(readFileSync(input).subarray(0, -10));
  await child.stdin.flush();
  while (linesIn(out) < lines && child.exitCode === null) await Bun.sleep(2);
  child.kill(signal);
  const stderr = await new Response(child.stderr).text();
  await child.exited;
  return { code: child.signalCode === null ? child.exitCode : null, stderr };
}

describe("classify --out", () => {
  const many = written(
    "many.jsonl",
    jsonLines(
      Array.from({ length: 8 }, (_, i) => RECORDS.map(({ id, text }) => ({ id: `${i} ${id}`, text }))).flat(),
    ),
  );
  const COUNT = 8 * RECORDS.length;
  const undisturbed = newPath();
  let wanted: ReturnType<typeof verdict>[];
  let summary: Record<string, unknown>;
  beforeAll(async () => {
    const { stdout } = await succeeded(["--jsonl", many, "--out", undisturbed, "--json"]);
    summary = JSON.parse(stdout);
    wanted = verdictsOf(readFileSync(undisturbed, "utf8"));
  });

  test("writes the lines to the file; --json says what the run was", () => {
    expect(wanted.map(({ id }) => id)).toEqual(
      Array.from({ length: 8 }, (_, i) => RECORDS.map(({ id }) => `${i} ${id}`)).flat(),
    );
    const { tokens, load_ms, ms, documents_per_s, tokens_per_s, gpu_busy, memory, ...rest } = summary;
    expect(rest).toEqual({ documents: COUNT, failed: 0, skipped: 0 });
    expect(tokens).toBe(wanted.reduce((sum, result) => sum + result.tokens, 0));
    expect(load_ms).toBeGreaterThan(0);
    expect(documents_per_s).toBeCloseTo(1000 * COUNT / (ms as number), 6);
    expect(tokens_per_s).toBeCloseTo(1000 * (tokens as number) / (ms as number), 4);
    if (gpu_busy !== null) expect(gpu_busy).toBeWithin(0, 1);
    expect(Object.keys(memory as object)).toEqual([
      ...["peak_bytes", "weights_bytes", "kv_bytes", "activations_bytes", "bytes_per_token", "planned_bytes"],
    ]);
  });

  test("leaves results that are there alone, unless --resume finds all of them", async () => {
    const before = readFileSync(undisturbed);
    const args = ["--jsonl", many, "--out", undisturbed];
    expectFailure(await runCli([...base, ...args]), 1, /is not empty\n\nhint: add `--resume`/);
    const again = await succeeded([...args, "--resume"]);
    expect(withoutNotices(again.notes)).toBe(`nothing left to do: ${COUNT} results there already\n`);
    expect(JSON.parse((await succeeded([...args, "--resume", "--json"])).stdout)).toMatchObject({
      documents: 0,
      skipped: COUNT,
      tokens: 0,
      ms: 0,
      documents_per_s: null,
      tokens_per_s: null,
      gpu_busy: null,
    });
    const other = ["--jsonl", records, "--out", undisturbed, "--resume"];
    expectFailure(
      await runCli([...base, ...other]),
      1,
      /:1 is the result of "0 document 0", document 1 of the input is "document 0"\n\nhint: resume with the input/,
    );
    const labelled = [...args, "--resume", "--labels", "yes,no"];
    expectFailure(
      await runCli([...base, ...labelled]),
      1,
      /was written with the labels class 0, .* are yes, no/,
    );
    expect(readFileSync(undisturbed)).toEqual(before);
  });

  test("survives kill -9 at any time: with --resume the results are those of one run", async () => {
    const out = newPath();
    const args = ["--resume", "--batch", "2"];
    let before = 0;
    for (const [lines, runtime] of [[1, "bun"], [60, runtimes.at(-1)!], [150, "bun"]] as const) {
      expect((await runUntil(lines, "SIGKILL", { input: many, out, runtime, args })).code).toBeNull();
      expect(linesIn(out)).toBeWithin(Math.max(lines, before), COUNT);
      before = linesIn(out);
    }
    appendFileSync(out, '{"id":"7 document 39","tok'); // as a process that is killed while it writes leaves it
    const { notes } = await succeeded(["--jsonl", many, "--out", out, ...args]);
    expect(notes).toContain(`${before} results there already; ${COUNT - before} documents, `);
    expect(verdictsOf(readFileSync(out, "utf8"))).toEqual(wanted);
  });

  for (const runtime of runtimes) {
    test(`ends with complete lines and exit code 130 on SIGINT, and goes on, on ${runtime}`, async () => {
      const out = newPath();
      const { code, stderr } = await runUntil(20, "SIGINT", { input: many, out, runtime });
      expect(stderr).not.toContain("error");
      expect(code).toBe(130);
      const written = readFileSync(out, "utf8");
      const lines = parsedLines(written);
      expect(lines.length).toBeWithin(20, COUNT);
      expect(lines.map(verdict)).toEqual(wanted.slice(0, lines.length));
      await succeeded(["--jsonl", many, "--out", out, "--resume"]);
      const after = readFileSync(out, "utf8");
      expect(after).toStartWith(written);
      expect(verdictsOf(after)).toEqual(wanted);
    });
  }

  test("goes on over files without reading those that are done", async () => {
    const files = ["a", "b", "c"].map((name) => written(`resumed/${name}.txt`, `text ${name}`));
    const out = newPath();
    await succeeded([...files.slice(0, 2), "--out", out]);
    writeFileSync(files[0]!, Uint8Array.of(0xff)); // it would be an error now
    await succeeded([...files, "--out", out, "--resume"]);
    expect(verdictsOf(readFileSync(out, "utf8"))).toMatchObject(
      files.map((path) => ({ ...fileOf(path), tokens: 6 })),
    );
  });

  test("a run with errors has a line for each, and nothing is left to be done again", async () => {
    const out = newPath();
    const args = ["--jsonl", "--out", out, "--json"];
    const stdin = jsonLines([{ id: 1, text: "hello" }, { id: 2 }]);
    const result = await runCli([...base, ...args], { stdin });
    expect(result.code).toBe(1);
    expect(JSON.parse(result.stdout)).toMatchObject({ documents: 2, failed: 1 });
    expect(parsedLines(readFileSync(out, "utf8"))).toMatchObject([
      { id: 1, tokens: 5 },
      { id: 2, error: 'line 2 has neither "text" nor "ids"' },
    ] as object[]);
    await succeeded([...args, "--resume"], { stdin });
  });
});

describe("classify ends", () => {
  /** Too many to be done, or to fit into a pipe, before the end comes. */
  const manyRecords = Array.from({ length: 100 }, () => RECORDS).flat();
  const manyFiles = Array<string>(2000).fill(join(set, LONG));

  for (const runtime of runtimes) {
    test(`by SIGINT on ${runtime}: with what is done, and exit code 130`, async () => {
      const stdin = jsonLines(manyRecords);
      const result = await runCli([...base, "--jsonl"], { signal: "SIGINT", runtime, stdin });
      expect({ code: result.code, notes: withoutNotices(result.notes) }).toEqual({ code: 130, notes: "" });
      const { length } = parsedLines(result.stdout);
      expect(length).toBeWithin(1, manyRecords.length);
      const array = await runCli([...base, ...manyFiles, "--json"], {
        signal: "SIGINT",
        runtime,
      });
      expect(array.code).toBe(130);
      expect((JSON.parse(array.stdout) as Result[]).length).toBeWithin(1, manyFiles.length);
    });
  }

  test("quietly when its reader has seen enough, even if documents could not be classified", async () => {
    const script = '{ "$@"; echo "status $?" >&2; } | head -n 1';
    const stdin = jsonLines([{ id: "bad" }, ...manyRecords]);
    const { stdout, notes } = await runShell(script, [...base, "--jsonl"], { stdin });
    expect(parsedLines<object>(stdout)).toEqual([{
      id: "bad",
      error: 'line 1 has neither "text" nor "ids"',
    }]);
    expect(withoutNotices(notes)).toBe("status 0\n");
    const files = await runShell(script, [...base, ...manyFiles]);
    expect(files.stdout).toMatch(/^[^\n]*two\.txt: class [^\n]*\n$/);
    expect(withoutNotices(files.notes)).toBe("status 0\n");
  });

  test("with nothing for nothing: records that are none, an empty array", async () => {
    for (const stdin of ["", "\n \n"]) {
      expect(await succeeded(["--jsonl", "-q"], { stdin })).toMatchObject({ stdout: "", notes: "" });
    }
  });
});

describe("classify --shard", () => {
  /** The environment of a task of `--array=10-40:10`. */
  const slurm = (task: number) => ({
    SLURM_ARRAY_TASK_ID: String(10 * task),
    SLURM_ARRAY_TASK_MIN: "10",
    SLURM_ARRAY_TASK_STEP: "10",
    SLURM_ARRAY_TASK_COUNT: "4",
  });
  const kubernetes = (index: number) => ({ JOB_COMPLETION_INDEX: String(index) });
  /** Half of the records have no id of their own. */
  const half = written(
    "half.jsonl",
    jsonLines(RECORDS.map(({ id, text }, i) => i % 2 ? { text } : { id, text })),
  );

  const [bun, other] = ["bun", runtimes.at(-1)!] as const;
  const tasks: readonly (readonly [shard: string, options: RunOptions])[][] = [
    [["1/4", {}], ["2/4", { runtime: other }], ["03/4", {}], ["4/4", {}]],
    [
      ["auto", { env: slurm(1) }],
      ["auto/4", { env: { ...slurm(2), ...kubernetes(3) }, runtime: other }],
      ["auto/4", { env: kubernetes(2), runtime: bun }],
      ["auto/4", { env: kubernetes(3), runtime: other }],
    ],
  ];
  const whole = beforeAllOnce(async () => verdictsOf((await succeeded(["--jsonl", half])).stdout));

  for (const [i, name] of ["as I/N", "as SLURM and Kubernetes number their tasks"].entries()) {
    test(`${name}: each takes every fourth, and together they are one run`, async () => {
      const parts = await Promise.all(
        tasks[i]!.map(async ([shard, options]) =>
          verdictsOf((await succeeded(["--jsonl", half, "--shard", shard], options)).stdout)
        ),
      );
      const all = await whole();
      for (const [part, results] of parts.entries()) {
        expect(results).toEqual(all.filter((_, at) => at % 4 === part));
      }
    });
  }

  test("takes files in the same way", async () => {
    const parts = await Promise.all(
      ["1/3", "2/3", "3/3"].map((shard) => classified([set, "--shard", shard])),
    );
    expect(parts.map((part) => part.map(({ file }) => file))).toEqual([
      [ALL[0], ALL[3]],
      [ALL[1]],
      [ALL[2]],
    ]);
    expect(await classified([set, "--shard", "7/9"])).toEqual([]);
  });

  test("refuses a task whose place is not known", async () => {
    const none = { SLURM_ARRAY_TASK_ID: undefined, JOB_COMPLETION_INDEX: undefined };
    for (const runtime of runtimes) {
      const result = await runCli([...base, "--jsonl", "--shard", "auto/4"], {
        runtime,
        env: none,
        stdin: "",
      });
      expectFailure(
        result,
        2,
        /finds no job array: neither SLURM_ARRAY_TASK_ID nor JOB_COMPLETION_INDEX is set/,
      );
    }
    const env = { ...none, ...kubernetes(1) };
    expectFailure(
      await runCli([...base, "--jsonl", "--shard", "auto"], { env, stdin: "" }),
      2,
      /such as `--shard auto\/8`/,
    );
  });

  if (Bun.which("parallel")) {
    test("GNU parallel starts shards, or hands each process a block of lines", async () => {
      const results = newPath();
      const shards = await runShell(
        `parallel -j 2 ${quoted(cliCommand())} ${quoted(base)} -q --jsonl ${
          quoted([half])
        } --shard {#}/4 ::: 1 2 3 4`,
        [],
      );
      const byId = (a: { id: string | number }, b: { id: string | number }) =>
        String(a.id) < String(b.id) ? -1 : 1;
      expect(verdictsOf(shards.stdout).toSorted(byId)).toEqual((await whole()).toSorted(byId));
      const blocks = await runShell(
        `parallel -j 2 -k --pipe --block 2k ${quoted(cliCommand())} ${quoted(base)} -q --jsonl < ${
          quoted([records])
        } > ${quoted([results])}`,
        [],
      );
      expect(blocks.code).toBe(0);
      const { stdout } = await succeeded(["--jsonl", records]);
      expect(verdictsOf(readFileSync(results, "utf8"))).toEqual(verdictsOf(stdout));
    });
  } else {
    test.skip("GNU parallel starts shards, or hands each process a block of lines: needs parallel on PATH", () => {});
  }
});

function quoted(words: readonly string[]): string {
  return words.map((word) => `'${word}'`).join(" ");
}

/** What several tests compare with, made when the first asks for it. */
function beforeAllOnce<T>(make: () => Promise<T>): () => Promise<T> {
  let made: Promise<T> | undefined;
  return () => made ??= make();
}

describe("classify fails", () => {
  const file = join(set, "class 1/one.txt");
  const headless = writeTinyModel(join(folder.path, "no head")).dir;
  const cases: readonly (readonly [
    name: string,
    args: readonly string[],
    code: number,
    message: RegExp,
    options?: RunOptions,
  ])[] = [
    [
      "on a model without a score head",
      [file, "-m", headless],
      1,
      /no head has no score head to classify with\n\nhint: give labels as texts, with `--labels a,b,c`/,
    ],
    ["on a missing file", [file, join(set, "none.txt")], 1, /Cannot read .*none\.txt: there is no such file/],
    ["on a pattern without files", [join(set, "*.pdf")], 1, /No file matches .*\*\.pdf\n\nhint: `\*` stays/],
    [
      "on an empty folder",
      [join(set, "class 2")],
      1,
      /There are no files in .*class 2\n\nhint: names that begin/,
    ],
    ["on missing records", ["--jsonl", join(set, "none.jsonl")], 1, /none\.jsonl: there is no such file/],
    ["on records in a folder", ["--jsonl", set], 1, /it is a folder\n\nhint: name the files in it/],
    [
      "on results in a missing folder",
      [file, "--out", join(set, "no/r.jsonl")],
      1,
      /there is no folder .*no\n/,
    ],
    [
      "on results that are none",
      ["--jsonl", records, "--out", records, "--resume"],
      1,
      /records\.jsonl:1 is not a result/,
    ],
    [
      "on lengths beyond the positions",
      [file, "-n", "8,513"],
      2,
      /`--max-tokens 513` is more than the model's 512 positions\n\nhint: .*`--positions interpolate`/,
    ],
    ["on a context beyond the positions", [file, "-c", "513"], 2, /`--context 513`.*512 positions/],
    [
      "on lengths beyond the context",
      [file, "-n", "64", "-c", "63"],
      2,
      /`--max-tokens 64` is more than `--context 63`/,
    ],
    [
      "on positions without a length",
      [file, "--positions", "repeat"],
      2,
      /`--positions repeat` needs to know how long documents may be/,
    ],
    ["on one label", [file, "--labels", "yes"], 2, /There is one label to choose from/],
    ["on a label twice", [file, "--labels", "a,b,a"], 2, /The label "a" is given twice/],
    ["on an empty label", [file, "--labels", "a,,b"], 2, /A label is empty/],
    [
      "on a template without a label",
      [file, "--labels", "a,b", "--template", "{text}"],
      2,
      /does not have \{label\} once/,
    ],
    ["on standard input with labels of folders", ["-", "--eval"], 2, /lies in no folder/, { stdin: "hello" }],
    ["on two sources of one kind", [file, "--ids", "x"], 2, /files and `--ids`/],
  ];
  for (const [name, args, code, message, options] of cases) {
    test(`${name}: exit code ${code}`, async () => {
      expectFailure(await runCli([...base, ...args], options), code, message);
    });
  }
});
