/** What `bench` measures, as its JSON has it, and recorded results read back. */
import { isPublishedShape, PUBLISHED_SHAPES, type PublishedShape } from "../model/config.ts";
import { describeJson, isJsonObject, type JsonObject, readJsonObject } from "../model/json_file.ts";
import { InputError, ModelError } from "../runtime/errors.ts";
import type { Elem } from "../runtime/kernel.ts";
import type { ArithmeticUnit } from "../runtime/profiler.ts";
import { BENCH_PHASES, type BenchPhase } from "./options.ts";
import type { GpuProfile, KernelProfile, PeaksReport } from "./profile.ts";
import { shortName } from "./table.ts";

/** Milliseconds of a run; of one step for `decode`. */
export interface Spread {
  readonly min: number;
  readonly median: number;
  readonly max: number;
}

/** One measurement, or why there is none. */
export interface BenchRow {
  readonly phase: BenchPhase;
  /** Whose it is, where that is not longform. */
  readonly peer?: string;
  /** What ran; absent for a whole model. */
  readonly kernel?: string;
  /** The kind of attention or its pattern, the name of the matrix, or how many sequences are decoded together. */
  readonly variant: string;
  readonly context: number;
  readonly dtype: Elem;
  readonly ms: Spread | null;
  readonly tokens_per_s: number | null;
  readonly tflops: number | null;
  /** Null where the bytes say nothing about the time. */
  readonly gb_per_s: number | null;
  /** Of GPU buffers. */
  readonly peak_bytes: number | null;
  /** Of block-sparse attention: kept blocks as a share of the causal ones, in decoding of the last token's. */
  readonly density?: number;
  readonly checked_against?: string;
  /** As a share of the largest value of its row, as `tolerance` is. */
  readonly largest_difference?: number;
  readonly tolerance?: number;
  readonly error?: string;
  /** Of the scores that did not fit. */
  readonly needed_bytes?: number;
}

/** Where one run's time went, kernel by kernel. */
export interface BenchProfile {
  readonly phase: BenchPhase;
  readonly context: number;
  readonly variant: string;
  /** As the row of the same measurement counts it, of the profiled run: timestamps included. */
  readonly ms: number;
  readonly peaks: PeaksReport;
  readonly gpu: GpuProfile;
  readonly kernels: readonly KernelProfile[];
}

/** A file that a report was drawn from. */
export interface BenchSource {
  readonly file: string;
  readonly commit?: string;
  readonly command?: string;
  readonly date?: string;
}

/** What `--json` prints. */
export interface BenchReport {
  readonly adapter: string;
  readonly driver: string;
  readonly runtime: string;
  readonly version: string;
  readonly model: string;
  /** Null where recorded results do not say. */
  readonly runs: number | null;
  /**
   * What times kernels: `gpu` is its timestamps, `wall` where it has none; null where recorded results do not
   * say. Whole models are timed by the wall.
   */
  readonly kernel_clock: "gpu" | "wall" | null;
  /** Read and written by a kernel that copies a large buffer; null when it was interrupted. */
  readonly copy_gb_per_s: number | null;
  /** Arithmetic from registers, by a kernel that does nothing else; null when it was interrupted. */
  readonly peak_tflops: number | null;
  /** What that is of: f16 matrices on tensor cores, or multiply-adds in f32. */
  readonly peak_unit: ArithmeticUnit;
  /** Attention heads of the model; absent in older results. */
  readonly heads?: number;
  readonly rows: readonly BenchRow[];
  readonly profiles?: readonly BenchProfile[];
  /** Of a report that `--from` drew. */
  readonly sources?: readonly BenchSource[];
  /** What of them is not shown, and why. */
  readonly remarks?: readonly string[];
}

/** What `peak_tflops` is of. */
export const PEAK_NAMES = {
  matrix: "matrices multiplied from registers",
  fma: "multiply-adds from registers",
} as const satisfies Record<ArithmeticUnit, string>;

/** What a row is of, whoever measured it. */
export function nameOf({ peer, phase, variant }: Pick<BenchRow, "peer" | "phase" | "variant">): string {
  if (peer === undefined) return variant;
  return phase === "gemm" ? `${peer} ${variant}` : peer;
}

/** Rows of equal keys are measurements of the same work. */
export function keyOf(row: BenchRow): string {
  return JSON.stringify([row.phase, row.peer ?? null, row.variant, row.context, row.dtype]);
}

/** How `bench` names a published model's sizes with random weights. */
export function shapeName(shape: PublishedShape): string {
  return `${shape}, random weights`;
}

