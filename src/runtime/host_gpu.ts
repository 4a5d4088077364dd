/** Finds GPUs that are in the machine but that Vulkan does not show, and says what to install. */
import { existsSync, readdirSync, readFileSync } from "node:fs";

/** PCI vendor numbers of the makers whose GPUs have a Vulkan driver on Linux. */
const VENDORS: Readonly<Record<string, { maker: string; advice: string }>> = {
  "0x10de": {
    maker: "NVIDIA",
    advice:
      "install the driver's Vulkan part (libnvidia-gl, or nvidia-vulkan-icd on Debian); in a container, set " +
      "NVIDIA_DRIVER_CAPABILITIES=all so that nvidia_icd.json and the graphics libraries are mounted",
  },
  "0x1002": { maker: "AMD", advice: "install mesa-vulkan-drivers, and let this user open /dev/dri/renderD*" },
  "0x8086": {
    maker: "Intel",
    advice: "install mesa-vulkan-drivers, and let this user open /dev/dri/renderD*",
  },
};

/** Makers' PCI numbers of the GPUs that the kernel shows, whether or not Vulkan does. */
function hostVendors(): string[] {
  const found = new Set<string>();
  try {
    if (existsSync("/proc/driver/nvidia/gpus") || existsSync("/dev/nvidia0")) found.add("0x10de");
    for (const card of readdirSync("/sys/class/drm")) {
      const file = `/sys/class/drm/${card}/device/vendor`;
      if (/^renderD\d+$/.test(card) && existsSync(file)) found.add(readFileSync(file, "utf8").trim());
    }
  } catch {
    // No /sys/class/drm: not Linux, or a container without it. Or Deno, which shows /proc, /dev and /sys only to programs
    // that may do anything. Then there is nothing to name.
  }
  return [...found];
}

/** One sentence for the user about a GPU that is there but cannot be used, or undefined when there is none. */
export function invisibleGpuNote(vendors: readonly string[] = hostVendors()): string | undefined {
  for (const vendor of vendors) {
    const known = VENDORS[vendor];
    if (known) return `this machine has an ${known.maker} GPU that Vulkan does not show: ${known.advice}`;
  }
  return undefined;
}
