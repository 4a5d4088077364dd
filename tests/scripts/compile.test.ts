/** The executable of scripts/compile.ts: made once, run in folders of its own, with no PATH and nothing else beside it. */
import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import {
  lstatSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  symlinkSync,
  unlinkSync,
  writeFileSync,
} from "node:fs";
import { basename, join } from "node:path";
import { VERSION } from "../../src/cli/version.ts";
import { temporaryFolder } from "../support/checkpoint.ts";
import {
  expectFailure,
  RUN_TIMEOUT_MS,
  runCli,
  type RunOptions,
  type RunResult,
  withoutNotices,
  writeTinyModel,
} from "../support/cli.ts";
import { HubServer } from "../support/hub_server.ts";

setDefaultTimeout(2 * RUN_TIMEOUT_MS);

const ROOT = join(import.meta.dir, "../..");
const folder = temporaryFolder();
afterAll(folder.remove);

function newFolder(name: string): string {
  const path = join(folder.path, name);
  mkdirSync(path);
  return path;
}

const made = newFolder("made");
const executable = join(made, "longform");
const unpacked = newFolder("unpacked");
const elsewhere = newFolder("elsewhere");

/** What the executable is run with: nothing, but for where a test machine's Vulkan is, and a folder for Dawn. */
const ENVIRONMENT = {
  ...Object.fromEntries(
    Object.keys(process.env).filter((name) => !/^(VK_|LD_LIBRARY_PATH$)/.test(name)).map((
      name,
    ) => [name, undefined]),
  ),
  PATH: "",
  TMPDIR: unpacked,
};

async function runExecutable(args: readonly string[], options: RunOptions = {}): Promise<RunResult> {
  const env = { ...ENVIRONMENT, ...options.env };
  return await runCli(args, { cwd: elsewhere, ...options, executable, env });
}

async function compile(args: readonly string[], env: NodeJS.ProcessEnv = {}) {
  const child = Bun.spawn([process.execPath, join(ROOT, "scripts/compile.ts"), ...args], {
    cwd: folder.path,
    env: { ...process.env, ...env },
    stderr: "pipe",
  });
  return { stderr: await new Response(child.stderr).text(), code: await child.exited };
}

beforeAll(async () => {
  const { stderr, code } = await compile(["--out", executable]);
  expect(stderr).toMatch(/^wrote .*longform: \d+\.\d MB for bun-\w+-\w+\n$/);
  expect(code).toBe(0);
});

describe("the executable", () => {
  test("is all that was written, and does not say where it was made", () => {
    expect(readdirSync(made)).toEqual([basename(executable)]);
    expect(readFileSync(executable).includes(ROOT)).toBe(false);
  });

  test("says what it is, and has all of the help", async () => {
    const { stdout, code } = await runExecutable(["--version"]);
    expect(stdout).toBe(`longform ${VERSION} (Bun ${Bun.version}, compiled)\n`);
    expect(code).toBe(0);
    expect((await runExecutable(["generate", "--help"])).stdout)
      .toBe((await runCli(["generate", "--help"])).stdout);
  });

  test("generates what main.ts generates, leaving nothing in its folder", async () => {
    const args = ["generate", "It was the best of times", "-n", "12", "--seed", "7", "--json"];
    const result = await runExecutable(args);
    expect(result.code).toBe(0);
    const { tokens, text } = JSON.parse(result.stdout);
    expect(tokens).toHaveLength(12);
    expect(JSON.parse((await runCli(args)).stdout)).toMatchObject({ tokens, text });
    expect(readdirSync(elsewhere)).toEqual([]);
  });

  test("classifies what comes through a pipe, encoding it on threads of its own", async () => {
    const args = ["classify", "--jsonl", "--workers", "2"];
    const stdin = ["It was the best of times", "Call me Ishmael"]
      .map((text, id) => JSON.stringify({ id, text }) + "\n").join("");
    const verdicts = ({ stdout }: RunResult) =>
      stdout.trimEnd().split("\n").map((line) => JSON.parse(line)).map(({ id, logits }) => ({ id, logits }));
    const result = await runExecutable(args, { stdin });
    expect(result.code).toBe(0);
    expect(verdicts(result)).toHaveLength(2);
    expect(verdicts(result)).toEqual(verdicts(await runCli(args, { stdin })));
  });

  test("reads models of the disk, and says what is wrong as main.ts does", async () => {
    const { dir } = writeTinyModel(newFolder("tiny"));
    const args = ["generate", "-m", dir, "It was", "-n", "4", "--temperature", "0", "-q"];
    const { stdout, code } = await runExecutable(args);
    expect(code).toBe(0);
    expect(stdout).toBe((await runCli(args)).stdout);

    const missing = ["generate", "-m", join(dir, "none"), "x"];
    const failed = await runExecutable(missing);
    expectFailure(failed, 1, /There is no model folder/);
    expect(failed.notes).toBe((await runCli(missing)).notes);
    expect((await runExecutable([...missing, "-v"])).notes)
      .toMatch(/^ModelError: There is no model folder .*\n +at .*\(src\/model\/json_file\.ts:\d+:\d+\)$/m);
    expectFailure(await runExecutable(["generate", "--nope"]), 2, /no option `--nope`/);
  });

  test("pulls a model, and generates from it", async () => {
    const server = await HubServer.open(writeTinyModel(newFolder("remote")).dir);
    const env = { HF_ENDPOINT: server.endpoint, HF_HOME: newFolder("hub") };
    expect((await runExecutable(["pull", "someone/tiny"], { env })).code).toBe(0);
    await server.close();
    const { stdout, code } = await runExecutable(["generate", "-m", "someone/tiny", "It", "-n", "4", "-q"], {
      env,
    });
    expect(code).toBe(0);
    expect(stdout).not.toBe("");
  });

  test("info knows its runtime, Dawn's version and the model inside", async () => {
    const { stdout, code } = await runExecutable(["info", "--json"]);
    expect(code).toBe(0);
    const info = JSON.parse(stdout);
    expect(info.runtime).toBe(`Bun ${Bun.version}, compiled`);
    expect(info.webgpu).toBe(
      JSON.parse(readFileSync(join(ROOT, "package.json"), "utf8")).dependencies.webgpu,
    );
    expect(info.model).toMatch(/weights.classics-16k$/);
    expect(info.chosen.name).not.toBe("");
  });
});

