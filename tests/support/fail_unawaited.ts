/**
 * A module to import first: when the program has begun, something fails that nobody waits for. FAIL says how: throw or
 * reject.
 */
import process from "node:process";

const { on } = process;

process.on = function (this: NodeJS.Process, event: string, ...rest: unknown[]) {
  if (event === "unhandledRejection") setTimeout(fail, 100);
  return Reflect.apply(on, this, [event, ...rest]);
} as typeof process.on;

function fail(): void {
  const error = new Error("on purpose");
  if (process.env["FAIL"] === "throw") throw error;
  Promise.reject(error);
}