/** Undefined where neither the result nor the model's name says it. */
export function headsOf({ heads, model }: BenchReport): number | undefined {
  if (heads !== undefined) return heads;
  const shape = (Object.keys(PUBLISHED_SHAPES) as PublishedShape[]).find((name) => model === shapeName(name));
  return shape && PUBLISHED_SHAPES[shape].nHead;
}

/** Dawn's name of an adapter is the driver's in lower case with hyphens for all else. */
export function isSameDevice(a: string, b: string): boolean {
  const plain = (name: string) => name.toLowerCase().replace(/[^a-z0-9]+/g, "");
  return plain(a) === plain(b);
}

const HINT = "give what `longform bench --json`, bench/peers/run.ts or bench/side_by_side.ts wrote";

/** Of a list: some hundred times those of the longest benchmark. */
const MOST_ENTRIES = 10_000;

/** Typed fields of a parsed object. @throws InputError that names the field */
class Fields {
  readonly object: JsonObject;
  readonly where: string;

  constructor(value: unknown, where: string) {
    if (!isJsonObject(value)) throw new InputError(`${where} is not an object`, { hint: HINT });
    this.object = value;
    this.where = where;
  }

  #wrong(key: string, wanted: string): InputError {
    const value = this.object[key];
    const found = value === undefined ? "missing" : describeJson(value);
    return new InputError(`${this.where}: \`${key}\` is ${found}, wanted ${wanted}`, { hint: HINT });
  }

  has(key: string): boolean {
    return this.object[key] !== undefined && this.object[key] !== null;
  }

  text(key: string): string {
    const value = this.object[key];
    if (typeof value !== "string") throw this.#wrong(key, "a text");
    return value;
  }

  oneOf<const T extends string>(key: string, values: readonly T[]): T {
    const value = values.find((one) => one === this.object[key]);
    if (value === undefined) throw this.#wrong(key, values.join(" or "));
    return value;
  }

  /** Finite and not negative. */
  number(key: string): number {
    const value = this.object[key];
    if (typeof value !== "number" || !Number.isFinite(value) || value < 0) {
      throw this.#wrong(key, "a number that is not negative");
    }
    return value;
  }

  numberOrNull(key: string): number | null {
    return this.has(key) ? this.number(key) : null;
  }

  positive(key: string): number {
    const value = this.number(key);
    if (value === 0) throw this.#wrong(key, "a number above 0");
    return value;
  }

  fields(key: string): Fields {
    return new Fields(this.object[key], `${this.where}: \`${key}\``);
  }

  list(key: string): Fields[] {
    const value = this.object[key];
    if (!Array.isArray(value)) throw this.#wrong(key, "a list");
    if (value.length > MOST_ENTRIES) {
      throw new InputError(
        `${this.where}: \`${key}\` has ${value.length} entries, at most ${MOST_ENTRIES} are read`,
        {
          hint: HINT,
        },
      );
    }
    return value.map((one, i) => new Fields(one, `${this.where}: \`${key}[${i}]\``));
  }

  texts(key: string): string[] {
    const value = this.object[key];
    if (!Array.isArray(value) || value.some((one) => typeof one !== "string")) {
      throw this.#wrong(key, "a list of texts");
    }
    return value;
  }

  /** Those of `keys` that are there: for fields that may be absent. */
  some<K extends string, T>(keys: readonly K[], read: (key: K) => T): { readonly [key in K]?: T } {
    const found = keys.filter((key) => this.has(key)).map((key) => [key, read(key)] as const);
    return Object.fromEntries(found) as { readonly [key in K]?: T };
  }
}

const UNITS = ["matrix", "fma"] as const satisfies readonly ArithmeticUnit[];
const ELEMS = ["f16", "f32"] as const satisfies readonly Elem[];

function spreadOf(row: Fields): Spread | null {
  if (!row.has("ms")) return null;
  const ms = row.fields("ms");
  const [min, median, max] = [ms.positive("min"), ms.positive("median"), ms.positive("max")];
  if (min > median || median > max) {
    throw new InputError(`${ms.where} has a median of ${median} outside of ${min} to ${max}`, { hint: HINT });
  }
  return { min, median, max };
}

