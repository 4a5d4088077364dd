import { describe, expect, test } from "bun:test";
import { layerNorm } from "../../src/kernels/layer_norm/layer_norm.ts";
import { subgroupMatmul } from "../../src/kernels/matmul/matmul.ts";
import { adapterNamesIn, listAdapterNames } from "../../src/runtime/dawn.ts";
import { adapterIndex, type Gpu, listAdapters, openDevice } from "../../src/runtime/device.ts";
import { DeviceError, DoesNotFitError, NoAdapterError } from "../../src/runtime/errors.ts";
import { describeSubgroups, firstSupported, op, supports } from "../../src/runtime/kernel.ts";
import { testDevice } from "../support/device.ts";

const shared = await testDevice();
const hasGpu = (await listAdapters()).some((caps) => !caps.isSoftware);

async function withDevice(options: Parameters<typeof openDevice>[0], use: (gpu: Gpu) => void): Promise<void> {
  const gpu = await openDevice(options);
  try {
    use(gpu);
  } finally {
    gpu.destroy();
  }
}

async function adapterError(adapter: string): Promise<NoAdapterError> {
  const error: unknown = await openDevice({ adapter }).catch((e: unknown) => e);
  expect(error).toBeInstanceOf(NoAdapterError);
  return error as NoAdapterError;
}

describe("adapter choice", () => {
  test("adapters are listed, the chosen one among them", async () => {
    const adapters = await listAdapters();
    expect(adapters.map((caps) => caps.name)).toContain(shared.caps.name);
  });
  test("a name that matches none is refused with a list of those there are", async () => {
    const error = await adapterError("nope");
    expect(error.message).toContain("`--adapter nope`");
    expect(error.exitCode).toBe(3);
    for (const [i, name] of (await listAdapterNames()).entries()) {
      expect(error.hint).toContain(`${i}: ${name}`);
    }
  });
  test("an index past the end is refused", async () => {
    expect((await adapterError("99")).message).toContain("`--adapter 99`");
  });
  test("an index and a part of a name in any case choose an adapter", async () => {
    const first = (await listAdapters())[0]!;
    await withDevice({ adapter: "0" }, ({ caps }) => expect(caps.name).toBe(first.name));
    const part = (await listAdapterNames())[0]!.slice(0, 6).toUpperCase();
    await withDevice({ adapter: part }, ({ caps }) => expect(caps.name).toBe(first.name));
  });
  test("a software adapter is taken with a notice, a GPU without one", async () => {
    const notices: string[] = [];
    await withDevice({ onNotice: (message) => notices.push(message) }, ({ caps }) => {
      expect(notices.length > 0).toBe(caps.isSoftware);
      if (caps.isSoftware) expect(notices[0]).toContain("running on the CPU");
    });
  });
  test.skipIf(!hasGpu)(
    `a software adapter is not taken where there is a GPU${hasGpu ? "" : ": needs one"}`,
    () => {
      expect(shared.caps.isSoftware).toBe(false);
    },
  );
  test("Dawn's list is read for every backend but OpenGL, which repeats adapters, and the null one", () => {
    const list = [
      "vulkan', name: 'A (rev 1)",
      "metal', name: 'B's",
      "opengles', name: 'A",
      "null', name: 'None",
    ];
    const lines = list.map((line) => ` * backend: '${line}'`);
    expect(adapterNamesIn(["Error: none", "Available adapters:", ...lines].join("\n"))).toEqual([
      "A (rev 1)",
      "B's",
    ]);
  });
  test("an adapter that Dawn cannot tell from an earlier one is refused by index", () => {
    const names = ["NVIDIA A100 80GB", "NVIDIA L4", "NVIDIA L4", "NVIDIA A100"];
    expect(adapterIndex(names, "0")).toBe(0);
    expect(adapterIndex(names, "l4")).toBe(1);
    expect(adapterIndex(names, "nvidia-a100")).toBe(0);
    expect(() => adapterIndex(names, "2")).toThrow(NoAdapterError);
    expect(() => adapterIndex(names, "2")).toThrow(
      /`--adapter 2` cannot be chosen: .*NVIDIA L4 is adapter 1 too/,
    );
    expect(() => adapterIndex(names, "3")).toThrow(/NVIDIA A100 is adapter 0 too/);
  });
});

