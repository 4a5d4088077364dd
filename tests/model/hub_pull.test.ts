import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, spyOn, test } from "bun:test";
import {
  existsSync,
  lstatSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmSync,
  statSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { type FileHandle, open } from "node:fs/promises";
import { join } from "node:path";
import { findModel, parseModelId, repoFolder } from "../../src/model/hub.ts";
import type { HubTiming } from "../../src/model/hub_client.ts";
import { type PulledModel, pullModel } from "../../src/model/hub_pull.ts";
import { openCheckpoint } from "../../src/model/safetensors.ts";
import { HubError, type LongformError, ModelError, OutputError } from "../../src/runtime/errors.ts";
import { temporaryFolder, writeIndex } from "../support/checkpoint.ts";
import { writeTinyModel } from "../support/cli.ts";
import { withEnvironment } from "../support/environment.ts";
import { type Delivery, HubServer, type Refusal } from "../support/hub_server.ts";
import { uniformArray } from "../support/random.ts";

const folder = temporaryFolder();
const environment = withEnvironment(/^(HF_|HUGGING|XDG_)/);
const NAME = "org/tiny";
const WEIGHTS = "model.safetensors";
const whole = writeTinyModel(join(folder.path, "whole")).dir;
const sharded = writeTinyModel(join(folder.path, "sharded"), { shards: 3 }).dir;
const size = statSync(join(whole, WEIGHTS)).size;

let hub: HubServer;
let caches = 0;
let notices: string[] = [];

beforeAll(async () => {
  hub = await HubServer.open(whole);
});
afterAll(async () => {
  await hub.close();
  environment.restore();
  folder.remove();
});
beforeEach(() => {
  environment.clear();
  Object.assign(process.env, { HF_ENDPOINT: hub.endpoint, HF_HOME: join(folder.path, `home ${caches++}`) });
  hub.reset();
  hub.serve(whole);
  notices = [];
});
afterEach(environment.restore);

interface Settings {
  readonly signal?: AbortSignal;
  readonly onBytes?: (name: string, bytes: number, resumed: number) => void;
  readonly timing?: Partial<HubTiming>;
}

async function pull(name = NAME, settings: Settings = {}): Promise<PulledModel> {
  return await pullModel(parseModelId(name), {
    signal: settings.signal ?? new AbortController().signal,
    userAgent: "longform/test",
    onNotice: (message) => notices.push(message),
    onBytes: ({ name }, bytes, resumed) => {
      settings.onBytes?.(name, bytes, resumed);
      if (name === WEIGHTS) hub.received(bytes);
    },
    timing: { retryMs: 1, restMs: 80, mostWaitMs: 1000, ...settings.timing },
  });
}

async function failure(work: Promise<unknown>): Promise<LongformError> {
  const error = await work.then(() => undefined, (e: unknown) => e);
  expect(error).toBeInstanceOf(Error);
  return error as LongformError;
}

const root = () => repoFolder(parseModelId(NAME));
const blobs = () => readdirSync(join(root(), "blobs")).sort();
const statuses = ({ files }: PulledModel) =>
  Object.fromEntries(files.map((file) => [file.name, file.status]));
const ranges = () => hub.transfers.filter(({ host }) => host === "cdn").map(({ range }) => range);

/** Every file of the model is in the cache, byte for byte, under Python's names, and nothing else is. */
function expectComplete(pulled: PulledModel, dir = whole): void {
  expect(pulled.files.map(({ name }) => name).sort()).toEqual(readdirSync(dir).sort());
  for (const { name, bytes, sha256 } of pulled.files) {
    const path = join(pulled.path, name);
    expect(readlinkSync(path)).toBe(`../../blobs/${hub.blobName(name)}`);
    expect(readFileSync(path).equals(readFileSync(join(dir, name)))).toBe(true);
    expect(bytes).toBe(statSync(path).size);
    expect(sha256).toBe(hub.large.has(name) ? hub.blobName(name) : undefined);
  }
  expect(blobs()).toEqual([...new Set(pulled.files.map(({ name }) => hub.blobName(name)))].sort());
}

/** What another run has left of the weights. */
function leave(bytes: Uint8Array, isAlive = false): string {
  const path = join(root(), "blobs", `${hub.blobName(WEIGHTS)}.longform-00000000.incomplete`);
  mkdirSync(join(root(), "blobs"), { recursive: true });
  writeFileSync(path, bytes);
  if (!isAlive) utimesSync(path, 0, 0);
  return path;
}

describe("a pull", () => {
  test("puts what longform needs into the cache as Python does", async () => {
    const pulled = await pull();
    expectComplete(pulled);
    expect(pulled).toMatchObject({ commit: hub.commit, path: join(root(), "snapshots", hub.commit) });
    expect(new Set(pulled.files.map(({ status }) => status))).toEqual(new Set(["downloaded"]));
    expect(readFileSync(join(root(), "refs/main"), "utf8")).toBe(hub.commit);
    expect(await findModel(NAME)).toBe(pulled.path);
    expect(notices).toEqual([]);
    expect(new Set(hub.requests.map(({ userAgent }) => userAgent))).toEqual(new Set(["longform/test"]));
  });

  test("follows the index to the shards", async () => {
    hub.serve(sharded);
    const pulled = await pull();
    expectComplete(pulled, sharded);
    const source = await openCheckpoint(await findModel(NAME));
    expect(source.tensors.size).toBe(28);
    await source.close();
  });

  test("takes nothing that is already there", async () => {
    await pull();
    hub.requests.length = 0;
    const again = await pull();
    expectComplete(again);
    expect(new Set(again.files.map(({ status }) => status))).toEqual(new Set(["cached"]));
    expect(hub.transfers).toEqual([]);
  });

  test("leaves out what longform does not need", async () => {
    for (const name of ["pytorch_model.bin", "README.md", "model.onnx", "vocab.json", "flax.msgpack"]) {
      hub.files.set(name, new Uint8Array(99));
    }
    hub.files.set("onnx", new Uint8Array(0));
    hub.listed.set("onnx", { type: "directory" });
    expectComplete(await pull());
    expect(hub.transfers.filter(({ path }) => !/(config|tokenizer)\.json$|model\.safetensors$/.test(path)))
      .toEqual([]);
  });

  test("takes tokenizer_config.json where there is one", async () => {
    hub.files.set("tokenizer_config.json", new TextEncoder().encode("{}"));
    expect(statuses(await pull())["tokenizer_config.json"]).toBe("downloaded");
  });

  test("prefers the single file, as loading does", async () => {
    hub.serve(sharded);
    hub.files.set(WEIGHTS, readFileSync(join(whole, WEIGHTS)));
    hub.large.add(WEIGHTS);
    expect(Object.keys(statuses(await pull()))).toEqual(["config.json", "tokenizer.json", WEIGHTS]);
  });

  test("notes the commit of the revision that was named", async () => {
    await pull(`${NAME}@refs/pr/7`);
    expect(readFileSync(join(root(), "refs/refs/pr/7"), "utf8")).toBe(hub.commit);
    await pull(`${NAME}@${hub.commit}`);
    expect(readdirSync(join(root(), "refs"))).toEqual(["refs"]);
  });

  test("follows a branch that moves, and keeps what was", async () => {
    const before = await pull();
    hub.commit = "f".repeat(40);
    const after = await pull();
    expect(after.path).not.toBe(before.path);
    expect(statuses(after)[WEIGHTS]).toBe("cached"); // the same blob
    expect(await findModel(NAME)).toBe(after.path);
    expect(existsSync(join(before.path, "config.json"))).toBe(true);
  });

  test("that fails does not move the branch", async () => {
    const before = await pull();
    hub.commit = "f".repeat(40);
    hub.listed.set("tokenizer.json", { oid: "0".repeat(40) }); // of another file
    expect(await failure(pull())).toBeInstanceOf(HubError);
    expect(await findModel(NAME)).toBe(before.path);
  });

  test("reports what has come", async () => {
    const seen: number[] = [];
    await pull(NAME, { onBytes: (name, bytes) => name === WEIGHTS && seen.push(bytes) });
    expect(seen[0]).toBe(0);
    expect(seen.at(-1)).toBe(size);
    expect(seen.toSorted((a, b) => a - b)).toEqual(seen);
  });
});

describe("files that are there", () => {
  test("are used, whoever has downloaded them", async () => {
    mkdirSync(join(root(), "blobs"), { recursive: true });
    writeFileSync(join(root(), "blobs", hub.blobName(WEIGHTS)), readFileSync(join(whole, WEIGHTS)));
    const pulled = await pull();
    expectComplete(pulled);
    expect(statuses(pulled)).toEqual({
      "config.json": "downloaded",
      "tokenizer.json": "downloaded",
      [WEIGHTS]: "cached",
    });
    expect(ranges()).toEqual([]);
  });

  test("are used where they are no links, too", async () => {
    const path = join(root(), "snapshots", hub.commit, WEIGHTS);
    mkdirSync(join(root(), "snapshots", hub.commit), { recursive: true });
    writeFileSync(path, readFileSync(join(whole, WEIGHTS)));
    expect(statuses(await pull())[WEIGHTS]).toBe("cached");
    expect(lstatSync(path).isFile()).toBe(true);
  });

  test.each([0, size - 1, size + 1])("are replaced if they have another size: %d", async (bytes) => {
    mkdirSync(join(root(), "blobs"), { recursive: true });
    writeFileSync(join(root(), "blobs", hub.blobName(WEIGHTS)), new Uint8Array(bytes));
    const pulled = await pull();
    expectComplete(pulled);
    expect(statuses(pulled)[WEIGHTS]).toBe("downloaded");
  });
});

/** Places of a file: its ends, and some between. */
const places = [0, 1, ...Array.from(uniformArray(9, 6, 0, 1), (u) => Math.floor(u * size)), size - 1];

describe("a connection that breaks off", () => {
  test.each(places)("after %d bytes is taken up again there", async (cutAfter) => {
    hub.deliveries = [{ cutAfter }];
    expectComplete(await pull());
    expect(ranges()).toEqual([undefined, cutAfter === 0 ? undefined : `bytes=${cutAfter}-`]);
    expect(notices).toEqual([expect.stringContaining("trying again in")]);
  });

  test.each(places.slice(1))("for good after %d bytes leaves them for the next run", async (cutAfter) => {
    hub.deliveries = [{ cutAfter }, ...Array(4).fill({ cutAfter: 0 })];
    const error = await failure(pull());
    expect(error).toBeInstanceOf(HubError);
    expect(existsSync(join(root(), "refs"))).toBe(false);
    const [left] = blobs().filter((name) => name.endsWith(".incomplete"));
    expect(statSync(join(root(), "blobs", left!)).size).toBe(cutAfter);
    hub.requests.length = 0;
    const seen: number[] = [];
    const pulled = await pull(NAME, { onBytes: (_, __, resumed) => seen.push(resumed) });
    expectComplete(pulled);
    expect(statuses(pulled)[WEIGHTS]).toBe("resumed");
    expect(new Set(seen)).toEqual(new Set([cutAfter]));
    expect(ranges()).toEqual([`bytes=${cutAfter}-`]);
  });

  test("every time comes to an end after five attempts without progress", async () => {
    hub.deliveries = Array(20).fill({ cutAfter: 0 });
    const error = await failure(pull());
    expect(error.hint).toBeDefined();
    expect(ranges().length).toBe(5);
    expect(notices.length).toBe(4);
    expect(blobs().filter((name) => name.endsWith(".incomplete"))).toEqual([]);
  });

  test.each([0, 1, 100])("is noticed when it falls silent after %d bytes", async (stallAfter) => {
    hub.deliveries = [{ stallAfter }];
    expectComplete(await pull(NAME, { timing: { stallMs: 300 } }));
    expect(notices[0]).toContain("has sent nothing for 0.3 s");
    expect(ranges()[1]).toBe(stallAfter === 0 ? undefined : `bytes=${stallAfter}-`);
  });
});

describe("a server that", () => {
  test("ignores ranges is asked for all of it", async () => {
    hub.deliveries = [{ cutAfter: 99 }, { ignoreRange: true }];
    expectComplete(await pull());
    expect(ranges()).toEqual([undefined, "bytes=99-"]);
  });

  test("sends another part than it was asked for is not believed", async () => {
    hub.deliveries = [{ cutAfter: 99 }, { shiftRange: 10 }];
    expectComplete(await pull());
    expect(ranges()).toEqual([undefined, "bytes=99-", undefined]);
  });

  test("has changed its file in between sends it from the start", async () => {
    hub.deliveries = [{ cutAfter: 99, etag: '"store-0"', corrupt: 3 }];
    expectComplete(await pull());
    expect(hub.transfers.filter(({ host }) => host === "cdn").map(({ ifRange }) => ifRange)).toEqual([
      undefined,
      '"store-0"',
    ]);
  });

  test("has a weak tag is not asked to compare it", async () => {
    hub.deliveries = [{ cutAfter: 99, etag: 'W/"store-0"' }];
    expectComplete(await pull());
    expect(hub.transfers.map(({ ifRange }) => ifRange).filter(Boolean)).toEqual([]);
  });

  test.each<Delivery>([{ lengthen: 1 }, { lengthen: -1 }, { lengthen: -1, cutAfter: 9 }, { lengthen: 4096 }])(
    "gives a wrong length once is asked again: %p",
    async (delivery) => {
      hub.deliveries = [delivery];
      expectComplete(await pull());
    },
  );

  test.each([1, -1])("always gives a wrong length, by %d, is given up", async (lengthen) => {
    hub.deliveries = Array(20).fill({ lengthen, ignoreRange: true });
    expect((await failure(pull())).message).toContain(WEIGHTS);
    expect(existsSync(join(root(), "blobs", hub.blobName(WEIGHTS)))).toBe(false);
  });

  test("has less of the file than it lists is given up", async () => {
    hub.listed.set(WEIGHTS, { size: size + 10 });
    leave(new Uint8Array(size + 1));
    expect((await failure(pull())).message).toContain(WEIGHTS);
    expect(ranges().length).toBe(5);
    expect(ranges().slice(0, 3)).toEqual([`bytes=${size + 1}-`, undefined, `bytes=${size}-`]);
  });

  test("links another file than it lists is not asked for its bytes", async () => {
    hub.listed.set(WEIGHTS, { lfs: { oid: "a".repeat(64), size, pointerSize: 134 } });
    expect((await failure(pull())).message).toContain(`sends another ${WEIGHTS} than it lists`);
  });
});

describe("a damaged file", () => {
  test.each([0, 1234, size - 1])("is removed, and downloaded once more: byte %d", async (corrupt) => {
    hub.deliveries = [{ corrupt }];
    expectComplete(await pull());
    expect(ranges()).toEqual([undefined, undefined]);
    expect(notices).toEqual([expect.stringContaining("arrived damaged and was removed")]);
  });

  test("twice is an error, and nothing of it stays", async () => {
    hub.deliveries = [{ corrupt: 7 }, { corrupt: 7 }];
    const error = await failure(pull());
    expect(error).toBeInstanceOf(HubError);
    expect(error.message).toBe(`${WEIGHTS} arrived damaged twice and was removed`);
    expect(blobs()).toEqual([hub.blobName("config.json"), hub.blobName("tokenizer.json")].sort());
    await expect(findModel(NAME)).rejects.toThrow(ModelError);
    expectComplete(await pull());
  });

  test("of the small ones is found by Git's checksum", async () => {
    const right = hub.blobName("config.json");
    hub.listed.set("config.json", { oid: right });
    hub.files.set(
      "config.json",
      new TextEncoder().encode("x".repeat(hub.files.get("config.json")!.byteLength)),
    );
    expect((await failure(pull())).message).toBe("config.json arrived damaged twice and was removed");
    expect(blobs()).toEqual([]);
  });

  test("that an earlier run has left is not completed", async () => {
    const bytes = readFileSync(join(whole, WEIGHTS)).subarray(0, 5000);
    bytes[77]! ^= 1;
    leave(bytes);
    expectComplete(await pull());
    expect(ranges()).toEqual(["bytes=5000-", undefined]);
  });

  test("that an earlier run has left and that is too long is dropped", async () => {
    leave(new Uint8Array(size + 1));
    expectComplete(await pull());
    expect(ranges()).toEqual([undefined]);
  });

  test("that an earlier run has left complete needs no network", async () => {
    leave(readFileSync(join(whole, WEIGHTS)));
    const pulled = await pull();
    expectComplete(pulled);
    expect(statuses(pulled)[WEIGHTS]).toBe("resumed");
    expect(ranges()).toEqual([]);
  });
});

describe("several processes", () => {
  test("that pull the same download it once", async () => {
    hub.deliveries = [{ stallAfter: 2000 }];
    const timing = { stallMs: 900, restMs: 400 };
    const all = await Promise.all([1, 2, 3, 4].map(() => pull(NAME, { timing })));
    for (const pulled of all) expectComplete(pulled);
    expect(ranges().sort()).toEqual(["bytes=2000-", undefined]);
    expect(notices.filter((text) => text.includes("another process is downloading")).length).toBeGreaterThan(
      0,
    );
  });

  test("are waited for while they live", async () => {
    const path = leave(new Uint8Array(10), true);
    const beat = setInterval(() => utimesSync(path, new Date(), new Date()), 10);
    setTimeout(() => {
      clearInterval(beat);
      rmSync(path);
      writeFileSync(join(root(), "blobs", hub.blobName(WEIGHTS)), readFileSync(join(whole, WEIGHTS)));
    }, 900);
    const pulled = await pull(NAME, { timing: { restMs: 400 } });
    expectComplete(pulled);
    expect(statuses(pulled)[WEIGHTS]).toBe("cached");
    expect(ranges()).toEqual([]);
  });

  test("that were killed leave what they have", async () => {
    leave(readFileSync(join(whole, WEIGHTS)).subarray(0, 4321), true);
    const pulled = await pull();
    expectComplete(pulled);
    expect(statuses(pulled)[WEIGHTS]).toBe("resumed");
    expect(ranges()).toEqual(["bytes=4321-"]);
  });

  test("that one takes for dead do no harm when they wake up", async () => {
    hub.deliveries = [{ stallAfter: 3000 }];
    const rest = () => join(root(), "blobs", blobs().find((name) => name.endsWith(".incomplete"))!);
    const sleeping = pull(NAME, { timing: { stallMs: 300 } });
    while (
      !existsSync(join(root(), "blobs")) || !blobs().some((name) => name.startsWith(hub.blobName(WEIGHTS)))
    ) {
      await Bun.sleep(5);
    }
    while (statSync(rest()).size < 3000) await Bun.sleep(5);
    utimesSync(rest(), 0, 0); // its beat has stopped
    const taking = pull();
    const [slept, took] = await Promise.all([sleeping, taking]);
    expectComplete(took);
    expectComplete(slept);
  });
});

describe("an interrupted pull", () => {
  test("keeps what it has, and goes on there", async () => {
    hub.deliveries = [{ stallAfter: 3000 }];
    const controller = new AbortController();
    const pulling = pull(NAME, {
      signal: controller.signal,
      onBytes: (name, bytes) => name === WEIGHTS && bytes === 3000 && controller.abort(),
    });
    expect(await failure(pulling)).toBe(controller.signal.reason);
    const pulled = await pull();
    expectComplete(pulled);
    expect(statuses(pulled)[WEIGHTS]).toBe("resumed");
    expect(ranges()).toEqual([undefined, "bytes=3000-"]);
  });

  test("ends at once while it waits for another attempt", async () => {
    hub.refusals = [{ status: 503, headers: { "retry-after": "60" } }];
    const controller = new AbortController();
    setTimeout(() => controller.abort(), 50);
    const started = performance.now();
    expect(await failure(pull(NAME, { signal: controller.signal, timing: { mostWaitMs: 90_000 } }))).toBe(
      controller.signal.reason,
    );
    expect(performance.now() - started).toBeLessThan(5000);
  });

  test("asks nothing when it was stopped before it began", async () => {
    expect(await failure(pull(NAME, { signal: AbortSignal.abort() }))).not.toBeInstanceOf(HubError);
    expect(hub.requests).toEqual([]);
  });
});

describe("a full disk", () => {
  test("is foreseen", async () => {
    hub.listed.set(WEIGHTS, { size: 2 ** 52 });
    const error = await failure(pull());
    expect(error).toBeInstanceOf(OutputError);
    expect(error.message).toContain("4096 TiB are to be downloaded");
    expect(ranges()).toEqual([]);
  });

  test("keeps what there was space for", async () => {
    const probe = await open(join(whole, "config.json"));
    await probe.close();
    const prototype = Object.getPrototypeOf(probe) as FileHandle;
    hub.deliveries = [{ cutAfter: 3000 }];
    const { write } = prototype;
    const full = spyOn(prototype, "write").mockImplementation(
      async function (this: FileHandle, ...args: Parameters<FileHandle["write"]>) {
        const [, , , position] = args as unknown[];
        if (position as number >= 3000) throw Object.assign(new Error("full"), { code: "ENOSPC" });
        return await (write as (...args: unknown[]) => Promise<never>).apply(this, args);
      } as FileHandle["write"],
    );
    const error = await failure(pull()).finally(() => full.mockRestore());
    expect(error).toBeInstanceOf(OutputError);
    expect(error.message).toContain(`There is no space left for ${WEIGHTS}`);
    expect(error.hint).toContain("goes on behind the 2.93 KiB");
    const pulled = await pull();
    expectComplete(pulled);
    expect(ranges().at(-1)).toBe("bytes=3000-");
  });

  test("or whatever else keeps the cache from being written is said", async () => {
    writeFileSync(process.env.HF_HOME!, "a file");
    const error = await failure(pull());
    expect(error).toBeInstanceOf(OutputError);
    expect(error.message).toStartWith("Cannot write ");
  });
});

describe("a refusal", () => {
  const cases: readonly (readonly [Refusal, token: boolean, message: string, hint: string])[] = [
    [
      { status: 401, headers: { "x-error-code": "RepoNotFound" } },
      false,
      "has no public repository",
      "set HF_TOKEN",
    ],
    [
      { status: 404, headers: { "x-error-code": "RepoNotFound" } },
      true,
      "that the token may read",
      "whose token",
    ],
    [{ status: 401 }, true, "does not accept the token", "correct HF_TOKEN"],
    [{ status: 404 }, false, "has no public repository org/tiny@v1", "check the name"],
    [
      { status: 404, headers: { "x-error-code": "RevisionNotFound" } },
      false,
      "has no revision v1",
      "/tree/main",
    ],
    [
      { status: 403, headers: { "x-error-code": "GatedRepo" } },
      true,
      "accepted its conditions",
      "the account",
    ],
    [
      { status: 401, headers: { "x-error-code": "GatedRepo" } },
      false,
      "accepted its conditions",
      "set HF_TOKEN",
    ],
    [{ status: 403 }, true, "refuses org/tiny with status 403", "whether the token"],
    [{ status: 451 }, false, "refuses org/tiny with status 451", "HF_TOKEN"],
    [{ status: 429, headers: { "retry-after": "3600" } }, false, "too many requests", "try again in 3600 s"],
  ];
  test.each(cases)("%p, token %p: %s", async (refusal, hasToken, message, hint) => {
    if (hasToken) process.env.HF_TOKEN = "hf_secret";
    hub.refusals = [refusal];
    const error = await failure(pull(`${NAME}@v1`));
    expect(error).toBeInstanceOf(HubError);
    expect(error.message).toContain(message);
    expect(error.hint).toContain(hint);
    expect(hub.requests.length).toBe(1);
    expect([error.message, error.hint, error.detail, String(error.cause), ...notices].join()).not.toContain(
      "secret",
    );
  });

  test.each([408, 429, 500, 502, 503, 504])("of status %d is tried again", async (status) => {
    hub.refusals = [{ status }, { status, headers: { "retry-after": "0" } }];
    expectComplete(await pull());
    expect(notices.length).toBe(2);
  });

  test("that goes on is an error after five attempts", async () => {
    hub.refusals = Array(9).fill({ status: 500 });
    expect((await failure(pull())).message).toContain("out of order, it answers with status 500");
    expect(hub.requests.length).toBe(5);
  });

  test("waits as long as it is told to, in seconds or until a time", async () => {
    const soon = new Date(Date.now() + 1100).toUTCString();
    hub.refusals = [{ status: 429, headers: { "retry-after": soon } }];
    const started = performance.now();
    await pull(NAME, { timing: { mostWaitMs: 5000 } });
    // Such times have whole seconds.
    expect(performance.now() - started).toBeGreaterThan(50);
  });

  test("by the store, whose address was good for a while only, gets a new address", async () => {
    hub.refuses = ({ host }) => host === "cdn";
    hub.refusals = [{ status: 403 }];
    expectComplete(await pull());
    expect(hub.requests.filter(({ host }) => host === "cdn").length).toBe(2);
    expect(hub.requests.filter(({ path }) => path.endsWith(`resolve/${hub.commit}/${WEIGHTS}`)).length).toBe(
      2,
    );
  });

  test("of a file that is listed is an error of the Hub", async () => {
    hub.refuses = ({ path }) => path.includes("/resolve/");
    hub.refusals = [{ status: 404, headers: { "x-error-code": "EntryNotFound" } }];
    expect((await failure(pull())).message).toContain("sends nothing for a file that it lists");
  });

  test("of a file that is gated comes before the weights", async () => {
    hub.refuses = ({ path }) => path.includes("/resolve/");
    hub.refusals = [{ status: 403, headers: { "x-error-code": "GatedRepo" } }];
    expect((await failure(pull())).message).toContain("conditions");
    expect(ranges()).toEqual([]);
  });

  test("to connect at all is tried again, and said", async () => {
    const gone = await HubServer.open(whole);
    const { endpoint } = gone;
    process.env.HF_ENDPOINT = endpoint;
    await gone.close();
    const error = await failure(pull());
    expect(error).toBeInstanceOf(HubError);
    expect(error.message).toBe(`The connection to ${new URL(endpoint).host} failed`);
    expect(notices.length).toBe(4);
  });
});

describe("a redirect", () => {
  const redirect = (location: string, times = 1) => {
    hub.refusals = Array(times).fill({ status: 302, headers: { location } });
  };

  test("within the Hub is followed, with the token", async () => {
    process.env.HF_TOKEN = "hf_secret";
    redirect(`/api/models/org/renamed/revision/main`);
    expectComplete(await pull());
    expect(hub.requests[1]).toMatchObject({
      path: "/api/models/org/renamed/revision/main",
      authorization: "Bearer hf_secret",
    });
  });

  test("elsewhere is followed without it", async () => {
    process.env.HF_TOKEN = hub.token = "hf_secret";
    expectComplete(await pull());
    const tokens = (host: string) => hub.requests.filter((r) => r.host === host).map((r) => r.authorization);
    expect(new Set(tokens("hub"))).toEqual(new Set(["Bearer hf_secret"]));
    expect(tokens("cdn")).toEqual([undefined]);
  });

  test("without an end is given up", async () => {
    redirect("/api/models/org/tiny/revision/main", 100);
    expect((await failure(pull())).message).toContain("redirects without an end");
  });

  test.each(["file:///etc/hostname", "data:application/json,{}", "ftp://127.0.0.1/x", "http://["])(
    "to %j is refused",
    async (location) => {
      redirect(location);
      expect((await failure(pull())).message).toContain("a redirect to something that is not on the web");
    },
  );

  test("from https to http is refused, and a token does not go over http", async () => {
    const asked: { url: string; authorization: string | null }[] = [];
    const network = spyOn(globalThis, "fetch").mockImplementation(
      ((url: URL, init: RequestInit) => {
        asked.push({ url: url.href, authorization: new Headers(init.headers).get("authorization") });
        return Promise.resolve(
          new Response(null, { status: 302, headers: { location: "http://hub.invalid/x" } }),
        );
      }) as typeof fetch,
    );
    try {
      process.env.HF_TOKEN = "hf_secret";
      process.env.HF_ENDPOINT = "https://hub.invalid/";
      expect((await failure(pull())).message).toContain("not over https any more");
      expect(asked).toEqual([{
        url: expect.stringMatching(/^https:\/\/hub\.invalid\/api\//),
        authorization: "Bearer hf_secret",
      }]);
      asked.length = 0;
      process.env.HF_ENDPOINT = "http://hub.invalid/mirror/";
      await failure(pull());
      expect(asked[0]!.url).toStartWith("http://hub.invalid/mirror/api/models/org/tiny/revision/main?");
      expect(new Set(asked.map(({ authorization }) => authorization))).toEqual(new Set([null]));
      expect(notices).toEqual([expect.stringContaining("hub.invalid is asked without your token")]);
    } finally {
      network.mockRestore();
    }
  });
});

describe("the token", () => {
  const sent = async () => {
    hub.requests.length = 0;
    await pull();
    return hub.requests[0]!.authorization;
  };

  test("is read where Python reads it", async () => {
    expect(await sent()).toBeUndefined();
    mkdirSync(process.env.HF_HOME!, { recursive: true });
    writeFileSync(join(process.env.HF_HOME!, "token"), "from-home\n");
    expect(await sent()).toBe("Bearer from-home");
    process.env.HF_TOKEN_PATH = join(folder.path, "a token");
    writeFileSync(process.env.HF_TOKEN_PATH, " from-path ");
    expect(await sent()).toBe("Bearer from-path");
    process.env.HUGGING_FACE_HUB_TOKEN = "from-old-name";
    expect(await sent()).toBe("Bearer from-old-name");
    process.env.HF_TOKEN = "from-name";
    expect(await sent()).toBe("Bearer from-name");
    process.env.HF_HUB_DISABLE_IMPLICIT_TOKEN = "1";
    expect(await sent()).toBeUndefined();
  });

  test("with other characters is refused, and not shown", async () => {
    process.env.HF_TOKEN = "sec ret\r\nx: y";
    const error = await failure(pull());
    expect(error.message).toBe("The token for the Hub has characters that no token has");
    expect(hub.requests).toEqual([]);
  });
});

describe("an endpoint", () => {
  test.each(["huggingface.co", "ftp://x", "https://user:password@hub.invalid", "http://"])(
    "%s is none",
    async (text) => {
      process.env.HF_ENDPOINT = text;
      const error = await failure(pull());
      expect(error.message).toBe("HF_ENDPOINT is not the address of a Hub");
    },
  );
});

describe("a repository that is no use", () => {
  const json = (value: unknown) => new TextEncoder().encode(JSON.stringify(value));

  test.each(["config.json", "tokenizer.json", WEIGHTS])(
    "without %s is refused before the weights come",
    async (name) => {
      hub.files.delete(name);
      const error = await failure(pull());
      expect(error).toBeInstanceOf(ModelError);
      expect(error.message).toContain(`org/tiny has no ${name}`);
      expect(ranges()).toEqual([]);
    },
  );

  test("with a pickle is told how to convert it", async () => {
    hub.files.delete(WEIGHTS);
    hub.files.set("pytorch_model.bin", new Uint8Array(9));
    expect((await failure(pull())).hint).toContain("safe_serialization=True");
  });

  test.each([
    ["another architecture", { model_type: "llama" }, `a "llama" model, not GPT-2`],
    ["a config without sizes", { model_type: "gpt2" }, "has no vocab_size"],
  ])("with %s is refused after its config", async (_, config, message) => {
    hub.files.set("config.json", json(config));
    const error = await failure(pull());
    expect(error).toBeInstanceOf(ModelError);
    expect(error.message).toContain(message);
    expect(hub.transfers.length).toBe(1);
  });

  test("with another kind of tokenizer is refused before the weights come", async () => {
    hub.files.set("tokenizer.json", json({ model: { type: "WordPiece" } }));
    const error = await failure(pull());
    expect(error).toBeInstanceOf(ModelError);
    expect(error.message).toContain("WordPiece");
    expect(ranges()).toEqual([]);
  });

  test.each(["../../x.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "..", "pytorch_model.bin"])(
    "with an index that names %j is refused",
    async (name) => {
      hub.serve(sharded);
      const made = join(folder.path, "index");
      mkdirSync(made, { recursive: true });
      writeIndex(made, { "wte.weight": name });
      hub.files.set("model.safetensors.index.json", readFileSync(join(made, "model.safetensors.index.json")));
      expect((await failure(pull())).message).toContain("outside the model folder");
      expect(ranges()).toEqual([]);
    },
  );

  test("with an index that names a shard it does not have is refused", async () => {
    hub.serve(sharded);
    hub.files.delete("model-00002-of-00003.safetensors");
    expect((await failure(pull())).message).toContain(`org/tiny has no "model-00002-of-00003.safetensors"`);
    expect(ranges()).toEqual([]);
  });

  test("with a huge JSON file is refused", async () => {
    hub.listed.set("tokenizer.json", { size: 2 ** 40 });
    expect((await failure(pull())).message).toBe("tokenizer.json of org/tiny is too large: 1 TiB");
  });
});

describe("answers that are not a Hub's", () => {
  test.each<Record<string, unknown>>([
    { lfs: { oid: "../../../../etc/passwd", size, pointerSize: 1 } },
    { lfs: { oid: "a".repeat(40), size, pointerSize: 1 } },
    { lfs: undefined, oid: "a".repeat(39) },
    { lfs: undefined, oid: undefined },
    { size: -1 },
    { size: 1.5 },
    { size: "1" },
    { size: 2 ** 60 },
  ])("list no file: %p", async (listed) => {
    hub.listed.set(WEIGHTS, listed);
    const error = await failure(pull());
    expect(error).toBeInstanceOf(HubError);
    expect(error.message).toContain(`sends no size and no checksum of ${WEIGHTS}`);
  });

  test.each<Refusal>([
    { status: 200, body: "<html>Welcome to the hotel's network</html>" },
    { status: 200, body: "" },
    { status: 200, body: "null" },
    { status: 204 },
  ])("are an error of the Hub: %p", async (answer) => {
    hub.refusals = [answer];
    const error = await failure(pull());
    expect(error).toBeInstanceOf(HubError);
    expect(error.message).toMatch(/sends (an answer that is not a Hub's|no commit of)/);
  });

  test.each(["main", "../..", "A".repeat(40), 7])("name no commit: %j", async (sha) => {
    hub.refusals = [{ status: 200, body: JSON.stringify({ sha }) }];
    expect((await failure(pull())).message).toContain("sends no commit of org/tiny");
  });

  test("name another commit than was asked for", async () => {
    expect((await failure(pull(`${NAME}@${"1".repeat(40)}`))).message).toContain(
      "sends no commit of org/tiny@1111",
    );
  });

  test.each([["[]", "a list without an end"], [`[${" ".repeat(5 << 20)}]`, "an answer that is too long"]])(
    "go on and on",
    async (body, message) => {
      hub.refuses = ({ path }) => path.includes("/tree/");
      const link = `<${hub.endpoint}/api/models/org/tiny/tree/x>; rel="next"`;
      hub.refusals = Array(200).fill({ status: 200, body, headers: { link } });
      expect((await failure(pull())).message).toContain(message);
    },
  );
});

describe("offline", () => {
  test("a complete model is found, without a question", async () => {
    hub.files.set("tokenizer_config.json", new TextEncoder().encode("{}"));
    const online = await pull();
    hub.requests.length = 0;
    process.env.HF_HUB_OFFLINE = "1";
    const offline = await pull();
    expect(offline).toEqual({
      ...online,
      files: online.files.map((file) => ({ ...file, status: "cached" as const })),
    });
    expect(hub.requests).toEqual([]);
  });

  test.each(["tokenizer.json", WEIGHTS])("one without its %s is not", async (name) => {
    const { path } = await pull();
    rmSync(join(path, name));
    process.env.HF_HUB_OFFLINE = "yes";
    const error = await failure(pull());
    expect(error).toBeInstanceOf(HubError);
    expect(error.message).toContain("HF_HUB_OFFLINE is set");
  });

  test("one that was never pulled is not", async () => {
    process.env.HF_HUB_OFFLINE = "TRUE";
    expect((await failure(pull())).hint).toContain("unset HF_HUB_OFFLINE");
    expect(hub.requests).toEqual([]);
  });
});
