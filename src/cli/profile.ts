/** What `--profile` says of a run: where the time and the memory went, and how far that is from what the device can do. */
import type { DevicePeaks } from "../model/benchmark.ts";
import { formatBytes, type Purpose } from "../runtime/buffers.ts";
import type { Gpu } from "../runtime/device.ts";
import type { ArithmeticUnit, KernelTime, ProfilerReport } from "../runtime/profiler.ts";
import type { Timeline, Track } from "../runtime/timeline.ts";
import { figure, formatTable, percent } from "./table.ts";

/** One kernel in one variant, all of its calls together. */
export interface KernelProfile {
  readonly kernel: string;
  readonly variant: Readonly<Record<string, unknown>>;
  readonly calls: number;
  /** Without what its timestamps cost. */
  readonly gpu_ms: number;
  /** Of the time of all kernels. */
  readonly share: number;
  /** What the result needs at least, counted from the sizes (`Kernel.work`). */
  readonly bytes: number;
  readonly flops: number;
  /** Those of the time that it took. */
  readonly gb_per_s: number;
  readonly tflops: number;
  /** What does its arithmetic. */
  readonly unit: ArithmeticUnit;
  /** What the device would take for these bytes and operations at its measured rates; null where those are not known. */
  readonly floor_ms: number | null;
  /** Which of the two sets the floor. */
  readonly bound: "memory" | "compute" | null;
}

/** What the device can do at most, measured behind the run by kernels that do nothing else. */
export interface PeaksReport {
  readonly copy_gb_per_s: number;
  readonly fma_tflops: number;
  /** Null where there are no tensor cores. */
  readonly matrix_tflops: number | null;
  /** What it adds to a dispatch to be timed. */
  readonly timestamp_us: number;
}

/** Milliseconds of the GPU; `total_ms` is kernels, timestamps and gaps. */
export interface GpuProfile {
  readonly total_ms: number;
  /** Without timestamps. */
  readonly kernels_ms: number;
  readonly timestamps_ms: number;
  /** Within submissions, in which nothing timed ran: copies. */
  readonly gaps_ms: number;
  /** Between submissions. */
  readonly idle_ms: number;
  readonly submissions: number;
}

/** What the host did of one kind. */
export interface HostProfile {
  readonly count: number;
  /** In which at least one was under way; of encoding on threads, what all of them spent. */
  readonly ms: number;
  readonly bytes: number;
}

const HOST_TRACKS = {
  files: "reading and converting files",
  tokenization: "tokenization",
  compilation: "compiling kernels",
  uploads: "uploads",
  encoding: "recording dispatches",
  submission: "submitting",
  readbacks: "waiting for results",
} as const satisfies Partial<Record<Track, string>>;
type HostTrack = keyof typeof HOST_TRACKS;

/** A part of the run, in milliseconds since the process started. */
export interface PhaseProfile {
  readonly name: string;
  readonly start_ms: number;
  readonly ms: number;
}

/** What `--json` prints. */
export interface ProfileReport {
  readonly device: string;
  readonly driver: string;
  /** What could not be measured, and why. */
  readonly missing: readonly string[];
  /** Null where the device could not measure it. */
  readonly peaks: PeaksReport | null;
  /** Null, and no kernels, where the device has no timestamps. */
  readonly gpu: GpuProfile | null;
  readonly kernels: readonly KernelProfile[];
  readonly host: Readonly<Record<HostTrack, HostProfile>>;
  readonly phases: readonly PhaseProfile[];
  readonly memory: {
    readonly peak_bytes: number;
    readonly peak_at_ms: number;
    /** What was under way then. */
    readonly peak_phase: string | null;
    /** What was allocated then, by purpose. */
    readonly at_peak: Readonly<Record<Purpose, number>>;
  };
}

