/** `info` as a process: exit codes, JSON that scripts can rely on, set-ups in which Vulkan shows nothing. */
import { afterAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import packages from "../../package.json" with { type: "json" };
import { inspectVulkan } from "../../src/runtime/vulkan_setup.ts";
import { temporaryFolder } from "../support/checkpoint.ts";
import { RUN_TIMEOUT_MS, runCli, type RunOptions, runtimes, writeTinyModel } from "../support/cli.ts";
import { library, manifest, writeMachine } from "../support/machine.ts";

setDefaultTimeout(RUN_TIMEOUT_MS);

const folder = temporaryFolder();
afterAll(folder.remove);
const model = writeTinyModel(join(folder.path, "tiny")).dir;

const KEYS = [
  ...[
    "adapters",
    "chosen",
    "dtype",
    "findings",
    "kernels",
    "largest_context",
    "measured",
    "model",
    "problem",
  ],
  ...["runtime", "shader_cache", "sizes", "version", "vulkan", "webgpu"],
];
/** No variable that names drivers. */
const UNSET = { VK_DRIVER_FILES: undefined, VK_ICD_FILENAMES: undefined, VK_ADD_DRIVER_FILES: undefined };

/** What `info --json` prints. */
async function infoJson(args: readonly string[] = [], options: RunOptions = {}) {
  const { code, stdout, notes } = await runCli(["info", "--json", "-m", model, ...args], options);
  return { code, notes, info: JSON.parse(stdout) };
}

describe("info", () => {
  for (const runtime of runtimes) {
    test(`on ${runtime}: --json names the adapters, the chosen one, its kernels and what fits`, async () => {
      const { code, notes, info } = await infoJson([], { runtime });
      expect(Object.keys(info).sort()).toEqual(KEYS);
      expect(info).toMatchObject({ model, problem: null, largest_context: 64, measured: null });
      expect(info.runtime).toMatch(runtime === "bun" ? /^Bun \d/ : /^Deno \d/);
      expect(info.webgpu).toBe(packages.dependencies.webgpu);
      expect(info.adapters).toContainEqual(info.chosen);
      expect(["f16", "f32"]).toContain(info.dtype);
      expect(info.chosen.maxBufferBytes).toBeGreaterThan(0);
      expect(info.kernels.length).toBeGreaterThan(5);
      for (const kernel of info.kernels) {
        expect(kernel).toMatchObject({ role: expect.any(String), chosen: { kernel: expect.any(String) } });
      }
      expect(info.sizes.map(({ model }: { model: string }) => model))
        .toEqual(["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]);
      for (const { weights_bytes, bytes, largest_context, limit } of info.sizes) {
        for (const context of ["1024", "16384", "65536"]) {
          if (Number(context) <= largest_context) expect(bytes[context]).toBeGreaterThan(weights_bytes);
          else expect(bytes[context]).toBeNull();
        }
        expect(limit).toContain(`A context of ${largest_context + 1} tokens does not fit in ${info.dtype}: `);
      }
      expect({ code, notes }).toEqual({ code: 0, notes: "" });
    });

    test(`on ${runtime}: without an adapter exit code 3, and still a report`, async () => {
      const env = { ...UNSET, VK_DRIVER_FILES: "/nonexistent" };
      const { code, notes, info } = await infoJson([], { runtime, env });
      expect(Object.keys(info).sort()).toEqual(KEYS);
      expect(info).toMatchObject({ adapters: [], chosen: null, dtype: null, kernels: [], sizes: [] });
      const [why] = info.findings;
      expect(info.problem).toEqual({
        message: `No Vulkan adapter was found on this machine: ${why.message}`,
        hint: why.hint,
      });
      expect({ code, notes }).toEqual({ code: 3, notes: "" });
    });
  }

  test("an adapter that lacks f16 is shown, with the problem and exit code 1", async () => {
    const preload = join(import.meta.dir, "../support/no_f16.ts");
    const { code, info } = await infoJson(["--dtype", "f16"], { preload });
    expect(info).toMatchObject({ chosen: { f16: false }, dtype: null, largest_context: null, kernels: [] });
    expect(info.problem).toEqual({
      message: `${info.chosen.name} does not support f16 in shaders`,
      hint: expect.stringContaining("`--dtype f32`"),
    });
    expect(code).toBe(1);
    const text = await runCli(["info", "-m", model, "--dtype", "f16"], { preload });
    expect(text).toMatchObject({
      code: 1,
      stdout: expect.stringContaining(`a run takes ${info.chosen.name}`),
    });
    expect(text.notes).toContain(`error: ${info.problem.message}\n\nhint: `);
  });

  test("heads without a kernel are a problem, beside the other kernels, and exit code 4", async () => {
    const dir = writeTinyModel(join(folder.path, "large heads")).dir;
    const path = join(dir, "config.json");
    const config = { ...JSON.parse(readFileSync(path, "utf8")), n_embd: 9000, n_head: 1 };
    writeFileSync(path, JSON.stringify(config));
    const { code, info } = await infoJson(["-m", dir]);
    expect(info.problem).toEqual({
      message: expect.stringMatching(/^No kernel for this model runs on .*: nothing for .*decode/),
      hint: expect.stringContaining("`--adapter`"),
    });
    expect(info.chosen).not.toBeNull();
    expect(info.kernels.length).toBeGreaterThan(5);
    expect(code).toBe(4);
  });

  test("prints sections for people, without colour, and with --measure what the device reaches", async () => {
    const { code, stdout, stderr } = await runCli(["info", "-m", model, "--measure"]);
    expect(stdout).toMatch(/^longform \S+ on Bun \S+, Dawn of npm webgpu \S+\n\nVulkan\n {2}loader {2}\S/);
    expect(stdout).toMatch(/\n\nadapters\n {2}0 {2}\S/);
    expect(stdout).toMatch(/\n\nwhat fits in f(16|32): .*\n {2} +weights .*\n {2}gpt2 +\d/);
    expect(stdout).toMatch(/\n\nshader cache\n {2}\S/);
    const section = stdout.slice(stdout.indexOf("\n\nmeasured\n"));
    const figures = [/ copies ([\d.,]+) GB\/s/, /-adds in f32 ([\d.]+) TFLOP\/s/, / dispatch ([\d.]+) µs\n$/];
    const measured = figures.flatMap((figure) => section.match(figure)?.[1] ?? []);
    expect(measured).toHaveLength(3);
    for (const rate of measured) expect(Number(rate.replace(",", ""))).toBeGreaterThan(0);
    expect(stdout + stderr).not.toContain("\x1b");
    expect(code).toBe(0);
  });
});

describe("a broken set-up is named by its cause:", () => {
  /** Runs `info` and, beside it, a command that needs the device. */
  async function diagnosed(env: RunOptions["env"]) {
    const [json, generate] = await Promise.all([
      infoJson([], { env: { ...UNSET, ...env } }),
      runCli(["generate", "-m", model, "x"], { env: { ...UNSET, ...env } }),
    ]);
    const { findings } = json.info;
    return {
      ...json,
      first: findings[0],
      causes: findings.map(({ cause }: { cause: string }) => cause),
      generate,
    };
  }

  test("no loader", async () => {
    // The linker does not go on behind a damaged file, so that the machine's own loader is out of reach.
    const path = writeMachine(join(folder.path, "libraries"), { "/libvulkan.so.1": "" });
    const LD_LIBRARY_PATH = [path, process.env["LD_LIBRARY_PATH"]].filter(Boolean).join(":");
    const { code, first, generate } = await diagnosed({ LD_LIBRARY_PATH });
    expect(first).toMatchObject({
      cause: "no-loader",
      message: `the Vulkan loader ${path}/libvulkan.so.1 does not load: the file is too short`,
    });
    expect(code).toBe(3);
    expect(generate).toMatchObject({ code: 3, stdout: "" });
    expect(generate.notes).toBe(
      `error: No Vulkan adapter was found on this machine: ${first.message}\n\nhint: ${first.hint}\n`,
    );
  });

  test("no driver", async () => {
    const empty = writeMachine(join(folder.path, "no drivers"), { "/icd.d": null });
    const { code, first, generate } = await diagnosed({ VK_DRIVER_FILES: `${empty}/icd.d` });
    expect(first).toMatchObject({
      cause: "no-icd",
      message: `VK_DRIVER_FILES names no driver's manifest: there is none at ${empty}/icd.d`,
    });
    expect(code).toBe(3);
    expect(generate.notes).toContain(`: ${first.message}\n\nhint: ${first.hint}\n`);
  });

  test("a too old Mesa", async () => {
    // Its manifest is that of Debian 12's Mesa 22.3.6, its library a stand-in with the same word in it.
    const root = join(folder.path, "old");
    writeMachine(root, {
      "/libvulkan_lvp.so": library({ text: "\0Mesa 22.3.6\0" }),
      "/lvp_icd.x86_64.json": manifest(`${root}/libvulkan_lvp.so`, "1.1.230"),
    });
    const { code, first, generate } = await diagnosed({ VK_DRIVER_FILES: `${root}/lvp_icd.x86_64.json` });
    expect(first.cause).toBe("old-mesa");
    expect(first.message).toContain(`${root}/libvulkan_lvp.so is Mesa 22.3.6, 23.0 or later is needed`);
    expect(code).toBe(3);
    expect(generate.notes).toContain(`: ${first.message}\n\nhint: ${first.hint}\n`);
  });

  const software = inspectVulkan().drivers.find(({ isSoftware, problem }) =>
    isSoftware && problem === undefined
  );
  test.skipIf(!software)(`only software${software ? "" : ": needs a software driver"}`, async () => {
    const { code, info, first, causes } = await diagnosed({ VK_DRIVER_FILES: software!.manifest });
    expect(first.cause).toBe("software-only");
    expect(first.message).toContain(info.adapters[0].name);
    // Where the machine has a GPU, why it is not shown follows.
    expect(causes.length > 1).toBe(info.vulkan.gpus.length > 0);
    expect(code).toBe(0);
  });
});
