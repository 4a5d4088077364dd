/** `info`: what Vulkan finds here, what fits and which kernels would run; where nothing would, why not. */
import { readFileSync } from "node:fs";
import { type Choice, chooseKernels, explainChoices } from "../kernels/index.ts";
import { Benchmark } from "../model/benchmark.ts";
import { type GPT2Config, PUBLISHED_SHAPES, readConfig } from "../model/config.ts";
import { checkFits, kernelShape, largestContext, planMemory } from "../model/memory_plan.ts";
import { chooseElem, inFlightOf } from "../model/run_settings.ts";
import { formatBytes } from "../runtime/buffers.ts";
import { DAWN_LOADS } from "../runtime/dawn.ts";
import { type Capabilities, type Gpu, listAdapters } from "../runtime/device.ts";
import { DoesNotFitError, LongformError } from "../runtime/errors.ts";
import { adviceFor, describeSubgroups, type Elem } from "../runtime/kernel.ts";
import { programFile } from "../runtime/program_files.ts";
import { type ShaderCache, shaderCache } from "../runtime/shader_cache.ts";
import { diagnose, type Finding } from "../runtime/vulkan_diagnosis.ts";
import { inspectVulkan, type VulkanSetup } from "../runtime/vulkan_setup.ts";
import { modelFolder, openCommandDevice } from "./load.ts";
import type { InfoOptions } from "./options.ts";
import { writeJson, writeNote, writeResult } from "./output.ts";
import { formatChoices } from "./report.ts";
import { figure, formatTable } from "./table.ts";
import { runtimeName, VERSION } from "./version.ts";

/** What `--json` prints. */
interface InfoReport {
  readonly version: string;
  readonly runtime: string;
  /** Version of npm `webgpu`, which contains Dawn; null where package.json is not beside the program. */
  readonly webgpu: string | null;
  readonly vulkan: VulkanReport;
  readonly adapters: readonly Capabilities[];
  /** Why no adapter is found, or no GPU, the most helpful first. */
  readonly findings: readonly Finding[];
  /** The adapter that a run with the same flags takes; null when there is none, or it cannot be opened. */
  readonly chosen: Capabilities | null;
  /** Why such a run would not start, and what to do. */
  readonly problem: { readonly message: string; readonly hint: string | null } | null;
  readonly model: string;
  readonly dtype: string | null;
  /** Most tokens whose keys fit a binding, or the model's positions if that is less. */
  readonly largest_context: number | null;
  readonly kernels: readonly Choice[];
  /** What the published sizes take in that dtype; empty without one. */
  readonly sizes: readonly SizeReport[];
  /** Null where the driver's is not known. */
  readonly shader_cache: {
    readonly keeper: ShaderCache["keeper"];
    readonly is_enabled: boolean;
    readonly folders: ShaderCache["folders"];
  } | null;
  /** Null without `--measure`. */
  readonly measured: MeasuredRates | null;
}

/** What Vulkan has to work with. */
interface VulkanReport {
  readonly loader:
    | { readonly path: string; readonly version: string | null; readonly problem: string | null }
    | null;
  /** The variable that names the drivers in place of the folders. */
  readonly override: VulkanSetup["override"] | null;
  readonly searched: readonly string[];
  readonly drivers: readonly {
    readonly manifest: string;
    readonly api_version: string | null;
    readonly library_name: string | null;
    readonly library: string | null;
    readonly problem: string | null;
    readonly is_software: boolean;
    readonly maker: string | null;
    readonly mesa: string | null;
  }[];
  readonly gpus: VulkanSetup["gpus"];
  readonly nvidia_driver: string | null;
  readonly nvidia_driver_capabilities: string | null;
  readonly in_container: boolean;
  /** What the process may not see, on Deno. */
  readonly hidden: readonly string[];
}

/** What one of the published models takes to generate. */
interface SizeReport {
  readonly model: string;
  readonly weights_bytes: number;
  /** All buffers, by context; null where that does not fit. */
  readonly bytes: Readonly<Record<number, number | null>>;
  /** By limits and memory, where that is known; the model's positions are 1,024. */
  readonly largest_context: number;
  /** Why no more than that fits. */
  readonly limit: string;
}

interface MeasuredRates {
  /** Read and written. */
  readonly copy_gb_per_s: number;
  readonly fma_tflops: number;
  /** Null where the device has no matrix units. */
  readonly matrix_tflops: number | null;
  /** Of a kernel that does next to nothing, among many in a pass; null where the device has no timestamps. */
  readonly dispatch_us: number | null;
}