/** @param timed undefined where the device has no timestamps; `peaks` undefined, with a reason, where not measured */
export function profileReport(
  gpu: Gpu,
  timeline: Timeline,
  timed: ProfilerReport | undefined,
  peaks: DevicePeaks | undefined,
  reasons: readonly string[] = [],
): ProfileReport {
  const { name: device, driver } = gpu.caps;
  const { peak } = gpu.memory;
  const kernels = timed ? kernelProfiles(timed.kernels, peaks) : [];
  const missing = [...reasons];
  if (!timed) missing.push(`GPU times: ${device} has no timestamp queries`);
  if (timed && timed.untimed > 0) {
    missing.push(`times of ${timed.untimed} dispatches: more than a submission has timestamps for`);
  }
  return {
    device,
    driver,
    missing,
    peaks: peaks ? peaksReport(peaks) : null,
    gpu: timed ? gpuProfile(timed, kernels) : null,
    kernels,
    host: Object.fromEntries(
      (Object.keys(HOST_TRACKS) as HostTrack[]).map((track) => {
        const { spans, busyMs, bytes } = timeline.total(track);
        return [track, { count: spans, ms: busyMs, bytes }];
      }),
    ) as Record<HostTrack, HostProfile>,
    phases: timeline.spans.filter(({ track }) => track === "phases")
      .map(({ name, startMs, endMs }) => ({ name, start_ms: startMs, ms: endMs - startMs }))
      .sort((a, b) => a.start_ms - b.start_ms),
    memory: {
      peak_bytes: peak.totalBytes,
      peak_at_ms: peak.atMs,
      peak_phase: timeline.phaseAt(peak.atMs) ?? null,
      at_peak: peak.bytes,
    },
  };
}

export function peaksReport({ copyRate, rates, timestampMs }: DevicePeaks): PeaksReport {
  return {
    copy_gb_per_s: copyRate / 1e9,
    fma_tflops: rates.fma / 1e12,
    matrix_tflops: rates.matrix === undefined ? null : rates.matrix / 1e12,
    timestamp_us: 1000 * timestampMs,
  };
}

/** @param kernels the same as `kernelProfiles` has them */
export function gpuProfile({ gpu }: ProfilerReport, kernels: readonly KernelProfile[]): GpuProfile {
  const kernelsMs = kernels.reduce((sum, { gpu_ms: ms }) => sum + ms, 0);
  return {
    total_ms: gpu.totalMs,
    kernels_ms: kernelsMs,
    timestamps_ms: gpu.kernelsMs - kernelsMs,
    gaps_ms: gpu.gapsMs,
    idle_ms: gpu.idleMs,
    submissions: gpu.submissions,
  };
}

/** Kernels with what they achieve, against the roofline (Williams et al. 2009) of the device. */
export function kernelProfiles(
  kernels: readonly KernelTime[],
  peaks: DevicePeaks | undefined,
): KernelProfile[] {
  const timestampMs = peaks?.timestampMs ?? 0;
  const times = kernels.map((kernel) => ({
    ...kernel,
    gpuMs: Math.max(0, kernel.gpuMs - kernel.calls * timestampMs),
  }))
    .toSorted((a, b) => b.gpuMs - a.gpuMs);
  const totalMs = times.reduce((sum, { gpuMs }) => sum + gpuMs, 0);
  return times.map(({ kernel, variant, unit, calls, gpuMs, bytes, flops }) => {
    const rate = peaks?.rates[unit];
    const floors = peaks && rate !== undefined
      ? { memory: 1000 * bytes / peaks.copyRate, compute: 1000 * flops / rate }
      : undefined;
    const seconds = gpuMs / 1000;
    return {
      kernel,
      variant,
      calls,
      gpu_ms: gpuMs,
      share: totalMs > 0 ? gpuMs / totalMs : 0,
      bytes,
      flops,
      gb_per_s: seconds > 0 ? bytes / seconds / 1e9 : 0,
      tflops: seconds > 0 ? flops / seconds / 1e12 : 0,
      unit,
      floor_ms: floors ? Math.max(floors.memory, floors.compute) : null,
      bound: floors ? floors.memory >= floors.compute ? "memory" : "compute" : null,
    };
  });
}

/** The kernel's name, with the settings that set it apart where it ran in several variants. */
export function labelOf({ kernel, variant }: KernelProfile, all: readonly KernelProfile[]): string {
  const others = all.filter((other) => other.kernel === kernel && other.variant !== variant);
  const apart = Object.entries(variant).filter(([key, value]) =>
    others.some((other) => other.variant[key] !== value)
  );
  return [kernel, ...apart.map(([key, value]) => `${key}=${String(value)}`)].join(" ");
}

const HEADER = [
  "kernel",
  "calls",
  "ms",
  "%",
  "us/call",
  "GB/s",
  "% of copy",
  "TFLOP/s",
  "% of peak",
  "floor ms",
  "x floor",
  "bound by",
];

