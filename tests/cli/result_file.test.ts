import { afterAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import {
  appendFileSync,
  mkdirSync,
  readFileSync,
  rmSync,
  statSync,
  truncateSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import { ResultFile } from "../../src/cli/result_file.ts";
import { InputError, OutputError } from "../../src/runtime/errors.ts";
import { temporaryFolder } from "../support/checkpoint.ts";
import { deno, RUN_TIMEOUT_MS, runtimes } from "../support/cli.ts";
import { uniformArray } from "../support/random.ts";

setDefaultTimeout(RUN_TIMEOUT_MS);

const folder = temporaryFolder();
afterAll(folder.remove);
let files = 0;

const LABELS = ["no", "yes"];

function newPath(): string {
  return join(folder.path, `results ${files++}.jsonl`);
}

function result(id: string | number): object {
  return { id, label: "yes", logits: { yes: 1.5, no: -2 } };
}

function line(value: unknown): string {
  return JSON.stringify(value) + "\n";
}

function written(content: string | Uint8Array): string {
  const path = newPath();
  writeFileSync(path, content);
  return path;
}

function resumed(path: string): Promise<ResultFile> {
  return ResultFile.open(path, { resume: true, labels: LABELS });
}

function rejection(promise: Promise<unknown>): Promise<unknown> {
  return promise.then(() => undefined, (error: unknown) => error);
}

function thrown(action: () => void): unknown {
  try {
    action();
  } catch (error) {
    return error;
  }
  return undefined;
}

/** A file with `count` results whose ids count from 0. */
async function fileOf(count: number): Promise<string> {
  const path = newPath();
  const file = await ResultFile.open(path, { resume: false, labels: LABELS });
  for (let id = 0; id < count; id++) file.write(result(id));
  await file.close();
  return path;
}

describe("a new ResultFile", () => {
  test("holds each value as a line at once", async () => {
    const path = newPath();
    const file = await ResultFile.open(path, { resume: false, labels: LABELS });
    expect(file.done).toBe(0);
    expect(readFileSync(path, "utf8")).toBe("");
    const values = [
      result("a"),
      { id: 2, error: "naïve – 東京 🎉\n" },
      result("x".repeat(1_000_000)),
      result("\ud800"),
    ];
    for (const [i, value] of values.entries()) {
      file.write(value);
      expect(readFileSync(path, "utf8")).toBe(values.slice(0, i + 1).map(line).join(""));
    }
    file.finishSkipping();
    await file.close();
    await file.close();
    expect(readFileSync(path, "utf8")).toBe(values.map(line).join(""));
  });

  test("takes an empty file, with `resume` or without", async () => {
    for (const resume of [false, true]) {
      const file = await ResultFile.open(written(""), { resume, labels: LABELS });
      expect(file.done).toBe(0);
      await file.close();
    }
    const file = await resumed(newPath());
    expect(file.done).toBe(0);
    await file.close();
  });

  test("refuses a file that holds anything, and leaves it as it is", async () => {
    for (const content of [line(result(1)), "notes", "\n"]) {
      const path = written(content);
      expect(await rejection(ResultFile.open(path, { resume: false, labels: LABELS }))).toMatchObject({
        name: "InputError",
        message: `${path} is not empty`,
        hint: "add `--resume` to go on with the results in it, or name another file",
      });
      expect(readFileSync(path, "utf8")).toBe(content);
    }
  });

  test("says why a file cannot be written", async () => {
    const missing = join(folder.path, "none", "out.jsonl");
    const isDirectory = join(folder.path, "a folder");
    mkdirSync(isDirectory);
    const cases = [
      [missing, `Cannot write ${missing}: there is no folder ${join(folder.path, "none")}`],
      [isDirectory, `Cannot write ${isDirectory}: it is a folder`],
      ["/dev/null", "Cannot write /dev/null: it is not a regular file"],
    ];
    for (const [path, message] of cases) {
      const error = await rejection(resumed(path!));
      expect(error).toBeInstanceOf(OutputError);
      expect((error as Error).message).toBe(message!);
      expect((error as OutputError).hint).toBeString();
    }
  });
});

describe("resuming", () => {
  test("goes on behind the last line", async () => {
    const path = await fileOf(3);
    const file = await resumed(path);
    expect(file.done).toBe(3);
    for (const id of [0, 1, 2]) file.matches(id);
    file.finishSkipping();
    file.write(result(3));
    await file.close();
    expect(readFileSync(path, "utf8")).toBe([0, 1, 2, 3].map((id) => line(result(id))).join(""));
  });

  test("takes ids of all kinds, documents that failed, and CRLF", async () => {
    const ids = ["", "a\nb", "naïve 東京", "\ud800", 0, -1, 0.1, 1e21, Number.MAX_SAFE_INTEGER, "5"];
    const path = written(
      ids.map((id, i) => i % 3 === 1 ? JSON.stringify({ id, error: "is empty" }) + "\r\n" : line(result(id)))
        .join(""),
    );
    const file = await resumed(path);
    expect(file.done).toBe(ids.length);
    for (const id of ids) file.matches(id);
    file.finishSkipping();
    await file.close();
  });

  test("cuts off a last line without a newline, wherever it was cut", async () => {
    const whole = line(result(0)) + line(result("naïve"));
    const last = new TextEncoder().encode(line(result("東京")));
    for (let length = 1; length < last.length; length++) {
      const path = written(Buffer.concat([Buffer.from(whole), last.subarray(0, length)]));
      const file = await resumed(path);
      expect(file.done).toBe(2);
      expect(readFileSync(path, "utf8")).toBe(whole);
      file.matches(0);
      file.matches("naïve");
      file.write(result("東京"));
      await file.close();
      expect(readFileSync(path)).toEqual(Buffer.concat([Buffer.from(whole), last]));
    }
    const zeros = written(whole + "\0".repeat(5000));
    await (await resumed(zeros)).close();
    expect(readFileSync(zeros, "utf8")).toBe(whole);
  });

  test("refuses what is no file of results, and leaves it as it is", async () => {
    const good = line(result(1));
    const cases: readonly (readonly [content: string | Uint8Array, line: number])[] = [
      ["notes", 1],
      ["notes\n", 1],
      [good + "\n", 2],
      [good + "notes", 2],
      [good + "[1]\n" + good, 2],
      [good + good + "7\n", 3],
      [good + "null\n", 2],
      [line({ logits: { yes: 1, no: 2 } }), 1],
      [line({ id: null, error: "x" }), 1],
      [line({ id: { a: 1 }, error: "x" }), 1],
      [line({ id: 1, text: "a record of the input", label: "yes" }), 1],
      [line({ id: 1, logits: null }), 1],
      [Buffer.concat([Buffer.from(good), Buffer.of(0xff, 0x0a)]), 2],
    ];
    for (const [content, number] of cases) {
      const path = written(content);
      expect(await rejection(resumed(path))).toMatchObject({
        name: "InputError",
        message: `${path}:${number} is not a result`,
      });
      expect(readFileSync(path)).toEqual(Buffer.from(content as string));
    }
  });

  test("refuses results with other labels", async () => {
    const path = written(line({ id: 1, error: "x" }) + line(result(2)));
    const hint = "resume with the model and the labels that it was begun with, or name another file";
    for (const labels of [["yes"], ["no", "yes", "maybe"], ["no", "Yes"], []]) {
      expect(await rejection(ResultFile.open(path, { resume: true, labels }))).toMatchObject({
        name: "InputError",
        message: `${path}:2 was written with the labels yes, no, those of this run are ${labels.join(", ")}`,
        hint,
      });
    }
    await (await ResultFile.open(path, { resume: true, labels: ["yes", "no"] })).close();
    const many = Array.from({ length: 77 }, (_, i) => `l${i}`);
    await expect(ResultFile.open(path, { resume: true, labels: many })).rejects.toThrow(
      "those of this run are l0, l1, l2, l3, l4 and 72 more",
    );
    const long = written(line({ id: 1, logits: { [`\x1b[2J${"x".repeat(1e6)}`]: 1 } }));
    const { message } = await rejection(resumed(long)) as Error;
    expect(message).toMatch(/with the labels \\u001b\[2Jx{80,}…, those of this run are/);
  });

  test("refuses another input: line, both ids, and what to do", async () => {
    const path = await fileOf(3);
    const hint = "resume with the input and the shard that it was begun with, or name another file";
    for (const id of ["1", 2, "b"]) {
      const file = await resumed(path);
      file.matches(0);
      const error = thrown(() => file.matches(id));
      expect(error).toBeInstanceOf(InputError);
      expect(error).toMatchObject({
        message: `${path}:2 is the result of 1, document 2 of the input is ${JSON.stringify(id)}`,
        hint,
      });
      await file.close();
    }
    const short = await resumed(path);
    short.matches(0);
    short.matches(1);
    expect(thrown(() => short.finishSkipping())).toMatchObject({
      name: "InputError",
      message: `${path} has 3 results, the input has only 2 documents`,
      hint,
    });
    await short.close();
  });

  test("goes through a file of many pieces", async () => {
    const path = await fileOf(20_000);
    expect(statSync(path).size).toBeGreaterThan(1_000_000);
    const file = await resumed(path);
    expect(file.done).toBe(20_000);
    for (let id = 0; id < 20_000; id++) file.matches(id);
    file.write(result(20_000));
    await file.close();
    expect(readFileSync(path, "utf8").split("\n").length).toBe(20_002);
  });
});

describe("another program", () => {
  test("that writes to the file, shortens it or deletes it is noticed", async () => {
    const path = await fileOf(2);
    const [first, second] = [await resumed(path), await resumed(path)];
    first.write(result(2));
    const error = thrown(() => second.write(result(2)));
    expect(error).toBeInstanceOf(OutputError);
    expect(error).toMatchObject({
      message: `Cannot write ${path}: another program has changed it meanwhile`,
      hint: "let only one run write to a file, then add `--resume`",
    });
    first.write(result(3));
    await first.close();
    await second.close();
    expect(readFileSync(path, "utf8")).toBe([0, 1, 2, 3].map((id) => line(result(id))).join(""));

    const shortened = await resumed(path);
    truncateSync(path, 10);
    expect(() => shortened.write(result(4))).toThrow("another program has changed it");
    await shortened.close();

    const deleted = await resumed(newPath());
    appendFileSync(path, "");
    rmSync(join(folder.path, `results ${files - 1}.jsonl`));
    expect(() => deleted.write(result(0))).toThrow("it has been deleted meanwhile");
    await deleted.close();
  });
});

describe("in a process of its own", () => {
  const module = JSON.stringify(join(import.meta.dir, "../../src/cli/result_file.ts"));
  /** Writes results until there are as many as asked for; every seventh is many pages long. */
  const script = join(folder.path, "writer.ts");
  writeFileSync(
    script,
    `import { ResultFile, ResultStream } from ${module};
    import process from "node:process";
    const [path, count] = process.argv.slice(2);
    const labels = ["no", "yes"];
    const out = path === "-" ? new ResultStream() : await ResultFile.open(path, { resume: true, labels });
    process.stderr.write(out.done + "\\n");
    try {
      for (let id = 0; id < Number(count); id++) {
        if (id < out.done) {
          out.matches(id);
          continue;
        }
        const note = id % 7 === 0 ? "x".repeat(40_000) : "";
        out.write({ id, label: "yes", logits: { yes: id, no: 0 }, note });
        if (id % 10 === 0) await new Promise((wake) => setTimeout(wake, 1));
      }
      out.finishSkipping();
      await out.close();
    } catch (error) {
      console.error(error.constructor.name + ": " + error.message);
      process.exit(1);
    }`,
  );
  const command = (runtime: string, ...args: readonly string[]) =>
    runtime === "bun"
      ? [process.execPath, script, ...args]
      : [deno!, "run", "-q", "--allow-read", "--allow-write", script, ...args];
  const idsOf = (content: string) =>
    content.split("\n").slice(0, -1).map((text) => (JSON.parse(text) as { id: number }).id);

  for (const runtime of runtimes) {
    test(`on ${runtime}: killed twenty times while it writes, every line comes exactly once`, async () => {
      const path = newPath();
      const delays = uniformArray(7, 20, 0, 40);
      let done = 0;
      for (const delay of delays) {
        const child = Bun.spawn(command(runtime, path, "1000000"), { stderr: "pipe" });
        const reader = child.stderr.getReader();
        const { value } = await reader.read();
        const found = Number(new TextDecoder().decode(value));
        expect(found).toBeGreaterThanOrEqual(done);
        done = found;
        await Bun.sleep(delay);
        child.kill("SIGKILL");
        await child.exited;
      }
      const file = await resumed(path);
      const total = file.done + 100;
      await file.close();
      expect(file.done).toBeGreaterThan(20);
      const last = Bun.spawn(command(runtime, path, String(total)), { stderr: "pipe" });
      expect(await last.exited).toBe(0);
      expect(idsOf(readFileSync(path, "utf8"))).toEqual(Array.from({ length: total }, (_, id) => id));
    });

    test(`on ${runtime}: a full disk leaves complete lines`, async () => {
      const path = newPath();
      // 512 or 1024 bytes each, as the shell counts.
      const shell = `trap "" XFSZ; ulimit -f 150; exec "$@"`;
      const child = Bun.spawn(["sh", "-c", shell, "sh", ...command(runtime, path, "1000")], {
        stderr: "pipe",
      });
      const stderr = await new Response(child.stderr).text();
      expect(stderr).toStartWith(`0\nOutputError: Cannot write ${path}: `);
      expect(stderr).toMatch(/file would be too large|File too large/);
      expect(await child.exited).toBe(1);
      const content = readFileSync(path, "utf8");
      expect(content.at(-1)).toBe("\n");
      const ids = idsOf(content);
      expect(ids.length).toBeGreaterThanOrEqual(7);
      expect(ids).toEqual(ids.map((_, i) => i));
    });

    test(`on ${runtime}: stdout takes the same lines, and says when nobody reads`, async () => {
      const child = Bun.spawn(command(runtime, "-", "3"), { stderr: "ignore" });
      expect(idsOf(await new Response(child.stdout).text())).toEqual([0, 1, 2]);
      const closed = Bun.spawn(["sh", "-c", `"$@" | true`, "sh", ...command(runtime, "-", "1000")], {
        stderr: "pipe",
      });
      expect(await new Response(closed.stderr).text()).toBe("0\nClosedPipe: stdout was closed\n");
    });
  }
});
