/** What the Trace Event Format asks of a trace (Google 2016, "JSON Object Format", "Event Descriptions"). */

export interface TraceEvent {
  readonly name: string;
  readonly ph: string;
  readonly pid: number;
  readonly tid?: number;
  readonly ts?: number;
  readonly dur?: number;
  readonly cat?: string;
  readonly args?: Readonly<Record<string, unknown>>;
}

export interface Trace {
  readonly displayTimeUnit: string;
  readonly otherData: Readonly<Record<string, string>>;
  readonly traceEvents: readonly TraceEvent[];
}

/** What is wrong with a trace; nothing with one that viewers take as it is meant. */
export function traceProblems({ displayTimeUnit, traceEvents }: Trace): string[] {
  const problems: string[] = [];
  if (!["ms", "ns"].includes(displayTimeUnit)) problems.push(`displayTimeUnit ${displayTimeUnit}`);
  const threads = new Map<string, TraceEvent[]>();
  const named = new Set<string>();
  for (const event of traceEvents) {
    const where = JSON.stringify(event);
    const { name, ph, pid, tid, ts, dur, args } = event;
    if (typeof name !== "string" || !Number.isInteger(pid)) problems.push(`no name or process: ${where}`);
    if (ph === "M") {
      if (!args) problems.push(`metadata without arguments: ${where}`);
      if (name === "thread_name") named.add(`${pid} ${tid}`);
      continue;
    }
    if (!Number.isFinite(ts)) problems.push(`no time: ${where}`);
    if (ph === "C") {
      if (!Object.values(args ?? {}).every(Number.isFinite)) problems.push(`no numbers to count: ${where}`);
    } else if (ph === "X") {
      if (!(dur! >= 0) || !Number.isInteger(tid)) problems.push(`no duration or thread: ${where}`);
      const thread = `${pid} ${tid}`;
      threads.set(thread, [...threads.get(thread) ?? [], event]);
    } else problems.push(`unexpected phase: ${where}`);
  }
  for (const [thread, events] of threads) {
    if (!named.has(thread)) problems.push(`thread ${thread} has no name`);
    const open: number[] = [];
    // Of slices that begin together the longer is the outer one.
    for (const { ts, dur, name } of events.toSorted((a, b) => a.ts! - b.ts! || b.dur! - a.dur!)) {
      while (open.length > 0 && open.at(-1)! <= ts!) open.pop();
      const end = ts! + dur!;
      if (open.length > 0 && end > open.at(-1)!) {
        problems.push(`${name} at ${ts} leaves its slice`);
      }
      open.push(end);
    }
  }
  return problems;
}
