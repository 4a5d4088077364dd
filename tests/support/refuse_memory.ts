/**
 * GPU memory that is used up, as Dawn tells it: a buffer that gets none is an invalid object, the error goes to the
 * innermost scope for such errors, and whatever uses the buffer is an error too. As a module to preload it refuses all
 * buffers from that on that the variable REFUSE_BUFFER counts, from 1.
 */
import { globals } from "webgpu";

interface Scope {
  readonly filter: GPUErrorFilter;
  error?: GPUError;
}

export interface Refusal {
  /** Of the buffers that were refused; none while there were not so many. */
  readonly labels: readonly string[];
  /** Ends it. */
  restore(): void;
}

/** What of Dawn's globals is needed here; Deno has types of its own for some of them. */
interface DawnGlobals {
  readonly GPUDevice: { readonly prototype: GPUDevice };
  readonly GPUOutOfMemoryError: new (message: string) => GPUError;
  readonly GPUBufferUsage: Readonly<Record<"MAP_READ" | "STORAGE", GPUBufferUsageFlags>>;
}

const { GPUDevice, GPUOutOfMemoryError, GPUBufferUsage } = globals as unknown as DawnGlobals;

/** Refuses buffers from the `nth` on, from 1, that are created from now on. @throws where no scope would see the error */
export function refuseBuffer(nth: number): Refusal {
  const { prototype } = GPUDevice;
  const { createBuffer, popErrorScope, pushErrorScope } = prototype;
  const scopes = new WeakMap<GPUDevice, Scope[]>();
  const scopesOf = (device: GPUDevice) => {
    const known = scopes.get(device) ?? [];
    scopes.set(device, known);
    return known;
  };
  let count = 0;
  const labels: string[] = [];
  prototype.pushErrorScope = function (filter: GPUErrorFilter) {
    scopesOf(this).push({ filter });
    return pushErrorScope.call(this, filter);
  };
  prototype.popErrorScope = async function () {
    const scope = scopesOf(this).pop();
    const error = await popErrorScope.call(this);
    return scope?.error ?? error;
  };
  prototype.createBuffer = function (descriptor: GPUBufferDescriptor) {
    if (++count < nth) return createBuffer.call(this, descriptor);
    const label = String(descriptor.label);
    labels.push(label);
    const scope = scopesOf(this).findLast(({ filter }) => filter === "out-of-memory");
    if (!scope) throw new Error(`nobody would learn that there is no memory for "${label}"`);
    scope.error = new GPUOutOfMemoryError("Failed to allocate memory.");
    // No usage is both: this makes an invalid object.
    const usage = GPUBufferUsage.MAP_READ | GPUBufferUsage.STORAGE;
    pushErrorScope.call(this, "validation");
    const invalid = createBuffer.call(this, { ...descriptor, usage });
    void popErrorScope.call(this);
    return invalid;
  };
  return {
    labels,
    restore: () => Object.assign(prototype, { createBuffer, popErrorScope, pushErrorScope }),
  };
}

const wanted = process.env["REFUSE_BUFFER"];
if (wanted !== undefined) refuseBuffer(Number(wanted));
