/** Why Vulkan shows no adapter, or no GPU, and what to do: conclusions from what `inspectVulkan` found. */
import { Host, type HostOptions } from "./host.ts";
import { type GpuMaker, type HostGpu, hostGpus } from "./host_gpu.ts";
import { IS_EXECUTABLE } from "./program_files.ts";
import {
  inspectVulkan,
  LOADER_LIBRARY,
  NVIDIA_LIBRARY,
  type VulkanDriver,
  type VulkanSetup,
} from "./vulkan_setup.ts";

/** What keeps an adapter, or the GPU, from being seen. */
export type Cause =
  | "no-loader" // libvulkan.so.1 is missing, or does not load
  | "no-icd" // no driver's manifest is found, or none for this hardware
  | "broken-icd" // a manifest, or the library that it names, cannot be used
  | "no-nvidia-graphics" // the driver's compute part is there, its Vulkan part is not
  | "no-device" // the GPU's device file is missing: it was not given to the container
  | "no-permission" // this user may not open it
  | "old-mesa" // Dawn refuses the driver
  | "software-only" // Vulkan works, and computes on the CPU
  | "unknown"; // all that is looked at is in order

export interface Finding {
  readonly cause: Cause;
  /** The end of a sentence: what is wrong, and where. */
  readonly message: string;
  /** What to do. */
  readonly hint: string;
}

/** The oldest Mesa whose drivers Dawn takes. */
const OLDEST_MESA = 23;
/** Where the library does not tell, the last part of the manifest's API version does: Mesa 22.3 has 230. */
const OLDEST_MESA_REVISION = 235;

const MESA = "Mesa's Vulkan drivers, 23.0 or later";

/** What to install for the CPU implementation of Vulkan. */
export const SOFTWARE_VULKAN = "Mesa 23 or newer for the CPU fallback (libvulkan1 and mesa-vulkan-drivers; " +
  "on Debian 12 from bookworm-backports)";

/** How a container gets a GPU. */
const GIVE_NVIDIA = "`docker run --gpus all -e NVIDIA_DRIVER_CAPABILITIES=all`";
const GIVE_OTHER = "`docker run --device /dev/dri`";

/**
 * What is wrong, the most helpful first; empty when Vulkan shows a GPU, and outside Linux.
 * @param adapters those that Dawn opens
 * @param reason what Dawn said when it was asked for one
 */
export function diagnose(
  setup: VulkanSetup,
  adapters: readonly { readonly name: string; readonly isSoftware: boolean }[],
  reason?: string,
): readonly Finding[] {
  if (!setup.isLinux || adapters.some(({ isSoftware }) => !isSoftware)) return [];
  const makers = [...new Set(setup.gpus.map(({ maker }) => maker))];
  const ofGpus = makers.flatMap((maker) => gpuFindings(setup, maker));
  if (adapters.length > 0) {
    const isUnexplained = makers.length > 0 && ofGpus.length === 0;
    const unexplained = isUnexplained
      ? [unknown(setup, `a driver of the ${makers.join(" and ")} GPU`, reason)]
      : [];
    return [softwareOnly(setup, adapters[0]!.name, makers), ...ofGpus, ...unexplained];
  }
  // Whoever names the drivers means it.
  const ofDrivers = driverFindings(setup);
  const findings = [
    ...loaderFindings(setup),
    ...(setup.override ? [...ofDrivers, ...ofGpus] : [...ofGpus, ...ofDrivers]),
  ];
  return findings.length > 0 ? findings : [unknown(setup, "a driver", reason)];
}

/** One sentence about a GPU that a run on the CPU is not shown; undefined where the machine has none. */
export function invisibleGpuNote(options: HostOptions = {}): string | undefined {
  // Looking at the drivers takes time, which a machine without a GPU is spared.
  if (hostGpus(new Host(options)).length === 0) return undefined;
  const findings = diagnose(inspectVulkan(options), [{ name: "the CPU", isSoftware: true }]);
  const why = findings.find(({ cause }) => cause !== "software-only");
  return why && `${why.message}: ${why.hint}`;
}

