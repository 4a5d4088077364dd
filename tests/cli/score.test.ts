/** `score` as users run it: files and pipes in, figures out. Tiny models, for software Vulkan's sake. */
import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { nllReference } from "../../src/kernels/nll/reference.ts";
import { referenceForward } from "../../src/model/reference.ts";
import { maxAbsDifference } from "../support/accuracy.ts";
import type { ProfileReport } from "../../src/cli/profile.ts";
import { temporaryFolder } from "../support/checkpoint.ts";
import {
  denoTest,
  END_OF_TEXT,
  expectFailure,
  RUN_TIMEOUT_MS,
  runCli,
  type RunOptions,
  runShell,
  withoutNotices,
  writeTinyModel,
} from "../support/cli.ts";
import { logitTolerance, readReference } from "../support/model.ts";

setDefaultTimeout(2 * RUN_TIMEOUT_MS);

/** An element of what `--json` prints, as the documentation has it. */
interface Report {
  readonly file: string;
  readonly tokens: number;
  readonly scored: number;
  readonly windows: number;
  readonly window: number;
  readonly nll_mean: number | null;
  readonly perplexity: number | null;
  readonly by_position: { from: number; to: number; scored: number; nll_mean: number; perplexity: number }[];
  readonly token_nll?: (number | null)[];
  readonly logits?: Record<string, number[]>;
  readonly timings: Record<string, number | null>;
  readonly memory: Record<string, number>;
}

const folder = temporaryFolder();
afterAll(folder.remove);
/** 64 positions. */
const model = writeTinyModel(join(folder.path, "tiny")).dir;
const base = ["score", "-m", model, "--dtype", "f32"];

function written(name: string, content: string | Uint8Array): string {
  const path = join(folder.path, name);
  writeFileSync(path, content);
  return path;
}

function idsOf(text: string): number[] {
  return [...text].map((char) => char === "\n" ? 95 : char.charCodeAt(0) - 0x20);
}

const TEXT = "hello world, this is a text\n";
const file = written("hello.txt", TEXT);
const other = written("other.txt", "and another one");
const long = written("long.txt", TEXT.repeat(5)); // 140 tokens
const empty = written("empty.txt", "");

async function scored(args: readonly string[], options?: RunOptions): Promise<Report[]> {
  const { code, stdout, notes } = await runCli([...args, "--json"], options);
  expect({ code, notes: withoutNotices(notes) }).toEqual({ code: 0, notes: "" });
  return JSON.parse(stdout);
}

/** What does not depend on the run: neither times nor memory. */
function figures({ timings: _timings, memory: _memory, ...rest }: Report) {
  return rest;
}

