/** Runs the real command line in a process of its own, on Bun or on Deno, with pipes for all three streams. */
import { expect, test } from "bun:test";
import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { type TinyCheckpoint, type TinyOptions, writeTinyCheckpoint } from "./checkpoint.ts";

export type Runtime = "bun" | "deno";

export interface RunOptions {
  /** Bun unless given. */
  readonly runtime?: Runtime;
  /** A file of scripts/compile.ts to run in place of main.ts. */
  readonly executable?: string | undefined;
  /** What comes through standard input, which is a pipe then; nothing unless given, as from /dev/null. */
  readonly stdin?: string | Uint8Array;
  /** Changes to the environment; undefined removes a variable. */
  readonly env?: Readonly<Record<string, string | undefined>>;
  /** The process is killed after this many milliseconds, and the run fails. */
  readonly timeout?: number;
  /** A module for Bun to run before the program. */
  readonly preload?: string;
  readonly cwd?: string;
  /** Sent once stdout has brought something. */
  readonly signal?: NodeJS.Signals;
}

export interface RunResult {
  /** 128 plus the signal's number when it was killed by one. */
  readonly code: number;
  readonly signal: string | null;
  readonly stdout: string;
  readonly stderr: string;
  /** stderr without what Dawn's native code prints there on its own. */
  readonly notes: string;
}

const ROOT = join(import.meta.dir, "../..");
const MAIN = join(ROOT, "main.ts");
/** Software Vulkan compiles its pipelines in each process, for seconds on a busy machine. */
export const RUN_TIMEOUT_MS = 60_000;

/** The Deno to test with: the one on PATH, or the one that `./longform` installed. */
export const deno: string | null = Bun.which("deno") ?? Bun.which(join(ROOT, ".toolchain/deno"));

/** The runtimes that are here. */
export const runtimes: readonly Runtime[] = deno ? ["bun", "deno"] : ["bun"];

/** A test that needs Deno; without one it is skipped, and its name says why. */
export function denoTest(name: string, run: () => Promise<void>): void {
  if (deno) test(name, run, RUN_TIMEOUT_MS);
  else test.skip(`${name}: needs deno on PATH or in .toolchain`, run);
}

/** The command that runs the program, as the launcher writes it. */
export function cliCommand({ runtime = "bun", executable, preload }: RunOptions = {}): string[] {
  if (executable !== undefined) return [executable];
  if (runtime === "bun") return [process.execPath, ...preload ? ["--preload", preload] : [], MAIN];
  return [deno!, "run", "-q", "-P", "--config", join(ROOT, "deno.json"), MAIN];
}

/** Runs `longform ARGS`. @throws if it does not end in time */
export async function runCli(args: readonly string[], options: RunOptions = {}): Promise<RunResult> {
  return await runProcess([...cliCommand(options), ...args], options);
}

/** Runs a line of POSIX shell in which `"$@"` is `longform ARGS`. */
export async function runShell(script: string, args: readonly string[], options: RunOptions = {}) {
  return await runProcess(["sh", "-c", script, "sh", ...cliCommand(options), ...args], options);
}

async function runProcess(command: readonly string[], options: RunOptions): Promise<RunResult> {
  const { stdin, env = {}, timeout = RUN_TIMEOUT_MS, cwd, signal } = options;
  // What decides about colour has to be the pipes.
  const environment = { ...process.env, NO_COLOR: undefined, FORCE_COLOR: undefined, ...env };
  const child = Bun.spawn([...command], {
    ...cwd && { cwd },
    stdin: stdin === undefined ? "ignore" : Buffer.from(stdin),
    stdout: "pipe",
    stderr: "pipe",
    env: environment,
    timeout,
    killSignal: "SIGKILL",
  });
  const stdout = (async () => {
    const decoder = new TextDecoder();
    let text = "";
    for await (const chunk of child.stdout) {
      if (signal && text === "") child.kill(signal);
      text += decoder.decode(chunk, { stream: true });
    }
    return text + decoder.decode();
  })();
  const [out, stderr, code] = await Promise.all([stdout, new Response(child.stderr).text(), child.exited]);
  if (child.signalCode === "SIGKILL") {
    throw new Error(`${command.join(" ")} did not end within ${timeout} ms; stderr:\n${stderr}`);
  }
  const killedBy = child.signalCode === null ? null : String(child.signalCode);
  return { code, signal: killedBy, stdout: out, stderr, notes: withoutDawn(stderr) };
}

/** Dawn logs its own warnings, some with the place in its source and an empty line behind it. */
export function withoutDawn(stderr: string): string {
  return stderr.replace(/^Warning: .*\n(?:(?: {4}at .*\n)+\n)?/gm, "");
}

/** Leaves out the notices that depend on the machine: no GPU, or one that Vulkan does not show. */
export function withoutNotices(notes: string): string {
  return notes.replace(/^note: .*\n/gm, "");
}

/** Asserts a failure as users should see every one: the exit code, no output, one sentence, perhaps a hint. */
export function expectFailure(result: RunResult, code: number, message: RegExp): void {
  expect(withoutNotices(result.notes)).toMatch(/^error: [^\n]+[^\n.]\n(?:\nhint: [^\n]+\n)?$/);
  expect(result.notes).toMatch(message);
  expect(result.notes).not.toContain("this is a bug");
  expect(result.stdout).toBe("");
  expect(result.code).toBe(code);
}

/** Printable ASCII and the newline, one token each, then `<|endoftext|>`: every text it generates can be shown. */
const CHARACTERS = [...Array.from({ length: 95 }, (_, i) => String.fromCharCode(0x20 + i)), "\n"];
export const END_OF_TEXT = CHARACTERS.length;

/** A tiny checkpoint (64 positions) with a tokenizer that knows ASCII, character by character. */
export function writeTinyModel(dir: string, options: TinyOptions = {}): TinyCheckpoint {
  const config = { vocabSize: END_OF_TEXT + 1, nPositions: 64, eosTokenId: [END_OF_TEXT], ...options.config };
  const checkpoint = writeTinyCheckpoint(dir, { ...options, config });
  writeTinyTokenizer(dir);
  return checkpoint;
}

function writeTinyTokenizer(dir: string): void {
  // Byte-level BPE spells the space and the newline as these.
  const spelled = (char: string) => char === " " ? "Ġ" : char === "\n" ? "Ċ" : char;
  const tokenizer = {
    version: "1.0",
    added_tokens: [{ id: END_OF_TEXT, content: "<|endoftext|>", special: true }],
    pre_tokenizer: { type: "ByteLevel", add_prefix_space: false, trim_offsets: true, use_regex: true },
    decoder: { type: "ByteLevel" },
    model: {
      type: "BPE",
      vocab: Object.fromEntries(CHARACTERS.map((char, id) => [spelled(char), id])),
      merges: [],
    },
  };
  mkdirSync(dir, { recursive: true });
  writeFileSync(join(dir, "tokenizer.json"), JSON.stringify(tokenizer));
}
