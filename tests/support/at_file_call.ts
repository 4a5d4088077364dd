/**
 * A module to preload: something happens at the process's nth write to a file, or its nth read of one, through a
 * `FileHandle`. AT_WRITE or AT_READ is n, from 1, of those of LENGTH bytes where that is given; SEND is a signal to the
 * process itself, TRUNCATE a file that loses its second half.
 */
import { statSync, truncateSync } from "node:fs";
import { open } from "node:fs/promises";

const { AT_WRITE, AT_READ, LENGTH, SEND, TRUNCATE } = process.env;

const handle = await open("/dev/null");
const prototype = Object.getPrototypeOf(handle);
await handle.close();

function happen(): void {
  if (SEND) process.kill(process.pid, SEND as NodeJS.Signals);
  if (TRUNCATE) truncateSync(TRUNCATE, statSync(TRUNCATE).size >> 1);
}

for (const [name, at] of [["write", AT_WRITE], ["read", AT_READ]] as const) {
  const original = prototype[name];
  let count = 0;
  prototype[name] = function (...args: readonly [Uint8Array, number, number, number | null]) {
    const isCounted = LENGTH === undefined || args[2] === Number(LENGTH);
    if (isCounted && ++count === Number(at)) happen();
    return original.apply(this, args);
  };
}
