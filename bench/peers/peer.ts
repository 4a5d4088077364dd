/**
 * What the processes of this folder share. Each runs one runtime on GPT-2 and writes a `PeerResult`:
 *
 *     bun bench/peers/NAME.ts (--model DIR | --model-shape SHAPE) [--dtype f16] [--contexts 1k,4k]
 *       [--new-tokens 32] [--runs 3] --out FILE.json
 *
 * The same code times them all, longform too, and sees tokens alone, as whoever calls the runtime does. After a
 * run that is not timed, at each context N:
 *
 * - prefill: from handing over a prompt of N tokens until the first new token is known;
 * - decode: a prompt of N - `--new-tokens` tokens, then as many greedy ones up to N; a step is the time from the
 *   first new token to the last, divided by the steps between them.
 *
 * Prompts are those of synthetic checkpoints, whatever the model: token ids go in, token ids come out.
 */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { parseArgs, type ParseArgsConfig } from "node:util";
import { type GPT2Config, isPublishedShape, PUBLISHED_SHAPES, readConfig } from "../../src/model/config.ts";
import { findModel } from "../../src/model/hub.ts";
import { openCheckpoint } from "../../src/model/safetensors.ts";
import { syntheticPrompt, syntheticSource } from "../../src/model/synthetic.ts";
import type { WeightSource } from "../../src/model/weight_source.ts";
import type { Elem } from "../../src/runtime/kernel.ts";
import { driverBytes, residentPeakBytes } from "../process.ts";
import { writeResult } from "../provenance.ts";

export interface Spread {
  readonly min: number;
  readonly median: number;
  readonly max: number;
}

export interface PeerRow {
  readonly phase: "prefill" | "decode";
  readonly context: number;
  /** Of a run; of one step for `decode`; null when it failed. */
  readonly ms: Spread | null;
  readonly tokens_per_s: number | null;
  /** The new tokens, of `decode`. */
  readonly greedy?: readonly number[];
  readonly error?: string;
}

export interface PeerResult {
  readonly peer: string;
  readonly version: string;
  /** What the runtime computes with. */
  readonly provider: string;
  /** As the runtime names what the layers ran on; null when it could not be opened. */
  readonly device: string | null;
  /** What ran where, in the runtime's own words. */
  readonly placement?: string;
  readonly dtype: Elem;
  readonly note?: string;
  /** From opening the runtime until it takes a prompt; converting the checkpoint does not count. */
  readonly load_ms: number | null;
  /** Largest resident set of the process; null where there is no /proc. */
  readonly host_peak_bytes: number | null;
  /** Most that the driver reported after warm-ups, above what was in use before; null without nvidia-smi. */
  readonly gpu_peak_bytes: number | null;
  readonly rows: readonly PeerRow[];
  /** Why rows are missing. */
  readonly error?: string;
}

export interface PeerOptions {
  readonly model: string | undefined;
  readonly modelShape: keyof typeof PUBLISHED_SHAPES | undefined;
  readonly dtype: Elem;
  readonly contexts: readonly number[];
  readonly newTokens: number;
  readonly runs: number;
  readonly out: string;
}

/** A runtime that has loaded the model and takes prompts up to the largest context. */
export interface Engine {
  readonly device: string;
  readonly placement?: string;
  readonly note?: string;
  readonly loadMs: number;
  /**
   * Greedy tokens behind a prompt, each when it is known. Nothing is cached from earlier calls; no token ends it
   * early.
   */
  generate(prompt: Uint32Array, newTokens: number): AsyncIterable<number>;
  close(): Promise<void>;
}

/** A peer's package is not installed. */
export class PeerAbsent extends Error {}

/** The exit code of a peer that finds nothing to run. */
export const ABSENT = 3;

/**
 * A package of this folder's own node_modules. The name is no literal, so that type checkers, which run where
 * the folder is not installed too, do not look for it.
 * @throws PeerAbsent when it is not installed
 */
export async function loadPackage(name: string): Promise<unknown> {
  installedVersion(name);
  return await import(name);
}

/** @throws PeerAbsent when it is not installed */
export function installedVersion(name: string): string {
  try {
    return JSON.parse(readFileSync(join(import.meta.dirname!, "node_modules", name, "package.json"), "utf8"))
      .version;
  } catch (cause) {
    throw new PeerAbsent(`${name} is not installed: run \`npm ci\` in bench/peers`, { cause });
  }
}