/** What a model runs with on an adapter, and what keeps it from running. */
type RunPlan = Pick<InfoReport, "problem" | "dtype" | "largest_context" | "kernels" | "sizes"> & {
  readonly exitCode: number;
};

/** Sizes that are shown; distilgpt2 has half of gpt2's layers. */
const SHOWN_SIZES = ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] as const;
const SHOWN_CONTEXTS = [1024, 16_384, 65_536] as const;

/** Runs the command. @returns 0 when a run with the same flags would start; 3 without an adapter, else 1 */
export async function runInfo(options: InfoOptions): Promise<number> {
  const model = await modelFolder(options);
  const config = await readConfig(model);
  const { exitCode, ...report } = await collect(options, model, config);
  if (options.json) writeJson(report);
  else {
    writeResult(formatInfo(report));
    if (report.problem) {
      writeNote(`error: ${report.problem.message}`);
      if (report.problem.hint) writeNote(`\nhint: ${report.problem.hint}`);
    }
  }
  return exitCode;
}

async function collect(
  options: InfoOptions,
  model: string,
  config: GPT2Config,
): Promise<InfoReport & { readonly exitCode: number }> {
  const setup = inspectVulkan();
  const adapters = await listAdapters();
  const common = {
    version: VERSION,
    runtime: runtimeName(),
    webgpu: webgpuVersion(),
    vulkan: vulkanReport(setup),
    adapters,
    model,
  };
  let gpu: Gpu | undefined;
  let cache: InfoReport["shader_cache"] = null;
  try {
    // Quiet: what notices say is among the findings.
    gpu = await openCommandDevice({ ...options, quiet: true });
    cache = cacheReport(gpu.caps);
    const plan = planRun(config, chooseElem(options.dtype, gpu.caps), gpu, options);
    const measured = options.measure ? await measure(gpu) : null;
    const findings = diagnose(setup, adapters);
    return { ...common, findings, chosen: gpu.caps, ...plan, shader_cache: cache, measured };
  } catch (error) {
    if (!(error instanceof LongformError)) throw error;
    const { message, hint = null, exitCode, cause } = error;
    const reason = cause instanceof Error ? cause.message : undefined;
    const findings = DAWN_LOADS ? diagnose(setup, adapters, reason) : []; // else Vulkan is not what keeps us
    const nothing = { dtype: null, largest_context: null, kernels: [], sizes: [], measured: null };
    const chosen = gpu?.caps ?? null;
    return {
      ...common,
      findings,
      chosen,
      problem: { message, hint },
      ...nothing,
      shader_cache: cache,
      exitCode,
    };
  } finally {
    gpu?.destroy();
  }
}

/** The version that package.json pins. */
function webgpuVersion(): string | null {
  try {
    return JSON.parse(readFileSync(programFile("package.json"), "utf8")).dependencies.webgpu;
  } catch {
    return null; // a program in one file
  }
}

function vulkanReport({ loader, drivers, nvidia, ...setup }: VulkanSetup): VulkanReport {
  return {
    loader: loader
      ? { path: loader.path, version: loader.version ?? null, problem: loader.problem ?? null }
      : null,
    override: setup.override ?? null,
    searched: setup.searched,
    drivers: drivers.map((driver) => ({
      manifest: driver.manifest,
      api_version: driver.apiVersion ?? null,
      library_name: driver.libraryName ?? null,
      library: driver.library ?? null,
      problem: driver.problem ?? null,
      is_software: driver.isSoftware,
      maker: driver.maker ?? null,
      mesa: driver.mesa ?? null,
    })),
    gpus: setup.gpus,
    nvidia_driver: nvidia.driver ?? null,
    nvidia_driver_capabilities: nvidia.capabilities ?? null,
    in_container: setup.inContainer,
    hidden: setup.hidden,
  };
}

function cacheReport({ driver }: Capabilities): InfoReport["shader_cache"] {
  const cache = shaderCache(driver);
  return cache ? { keeper: cache.keeper, is_enabled: cache.isEnabled, folders: cache.folders } : null;
}

