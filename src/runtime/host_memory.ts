/** The machine's memory, which is also that of a software adapter. */
import { totalmem } from "node:os";
import process from "node:process";

/** Bytes that the process may use: the machine's, or the container's when that is less; undefined if it may not ask. */
export function hostMemoryBytes(): number | undefined {
  try {
    const total = totalmem();
    const constrained = process.constrainedMemory?.() ?? 0;
    return constrained > 0 ? Math.min(total, constrained) : total;
  } catch {
    return undefined; // Deno without --allow-sys
  }
}
