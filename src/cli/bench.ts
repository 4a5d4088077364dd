/** `bench`: how fast the kernels and the whole model run on this device, with their results checked. */
import { chooseKernels, type ChosenKernels } from "../kernels/index.ts";
import { KV_BLOCK } from "../kernels/shared/shared.ts";
import { patternName } from "../kvcache/patterns.ts";
import { hasLists, layerLists, type Sparsity } from "../kvcache/sparsity.ts";
import {
  Benchmark,
  type Check,
  CheckFailed,
  type DevicePeaks,
  GEMMS,
  type Measurement,
  randomLists,
  ScoresDoNotFit,
} from "../model/benchmark.ts";
import { type GPT2Config, PUBLISHED_SHAPES, readConfig } from "../model/config.ts";
import { Gpt2 } from "../model/gpt2.ts";
import { kernelShape } from "../model/memory_plan.ts";
import { chooseElem, inFlightOf, openProfiler, openSparsity } from "../model/run_settings.ts";
import { openCheckpoint } from "../model/safetensors.ts";
import { syntheticSource } from "../model/synthetic.ts";
import { formatBytes } from "../runtime/buffers.ts";
import type { Gpu } from "../runtime/device.ts";
import { DoesNotFitError } from "../runtime/errors.ts";
import type { Elem } from "../runtime/kernel.ts";
import type { Profiler } from "../runtime/profiler.ts";
import { runCompare } from "./bench_compare.ts";
import { openReport, type ReportWriter } from "./bench_report.ts";
import {
  type BenchProfile,
  type BenchReport,
  type BenchRow,
  mergeBenchResults,
  nameOf,
  PEAK_NAMES,
  shapeName,
} from "./bench_result.ts";
import { Instruments } from "./instruments.ts";
import { modelFolder, noteChoices, openCommandDevice } from "./load.ts";
import type { BenchOptions, BenchPhase } from "./options.ts";
import { ProgressLine, writeJson, writeNote, writeResult } from "./output.ts";
import { formatGpu, formatKernels, gpuProfile, kernelProfiles, peaksReport } from "./profile.ts";
import { abortOnSignal, interruptedExitCode } from "./signals.ts";
import { figure, formatTable, percent } from "./table.ts";
import { runtimeName, VERSION } from "./version.ts";

/** What is measured, and with what. */
interface Subject {
  readonly gpu: Gpu;
  readonly sparsities: readonly Sparsity[];
  readonly config: GPT2Config;
  readonly elem: Elem;
  readonly chosen: ChosenKernels;
  /** Paused but for the runs that are profiled; undefined where none are. */
  readonly profiler: Profiler | undefined;
  readonly options: BenchOptions;
}

/** Runs the command. @returns 0; 1 when a result was wrong, 4 when a model did not fit, a signal's when one has ended it */
export async function runBench(options: BenchOptions): Promise<number> {
  if (options.compare) return await runCompare(options.compare, options);
  const write = options.report === undefined ? undefined : await openReport(options.report);
  if (options.from.length > 0) {
    await publish(await mergeBenchResults(options.from), options, write);
    return 0;
  }
  const config = await benchConfig(options);
  const sparsities = await Promise.all((options.sparsity ?? [{ kind: "dense" } as const]).map(openSparsity));
  const instruments = await Instruments.open(options);
  const gpu = await openCommandDevice(options, instruments.timeline);
  // A report shows where the time goes, asked for or not.
  const profiler = openProfiler(gpu, instruments.profiling ?? (write && { unit: "dispatches" }));
  if (profiler) profiler.isPaused = true;
  try {
    const elem = chooseElem(options.dtype, gpu.caps);
    const chosen = chooseKernels(kernelShape(config, elem, gpu.caps), gpu.caps, options.kernels);
    noteChoices(gpu, config, elem, options);
    const subject = { gpu, sparsities, config, elem, chosen, profiler, options };
    const exitCode = await measureAll(subject, write);
    await instruments.writeTrace(gpu, profiler);
    return exitCode;
  } finally {
    profiler?.destroy();
    gpu.destroy();
  }
}

/** The model's sizes; a published shape has positions for the largest context. */
async function benchConfig(options: BenchOptions): Promise<GPT2Config> {
  const { modelShape, contexts } = options;
  if (modelShape === undefined) return await readConfig(await modelFolder(options));
  return { ...PUBLISHED_SHAPES[modelShape], nPositions: Math.max(...contexts) };
}

