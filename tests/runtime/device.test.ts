import { describe, expect, test } from "bun:test";
import { layerNorm } from "../../src/kernels/layer_norm/layer_norm.ts";
import { subgroupMatmul } from "../../src/kernels/matmul/matmul.ts";
import { listAdapterNames } from "../../src/runtime/dawn.ts";
import { type Gpu, listAdapters, openDevice } from "../../src/runtime/device.ts";
import { DeviceError, NoAdapterError } from "../../src/runtime/errors.ts";
import { invisibleGpuNote } from "../../src/runtime/host_gpu.ts";
import { describeSubgroups, firstSupported, op, supports } from "../../src/runtime/kernel.ts";
import { testDevice } from "../support/device.ts";

const shared = await testDevice();

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
  test("a software adapter is not taken where there is a GPU", async () => {
    const adapters = await listAdapters();
    if (adapters.some((caps) => !caps.isSoftware)) expect(shared.caps.isSoftware).toBe(false);
  });
});

describe("capabilities", () => {
  test("are frozen, and say what the device was opened with", () => {
    const { caps, device } = shared;
    expect(Object.isFrozen(caps)).toBe(true);
    expect(device.features.has("shader-f16")).toBe(caps.f16);
    expect(device.features.has("timestamp-query")).toBe(caps.timestamps);
    expect(device.features.has("subgroups")).toBe(caps.subgroupMaxSize > 0);
    expect(device.limits.maxStorageBufferBindingSize).toBe(caps.maxBindingBytes);
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
      expect(() => firstSupported([half], caps)).toThrow(DeviceError);
      expect(() => firstSupported([half], caps)).toThrow("layer_norm needs the shader-f16 feature");
    });
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
  const eight = { elem: "f32", epilogue: "bias", unroll: false, subgroup: 8 } as const;
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

describe("a GPU that Vulkan does not show", () => {
  test("is named by its maker, with what to install", () => {
    expect(invisibleGpuNote(["0x10de"])).toMatch(/NVIDIA GPU that Vulkan does not show: .*libnvidia-gl/);
    expect(invisibleGpuNote(["0x1002"])).toMatch(/AMD GPU that Vulkan does not show: .*mesa-vulkan-drivers/);
    expect(invisibleGpuNote(["0x8086"])).toMatch(
      /Intel GPU that Vulkan does not show: .*mesa-vulkan-drivers/,
    );
  });
  test("of an unknown maker, or none at all, gives no note", () => {
    expect(invisibleGpuNote(["0x1af4"])).toBeUndefined();
    expect(invisibleGpuNote([])).toBeUndefined();
  });
  test("is found behind makers that have no Vulkan driver", () => {
    expect(invisibleGpuNote(["0x1af4", "0x1002"])).toContain("AMD");
  });
});
