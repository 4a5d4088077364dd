/** A device that is lost at any point of any command: one sentence, exit code 1, and what was done is not lost with it. */
import { afterAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { temporaryFolder } from "../support/checkpoint.ts";
import { RUN_TIMEOUT_MS, runCli, type RunResult, withoutNotices, writeTinyModel } from "../support/cli.ts";
import { verdictsIn } from "../support/faults.ts";

setDefaultTimeout(2 * RUN_TIMEOUT_MS);

const folder = temporaryFolder();
afterAll(folder.remove);
const model = writeTinyModel(join(folder.path, "tiny"), { classes: 3, config: { nPositions: 1024 } }).dir;
const preload = join(import.meta.dir, "../support/lose_device.ts");
const records = join(folder.path, "records.jsonl");
writeFileSync(
  records,
  Array.from({ length: 12 }, (_, i) => JSON.stringify({ id: i, text: `text ${i} `.repeat(20) }) + "\n").join(
    "",
  ),
);

/** Runs until the device has been given so many submissions; 0 loses it while the model is loaded. */
async function losing(after: number, args: readonly string[], stdin?: string): Promise<RunResult> {
  const env = { LOSE_DEVICE_AFTER: String(after) };
  const result = await runCli(args, { preload, env, ...stdin === undefined ? {} : { stdin } });
  expect(withoutNotices(result.notes)).toMatch(/^\n?error: The GPU device was lost[^\n]*\n\nhint: [^\n]*\n$/);
  expect(result.code).toBe(1);
  return result;
}

describe("a device lost", () => {
  test("in score: exit code 1, and what was scored before is a whole document", async () => {
    const args = ["score", "-m", model, "--json", "--window", "16"];
    const { stdout } = await losing(0, [...args, records]);
    expect(stdout).toBe("");
    const short = join(folder.path, "short.txt");
    writeFileSync(short, "a few words");
    // One window of the first file, then many of the second.
    const after = await losing(20, [...args, short, records]);
    const found = JSON.parse(after.stdout) as { file: string; scored: number }[];
    expect(found.map(({ file, scored }) => ({ file, scored }))).toEqual([{ file: short, scored: 10 }]);
  });

  test("in classify: exit code 1, complete lines, and --resume gives what an undisturbed run gives", async () => {
    const args = ["classify", "-m", model, "--jsonl", records, "--batch", "1"];
    const whole = verdictsIn((await runCli(args)).stdout);
    expect(whole).toHaveLength(12);
    const out = join(folder.path, "out.jsonl");
    await losing(0, [...args, "--out", out]);
    expect(readFileSync(out, "utf8")).toBe("");
    await losing(6, [...args, "--out", out, "--resume"]);
    const part = verdictsIn(readFileSync(out, "utf8"));
    expect(part.length).toBeWithin(1, 12);
    expect(part).toEqual(whole.slice(0, part.length));
    const resumed = await runCli([...args, "--out", out, "--resume", "-q"]);
    expect({ code: resumed.code, notes: resumed.notes }).toEqual({ code: 0, notes: "" });
    expect(verdictsIn(readFileSync(out, "utf8"))).toEqual(whole);
    const { stdout } = await losing(6, args);
    expect(verdictsIn(stdout)).toEqual(whole.slice(0, verdictsIn(stdout).length));
  });

  test("in generate --prompts: exit code 1, and a line for each prompt that was done", async () => {
    // The first prompt is decoded for long, the others end beside it.
    const prompts = [
      { id: "long", prompt: "x" },
      ...Array.from({ length: 3 }, (_, id) => ({ id, prompt: "" })),
    ];
    const stdin = prompts.map((one) => JSON.stringify(one) + "\n").join("");
    const args = ["generate", "-m", model, "--prompts", "-", "-n", "900", "--ignore-eos", "--batch", "2"];
    const { stdout } = await losing(12, args, stdin);
    const lines = stdout.split("\n").slice(0, -1).map((line): unknown => JSON.parse(line));
    expect(lines).toEqual([0, 1, 2].map((id) => ({ line: id + 2, id, error: "the prompt is empty" })));
  });

  test("in bench: exit code 1, and no figures", async () => {
    const args = ["bench", "-m", model, "--contexts", "64", "--runs", "20", "--phases", "decode"];
    // Behind the 13 submissions that measure the device's own rates.
    expect((await losing(100, args)).stdout).toBe("");
  });
});
