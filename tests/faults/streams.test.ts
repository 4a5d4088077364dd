/** Readers that go away, streams that are closed, and what fails where nobody waits for it. */
import { afterAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { readFileSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import process from "node:process";
import { temporaryFolder } from "../support/checkpoint.ts";
import {
  deno,
  RUN_TIMEOUT_MS,
  runCli,
  runShell,
  type Runtime,
  runtimes,
  withoutDawn,
  withoutNotices,
  writeTinyModel,
} from "../support/cli.ts";
import { temporariesIn, verdictsIn } from "../support/faults.ts";

setDefaultTimeout(2 * RUN_TIMEOUT_MS);

const folder = temporaryFolder();
afterAll(folder.remove);
const config = { nPositions: 1024 };
const model = writeTinyModel(join(folder.path, "tiny"), { classes: 3, config }).dir;
const text = join(folder.path, "text.txt");
writeFileSync(text, "it was the best of times");
const many = Array<string>(300).fill(text);
const prompts = join(folder.path, "prompts.txt");
writeFileSync(prompts, "hello\n".repeat(300));

describe("a reader that goes away", () => {
  const commands: readonly (readonly [name: string, args: readonly string[], first: RegExp])[] = [
    ["generate --prompts", ["--prompts", prompts, "-n", "5"], /^\{"line":1,/],
    ["score", many, /^\S+text\.txt: perplexity /],
    ["score --json", [...many, "--json"], /^\[\n/],
    ["classify --json", [...many, "--json"], /^\[\n/],
  ];
  for (const [name, args, first] of commands) {
    test(`of ${name}: a quiet end with exit code 0`, async () => {
      const [command = "", ...flags] = name.split(" ");
      const all = [command, "-m", model, ...flags.filter((flag) => !args.includes(flag)), ...args];
      const { stdout, notes } = await runShell('{ "$@"; echo "status $?" >&2; } | head -c 80', [
        ...all,
        "-q",
      ]);
      expect(stdout).toMatch(first);
      expect(notes).toBe("status 0\n");
    });
  }

  test("before anything is written, of bench and of inspect: a quiet end with exit code 0", async () => {
    const bench = ["bench", "--runs", "1", "--phases", "gemm", "--contexts", "64", "-m", model, "-q"];
    for (const args of [bench, ["inspect", model], ["inspect", model, "--json"]]) {
      const { notes } = await runShell('{ "$@"; echo "status $?" >&2; } | true', args);
      expect(notes).toBe("status 0\n");
    }
  });
});

describe("a stream that is closed", () => {
  for (const runtime of runtimes) {
    test(`stderr, on ${runtime}: is no failure, and notes get into no file`, async () => {
      const out = join(folder.path, `out-${runtime}.jsonl`);
      const args = ["classify", "-m", model, text, text, "--out", out, "-v"];
      const { stdout } = await runShell('"$@" 2>&-; echo "status $?"', args, { runtime });
      expect(stdout).toBe("status 0\n");
      expect(verdictsIn(readFileSync(out, "utf8"))).toHaveLength(2);
    });

    test(`stdin, on ${runtime}: is an empty one`, async () => {
      const result = await runShell('"$@" <&-', ["generate", "-m", model, "-n", "1"], { runtime });
      expect(result.code).toBe(1);
      expect(withoutNotices(result.notes)).toMatch(/^error: .*standard input[^\n]*\n/);
    });
  }
});

describe("what fails where nobody waits for it", () => {
  const fail = join(import.meta.dir, "../support/fail_unawaited.ts");
  const main = join(import.meta.dir, "../../main.ts");
  // Not a module to preload: on Deno such a one ends before the program begins.
  const script = join(folder.path, "failing.ts");
  writeFileSync(script, `import ${JSON.stringify(fail)};\nawait import(${JSON.stringify(main)});\n`);
  const path = join(folder.path, "prefix.session");
  const args = ["generate", "-m", model, "-n", "900", "--ignore-eos", "-q", "hello", "--session", path];

  async function failing(runtime: Runtime, how: string, flags: readonly string[] = []) {
    const runs = runtime === "bun" ? [process.execPath] : [deno!, "run", "-q", "-A", "--config", "deno.json"];
    const child = Bun.spawn([...runs, script, ...args, ...flags], {
      cwd: dirname(main),
      env: { ...process.env, FAIL: how },
      stdin: "ignore",
      stdout: "ignore",
      stderr: "pipe",
    });
    return { notes: withoutDawn(await new Response(child.stderr).text()), code: await child.exited };
  }

  for (const runtime of runtimes) {
    test(`an error of that kind, on ${runtime}: exit code 1, one sentence, no stack, no temporary file`, async () => {
      for (const how of ["throw", "reject"]) {
        expect(await failing(runtime, how)).toEqual({
          code: 1,
          notes: "error: on purpose\n\nhint: this is a bug in longform; `-v` shows where it happened\n",
        });
        expect(temporariesIn(folder.path)).toEqual([]);
      }
      const { notes } = await failing(runtime, "throw", ["-v"]);
      expect(notes).toMatch(/\n\nError: on purpose\n +at .*fail_unawaited\.ts/);
    });
  }

  test("a thread that ends by itself: exit code 1, one sentence, and complete lines", async () => {
    const stdin = Array.from({ length: 2000 }, (_, id) => JSON.stringify({ id, text: `text ${id}` }) + "\n")
      .join("");
    const args = ["classify", "-m", model, "--jsonl", "--workers", "1", "-q"];
    const preload = join(import.meta.dir, "../support/end_threads.ts");
    const { code, stdout, notes } = await runCli(args, { preload, stdin });
    expect(code).toBe(1);
    expect(notes).toMatch(
      /^error: A thread that encodes text has ended: [^\n]+\n\nhint: the machine may be short of memory/,
    );
    expect(verdictsIn(stdout)).toMatchObject(verdictsIn(stdout).map((_, id) => ({ id })));
  });
});