describe("an adapter that does not open", () => {
  async function openingError(options: Parameters<typeof openDevice>[0]): Promise<unknown> {
    return await openDevice(options).then((gpu) => gpu.destroy(), (error: unknown) => error);
  }

  test("for want of immediates is no adapter for longform", async () => {
    const error = await openingError({ restrict: { immediateBytes: 0 } });
    expect(error).toBeInstanceOf(NoAdapterError);
    expect(String(error)).toMatch(/cannot run longform: it has 0 B of immediates, kernels need 64 B$/);
  });
  test("for another reason is named, with the first line of the reason and all of it as cause", async () => {
    const { prototype } = GPUAdapter;
    const { requestDevice } = prototype;
    const cause = new Error("Out of everything.\n - While opening");
    prototype.requestDevice = () => Promise.reject(cause);
    try {
      const error = await openingError({});
      expect(error).toBeInstanceOf(DeviceError);
      expect(error).toMatchObject({
        message: `Cannot open ${shared.caps.name}: Out of everything`,
        hint: expect.stringContaining("`--adapter`"),
        cause,
      });
    } finally {
      prototype.requestDevice = requestDevice;
    }
  });
});

describe("capabilities", () => {
  function unsupported(...args: Parameters<typeof firstSupported>): DoesNotFitError {
    try {
      firstSupported(...args);
    } catch (error) {
      if (error instanceof DoesNotFitError) return error;
      throw error;
    }
    throw new Error("one was supported");
  }

  test("are frozen, and say what the device was opened with", () => {
    const { caps, device } = shared;
    expect(Object.isFrozen(caps)).toBe(true);
    expect(device.features.has("shader-f16")).toBe(caps.f16);
    expect(device.features.has("timestamp-query")).toBe(caps.timestamps);
    expect(device.features.has("subgroups")).toBe(caps.subgroupMaxSize > 0);
    expect(device.limits.maxStorageBufferBindingSize).toBe(caps.maxBindingBytes);
    expect(device.limits).toHaveProperty("maxImmediateSize", caps.immediateBytes);
    expect(device.limits.maxComputeWorkgroupStorageSize).toBe(caps.workgroupBytes);
    expect(device.limits.maxComputeInvocationsPerWorkgroup).toBe(caps.workgroupInvocations);
  });
  test("restricted to f32 give a device without f16, and variants say what they need", async () => {
    await withDevice({ restrict: { f16: false } }, ({ caps, device }) => {
      expect(device.features.has("shader-f16")).toBe(false);
      const half = op(layerNorm, { outElem: "f16", width: 8 });
      const full = op(layerNorm, { outElem: "f32", width: 8 });
      expect(supports(half.kernel, half.variant, caps)).toBe("needs the shader-f16 feature");
      expect(firstSupported([half, full], caps)).toBe(full);
      const error = unsupported([half], caps);
      expect(error.message).toContain("layer_norm needs the shader-f16 feature");
      expect(error.hint).toContain("`--dtype f32`");
    });
  });
  test("too small for every variant are a device limit, which f32 does not help", () => {
    const wide = op(layerNorm, { outElem: "f32", width: 8 });
    const error = unsupported([wide, wide], { ...shared.caps, name: "tiny", workgroupBytes: 128 });
    expect(error.message).toBe(
      "No kernel for this model runs on tiny: layer_norm needs 256 B of workgroup memory, the device has 128 B",
    );
    expect(error.hint).toContain("`--adapter`");
    expect(error.hint).not.toContain("f32");
    expect(unsupported([], shared.caps).message).toEndWith(": there is no variant for this shape");
  });
  test("restricted in workgroup memory or invocations refuse a variant with both numbers", () => {
    const v = { outElem: "f32", width: 8 } as const;
    expect(supports(layerNorm, v, { ...shared.caps, workgroupBytes: 128 }))
      .toBe("needs 256 B of workgroup memory, the device has 128 B");
    expect(supports(layerNorm, v, { ...shared.caps, workgroupInvocations: 32 }))
      .toBe("needs 64 invocations a workgroup, the device allows 32");
  });
});

describe("kernels made of subgroup operations", () => {
  const eight = { elem: "f32", epilogue: "bias", unroll: false, subgroup: 8, tileRows: 8 } as const;
  const onSubgroups = (subgroupMinSize: number, subgroupMaxSize: number) =>
    supports(subgroupMatmul, eight, { ...shared.caps, subgroupMinSize, subgroupMaxSize });

  test("run where subgroups have exactly the lanes that they were written for", () => {
    expect(onSubgroups(8, 8)).toBe(true);
    expect(onSubgroups(8, 32)).toBe("needs subgroups of 8 lanes, the device has 8 to 32 lanes");
    expect(onSubgroups(32, 32)).toBe("needs subgroups of 8 lanes, the device has 32 lanes");
    expect(onSubgroups(0, 0)).toBe("needs subgroups of 8 lanes, the device has none");
  });
  test("describe a device's subgroups in words", () => {
    expect(describeSubgroups({ ...shared.caps, subgroupMinSize: 4, subgroupMaxSize: 128 })).toBe(
      "4 to 128 lanes",
    );
  });
});
