/** `generate --prompts` as users run it: lines of prompts in, a line of JSON for each out. */
import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { temporaryFolder } from "../support/checkpoint.ts";
import {
  denoTest,
  expectFailure,
  RUN_TIMEOUT_MS,
  runCli,
  type RunOptions,
  type RunResult,
  runShell,
  withoutNotices,
  writeTinyModel,
} from "../support/cli.ts";

setDefaultTimeout(3 * RUN_TIMEOUT_MS);

/** What is printed for a prompt. */
interface Line {
  readonly line: number;
  readonly id?: string | number;
  readonly text: string;
  readonly prompt_tokens: number;
  readonly tokens: number[];
  readonly finish_reason: string;
  readonly seed: number;
  readonly logprobs?: { id: number; logprob: number; top: { id: number; logprob: number }[] }[];
}

/** What `--json` prints. */
interface Report {
  readonly results: (Line & { readonly error?: string })[];
  readonly batch: number;
  readonly timings: Record<string, number | null>;
  readonly memory: Record<string, number>;
}

const folder = temporaryFolder();
afterAll(folder.remove);
const model = writeTinyModel(join(folder.path, "tiny")).dir;
const POSITIONS = 64;

function written(name: string, content: string | Uint8Array): string {
  const path = join(folder.path, name);
  writeFileSync(path, content);
  return path;
}

function jsonLines(records: readonly object[]): string {
  return records.map((record) => JSON.stringify(record) + "\n").join("");
}

/** The objects of an output that is nothing but lines of JSON. */
function parsedLines<T = Line>(stdout: string): T[] {
  expect(stdout).toMatch(/^(\{[^\n]*\}\n)*$/);
  return stdout.split("\n").slice(0, -1).map((line) => JSON.parse(line));
}

async function reported(args: readonly string[], options?: RunOptions): Promise<Report> {
  const result = await runCli([...args, "--json"], options);
  expect(result).toMatchObject({ code: 0, notes: expect.not.stringContaining("error") });
  return JSON.parse(result.stdout);
}

/** The note behind the results. */
const NOTE = new RegExp(
  "^(\\d+) prompts, (\\d+) together, prefill (?:-|[\\d,.]+ tokens/s); generated (\\d+) tokens, " +
    ".* of GPU memory; seed -?\\d+(?:; (\\d+) lines? could not be used)?\n$",
);

/** The numbers of the note, the only one but for notices. */
function noteOf({ notes }: RunResult): Record<"prompts" | "batch" | "generated" | "failed", number> {
  const [, prompts, batch, generated, failed = 0] = NOTE.exec(withoutNotices(notes))!;
  return {
    prompts: Number(prompts),
    batch: Number(batch),
    generated: Number(generated),
    failed: Number(failed),
  };
}

/**
 * With two at a time they end at different steps, by their lengths: the first nearly fills the context. The place of one
 * that has ended is run on, beyond what it has room for, while the last is still at work.
 */
const PROMPTS = ["x".repeat(40) + "y, 62 characters long.", "hello", "It was the best of", "{ }", "ab"];
/** More than there is room for behind any of them. */
const args = ["generate", "-m", model, "-n", "100", "--temperature", "0", "--seed", "7", "--ignore-eos"];
/** As an editor on Windows would save it, with empty lines and no end of the last one. */
const FILE = written(
  "prompts.txt",
  `\r\n${PROMPTS[0]}\r\n${PROMPTS[1]}\n\n \t\r\n${PROMPTS[2]}\r\n${PROMPTS[3]}\n${PROMPTS[4]}`,
);
const LINES = [2, 3, 6, 7, 8];
/** The same from last to first, with names. */
const REVERSED = PROMPTS.map((prompt, i) => ({ id: `prompt ${i}`, prompt })).reverse();

