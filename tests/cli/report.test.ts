/** `info` and `inspect` as processes: exit codes, and JSON that scripts can rely on. */
import { afterAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { temporaryFolder } from "../support/checkpoint.ts";
import {
  expectFailure,
  RUN_TIMEOUT_MS,
  runCli,
  runtimes,
  withoutNotices,
  writeTinyModel,
} from "../support/cli.ts";

setDefaultTimeout(RUN_TIMEOUT_MS);

const folder = temporaryFolder();
afterAll(folder.remove);
const model = writeTinyModel(join(folder.path, "tiny")).dir;
const damaged = writeTinyModel(join(folder.path, "damaged"), { omit: ["wte.weight", "ln_f.bias"] }).dir;

describe("inspect", () => {
  for (const runtime of runtimes) {
    test(`on ${runtime}: exit code 0 for a sound model, 1 for a damaged one, a report for both`, async () => {
      const sound = await runCli(["inspect", model, "--json"], { runtime });
      expect(sound).toMatchObject({ code: 0, stderr: "" });
      expect(JSON.parse(sound.stdout)).toMatchObject({
        path: model,
        problems: [],
        tokenizer: "tokenizer.json",
        tied: true,
        config: { n_layer: 2, n_embd: 8 },
        totals: { F32: { tensors: 28 } },
      });
      const broken = await runCli(["inspect", damaged, "--json"], { runtime });
      expect(broken).toMatchObject({ code: 1, stderr: "" });
      expect(JSON.parse(broken.stdout).problems).toEqual([
        expect.stringContaining("wte.weight"),
        expect.stringContaining("ln_f.bias"),
      ]);
    });
  }

  test("prints a table for people, without colour", async () => {
    const { code, stdout, stderr } = await runCli(["inspect", damaged]);
    expect({ code, stderr }).toEqual({ code: 1, stderr: "" });
    expect(stdout).toMatch(/^[\x20-\x7e\n]+\nproblem: .*wte\.weight.*\nproblem: .*ln_f\.bias.*\n$/);
  });

  test("a missing folder is an error", async () => {
    expectFailure(await runCli(["inspect", join(folder.path, "none"), "--json"]), 1, /no model folder/);
  });
});

describe("info", () => {
  const keys = [
    ...["adapters", "chosen", "dtype", "kernels", "largest_context"],
    ...["model", "problem", "runtime", "version"],
  ];

  for (const runtime of runtimes) {
    test(`on ${runtime}: --json names the adapters, the chosen one and its kernels`, async () => {
      const { code, stdout } = await runCli(["info", "--json", "-m", model], { runtime });
      const info = JSON.parse(stdout);
      expect(Object.keys(info).sort()).toEqual(keys);
      expect(info).toMatchObject({ model, problem: null, largest_context: 64 });
      expect(info.runtime).toMatch(runtime === "bun" ? /^Bun \d/ : /^Deno \d/);
      expect(info.adapters).toContainEqual(info.chosen);
      expect(["f16", "f32"]).toContain(info.dtype);
      expect(info.chosen.maxBufferBytes).toBeGreaterThan(0);
      expect(info.kernels.length).toBeGreaterThan(5);
      for (const kernel of info.kernels) {
        expect(kernel).toMatchObject({ role: expect.any(String), chosen: { kernel: expect.any(String) } });
      }
      expect(code).toBe(0);
    });

    test(`on ${runtime}: without an adapter exit code 3, and still a report`, async () => {
      const env = {
        VK_DRIVER_FILES: "/nonexistent",
        VK_ICD_FILENAMES: undefined,
        VK_ADD_DRIVER_FILES: undefined,
      };
      const { code, stdout, notes } = await runCli(["info", "--json", "-m", model], { runtime, env });
      const info = JSON.parse(stdout);
      expect(Object.keys(info).sort()).toEqual(keys);
      expect(info).toMatchObject({ adapters: [], chosen: null, dtype: null, kernels: [] });
      expect(info.problem).toEqual({
        message: expect.stringContaining("No Vulkan adapter"),
        hint: expect.stringMatching(/install/),
      });
      expect({ code, notes: withoutNotices(notes) }).toEqual({ code: 3, notes: "" });
    });
  }

  test("an adapter that lacks f16 is shown, with the problem and exit code 1", async () => {
    const preload = join(import.meta.dir, "../support/no_f16.ts");
    const args = ["info", "-m", model, "--dtype", "f16"];
    const { code, stdout } = await runCli([...args, "--json"], { preload });
    const info = JSON.parse(stdout);
    expect(info).toMatchObject({ chosen: { f16: false }, dtype: null, largest_context: null, kernels: [] });
    expect(info.problem).toEqual({
      message: `${info.chosen.name} does not support f16 in shaders`,
      hint: expect.stringContaining("`--dtype f32`"),
    });
    expect(code).toBe(1);
    const text = await runCli(args, { preload });
    expect(text).toMatchObject({
      code: 1,
      stdout: expect.stringContaining(`a run takes ${info.chosen.name}`),
    });
    expect(text.notes).toContain(`error: ${info.problem.message}\n\nhint: `);
  });

  test("heads for which there is no kernel are a problem, with the kernels that there are, and exit code 1", async () => {
    const dir = writeTinyModel(join(folder.path, "large heads")).dir;
    const path = join(dir, "config.json");
    const config = { ...JSON.parse(readFileSync(path, "utf8")), n_embd: 9000, n_head: 1 };
    writeFileSync(path, JSON.stringify(config));
    const { code, stdout } = await runCli(["info", "-m", dir, "--json"]);
    const info = JSON.parse(stdout);
    expect(info.problem).toEqual({
      message: expect.stringMatching(/^No kernel for this model runs on .*: nothing for .*decode/),
      hint: expect.stringContaining("`--adapter`"),
    });
    expect(info.chosen).not.toBeNull();
    expect(info.kernels.length).toBeGreaterThan(5);
    expect(code).toBe(4);
  });

  test("prints a list for people, without colour", async () => {
    const { code, stdout, stderr } = await runCli(["info", "-m", model]);
    expect(stdout).toMatch(/^longform \S+ on Bun \S+\n\nadapters\n {2}0 {2}\S/);
    expect(stdout + stderr).not.toContain("\x1b");
    expect(code).toBe(0);
  });
});
