/**
 * A thread that ends the process when one case of a property does not end: nothing else can, because a loop without
 * an end never gives the test runner its turn.
 */
import { writeSync } from "node:fs";
import { parentPort, workerData } from "node:worker_threads";

export interface Watched {
  /** `[cases begun, 1 while one runs]`. */
  readonly beats: Int32Array<SharedArrayBuffer>;
  /** For how long a case may run. */
  readonly ms: number;
}

const { beats, ms } = workerData as Watched;
let property = "";
parentPort!.on("message", (name: string) => property = name);

let seen = -1;
let since = 0;
setInterval(() => {
  const begun = Atomics.load(beats, 0);
  const now = performance.now();
  if (begun !== seen || Atomics.load(beats, 1) === 0) [seen, since] = [begun, now];
  if (now - since < ms) return;
  writeSync(2, `\ncase ${begun} of "${property}" has been running for ${ms / 1000} s\n`);
  process.kill(process.pid, "SIGKILL");
}, 1000);
