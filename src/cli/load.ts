/** What commands share: the model folder, the device, the element type, the loaded model. */
import { stat } from "node:fs/promises";
import { join } from "node:path";
import { explainChoices } from "../kernels/index.ts";
import { KV_BLOCK } from "../kernels/shared/shared.ts";
import type { Sparsity } from "../kvcache/sparsity.ts";
import type { GPT2Config } from "../model/config.ts";
import { Gpt2, type Gpt2Options, tooManyPositions } from "../model/gpt2.ts";
import { findModel } from "../model/hub.ts";
import { kernelShape } from "../model/memory_plan.ts";
import { openProfiler } from "../model/run_settings.ts";
import { positionLimit, type Positions } from "../model/positions.ts";
import type { TextTokens } from "../model/token_source.ts";
import type { WeightSource } from "../model/weight_source.ts";
import type { Gpu } from "../runtime/device.ts";
import { openDevice } from "../runtime/device.ts";
import { UsageError } from "../runtime/errors.ts";
import type { Elem } from "../runtime/kernel.ts";
import type { Profiler, ProfilerOptions } from "../runtime/profiler.ts";
import type { Timeline } from "../runtime/timeline.ts";
import type { CommonOptions, RunOptions } from "./options.ts";
import { type ProgressLine, writeNote } from "./output.ts";
import { formatChoices, sparsityReport } from "./report.ts";

/** The folder that `--model` names, or that the cache has of a repository. @throws ModelError when there is none */
export async function modelFolder(options: Pick<CommonOptions, "model">): Promise<string> {
  return await findModel(options.model);
}

/** Whether a file is in the model's folder. */
export async function hasFile(dir: string, name: string): Promise<boolean> {
  return await stat(join(dir, name)).then((s) => s.isFile(), () => false);
}

export async function openCommandDevice(options: CommonOptions, timeline?: Timeline): Promise<Gpu> {
  return await openDevice({
    ...(options.adapter === undefined ? {} : { adapter: options.adapter }),
    fallbackAdapter: options.fallbackAdapter,
    onNotice: (message) => {
      if (!options.quiet) writeNote(`note: ${message}`);
    },
    timeline,
  });
}

/** @throws UsageError when `--context` is more than the positions that the run may have */
export function checkContext({ nPositions }: GPT2Config, { context, positions }: RunOptions): void {
  if (context === undefined || context <= nPositions || positions !== "exact") return;
  throw new UsageError(`\`--context ${context}\` is more than the model's ${nPositions} positions`, {
    hint: `use at most \`--context ${nPositions}\`, or go beyond with \`--positions interpolate\` or ` +
      "`--positions repeat`, at a loss",
  });
}

/** How far ahead a text is encoded before memory is planned: that many bytes take a tenth of a second. */
const LOOK_AHEAD_BYTES = 128 << 10;

/**
 * The most tokens that a text has. It is known exactly for all but long texts, whose tokens are made while the GPU works
 * on the first of them; it must be known where positions are stretched over the context.
 */
export async function boundTokens(tokens: TextTokens, { context, positions }: RunOptions): Promise<number> {
  const mustBeExact = positions !== "exact" && context === undefined;
  await tokens.lookAhead(mustBeExact ? Infinity : LOOK_AHEAD_BYTES);
  return tokens.bound();
}

/** How positions map to rows of `wpe` in a run over at most `context` tokens. */
export function choosePositions(
  { nPositions }: GPT2Config,
  options: RunOptions,
  context: number,
): Positions {
  return { mode: options.positions, nPositions, context };
}

/**
 * @param isAll false when the text goes on behind these tokens
 * @throws InputError naming `--positions` when a text is longer than the model's positions reach
 */
export function checkPositions(tokens: number, isAll: boolean, positions: Positions): void {
  if (tokens <= positionLimit(positions)) return;
  throw tooManyPositions(`The text, ${isAll ? "" : "over "}${tokens} tokens,`, positions);
}

/** Says how much of the attention a sparse run keeps. */
export function noteSparsity(model: Gpt2): void {
  const report = sparsityReport(model);
  if (!report) return;
  const { pattern, density } = report;
  const { sequenceBlocks } = model.plan.kv;
  const share = `${(100 * density).toPrecision(3)} %`;
  writeNote(
    model.sparsity.pattern.kind === "topk"
      ? `note: attention ${pattern} in decoding: up to ${share} of ${sequenceBlocks} blocks of ${KV_BLOCK} keys a token`
      : `note: attention ${pattern} keeps ${share} of the causal blocks of ${KV_BLOCK} x ${KV_BLOCK} in ` +
        `${sequenceBlocks * KV_BLOCK} tokens`,
  );
}

/** Says with `-v` which device and kernels run. */
export function noteChoices(
  gpu: Gpu,
  config: GPT2Config,
  elem: Elem,
  { verbose, kernels }: Pick<RunOptions, "verbose" | "kernels">,
): void {
  if (verbose === 0) return;
  writeNote(`device: ${gpu.caps.name} (${gpu.caps.driver})`);
  writeNote(formatChoices(explainChoices(kernelShape(config, elem, gpu.caps), gpu.caps, kernels)));
}

export interface ModelOptions extends Pick<Gpt2Options, "decoding" | "expected" | "scoring" | "comparing"> {
  readonly elem: Elem;
  readonly sparsity: Sparsity;
  readonly context: number;
  readonly positions: Positions;
}

export interface LoadedModel {
  readonly model: Gpt2;
  readonly loadMs: number;
  readonly profiler: Profiler | undefined;
}

/** Loads a model as the options ask for it, with progress, and says what was chosen. */
export async function loadModel(
  gpu: Gpu,
  source: WeightSource,
  config: GPT2Config,
  modelOptions: ModelOptions,
  options: RunOptions,
  progress: ProgressLine,
  profiling: ProfilerOptions | undefined,
): Promise<LoadedModel> {
  noteChoices(gpu, config, modelOptions.elem, options);
  const profiler = openProfiler(gpu, profiling);
  const loading = performance.now();
  const model = await Gpt2.load(gpu, source, config, {
    ...modelOptions,
    kernels: options.kernels,
    profiler,
    onLoad: (loaded, total) => progress.show(`loading ${Math.floor(100 * loaded / total)} %`),
  }).finally(() => progress.clear());
  if (!options.quiet) noteSparsity(model);
  return { model, loadMs: performance.now() - loading, profiler };
}
