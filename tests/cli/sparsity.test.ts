/** `--sparsity` as users run it. Tiny models, for software Vulkan's sake. */
import { afterAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { PATTERN_GRAMMAR } from "../../src/kvcache/patterns.ts";
import { temporaryFolder } from "../support/checkpoint.ts";
import {
  denoTest,
  expectFailure,
  RUN_TIMEOUT_MS,
  runCli,
  type RunOptions,
  withoutNotices,
  writeTinyModel,
} from "../support/cli.ts";

setDefaultTimeout(2 * RUN_TIMEOUT_MS);

const folder = temporaryFolder();
afterAll(folder.remove);
const model = writeTinyModel(join(folder.path, "tiny"), { config: { nPositions: 700 } }).dir;
const run = ["-m", model, "--dtype", "f32"];

function written(name: string, content: string): string {
  const path = join(folder.path, name);
  writeFileSync(path, content);
  return path;
}

/** 560 tokens, nine blocks. */
const text = written("text.txt", "hello world, this is a text\n".repeat(20));
const generate = ["generate", ...run, "-f", text, "-n", "8", "--temperature", "0", "--ignore-eos"];
const score = ["score", ...run, text];

async function json<T>(args: readonly string[], options?: RunOptions): Promise<T> {
  const { code, stdout, notes } = await runCli([...args, "--json"], options);
  expect({ code, notes: withoutNotices(notes) }).toEqual({ code: 0, notes: "" });
  return JSON.parse(stdout);
}

interface Generated {
  readonly tokens: number[];
  readonly sparsity?: { pattern: string; density: number };
}

interface Compared {
  readonly dense_nll_mean: number;
  readonly dense_perplexity: number;
  readonly kl_mean: number;
  readonly top1_agreement: number;
}

interface Scored {
  readonly nll_mean: number;
  readonly sparsity?: { pattern: string; density: number };
  readonly compared?: Compared;
  readonly by_position: { nll_mean: number; compared?: Compared }[];
}

/** Of nine blocks a side: what a window of two blocks and the first keep. */
const DENSITY = (1 + 2 + 7 * 3) / 45;

describe("--sparsity", () => {
  test("generates with a pattern, says what it keeps, and a pattern that keeps all changes nothing", async () => {
    const dense = await json<Generated>(generate);
    expect(dense.sparsity).toBeUndefined();
    const all = await json<Generated>([...generate, "--sparsity", "local:1k"]);
    expect(all.tokens).toEqual(dense.tokens);
    expect(all.sparsity).toEqual({ pattern: "local:1024", density: 1 });
    const args = [...generate, "--sparsity", "sink:1+local:100"];
    const sparse = await json<Generated>(args);
    expect(sparse.sparsity!.pattern).toBe("sink:1+local:100");
    expect(sparse.sparsity!.density).toBeCloseTo(DENSITY, 12);
    const { notes } = await runCli(args);
    expect(notes).toMatch(
      /note: attention sink:1\+local:100 keeps 53\.3 % of the causal blocks of 64 x 64 in 576/,
    );
  });

  test("decodes with topk, which is dense below its least context", async () => {
    const dense = await json<Generated>(generate);
    const topk = await json<Generated>([...generate, "--sparsity", "topk:256"]);
    expect(topk.tokens).toEqual(dense.tokens);
    expect(topk.sparsity).toEqual({ pattern: "topk:256", density: 1 });
  });

  test("generates from many prompts with a pattern", async () => {
    const prompts = written("prompts.txt", `hello\n${"a longer line ".repeat(30)}\n`);
    const args = ["generate", ...run, "--prompts", prompts, "-n", "5", "--temperature", "0", "--ignore-eos"];
    interface Many {
      readonly results: { tokens: number[] }[];
      readonly sparsity?: object;
    }
    const dense = await json<Many>(args);
    const sparse = await json<Many>([...args, "--sparsity", "local:512"]);
    expect(sparse.results.map(({ tokens }) => tokens)).toEqual(dense.results.map(({ tokens }) => tokens));
    expect(sparse.sparsity).toEqual({ pattern: "local:512", density: 1 });
  });

  test("scores with a mask file, and compares with dense attention", async () => {
    const [dense] = await json<[Scored]>(score);
    const rows = Array.from(
      { length: 9 },
      (_, row) => row < 2 ? [0, row].slice(0, row + 1) : [0, row - 1, row],
    );
    const mask = written("mask.json", JSON.stringify({ rows }));
    const [same] = await json<[Scored]>([...score, "--sparsity", `file:${mask}`]);
    const [compared] = await json<[Scored]>([
      ...score,
      ...["--sparsity", "sink:64+local:128", "--compare", "dense"],
    ]);
    expect(same.sparsity!.density).toBeCloseTo(DENSITY, 12);
    // The mask is that pattern, block by block.
    expect(same.nll_mean).toBe(compared.nll_mean);
    const { compared: other } = compared;
    expect(other!.dense_nll_mean).toBeCloseTo(dense.nll_mean, 6);
    expect(other!.dense_perplexity).toBeCloseTo(Math.exp(dense.nll_mean), 5);
    expect(other!.kl_mean).toBeGreaterThan(0);
    expect(other!.top1_agreement).toBeGreaterThan(0);
    expect(other!.top1_agreement).toBeLessThanOrEqual(1);
    expect(compared.by_position).toHaveLength(1);
    expect(compared.by_position[0]!.compared).toEqual(other!);
  });

  test("prints the comparison as text", async () => {
    const args = [...score, "--sparsity", "local:1k", "--compare", "dense", "-q"];
    const { code, stdout } = await runCli(args);
    expect(code).toBe(0);
    expect(stdout).toMatch(/KL divergence from it 0\.0000 nats, the same token likeliest for 100\.0 %\n$/);
  });

  test("a malformed pattern shows the grammar", async () => {
    for (
      const pattern of ["window:64", "local", "local:63", "sink:64", "strided:64", "topk:9", "Dense", ""]
    ) {
      const result = await runCli([...generate, "--sparsity", pattern]);
      expectFailure(result, 2, /error: The attention pattern `/);
      expect(result.notes).toContain(PATTERN_GRAMMAR);
    }
  });

  test("a mask file that is none, or not for this run, is an error that names the place", async () => {
    const cases: [content: string, message: RegExp][] = [
      ["[[0]", /mask\.json is not valid JSON/],
      ["[[0]]", /mask\.json is an array, not an object/],
      [
        `{"rows": [[0], [1, 2]]}`,
        /rows\[1\] has block 2, which is behind its own: query block 1 sees blocks 0 to 1/,
      ],
      [`{"rows": [[0], [-1]]}`, /rows\[1\] has block -1/],
      [`{"rows": [[0], [0, 1]]}`, /covers 128 tokens, and 576 are needed/],
      [`{"masks": [{"layers": [7], "pattern": "local:64"}]}`, /masks\[0\]\.layers names layer 7/],
      [`{"masks": [{"heads": [0], "pattern": "topk:512"}]}`, /has no blocks before decoding/],
    ];
    for (const [content, message] of cases) {
      const path = written("mask.json", content);
      expectFailure(await runCli([...generate, "--sparsity", `file:${path}`]), 1, message);
    }
    const missing = join(folder.path, "none.json");
    expectFailure(
      await runCli([...generate, "--sparsity", `file:${missing}`]),
      1,
      /none\.json cannot be read/,
    );
  });

  test("a session belongs to the attention that it was saved with", async () => {
    const session = join(folder.path, "prefix.session");
    const sparse = [...generate, "--session", session, "--sparsity", "local:128"];
    const saved = await json<Generated>(sparse);
    expect((await json<Generated>(sparse)).tokens).toEqual(saved.tokens);
    expectFailure(
      await runCli([...generate, "--session", session]),
      1,
      /was saved with the attention "local:128", this run has "dense"\n\nhint: use the `--sparsity`/,
    );
  });

  test("bench measures patterns, and random blocks where none is given", async () => {
    const bench = ["bench", ...run, "--runs", "1", "--contexts", "256"];
    interface Report {
      readonly rows: {
        phase: string;
        variant: string;
        density?: number;
        checked_against?: string;
        error?: string;
      }[];
    }
    const sweep = await json<Report>([...bench, "--phases", "attention", "--attention", "sparse"]);
    expect(sweep.rows.map(({ variant }) => variant)).toEqual(
      ["100", "50", "25", "12.5", "6.25", "3.3"].map((share) => `random ${share} %`),
    );
    expect(sweep.rows.map(({ density }) => density)).toEqual(
      [...sweep.rows.map((row) => row.density!)].sort((a, b) => b - a),
    );
    for (const row of sweep.rows) {
      expect([row.checked_against, row.error]).toEqual(["flash_attention/sparse_tiled", undefined]);
    }
    const patterns = await json<Report>([
      ...bench,
      ...["--phases", "attention,prefill,decode", "--attention", "flash,sparse"],
      ...["--sparsity", "local:128", "--sparsity", "dense"],
    ]);
    expect(patterns.rows.map(({ phase, variant }) => `${phase} ${variant}`)).toEqual([
      ...["attention flash", "attention local:128"],
      ...["prefill local:128", "prefill flash", "decode local:128", "decode flash"],
    ]);
    expect(patterns.rows.map(({ density }) => density)).toEqual([
      undefined,
      0.7,
      0.7,
      undefined,
      0.5,
      undefined,
    ]);
  });

  denoTest("works on Deno", async () => {
    const args = [...generate, "--sparsity", "sink:64+local:128"];
    expect((await json<Generated>(args, { runtime: "deno" })).tokens).toEqual(
      (await json<Generated>(args)).tokens,
    );
    const rows = Array.from({ length: 9 }, (_, row) => [row]);
    const mask = written("deno.json", JSON.stringify({ rows }));
    const [scored] = await json<[Scored]>(
      [...score, "--sparsity", `file:${mask}`, "--compare", "dense"],
      { runtime: "deno" },
    );
    expect(scored.sparsity!.density).toBeCloseTo(9 / 45, 12);
    expect(scored.compared!.kl_mean).toBeGreaterThan(0);
  });
});
