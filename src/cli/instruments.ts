/** What `--profile` and `--trace` ask for, over one run of a command. */
import process from "node:process";
import { chooseKernels } from "../kernels/index.ts";
import { requireWritable, writeFileAtomically } from "../model/atomic_file.ts";
import { Benchmark, type DevicePeaks } from "../model/benchmark.ts";
import type { Gpt2 } from "../model/gpt2.ts";
import { kernelShape } from "../model/memory_plan.ts";
import type { Gpu } from "../runtime/device.ts";
import { LongformError } from "../runtime/errors.ts";
import type { Profiler, ProfilerOptions } from "../runtime/profiler.ts";
import { Timeline } from "../runtime/timeline.ts";
import { chromeTrace } from "../runtime/trace.ts";
import { openCommandDevice } from "./load.ts";
import type { CommonOptions } from "./options.ts";
import { writeNote } from "./output.ts";
import { type ProfileReport, profileReport } from "./profile.ts";
import { runtimeName, VERSION } from "./version.ts";

export interface InstrumentOptions extends CommonOptions {
  readonly profile: boolean;
  readonly trace: string | undefined;
}

/** Runs of each measurement of the device's rates; the fastest counts. */
const PEAK_RUNS = 3;
/** Characters of a trace that are written at a time. */
const WRITTEN_AT_ONCE = 1 << 20;

/** Watches a run, where that is asked for; otherwise everything here does nothing. */
export class Instruments {
  /** For `DeviceOptions`; undefined where nobody wants to know. */
  readonly timeline: Timeline | undefined;
  /** For `openProfiler`. */
  readonly profiling: ProfilerOptions | undefined;
  readonly #options: InstrumentOptions;
  #peaks: Promise<DevicePeaks | LongformError> | undefined;

  private constructor(options: InstrumentOptions) {
    const { profile, trace } = options;
    const keepsAll = trace !== undefined;
    this.#options = options;
    if (!profile && !keepsAll) return;
    this.timeline = new Timeline({ keepsAll });
    this.profiling = { unit: "dispatches", keepsAll };
  }

  /** @throws OutputError when the trace could not be written: before anything has run */
  static async open(options: InstrumentOptions): Promise<Instruments> {
    if (options.trace !== undefined) await requireWritable(options.trace);
    return new Instruments(options);
  }

  /** Begins the sums anew, so that a report is of what follows. */
  async restart(profiler: Profiler | undefined): Promise<void> {
    await profiler?.settle();
    profiler?.reset();
    this.timeline?.resetTotals();
  }

  /** What `--profile` reports since the last restart; undefined without it. */
  async profile(gpu: Gpu, model: Gpt2, profiler: Profiler | undefined): Promise<ProfileReport | undefined> {
    if (!this.#options.profile || !this.timeline) return undefined;
    await profiler?.settle();
    const timed = profiler?.report();
    const peaks = await (this.#peaks ??= this.#measurePeaks(model));
    return peaks instanceof LongformError
      ? profileReport(gpu, this.timeline, timed, undefined, [`the device's rates: ${peaks.message}`])
      : profileReport(gpu, this.timeline, timed, peaks);
  }

  /** Writes what `--trace` asks for; nothing without it. @throws OutputError */
  async writeTrace(gpu: Gpu, profiler: Profiler | undefined): Promise<void> {
    const { trace: path, quiet } = this.#options;
    if (path === undefined || !this.timeline) return;
    await profiler?.settle();
    const about = {
      program: `longform ${VERSION}`,
      runtime: runtimeName(),
      adapter: gpu.caps.name,
      driver: gpu.caps.driver,
      command: ["longform", ...process.argv.slice(2)].join(" "),
    };
    const pieces = chromeTrace({ timeline: this.timeline, submissions: profiler?.submissions ?? [], about });
    const encoder = new TextEncoder();
    await writeFileAtomically(path, async (file) => {
      let position = 0;
      let text = "";
      const flush = async () => {
        const bytes = encoder.encode(text);
        await file.write(bytes, position);
        position += bytes.length;
        text = "";
      };
      for (const piece of pieces) {
        text += piece;
        if (text.length >= WRITTEN_AT_ONCE) await flush();
      }
      await flush();
    });
    const lost = this.timeline.dropped + (profiler?.unkept ?? 0);
    if (lost > 0) {
      writeNote(`note: the run was too long for its trace: ${lost} events at its end are not in it`);
    }
    if (!quiet) writeNote(`trace: ${path} opens in ui.perfetto.dev, chrome://tracing or speedscope`);
  }

  /** On a device of its own: what it allocates and compiles is no part of the run. */
  async #measurePeaks({ config, elem }: Gpt2): Promise<DevicePeaks | LongformError> {
    let gpu: Gpu | undefined;
    let benchmark: Benchmark | undefined;
    try {
      gpu = await openCommandDevice({ ...this.#options, quiet: true });
      benchmark = new Benchmark(gpu, config, {
        elem,
        chosen: chooseKernels(kernelShape(config, elem, gpu.caps), gpu.caps),
        runs: PEAK_RUNS,
        signal: new AbortController().signal,
      });
      return await benchmark.peaks();
    } catch (error) {
      // A GPU that the run has filled has no room for measurements; the rest of the report is none the worse.
      if (error instanceof LongformError) return error;
      throw error;
    } finally {
      benchmark?.destroy();
      gpu?.destroy();
    }
  }
}
