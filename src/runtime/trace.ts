/**
 * A timeline and the GPU's timestamps as a Chrome trace (Trace Event Format, Google 2016; JSON object form), which
 * ui.perfetto.dev, chrome://tracing and speedscope open.
 */
import type { TimedSubmission } from "./profiler.ts";
import type { Span, Timeline, Track } from "./timeline.ts";

/** What was traced. */
export interface TraceSource {
  readonly timeline: Timeline;
  /** None where the device has no timestamps. */
  readonly submissions: readonly TimedSubmission[];
  /** Goes into the trace as it is: program, device, command. */
  readonly about: Readonly<Record<string, string>>;
}

/** Rows of the host in a viewer, from the top. */
const TRACKS: readonly Track[] = [
  "phases",
  "files",
  "tokenization",
  "compilation",
  "uploads",
  "encoding",
  "submission",
  "readbacks",
];

const HOST = 1;
const GPU = 2;
/** Rows for what is under way on one track at the same time; more would not be looked at. */
const MOST_LANES = 100;

/** A complete event: a slice from `ts`, `dur` long, in microseconds. */
interface Slice {
  readonly name: string;
  readonly startUs: number;
  readonly endUs: number;
  readonly args?: Readonly<Record<string, unknown>>;
}

/** The JSON text in pieces of a line or more, not to hold it all. */
export function* chromeTrace({ timeline, submissions, about }: TraceSource): Generator<string> {
  const clock = alignClocks(submissions);
  const notes = {
    ...about,
    ...(clock ? { gpu_clock: describeClock(clock) } : { gpu: "no timestamps: the GPU's track is empty" }),
    ...(timeline.dropped > 0 ? { dropped: `${timeline.dropped} spans and samples of the host` } : {}),
  };
  yield `{"displayTimeUnit":"ms","otherData":${JSON.stringify(notes)},"traceEvents":[\n`;
  yield metadata("process_name", HOST, 0, { name: "longform" });
  yield ",\n" + metadata("process_name", GPU, 0, { name: `GPU ${about.adapter ?? ""}`.trim() });
  for (const [row, track] of TRACKS.entries()) {
    const spans = timeline.spans.filter((span) => span.track === track);
    for (const [lane, slices] of lanesOf(spans).entries()) {
      const tid = row * MOST_LANES + lane + 1;
      const name = lane === 0 ? track : `${track} ${lane + 1}`;
      yield ",\n" + metadata("thread_name", HOST, tid, { name });
      yield ",\n" + metadata("thread_sort_index", HOST, tid, { sort_index: tid });
      for (const slice of slices) yield ",\n" + sliceEvent(slice, track, HOST, tid);
    }
  }
  for (const { atMs, bytes } of timeline.memory) {
    yield ",\n" +
      JSON.stringify({ name: "GPU memory, bytes", ph: "C", ts: micro(1000 * atMs), pid: GPU, args: bytes });
  }
  if (clock) {
    yield ",\n" + metadata("thread_name", GPU, 1, { name: "passes" });
    for (const submission of submissions) {
      for (const slice of gpuSlices(submission, clock)) yield ",\n" + sliceEvent(slice, "gpu", GPU, 1);
    }
  }
  yield "\n]}\n";
}

function metadata(name: string, pid: number, tid: number, args: object): string {
  return JSON.stringify({ name, ph: "M", pid, tid, args });
}

function sliceEvent({ name, startUs, endUs, args }: Slice, cat: string, pid: number, tid: number): string {
  const [ts, end] = [micro(startUs), micro(endUs)];
  return JSON.stringify({
    name,
    cat,
    ph: "X",
    ts,
    dur: end - ts,
    pid,
    tid,
    ...(args ? { args } : {}),
  });
}

/**
 * Microseconds in binary fractions of about a nanosecond: the sum of a slice's time and duration is then exact, and is
 * what the next one's time is where they touch. Decimals would overlap by their rounding, and readers nest what overlaps.
 */
function micro(us: number): number {
  return Math.round(1024 * us) / 1024;
}