describe("generate --prompts", () => {
  let plain: RunResult;
  let lines: Line[];
  beforeAll(async () => {
    plain = await runCli([...args, "--prompts", FILE, "--batch", "2"]);
    lines = parsedLines(plain.stdout);
  });

  /** Results without what says where the prompt stood. */
  const continuations = (of: readonly Line[]) =>
    of.map(({ text, tokens, prompt_tokens, finish_reason }) => ({
      text,
      tokens,
      prompt_tokens,
      finish_reason,
    }));

  test("prints a line of JSON for each prompt, in their order, and the timings on stderr", () => {
    expect(plain.code).toBe(0);
    for (const line of lines) {
      expect(Object.keys(line)).toEqual([
        "line",
        "text",
        "prompt_tokens",
        "tokens",
        "finish_reason",
        "seed",
      ]);
    }
    expect(lines.map(({ line }) => line)).toEqual(LINES);
    expect(lines.map(({ seed }) => seed)).toEqual([7, 8, 9, 10, 11]);
    expect(lines.map(({ prompt_tokens }) => prompt_tokens)).toEqual(PROMPTS.map(({ length }) => length));
    for (const { text, tokens, prompt_tokens, finish_reason } of lines) {
      expect(finish_reason).toBe("length");
      // The last token of a full context is drawn, but nothing runs behind it.
      expect(tokens).toHaveLength(POSITIONS - prompt_tokens + 1);
      expect(text.length).toBeLessThanOrEqual(tokens.length); // the end of text shows as nothing
    }
    const generated = lines.reduce((sum, { tokens }) => sum + tokens.length, 0);
    expect(noteOf(plain)).toEqual({ prompts: 5, batch: 2, generated, failed: 0 });
    expect(plain.stdout + plain.stderr).not.toContain("\x1b");
    expect(plain.stdout + plain.stderr).not.toContain("\r");
  });

  test("continues each as `generate` does it alone", async () => {
    for (const [i, prompt] of PROMPTS.entries()) {
      const alone = await runCli([...args, "--json", "--", prompt]);
      expect(continuations([JSON.parse(alone.stdout)])).toEqual(continuations([lines[i]!]));
    }
  });

  test("takes JSONL with names, in any order, and gives one document with --json", async () => {
    const file = written("reversed.jsonl", jsonLines(REVERSED));
    const { results, batch, timings, memory, ...rest } = await reported([
      ...args,
      ...["--prompts", file, "--batch", "2"],
    ]);
    expect(rest).toEqual({});
    expect(batch).toBe(2);
    expect(results.map(({ line, id, seed }) => ({ line, id, seed }))).toEqual(
      REVERSED.map(({ id }, i) => ({ line: i + 1, id, seed: 7 + i })),
    );
    expect(continuations(results)).toEqual(continuations(lines.toReversed()));
    expect(Object.keys(timings)).toEqual([
      "load_ms",
      "tokenize_ms",
      "first_token_ms",
      "prefill_ms",
      "prefill_tokens_per_s",
      "decode_ms",
      "decode_tokens_per_s",
    ]);
    for (const value of Object.values(timings)) expect(value).toBeGreaterThan(0);
    const prompted = results.reduce((sum, { prompt_tokens }) => sum + prompt_tokens, 0);
    expect(timings["prefill_tokens_per_s"]).toBeCloseTo(1000 * prompted / timings["prefill_ms"]!, 6);
    expect(memory["peak_bytes"]).toBe(memory["planned_bytes"]!);
    expect(memory["kv_bytes"]).toBeGreaterThanOrEqual(2 * POSITIONS * memory["bytes_per_token"]!);
  });

  test("gives the same one at a time, all at once, and with any number of steps in flight", async () => {
    for (const extra of [["--batch", "1"], ["--batch", "256"], ["--batch", "2", "--in-flight", "64"]]) {
      const { results, batch } = await reported([...args, "--prompts", FILE, ...extra]);
      expect(batch).toBe(Math.min(Number(extra[1]), PROMPTS.length)); // no more than there are prompts
      expect(continuations(results)).toEqual(continuations(lines));
    }
    const { results } = await reported([...args, "--prompts", "-", "--batch", "1", "--in-flight", "1"], {
      stdin: jsonLines(REVERSED),
    });
    expect(continuations(results)).toEqual(continuations(lines.toReversed()));
  });

  test("draws with a seed for each prompt: what the prompt gives alone with that seed", async () => {
    const drawing = ["generate", "-m", model, "-n", "20"];
    const { results } = await reported([...drawing, "--seed", "41", "--prompts", "-", "--batch", "2"], {
      stdin: "hello\nhello\n\nworld\n",
    });
    expect(results.map(({ seed }) => seed)).toEqual([41, 42, 43]);
    expect(results[0]!.text).not.toBe(results[1]!.text);
    for (const { line, seed, tokens } of results.slice(1)) {
      const prompt = line === 2 ? "hello" : "world";
      const alone = await runCli([...drawing, "--seed", String(seed), "--json", prompt]);
      expect(JSON.parse(alone.stdout).tokens).toEqual(tokens);
    }
    const random = await reported([...drawing, "--prompts", "-"], { stdin: "hello\nworld" });
    const [first, second] = random.results;
    expect(second!.seed).toBe(first!.seed + 1);
    const again = await runCli([...drawing, "--seed", String(second!.seed), "--json", "world"]);
    expect(JSON.parse(again.stdout).tokens).toEqual(second!.tokens);
  });

  test("--stop ends a prompt before its text, and no other", async () => {
    const stop = lines[1]!.text.slice(4, 6);
    const { results } = await reported([...args, "--prompts", FILE, "--batch", "2", "--stop", stop]);
    for (const [i, { text, finish_reason }] of results.entries()) {
      const whole = lines[i]!.text;
      const end = whole.indexOf(stop);
      expect({ text, finish_reason }).toEqual(
        end < 0
          ? { text: whole, finish_reason: "length" }
          : { text: whole.slice(0, end), finish_reason: "stop" },
      );
    }
    expect(results[1]!.finish_reason).toBe("stop");
  });

  test("the end-of-text token ends a prompt, and no other", async () => {
    const eos = lines[4]!.tokens[0]!;
    const ending = writeTinyModel(join(folder.path, "eos"), { config: { eosTokenId: [eos] } }).dir;
    const { results } = await reported([
      ...args.filter((arg) => arg !== "--ignore-eos"),
      ...["-m", ending, "--prompts", FILE, "--batch", "2"],
    ]);
    for (const [i, { tokens, finish_reason }] of results.entries()) {
      const whole = lines[i]!.tokens;
      const end = whole.indexOf(eos);
      expect({ tokens, finish_reason }).toEqual(
        end < 0
          ? { tokens: whole, finish_reason: "length" }
          : { tokens: whole.slice(0, end), finish_reason: "eos" },
      );
    }
    expect(results[4]).toMatchObject({ tokens: [], text: "", finish_reason: "eos" });
  });

  test("--logprobs has an entry for each token of each prompt", async () => {
    const { results } = await reported([...args, "--prompts", FILE, "--batch", "2", "--logprobs", "2"]);
    expect(continuations(results)).toEqual(continuations(lines));
    for (const { tokens, logprobs } of results) {
      expect(logprobs!.map(({ id }) => id)).toEqual(tokens);
      for (const { id, logprob, top } of logprobs!) {
        expect(top).toHaveLength(2);
        expect(top[0]).toMatchObject({ id, logprob });
        expect(top[1]!.logprob).toBeLessThanOrEqual(logprob);
        expect(logprob).toBeLessThan(0);
      }
    }
  });

  test("-n 0 only reads the prompts", async () => {
    const result = await runCli([...args, "-n", "0", "--prompts", FILE, "--batch", "2"]);
    expect(continuations(parsedLines(result.stdout))).toEqual(
      PROMPTS.map(({ length }) => ({ text: "", tokens: [], prompt_tokens: length, finish_reason: "length" })),
    );
    expect(result.code).toBe(0);
    expect(noteOf(result)).toMatchObject({ prompts: 5, generated: 0 });
  });

  denoTest("Deno prints the same bytes as Bun", async () => {
    const file = await runCli([...args, "--prompts", FILE, "--batch", "2"], { runtime: "deno" });
    expect(file).toMatchObject({ code: 0, stdout: plain.stdout });
    expect(noteOf(file)).toEqual(noteOf(plain));
  });

  test("--help shows the options", async () => {
    const { code, stdout } = await runCli(["generate", "--help"]);
    expect(code).toBe(0);
    expect(stdout).toMatch(/--prompts <path> .*JSONL/);
    expect(stdout).toMatch(/--batch <n> .*1 to 256/);
    expect(stdout).toMatch(/--in-flight <n> .*1 to 64/);
  });
});

