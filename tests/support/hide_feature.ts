/** Takes a feature away from every adapter of the process. */
import { globals } from "webgpu";

export function hideFeature(name: string): void {
  const { prototype } = (globals as unknown as { GPU: { prototype: GPU } }).GPU;
  const { requestAdapter } = prototype;

  Object.defineProperty(prototype, "requestAdapter", {
    value: async function (this: GPU, options?: GPURequestAdapterOptions) {
      const adapter = await requestAdapter.call(this, options);
      if (!adapter) return null;
      const features = new Set<string>(adapter.features);
      features.delete(name);
      return Object.defineProperty(adapter, "features", { value: features });
    },
  });
}