function loaderFindings({ loader, drivers, distribution }: VulkanSetup): Finding[] {
  const cause = "no-loader";
  if (!loader) {
    const packages = drivers.length === 0 ? ["loader", "software"] as const : ["loader"] as const;
    return [{
      cause,
      message: `there is no Vulkan loader (${LOADER_LIBRARY})`,
      hint: installHint(distribution, packages) + LAUNCHER_INSTALLS,
    }];
  }
  if (loader.problem === undefined) return [];
  return [{
    cause,
    message: `the Vulkan loader ${loader.path} does not load: ${loader.problem}`,
    hint: "take its folder out of LD_LIBRARY_PATH if it is there, or install the loader again: " +
      installHint(distribution, ["loader"]),
  }];
}

/** What keeps any driver at all from working, those of GPUs that are here aside. */
function driverFindings(setup: VulkanSetup): Finding[] {
  const { drivers, override, searched, distribution, gpus, hidden } = setup;
  const cause = "no-icd";
  if (override && drivers.length === 0) {
    const message = override.value === ""
      ? `${override.name} is empty, which leaves no Vulkan driver`
      : `${override.name} names no driver's manifest: there is none at ${override.value}`;
    return [{ cause, message, hint: unset(override.name) }];
  }
  const hint = installHint(distribution, ["software"]) + LAUNCHER_INSTALLS;
  if (drivers.length === 0) {
    return [{ cause, message: `there is no Vulkan driver: no .json file in ${searched.join(", ")}`, hint }];
  }
  // The driver of a GPU that is not here finds nothing to drive, however sound it is.
  const makers = gpus.map(({ maker }) => maker);
  const mayBeHere = ({ isSoftware, maker, problem }: VulkanDriver) =>
    isSoftware || hidden.includes("/dev") ||
    (maker === undefined ? problem !== undefined : makers.includes(maker));
  const fitting = drivers.filter(mayBeHere);
  if (fitting.length === 0) {
    const manifests = drivers.map(({ manifest }) => manifest).join(", ");
    const message =
      `there is no Vulkan driver for this machine: those of ${manifests} are for other hardware`;
    return [{ cause, message, hint: override ? unset(override.name) : hint }];
  }
  const others = fitting.filter(({ maker }) => maker === undefined || !makers.includes(maker));
  const old = others.find(isOld);
  return [...others.flatMap(brokenDriver), ...(old ? [oldMesa(old, distribution)] : [])];
}

function unset(variable: string): string {
  return `unset ${variable}, or set it to the .json file of a driver for this machine`;
}

/** Why the GPUs of a maker are not shown. */
function gpuFindings(setup: VulkanSetup, maker: GpuMaker): Finding[] {
  const gpus = setup.gpus.filter((gpu) => gpu.maker === maker);
  const missing = gpus.find(({ state }) => state === "missing");
  const isReachable = gpus.some(({ state }) => state !== "missing");
  if (missing && !isReachable) return [noDevice(setup, missing)];
  const forbidden = gpus.find(({ state }) => state === "forbidden");
  const isOpen = gpus.some(({ state }) => state === "open");
  return [
    ...(forbidden && !isOpen ? [noPermission(setup, forbidden)] : []),
    ...gpuDriverFindings(setup, maker),
  ];
}

function gpuDriverFindings(setup: VulkanSetup, maker: GpuMaker): Finding[] {
  const { drivers, override, distribution } = setup;
  const own = drivers.filter((driver) => driver.maker === maker);
  if (own.some((driver) => driver.problem === undefined && !isOld(driver))) return [];
  if (override && own.length === 0) {
    if (drivers.length === 0) return []; // all are left out
    return [{
      cause: "no-icd",
      message:
        `${override.name} leaves out the driver of this machine's ${maker} GPU: it is ${override.value}`,
      hint: `unset ${override.name}, or add the .json file of that driver`,
    }];
  }
  const old = own.find(isOld);
  if (old) return [oldMesa(old, distribution)];
  if (maker === "NVIDIA") return [noNvidiaGraphics(setup, own[0])];
  if (own.length > 0) return own.flatMap(brokenDriver);
  return [{
    cause: "no-icd",
    message: `this machine has an ${maker} GPU, but there is no Vulkan driver for it`,
    hint: installHint(distribution, [maker]),
  }];
}