/** Spans in rows in each of which they nest or follow one another: viewers take no others. */
function lanesOf(spans: readonly Span[]): Slice[][] {
  const ordered = spans.toSorted((a, b) => a.startMs - b.startMs || b.endMs - a.endMs);
  const lanes: { readonly slices: Slice[]; open: Span[] }[] = [];
  for (const span of ordered) {
    let lane = lanes.find((one) => {
      one.open = one.open.filter(({ endMs }) => endMs > span.startMs);
      const around = one.open.at(-1);
      return around === undefined || span.endMs <= around.endMs;
    });
    if (!lane && lanes.length < MOST_LANES) lanes.push(lane = { slices: [], open: [] });
    if (!lane) continue;
    lane.open.push(span);
    lane.slices.push({
      name: span.name,
      startUs: 1000 * span.startMs,
      endUs: 1000 * span.endMs,
      ...(span.bytes > 0 ? { args: { bytes: span.bytes } } : {}),
    });
  }
  return lanes.map(({ slices }) => slices);
}

/** The GPU's clock against the host's. */
interface ClockOffset {
  /** A moment on the GPU's clock, in ns: microseconds since then are exact as numbers. */
  readonly origin: bigint;
  /** What it is on the host's clock. */
  readonly offsetUs: number;
  /** How much larger it could be. */
  readonly slackUs: number;
}

/**
 * WebGPU does not relate the two clocks. But nothing begins before it is handed over, nor ends after its end was seen: the
 * offset is the least that no submission contradicts, at which some submission begins the moment it is handed over.
 */
function alignClocks(submissions: readonly TimedSubmission[]): ClockOffset | undefined {
  const origin = submissions[0]?.ticks[0];
  if (origin === undefined) return undefined;
  let least = -Infinity;
  let most = Infinity;
  for (const { submittedMs, observedMs, ticks } of submissions) {
    const last = ticks.reduce((a, b) => a > b ? a : b);
    least = Math.max(least, 1000 * submittedMs - sinceUs(ticks[0]!, origin));
    most = Math.min(most, 1000 * observedMs - sinceUs(last, origin));
  }
  return { origin, offsetUs: least, slackUs: most - least };
}

function sinceUs(tick: bigint, origin: bigint): number {
  return Number(tick - origin) / 1000;
}

function describeClock({ slackUs }: ClockOffset): string {
  return slackUs >= 0
    ? `put as early as submissions allow; up to ${Math.ceil(slackUs)} us later is possible`
    : `drifts from the host's by ${Math.ceil(-slackUs)} us over the run`;
}

/** A submission with its steps, their parts and those parts' dispatches, outermost first. */
function* gpuSlices(
  { label, dispatches, ticks }: TimedSubmission,
  { origin, offsetUs }: ClockOffset,
): Generator<Slice> {
  const bounds: { readonly startUs: number; readonly endUs: number }[] = [];
  let endUs = -Infinity;
  for (let i = 0; i < dispatches.length; i++) {
    // Passes may overlap at their ends, slices of a row may not.
    const startUs = Math.max(endUs, sinceUs(ticks[2 * i]!, origin) + offsetUs);
    endUs = Math.max(startUs, sinceUs(ticks[2 * i + 1]!, origin) + offsetUs);
    bounds.push({ startUs, endUs });
  }
  const slice = (name: string, first: number, last: number) => ({
    name,
    startUs: bounds[first]!.startUs,
    endUs: bounds[last]!.endUs,
  });
  yield slice(label, 0, dispatches.length - 1);
  for (const [stepFirst, stepLast] of runs(dispatches, 0, dispatches.length, ({ step }) => step)) {
    const { step } = dispatches[stepFirst]!;
    if (step !== undefined) yield slice(step, stepFirst, stepLast);
    for (const [first, last] of runs(dispatches, stepFirst, stepLast + 1, ({ part }) => part)) {
      const { part } = dispatches[first]!;
      if (part !== undefined) yield slice(part, first, last);
      for (let i = first; i <= last; i++) {
        const { kernel, variant, work: { bytes, flops } } = dispatches[i]!;
        yield { ...slice(kernel, i, i), args: { ...variant, bytes, flops } };
      }
    }
  }
}

/** Ranges of neighbours with the same key, first and last. */
function* runs<T>(
  items: readonly T[],
  from: number,
  end: number,
  key: (item: T) => string | undefined,
): Generator<readonly [first: number, last: number]> {
  for (let first = from; first < end;) {
    let last = first;
    while (last + 1 < end && key(items[last + 1]!) === key(items[first]!)) last++;
    yield [first, last];
    first = last + 1;
  }
}