describe("a prompt that cannot be used", () => {
  const short = ["generate", "-m", model, "-n", "3", "--temperature", "0", "--ignore-eos"];
  const broken = [
    JSON.stringify({ id: "first", prompt: "hello" }),
    "no JSON",
    '["hello"]',
    "null",
    JSON.stringify({ id: 5 }),
    JSON.stringify({ id: 0, prompt: ["hello"] }),
    JSON.stringify({ id: { a: 1 }, prompt: "hello" }),
    JSON.stringify({ id: null, prompt: "hello" }),
    JSON.stringify({ id: "empty", prompt: "" }),
    JSON.stringify({ id: "long", prompt: "x".repeat(17) }),
    JSON.stringify({ id: "unspeakable", prompt: "naïve" }),
    '{"id": 1e999, "prompt": "hello"}',
    "{\x1b[2J}",
    JSON.stringify({ id: 1.5, prompt: "x".repeat(16), more: true }),
  ].join("\n");
  const errors = [
    { line: 2, error: expect.stringMatching(/^not JSON: ./) },
    { line: 3, error: "not a JSON object" },
    { line: 4, error: "not a JSON object" },
    { line: 5, id: 5, error: 'there is no text under "prompt"' },
    { line: 6, id: 0, error: 'there is no text under "prompt"' },
    { line: 7, error: '"id" is neither a string nor a number' },
    { line: 8, error: '"id" is neither a string nor a number' },
    { line: 9, id: "empty", error: "the prompt is empty" },
    { line: 10, id: "long", error: "the prompt has 17 tokens, there is room for 16" },
    { line: 11, id: "unspeakable", error: expect.stringMatching(/has no tokens for some characters/) },
    { line: 12, error: '"id" is too large for a number: put it in quotes' },
    { line: 13, error: expect.stringMatching(/^not JSON: [\x20-\x7e]+$/) },
  ];

  test("is a line with its error; the others are continued; exit code 1", async () => {
    const file = written("broken.jsonl", broken);
    const result = await runCli([...short, "--prompts", file, "-c", "16", "--batch", "2"]);
    const lines = parsedLines(result.stdout);
    expect(lines.slice(1, -1) as object[]).toEqual(errors);
    expect(lines[0]).toMatchObject({ line: 1, id: "first", prompt_tokens: 5, finish_reason: "length" });
    expect(lines[0]!.tokens).toHaveLength(3);
    // Its context is full.
    expect(lines.at(-1)).toMatchObject({ line: 14, id: 1.5, prompt_tokens: 16, finish_reason: "length" });
    expect(lines.at(-1)!.tokens).toHaveLength(1);
    expect(result.code).toBe(1);
    expect(noteOf(result)).toEqual({ prompts: 14, batch: 2, generated: 4, failed: 12 });

    const quiet = await runCli([...short, "--prompts", file, "-c", "16", "--batch", "2", "-q", "--json"]);
    expect({ code: quiet.code, notes: quiet.notes }).toEqual({ code: 1, notes: "" });
    const withoutSeeds = (of: readonly Line[]) => of.map(({ seed: _, ...rest }) => rest);
    expect(withoutSeeds(JSON.parse(quiet.stdout).results)).toEqual(withoutSeeds(lines));
  });

  test("does not count among the seeds", async () => {
    const stdin = '{"id": 1}\n{"prompt": "hello"}\n{"id": 2}\n{"prompt": "world"}\n';
    const { stdout } = await runCli([...short, "--seed", "-3", "--prompts", "-", "-q"], { stdin });
    expect(parsedLines(stdout).map(({ line, seed }) => ({ line, seed }))).toEqual([
      { line: 1, seed: undefined as never },
      { line: 2, seed: -3 },
      { line: 3, seed: undefined as never },
      { line: 4, seed: -2 },
    ]);
  });

  test("may be longer than the model's positions, and the others still have their room", async () => {
    const stdin = `hello\n${"x".repeat(65)}\n${"x".repeat(64)}`;
    const result = await runCli([...short, "--prompts", "-"], { stdin });
    const [hello, long, full] = parsedLines(result.stdout);
    expect(hello!.tokens).toHaveLength(3);
    expect(long as object).toEqual({
      line: 2,
      error: expect.stringMatching(/^The prompt, 65 tokens, is longer than the model's 64 positions$/),
    });
    expect(full!.tokens).toHaveLength(1);
    expect(result.code).toBe(1);
    expect(noteOf(result)).toMatchObject({ prompts: 3, generated: 4, failed: 1 });
  });

  test("may be any: then there are only errors", async () => {
    const stdin = '{"prompt": ""}\n{}\n';
    const errors = [{ line: 1, error: "the prompt is empty" }, {
      line: 2,
      error: 'there is no text under "prompt"',
    }];
    const result = await runCli([...short, "--prompts", "-"], { stdin });
    expect(parsedLines<object>(result.stdout)).toEqual(errors);
    expect(result.code).toBe(1);
    expect(noteOf(result)).toMatchObject({ prompts: 2, generated: 0, failed: 2 });
    const { code, stdout } = await runCli([...short, "--prompts", "-", "--json"], { stdin });
    const { results, timings } = JSON.parse(stdout);
    expect({ code, results }).toEqual({ code: 1, results: errors });
    expect(timings).toMatchObject({ first_token_ms: null, decode_ms: null, decode_tokens_per_s: null });
  });
});

describe("a file of prompts", () => {
  const cases: readonly (readonly [name: string, path: string, message: RegExp, options?: RunOptions])[] = [
    ["that is empty", written("empty", ""), /empty holds no prompts/],
    ["of empty lines", written("blank", "\n \r\n\t\n"), /blank holds no prompts/],
    ["that is an empty pipe", "-", /standard input holds no prompts/, { stdin: "" }],
    ["that is not there", join(folder.path, "none.txt"), /Cannot read .*none\.txt: there is no such file/],
    ["that is a folder", folder.path, /Cannot read .*: it is a folder/],
    [
      "that is not UTF-8",
      written("latin1", Uint8Array.of(0x61, 0x0a, 0x62, 0xe9, 0x63)),
      /latin1 is not UTF-8 text: byte 3 begins/,
    ],
  ];
  for (const [name, path, message, options] of cases) {
    test(`${name}: exit code 1`, async () => {
      expectFailure(await runCli(["generate", "-m", model, "--prompts", path], options), 1, message);
    });
  }
});

describe("generate --prompts is ended", () => {
  const endless = writeTinyModel(join(folder.path, "endless"), { config: { nPositions: 16384 } }).dir;
  /** The first fills the context and has ended when the others have hardly begun. */
  const FIRST = "x".repeat(1999);
  const file = written("long.txt", `${FIRST}\nhello\nworld\nnever begun\n`);
  const long = ["generate", "-m", endless, "-c", "2000", "-n", "16000", "--ignore-eos", "--seed", "5"];
  const two = [...long, "--prompts", file, "--batch", "2"];

  function checkInterrupted(result: RunResult): void {
    expect(result.code).toBe(130);
    const [first, ...others] = parsedLines(result.stdout);
    expect(first).toMatchObject({ line: 1, prompt_tokens: 1999, finish_reason: "length" });
    expect(first!.tokens).toHaveLength(2);
    // Those that were under way, with what they had; the second waits for the first's place.
    expect([[2], [2, 3]]).toContainEqual(others.map(({ line }) => line));
    for (const { finish_reason, tokens } of others) {
      expect(finish_reason).toBe("interrupt");
      expect(tokens.length).toBeLessThan(1990);
    }
    expect(noteOf(result)).toMatchObject({ prompts: 1 + others.length, batch: 2, failed: 0 });
  }

  test("by SIGINT: with what was finished, what there was of the others, and exit code 130", async () => {
    checkInterrupted(await runCli([...two, "--in-flight", "1"], { signal: "SIGINT" }));
    checkInterrupted(await runCli([...two, "--in-flight", "64"], { signal: "SIGINT" }));
  });

  denoTest("by SIGINT on Deno", async () => {
    checkInterrupted(await runCli(two, { signal: "SIGINT", runtime: "deno" }));
  });

  test("by SIGINT, with --json: one document", async () => {
    const interrupted = {
      preload: join(import.meta.dir, "../support/interrupt.ts"),
      env: { INTERRUPT_FROM: "sampling/draw", INTERRUPT_AFTER: "30" },
    };
    const { code, stdout, notes } = await runCli([...two, "--json"], interrupted);
    expect({ code, notes: withoutNotices(notes) }).toEqual({ code: 130, notes: "" });
    const { results, batch } = JSON.parse(stdout) as Report;
    expect(batch).toBe(2);
    expect(results.map(({ finish_reason }) => finish_reason)).toEqual(["length", "interrupt", "interrupt"]);
  });

  test("by SIGINT while the first prompt is read: nothing but the timings", async () => {
    const interrupted = {
      preload: join(import.meta.dir, "../support/interrupt.ts"),
      env: { INTERRUPT_FROM: "embedding/token_rows", INTERRUPT_AFTER: "1" },
    };
    // Several chunks, between which an interruption ends it.
    const prompts = written("chunks.txt", `${"x".repeat(8000)}\nhello\n`);
    const result = await runCli([...long, "-c", "8001", "--prompts", prompts, "--batch", "2"], interrupted);
    expect({ code: result.code, stdout: result.stdout }).toEqual({ code: 130, stdout: "" });
    expect(noteOf(result)).toMatchObject({ prompts: 0, generated: 0 });
  });

  test("by a reader that has seen enough: quietly, even if lines could not be used", async () => {
    const stdin = '{"id": "bad"}\n{"prompt": "hello"}\n{"prompt": "world"}\n';
    const { stdout, notes } = await runShell('{ "$@"; echo "status $?" >&2; } | head -n 1', [
      ...[...long, "-c", "200", "--prompts", "-"],
    ], { stdin });
    expect(stdout).toBe('{"line":1,"id":"bad","error":"there is no text under \\"prompt\\""}\n');
    expect(withoutNotices(notes)).toBe("status 0\n");
    const json = await runShell('{ "$@" --json -n 1; echo "status $?" >&2; } | true', two);
    expect(withoutNotices(json.notes)).toBe("status 0\n");
  });
});