describe("the folder where it is run", () => {
  test("runs no code and sets no variable", async () => {
    const cwd = newFolder("hostile");
    const ran = join(cwd, "ran");
    const hostile = `require("node:fs").appendFileSync(${JSON.stringify(ran)}, "x");`;
    const put = (path: string, text: string) => {
      mkdirSync(join(cwd, path, ".."), { recursive: true });
      writeFileSync(join(cwd, path), text);
    };
    put("hostile.cjs", hostile);
    put("bunfig.toml", `preload = ["./hostile.cjs"]\n`);
    put(".env", "VK_ADD_DRIVER_FILES=/nonexistent/hostile.json\nBUN_OPTIONS=--preload=./hostile.cjs\n");
    for (const name of ["canvas", "vega", "webgpu"]) put(`node_modules/${name}/index.js`, hostile);
    // The bait works: Bun itself takes it, when it starts and when it looks for a package.
    expect(Bun.spawnSync([process.execPath, "-e", `import("canvas")`], { cwd }).exitCode).toBe(0);
    expect(readFileSync(ran, "utf8")).toBe("xx");

    // What draws asks for `canvas`, and would take it from here.
    const record = join(ROOT, "bench/results/h100/sparse-random.json");
    const drawn = await runExecutable(["bench", "--report", "report", "--from", record], { cwd });
    expect(withoutNotices(drawn.notes)).toContain("wrote ");
    expect(readFileSync(join(cwd, "report/report.html"), "utf8")).toContain("<svg");
    const info = await runExecutable(["info", "--json"], { cwd });
    expect(info.code).toBe(0);
    expect(info.stdout).not.toContain("hostile");
    expect(readFileSync(ran, "utf8")).toBe("xx");
  });
});

describe("Dawn's addon", () => {
  test("is unpacked once, for its owner alone, and no link is followed to another", async () => {
    const files = readdirSync(unpacked);
    expect(files).toEqual([expect.stringMatching(/^\.bun-\d+-[0-9a-f]+\.node$/)]);
    const path = join(unpacked, files[0]!);
    expect(lstatSync(path).mode & 0o777).toBe(0o600);

    const other = join(folder.path, "other.node");
    writeFileSync(other, new Uint8Array(lstatSync(path).size));
    unlinkSync(path);
    symlinkSync(other, path);
    expect((await runExecutable(["info", "--json"])).code).toBe(0);
    expect(readdirSync(unpacked)).toEqual(files);
    expect(lstatSync(path).isFile()).toBe(true);
  });

  test("where it cannot be unpacked, what needs a GPU says so, and all else works", async () => {
    const env = { TMPDIR: join(folder.path, "none") };
    expect((await runExecutable(["--version"], { env })).code).toBe(0);
    expectFailure(
      await runExecutable(["generate", "x"], { env }),
      3,
      /^error: Dawn.* does not load: .*\n\nhint: .*TMPDIR/,
    );
    const info = await runExecutable(["info", "--json"], { env });
    expect(info.code).toBe(3);
    expect(JSON.parse(info.stdout).findings).toEqual([]);
  });
});

describe("what cannot be made", () => {
  test("a target without Dawn, or none", async () => {
    for (const target of ["bun-windows-x64", "constructor"]) {
      const { stderr, code } = await compile(["--target", target]);
      expect(stderr).toMatch(
        new RegExp(`^error: There is no target ${target}, the targets are bun-linux-x64, .*\nusage: `),
      );
      expect(code).toBe(2);
    }
  });

  test("one whose Bun cannot be fetched: the reason, a hint, and nothing written", async () => {
    const out = newFolder("out");
    const target = process.arch === "arm64" ? "bun-linux-x64" : "bun-linux-arm64";
    const nobody = "http://127.0.0.1:1";
    const env = { HTTPS_PROXY: nobody, https_proxy: nobody, BUN_INSTALL_CACHE_DIR: newFolder("cache") };
    const { stderr, code } = await compile(["--target", target, "--out", join(out, "longform")], env);
    expect(stderr).toMatch(/^error: Failed to download .*ConnectionRefused\n\nhint: .*npm registry.*\n$/);
    expect(code).toBe(1);
    expect(readdirSync(out)).toEqual([]);
  });
});
