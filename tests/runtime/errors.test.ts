import { describe, expect, test } from "bun:test";
import { createBuffer, download, Readback, upload } from "../../src/runtime/buffers.ts";
import { type Gpu, openDevice } from "../../src/runtime/device.ts";
import {
  DeviceError,
  DoesNotFitError,
  InputError,
  LongformError,
  ModelError,
  NoAdapterError,
  OutputError,
  ShaderError,
  UsageError,
} from "../../src/runtime/errors.ts";

/** Opens a device of its own, since these tests break it. */
async function withBrokenDevice(use: (gpu: Gpu) => Promise<void>): Promise<void> {
  const gpu = await openDevice();
  try {
    await use(gpu);
  } finally {
    gpu.destroy();
  }
}

function causeValidationError(gpu: Gpu): void {
  gpu.device.createBuffer({
    label: "wrong on purpose",
    size: 16,
    usage: GPUBufferUsage.MAP_READ | GPUBufferUsage.STORAGE,
  });
}

async function errorOf(work: Promise<unknown>): Promise<unknown> {
  return await work.then(() => undefined, (error: unknown) => error);
}

describe("error classes", () => {
  test("carry the exit status that the command line promises", () => {
    const status = (Class: typeof LongformError) => new Class("message").exitCode;
    for (const Class of [ModelError, InputError, OutputError, ShaderError, DeviceError, LongformError]) {
      expect([Class.name, status(Class)]).toEqual([Class.name, 1]);
    }
    expect([UsageError, NoAdapterError, DoesNotFitError].map(status)).toEqual([2, 3, 4]);
  });
  test("keep name, hint, detail and cause", () => {
    const cause = new Error("below");
    const error = new DeviceError("message", { hint: "advice", detail: "more", cause });
    expect(error).toMatchObject({
      name: "DeviceError",
      message: "message",
      hint: "advice",
      detail: "more",
      cause,
    });
    expect(error).toBeInstanceOf(LongformError);
    expect("cause" in new DeviceError("message")).toBe(false);
  });
  test("are one line that does nothing to a terminal, of bounded length", () => {
    const hostile = "a\nb\t\x1b[2J\x9b\u202e\u2028\u{e0041}\ud800é東😀";
    const { message, hint } = new ModelError(hostile, { hint: hostile });
    expect(message).toBe("a\\nb\\u0009\\u001b[2J\\u009b\\u202e\\u2028\\u{e0041}\\ud800é東😀");
    expect(hint).toBe(message);
    expect(new ModelError("\x1b".repeat(1e6)).message.length).toBe(2001);
    expect(new ModelError("x".repeat(2001)).message).toBe(`${"x".repeat(2000)}…`);
    expect(new ModelError("x".repeat(2000)).message).toBe("x".repeat(2000));
  });
});

describe("uncaptured errors", () => {
  test("reject the next wait with the label of what was wrong", () =>
    withBrokenDevice(async (gpu) => {
      causeValidationError(gpu);
      const error = await errorOf(gpu.idle());
      expect(error).toBeInstanceOf(DeviceError);
      expect(String(error)).toContain("The GPU reported an error");
    }));
  test("stay: the first one is thrown by every later check and wait", () =>
    withBrokenDevice(async (gpu) => {
      gpu.check();
      causeValidationError(gpu);
      const first = await errorOf(gpu.idle());
      expect(first).toBeInstanceOf(DeviceError);
      expect(() => gpu.check()).toThrow(first as Error);
      expect(await errorOf(gpu.wait(Promise.resolve(1)))).toBe(first);
      expect(await errorOf(gpu.idle())).toBe(first);
    }));
  test("reject a readback of data that the error made worthless", () =>
    withBrokenDevice(async (gpu) => {
      const buffer = createBuffer(gpu, "small", "activations", 16);
      const readback = new Readback(gpu, "small", 16);
      const encoder = gpu.device.createCommandEncoder();
      encoder.copyBufferToBuffer(buffer.handle, 0, readback.handle, 0, 4096);
      gpu.device.queue.submit([encoder.finish()]);
      expect(await errorOf(readback.read())).toBeInstanceOf(DeviceError);
    }));
  test("do not touch other devices", async () => {
    const healthy = await openDevice();
    await withBrokenDevice(async (gpu) => {
      causeValidationError(gpu);
      await errorOf(gpu.idle());
    });
    await healthy.idle();
    healthy.destroy();
  });
});

describe("a wait that has ended", () => {
  test("is forgotten: nothing holds its result for as long as the device lives", () =>
    withBrokenDevice(async (gpu) => {
      const results: WeakRef<object>[] = [];
      for (let i = 0; i < 100; i++) results.push(new WeakRef(await gpu.wait(Promise.resolve({ i }))));
      await new Promise((resolve) => setTimeout(resolve, 0));
      Bun.gc(true);
      // A few may still lie on the stack.
      expect(results.filter((result) => result.deref() !== undefined).length).toBeLessThan(10);
    }));
  test("does not keep others from being rejected", () =>
    withBrokenDevice(async (gpu) => {
      const endless = [1, 2].map(() => errorOf(gpu.wait(new Promise(() => {}))));
      await gpu.wait(Promise.resolve(1));
      gpu.device.destroy();
      const [first, second] = await Promise.all(endless);
      expect(first).toBeInstanceOf(DeviceError);
      expect(second).toBe(first);
    }));
});

describe("device loss", () => {
  test("rejects what waits for the GPU, and everything after it", () =>
    withBrokenDevice(async (gpu) => {
      const buffer = createBuffer(gpu, "data", "activations", 1 << 20);
      upload(buffer, new Uint8Array(1 << 20));
      const reading = errorOf(download(buffer));
      gpu.device.destroy();
      const error = await reading;
      expect(error).toBeInstanceOf(DeviceError);
      expect(String(error)).toContain("was lost");
      expect((error as DeviceError).hint).toContain("`--adapter`");
      expect(await errorOf(gpu.idle())).toBeInstanceOf(DeviceError);
      expect(() => gpu.check()).toThrow(DeviceError);
      // The work itself was rejected as well; were that unhandled, this turn would end the test with an AbortError.
      await new Promise((resolve) => setTimeout(resolve, 0));
    }));
  test("rejects a wait for work that would never end", () =>
    withBrokenDevice(async (gpu) => {
      const waiting = errorOf(gpu.wait(new Promise(() => {})));
      gpu.device.destroy();
      expect(await waiting).toBeInstanceOf(DeviceError);
    }));
  test("destroying a Gpu is no error", async () => {
    const gpu = await openDevice();
    await gpu.idle();
    gpu.destroy();
    await new Promise((resolve) => setTimeout(resolve, 10));
    gpu.check();
  });
});
