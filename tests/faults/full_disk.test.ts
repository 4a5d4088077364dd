/** A disk that is full at any byte: what was there stays, nothing half-written does, and the next run works. */
import { afterAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { existsSync, mkdirSync, readdirSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { type KvRows, openSession, saveSession } from "../../src/model/session.ts";
import { OutputError } from "../../src/runtime/errors.ts";
import { temporaryFolder } from "../support/checkpoint.ts";
import {
  expectFailure,
  RUN_TIMEOUT_MS,
  runCli,
  type RunResult,
  runShell,
  type Runtime,
  runtimes,
  withoutNotices,
  writeTinyModel,
} from "../support/cli.ts";
import { temporariesIn, verdictsIn } from "../support/faults.ts";
import { withRoom } from "../support/fill_disk.ts";
import { uniformArray } from "../support/random.ts";

setDefaultTimeout(2 * RUN_TIMEOUT_MS);

const folder = temporaryFolder();
afterAll(folder.remove);
const config = { nPositions: 1024 };
const model = writeTinyModel(join(folder.path, "tiny"), { classes: 3, config }).dir;
const PROMPT = "it was the best of times ".repeat(20);
let folders = 0;

function newFolder(): string {
  const path = join(folder.path, String(folders++));
  mkdirSync(path);
  return path;
}

/** Where the small disk is mounted, for the command alone. */
const disk = newFolder();

const canMount = process.platform === "linux" && Bun.which("unshare") !== null &&
  Bun.spawnSync(["unshare", "-rm", "mount", "-t", "tmpfs", "-o", "size=4k", "none", disk]).success;
const noMount = canMount ? "" : ": needs Linux and user namespaces";

/** Runs on a disk of `kib` KiB that holds what `dir` holds; afterwards `dir` holds what the disk does. */
async function runOnDisk(
  kib: number,
  dir: string,
  args: readonly string[],
  { runtime, redirection = "" }: { readonly runtime?: Runtime; readonly redirection?: string } = {},
): Promise<RunResult> {
  const after = newFolder();
  const script = `mount -t tmpfs -o size=${kib}k none ${disk}; cp ${dir}/* ${disk}; "$@" ${redirection}; ` +
    `code=$?; cp -a ${disk}/. ${after}; exit $code`;
  const result = await runShell(
    `exec unshare -rm sh -c '${script}' sh "$@"`,
    args,
    runtime ? { runtime } : {},
  );
  rmSync(dir, { recursive: true });
  renameSync(after, dir);
  return { ...result, notes: result.notes.replace(/^cp: .*\n/gm, "") };
}

const NO_SPACE = /error: Cannot write (\S+): there is no space left\n\nhint: free some space/;

describe("a full disk", () => {
  test("at any byte of a session: the one before stays, and nothing else", async () => {
    const dir = newFolder();
    const path = join(dir, "prefix.session");
    const rows = { layers: 2, heads: 2, headDim: 4, elem: "f32" } as const;
    const contents = (tokens: number) => ({
      model: "m",
      positions: "exact",
      attention: "dense",
      ids: new Uint32Array(tokens),
      logits: new Float32Array(8),
      rows: {
        ...rows,
        async *read() {
          yield new Uint8Array(2 * tokens * 16);
        },
        write: () => {},
      } satisfies KvRows,
    });
    await saveSession(path, contents(30));
    const size = readFileSync(path).length;
    await saveSession(path, contents(10));
    const before = readFileSync(path);
    for (const share of [0, ...uniformArray(1, 100, 0, 1)]) {
      const save = () => saveSession(path, contents(30));
      const error = await withRoom(Math.floor(share * size), save).then(() => undefined, (e: unknown) => e);
      expect(error).toBeInstanceOf(OutputError);
      expect(error).toMatchObject({
        message: `Cannot write ${path}: there is no space left`,
        hint: "free some space, or choose another disk",
      });
      expect(readFileSync(path).equals(before)).toBe(true);
      expect(readdirSync(dir)).toEqual(["prefix.session"]);
    }
    await withRoom(size, () => saveSession(path, contents(30)));
    expect(readFileSync(path).length).toBe(size);
  });

  for (const runtime of runtimes) {
    const saving = `on ${runtime}: while a session is saved: exit code 1, no file, and the next run saves it`;
    test.skipIf(!canMount)(saving + noMount, async () => {
      const dir = newFolder();
      const args = ["generate", "-m", model, "-n", "2", "-q", PROMPT, "--session"];
      const full = await runOnDisk(40, dir, [...args, join(disk, "prefix.session")], { runtime });
      expectFailure(full, 1, NO_SPACE);
      expect(full.notes).toContain(join(disk, "prefix.session"));
      expect(readdirSync(dir)).toEqual([]);
      const path = join(dir, "prefix.session");
      expect((await runCli([...args, path], { runtime })).code).toBe(0);
      const session = (await openSession(path))!;
      expect(session.tokens).toBe(PROMPT.length);
      await session.close();
    });

    const out = `on ${runtime}: under --out: exit code 1, complete lines, and --resume goes on`;
    test.skipIf(!canMount)(out + noMount, async () => {
      const dir = newFolder();
      const records = join(folder.path, "records.jsonl");
      const texts = Array.from({ length: 40 }, (_, id) => JSON.stringify({ id, text: `text ${id}` }) + "\n");
      writeFileSync(records, texts.join(""));
      const args = ["classify", "-m", model, "--jsonl", records, "-q", "--out"];
      expectFailure(await runOnDisk(8, dir, [...args, join(disk, "out.jsonl")], { runtime }), 1, NO_SPACE);
      const path = join(dir, "out.jsonl");
      const part = verdictsIn(readFileSync(path, "utf8"));
      expect(part.length).toBeWithin(1, 40);
      expect((await runCli([...args, path, "--resume"], { runtime })).code).toBe(0);
      const whole = verdictsIn(readFileSync(path, "utf8"));
      expect(whole).toMatchObject(texts.map((_, id) => ({ id })));
      expect(whole.slice(0, part.length)).toEqual(part);
    });
  }

  const tracing = "while a trace is written: exit code 1, and the text that was generated stays";
  test.skipIf(!canMount)(tracing + noMount, async () => {
    const dir = newFolder();
    writeFileSync(join(dir, "trace.json"), "before");
    const args = ["generate", "-m", model, "-n", "20", "--ignore-eos", "--seed", "1", "hello"];
    const { stdout, code, notes } = await runOnDisk(8, dir, [
      ...args,
      "-q",
      "--trace",
      join(disk, "trace.json"),
    ]);
    expect(code).toBe(1);
    expect(withoutNotices(notes)).toMatch(NO_SPACE);
    expect(stdout).toBe((await runCli([...args, "-q"])).stdout);
    expect(readdirSync(dir)).toEqual(["trace.json"]);
    expect(readFileSync(join(dir, "trace.json"), "utf8")).toBe("before");
  });

  const reporting = "while a report is written: exit code 1, and no page";
  test.skipIf(!canMount)(reporting + noMount, async () => {
    const dir = newFolder();
    const from = join(folder.path, "rows.json");
    const ms = { min: 1, median: 1, max: 1 };
    const row = {
      phase: "prefill",
      variant: "flash",
      context: 64,
      dtype: "f32",
      ms,
      tokens_per_s: 1,
      tflops: 1,
    };
    const about = { adapter: "a", driver: "d", runtime: "r", version: "v", model: "m", runs: 1, heads: 2 };
    const rates = { kernel_clock: "gpu", copy_gb_per_s: 1, peak_tflops: 1, peak_unit: "fma" };
    const rows = [{ ...row, gb_per_s: null, peak_bytes: 1 }];
    writeFileSync(from, JSON.stringify({ ...about, ...rates, rows }));
    const args = ["bench", "--from", from, "-q", "--report"];
    expectFailure(await runOnDisk(8, dir, [...args, disk]), 1, NO_SPACE);
    expect(temporariesIn(dir)).toEqual([]);
    expect(existsSync(join(dir, "report.html"))).toBe(false);
    expect((await runCli([...args, dir])).code).toBe(0);
    expect(readFileSync(join(dir, "report.html"), "utf8")).toEndWith("</html>\n");
  });

  const printing = "under the results of --json: exit code 1, one sentence and what to do";
  test.skipIf(!canMount)(printing + noMount, async () => {
    const text = join(folder.path, "text.txt");
    writeFileSync(text, PROMPT);
    const args = ["score", "-m", model, text, "--json", "--token-nll"];
    const result = await runOnDisk(4, newFolder(), args, { redirection: `> ${join(disk, "out.json")}` });
    expectFailure(result, 1, /Cannot write to stdout: there is no space left\n\nhint: free some space/);
  });
});