/** @param named `phase`, `variant` and whose it is, where the file's rows have them otherwise */
function rowOf(row: Fields, named: Partial<Pick<BenchRow, "variant" | "peer" | "dtype">> = {}): BenchRow {
  return {
    phase: row.oneOf("phase", BENCH_PHASES),
    ...row.some(["peer"], (key) => row.text(key)),
    variant: named.variant ?? row.text("variant"),
    context: row.positive("context"),
    dtype: named.dtype ?? row.oneOf("dtype", ELEMS),
    ...row.some(["kernel"], (key) => row.text(key)),
    ms: spreadOf(row),
    tokens_per_s: row.numberOrNull("tokens_per_s"),
    tflops: row.numberOrNull("tflops"),
    gb_per_s: row.numberOrNull("gb_per_s"),
    peak_bytes: row.numberOrNull("peak_bytes"),
    ...row.some(["density", "largest_difference", "tolerance", "needed_bytes"], (key) => row.number(key)),
    ...row.some(["checked_against", "error"], (key) => row.text(key)),
    ...named,
  };
}

function profileOf(profile: Fields): BenchProfile {
  const [peaks, gpu] = [profile.fields("peaks"), profile.fields("gpu")];
  return {
    phase: profile.oneOf("phase", BENCH_PHASES),
    context: profile.positive("context"),
    variant: profile.text("variant"),
    ms: profile.number("ms"),
    peaks: {
      copy_gb_per_s: peaks.positive("copy_gb_per_s"),
      fma_tflops: peaks.positive("fma_tflops"),
      matrix_tflops: peaks.numberOrNull("matrix_tflops"),
      timestamp_us: peaks.number("timestamp_us"),
    },
    gpu: {
      total_ms: gpu.number("total_ms"),
      kernels_ms: gpu.number("kernels_ms"),
      timestamps_ms: gpu.number("timestamps_ms"),
      gaps_ms: gpu.number("gaps_ms"),
      idle_ms: gpu.number("idle_ms"),
      submissions: gpu.number("submissions"),
    },
    kernels: profile.list("kernels").map((kernel) => ({
      kernel: kernel.text("kernel"),
      variant: kernel.fields("variant").object,
      calls: kernel.number("calls"),
      gpu_ms: kernel.number("gpu_ms"),
      share: kernel.number("share"),
      bytes: kernel.number("bytes"),
      flops: kernel.number("flops"),
      gb_per_s: kernel.number("gb_per_s"),
      tflops: kernel.number("tflops"),
      unit: kernel.oneOf("unit", UNITS),
      floor_ms: kernel.numberOrNull("floor_ms"),
      bound: kernel.has("bound") ? kernel.oneOf("bound", ["memory", "compute"]) : null,
    })),
  };
}

/** What all three kinds of files say alike. */
function commonOf(file: Fields, name: string) {
  return {
    adapter: file.text("adapter"),
    driver: file.text("driver"),
    runtime: file.text("runtime"),
    version: file.text("version"),
    sources: [{ file: name, ...file.some(["commit", "command", "date"], (key) => file.text(key)) }],
  };
}

function ratesOf(measured: Fields) {
  return {
    copy_gb_per_s: measured.numberOrNull("copy_gb_per_s"),
    peak_tflops: measured.numberOrNull("peak_tflops"),
    peak_unit: measured.has("peak_unit") ? measured.oneOf("peak_unit", UNITS) : "fma",
  } as const;
}

function fromBench(file: Fields, name: string): BenchReport {
  return {
    ...commonOf(file, name),
    model: file.text("model"),
    runs: file.numberOrNull("runs"),
    kernel_clock: file.has("kernel_clock") ? file.oneOf("kernel_clock", ["gpu", "wall"]) : null,
    ...ratesOf(file),
    ...file.some(["heads"], (key) => file.positive(key)),
    rows: file.list("rows").map((row) => rowOf(row)),
    ...(file.has("profiles") ? { profiles: file.list("profiles").map(profileOf) } : {}),
    ...file.some(["remarks"], (key) => file.texts(key)),
  };
}

/** Of bench/side_by_side.ts. */
function fromSideBySide(file: Fields, name: string): BenchReport {
  const ours = file.list("ours");
  const peer = file.fields("peer");
  const shape = file.text("shape");
  const remarks = [...ours, peer].filter((one) => one.has("error"))
    .map((one) => `\`${one.text("process")}\` did not end well: ${lastLine(one.text("error"))}`);
  return {
    ...commonOf(file, name),
    model: isPublishedShape(shape) ? shapeName(shape) : shape,
    runs: null,
    kernel_clock: null,
    ...ratesOf(ours[0] ?? file),
    rows: [
      ...ours.flatMap((measured) => measured.list("rows").map((row) => rowOf(row))),
      ...peer.list("rows").map((row) => {
        const peer = row.text("variant");
        // A peer's products are named where our kernels are.
        return rowOf(row, row.text("phase") === "gemm" ? { peer, variant: row.text("kernel") } : { peer });
      }),
    ],
    remarks,
  };
}