/** `1k,4096` as numbers. */
export function parseContexts(text: string): number[] {
  return text.split(",").map((size) => {
    const [, digits, k] = /^(\d+)(k?)$/i.exec(size) ?? [];
    if (!Number(digits)) throw new Error(`--contexts has "${size}", wanted lengths such as 1k,4096`);
    return Number(digits) * (k ? 1024 : 1);
  });
}

/** The flags of every process of this folder. */
export const COMMON_FLAGS = {
  model: { type: "string" },
  "model-shape": { type: "string" },
  dtype: { type: "string", default: "f16" },
  contexts: { type: "string", default: "1k,4k" },
  "new-tokens": { type: "string", default: "32" },
  runs: { type: "string", default: "3" },
  out: { type: "string" },
} as const satisfies ParseArgsConfig["options"];

type Flags = NonNullable<ParseArgsConfig["options"]>;
type FlagValues = Readonly<Record<string, unknown>>;
type CommonValues = ReturnType<typeof parseArgs<{ options: typeof COMMON_FLAGS }>>["values"];

/** What is to be run, of the command line. */
export function chosenModel(
  values: Pick<CommonValues, "model" | "model-shape" | "contexts" | "dtype">,
): Pick<PeerOptions, "model" | "modelShape" | "contexts" | "dtype"> {
  const { model, "model-shape": modelShape, dtype } = values;
  if ((model === undefined) === (modelShape === undefined)) {
    throw new Error("give one of --model DIR and --model-shape SHAPE");
  }
  if (modelShape !== undefined && !isPublishedShape(modelShape)) {
    throw new Error(`--model-shape is "${modelShape}", wanted ${Object.keys(PUBLISHED_SHAPES).join(", ")}`);
  }
  if (dtype !== "f16" && dtype !== "f32") throw new Error(`--dtype is "${dtype}", wanted f16 or f32`);
  return { model, modelShape, dtype, contexts: parseContexts(values.contexts) };
}

/** @param values of `COMMON_FLAGS` */
export function commonOptions(values: CommonValues): Omit<PeerOptions, "out"> {
  const chosen = chosenModel(values);
  const newTokens = Number(values["new-tokens"]);
  const runs = Number(values.runs);
  if (!Number.isInteger(newTokens) || newTokens < 2 || newTokens >= Math.min(...chosen.contexts)) {
    throw new Error(`--new-tokens is ${values["new-tokens"]}, wanted 2 to less than the smallest context`);
  }
  if (!Number.isInteger(runs) || runs < 1) throw new Error(`--runs is ${values.runs}, wanted 1 or more`);
  return { ...chosen, newTokens, runs };
}

/** The command line of what writes a checkpoint in a peer's format: which, and where to. */
export function parseConversion() {
  return parseArgs({
    options: {
      model: { type: "string" },
      "model-shape": { type: "string" },
      contexts: { type: "string", default: "1k" },
      dtype: { type: "string", default: "f16" },
      out: { type: "string" },
    },
  }).values;
}

/**
 * The checkpoint's sizes and weights; a published shape has positions for the largest context. The caller closes
 * the source.
 */
export async function openModel(
  { model, modelShape, contexts }: Pick<PeerOptions, "model" | "modelShape" | "contexts">,
): Promise<{ readonly config: GPT2Config; readonly source: WeightSource }> {
  if (model !== undefined) {
    const dir = await findModel(model);
    return { config: await readConfig(dir), source: await openCheckpoint(dir) };
  }
  const config = { ...PUBLISHED_SHAPES[modelShape!], nPositions: Math.max(...contexts) };
  return { config, source: syntheticSource(config) };
}

export function spreadOf(values: readonly number[]): Spread {
  const sorted = values.toSorted((a, b) => a - b);
  return { min: sorted[0]!, median: sorted[sorted.length >> 1]!, max: sorted.at(-1)! };
}

/** Of the median: prompt tokens for `prefill`, new ones for `decode`. */
export function tokensPerSecond(phase: PeerRow["phase"], context: number, { median }: Spread): number {
  return 1000 * (phase === "prefill" ? context : 1) / median;
}

