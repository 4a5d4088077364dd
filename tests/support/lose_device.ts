/**
 * A module to preload: it destroys the GPU device behind the program's back, as a driver that resets does. The variable
 * LOSE_DEVICE_AFTER says after how many submissions to the queue; 0 is as soon as the device exists.
 */
import { globals } from "webgpu";

const submissions = Number(process.env["LOSE_DEVICE_AFTER"]);
const { prototype } = (globals as unknown as { GPUAdapter: { prototype: GPUAdapter } }).GPUAdapter;
const { requestDevice } = prototype;

Object.defineProperty(prototype, "requestDevice", {
  value: async function (this: GPUAdapter, descriptor?: GPUDeviceDescriptor) {
    const device = await requestDevice.call(this, descriptor);
    if (submissions === 0) setTimeout(() => device.destroy(), 0);
    const { queue } = device;
    const submit = queue.submit.bind(queue);
    let count = 0;
    Object.defineProperty(queue, "submit", {
      value: (buffers: GPUCommandBuffer[]) => {
        submit(buffers);
        if (++count === submissions) device.destroy();
      },
    });
    // `device.queue` may be a new wrapper each time.
    Object.defineProperty(device, "queue", { value: queue });
    return device;
  },
});
