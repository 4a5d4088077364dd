/** A module to preload: the process gets SIGINT once it has submitted INTERRUPT_AFTER times to the GPU. */
import { globals } from "webgpu";

const submissions = Number(process.env["INTERRUPT_AFTER"]);
const { prototype } = (globals as unknown as { GPUQueue: { prototype: GPUQueue } }).GPUQueue;
const { submit } = prototype;
let count = 0;

Object.defineProperty(prototype, "submit", {
  value: function (this: GPUQueue, buffers: GPUCommandBuffer[]) {
    submit.call(this, buffers);
    if (++count === submissions) process.kill(process.pid, "SIGINT");
  },
});