/** A line for each kernel; shares are of the device's rates. */
export function formatKernels({ kernels, peaks }: Pick<ProfileReport, "kernels" | "peaks">): string {
  const peakOf = (unit: ArithmeticUnit) => unit === "matrix" ? peaks?.matrix_tflops : peaks?.fma_tflops;
  const shareOf = (n: number, most: number | null | undefined) => percent(most ? n / most : null);
  const rows = kernels.map((row) => [
    labelOf(row, kernels),
    String(row.calls),
    row.gpu_ms.toFixed(3),
    percent(row.share),
    figure(1000 * row.gpu_ms / row.calls),
    figure(row.gb_per_s),
    shareOf(row.gb_per_s, peaks?.copy_gb_per_s),
    figure(row.tflops),
    shareOf(row.tflops, peakOf(row.unit)),
    row.floor_ms === null ? "-" : row.floor_ms.toFixed(3),
    row.floor_ms === null || row.floor_ms === 0 ? "-" : (row.gpu_ms / row.floor_ms).toFixed(1),
    row.bound ?? "-",
  ]);
  return formatTable(HEADER, rows, [0, HEADER.length - 1]);
}

function ms(n: number): string {
  return `${n.toFixed(n < 10 ? 3 : 1)} ms`;
}

/** Parts that hold others are indented less than those. */
function formatPhases({ phases }: ProfileReport): string {
  const depthOf = (phase: PhaseProfile) =>
    phases.filter((other) =>
      other !== phase && other.start_ms <= phase.start_ms &&
      other.start_ms + other.ms >= phase.start_ms + phase.ms
    ).length;
  const rows = phases.slice(0, MOST_PHASES).map((phase) => [
    `  ${"  ".repeat(depthOf(phase))}${phase.name}`,
    ms(phase.start_ms),
    ms(phase.ms),
  ]);
  const rest = phases.length > MOST_PHASES ? `\n  and ${phases.length - MOST_PHASES} more (--json)` : "";
  return formatTable(["run", "begins", "takes"], rows, [0]) + rest;
}

/** A run over many documents has thousands. */
const MOST_PHASES = 24;

function formatHost({ host }: ProfileReport): string {
  const rows = (Object.entries(host) as [HostTrack, HostProfile][])
    .filter(([, { count }]) => count > 0)
    .map(([track, { count, ms: busy, bytes }]) => [
      `  ${HOST_TRACKS[track]}`,
      ms(busy),
      count.toLocaleString("en-US"),
      bytes > 0 ? formatBytes(bytes) : "",
    ]);
  return formatTable(["host", "takes", "times", "moves"], rows, [0]);
}

export function formatGpu(gpu: GpuProfile): string {
  return `GPU: ${ms(gpu.total_ms)} in ${gpu.submissions} submissions: kernels ${
    ms(gpu.kernels_ms)
  }, their timestamps ${ms(gpu.timestamps_ms)}, copies and gaps ${
    ms(gpu.gaps_ms)
  }; idle between submissions ${ms(gpu.idle_ms)}`;
}

/** The report as text, in the order of what to look at first. */
export function formatProfile(report: ProfileReport): string {
  const { gpu, peaks, missing, memory } = report;
  const parts = [`profile of ${report.device} (${report.driver})`];
  if (gpu) parts.push(formatKernels(report), formatGpu(gpu));
  if (peaks) {
    const { copy_gb_per_s: copy, fma_tflops: fma, matrix_tflops: matrix } = peaks;
    parts.push(
      `device, measured behind the run: copies ${figure(copy)} GB/s; ${
        figure(fma)
      } TFLOP/s of multiply-adds in f32` +
        (matrix === null ? "" : `, ${figure(matrix)} of f16 matrices`) +
        `; ${figure(peaks.timestamp_us)} us to time a dispatch`,
    );
  }
  parts.push(formatPhases(report), formatHost(report));
  const { weights, kv, activations, staging } = memory.at_peak;
  parts.push(
    `GPU memory: most ${formatBytes(memory.peak_bytes)} after ${ms(memory.peak_at_ms)}${
      memory.peak_phase === null ? "" : ` (${memory.peak_phase})`
    }: weights ${formatBytes(weights)}, KV cache ${formatBytes(kv)}, activations ${
      formatBytes(activations)
    }, staging ${formatBytes(staging)}`,
  );
  if (missing.length > 0) parts.push(`not measured: ${missing.join("; ")}`);
  return parts.join("\n\n");
}
