/**
 * SIGINT, SIGTERM and SIGHUP at any moment of any command, also in the middle of a file: the exit code says which it was,
 * files are whole or absent, and --out is resumed to what an undisturbed run gives. The moments are drawn from seeds; the
 * variable FAULT_SIGNALS says how many of each signal are sent, three when it is not set.
 */
import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { existsSync, mkdirSync, readdirSync, readFileSync, utimesSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { openSession } from "../../src/model/session.ts";
import { temporaryFolder } from "../support/checkpoint.ts";
import {
  cliCommand,
  RUN_TIMEOUT_MS,
  runCli,
  runShell,
  type Runtime,
  runtimes,
  withoutNotices,
  writeTinyModel,
} from "../support/cli.ts";
import { temporariesIn, verdictsIn } from "../support/faults.ts";
import { uniformArray } from "../support/random.ts";

setDefaultTimeout(100 * RUN_TIMEOUT_MS);

const EXIT_CODES = { SIGHUP: 129, SIGINT: 130, SIGTERM: 143 } as const;
type EndingSignal = keyof typeof EXIT_CODES;

/** What a run can take to end after a signal: one step of the GPU, and a machine that is busy. */
const SOON_MS = 10_000;

const folder = temporaryFolder();
afterAll(folder.remove);
const config = { nPositions: 16_384 };
const model = writeTinyModel(join(folder.path, "tiny"), { classes: 3, config }).dir;
const PROMPT = "it was the best of times ".repeat(40);
const text = written("text.txt", PROMPT);
const records = written(
  "records.jsonl",
  Array.from({ length: 100 }, (_, id) => JSON.stringify({ id, text: `${id} ${PROMPT.slice(0, 150)}` }) + "\n")
    .join(""),
);
let folders = 0;

function written(name: string, content: string): string {
  const path = join(folder.path, name);
  writeFileSync(path, content);
  return path;
}

function newFolder(): string {
  const path = join(folder.path, String(folders++));
  mkdirSync(path);
  return path;
}

/** A command that works on until it is ended, the files that it writes, and what they must be. */
interface Case {
  readonly args: (dir: string) => readonly string[];
  readonly check: (dir: string, stdout: string) => Promise<void> | void;
}

async function expectSession(path: string): Promise<void> {
  const session = await openSession(path);
  if (!session) return;
  expect(session.tokens).toBe(PROMPT.length);
  await session.logits();
  await session.close();
}

function expectJson(path: string): void {
  if (existsSync(path)) JSON.parse(readFileSync(path, "utf8"));
}

let verdicts: readonly object[] = [];

const CASES: Readonly<Record<string, Case>> = {
  "generate --session --trace": {
    args: (dir) => [
      ...["generate", "-m", model, "-n", "300", "--ignore-eos", "-f", text],
      ...["--session", join(dir, "prefix.session"), "--trace", join(dir, "trace.json")],
    ],
    async check(dir) {
      await expectSession(join(dir, "prefix.session"));
      expectJson(join(dir, "trace.json"));
    },
  },
  "classify --out": {
    args: (
      dir,
    ) => ["classify", "-m", model, "--jsonl", records, "--batch", "2", "--out", join(dir, "out.jsonl")],
    check(dir) {
      const path = join(dir, "out.jsonl");
      const found = existsSync(path) ? verdictsIn(readFileSync(path, "utf8")) : [];
      expect(found).toEqual(verdicts.slice(0, found.length));
    },
  },
  "score --json": {
    args: () => ["score", "-m", model, ...Array<string>(100).fill(text), "--json"],
    check(_, stdout) {
      if (stdout !== "") expect(JSON.parse(stdout)).toBeArray();
    },
  },
  "bench --report": {
    args: (dir) => [
      ...["bench", "-m", model, "--contexts", "64", "--runs", "2", "--phases", "attention", "--report"],
      join(dir, "report"),
    ],
    check(dir) {
      const report = join(dir, "report");
      if (!existsSync(report)) return;
      expect(temporariesIn(report)).toEqual([]);
      expectJson(join(report, "report.json"));
      const page = join(report, "report.html");
      if (existsSync(page)) expect(readFileSync(page, "utf8")).toEndWith("</html>\n");
    },
  },
};

beforeAll(async () => {
  verdicts = verdictsIn((await runCli(["classify", "-m", model, "--jsonl", records])).stdout);
  expect(verdicts).toHaveLength(100);
});

/** Sends a signal after so many milliseconds. @returns whether the run had not ended before, and all that it left */
async function interrupted(
  name: string,
  signal: EndingSignal,
  ms: number,
  runtime: Runtime,
): Promise<{ readonly wasInTime: boolean; readonly dir: string }> {
  const { args, check } = CASES[name]!;
  const dir = newFolder();
  const child = Bun.spawn([...cliCommand({ runtime }), ...args(dir)], {
    stdin: "ignore",
    stdout: "pipe",
    stderr: "pipe",
    env: { ...process.env, NO_COLOR: undefined, FORCE_COLOR: undefined },
    timeout: RUN_TIMEOUT_MS,
    killSignal: "SIGKILL",
  });
  const output = Promise.all([new Response(child.stdout).text(), new Response(child.stderr).text()]);
  await Bun.sleep(ms);
  const wasInTime = child.exitCode === null;
  const sent = performance.now();
  child.kill(signal);
  const [stdout, stderr] = await output;
  const code = await child.exited;
  const moment = { name, signal, ms: Math.round(ms), runtime };
  // A run that had done its work when the signal came ends as it would have.
  expect({ ...moment, code: code === 0 ? EXIT_CODES[signal] : code }).toEqual({
    ...moment,
    code: EXIT_CODES[signal],
  });
  expect({ ...moment, isSoon: performance.now() - sent < SOON_MS }).toEqual({ ...moment, isSoon: true });
  expect({ ...moment, stderr }).toEqual({ ...moment, stderr: expect.not.stringContaining("error") });
  expect({ ...moment, left: temporariesIn(dir) }).toEqual({ ...moment, left: [] });
  await check(dir, stdout);
  return { wasInTime: wasInTime && code !== 0, dir };
}

describe("at a random moment", () => {
  const count = Number(process.env["FAULT_SIGNALS"] ?? 3);
  for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) {
    test(`${signal} ends a command with its exit code, and leaves nothing half-written`, async () => {
      const moments = uniformArray(EXIT_CODES[signal], count, 0, 1500);
      const names = Object.keys(CASES);
      let inTime = 0;
      for (const [i, ms] of moments.entries()) {
        // Deno does not see whether a hangup is to be ignored, and leaves it to the system.
        const runtime = signal === "SIGHUP" ? "bun" : runtimes[i >> 2 & 1] ?? "bun";
        const { wasInTime, dir } = await interrupted(
          names[(EXIT_CODES[signal] + i) % names.length]!,
          signal,
          ms,
          runtime,
        );
        if (wasInTime) inTime++;
        const out = join(dir, "out.jsonl");
        if (!existsSync(out)) continue;
        const resumed = ["classify", "-m", model, "--jsonl", records, "--out", out, "--resume", "-q"];
        expect((await runCli(resumed)).code).toBe(0);
        expect(verdictsIn(readFileSync(out, "utf8"))).toEqual([...verdicts]);
      }
      if (count > 3) console.error(`${signal}: ${count} sent, ${inTime} before the end of the run`);
      expect(inTime).toBeGreaterThan(0);
    });
  }
});