async function measureAll(subject: Subject, write: ReportWriter | undefined): Promise<number> {
  const { gpu, config, elem, chosen, options } = subject;
  const progress = new ProgressLine(options);
  const { controller, stop } = abortOnSignal(() => progress.clear());
  const { signal } = controller;
  const rows: BenchRow[] = [];
  const profiles: BenchProfile[] = [];
  let peaks: DevicePeaks | undefined;
  let copyRate: number | null = null;
  let peakRate: number | null = null;
  let exitCode = 0;
  let current = "";
  const benchmark = new Benchmark(gpu, config, {
    elem,
    chosen,
    signal,
    runs: options.runs,
    onRun: (run) => progress.show(`${current}: run ${run} of ${options.runs}`),
  });
  const measure: Measure = async (phase, variant, context, run) => {
    current = `${phase} ${variant} ${context}`;
    progress.show(current);
    const what = { phase, variant, context, dtype: elem };
    try {
      rows.push({ ...what, ...figures(await run()) });
    } catch (error) {
      if (!(error instanceof DoesNotFitError || error instanceof CheckFailed)) throw error;
      rows.push({ ...what, ...failure(error) });
      // Where the textbook runs out of memory is a result.
      if (!(error instanceof ScoresDoNotFit)) exitCode = Math.max(exitCode, error.exitCode);
    }
  };
  try {
    current = "copy and peak";
    if (subject.profiler) {
      peaks = await benchmark.peaks();
      copyRate = peaks.copyRate;
      peakRate = peaks.rates[benchmark.peakUnit] ?? null;
    } else {
      copyRate = await benchmark.copyRate();
      peakRate = await benchmark.peakRate();
    }
    for (const context of options.contexts) {
      for (const phase of ["attention", "gemm"] as const) {
        if (!options.phases.includes(phase)) continue;
        if (phase === "gemm") {
          for (const name of GEMMS) await measure(phase, name, context, () => benchmark.gemm(name, context));
          continue;
        }
        for (const kind of options.attention) {
          if (kind === "sparse") await measureSparse(subject, benchmark, context, measure);
          else {
            await measure(
              phase,
              kind,
              context,
              () =>
                kind === "flash" ? benchmark.flashAttention(context) : benchmark.standardAttention(context),
            );
          }
        }
      }
      for (const sparsity of subject.sparsities) {
        await measureModel(
          subject,
          sparsity,
          benchmark,
          context,
          progress,
          signal,
          measure,
          async (phase, variant, model) => {
            if (!subject.profiler || !peaks) return;
            current = `profile of ${phase} ${variant} ${context}`;
            progress.show(current);
            profiles.push(
              await profileOne(subject, subject.profiler, peaks, signal, { phase, variant, context }, model),
            );
          },
        );
      }
    }
  } catch (error) {
    if (!signal.aborted || error !== signal.reason) throw error;
    exitCode = interruptedExitCode();
  } finally {
    stop();
    progress.clear();
    benchmark.destroy();
  }
  const { name: adapter, driver, timestamps } = gpu.caps;
  const report: BenchReport = {
    adapter,
    driver,
    runtime: runtimeName(),
    version: VERSION,
    model: options.modelShape ? shapeName(options.modelShape) : await modelFolder(options),
    runs: options.runs,
    kernel_clock: timestamps ? "gpu" : "wall",
    copy_gb_per_s: copyRate === null ? null : copyRate / 1e9,
    peak_tflops: peakRate === null ? null : peakRate / 1e12,
    peak_unit: benchmark.peakUnit,
    heads: config.nHead,
    rows: options.phases.flatMap((phase) => rows.filter((row) => row.phase === phase)),
    ...(profiles.length > 0 ? { profiles } : {}),
  };
  await publish(report, options, write);
  return exitCode;
}

/** Prints the report, and writes its page where one is asked for. */
async function publish(
  report: BenchReport,
  options: BenchOptions,
  write: ReportWriter | undefined,
): Promise<void> {
  const page = await write?.(report);
  if (page !== undefined && !options.quiet) writeNote(`wrote ${page} and its JSON`);
  if (options.json) writeJson(report);
  else writeResult(formatReport(report));
}

type Measure = (
  phase: BenchPhase,
  variant: string,
  context: number,
  run: () => Promise<Measurement>,
) => Promise<void>;