describe("score", () => {
  let report: Report;
  beforeAll(async () => {
    [report] = await scored([...base, file, "--token-nll", "--logits", "27,0"]) as [Report];
  });

  test("--json has the documented keys, with sane numbers", () => {
    expect(Object.keys(report)).toEqual([
      ...["file", "window", "tokens", "scored", "windows", "nll_mean", "perplexity", "by_position"],
      ...["token_nll", "logits", "timings", "memory"],
    ]);
    expect(report).toMatchObject({ file, tokens: 28, scored: 27, windows: 1, window: 28 });
    const { nll_mean, perplexity } = report;
    expect(report.by_position).toEqual([{
      from: 0,
      to: 1024,
      scored: 27,
      nll_mean: nll_mean!,
      perplexity: perplexity!,
    }]);
    const { first_token_ms, decode_ms, decode_tokens_per_s, ...spent } = report.timings;
    expect({ first_token_ms, decode_ms, decode_tokens_per_s }).toEqual({
      first_token_ms: null,
      decode_ms: null,
      decode_tokens_per_s: null,
    });
    expect(Object.keys(spent)).toEqual(["load_ms", "tokenize_ms", "prefill_ms", "prefill_tokens_per_s"]);
    for (const value of Object.values(spent)) expect(value).toBeGreaterThan(0);
    expect(spent["prefill_tokens_per_s"]).toBeCloseTo(28_000 / spent["prefill_ms"]!, 6);
    const { weights_bytes, kv_bytes, activations_bytes, bytes_per_token, ...total } = report.memory;
    expect(bytes_per_token).toBe(2 * 2 * 8 * 4); // K and V, layers, width, f32
    expect(kv_bytes).toBe(64 * bytes_per_token! + 16);
    expect(weights_bytes).toBeGreaterThanOrEqual(4 * 97 * 8);
    expect(total["planned_bytes"]).toBeGreaterThan(weights_bytes! + kv_bytes! + activations_bytes!);
    expect(Object.keys(total)).toEqual(["peak_bytes", "planned_bytes"]);
  });

  test("likelihoods and logits are those of the CPU reference, aligned with the tokens", async () => {
    const { parameters, config } = await readReference(model);
    const ids = idsOf(TEXT);
    const { logits } = referenceForward(parameters, config, ids);
    const nll = nllReference(logits, ids.slice(1), config.vocabSize);
    const bound = logitTolerance("f32", logits);
    const [first, ...rest] = report.token_nll!;
    expect(first).toBeNull();
    expect(rest).toHaveLength(27);
    // A likelihood is a logit less a log-sum-exp, which moves by no more than the largest logit's error.
    expect(maxAbsDifference(rest as number[], nll)).toBeLessThan(2 * bound);
    const mean = nll.reduce((sum, value) => sum + value, 0) / 27;
    expect(Math.abs(report.nll_mean! - mean)).toBeLessThan(2 * bound);
    expect(report.perplexity!).toBeCloseTo(Math.exp(report.nll_mean!), 9);
    expect(Object.keys(report.logits!)).toEqual(["0", "27"]);
    for (const token of [0, 27]) {
      const row = report.logits![token]!;
      expect(row).toHaveLength(config.vocabSize);
      const wanted = logits.subarray(token * config.vocabSize, (token + 1) * config.vocabSize);
      expect(maxAbsDifference(row, wanted)).toBeLessThan(bound);
    }
  });

  test("prints a line a file and one for all, and what it cost to stderr; nothing there with -q", async () => {
    const { code, stdout, stderr, notes } = await runCli([...base, file, other]);
    expect(code).toBe(0);
    const line = (name: string, scored: number, tokens: number, windows: string) =>
      `${name}: perplexity \\d+\\.\\d+ \\(mean NLL \\d+\\.\\d{4}\\), ${scored} of ${tokens} tokens scored in ${windows}\\n`;
    expect(stdout).toMatch(
      new RegExp(
        `^${line(file, 27, 28, "one window")}${line(other, 14, 15, "one window")}` +
          `${line("all 2 files", 41, 43, "2 windows of \\d+")}$`,
      ),
    );
    expect(stdout).toContain(`${file}: perplexity ${report.perplexity!.toPrecision(5)} (mean NLL`);
    expect(withoutNotices(notes)).toMatch(
      /^28 tokens in .*, [\d,.]+ tokens\/s; .* of GPU memory\n15 tokens in .*\n$/,
    );
    expect(stdout + stderr).not.toContain("\x1b");
    expect(stdout + stderr).not.toContain("\r");
    expect(await runCli([...base, file, other, "-q"])).toMatchObject({ stdout, notes: "" });
  });

  test("several files are one array, each as if it were alone", async () => {
    const reports = await scored([...base, other, file, "--token-nll", "--logits", "0"]);
    expect(reports.map((each) => each.file)).toEqual([other, file]);
    const [, second] = reports;
    expect(second!.token_nll).toEqual(report.token_nll!);
    expect(second).toMatchObject({ nll_mean: report.nll_mean, perplexity: report.perplexity, windows: 1 });
    expect(second!.logits).toEqual({ 0: report.logits!["0"]! });
    expect(reports[0]).toMatchObject({ tokens: 15, scored: 14 });
  });

  test("a text may come through a pipe, by - or as ids", async () => {
    const ids = written("ids.json", JSON.stringify(idsOf(TEXT)));
    const args = [...base, "--token-nll", "--logits", "0,27"];
    const wanted = figures(report);
    const piped = await scored(args, { stdin: TEXT });
    expect(figures(piped[0]!)).toEqual({ ...wanted, file: "-" });
    const named = await scored([...args, "-"], { stdin: TEXT });
    expect(figures(named[0]!)).toEqual({ ...wanted, file: "-" });
    const [listed] = await scored([...args, "--ids", ids]);
    expect(figures(listed!)).toEqual({ ...wanted, file: ids });
    expect(listed!.timings["tokenize_ms"]).toBeNull();
    const [listedPipe] = await scored([...args, "--ids", "-"], { stdin: readFileSync(ids) });
    expect(figures(listedPipe!)).toEqual({ ...wanted, file: "-" });
  });

  test("windows begin anew and their first tokens have no likelihood, up to --max-tokens", async () => {
    const [whole] = await scored([...base, long, "--token-nll"]);
    // As long as the model's positions unless said otherwise.
    expect(whole).toMatchObject({ tokens: 140, scored: 137, windows: 3, window: 64 });
    const [cut] = await scored([
      ...base,
      long,
      "--window",
      "28",
      "-n",
      "113",
      "--token-nll",
      "--logits",
      "84",
    ]);
    expect(cut).toMatchObject({ tokens: 113, scored: 108, windows: 5, window: 28 });
    const nll = cut!.token_nll!;
    expect(nll).toHaveLength(113);
    expect(nll.flatMap((value, token) => value === null ? [token] : [])).toEqual([0, 28, 56, 84, 112]);
    // Each window holds the same text.
    for (const first of [0, 28, 56, 84]) {
      expect(nll.slice(first, first + 28)).toEqual(report.token_nll!);
    }
    expect(cut!.nll_mean!).toBeCloseTo(report.nll_mean!, 12);
    expect(cut!.logits).toEqual({ 84: report.logits!["0"]! });
    // A context is a limit to windows, too.
    expect((await scored([...base, long, "-c", "28", "-n", "113", "--token-nll"]))[0]!.token_nll).toEqual(
      nll,
    );
  });

  test("positions beyond the model's are interpolated or repeated on demand, and change what they should", async () => {
    const args = [...base, long, "--token-nll"];
    const [repeated] = await scored([...args, "--positions", "repeat", "--window", "100"]);
    expect(repeated).toMatchObject({ tokens: 140, windows: 2, window: 100 });
    const [exact] = await scored(args);
    // Up to the table's end they are what they were.
    expect(repeated!.token_nll!.slice(0, 64)).toEqual(exact!.token_nll!.slice(0, 64));
    const [interpolated] = await scored([...args, "--positions", "interpolate", "--window", "100"]);
    // The second token follows the first position, which stays; the third does not.
    expect(interpolated!.token_nll![1]).toBe(exact!.token_nll![1]!);
    expect(interpolated!.token_nll![2]).not.toBe(exact!.token_nll![2]!);
    const { parameters, config } = await readReference(model);
    const ids = idsOf(TEXT.repeat(5)).slice(0, 100);
    for (const [mode, report] of [["repeat", repeated], ["interpolate", interpolated]] as const) {
      const positions = { mode, nPositions: 64, context: 100 };
      const { logits } = referenceForward(parameters, config, ids, positions);
      const wanted = nllReference(logits, ids.slice(1), config.vocabSize);
      const got = report!.token_nll!.slice(1, 100) as number[];
      expect(maxAbsDifference(got, wanted)).toBeLessThan(2 * logitTolerance("f32", logits));
    }
    // Without a window it is the whole text.
    expect((await scored([...args, "--positions", "interpolate"]))[0]).toMatchObject({
      windows: 1,
      window: 140,
    });
  });

  test("long windows are reported by position", async () => {
    const dir = writeTinyModel(join(folder.path, "longer"), { config: { nPositions: 3000 } }).dir;
    const { stdout } = await runCli(["score", "-m", dir, written("2150.txt", "x".repeat(2150)), "-q"]);
    const [title, header, ...rows] = stdout.trimEnd().split("\n");
    expect(title).toContain("2,149 of 2,150 tokens scored in one window");
    expect(header!.trim().split(/ {2,}/)).toEqual(["position", "tokens", "perplexity"]);
    expect(rows.map((row) => row.trim().split(/ {2,}/).slice(0, 2))).toEqual([
      ["0 to 1K", "1,023"],
      ["1K to 2K", "1,024"],
      ["2K to 4K", "102"],
    ]);
  });

  denoTest("Deno reports the same figures as Bun", async () => {
    const args = [...base, file, long, "--token-nll", "--logits", "0"];
    const [bun, deno] = [await scored(args), await scored(args, { runtime: "deno" })];
    expect(deno.map(figures)).toEqual(bun.map(figures));
    const text = await runCli([...base, "-q"], { runtime: "deno", stdin: TEXT });
    expect(text).toMatchObject({ code: 0, stdout: expect.stringMatching(/^-: perplexity /), notes: "" });
  });
});

