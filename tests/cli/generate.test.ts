/** `generate` as users run it: a process, pipes, exit codes. Tiny models, for software Vulkan's sake. */
import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { temporaryFolder } from "../support/checkpoint.ts";
import {
  cliCommand,
  denoTest,
  RUN_TIMEOUT_MS,
  runCli,
  type RunResult,
  runShell,
  runtimes,
  withoutNotices,
  writeTinyModel,
} from "../support/cli.ts";

setDefaultTimeout(2 * RUN_TIMEOUT_MS);

/** What `--json` prints, as the documentation has it. */
interface Report {
  readonly text: string;
  readonly prompt_tokens: number;
  readonly tokens: number[];
  readonly finish_reason: string;
  readonly seed: number;
  readonly logprobs?: {
    id: number;
    token: string;
    logprob: number;
    top: { id: number; logprob: number }[];
  }[];
  readonly timings: Record<string, number | null>;
  readonly memory: Record<string, number>;
}

const folder = temporaryFolder();
afterAll(folder.remove);
const model = writeTinyModel(join(folder.path, "tiny")).dir;
const base = ["generate", "-m", model, "-n", "12", "--seed", "5"];

async function generated(args: readonly string[], options?: Parameters<typeof runCli>[1]): Promise<Report> {
  const result = await runCli([...args, "--json"], options);
  expect(result).toMatchObject({ code: 0, notes: expect.not.stringContaining("error") });
  return JSON.parse(result.stdout);
}

function written(name: string, content: string | Uint8Array): string {
  const path = join(folder.path, name);
  writeFileSync(path, content);
  return path;
}

const TIMINGS =
  /^prompt 5 tokens, [\d,.]+ tokens\/s; generated (\d+), .* of GPU memory; seed \d+; finished: (\w+)\n$/;