/** Shares of the causal blocks that sparse attention is measured with where no pattern is given. */
const DENSITIES = [1, 0.5, 0.25, 0.125, 0.0625, 0.033];

/** Sparse attention of one layer, the first where patterns differ by layer; heads of one mask each are measured alike. */
async function measureSparse(
  { config, options, sparsities }: Subject,
  benchmark: Benchmark,
  context: number,
  measure: Measure,
): Promise<void> {
  const rows = Math.ceil(context / KV_BLOCK);
  if (options.sparsity === undefined) {
    for (const share of DENSITIES) {
      await measure(
        "attention",
        `random ${Number((100 * share).toPrecision(3))} %`,
        context,
        () => benchmark.sparseAttention(context, randomLists(rows, share)),
      );
    }
    return;
  }
  for (const sparsity of sparsities.filter(hasLists)) {
    await measure(
      "attention",
      patternName(sparsity.pattern),
      context,
      () => benchmark.sparseAttention(context, layerLists(sparsity, 0, config.nHead, rows)[0]!),
    );
  }
}

type ModelPhase = "prefill" | "decode";

/** One run more of what was measured, with every dispatch timed. */
async function profileOne(
  { gpu, config, elem, chosen }: Subject,
  profiler: Profiler,
  peaks: DevicePeaks,
  signal: AbortSignal,
  what: { readonly phase: ModelPhase; readonly variant: string; readonly context: number },
  model: Gpt2,
): Promise<BenchProfile> {
  profiler.reset();
  const onRun = () => profiler.isPaused = false; // behind the warm-up
  const benchmark = new Benchmark(gpu, config, { elem, chosen, signal, runs: 1, onRun });
  try {
    const { ms } = await benchmark[what.phase](model, what.context);
    await profiler.settle();
    const timed = profiler.report();
    const kernels = kernelProfiles(timed.kernels, peaks);
    return { ...what, ms: ms[0]!, peaks: peaksReport(peaks), gpu: gpuProfile(timed, kernels), kernels };
  } finally {
    profiler.isPaused = true;
    benchmark.destroy();
  }
}

/** Both phases of the whole model: it is loaded once for a context. */
async function measureModel(
  { gpu, config, elem, profiler, options }: Subject,
  sparsity: Sparsity,
  benchmark: Benchmark,
  context: number,
  progress: ProgressLine,
  signal: AbortSignal,
  measure: Measure,
  profile: (phase: ModelPhase, variant: string, model: Gpt2) => Promise<void>,
): Promise<void> {
  const phases = options.phases.filter((phase) => phase === "prefill" || phase === "decode");
  if (phases.length === 0) return;
  const source = options.modelShape
    ? syntheticSource(config)
    : await openCheckpoint(await modelFolder(options));
  // Prefill is of one sequence, and the cache that it leaves is what decoding continues.
  const batches = phases.includes("decode") ? options.batch : [1];
  try {
    for (const sequences of batches) {
      let model: Gpt2 | undefined;
      // Within the measurement: that a model does not fit is what its row says.
      const loaded = async () =>
        model ??= await Gpt2.load(gpu, source, config, {
          context,
          elem,
          // Speed does not depend on positions, and lengths beyond the model's are worth measuring.
          positions: { mode: "repeat", nPositions: config.nPositions, context },
          sparsity,
          decoding: { sequences, inFlight: inFlightOf(gpu) },
          kernels: options.kernels,
          profiler,
          onLoad: (done, total) => {
            signal.throwIfAborted();
            progress.show(`loading ${Math.floor(100 * done / total)} %`);
          },
        });
      try {
        for (const phase of ["prefill", "decode"] as const) {
          if (!phases.includes(phase) || (phase === "prefill" && sequences !== batches[0])) continue;
          const names = [
            ...(phase === "decode" && sequences > 1 ? [`batch ${sequences}`] : []),
            ...(sparsity.pattern.kind === "dense" ? [] : [patternName(sparsity.pattern)]),
          ];
          const variant = names.join(" ") || "flash";
          await measure(phase, variant, context, async () => await benchmark[phase](await loaded(), context));
          if (model) await profile(phase, variant, model);
        }
      } finally {
        model?.destroy();
      }
    }
  } finally {
    await source.close();
  }
}

type Figures = Omit<BenchRow, "phase" | "variant" | "context" | "dtype">;