/** longform among its peers: a prompt handed over and its first token awaited, more than `prefill` alone. */
const WHOLE_CALLS = "flash, timed as peers are";

/** Of bench/peers/run.ts. */
function fromPeers(file: Fields, name: string): BenchReport {
  const common = commonOf(file, name);
  const model = file.text("model");
  const rows: BenchRow[] = [];
  const remarks: string[] = [];
  const add = (result: Fields, named: (title: string) => Pick<BenchRow, "variant" | "peer">) => {
    const peer = result.text("peer");
    if (result.has("error")) return void remarks.push(`${peer} was not measured: ${result.text("error")}`);
    const device = result.has("device") ? result.text("device") : "an unknown device";
    if (!isSameDevice(common.adapter, device)) {
      return void remarks.push(`${peer} ran on ${device}, not on ${common.adapter}: it is no comparison`);
    }
    const title = `${peer} ${result.text("version")}, ${result.text("provider")}`;
    const dtype = result.oneOf("dtype", ELEMS);
    rows.push(...result.list("rows").map((row) => rowOf(row, { dtype, ...named(title) })));
  };
  add(file.fields("ours"), () => ({ variant: WHOLE_CALLS }));
  for (const peer of file.list("peers")) add(peer, (title) => ({ variant: title, peer: title }));
  return {
    ...common,
    model: isPublishedShape(model) ? shapeName(model) : model,
    runs: null,
    kernel_clock: null,
    ...ratesOf(file),
    rows,
    remarks,
  };
}

function lastLine(text: string): string {
  return text.trim().split("\n").at(-1)!;
}

/**
 * Reads what `bench --json`, bench/peers/run.ts or bench/side_by_side.ts wrote.
 * @throws InputError that says which file and field is not as they write it
 */
export async function readBenchResult(path: string): Promise<BenchReport> {
  let json: JsonObject;
  try {
    json = await readJsonObject(path);
  } catch (error) {
    if (!(error instanceof ModelError)) throw error;
    throw new InputError(error.message, { hint: HINT, cause: error });
  }
  const file = new Fields(json, path);
  if (file.has("rows")) return fromBench(file, path);
  if (file.has("ours") && file.has("peer")) return fromSideBySide(file, path);
  if (file.has("ours") && file.has("peers")) return fromPeers(file, path);
  throw new InputError(`${path} is no result of a benchmark: it has neither \`rows\` nor \`ours\``, {
    hint: HINT,
  });
}

/** Results have to agree on these to be drawn together. */
const SAME = ["adapter", "model"] as const;

/**
 * Several files' results as one. Where two measured the same, the first one's row counts, and `remarks` says so.
 * @throws InputError where adapter or model differ
 */
export async function mergeBenchResults(paths: readonly string[]): Promise<BenchReport> {
  const results = await Promise.all(paths.map(readBenchResult));
  const first = results[0]!;
  const remarks: string[] = [];
  const rows = new Map<string, BenchRow>();
  results.forEach((result, i) => {
    const path = paths[i]!;
    for (const field of SAME) {
      if (result[field] === first[field]) continue;
      throw new InputError(
        `The results differ in their ${field}: ${shortName(first[field])} in ${paths[0]}, ` +
          `${shortName(result[field])} in ${path}`,
        { hint: "draw each in a report of its own, or use `longform bench compare`" },
      );
    }
    if (result.driver !== first.driver) {
      remarks.push(`${path} is of another driver: ${result.driver}, and not ${first.driver}`);
    }
    remarks.push(...result.remarks ?? []);
    const known = result.rows.filter((row) => rows.has(keyOf(row))).length;
    if (known > 0) {
      remarks.push(`${known} of the ${result.rows.length} rows of ${path} are left out: measured above`);
    }
    for (const row of result.rows) if (!rows.has(keyOf(row))) rows.set(keyOf(row), row);
  });
  const profiles = results.flatMap((result) => result.profiles ?? []);
  const heads = results.map(headsOf).find((count) => count !== undefined);
  const sameOf = <T>(of: (result: BenchReport) => T) =>
    results.every((result) => of(result) === of(first)) ? of(first) : null;
  return {
    ...first,
    runs: sameOf(({ runs }) => runs),
    kernel_clock: sameOf(({ kernel_clock: clock }) => clock),
    ...(heads === undefined ? {} : { heads }),
    rows: [...rows.values()],
    ...(profiles.length > 0 ? { profiles } : {}),
    sources: results.flatMap(({ sources }) => sources ?? []),
    remarks,
  };
}