describe("generate", () => {
  let report: Report;
  beforeAll(async () => {
    report = await generated([...base, "hello", "--dtype", "f32"]);
  });

  test("--json has the documented keys, with sane numbers", () => {
    expect(Object.keys(report).sort()).toEqual(
      ["finish_reason", "memory", "prompt_tokens", "seed", "text", "timings", "tokens"],
    );
    expect(report).toMatchObject({ prompt_tokens: 5, finish_reason: "length", seed: 5 });
    expect(report.tokens).toHaveLength(12);
    expect(report.text).toHaveLength(12);
    expect(Object.keys(report.timings)).toEqual([
      "load_ms",
      "tokenize_ms",
      "first_token_ms",
      "prefill_ms",
      "prefill_tokens_per_s",
      "decode_ms",
      "decode_tokens_per_s",
    ]);
    for (const value of Object.values(report.timings)) {
      expect(value).toBeGreaterThan(0);
      expect(value).toBeLessThan(1e6);
    }
    const { load_ms, first_token_ms, prefill_ms, prefill_tokens_per_s } = report.timings;
    expect(first_token_ms!).toBeGreaterThan(load_ms! + prefill_ms!);
    expect(prefill_tokens_per_s!).toBeCloseTo(5000 / prefill_ms!, 6);
    const { peak_bytes, weights_bytes, kv_bytes, activations_bytes, bytes_per_token, planned_bytes } = report
      .memory as Record<
        | "peak_bytes"
        | "weights_bytes"
        | "kv_bytes"
        | "activations_bytes"
        | "bytes_per_token"
        | "planned_bytes",
        number
      >;
    expect(Object.keys(report.memory)).toHaveLength(6);
    expect(peak_bytes).toBe(planned_bytes);
    expect(bytes_per_token).toBe(2 * 2 * 8 * 4); // K and V, layers, width, f32
    expect(kv_bytes).toBeGreaterThanOrEqual((5 + 12) * bytes_per_token);
    expect(weights_bytes).toBeGreaterThanOrEqual(4 * 97 * 8);
    expect(peak_bytes).toBeGreaterThanOrEqual(weights_bytes + kv_bytes + activations_bytes);
  });

  test("streams the text of --json, and the timings go to stderr", async () => {
    const { code, stdout, stderr, notes } = await runCli([...base, "hello"]);
    expect(stdout).toBe(`${report.text}\n`);
    expect(withoutNotices(notes)).toMatch(TIMINGS);
    expect(stdout + stderr).not.toContain("\x1b");
    expect(stdout + stderr).not.toContain("\r");
    expect(code).toBe(0);
  });

  test("another seed gives another text, a random one is reported and repeats", async () => {
    expect((await generated([...base, "hello", "--seed", "6"])).text).not.toBe(report.text);
    const random = await generated(["generate", "-m", model, "-n", "12", "hello"]);
    const again = await generated([...base, "hello", "--seed", String(random.seed)]);
    expect(again.text).toBe(random.text);
  });

  test("-q leaves nothing on stderr but Dawn's own warnings", async () => {
    const { stdout, notes } = await runCli([...base, "hello", "-q"]);
    expect({ stdout, notes }).toEqual({ stdout: `${report.text}\n`, notes: "" });
  });

  test("greedy text does not depend on the seed, and --logprobs explains it", async () => {
    const greedy = await generated([...base, "hello", "--temperature", "0", "--logprobs", "3"]);
    const again = await generated([...base, "hello", "--temperature", "0", "--seed", "9"]);
    expect(again.tokens).toEqual(greedy.tokens);
    expect(greedy.logprobs!.map((entry) => entry.id)).toEqual(greedy.tokens);
    expect(greedy.logprobs!.map((entry) => entry.token).join("")).toBe(greedy.text);
    for (const { id, logprob, top } of greedy.logprobs!) {
      expect(top).toHaveLength(3);
      expect(top[0]).toMatchObject({ id, logprob });
      expect(top[0]!.logprob).toBeLessThan(0);
      expect(top[1]!.logprob).toBeLessThanOrEqual(top[0]!.logprob);
      expect(top[2]!.logprob).toBeLessThanOrEqual(top[1]!.logprob);
      expect(top.reduce((sum, entry) => sum + Math.exp(entry.logprob), 0)).toBeLessThan(1 + 1e-9);
    }
  });

  test("the prompt may come from a file, a pipe, - or as ids", async () => {
    const file = written("prompt.txt", "hello\n");
    const ids = written("ids.json", JSON.stringify([..."hello"].map((char) => char.charCodeAt(0) - 0x20)));
    const results = [
      await generated([...base, "-f", file]),
      await generated(base, { stdin: "hello\n" }),
      await generated([...base, "-"], { stdin: "hello" }),
      await generated([...base, "-f", "-"], { stdin: "hello\r\n" }),
      await generated([...base, "--ids", ids]),
      await generated([...base, "--ids", "-"], { stdin: readFileSync(ids) }),
    ];
    for (const { text, prompt_tokens } of results) {
      expect({ text, prompt_tokens }).toEqual({ text: report.text, prompt_tokens: 5 });
    }
    expect(results[4]!.timings["tokenize_ms"]).toBeNull();
  });

  test("a prompt that looks like a number or a flag is text", async () => {
    expect((await generated(["generate", "-m", model, "-n", "0", "42"])).prompt_tokens).toBe(2);
    const { stdout } = await runCli(["generate", "-m", model, "-n", "0", "--json", "--", "-5 degrees"]);
    expect(JSON.parse(stdout).prompt_tokens).toBe(10);
  });

  test("--stop ends before its text, in the stream as in --json", async () => {
    const stop = report.text.slice(6, 8);
    const args = [...base, "hello", "--stop", "never there", "--stop", stop];
    const stopped = await generated(args);
    expect(stopped).toMatchObject({
      text: report.text.slice(0, report.text.indexOf(stop)),
      finish_reason: "stop",
    });
    expect((await runCli(args)).stdout).toBe(`${stopped.text}\n`);
  });

  test("the end-of-text token ends it, --ignore-eos goes on", async () => {
    const greedy = ["--temperature", "0", "-n", "6", "hello"];
    const { tokens } = await generated([...base, ...greedy]);
    const eos = tokens[0]!;
    const ending = writeTinyModel(join(folder.path, "eos"), { config: { eosTokenId: [eos] } }).dir;
    const ended = await generated([...base, "-m", ending, ...greedy]);
    expect(ended).toMatchObject({ text: "", tokens: [], finish_reason: "eos" });
    expect(ended.timings).toMatchObject({ first_token_ms: null, decode_ms: null, decode_tokens_per_s: null });
    const ignored = await generated([...base, "-m", ending, ...greedy, "--ignore-eos"]);
    expect(ignored).toMatchObject({ tokens, finish_reason: "length" });
  });

  test("the context's end is an end like -n, and -n 0 prints nothing", async () => {
    const long = await generated(["generate", "-m", model, "-n", "100", "hello", "--seed", "5"]);
    expect(long.finish_reason).toBe("length");
    expect(long.tokens).toHaveLength(64 - 5 + 1); // the last one needs no position
    expect(long.text.startsWith(report.text)).toBe(true);
    expect((await runCli([...base, "-n", "0", "hello"])).stdout).toBe("");
  });

  test("a model without a tokenizer continues ids with ids", async () => {
    const dir = writeTinyModel(join(folder.path, "ids only")).dir;
    await Bun.file(join(dir, "tokenizer.json")).delete();
    const { code, stdout } = await runCli([...base, "-m", dir, "--ids", "-"], {
      stdin: "[72, 69, 76, 76, 79]",
    });
    expect({ code, stdout }).toEqual({ code: 0, stdout: `${report.tokens.join(" ")}\n` });
  });

  test("the text does not depend on how many steps are in flight, nor on where it ends", async () => {
    // As many tokens as there is room for: the last of them is drawn, but nothing runs behind it.
    const drawn = [...base, "-n", "1000", "hello", "--ignore-eos", "--logprobs", "2"];
    const at = async (args: readonly string[], inFlight: number) => {
      const { text, tokens, finish_reason, logprobs } = await generated([
        ...args,
        ...["--in-flight", String(inFlight)],
      ]);
      return { text, tokens, finish_reason, logprobs };
    };
    const whole = await at(drawn, 1);
    expect(whole.tokens).toHaveLength(64 - 5 + 1);
    expect(whole.tokens.slice(0, 12)).toEqual(report.tokens);
    expect(whole.finish_reason).toBe("length");
    for (const inFlight of [2, 8, 64]) expect(await at(drawn, inFlight)).toEqual(whole);

    const stop = whole.text.slice(20, 22);
    const end = whole.text.indexOf(stop);
    const stopping = [...drawn, "--stop", stop];
    const stopped = await at(stopping, 1);
    expect(stopped).toMatchObject({ text: whole.text.slice(0, end), finish_reason: "stop" });
    for (const inFlight of [2, 64]) expect(await at(stopping, inFlight)).toEqual(stopped);

    const eos = whole.tokens[9]!;
    const ending = writeTinyModel(join(folder.path, "ending"), { config: { eosTokenId: [eos] } }).dir;
    const args = ["generate", "-m", ending, "-n", "1000", "--seed", "5", "hello", "--logprobs", "2"];
    const last = whole.tokens.indexOf(eos);
    for (const inFlight of [1, 64]) {
      expect(await at(args, inFlight)).toMatchObject({
        tokens: whole.tokens.slice(0, last),
        logprobs: whole.logprobs!.slice(0, last),
        finish_reason: "eos",
      });
    }
  });

  denoTest("Deno prints the same bytes as Bun", async () => {
    const runtime = "deno";
    const streamed = await runCli([...base, "hello"], { runtime });
    expect(streamed).toMatchObject({ code: 0, stdout: `${report.text}\n` });
    expect(withoutNotices(streamed.notes)).toMatch(TIMINGS);
    expect(streamed.stdout + streamed.stderr).not.toContain("\x1b");
    const piped = await generated([...base, "--logprobs", "2"], { runtime, stdin: "hello\n" });
    const { logprobs } = await generated([...base, "hello", "--logprobs", "2"]);
    expect(piped).toMatchObject({ text: report.text, tokens: report.tokens, logprobs });
  });
});