function planRun(
  config: GPT2Config,
  elem: Elem,
  gpu: Gpu,
  options: Pick<InfoOptions, "kernels">,
): RunPlan {
  const { caps } = gpu;
  const kernels = explainChoices(kernelShape(config, elem, caps), caps, options.kernels);
  const missing = kernels.filter(({ chosen }) => !chosen);
  const problem = missing.length === 0 ? null : {
    message: `No kernel for this model runs on ${caps.name}: nothing for ${
      missing.map(({ role }) => role).join(", ")
    }`,
    hint: adviceFor(missing.flatMap(({ rejected }) => rejected.map(({ reason }) => reason))),
  };
  return {
    exitCode: problem ? 4 : 0, // as the run itself would end
    problem,
    dtype: elem,
    largest_context: Math.min(config.nPositions, largestContext(config, { elem }, caps)),
    kernels,
    sizes: SHOWN_SIZES.map((name) => sizeReport(name, elem, gpu)),
  };
}

/** What a published model takes to decode one sequence, as `generate` plans it. */
function sizeReport(name: typeof SHOWN_SIZES[number], elem: Elem, gpu: Gpu): SizeReport {
  const { caps } = gpu;
  const config = PUBLISHED_SHAPES[name];
  const options = { elem, decoding: { sequences: 1, inFlight: inFlightOf(gpu) } };
  const plan = (context: number) => planMemory(config, { ...options, context }, caps);
  const largest = largestContext(config, options, caps);
  const bytes = SHOWN_CONTEXTS.map((context) =>
    [context, context <= largest ? plan(context).totalBytes : null] as const
  );
  return {
    model: name,
    weights_bytes: plan(SHOWN_CONTEXTS[0]).bytes.weights,
    bytes: Object.fromEntries(bytes),
    largest_context: largest,
    limit: limitBehind(config, options, largest, caps),
  };
}

/** What `checkFits` says of one token more than the largest context. */
function limitBehind(
  config: GPT2Config,
  options: Parameters<typeof largestContext>[1],
  largest: number,
  caps: Capabilities,
): string {
  const beyond = { ...options, context: largest + 1 };
  try {
    checkFits(config, beyond, planMemory(config, beyond, caps), caps);
  } catch (error) {
    if (error instanceof DoesNotFitError) return error.message;
    throw error;
  }
  return "nothing that longform knows of";
}

/** Runs of each measurement; the fastest counts. */
const MEASURED_RUNS = 3;

/** How fast a device is, whatever the model. */
async function measure(gpu: Gpu): Promise<MeasuredRates> {
  const config = PUBLISHED_SHAPES.gpt2;
  const benchmark = new Benchmark(gpu, config, {
    elem: "f32",
    chosen: chooseKernels(kernelShape(config, "f32", gpu.caps), gpu.caps),
    runs: MEASURED_RUNS,
    signal: new AbortController().signal,
  });
  try {
    const { copyRate, rates, dispatchMs } = await benchmark.peaks();
    return {
      copy_gb_per_s: copyRate / 1e9,
      fma_tflops: rates.fma / 1e12,
      matrix_tflops: rates.matrix === undefined ? null : rates.matrix / 1e12,
      dispatch_us: dispatchMs === undefined ? null : 1000 * dispatchMs,
    };
  } finally {
    benchmark.destroy();
  }
}

function formatInfo(report: InfoReport): string {
  const { chosen: caps, kernels, sizes, findings } = report;
  const sections = [
    [`longform ${report.version} on ${report.runtime}, Dawn of npm webgpu ${report.webgpu ?? "?"}`],
    ["Vulkan", ...formatVulkan(report.vulkan)],
    ["adapters", ...formatAdapters(report.adapters)],
  ];
  if (findings.length > 0) {
    sections.push([
      "what is wrong",
      ...findings.flatMap(({ cause, message, hint }) => [
        `  ${cause}: ${message}`,
        `    ${hint}`,
      ]),
    ]);
  }
  if (caps) sections.push([`a run takes ${caps.name}`, ...formatCapabilities(caps)]);
  if (kernels.length > 0) {
    sections.push([
      `kernels for ${report.model} in ${report.dtype}, context up to ${report.largest_context} tokens`,
      formatChoices(kernels),
    ]);
  }
  if (sizes.length > 0) {
    sections.push([`what fits in ${report.dtype}: memory by context in tokens`, ...formatSizes(sizes, caps)]);
  }
  if (caps) sections.push(["shader cache", ...formatCache(report.shader_cache)]);
  if (report.measured) sections.push(["measured", ...formatMeasured(report.measured)]);
  return sections.map((lines) => lines.join("\n")).join("\n\n") + "\n";
}

