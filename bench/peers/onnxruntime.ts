/**
 * ONNX Runtime's WebGPU provider, through onnxruntime-node, as a peer (see peer.ts for the command line):
 *
 *     bun bench/peers/onnxruntime.ts --model DIR --contexts 1k,4k --out FILE.json [--time-limit 1800]
 *
 * The checkpoint is converted to a temporary ONNX model first, in a process of its own, which counts for
 * nothing. A prompt is one run of the session, and so is each token behind it. The KV cache stays on the GPU,
 * in place: its tensors, as long as the largest context, are bound as inputs and as outputs. Token ids go in
 * from the host, the logits of the last token come back to it, and it takes the largest. onnxruntime-node
 * cannot write into a tensor on the GPU, so that captured graphs, which save the host's work in a step, are no
 * option.
 *
 * What ran where is asked of another process: nothing but the log tells which provider takes a node, and which
 * GPU the Vulkan loader opened. A process that takes longer than `--time-limit`, in seconds, is killed: the
 * calls block, and some would wait for a lost device forever.
 *
 * Of a prompt of 32 tokens and more, the answer is not quite GPT-2's (1.30.0, on Vulkan): the provider's
 * flash_attention.wgsl declares its scores in a loop without a value. WGSL sets them to zero in each iteration,
 * but what Dawn compiles does so once, and a score begins with the probability that was there before. Times
 * hardly depend on it, greedy tokens do. Shorter prompts, and decoding, take other shaders and agree.
 */