/** Milliseconds until the first new token and between all others, on average; and the tokens. */
async function timeTokens(engine: Engine, prompt: Uint32Array, newTokens: number) {
  const tokens: number[] = [];
  const starting = performance.now();
  let firstAt = NaN;
  for await (const token of engine.generate(prompt, newTokens)) {
    if (tokens.push(token) === 1) firstAt = performance.now();
  }
  const stepMs = (performance.now() - firstAt) / (newTokens - 1);
  if (tokens.length !== newTokens) throw new Error(`came back with ${tokens.length} of ${newTokens} tokens`);
  return { firstMs: firstAt - starting, stepMs, tokens };
}

/** @param onWarm called before runs are timed, when everything that they need is allocated */
async function measureContext(
  engine: Engine,
  context: number,
  vocabSize: number,
  { newTokens, runs }: PeerOptions,
  onWarm: () => void,
): Promise<PeerRow[]> {
  const prompt = syntheticPrompt(context, vocabSize);
  const timed = async (phase: PeerRow["phase"]): Promise<PeerRow> => {
    const [length, count] = phase === "prefill" ? [context, 1] : [context - newTokens, newTokens];
    try {
      const run = () => timeTokens(engine, prompt.subarray(0, length), count);
      const { tokens } = await run();
      onWarm();
      const ms: number[] = [];
      for (let i = 0; i < runs; i++) {
        const { firstMs, stepMs } = await run();
        ms.push(phase === "prefill" ? firstMs : stepMs);
      }
      const spread = spreadOf(ms);
      const row = { phase, context, ms: spread, tokens_per_s: tokensPerSecond(phase, context, spread) };
      return phase === "decode" ? { ...row, greedy: tokens } : row;
    } catch (error) {
      return { phase, context, ms: null, tokens_per_s: null, error: messageOf(error) };
    }
  };
  return [await timed("prefill"), await timed("decode")];
}

export function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

/** @throws Error for a command line that is wrong */
function readCommand(extra: Flags): { readonly options: PeerOptions; readonly values: FlagValues } {
  const values = parseArgs({ options: { ...COMMON_FLAGS, ...extra } }).values as CommonValues & FlagValues;
  const { out } = values;
  if (out === undefined) throw new Error("there is no --out FILE.json");
  return { options: { ...commonOptions(values), out }, values };
}

/**
 * The whole of a peer's process: reads the command line, opens, measures, writes the result. Ends with 3 when
 * the package is not installed, with 1 when a measurement failed, which the result says too.
 * @param about what `version` throws is as what `open` throws
 * @param extra flags of this peer alone
 */
export async function runPeer(
  about: { readonly peer: string; readonly provider: string; readonly version: () => string },
  extra: Flags,
  open: (options: PeerOptions, values: FlagValues) => Promise<Engine>,
): Promise<void> {
  let command: ReturnType<typeof readCommand>;
  try {
    command = readCommand(extra);
  } catch (error) {
    console.error(`error: ${messageOf(error)}`);
    process.exitCode = 2;
    return;
  }
  const { options, values } = command;
  const { peer, provider } = about;
  const usedBefore = driverBytes();
  let usedMost = usedBefore;
  const sampleMemory = () => {
    if (usedMost !== null) usedMost = Math.max(usedMost, driverBytes() ?? 0);
  };
  let version = "unknown";
  let engine: Engine | undefined;
  const rows: PeerRow[] = [];
  const failure: { error?: string } = {};
  try {
    version = about.version();
    const { config, source } = await openModel(options);
    await source.close();
    engine = await open(options, values);
    for (const context of options.contexts) {
      console.error(`${peer}: context ${context}`);
      rows.push(...await measureContext(engine, context, config.vocabSize, options, sampleMemory));
    }
  } catch (error) {
    if (error instanceof PeerAbsent) {
      console.error(`error: ${error.message}`);
      process.exitCode = ABSENT;
      return;
    }
    failure.error = messageOf(error);
  }
  const result: PeerResult = {
    peer,
    version,
    provider,
    device: engine?.device ?? null,
    ...(engine?.placement === undefined ? {} : { placement: engine.placement }),
    dtype: options.dtype,
    ...(engine?.note === undefined ? {} : { note: engine.note }),
    load_ms: engine?.loadMs ?? null,
    host_peak_bytes: residentPeakBytes(process.pid),
    gpu_peak_bytes: usedMost === null ? null : usedMost - usedBefore!,
    rows,
    ...failure,
  };
  await engine?.close();
  writeResult(options.out, result);
  for (const error of [failure.error, ...rows.map((row) => row.error)]) {
    if (error === undefined) continue;
    console.error(`error: ${error}`);
    process.exitCode = 1;
  }
}