function formatVulkan(
  { loader, override, drivers, gpus, nvidia_driver: driver, hidden }: VulkanReport,
): string[] {
  const version = loader?.version ? ` (${loader.version})` : "";
  const label = (name: string) => `  ${name.padEnd(8)}`;
  return [
    label("loader") +
    (loader ? loader.path + version + (loader.problem ? `: ${loader.problem}` : "") : "none"),
    ...(override ? [`${label("drivers")}as ${override.name} says: ${override.value || "none"}`] : []),
    ...drivers.map((one) => label("driver") + formatDriver(one)),
    ...(drivers.length === 0 && !override ? [`${label("driver")}none`] : []),
    ...gpus.map(({ maker, device, state }) => `${label("GPU")}${maker}, ${device}: ${state}`),
    ...(driver ? [`${label("NVIDIA")}kernel driver ${driver}`] : []),
    ...(hidden.length > 0 ? [`${label("unseen")}Deno may not look at ${hidden.join(", ")}`] : []),
  ];
}

function formatDriver(driver: VulkanReport["drivers"][number]): string {
  if (driver.problem !== null) return `${driver.manifest}: ${driver.problem}`;
  const facts = [
    driver.is_software ? "CPU" : driver.maker,
    driver.mesa && `Mesa ${driver.mesa}`,
    driver.api_version && `Vulkan ${driver.api_version}`,
  ].filter(Boolean);
  return `${driver.manifest}: ${driver.library} (${facts.join("; ")})`;
}

function formatAdapters(adapters: readonly Capabilities[]): string[] {
  if (adapters.length === 0) return ["  none"];
  return adapters.map(({ name, driver, isSoftware }, i) =>
    `  ${i}  ${name} (${isSoftware ? "CPU" : "GPU"}; ${driver})`
  );
}

function formatCapabilities(caps: Capabilities): string[] {
  const memory = caps.memoryBytes === undefined
    ? "memory unknown: WebGPU does not tell it of a GPU"
    : `memory ${formatBytes(caps.memoryBytes)}`;
  return [
    `  f16 ${yesNo(caps.f16)}, timestamps ${yesNo(caps.timestamps)}, matrix units ${
      yesNo(caps.subgroupMatrix)
    }, ` +
    `subgroups ${describeSubgroups(caps)}`,
    `  buffers up to ${formatBytes(caps.maxBufferBytes)}, bindings up to ${
      formatBytes(caps.maxBindingBytes)
    }, ` +
    `workgroup memory ${formatBytes(caps.workgroupBytes)}, ${caps.workgroupInvocations} invocations`,
    `  ${memory}`,
  ];
}

function formatSizes(sizes: readonly SizeReport[], caps: Capabilities | null): string[] {
  const rows = sizes.map(({ model, weights_bytes: weights, bytes, largest_context: largest }) => [
    model,
    formatBytes(weights),
    ...SHOWN_CONTEXTS.map((context) => {
      const needed = bytes[context];
      return typeof needed === "number" ? formatBytes(needed) : "-";
    }),
    figure(largest),
  ]);
  const contexts = SHOWN_CONTEXTS.map((context) => figure(context));
  const table = formatTable(["", "weights", ...contexts, "most tokens"], rows, [0]);
  const limits = sizes.map(({ model, limit }) => `${model}: ${limit}`);
  const unknown = caps?.memoryBytes === undefined
    ? ["the GPU's memory is not known here, and limits all of these"]
    : [];
  return [...table.split("\n"), ...limits, ...unknown].map((line) => `  ${line}`);
}

function formatCache(cache: InfoReport["shader_cache"]): string[] {
  if (!cache) return ["  the driver's is not known"];
  if (!cache.is_enabled) return [`  ${cache.keeper}'s is turned off in the environment`];
  if (cache.folders.length === 0) return [`  ${cache.keeper}'s has no folder yet, or keeps it elsewhere`];
  return cache.folders.map(({ path, bytes }) => `  ${cache.keeper}'s: ${path}, ${formatBytes(bytes)}`);
}

function formatMeasured(measured: MeasuredRates): string[] {
  const { copy_gb_per_s: copy, fma_tflops: fma, matrix_tflops: matrix, dispatch_us: dispatch } = measured;
  return [
    `  copies ${figure(copy)} GB/s, read and written`,
    `  multiply-adds in f32 ${figure(fma)} TFLOP/s` +
    (matrix === null ? "" : `, matrices of f16 ${figure(matrix)} TFLOP/s`),
    ...(dispatch === null ? [] : [`  a dispatch ${figure(dispatch)} µs`]),
  ];
}

function yesNo(value: boolean): string {
  return value ? "yes" : "no";
}