import { spawnSync } from "node:child_process";
import { mkdtempSync, rmSync, writeSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { isMainThread, Worker, workerData } from "node:worker_threads";
import type { GPT2Config } from "../../src/model/config.ts";
import { CACHE_FILE, cacheNames, DECODER_FILE } from "./onnx.ts";
import {
  type Engine,
  installedVersion,
  loadPackage,
  messageOf,
  openModel,
  type PeerOptions,
  runPeer,
} from "./peer.ts";

/** What is used of the package onnxruntime-node. */
interface OnnxRuntime {
  readonly InferenceSession: {
    create(path: string, options: SessionOptions): Promise<InferenceSession>;
  };
  readonly Tensor: new (
    type: "int32" | "int64",
    data: Int32Array | BigInt64Array,
    dims: readonly number[],
  ) => Tensor;
}

interface SessionOptions {
  readonly executionProviders: readonly ["webgpu"];
  /** 0 logs everything, 2 warnings. */
  readonly logSeverityLevel: 0 | 2;
  /** Of outputs that are not named, the host. */
  readonly preferredOutputLocation?: Readonly<Record<string, "gpu-buffer">>;
}

interface InferenceSession {
  /** @param fetches the outputs wanted, each with the tensor to write it to where there is one */
  run(feeds: Tensors, fetches: Readonly<Record<string, Tensor | null>>): Promise<Tensors>;
  release(): Promise<void>;
}

type Tensors = Readonly<Record<string, Tensor>>;

interface Tensor {
  readonly location: "cpu" | "gpu-buffer";
  /** Throws for tensors on the GPU. */
  readonly data: unknown;
}

const PACKAGE = "onnxruntime-node";
const PROVIDERS = ["WebGpuExecutionProvider", "CPUExecutionProvider"] as const;

/** Runs one of this folder's scripts, and returns what it wrote to stderr. */
function runScript(
  script: string,
  args: readonly string[],
  limitSeconds: number,
  env: Readonly<Record<string, string>> = {},
): string {
  const ran = spawnSync(process.execPath, [join(import.meta.dirname!, script), ...args], {
    env: { ...process.env, ...env },
    maxBuffer: 1 << 28,
    timeout: 1000 * limitSeconds,
    killSignal: "SIGKILL",
  });
  const said = ran.stderr.toString();
  if (ran.status === 0) return said;
  const reason = said.trim().split("\n").at(-1)?.replace(/^error: /, "");
  throw new Error(`${script} ended with ${ran.status ?? ran.signal}: ${reason}`);
}

/** Runs onnx.ts, so that the memory it takes is not the peer's. */
function convert(
  { model, modelShape, dtype, contexts }: PeerOptions,
  folder: string,
  limitSeconds: number,
): void {
  const what = model === undefined ? ["--model-shape", modelShape!] : ["--model", model];
  const args = [...what, "--contexts", contexts.join(), "--dtype", dtype, "--out", folder];
  runScript("onnx.ts", args, limitSeconds);
}

async function loadRuntime(): Promise<OnnxRuntime> {
  return (await loadPackage(PACKAGE) as { readonly default: OnnxRuntime }).default;
}

/** Opens a session that logs everything, and no more. */
async function probe(folder: string): Promise<void> {
  const { InferenceSession } = await loadRuntime();
  const session = await InferenceSession.create(join(folder, DECODER_FILE), {
    executionProviders: ["webgpu"],
    logSeverityLevel: 0,
  });
  await session.release();
}

/** @throws Error where the log does not name the GPU, or has no node on it */
function findPlacement(folder: string, limitSeconds: number): Pick<Engine, "device" | "placement"> {
  const log = runScript("onnxruntime.ts", ["--probe", folder], limitSeconds, { VK_LOADER_DEBUG: "driver" });
  const device = /Using "(.+)" with driver:/.exec(log)?.[1];
  if (device === undefined) throw new Error("the Vulkan loader does not say which device it opened");
  const counts = new Map(
    [...log.matchAll(/placed on \[(\w+)\]\. Number of nodes: (\d+)/g)].map((
      [, name, count],
    ) => [name, count]),
  );
  if (!counts.has(PROVIDERS[0])) throw new Error("ONNX Runtime places no node on the GPU");
  const placement = PROVIDERS.map((name) => `${counts.get(name) ?? 0} nodes on ${name}`).join(", ");
  return { device, placement };
}

/**
 * The cache's tensors on the GPU by the names of the decoder's inputs. A model makes them: the package offers
 * nothing else, and in Bun it takes no f16 from the host.
 * @param session of the model in `CACHE_FILE`; the tensors last as long as it is open
 */
async function allocateCache(
  { Tensor }: OnnxRuntime,
  session: InferenceSession,
  config: GPT2Config,
  capacity: number,
): Promise<Map<string, Tensor>> {
  const sizes = [1, config.nHead, capacity, config.headDim];
  const shape = new Tensor("int64", BigInt64Array.from(sizes, BigInt), [sizes.length]);
  const tensors = new Map<string, Tensor>();
  for (const { past } of cacheNames(config)) {
    const { cache } = await session.run({ shape }, { cache: null });
    if (cache?.location !== "gpu-buffer") throw new Error("ONNX Runtime keeps the cache off the GPU");
    tensors.set(past, cache);
  }
  return tensors;
}

function indexOfLargest(values: Float32Array): number {
  let best = 0;
  for (let i = 1; i < values.length; i++) if (values[i]! > values[best]!) best = i;
  return best;
}

/** Kills this process after `seconds`: a timer of its own would wait for calls that block. */
function watch(seconds: number): void {
  new Worker(import.meta.filename!, { workerData: seconds }).unref();
}

async function openRuntime(options: PeerOptions, limitSeconds: number): Promise<Engine> {
  if (!(limitSeconds > 0 && limitSeconds <= 86_400)) {
    throw new Error("--time-limit wants seconds, more than 0 and at most a day");
  }
  const { config, source } = await openModel(options);
  await source.close();
  const capacity = Math.max(...options.contexts);
  if (capacity > config.nPositions) {
    throw new Error(`the model has ${config.nPositions} positions, too few for a context of ${capacity}`);
  }
  const folder = mkdtempSync(join(tmpdir(), "longform-onnx-"));
  try {
    convert(options, folder, limitSeconds);
    const placed = findPlacement(folder, limitSeconds);
    watch(limitSeconds);
    const starting = performance.now();
    const runtime = await loadRuntime();
    const { Tensor } = runtime;
    const open = (file: string, preferred: Pick<SessionOptions, "preferredOutputLocation"> = {}) =>
      runtime.InferenceSession.create(join(folder, file), {
        executionProviders: ["webgpu"],
        logSeverityLevel: 2,
        ...preferred,
      });
    const names = cacheNames(config);
    // With preferred locations, onnxruntime-node 1.30.0 would pass over the tensors that outputs are given.
    const decoder = await open(DECODER_FILE);
    const allocator = await open(CACHE_FILE, { preferredOutputLocation: { cache: "gpu-buffer" } });
    const cache = await allocateCache(runtime, allocator, config, capacity);
    const pasts = Object.fromEntries(cache);
    const presents = Object.fromEntries(names.map(({ past, present }) => [present, cache.get(past)!]));
    const loadMs = performance.now() - starting;

    /** Runs tokens behind `length` others, and returns the likeliest next one. */
    const advance = async (ids: ArrayLike<number>, length: number): Promise<number> => {
      const shape = [1, ids.length];
      const positions = Array.from(ids, (_, i) => length + i);
      const total = length + ids.length;
      const { logits } = await decoder.run({
        input_ids: new Tensor("int64", BigInt64Array.from(ids, BigInt), shape),
        position_ids: new Tensor("int64", BigInt64Array.from(positions, BigInt), shape),
        last_key: new Tensor("int32", Int32Array.of(total - 1), [1]),
        total_length: new Tensor("int32", Int32Array.of(total), []),
        ...pasts,
      }, { logits: null, ...presents });
      return indexOfLargest((logits!.data as Float32Array).subarray(0, config.vocabSize));
    };
    return {
      ...placed,
      loadMs,
      note: "KV cache on the GPU, in place; the largest logit is found on the host; no graph capture; " +
        "in 1.30.0, attention of prompts from 32 tokens on is inexact (see onnxruntime.ts)",
      async *generate(prompt, newTokens) {
        let ids: ArrayLike<number> = prompt;
        let length = 0;
        for (let drawn = 0; drawn < newTokens; drawn++) {
          const next = await advance(ids, length);
          yield next;
          length += ids.length;
          ids = [next];
        }
      },
      async close() {
        await decoder.release();
        await allocator.release();
      },
    };
  } finally {
    rmSync(folder, { recursive: true });
  }
}

const [first, folder] = process.argv.slice(2);
if (!isMainThread) {
  setTimeout(() => {
    writeSync(2, `error: ${PACKAGE} did not end within ${workerData} s\n`);
    process.kill(process.pid, "SIGKILL");
  }, 1000 * workerData);
} else if (first === "--probe") {
  try {
    await probe(folder!);
  } catch (error) {
    console.error(`error: ${messageOf(error)}`);
    process.exitCode = 1;
  }
} else {
  await runPeer(
    { peer: PACKAGE, provider: "webgpu", version: () => installedVersion(PACKAGE) },
    { "time-limit": { type: "string", default: "1800" } },
    (options, values) => openRuntime(options, Number(values["time-limit"])),
  );
}
