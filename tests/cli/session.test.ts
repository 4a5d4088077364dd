/** `generate --session` as users run it: what is kept is not computed again, and changes nothing else. */
import { afterAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { copyFileSync, mkdirSync, readdirSync, readFileSync, truncateSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
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
import { testDevice } from "../support/device.ts";

const gpu = await testDevice();
setDefaultTimeout(2 * RUN_TIMEOUT_MS);

const folder = temporaryFolder();
afterAll(folder.remove);
const model = writeTinyModel(join(folder.path, "tiny")).dir;
const base = ["generate", "-m", model, "-n", "8", "--temperature", "0", "--dtype", "f32"];
const PROMPT = "it was the best of times";
let files = 0;

/** A path in a folder of its own, in which nothing else may be left. */
function newPath(): string {
  const dir = join(folder.path, `session-${files++}`);
  mkdirSync(dir);
  return join(dir, "prompt.session");
}

/** What `--json` prints, as far as it matters here. */
interface Report {
  readonly text: string;
  readonly prompt_tokens: number;
  readonly tokens: number[];
  readonly session?: { restored_tokens: number; restore_ms: number | null; save_ms: number | null };
  readonly timings: Record<string, number | null>;
}

async function generated(args: readonly string[], options?: RunOptions): Promise<Report> {
  const { code, stdout, notes } = await runCli([...args, "--json"], options);
  expect({ code, notes: withoutNotices(notes) }).toEqual({ code: 0, notes: "" });
  return JSON.parse(stdout);
}

/** A session of the prompt, saved once and copied. */
let original: string | undefined;
async function saved(): Promise<string> {
  if (original === undefined) {
    original = newPath();
    await generated([...base, "-n", "0", PROMPT, "--session", original]);
  }
  const path = newPath();
  copyFileSync(original, path);
  return path;
}

describe("a session", () => {
  for (const runtime of ["bun", "deno"] as const) {
    const define = runtime === "deno" ? denoTest : test;
    define(`is saved by the first run and restored by the second, on ${runtime}`, async () => {
      const path = newPath();
      const plain = await generated([...base, PROMPT], { runtime });
      expect(plain.session).toBeUndefined();
      const first = await generated([...base, PROMPT, "--session", path], { runtime });
      expect(first).toMatchObject({ prompt_tokens: 24, tokens: plain.tokens, text: plain.text });
      expect(first.session).toEqual({ restored_tokens: 0, restore_ms: null, save_ms: expect.any(Number) });
      expect(first.timings["prefill_tokens_per_s"]).toBeGreaterThan(0);
      expect(readdirSync(join(path, ".."))).toEqual(["prompt.session"]);

      const bytes = readFileSync(path);
      const second = await generated([...base, PROMPT, "--session", path], { runtime });
      expect(second).toMatchObject({ prompt_tokens: 24, tokens: plain.tokens, text: plain.text });
      expect(second.session).toEqual({ restored_tokens: 24, restore_ms: expect.any(Number), save_ms: null });
      expect(second.timings["prefill_tokens_per_s"]).toBeNull();
      expect(readFileSync(path).equals(bytes)).toBe(true);
      expect(readdirSync(join(path, ".."))).toEqual(["prompt.session"]);
    });
  }

  denoTest("of one runtime is restored by the other", async () => {
    const plain = await generated([...base, PROMPT]);
    const restored = await generated([...base, PROMPT, "--session", await saved()], { runtime: "deno" });
    expect(restored).toMatchObject({ tokens: plain.tokens, session: { restored_tokens: 24 } });
  });

  // Of a prompt that ends inside the session the last token runs again: the session has no logits after it.
  const prompts: readonly (readonly [name: string, prompt: string, restored: number])[] = [
    ["goes on behind it", `${PROMPT}, it was the worst`, 24],
    ["goes on by one token", `${PROMPT},`, 24],
    ["ends inside it", PROMPT.slice(0, 10), 9],
    ["is its first token", PROMPT.slice(0, 1), 0],
    ["leaves it halfway", "it was the worst of times", 11],
    ["leaves it at its last token", `${PROMPT.slice(0, -1)}!`, 23],
    ["has nothing in common with it", "call me Ishmael", 0],
  ];
  for (const [name, prompt, restored] of prompts) {
    test(`serves a prompt that ${name}`, async () => {
      const path = await saved();
      const bytes = readFileSync(path);
      const plain = await generated([...base, prompt]);
      const report = await generated([...base, prompt, "--session", path]);
      expect(report).toMatchObject({
        prompt_tokens: prompt.length,
        tokens: plain.tokens,
        text: plain.text,
        session: { restored_tokens: restored, save_ms: null },
      });
      expect(readFileSync(path).equals(bytes)).toBe(true);
    });
  }

  test("is saved by -n 0 alone, and serves files, pipes, ids, other contexts and sampling", async () => {
    const path = newPath();
    const quiet = await runCli([...base, "-n", "0", PROMPT, "--session", path, "-q"]);
    expect(quiet).toMatchObject({ code: 0, stdout: "", notes: "" });
    const restored = { prompt_tokens: 24, session: { restored_tokens: 24 } };
    const { tokens } = await generated([...base, PROMPT]);
    expect(await generated([...base, "--session", path], { stdin: `${PROMPT}\n` })).toMatchObject({
      tokens,
      ...restored,
    });
    const text = join(folder.path, "prompt.txt");
    writeFileSync(text, PROMPT);
    expect(await generated([...base, "-f", text, "-c", "60", "--session", path])).toMatchObject({
      tokens,
      ...restored,
    });
    const stdin = JSON.stringify([...PROMPT].map((char) => char.charCodeAt(0) - 0x20));
    const sampling = ["--temperature", "1", "--seed", "3", "--repeat-penalty", "1.5"];
    const sampled = await generated([...base, ...sampling, PROMPT]);
    expect(await generated([...base, ...sampling, "--ids", "-", "--session", path], { stdin })).toMatchObject(
      {
        tokens: sampled.tokens,
        ...restored,
      },
    );
  });

  test("is told of on stderr, unless -q is given", async () => {
    const args = [...base, PROMPT, "--session", await saved()];
    const { stdout, notes } = await runCli(args);
    expect(notes).toMatch(/^note: 24 of 24 tokens restored from .*prompt\.session$/m);
    expect(withoutNotices(notes)).toMatch(/^prompt 24 tokens, -; generated 8, /);
    expect(await runCli([...args, "-q"])).toMatchObject({ stdout, notes: "" });
  });

  test("beyond the model's positions is kept with how they were mapped", async () => {
    const long = PROMPT.repeat(3); // 72 tokens
    const path = newPath();
    const repeat = [...base, long, "--positions", "repeat"];
    const plain = await generated(repeat);
    await generated([...repeat, "-n", "0", "--session", path]);
    expect(await generated([...repeat, "--session", path])).toMatchObject({
      tokens: plain.tokens,
      session: { restored_tokens: 72 },
    });
    const other = [...base, long, "--positions", "interpolate", "-c", "100", "--session", path];
    expectFailure(
      await runCli(other),
      1,
      /saved with the positions "?repeat 64"?, this run has "?interpolate 64 to 100/,
    );
    // Within the table repeated positions are the exact ones.
    expect(await generated([...base, PROMPT, "--positions", "repeat", "--session", await saved()]))
      .toMatchObject({
        session: { restored_tokens: 24 },
      });
  });
});

describe("a session is refused", () => {
  const flipped = (at: (bytes: Buffer) => number) => (path: string) => {
    const bytes = readFileSync(path);
    bytes[at(bytes)]! ^= 1;
    writeFileSync(path, bytes);
  };
  const headerLength = (bytes: Buffer) => 8 + Number(bytes.readBigUInt64LE(0));
  const another = writeTinyModel(join(folder.path, "another"), { seed: 7 }).dir;
  const unfit: readonly (readonly [
    name: string,
    damage: (path: string) => void,
    args: readonly string[],
    message: RegExp,
  ])[] = [
    [
      "by another model",
      () => {},
      ["-m", another],
      /prompt\.session was saved with another model\n\nhint: /,
    ],
    [
      "by other positions",
      () => {},
      ["--positions", "interpolate", "-c", "80"],
      /saved with the positions "?exact"?, this run has "?interpolate 64 to 80/,
    ],
    [
      "when it was cut short",
      (path) => truncateSync(path, 3000),
      [],
      /prompt\.session.*\n\nhint: .*saved again/,
    ],
    ["when it is empty", (path) => truncateSync(path, 0), [], /prompt\.session.* 0 bytes/],
    [
      "when a byte of the keys has flipped",
      flipped((bytes) => headerLength(bytes) + 100),
      [],
      /h\.0\.k.* is damaged/,
    ],
    [
      "when a byte of the last values has flipped",
      flipped((bytes) => bytes.length - 4 * 97 - 4 * 24 - 1),
      [],
      /h\.1\.v.* is damaged/,
    ],
    [
      "when a byte of the tokens has flipped",
      flipped((bytes) => bytes.length - 4 * 97 - 4),
      [],
      /input_ids.* is damaged/,
    ],
    [
      "when a byte of the logits has flipped",
      flipped((bytes) => bytes.length - 1),
      [],
      /logits.* is damaged/,
    ],
    [
      "when it is a text",
      (path) => writeFileSync(path, "once upon a time, in a file"),
      [],
      /prompt\.session.*\n\nhint: /,
    ],
    [
      "when it is a model",
      (path) => copyFileSync(join(model, "model.safetensors"), path),
      [],
      /is a safetensors file, but not a session/,
    ],
  ];
  for (const [name, damage, args, message] of unfit) {
    test(`${name}: exit code 1, and stays as it is`, async () => {
      const path = await saved();
      damage(path);
      const bytes = readFileSync(path);
      expectFailure(await runCli([...base, ...args, PROMPT, "--session", path]), 1, message);
      expect(readFileSync(path).equals(bytes)).toBe(true);
      expect(readdirSync(join(path, ".."))).toEqual(["prompt.session"]);
    });
  }

  const noF16 = gpu.caps.f16 ? "" : ": needs the shader-f16 feature";
  test.skipIf(noF16 !== "")(`by another element type: exit code 1${noF16}`, async () => {
    const path = await saved();
    expectFailure(
      await runCli([...base, "--dtype", "f16", PROMPT, "--session", path]),
      1,
      /saved in f32, this run is in f16\n\nhint: use `--dtype f32`/,
    );
  });
});

describe("a session that cannot be written", () => {
  // The model is damaged, too: that would be found next.
  const damaged = writeTinyModel(join(folder.path, "damaged"), {
    inject: { tensor: "h.1.mlp.c_fc.weight", element: 3 },
  }).dir;
  const args = [...base, "-m", damaged, PROMPT, "--session"];

  test("is told of before the model is loaded: exit code 1", async () => {
    const missing = join(folder.path, "nowhere", "prompt.session");
    expectFailure(
      await runCli([...args, missing]),
      1,
      /Cannot write .*prompt\.session: there is no folder .*nowhere\n\nhint: create the folder, or choose another\n/,
    );
    expectFailure(
      await runCli([...args, folder.path]),
      1,
      /longform-test-\w+ is not a regular file\n\nhint: /,
    );
  });

  test.skipIf(process.platform !== "linux")("where not even root may write: exit code 1", async () => {
    expectFailure(
      await runCli([...args, "/sys/prompt.session"]),
      1,
      /Cannot write \/sys\/prompt\.session: .*\n\nhint: choose a folder that you may write to\n/,
    );
  });
});
