/** Bad input and bad luck: each ends in one sentence, the right exit code, nothing on stdout and no stack trace. */
import { afterAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { existsSync, readFileSync, rmSync, truncateSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { temporaryFolder, type TinyOptions, writeRawSafetensors } from "../support/checkpoint.ts";
import {
  expectFailure,
  RUN_TIMEOUT_MS,
  runCli,
  type RunOptions,
  runShell,
  runtimes,
  withoutNotices,
  writeTinyModel,
} from "../support/cli.ts";

setDefaultTimeout(2 * RUN_TIMEOUT_MS);

const folder = temporaryFolder();
afterAll(folder.remove);
let folders = 0;

/** A sound tiny model, which `damage` then spoils. */
function tiny(options: TinyOptions = {}, damage: (dir: string) => void = () => {}): string {
  const { dir } = writeTinyModel(join(folder.path, String(folders++)), options);
  damage(dir);
  return dir;
}

function written(name: string, content: string | Uint8Array): string {
  const path = join(folder.path, name);
  writeFileSync(path, content);
  return path;
}

const model = tiny();
const NO_DRIVER = {
  VK_DRIVER_FILES: "/nonexistent",
  VK_ICD_FILENAMES: undefined,
  VK_ADD_DRIVER_FILES: undefined,
};

describe("the command line", () => {
  for (const runtime of runtimes) {
    test(`on ${runtime}: exit code 2, and no GPU is asked`, async () => {
      const env = NO_DRIVER;
      expectFailure(
        await runCli(["generat", "x"], { runtime, env }),
        2,
        /no command `generat`.*\n\nhint: .*generate/,
      );
      expectFailure(await runCli(["generate", "x", "--sed", "1"], { runtime, env }), 2, /no option `--sed`/);
      expectFailure(await runCli(["generate", "x", "--seed"], { runtime, env }), 2, /`--seed` needs a value/);
      expectFailure(
        await runCli(["generate", "x", "--temperature", "-1"], { runtime, env }),
        2,
        /a number from 0/,
      );
    });
  }

  test("--context beyond the model's positions: exit code 2", async () => {
    expectFailure(
      await runCli(["generate", "-m", model, "x", "-c", "65"]),
      2,
      /`--context 65`.*64 positions/,
    );
  });
});

describe("the prompt", () => {
  const args = ["generate", "-m", model, "-n", "1"];
  const cases:
    readonly (readonly [name: string, args: readonly string[], message: RegExp, options?: RunOptions])[] = [
      ["an empty file", ["-f", written("empty", "")], /prompt is empty: .*empty holds no text/],
      ["a file of one newline", ["-f", written("newline", "\n")], /prompt is empty/],
      ["empty standard input", [], /prompt is empty: standard input holds no text/],
      ["an empty pipe", ["-"], /prompt is empty: standard input holds no text/, { stdin: "" }],
      ["no ids", ["--ids", "-"], /prompt is empty: standard input holds no token ids/, { stdin: "[]" }],
      ["ids that are not JSON", ["--ids", "-"], /standard input is not JSON/, { stdin: "1 2" }],
      ["ids that are not ids", ["--ids", "-"], /not a JSON array of token ids/, { stdin: "[1, -2]" }],
      ["ids that are words", ["--ids", "-"], /not a JSON array of token ids/, { stdin: `["a"]` }],
      ["an id outside the vocabulary", ["--ids", "-"], /97/, { stdin: "[1, 97]" }],
      [
        "a missing file",
        ["-f", join(folder.path, "none.txt")],
        /Cannot read .*none\.txt: there is no such file/,
      ],
      ["a folder as file", ["-f", folder.path], /Cannot read .*: it is a folder/],
      [
        "a byte that is not UTF-8",
        ["-f", written("latin1", Uint8Array.of(0x61, 0x62, 0xe9, 0x63))],
        /byte 2 begins/,
      ],
      ["a character cut short", ["-"], /standard input is not UTF-8.*byte 3/, {
        stdin: Uint8Array.of(0x61, 0x62, 0x63, 0xe2, 0x82),
      }],
      ["characters without tokens", ["naïve"], /has no tokens for some characters/],
      ["more tokens than -c", ["-c", "4", "hello"], /longer than the context: 5 tokens, room for 4/],
      [
        "more tokens than positions",
        ["x".repeat(65)],
        /65 tokens, is longer than the model's 64 positions[^]*--positions interpolate/,
      ],
      [
        // More than is encoded before memory is planned: what is known is enough to refuse it, before any of it runs.
        "a file of many more tokens than positions",
        ["-f", written("huge.txt", "word ".repeat(100_000))],
        /The text, over \d{5,} tokens, is longer than the model's 64 positions/,
      ],
      [
        "a file of many more tokens than -c",
        ["-f", written("huge2.txt", "word ".repeat(100_000)), "-c", "32", "--positions", "repeat"],
        /The prompt is longer than the context: over \d{5,} tokens, room for 32/,
      ],
    ];
  for (const [name, extra, message, options] of cases) {
    test(`${name}: exit code 1`, async () => {
      expectFailure(await runCli([...args, ...extra], options), 1, message);
    });
  }
});

describe("the streams", () => {
  for (const runtime of runtimes) {
    test(`on ${runtime}: a folder on standard input: exit code 1`, async () => {
      const result = await runShell('"$@" < /', ["generate", "-m", model, "-n", "1"], { runtime });
      expectFailure(result, 1, /Cannot read standard input: it is a folder/);
    });

    const noFull = existsSync("/dev/full") ? "" : ": needs /dev/full";
    test.skipIf(noFull !== "")(`on ${runtime}: a full disk behind stdout: exit code 1${noFull}`, async () => {
      for (
        const args of [["inspect", model], ["inspect", model, "--json"], ["--help"], ["info", "-h"], [
          "--version",
        ]]
      ) {
        const result = await runShell('"$@" > /dev/full', args, { runtime });
        expectFailure(result, 1, /Cannot write to stdout: there is no space left/);
      }
    });
    test.skipIf(noFull !== "")(
      `on ${runtime}: a full disk behind stderr is no failure${noFull}`,
      async () => {
        const result = await runShell('"$@" 2> /dev/full', ["generate", "-m", model, "-n", "1", "x"], {
          runtime,
        });
        expect({ code: result.code, length: result.stdout.length }).toEqual({ code: 0, length: 2 });
      },
    );
  }

  test.skipIf(!existsSync("/dev/full"))("a text that cannot be written ends with one sentence", async () => {
    const result = await runShell('"$@" > /dev/full', ["generate", "-m", model, "-n", "3", "x", "-q"]);
    expectFailure(result, 1, /Cannot write to stdout: there is no space left/);
  });
});

describe("the model", () => {
  const weights = (dir: string) => join(dir, "model.safetensors");
  const editConfig = (change: object) => (dir: string) => {
    const path = join(dir, "config.json");
    writeFileSync(path, JSON.stringify({ ...JSON.parse(readFileSync(path, "utf8")), ...change }));
  };
  const raw = (first: object, second: object, bytes: number, claimed?: bigint) => (dir: string) =>
    writeRawSafetensors(weights(dir), { a: first, b: second }, new Uint8Array(bytes), claimed);
  const f32 = (begin: number, end: number) => ({ dtype: "F32", shape: [4], data_offsets: [begin, end] });

  const cases: readonly (readonly [name: string, dir: string, message: RegExp])[] = [
    ["no folder", join(folder.path, "nowhere"), /no model folder .*nowhere/],
    ["a file for a folder", written("file", "x"), /is a file, not a model folder/],
    ["no config.json", tiny({}, (dir) => rmSync(join(dir, "config.json"))), /no file .*config\.json/],
    [
      "a config.json that is not JSON",
      tiny({}, (dir) => writeFileSync(join(dir, "config.json"), "{")),
      /not valid JSON/,
    ],
    [
      "another architecture",
      tiny({}, editConfig({ model_type: "llama" })),
      /describes a "llama" model, not GPT-2/,
    ],
    [
      "heads that do not divide",
      tiny({}, editConfig({ n_head: 3 })),
      /n_embd 8, which n_head 3 does not divide/,
    ],
    ["no tokenizer", tiny({}, (dir) => rmSync(join(dir, "tokenizer.json"))), /No tokenizer\.json in/],
    ["no weights", tiny({}, (dir) => rmSync(weights(dir))), /no model\.safetensors or/],
    ["a file cut short", tiny({}, (dir) => truncateSync(weights(dir), 9000)), /ends inside tensor/],
    [
      "a file cut short in its header",
      tiny({}, (dir) => truncateSync(weights(dir), 100)),
      /claims a header of/,
    ],
    [
      "an empty file",
      tiny({}, (dir) => truncateSync(weights(dir), 0)),
      /not a safetensors file: it has 0 bytes/,
    ],
    [
      "a header longer than the file",
      tiny({}, raw(f32(0, 16), f32(16, 32), 32, 1n << 40n)),
      /claims a header of 1099511627776/,
    ],
    ["tensors that overlap", tiny({}, raw(f32(0, 16), f32(8, 24), 24)), /Tensors "?a"? and "?b"? .*overlap/],
    ["offsets beyond the file", tiny({}, raw(f32(0, 16), f32(16, 32), 24)), /ends inside tensor "?b"?/],
    [
      "a type that cannot be used",
      tiny({ retype: { tensor: "wte.weight", dtype: "I32", bytesPerElement: 4 } }),
      /wte\.weight.*I32/,
    ],
    ["a missing tensor", tiny({ omit: ["h.1.ln_1.bias"] }), /h\.1\.ln_1\.bias/],
    ["a wrong shape", tiny({ reshape: { "h.0.attn.c_attn.weight": [24, 8] } }), /c_attn\.weight.*24/],
    ["a NaN", tiny({ inject: { tensor: "h.1.mlp.c_fc.weight", element: 3 } }), /NaN.*c_fc\.weight/],
  ];
  for (const [name, dir, message] of cases) {
    test(`${name}: exit code 1`, async () => {
      expectFailure(await runCli(["generate", "-m", dir, "-n", "1", "x"]), 1, message);
    });
  }

  for (const flag of ["-v", "-qv"]) {
    test(`${flag} adds the stack`, async () => {
      const args = ["generate", flag, "-m", join(folder.path, "nowhere"), "x"];
      const { code, stdout, notes } = await runCli(args);
      expect({ code, stdout }).toEqual({ code: 1, stdout: "" });
      expect(notes).toMatch(/^error: .*\n\nhint: .*\n\nModelError: [^\n]*\n +at .*json_file\.ts:\d+/);
    });
  }
});

describe("the GPU", () => {
  for (const runtime of runtimes) {
    test(`no adapter on ${runtime}: exit code 3`, async () => {
      const result = await runCli(["generate", "-m", model, "x"], { runtime, env: NO_DRIVER });
      expectFailure(result, 3, /No Vulkan adapter was found.*\n\nhint: /);
    });
  }

  test("no software adapter: exit code 3, and no word about the GPU", async () => {
    const result = await runCli(["generate", "-m", model, "x", "--fallback-adapter"], { env: NO_DRIVER });
    expectFailure(result, 3, /no software adapter.*\n\nhint: install Mesa/);
    expect(result.notes).not.toContain("does not show");
  });

  test("no adapter of that name or number: exit code 3, with those there are", async () => {
    expectFailure(
      await runCli(["generate", "-m", model, "x", "--adapter", "nope"]),
      3,
      /`--adapter nope`\n\nhint: .*0: /,
    );
    expectFailure(await runCli(["generate", "-m", model, "x", "--adapter", "99"]), 3, /`--adapter 99`/);
  });

  test("a shader that does not compile: exit code 1, its header only with -v", async () => {
    const breaking = { preload: join(import.meta.dir, "../support/break_shaders.ts") };
    const args = ["generate", "-m", model, "-n", "1", "x"];
    expectFailure(await runCli(args, breaking), 1, /error: \w+\/\w+\.wgsl:\d+:\d+ /);
    const verbose = await runCli([...args, "-qv"], breaking);
    expect(verbose.notes).toMatch(
      /\n\nheader of embedding\/token_rows:\n[^]*\nstruct Params .*\n.*\n\nShaderError: /,
    );
  });

  const preload = join(import.meta.dir, "../support/lose_device.ts");
  // Submissions: two for the prompt, then one for each token or several.
  for (const [when, submissions] of [["while loading", 0], ["in prefill", 1], ["in decode", 4]] as const) {
    test(`a device lost ${when}: exit code 1`, async () => {
      const env = { LOSE_DEVICE_AFTER: String(submissions) };
      const args = ["generate", "-m", model, "-n", "30", "--seed", "1", "x", "--ignore-eos"];
      expectFailure(await runCli([...args, "--json"], { preload, env }), 1, /The GPU device was lost/);
      const streamed = await runCli(args, { preload, env });
      expect(streamed.code).toBe(1);
      expect(withoutNotices(streamed.notes)).toMatch(
        /^\n?error: The GPU device was lost[^\n]*\n\nhint: [^\n]*\n$/,
      );
      expect(streamed.stdout.length).toBeLessThanOrEqual(Math.max(0, submissions - 1));
    });
  }

  // Two prompts of three submissions each are decoded before another finds room.
  for (const [when, submissions] of [["while loading", 0], ["in a prefill", 4], ["in decode", 10]] as const) {
    test(`a device lost ${when} with many prompts: exit code 1`, async () => {
      const result = await runCli(
        [
          "generate",
          "-m",
          model,
          "-n",
          "30",
          "--ignore-eos",
          "--prompts",
          "-",
          "--batch",
          "2",
          "--in-flight",
          "8",
        ],
        { preload, env: { LOSE_DEVICE_AFTER: String(submissions) }, stdin: "hello\nworld\nagain\n" },
      );
      expectFailure(result, 1, /The GPU device was lost/);
    });
  }
});
