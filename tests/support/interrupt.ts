/**
 * A module to preload: the process gets SIGINT with the INTERRUPT_AFTER-th submission to the GPU, counted from the first
 * that runs the kernel INTERRUPT_FROM. How many there are before that depends on how fast the device is.
 */
import { globals } from "webgpu";

const { INTERRUPT_FROM: kernel, INTERRUPT_AFTER: submissions } = process.env;
const { GPUCommandEncoder, GPUQueue } = globals as unknown as {
  GPUCommandEncoder: { prototype: GPUCommandEncoder };
  GPUQueue: { prototype: GPUQueue };
};
const { beginComputePass } = GPUCommandEncoder.prototype;
const { submit } = GPUQueue.prototype;
let hasBegun = false;
let count = 0;

Object.defineProperty(GPUCommandEncoder.prototype, "beginComputePass", {
  value: function (this: GPUCommandEncoder, descriptor?: GPUComputePassDescriptor) {
    hasBegun ||= descriptor?.label === kernel;
    return beginComputePass.call(this, descriptor);
  },
});

Object.defineProperty(GPUQueue.prototype, "submit", {
  value: function (this: GPUQueue, buffers: GPUCommandBuffer[]) {
    submit.call(this, buffers);
    if (hasBegun && ++count === Number(submissions)) process.kill(process.pid, "SIGINT");
  },
});