function noDevice({ inContainer }: VulkanSetup, { maker, device }: HostGpu): Finding {
  const give = maker === "NVIDIA" ? GIVE_NVIDIA : GIVE_OTHER;
  return {
    cause: "no-device",
    message: `this machine has an ${maker} GPU, but ${device} is missing`,
    hint: inContainer
      ? `start the container with ${give}`
      : `load the GPU's kernel driver; in a container, which has to be given the GPU, start it with ${give}`,
  };
}

function noPermission({ inContainer }: VulkanSetup, { device }: HostGpu): Finding {
  return {
    cause: "no-permission",
    message: `this user may not open ${device}`,
    hint: inContainer
      ? `start the container with \`--group-add $(stat -c %g ${device})\``
      : "join the group that may, most often render: `sudo usermod -aG render $USER`, then log in again",
  };
}

/** @param driver its manifest, which does not lead to a library that loads; undefined where there is none */
function noNvidiaGraphics(
  { nvidia, inContainer, strayManifests }: VulkanSetup,
  driver: VulkanDriver | undefined,
): Finding {
  const cause = "no-nvidia-graphics";
  const intro = "this machine has an NVIDIA GPU, but not the driver's Vulkan part";
  if (!driver && strayManifests[0] !== undefined) {
    return {
      cause,
      message: `${intro} where the loader looks: its manifest is ${strayManifests[0]}`,
      hint: `set VK_ADD_DRIVER_FILES=${strayManifests[0]}` + (IS_EXECUTABLE ? "" : ", as `./longform` does"),
    };
  }
  if (driver?.problem?.includes(" it needs ")) return brokenDriver(driver)[0]!;
  const { capabilities } = nvidia;
  const asked = capabilities === undefined || /\b(all|graphics)\b/.test(capabilities)
    ? ""
    : ` (NVIDIA_DRIVER_CAPABILITIES is "${capabilities}", without graphics)`;
  if (!driver && nvidia.library !== undefined) {
    return {
      cause,
      message: `${intro}: no manifest names ${nvidia.library}`,
      hint: `write ${MANIFEST} to /etc/vulkan/icd.d/nvidia_icd.json`,
    };
  }
  const missing = driver
    ? `${driver.manifest} cannot be used: ${driver.problem}`
    : `there is no manifest that names ${NVIDIA_LIBRARY}`;
  const version = nvidia.driver === undefined
    ? "of the driver's version"
    : `${nvidia.driver}, the driver's version`;
  return {
    cause,
    message: `${intro}: ${missing}${asked}`,
    hint: inContainer
      ? `start the container with ${GIVE_NVIDIA}, which mounts nvidia_icd.json and the graphics libraries`
      : `install nvidia-vulkan-icd (Debian) or libnvidia-gl (Ubuntu) ${version}; start a container with ` +
        GIVE_NVIDIA,
  };
}

/** What the driver's package, or the container's runtime, would have written. */
const MANIFEST = JSON.stringify({
  file_format_version: "1.0.0",
  ICD: { library_path: NVIDIA_LIBRARY, api_version: "1.3.0" },
});

/** Packages that hold what NVIDIA's library needs and small images leave out. */
const PACKAGES: Readonly<Record<string, string>> = {
  "libX11.so.6": "libx11-6",
  "libXext.so.6": "libxext6",
  "libGLdispatch.so.0": "libglvnd0",
};

function brokenDriver({ manifest, problem }: VulkanDriver): Finding[] {
  if (problem === undefined) return [];
  const needed = problem.match(/ it needs (\S+), /)?.[1];
  const name = PACKAGES[needed ?? ""];
  const holder = name === undefined
    ? `the package that has ${needed}`
    : `${name} (its name on Debian and Ubuntu)`;
  return [{
    cause: "broken-icd",
    message: `the driver's manifest ${manifest} cannot be used: ${problem}`,
    hint: needed === undefined
      ? "install the driver's package again, or remove the file"
      : `install ${holder}`,
  }];
}

function isOld({ mesa, apiVersion, libraryName, problem }: VulkanDriver): boolean {
  if (problem !== undefined || !/(^|\/)libvulkan_/.test(libraryName ?? "")) return false;
  if (mesa !== undefined) return Number(mesa.split(".")[0]) < OLDEST_MESA;
  return Number(apiVersion?.split(".").at(-1)) < OLDEST_MESA_REVISION;
}