describe("score fails", () => {
  const cases: readonly (readonly [
    name: string,
    args: readonly string[],
    code: number,
    message: RegExp,
    options?: RunOptions,
  ])[] = [
    ["on an empty file", [empty], 1, /nothing to score: the text is empty/],
    ["on an empty pipe", [], 1, /nothing to score: the text is empty/, { stdin: "" }],
    ["on no ids", ["--ids", "-"], 1, /standard input holds no token ids/, { stdin: "[]" }],
    [
      "on a missing file",
      [join(folder.path, "none.txt")],
      1,
      /Cannot read .*none\.txt: there is no such file/,
    ],
    [
      "on a missing second file, before it has scored the first",
      [file, join(folder.path, "none.txt")],
      1,
      /none\.txt/,
    ],
    ["on a folder", [folder.path], 1, /Cannot read .*: it is a folder/],
    [
      "on a byte that is not UTF-8",
      [written("latin1", Uint8Array.of(0x61, 0x62, 0xe9, 0x63))],
      1,
      /latin1 is not UTF-8 text: byte 2 begins/,
    ],
    ["on characters without tokens", [written("naïve", "naïve")], 1, /has no tokens for some characters/],
    ["on an id outside the vocabulary", ["--ids", "-"], 1, /97/, { stdin: "[1, 97]" }],
    [
      "on logits beyond the end",
      [file, "--json", "--logits", "3,28"],
      1,
      /hello\.txt has no token 28, counted from 0/,
    ],
    [
      "on a window beyond the positions",
      [file, "--window", "65"],
      2,
      /64 positions\n\nhint: .*`--positions interpolate`/,
    ],
    [
      "on a context beyond the positions",
      [file, "-c", "65"],
      2,
      /64 positions\n\nhint: .*`--positions interpolate`/,
    ],
    ["on likelihoods that have nowhere to go", [file, "--token-nll"], 2, /`--token-nll`.*add `--json`/],
    [
      "on several files to stretch positions over",
      [file, long, "--positions", "interpolate"],
      2,
      /needs `--window`/,
    ],
  ];
  for (const [name, args, code, message, options] of cases) {
    test(`${name}: exit code ${code}`, async () => {
      expectFailure(await runCli([...base, ...args], options), code, message);
    });
  }

  test("not on a named pipe beside a file: it is opened once, and read to its end", async () => {
    const pipe = join(folder.path, "pipe");
    const script = `mkfifo ${pipe}; printf 'hello world' > ${pipe} & "$@"`;
    const { code, stdout } = await runShell(script, [...base, file, pipe, "--window", "32", "--json"]);
    expect(code).toBe(0);
    expect((JSON.parse(stdout) as Report[]).map(({ tokens }) => tokens)).toEqual([28, 11]);
  });

  test("not with --profile, whose times are each document's own", async () => {
    const [first, second] = await scored([...base, file, file, "--profile", "-q"]) as (Report & {
      profile: ProfileReport;
    })[];
    const calls = ({ profile }: { profile: ProfileReport }) =>
      profile.kernels.map(({ kernel, variant, calls: n }) => `${kernel} ${JSON.stringify(variant)} ${n}`)
        .sort();
    expect(calls(second!)).toEqual(calls(first!));
  });

  test("on a second file: the first one's result is printed, and is whole", async () => {
    const damaged = written("damaged.txt", Buffer.concat([Buffer.from(TEXT), Uint8Array.of(0xff)]));
    for (
      const [bad, message] of [[damaged, /damaged\.txt is not UTF-8 text: byte 28/], [
        empty,
        /empty\.txt holds no text/,
      ]] as const
    ) {
      const { code, stdout, notes } = await runCli([...base, file, bad, other, "--json"]);
      expect(code).toBe(1);
      expect(JSON.parse(stdout)).toMatchObject([{ file, tokens: 28 }]);
      expect(withoutNotices(notes)).toMatch(message);
    }
    const { code, stdout } = await runCli([...base, file, damaged]);
    expect(code).toBe(1);
    expect(stdout).toMatch(/^[^\n]*hello\.txt: perplexity [^\n]*\n$/);
  });

  test("on a byte behind a megabyte of text, and names it", async () => {
    // Words of 64 letters are one token: the megabyte is scored in no time.
    const dir =
      writeTinyModel(join(folder.path, "words"), { config: { vocabSize: END_OF_TEXT + 7, nPositions: 1024 } })
        .dir;
    const path = join(dir, "tokenizer.json");
    const tokenizer = JSON.parse(readFileSync(path, "utf8"));
    for (let i = 0; i < 6; i++) {
      const half = "x".repeat(2 ** i);
      tokenizer.model.vocab[half + half] = END_OF_TEXT + 1 + i;
      tokenizer.model.merges.push(`${half} ${half}`);
    }
    writeFileSync(path, JSON.stringify(tokenizer));
    const line = `${"x".repeat(64)}\n`;
    const bytes = Buffer.from(line.repeat(17_000));
    const bad = written(
      "bad.txt",
      Buffer.concat([bytes.subarray(0, -65), Buffer.from("é", "latin1"), bytes]),
    );
    const at = bytes.length - 65;
    const args = ["score", "-m", dir];
    expectFailure(
      await runCli([...args, bad]),
      1,
      new RegExp(`bad\\.txt is not UTF-8 text: byte ${at} begins`),
    );
    const both = await runCli([...args, written("short.txt", line), bad, "--json"]);
    expect(both.code).toBe(1);
    expect(JSON.parse(both.stdout)).toMatchObject([{ tokens: 2 }]);
    expect(both.notes).toContain(`byte ${at} begins`);
  });
});

describe("score is ended", () => {
  // Of which it would score some thousand windows.
  const endless = written("endless.txt", TEXT.repeat(50_000));

  for (const runtime of ["bun", "deno"] as const) {
    const define = runtime === "deno" ? denoTest : test;
    define(`by SIGINT on ${runtime}: with what is done, and exit code 130`, async () => {
      const args = [...base, file, endless, other, "--json"];
      const { code, stdout, notes } = await runCli(args, { signal: "SIGINT", runtime });
      expect({ code, notes: withoutNotices(notes) }).toEqual({ code: 130, notes: "" });
      expect(JSON.parse(stdout)).toMatchObject([{ file, tokens: 28, scored: 27 }]);
    });
  }

  test("by a reader that has seen enough: quietly", async () => {
    const args = [...base, file, other, "-q"];
    const text = await runShell('{ "$@"; echo "status $?" >&2; } | head -c 5', args);
    expect({ length: text.stdout.length, notes: text.notes }).toEqual({ length: 5, notes: "status 0\n" });
    const json = await runShell('{ "$@" --json; echo "status $?" >&2; } | true', args);
    expect(withoutNotices(json.notes)).toBe("status 0\n");
  });
});
