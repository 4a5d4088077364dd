/** A module to preload: no adapter has the f16 feature, as on older GPUs. */
import { globals } from "webgpu";

const { prototype } = (globals as unknown as { GPU: { prototype: GPU } }).GPU;
const { requestAdapter } = prototype;

Object.defineProperty(prototype, "requestAdapter", {
  value: async function (this: GPU, options?: GPURequestAdapterOptions) {
    const adapter = await requestAdapter.call(this, options);
    if (!adapter) return null;
    const features = new Set<string>(adapter.features);
    features.delete("shader-f16");
    return Object.defineProperty(adapter, "features", { value: features });
  },
});
