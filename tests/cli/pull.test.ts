import { afterAll, afterEach, beforeAll, describe, expect, test } from "bun:test";
import {
  existsSync,
  lstatSync,
  mkdirSync,
  readdirSync,
  readlinkSync,
  rmSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { dirname, join } from "node:path";
import { transferProgress } from "../../src/cli/pull.ts";
import { DEFAULT_MODEL } from "../../src/model/run_settings.ts";
import { temporaryFolder } from "../support/checkpoint.ts";
import {
  cliCommand,
  expectFailure,
  RUN_TIMEOUT_MS,
  runCli,
  type RunOptions,
  type RunResult,
  type Runtime,
  runtimes,
  writeTinyModel,
} from "../support/cli.ts";
import { HubServer } from "../support/hub_server.ts";

const folder = temporaryFolder();
/** Nobody else's, in the folder that the checkout has its models in. */
const ORG = `longform-test-${process.pid}`;
const linked = join(dirname(DEFAULT_MODEL), ORG);
const sharded = writeTinyModel(join(folder.path, "sharded"), { shards: 3 }).dir;
const shards = readdirSync(sharded).filter((name) => name.endsWith(".safetensors")).sort();

let hub: HubServer;
beforeAll(async () => {
  hub = await HubServer.open(sharded);
});
afterEach(() => {
  hub.reset();
  rmSync(linked, { recursive: true, force: true });
});
afterAll(async () => {
  await hub.close();
  folder.remove();
});

let homes = 0;
/** Variables for a run with a cache of its own. */
function environment(variables: Readonly<Record<string, string>> = {}): NonNullable<RunOptions["env"]> {
  const home = join(folder.path, `home ${homes++}`);
  const unset = { HF_HUB_CACHE: undefined, HUGGINGFACE_HUB_CACHE: undefined, HF_HUB_OFFLINE: undefined };
  const none = { ...unset, HF_TOKEN_PATH: undefined, HUGGING_FACE_HUB_TOKEN: undefined, HF_TOKEN: undefined };
  return { ...none, HF_HOME: home, HF_ENDPOINT: hub.endpoint, ...variables };
}

const cacheOf = (env: NonNullable<RunOptions["env"]>, name: string) =>
  join(env.HF_HOME!, `hub/models--${ORG}--${name}`);

async function generate(model: string, options: RunOptions): Promise<readonly number[]> {
  const flags = ["-n", "12", "--temperature", "0", "--ignore-eos", "--json"];
  const result = await runCli(["generate", "To be or not", "-m", model, ...flags], options);
  expect(result.code).toBe(0);
  return JSON.parse(result.stdout).tokens;
}

describe.each([...runtimes])("on %s", (runtime) => {
  test("a pull, broken off on the way, and then generation without a network", async () => {
    const env = environment({ HF_TOKEN: "hf_secret" });
    hub.token = "hf_secret";
    hub.deliveries = [{ cutAfter: 2345 }, { corrupt: 3000 }];
    const pulling = runCli(["pull", `${ORG}/tiny`], { runtime, env });
    await Promise.race([pulling, arrival(env, 2345)]);
    hub.received(2345);
    const pulled = await pulling;
    expect(pulled.code).toBe(0);
    const path = join(linked, "tiny");
    const snapshot = join(cacheOf(env, "tiny"), "snapshots", hub.commit);
    expect(pulled.stdout.trim().split("\n").at(-1)).toBe(path);
    for (const shard of shards) {
      expect(pulled.stdout).toMatch(new RegExp(`^${shard} +[\\d.]+ KiB  downloaded$`, "m"));
    }
    expect(readlinkSync(path)).toBe(snapshot);
    expect(pulled.notes).toContain(`downloading ${shards[0]}, 6.58 KiB`);
    expect(pulled.notes).toMatch(/note: .*: trying again in 0\.\d s/);
    expect(pulled.notes).toContain("arrived damaged and was removed");
    // The store never sees the token, and no stream does.
    expect(
      hub.requests.filter(({ host }) => host === "cdn").map((
        { range, authorization },
      ) => [range, authorization]),
    )
      .toEqual(
        [undefined, "bytes=2345-", undefined, undefined, undefined].map((range) => [range, undefined]),
      );
    expect(pulled.stdout + pulled.stderr).not.toContain("hf_secret");

    hub.requests.length = 0;
    const offline = { ...env, HF_ENDPOINT: "http://127.0.0.1:9" };
    const tokens = await generate(`${ORG}/tiny`, { runtime, env: offline });
    expect(tokens.length).toBe(12);
    expect(tokens).toEqual(await generate(sharded, { runtime, env: offline }));
    expect(hub.requests).toEqual([]);
  }, RUN_TIMEOUT_MS);

  test("SIGINT stops in order, and the same command goes on", async () => {
    const env = environment();
    const stopped = await interrupted("SIGINT", runtime, env);
    expect(stopped.code).toBe(130);
    expect(stopped.stdout).toBe("");
    expect(stopped.stderr).toContain("stopped; what has been downloaded is kept");
    const { code, stdout } = await runCli(["pull", `${ORG}/tiny`, "--json"], { runtime, env });
    expect(code).toBe(0);
    expect(JSON.parse(stdout).files.find(({ name }: { name: string }) => name === shards[0]).status).toBe(
      "resumed",
    );
    expect(resumptions()).toEqual(["bytes=3000-"]);
  }, RUN_TIMEOUT_MS);
});

/** Ranges that the store was asked for. */
function resumptions(): (string | undefined)[] {
  return hub.requests.filter(({ host, range }) => host === "cdn" && range !== undefined).map(({ range }) =>
    range
  );
}

/** Waits until a file in the cache has so many bytes. */
async function arrival(env: NonNullable<RunOptions["env"]>, bytes: number): Promise<void> {
  const blobs = join(cacheOf(env, "tiny"), "blobs");
  const hasCome = () =>
    readdirSync(blobs).some((name) => statSync(join(blobs, name), { throwIfNoEntry: false })?.size === bytes);
  const end = performance.now() + RUN_TIMEOUT_MS;
  while (performance.now() < end && (!existsSync(blobs) || !hasCome())) await Bun.sleep(10);
}

/** Starts a pull whose store falls silent after 3000 bytes, and sends a signal when these are on the disk. */
async function interrupted(
  signal: NodeJS.Signals,
  runtime: Runtime,
  env: NonNullable<RunOptions["env"]>,
): Promise<Pick<RunResult, "code" | "stdout" | "stderr">> {
  hub.deliveries = [{ stallAfter: 3000 }];
  const child = Bun.spawn([...cliCommand({ runtime }), "pull", `${ORG}/tiny`], {
    env: { ...process.env, ...env },
    stdout: "pipe",
    stderr: "pipe",
    timeout: RUN_TIMEOUT_MS,
    killSignal: "SIGKILL",
  });
  await Promise.race([child.exited, arrival(env, 3000)]);
  child.kill(signal);
  const [stdout, stderr] = await Promise.all([
    new Response(child.stdout).text(),
    new Response(child.stderr).text(),
  ]);
  return { code: await child.exited, stdout, stderr };
}

test("what a killed pull has left is taken up", async () => {
  const env = environment();
  expect((await interrupted("SIGKILL", "bun", env)).code).toBe(137);
  const { code, stdout } = await runCli(["pull", `${ORG}/tiny`], { env });
  expect(code).toBe(0);
  expect(stdout).toMatch(new RegExp(`^${shards[0]} +6\\.58 KiB  resumed$`, "m"));
  expect(resumptions()).toEqual(["bytes=3000-"]);
  expect(readdirSync(join(cacheOf(env, "tiny"), "blobs")).filter((name) => name.includes("incomplete")))
    .toEqual([]);
}, RUN_TIMEOUT_MS);

test("--json prints the folder and the files, -q nothing else", async () => {
  const env = environment();
  const { code, stdout, stderr } = await runCli(["pull", `${ORG}/tiny@v1.0`, "--json", "-q"], { env });
  expect(code).toBe(0);
  expect(stderr).toBe("");
  const report = JSON.parse(stdout);
  expect(report).toMatchObject({
    path: join(linked, "tiny@v1.0"),
    repo: `${ORG}/tiny`,
    revision: "v1.0",
    commit: hub.commit,
  });
  expect(report.files.length).toBe(6);
  expect(report.files[0]).toEqual({
    name: "config.json",
    bytes: statSync(join(sharded, "config.json")).size,
    status: "downloaded",
  });
  expect(report.files[3]).toEqual({
    name: shards[0],
    bytes: statSync(join(sharded, shards[0]!)).size,
    sha256: hub.blobName(shards[0]!),
    status: "downloaded",
  });
  expect(existsSync(join(report.path, "config.json"))).toBe(true);
}, RUN_TIMEOUT_MS);

test("what has the name in weights/ already stays, and the path is the cache's", async () => {
  const env = environment();
  mkdirSync(join(linked, "tiny"), { recursive: true });
  writeFileSync(join(linked, "tiny/own"), "");
  const { stdout } = await runCli(["pull", `${ORG}/tiny`], { env });
  expect(stdout.trim().split("\n").at(-1)).toBe(join(cacheOf(env, "tiny"), "snapshots", hub.commit));
  expect(lstatSync(join(linked, "tiny")).isDirectory()).toBe(true);
  expect(readdirSync(join(linked, "tiny"))).toEqual(["own"]);
  // `inspect` takes the name, too.
  const inspected = await runCli(["inspect", `${ORG}/tiny`], { env });
  expect(inspected.stdout).toContain("no problems found");
}, RUN_TIMEOUT_MS);

test("progress has a rate and the time that is left, once something has come", () => {
  const file = { name: "model.safetensors", bytes: 2 ** 31, checksum: "", algorithm: "sha256" } as const;
  expect(transferProgress(file, 2 ** 29, 2 ** 30, 5120)).toBe(
    "model.safetensors 50 % of 2 GiB, 100 MiB/s, 10.24 s left",
  );
  for (const bytes of [2 ** 29, 0]) {
    expect(transferProgress(file, 2 ** 29, bytes, 100)).toMatch(/^model\.safetensors \d+ % of 2 GiB$/);
  }
});

describe("what fails", () => {
  test("on the Hub's side is one sentence and what to do", async () => {
    hub.refusals = [{ status: 401, headers: { "x-error-code": "RepoNotFound" } }];
    const result = await runCli(["pull", `${ORG}/nothing`], { env: environment() });
    expectFailure(
      result,
      1,
      /has no public repository longform-test-\d+\/nothing\n\nhint: check the name; if it is private/,
    );
  }, RUN_TIMEOUT_MS);

  test("for want of a name is a wrong command line", async () => {
    expectFailure(
      await runCli(["pull", "a/../b"], { env: environment() }),
      2,
      /"a\/\.\.\/b" is not the name/,
    );
    expect(hub.requests).toEqual([]);
  }, RUN_TIMEOUT_MS);

  test("offline is said", async () => {
    const env = environment({ HF_HUB_OFFLINE: "1" });
    expectFailure(
      await runCli(["pull", `${ORG}/tiny`], { env }),
      1,
      /is not complete in .*, and HF_HUB_OFFLINE is set/,
    );
    expectFailure(
      await runCli(["generate", "x", "-m", `${ORG}/tiny`], { env }),
      1,
      /hint: `longform pull longform-test/,
    );
    expect(hub.requests).toEqual([]);
  }, RUN_TIMEOUT_MS);
});
