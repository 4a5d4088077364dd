/** `inspect` as a process: exit codes, and JSON that scripts can rely on. */
import { afterAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { join } from "node:path";
import { temporaryFolder } from "../support/checkpoint.ts";
import { expectFailure, RUN_TIMEOUT_MS, runCli, runtimes, writeTinyModel } from "../support/cli.ts";

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