describe("generate is ended", () => {
  const endless = writeTinyModel(join(folder.path, "endless"), { config: { nPositions: 16384 } }).dir;
  const args = ["generate", "-m", endless, "-n", "16000", "--seed", "5", "--ignore-eos", "hello"];

  function checkInterrupted({ code, stdout, notes }: RunResult, exitCode = 130): void {
    expect(code).toBe(exitCode);
    expect(stdout).toMatch(/^[\x20-\x7e\n]+\n$/);
    const [, count, reason] = TIMINGS.exec(withoutNotices(notes))!;
    expect(reason).toBe("interrupt");
    expect(stdout).toHaveLength(Number(count) + 1);
  }

  test("by SIGINT: cleanly, with the timings and exit code 130", async () => {
    checkInterrupted(await runCli(args, { signal: "SIGINT" }));
  });

  denoTest("by SIGINT on Deno", async () => {
    checkInterrupted(await runCli(args, { signal: "SIGINT", runtime: "deno" }));
  });

  const preload = join(import.meta.dir, "../support/interrupt.ts");

  test("by SIGINT between the chunks of the prompt: with the timings, and no text", async () => {
    const file = written("chunks.txt", "x".repeat(8000));
    const { code, stdout, notes } = await runCli([...args.slice(0, -1), "-f", file], {
      preload,
      env: { INTERRUPT_FROM: "embedding/token_rows", INTERRUPT_AFTER: "1" },
    });
    expect({ code, stdout }).toEqual({ code: 130, stdout: "" });
    expect(withoutNotices(notes)).toMatch(
      /^prompt 8000 tokens, [\d,.]+ tokens\/s; generated 0, .*; finished: interrupt\n$/,
    );
  });

  test("by SIGINT at any step, with any number in flight: what there is of the same text", async () => {
    const { text } = await generated([...args, "-n", "300"]);
    for (const [inFlight, submissions] of [[1, 1], [1, 20], [8, 2], [64, 1], [64, 9]] as const) {
      const result = await runCli([...args, "--in-flight", String(inFlight)], {
        preload,
        env: { INTERRUPT_FROM: "sampling/draw", INTERRUPT_AFTER: String(submissions) },
      });
      expect(result.code).toBe(130);
      const [, count, reason] = TIMINGS.exec(withoutNotices(result.notes))!;
      expect(reason).toBe("interrupt");
      expect(Number(count)).toBeLessThan(300);
      expect(result.stdout).toBe(Number(count) === 0 ? "" : `${text.slice(0, Number(count))}\n`);
    }
  });

  test("by SIGINT at any moment: exit code 130, and soon", async () => {
    for (const ms of [0, 100, 200, 300, 400, 600, 900]) {
      const child = Bun.spawn([...cliCommand(), ...args], {
        stdin: "ignore",
        stdout: "pipe",
        stderr: "pipe",
        env: { ...process.env, NO_COLOR: undefined, FORCE_COLOR: undefined },
        timeout: RUN_TIMEOUT_MS,
        killSignal: "SIGKILL",
      });
      const output = Promise.all([new Response(child.stdout).text(), new Response(child.stderr).text()]);
      await Bun.sleep(ms);
      child.kill("SIGINT");
      const [stdout, stderr] = await output;
      // Before there is anything to end in order, the signal ends the process.
      expect({ ms, code: await child.exited, signal: child.signalCode }).toEqual({
        ms,
        code: 130,
        signal: child.signalCode === null ? null : "SIGINT",
      });
      expect(stderr).not.toContain("error");
      if (stdout !== "") expect(stderr).toContain("finished: interrupt");
    }
  });

  test("by SIGTERM: like SIGINT, with exit code 143", async () => {
    checkInterrupted(await runCli(args, { signal: "SIGTERM" }), 143);
  });

  test("by a reader that has seen enough: quietly", async () => {
    const { stdout, notes } = await runShell('{ "$@"; echo "status $?" >&2; } | head -c 20', args);
    expect(stdout).toHaveLength(20);
    expect(withoutNotices(notes)).toBe("status 0\n");
    const json = await runShell('{ "$@" --json -n 1; echo "status $?" >&2; } | true', args);
    expect(withoutNotices(json.notes)).toBe("status 0\n");
  });

  describe("with a slow reader", () => {
    // Tokens so long that a few of them fill a pipe.
    const LONG = 1000;
    const wordy = writeTinyModel(join(folder.path, "wordy"), { config: { nPositions: 16384 } }).dir;
    const path = join(wordy, "tokenizer.json");
    const tokenizer = JSON.parse(readFileSync(path, "utf8"));
    const { vocab } = tokenizer.model;
    tokenizer.model.vocab = Object.fromEntries(
      Object.entries(vocab).map(([char, id]) => [char.repeat(LONG), id]),
    );
    writeFileSync(path, JSON.stringify(tokenizer));
    const ids = written("some_ids.json", "[1, 2, 3, 4, 5]");
    const slow = ["generate", "-m", wordy, "--seed", "5", "--ignore-eos", "--ids", ids];

    for (const runtime of runtimes) {
      test(`on ${runtime}: all of the text arrives`, async () => {
        const { text } = await generated([...slow, "-n", "300"]);
        expect(text.length).toBeGreaterThan(290 * LONG);
        const script = '{ "$@"; echo "status $?" >&2; } | { sleep 2; cat; }';
        const streamed = await runShell(script, [...slow, "-n", "300", "-q"], { runtime });
        expect(streamed.stdout === `${text}\n`).toBe(true); // it is too long to be shown
        expect(streamed.notes).toBe("status 0\n");
        const json = await runShell(script, [...slow, "-n", "300", "-q", "--json"], { runtime });
        expect(JSON.parse(json.stdout).text === text).toBe(true);
        expect(json.notes).toBe("status 0\n");
      });
    }

    test("SIGINT ends it once that has read what was written", async () => {
      const { text } = await generated([...slow, "-n", "300"]);
      const { stdout, notes } = await runShell(
        '{ "$@"; echo "status $?" >&2; } | { sleep 2; cat; }',
        [...slow, "-n", "16000", "--in-flight", "1"],
        { preload, env: { INTERRUPT_FROM: "sampling/draw", INTERRUPT_AFTER: "60" } },
      );
      const [timings, status] = withoutNotices(notes).trimEnd().split("\n");
      const [, count, reason] = TIMINGS.exec(`${timings}\n`)!;
      expect({ status, reason }).toEqual({ status: "status 130", reason: "interrupt" });
      expect(Number(count)).toBeGreaterThan(55);
      expect(stdout.length).toBeGreaterThan(55 * LONG);
      expect(text.startsWith(stdout.slice(0, -1))).toBe(true);
    });
  });

  denoTest("by a reader that has seen enough, on Deno", async () => {
    const runtime = "deno";
    const { stdout, notes } = await runShell('{ "$@"; echo "status $?" >&2; } | head -c 20', args, {
      runtime,
    });
    expect(stdout).toHaveLength(20);
    expect(withoutNotices(notes)).toBe("status 0\n");
  });
});
