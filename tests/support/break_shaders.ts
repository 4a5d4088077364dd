/** A module to preload: no shader compiles, as on a driver that lacks what they need. */
import { globals } from "webgpu";

const { prototype } = (globals as unknown as { GPUDevice: { prototype: GPUDevice } }).GPUDevice;
const { createShaderModule } = prototype;

Object.defineProperty(prototype, "createShaderModule", {
  value: function (this: GPUDevice, descriptor: GPUShaderModuleDescriptor) {
    return createShaderModule.call(this, { ...descriptor, code: `${descriptor.code}nonsense\n` });
  },
});