describe("in the middle of a file", () => {
  const preload = join(import.meta.dir, "../support/at_file_call.ts");
  for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) {
    test(`${signal} while a session is saved: no session, no temporary file`, async () => {
      const dir = newFolder();
      const args = ["generate", "-m", model, "-n", "3", PROMPT, "--session", join(dir, "prefix.session")];
      const { code, stdout, notes } = await runCli(args, { preload, env: { AT_WRITE: "3", SEND: signal } });
      expect({ code, stdout }).toEqual({ code: EXIT_CODES[signal], stdout: "" });
      expect(withoutNotices(notes)).toMatch(/^prompt 1000 tokens, .*; finished: interrupt\n$/);
      expect(readdirSync(dir)).toEqual([]);
    });
  }

  test("SIGTERM while a trace is written behind the work: the one before stays, no temporary file", async () => {
    const dir = newFolder();
    const trace = join(dir, "trace.json");
    writeFileSync(trace, "before");
    const args = ["generate", "-m", model, "-n", "2", "hello", "--ignore-eos", "-q", "--trace", trace];
    const { code, stdout } = await runCli(args, { preload, env: { AT_WRITE: "1", SEND: "SIGTERM" } });
    expect({ code, length: stdout.length }).toEqual({ code: 143, length: 3 });
    expect(readdirSync(dir)).toEqual(["trace.json"]);
    expect(readFileSync(trace, "utf8")).toBe("before");
  });

  test("SIGKILL while a session is saved: no session; its temporary file goes a day later", async () => {
    const dir = newFolder();
    const path = join(dir, "prefix.session");
    const args = ["generate", "-m", model, "-n", "0", PROMPT, "-q", "--session", path];
    const killed = ["sh", "-c", '"$@"; exit $?', "sh", ...cliCommand({ preload }), ...args];
    const child = Bun.spawn(killed, {
      env: { ...process.env, AT_WRITE: "3", SEND: "SIGKILL" },
      stdout: "ignore",
      stderr: "ignore",
    });
    expect(await child.exited).toBe(137);
    const [left] = temporariesIn(dir);
    expect(readdirSync(dir)).toEqual([left!]);
    // It may be another's that is still at work.
    expect((await runCli(args)).code).toBe(0);
    await expectSession(path);
    expect(temporariesIn(dir)).toEqual([left!]);
    const yesterday = Date.now() / 1000 - 25 * 60 * 60;
    utimesSync(join(dir, left!), yesterday, yesterday);
    writeFileSync(join(dir, ".longform-mine.tmp"), "");
    utimesSync(join(dir, ".longform-mine.tmp"), yesterday, yesterday);
    expect((await runCli([...args, "--trace", join(dir, "trace.json")])).code).toBe(0);
    expect(temporariesIn(dir)).toEqual([".longform-mine.tmp"]);
  });
});

describe("a run that works on", () => {
  test("a second signal ends it at once, without the timings", async () => {
    const args = ["generate", "-m", model, "-n", "16000", "--ignore-eos", "hello"];
    const child = Bun.spawn([...cliCommand(), ...args], { stdin: "ignore", stdout: "pipe", stderr: "pipe" });
    await child.stdout.getReader().read();
    child.kill("SIGINT");
    child.kill("SIGTERM");
    expect(await new Response(child.stderr).text()).not.toContain("finished");
    expect([130, 143]).toContain(await child.exited);
  });

  test.skipIf(process.platform !== "linux")("nohup keeps a hangup from ending it", async () => {
    const script = '{ nohup "$@" & } ; pid=$!; sleep 0.7; kill -HUP $pid; wait $pid; echo "status $?"';
    const args = ["generate", "-m", model, "-n", "1500", "--ignore-eos", "-q", "--seed", "1", "hello"];
    const { stdout } = await runShell(script, args);
    expect(stdout).toEndWith("status 0\n");
    expect(stdout.length).toBeGreaterThan(1500);
  });
});
