/** Files that change or shrink while they are read: an error that names them, never a result of half of them. */
import { afterAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { appendFileSync, readFileSync, renameSync, truncateSync, utimesSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { openJsonl } from "../../src/cli/documents.ts";
import { readConfig } from "../../src/model/config.ts";
import { Gpt2 } from "../../src/model/gpt2.ts";
import { openCheckpoint } from "../../src/model/safetensors.ts";
import { openSession, saveSession } from "../../src/model/session.ts";
import { type Gpu, openDevice } from "../../src/runtime/device.ts";
import { ModelError } from "../../src/runtime/errors.ts";
import { temporaryFolder } from "../support/checkpoint.ts";
import { expectFailure, RUN_TIMEOUT_MS, runCli, writeTinyModel } from "../support/cli.ts";
import { loadModel } from "../support/model.ts";

setDefaultTimeout(2 * RUN_TIMEOUT_MS);

const folder = temporaryFolder();
afterAll(folder.remove);
const preload = join(import.meta.dir, "../support/at_file_call.ts");
let folders = 0;

function newModel(): string {
  return writeTinyModel(join(folder.path, String(folders++)), { classes: 3, config: { nPositions: 1024 } })
    .dir;
}

function written(name: string, content: string): string {
  const path = join(folder.path, name);
  writeFileSync(path, content);
  return path;
}

describe("a checkpoint", () => {
  /** Loads a model, and changes its weights when half of them are on the device. */
  async function loadChanging(gpu: Gpu, change: (path: string, bytes: Buffer) => void): Promise<unknown> {
    const dir = newModel();
    const path = join(dir, "model.safetensors");
    const source = await openCheckpoint(dir);
    try {
      let isChanged = false;
      const options = {
        context: 64,
        elem: "f32",
        onLoad: (done: number, total: number) => {
          if (isChanged || done < total / 2) return;
          isChanged = true;
          change(path, readFileSync(path));
        },
      } as const;
      const model = await Gpt2.load(gpu, source, await readConfig(dir), options);
      model.destroy();
      return undefined;
    } catch (error) {
      return error;
    } finally {
      await source.close();
    }
  }

  const changes: readonly (readonly [name: string, change: (path: string, bytes: Buffer) => void])[] = [
    ["cut short", (path, bytes) => truncateSync(path, bytes.length - 100)],
    ["emptied", (path) => truncateSync(path, 0)],
    ["appended to", (path) => appendFileSync(path, "more")],
    ["written over by another of the same size", (path, bytes) => writeFileSync(path, bytes.fill(1, 20_000))],
  ];
  for (const [name, change] of changes) {
    test(`that is ${name} while it is loaded is an error, and nothing stays on the device`, async () => {
      const gpu = await openDevice();
      const error = await loadChanging(gpu, change);
      expect(error).toBeInstanceOf(ModelError);
      expect((error as ModelError).message).toMatch(/model\.safetensors (was changed|ended) while .*read/);
      expect((error as ModelError).hint).toBe("make sure nothing writes to the file, then try again");
      expect(gpu.memory.totalBytes).toBe(0);
      gpu.destroy();
    });
  }

  test("that another file replaces while it is loaded is the one that was opened", async () => {
    const gpu = await openDevice();
    const replace = (path: string) => {
      renameSync(written("other", "no model"), path);
    };
    expect(await loadChanging(gpu, replace)).toBeUndefined();
    gpu.destroy();
  });

  test("that shrinks between its header and its weights: exit code 1", async () => {
    const dir = newModel();
    const env = { AT_READ: "3", TRUNCATE: join(dir, "model.safetensors") };
    const result = await runCli(["generate", "-m", dir, "x"], { preload, env });
    expectFailure(
      result,
      1,
      /model\.safetensors (was changed|ended) while .*\n\nhint: make sure nothing writes/,
    );
  });
});

describe("a session", () => {
  const changes: readonly (readonly [name: string, change: (path: string) => void])[] = [
    ["shrinks", (path) => truncateSync(path, 1000)],
    ["is written to", (path) => utimesSync(path, 1, 1)],
  ];
  for (const [name, change] of changes) {
    test(`that ${name} while it is restored is an error`, async () => {
      const gpu = await openDevice();
      const model = await loadModel(gpu, newModel(), { context: 64, elem: "f32" });
      const path = join(folder.path, "prefix.session");
      const ids = Uint32Array.from({ length: 20 }, (_, i) => i);
      const logits = await model.prefill(ids);
      const origin = { model: "m", positions: "exact", attention: "dense" };
      await saveSession(path, { ...origin, ids, logits, rows: model.cache });
      model.truncate(0);
      const session = (await openSession(path))!;
      const onProgress = (done: number, total: number) => {
        if (done === total / 4) change(path);
      };
      const error = await session.restore(model.cache, 20, { onProgress }).catch((reason: unknown) => reason);
      expect(error).toBeInstanceOf(ModelError);
      expect((error as ModelError).message).toMatch(/prefix\.session (was changed|ended) while .*read/);
      expect((error as ModelError).hint).toBe("make sure nothing writes to the file, then try again");
      await session.close();
      model.destroy();
      gpu.destroy();
    });
  }
});

describe("a text", () => {
  const SHRUNK = /Cannot read .*shrinking\.txt: it was cut short while it was read/;

  test("that shrinks while it is read: exit code 1 in generate, score and classify", async () => {
    const dir = newModel();
    const path = join(folder.path, "shrinking.txt");
    const run = async (...[command, ...args]: readonly string[]) => {
      const text = "some words ".repeat(20);
      writeFileSync(path, text);
      return await runCli([command!, "-m", dir, ...args, path], {
        preload,
        env: { AT_READ: "1", LENGTH: String(text.length), TRUNCATE: path },
      });
    };
    expectFailure(await run("generate", "-n", "1", "-f"), 1, SHRUNK);
    expectFailure(await run("score", "--json"), 1, SHRUNK);
    const { code, stdout } = await run("classify", "--json");
    expect(code).toBe(1);
    expect(JSON.parse(stdout)).toMatchObject([{ id: path, error: expect.stringMatching(SHRUNK) }]);
  });

  test("of JSON lines that shrinks while it is read ends the run, behind the lines that were whole", async () => {
    const record = (id: number) => JSON.stringify({ id, text: "word ".repeat(100) }) + "\n";
    const path = written("records.jsonl", Array.from({ length: 2000 }, (_, id) => record(id)).join(""));
    const collection = await openJsonl([path], {});
    const seen: (string | number)[] = [];
    const reading = (async () => {
      for await (const { id } of collection.documents()) {
        seen.push(id);
        if (id === 3) truncateSync(path, 400_000);
      }
    })();
    const error = await reading.then(() => undefined, (reason: unknown) => reason);
    expect(error).toMatchObject({
      name: "InputError",
      message: `Cannot read ${path}: it was cut short while it was read`,
      hint: "make sure nothing writes to the file, then try again",
    });
    expect(seen).toEqual(seen.map((_, i) => i));
    expect(seen.length).toBeWithin(4, 2000);
    await collection.close();
  });
});
