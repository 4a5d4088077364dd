/**
 * llama.cpp, through node-llama-cpp and its prebuilt Vulkan binary, as a peer (see peer.ts for the command
 * line):
 *
 *     bun bench/peers/llama.ts --model DIR --contexts 1k,4k --out FILE.json [--batch-size 512]
 *
 * The checkpoint is converted to a temporary GGUF file first, in a process of its own, which counts for
 * nothing. All layers run on the GPU, with flash attention and a cache of the weights' type. llama.cpp leaves
 * the embedding of tokens and positions on the CPU, always; anything else there is an error. It passes over
 * software Vulkan unless `GGML_VK_VISIBLE_DEVICES=0` is set, and spreads over all GPUs that it sees.
 */
import { spawnSync } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { type Engine, installedVersion, loadPackage, type PeerOptions, runPeer } from "./peer.ts";

type Token = number & { readonly __brand: "token" };

/** What is used of the package node-llama-cpp. */
interface NodeLlamaCpp {
  getLlama(options: {
    readonly gpu: "vulkan";
    /** Take the prebuilt binary or fail. */
    readonly build: "never";
    readonly skipDownload: true;
    readonly progressLogs: false;
    readonly logLevel: "info";
    readonly logger: (level: string, message: string) => void;
  }): Promise<Llama>;
}

interface Llama {
  readonly gpu: string | false;
  readonly llamaCppRelease: { readonly release: string };
  getGpuDeviceNames(): Promise<string[]>;
  loadModel(options: { readonly modelPath: string; readonly gpuLayers: "max" }): Promise<Model>;
  dispose(): Promise<void>;
}

interface Model {
  createContext(options: {
    readonly contextSize: number;
    readonly batchSize: number;
    readonly flashAttention: true;
    readonly experimentalKvCacheKeyType: "F16" | "F32";
    readonly experimentalKvCacheValueType: "F16" | "F32";
  }): Promise<Context>;
}

interface Context {
  getSequence(): Sequence;
}

interface Sequence {
  clearHistory(): Promise<void>;
  evaluate(
    tokens: readonly Token[],
    options: { readonly temperature: 0; readonly yieldEogToken: true },
  ): AsyncIterable<Token>;
}

/** What llama.cpp logs of where layers, cache and buffers are, and into how many parts it cuts the graph. */
const PLACEMENT =
  /offloaded \d+\/\d+ layers|\w+ (?:model|KV|compute) buffer size = +[\d.]+ MiB|flash_attn += \w+|splits = \d+/;

/** Runs gguf.ts, so that the memory it takes is not the peer's. */
function convert({ model, modelShape, dtype, contexts }: PeerOptions, path: string): void {
  const what = model === undefined ? ["--model-shape", modelShape!] : ["--model", model];
  const args = [...what, "--contexts", contexts.join(), "--dtype", dtype, "--out", path];
  const ran = spawnSync(process.execPath, [join(import.meta.dirname!, "gguf.ts"), ...args]);
  if (ran.status !== 0) {
    throw new Error(`gguf.ts ended with ${ran.status}: ${ran.stderr}`);
  }
}

/** @throws Error where llama.cpp has no one GPU, or leaves some of the model on the CPU */
function checkDevice(llama: Llama, devices: readonly string[]): string {
  const [device] = devices;
  if (llama.gpu !== "vulkan") {
    throw new Error(`llama.cpp runs on "${llama.gpu}", not on Vulkan`);
  }
  if (device === undefined) {
    throw new Error("llama.cpp has no Vulkan device: set GGML_VK_VISIBLE_DEVICES=0 for software Vulkan");
  }
  if (devices.length > 1) {
    throw new Error(
      `llama.cpp would take ${devices.join(" and ")}: set GGML_VK_VISIBLE_DEVICES to one index`,
    );
  }
  return device;
}

/** @throws Error where the log says that layers, or operations beside the embedding, are on the CPU */
function checkPlacement(log: readonly string[]): void {
  const text = log.join("\n");
  const offloaded = /offloaded (\d+)\/(\d+) layers/.exec(text);
  if (!offloaded || offloaded[1] !== offloaded[2]) {
    throw new Error(`llama.cpp keeps layers on the CPU: ${offloaded?.[0] ?? "its log does not say"}`);
  }
  for (const [said, splits] of text.matchAll(/splits = (\d+)/g)) {
    // One part of the graph on the CPU, the embedding, and the rest on the GPU.
    if (Number(splits) > 2) throw new Error(`llama.cpp runs some operations on the CPU: ${said}`);
  }
}

async function openLlama(options: PeerOptions, batchSize: number): Promise<Engine> {
  const { getLlama } = await loadPackage("node-llama-cpp") as NodeLlamaCpp;
  const folder = mkdtempSync(join(tmpdir(), "longform-gguf-"));
  try {
    const modelPath = join(folder, "model.gguf");
    convert(options, modelPath);
    const log: string[] = [];
    const starting = performance.now();
    const llama = await getLlama({
      gpu: "vulkan",
      build: "never",
      skipDownload: true,
      progressLogs: false,
      logLevel: "info",
      logger: (_level, message) => {
        const found = PLACEMENT.exec(message);
        if (found) log.push(found[0].replace(/\s+/g, " "));
      },
    });
    const device = checkDevice(llama, await llama.getGpuDeviceNames());
    const model = await llama.loadModel({ modelPath, gpuLayers: "max" });
    const cache = options.dtype === "f16" ? "F16" : "F32";
    const context = await model.createContext({
      contextSize: Math.max(...options.contexts),
      batchSize,
      flashAttention: true,
      experimentalKvCacheKeyType: cache,
      experimentalKvCacheValueType: cache,
    });
    const loadMs = performance.now() - starting;
    const sequence = context.getSequence();
    checkPlacement(log);
    return {
      device,
      loadMs,
      placement: log.join("; "),
      note: `llama.cpp ${llama.llamaCppRelease.release}, batches of ${batchSize} tokens`,
      async *generate(prompt, newTokens) {
        await sequence.clearHistory();
        let drawn = 0;
        const tokens = sequence.evaluate([...prompt] as Token[], { temperature: 0, yieldEogToken: true });
        for await (const token of tokens) {
          yield token;
          if (++drawn === newTokens) return;
        }
      },
      close: () => llama.dispose(),
    };
  } finally {
    rmSync(folder, { recursive: true }); // what is mapped of it stays readable
  }
}

await runPeer(
  { peer: "node-llama-cpp", provider: "vulkan", version: () => installedVersion("node-llama-cpp") },
  { "batch-size": { type: "string", default: "512" } },
  (options, values) => openLlama(options, Number(values["batch-size"])),
);
