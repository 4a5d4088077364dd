/** The GPUs that the kernel shows, whether or not Vulkan does (Linux). */
import type { Host } from "./host.ts";

export const MAKERS = ["NVIDIA", "AMD", "Intel"] as const;
/** Makers whose GPUs have a Vulkan driver on Linux. */
export type GpuMaker = typeof MAKERS[number];

export interface HostGpu {
  readonly maker: GpuMaker;
  /** The file that a driver opens. */
  readonly device: string;
  /** Whether this process could. */
  readonly state: "open" | "missing" | "forbidden";
}

/** By PCI vendor number. */
const VENDORS: Readonly<Record<string, GpuMaker>> = {
  "0x10de": "NVIDIA",
  "0x1002": "AMD",
  "0x8086": "Intel",
};

/** Version of NVIDIA's kernel driver; undefined where it is not loaded. */
export function nvidiaDriver(host: Host): string | undefined {
  return host.text("/proc/driver/nvidia/version")?.match(/Kernel Module.*? (\d+\.[\d.]+)/)?.[1];
}

/** In a container, those of the whole machine: which of them it was given is their `state`. */
export function hostGpus(host: Host): HostGpu[] {
  const gpu = (maker: GpuMaker, device: string): HostGpu => ({
    maker,
    device,
    state: host.mayOpen(device) ? "open" : host.exists(device) ? "forbidden" : "missing",
  });
  // NVIDIA's own driver has files of its own, whether or not it also has one in /dev/dri.
  const nvidia = host.names("/dev").filter((name) => /^nvidia\d+$/.test(name)).map((name) => `/dev/${name}`);
  if (nvidia.length === 0 && nvidiaDriver(host) !== undefined) nvidia.push("/dev/nvidia0");
  const others = host.names("/sys/class/drm").filter((card) => /^renderD\d+$/.test(card)).flatMap((card) => {
    const vendor = host.text(`/sys/class/drm/${card}/device/vendor`)?.trim() ?? "";
    const maker = VENDORS[vendor];
    const isCounted = maker === "NVIDIA" && nvidia.length > 0;
    return maker === undefined || isCounted ? [] : [gpu(maker, `/dev/dri/${card}`)];
  });
  return [...nvidia.map((device) => gpu("NVIDIA", device)), ...others];
}
