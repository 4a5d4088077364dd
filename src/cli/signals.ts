/**
 * SIGINT, SIGTERM and SIGHUP: a command that has something to keep ends in order, anything else ends at once. Nothing is
 * left half-written, and the exit code says which signal it was.
 */
import process from "node:process";
import { removeTemporaryFiles } from "../model/atomic_file.ts";
import { Host } from "../runtime/host.ts";

/** 128 and the signal's number: what a shell reports of a process that the signal has killed. */
const EXIT_CODES = { SIGHUP: 129, SIGINT: 130, SIGTERM: 143 } as const;

type EndingSignal = keyof typeof EXIT_CODES;

interface Listener {
  readonly controller: AbortController;
  readonly onHardExit: () => void;
}

/** The command's part that ends in order; undefined while there is none. */
let listener: Listener | undefined;
/** What came last. */
let received: EndingSignal = "SIGINT";

/** For the end that a signal brings. */
const MOST_WAITED_MS = 1000;

/** To be called when the process starts. */
export function handleSignals(): void {
  process.on("SIGINT", receive);
  process.on("SIGTERM", receive);
  if (endsOnHangup()) process.on("SIGHUP", receive);
}

/**
 * Ends the process as the signal does where nobody listens. To exit would run the destructors of Dawn and the driver while
 * their threads are at work: on Deno, that was seen to crash, and to print what such a thread said last.
 */
function endBySignal(signal: EndingSignal): never {
  removeTemporaryFiles();
  process.off(signal, receive);
  process.kill(process.pid, signal);
  // On Deno a thread does it a little later; and the first process of a container is not killed by its own signals.
  Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, MOST_WAITED_MS);
  process.exit(EXIT_CODES[signal]);
}

/** Aborts on the first signal; the second ends the process, and does not wait for the work in flight. */
export function abortOnSignal(onHardExit: () => void): { controller: AbortController; stop: () => void } {
  const own = { controller: new AbortController(), onHardExit };
  listener = own;
  return {
    controller: own.controller,
    stop: () => {
      if (listener === own) listener = undefined;
    },
  };
}

/** Exit code of a command that a signal has ended. */
export function interruptedExitCode(): number {
  return EXIT_CODES[received];
}

function receive(signal: NodeJS.Signals): void {
  received = signal as EndingSignal;
  if (listener && !listener.controller.signal.aborted) {
    listener.controller.abort();
    return;
  }
  listener?.onHardExit();
  endBySignal(received);
}

/**
 * Whether the end of the terminal or the session is known to end the process. `nohup` starts it with the signal ignored,
 * which a handler would undo, so where that cannot be seen, on Deno and outside Linux, the system's way is left alone.
 */
function endsOnHangup(): boolean {
  const status = new Host().text("/proc/self/status") ?? "";
  const [, ignored] = /^SigIgn:\s*([0-9a-f]+)$/m.exec(status) ?? [];
  return ignored !== undefined && (BigInt(`0x${ignored}`) & 1n) === 0n;
}