function figures({ kernel, ms, tokens, flop, bytes, peakBytes, density, check }: Measurement): Figures {
  const sorted = [...ms].sort((a, b) => a - b);
  const [low, high] = [sorted[(sorted.length - 1) >> 1]!, sorted[sorted.length >> 1]!];
  const median = (low + high) / 2;
  return {
    ...(kernel === undefined ? {} : { kernel }),
    ms: { min: sorted[0]!, median, max: sorted.at(-1)! },
    tokens_per_s: 1000 * tokens / median,
    tflops: flop / (median * 1e9),
    gb_per_s: bytes === undefined ? null : bytes / (median * 1e6),
    peak_bytes: peakBytes,
    ...(density === undefined ? {} : { density }),
    ...(check ? checked(check) : {}),
  };
}

function failure(error: DoesNotFitError | CheckFailed): Figures {
  const nothing = { ms: null, tokens_per_s: null, tflops: null, gb_per_s: null, peak_bytes: null };
  const { message } = error;
  if (error instanceof CheckFailed) {
    return { kernel: error.kernel, ...nothing, ...checked(error.check), error: message };
  }
  return {
    ...nothing,
    error: message,
    ...(error instanceof ScoresDoNotFit ? { needed_bytes: error.neededBytes } : {}),
  };
}

function checked(
  { against, difference, tolerance }: Check,
): Required<Pick<BenchRow, "checked_against" | "largest_difference" | "tolerance">> {
  return { checked_against: against, largest_difference: difference, tolerance };
}

const WHAT = ["phase", "variant", "context", "type"];
const FIGURES = ["ms", "min to max", "tokens/s", "TFLOP/s", "GB/s", "memory", "kernel"];

function formatReport(report: BenchReport): string {
  const { adapter, driver, model, runs, copy_gb_per_s: copyRate, peak_tflops: peakRate, rows } = report;
  const hasDensity = rows.some(({ density }) => density !== undefined);
  const cells = rows.map((row) => [
    row.phase,
    nameOf(row),
    row.context.toLocaleString("en-US"),
    row.dtype,
    ...(hasDensity ? [row.density === undefined ? "-" : `${(100 * row.density).toPrecision(3)} %`] : []),
    ...(row.ms
      ? [
        figure(row.ms.median),
        `${figure(row.ms.min)} to ${figure(row.ms.max)}`,
        figure(row.tokens_per_s),
        figureOf(row.tflops, peakRate),
        figureOf(row.gb_per_s, copyRate),
        row.peak_bytes === null ? "-" : formatBytes(row.peak_bytes),
        row.kernel ?? "-",
      ]
      : []),
  ]);
  const header = [...WHAT, ...(hasDensity ? ["density"] : []), ...FIGURES];
  const [titles, ...lines] = formatTable(header, cells, [0, 1, header.length - 1]).split("\n");
  const body = lines.map((line, i) => {
    const { error } = rows[i]!;
    return error === undefined ? line : `${line}  ${error}`;
  });
  const checks = rows.filter((row) => row.checked_against !== undefined && row.error === undefined);
  const references = [
    ...(copyRate === null ? [] : [`  a kernel that copies memory: ${figure(copyRate)} GB/s`]),
    ...(peakRate === null ? [] : [`  ${PEAK_NAMES[report.peak_unit]}: ${figure(peakRate)} TFLOP/s`]),
  ];
  return [
    `${adapter} (${driver}), ${model}` + (runs === null ? "" : `, ${runs} ${runs === 1 ? "run" : "runs"}`),
    "",
    titles,
    ...body,
    "",
    ...(references.length === 0
      ? []
      : ["percentages are of what this device did in this run:", ...references]),
    ...(report.profiles ?? []).flatMap(({ phase, variant, context, peaks, gpu, kernels }) => [
      "",
      `profile of ${phase} ${variant} ${context.toLocaleString("en-US")}`,
      formatKernels({ peaks, kernels }),
      formatGpu(gpu),
    ]),
    ...(checks.length === 0
      ? []
      : [`${checks.length} of ${rows.length} results agree with another kernel's (--json says which)`]),
  ].join("\n").trimEnd() + "\n";
}

/** The figure, and its share of what the device can do. */
function figureOf(n: number | null, most: number | null): string {
  return n === null || most === null ? figure(n) : `${figure(n)} (${percent(n / most)} %)`;
}
