/**
 * A module to preload: the kernel that ALTER_KERNEL names computes something else, because ALTER_FROM in its text becomes
 * ALTER_TO.
 */
import { globals } from "webgpu";

const { ALTER_KERNEL, ALTER_FROM, ALTER_TO } = process.env;
const { prototype } = (globals as unknown as { GPUDevice: { prototype: GPUDevice } }).GPUDevice;
const { createShaderModule } = prototype;

Object.defineProperty(prototype, "createShaderModule", {
  value: function (this: GPUDevice, descriptor: GPUShaderModuleDescriptor) {
    if (descriptor.label !== ALTER_KERNEL) return createShaderModule.call(this, descriptor);
    if (!descriptor.code.includes(ALTER_FROM!)) throw new Error(`${ALTER_KERNEL} has no ${ALTER_FROM}`);
    return createShaderModule.call(this, {
      ...descriptor,
      code: descriptor.code.replaceAll(ALTER_FROM!, ALTER_TO!),
    });
  },
});