function oldMesa({ library, mesa, apiVersion }: VulkanDriver, distribution: readonly string[]): Finding {
  const version = mesa === undefined ? `one of Vulkan ${apiVersion}` : `Mesa ${mesa}`;
  return {
    cause: "old-mesa",
    message:
      `the Mesa Vulkan driver is too old for WebGPU: ${library} is ${version}, 23.0 or later is needed`,
    hint: installHint(distribution, ["software"]) +
      (IS_EXECUTABLE ? "" : "; `./longform` prints all commands that it takes"),
  };
}

function softwareOnly(
  { hidden, inContainer }: VulkanSetup,
  name: string,
  makers: readonly GpuMaker[],
): Finding {
  const none = hidden.includes("/dev")
    ? "Deno does not show programs the machine's GPUs: run `longform info` on Bun to look for them"
    : `this ${inContainer ? "container" : "machine"} shows no GPU; a container has to be given one, by ` +
      `${GIVE_NVIDIA} or ${GIVE_OTHER}`;
  return {
    cause: "software-only",
    message: `Vulkan shows no GPU, only ${name}, which computes on the CPU`,
    hint: makers.length === 0 ? none : `see what keeps the GPU (${makers.join(", ")}) from being shown`,
  };
}

function unknown({ hidden }: VulkanSetup, driver: string, reason: string | undefined): Finding {
  const isUnread = hidden.some((name) => !name.startsWith("/"));
  return {
    cause: "unknown",
    message: `the Vulkan loader and ${driver} are here, but Dawn opens no adapter with them` +
      (reason === undefined ? "" : `: ${reason}`),
    hint: isUnread
      ? "run `longform info` on Bun: Deno may not read the variables that decide which drivers there are"
      : "run `VK_LOADER_DEBUG=all longform info`, which shows what the Vulkan loader does",
  };
}

/** What the launcher does where there is no loader or no driver at all. An executable has none. */
const LAUNCHER_INSTALLS = IS_EXECUTABLE ? "" : "; on Debian and Ubuntu `./longform` does it when run as root";

/** What is installed: the Vulkan loader, or Mesa's driver for the CPU or a maker's GPUs. */
type Part = "loader" | "software" | Exclude<GpuMaker, "NVIDIA">;

/** Commands and packages by a distribution's `ID` or `ID_LIKE`. */
const INSTALLERS: readonly {
  readonly distributions: readonly string[];
  readonly command: string;
  readonly packages: Readonly<Record<Part, string>>;
}[] = [
  {
    distributions: ["debian", "ubuntu"],
    command: "apt-get install",
    packages: everyDriver("libvulkan1", "mesa-vulkan-drivers"),
  },
  {
    distributions: ["fedora", "rhel"],
    command: "dnf install",
    packages: everyDriver("vulkan-loader", "mesa-vulkan-drivers"),
  },
  {
    distributions: ["arch"],
    command: "pacman -S",
    packages: {
      loader: "vulkan-icd-loader",
      software: "vulkan-swrast",
      AMD: "vulkan-radeon",
      Intel: "vulkan-intel",
    },
  },
  {
    distributions: ["suse", "opensuse"],
    command: "zypper install",
    packages: {
      loader: "libvulkan1",
      software: "libvulkan_lvp",
      AMD: "libvulkan_radeon",
      Intel: "libvulkan_intel",
    },
  },
];

function everyDriver(loader: string, mesa: string): Readonly<Record<Part, string>> {
  return { loader, software: mesa, AMD: mesa, Intel: mesa };
}

/** How to install parts on a distribution, as far as that is known. */
function installHint(distribution: readonly string[], parts: readonly Part[]): string {
  const installer = INSTALLERS.find(({ distributions }) =>
    distributions.some((name) => distribution.includes(name))
  );
  if (!installer) {
    const names = parts.map((part) => part === "loader" ? `the Vulkan loader, ${LOADER_LIBRARY}` : MESA);
    return `install ${names.join(", and ")}`;
  }
  const packages = parts.map((part) => installer.packages[part]);
  const isOld = distribution.includes("bookworm") && packages.includes("mesa-vulkan-drivers");
  const command = installer.command + (isOld ? " -t bookworm-backports" : "");
  return `run \`${command} ${packages.join(" ")}\` as root`;
}
