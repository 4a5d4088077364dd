/**
 * What Vulkan has to work with on this machine, found without starting it: the loader, the drivers' manifests,
 * their libraries, the GPUs. `vulkan_diagnosis.ts` says what is wrong with it.
 */
import { Buffer } from "node:buffer";
import { join } from "node:path/posix";
import process from "node:process";
import { DynamicLinker, type SharedLibrary } from "./dynamic_linker.ts";
import { Host, type HostOptions } from "./host.ts";
import { type GpuMaker, type HostGpu, hostGpus, nvidiaDriver } from "./host_gpu.ts";

export interface VulkanLoader extends SharedLibrary {
  /** As the file's real name has it. */
  readonly version: string | undefined;
}

/** A driver's manifest, and the library that it leads to. */
export interface VulkanDriver {
  readonly manifest: string;
  /** Of Vulkan, as the manifest says. */
  readonly apiVersion: string | undefined;
  /** As the manifest names it. */
  readonly libraryName: string | undefined;
  /** Where that is; undefined when there is none. */
  readonly library: string | undefined;
  /** Why the loader does not use it; undefined when nothing is known against it. */
  readonly problem: string | undefined;
  /** Computes on the CPU. */
  readonly isSoftware: boolean;
  /** Whose GPUs it drives, by the library's name; undefined where that does not tell. */
  readonly maker: GpuMaker | undefined;
  /** Version of Mesa; undefined for another driver, or where the library does not tell. */
  readonly mesa: string | undefined;
}

export interface VulkanSetup {
  /** False outside Linux: there is nothing to look at, and the rest is empty. */
  readonly isLinux: boolean;
  /** Undefined where there is none. */
  readonly loader: VulkanLoader | undefined;
  /** The variable that stands in for all folders, with its value. */
  readonly override: { readonly name: string; readonly value: string } | undefined;
  /** Where the loader looks for manifests, in its order: folders, or what the variables name. */
  readonly searched: readonly string[];
  readonly drivers: readonly VulkanDriver[];
  /** Manifests of NVIDIA's driver where container hosts mount them, and the loader does not look. */
  readonly strayManifests: readonly string[];
  readonly gpus: readonly HostGpu[];
  readonly nvidia: {
    /** Version of the kernel driver. */
    readonly driver: string | undefined;
    /** What a container asked for: NVIDIA_DRIVER_CAPABILITIES. */
    readonly capabilities: string | undefined;
    /** Path of the library that is its Vulkan driver. */
    readonly library: string | undefined;
  };
  readonly inContainer: boolean;
  /** `ID`, `ID_LIKE` and `VERSION_CODENAME` of /etc/os-release, in words. */
  readonly distribution: readonly string[];
  /** What this process may not see, and what is therefore not known. */
  readonly hidden: readonly string[];
}

/** Looks at this machine, or at a made-up one. */
export function inspectVulkan(options: HostOptions & { readonly platform?: string } = {}): VulkanSetup {
  const host = new Host(options);
  const isLinux = (options.platform ?? process.platform) === "linux";
  if (!isLinux) {
    const nothing = { driver: undefined, capabilities: undefined, library: undefined };
    return {
      isLinux,
      loader: undefined,
      override: undefined,
      searched: [],
      drivers: [],
      strayManifests: [],
      gpus: [],
      nvidia: nothing,
      inContainer: false,
      distribution: [],
      hidden: [],
    };
  }
  const linker = new DynamicLinker(host);
  const override = ["VK_DRIVER_FILES", "VK_ICD_FILENAMES"]
    .map((name) => ({ name, value: host.variable(name) }))
    .find((variable): variable is { name: string; value: string } => variable.value !== undefined);
  const searched = override ? paths(override.value) : manifestFolders(host);
  const drivers = searched.flatMap((path) => manifestsIn(host, path))
    .map((path) => inspectDriver(host, linker, path));
  const capabilities = host.variable("NVIDIA_DRIVER_CAPABILITIES");
  return {
    isLinux,
    loader: findLoader(host, linker),
    override,
    searched,
    drivers,
    strayManifests: manifestsIn(host, "/usr/local/nvidia/share/vulkan/icd.d"),
    gpus: hostGpus(host),
    nvidia: { driver: nvidiaDriver(host), capabilities, library: linker.find(NVIDIA_LIBRARY)?.path },
    inContainer: capabilities !== undefined || host.exists("/.dockerenv") ||
      host.exists("/run/.containerenv"),
    distribution: osRelease(host),
    hidden: host.hidden,
  };
}

/** What NVIDIA's manifest names. */
export const NVIDIA_LIBRARY = "libGLX_nvidia.so.0";
export const LOADER_LIBRARY = "libvulkan.so.1";

function findLoader(host: Host, linker: DynamicLinker): VulkanLoader | undefined {
  const loader = linker.find(LOADER_LIBRARY);
  return loader && { ...loader, version: host.realName(loader.path)?.match(/\.so\.(\d+\.\d+\.\d+)/)?.[1] };
}

/** The parts of a list of paths. */
function paths(list: string): string[] {
  return list.split(":").filter((path) => path !== "");
}

/**
 * Where the loader looks for manifests unless a variable stands in for it (Vulkan-Loader,
 * LoaderDriverInterface.md, "Linux Driver Discovery"). An empty variable counts as one that is not set.
 */
function manifestFolders(host: Host): string[] {
  const home = host.variable("HOME") ?? "";
  const folders = [
    host.variable("XDG_CONFIG_HOME") || `${home}/.config`,
    ...paths(host.variable("XDG_CONFIG_DIRS") || "/etc/xdg"),
    "/etc",
    host.variable("XDG_DATA_HOME") || `${home}/.local/share`,
    ...paths(host.variable("XDG_DATA_DIRS") || "/usr/local/share:/usr/share"),
  ];
  return [
    ...paths(host.variable("VK_ADD_DRIVER_FILES") ?? ""),
    ...folders.map((folder) => `${folder}/vulkan/icd.d`),
  ];
}

/** The manifests that a path stands for: those in a folder, or itself if it exists. */
function manifestsIn(host: Host, path: string): string[] {
  if (!host.isFolder(path)) return host.exists(path) ? [path] : [];
  return host.names(path).filter((name) => name.endsWith(".json")).map((name) => `${path}/${name}`);
}

function inspectDriver(host: Host, linker: DynamicLinker, manifest: string): VulkanDriver {
  const { apiVersion, libraryName, problem } = parseManifest(host.text(manifest));
  const found = libraryName === undefined ? undefined : linker.find(
    libraryName.includes("/") && !libraryName.startsWith("/")
      ? join(manifest, "..", libraryName)
      : libraryName,
  );
  const file = libraryName?.split("/").at(-1) ?? "";
  const isSoftware = /lvp|swiftshader/i.test(file);
  return {
    manifest,
    apiVersion,
    libraryName,
    library: found?.path,
    problem: problem ??
      (found ? found.problem && `${found.path}: ${found.problem}` : `${libraryName} is missing`),
    isSoftware,
    maker: isSoftware ? undefined : makerOf(file),
    mesa: found && /^libvulkan_/.test(file) ? mesaVersion(host, found.path) : undefined,
  };
}

function makerOf(library: string): GpuMaker | undefined {
  if (/nvidia|nouveau/i.test(library)) return "NVIDIA";
  if (/radeon|amdvlk/i.test(library)) return "AMD";
  return /intel/i.test(library) ? "Intel" : undefined;
}

function parseManifest(
  text: string | undefined,
): Pick<VulkanDriver, "apiVersion" | "libraryName" | "problem"> {
  const nothing = { apiVersion: undefined, libraryName: undefined };
  if (text === undefined) return { ...nothing, problem: "it cannot be read" };
  let json: { ICD?: { api_version?: unknown; library_path?: unknown } | null } | null;
  try {
    json = JSON.parse(text);
  } catch {
    return { ...nothing, problem: "it is not JSON" };
  }
  const { api_version: apiVersion, library_path: libraryName } = json?.ICD ?? {};
  if (typeof libraryName !== "string") return { ...nothing, problem: "it names no ICD.library_path" };
  return {
    apiVersion: typeof apiVersion === "string" ? apiVersion : undefined,
    libraryName,
    problem: undefined,
  };
}

const CHUNK_BYTES = 1 << 20;
/** The longest version that one chunk may begin and the next one end. */
const OVERLAP_BYTES = 64;
/** Mesa's drivers have 1 to 40 MB. */
const MOST_LIBRARY_BYTES = 128 << 20;
const MESA_NAME = "Mesa ";

/** The version in Mesa's name of itself (`Mesa 25.0.7-2`), which most of its drivers contain. */
function mesaVersion(host: Host, library: string): string | undefined {
  for (let offset = 0; offset < MOST_LIBRARY_BYTES; offset += CHUNK_BYTES) {
    const bytes = host.bytes(library, offset, CHUNK_BYTES + OVERLAP_BYTES) ?? new Uint8Array();
    // Decoding all of it to match a pattern would take ten times as long.
    const chunk = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    const next = (at: number) => chunk.indexOf(MESA_NAME, at + 1);
    for (let at = next(-1); at >= 0 && at < CHUNK_BYTES; at = next(at)) {
      const version = chunk.toString("latin1", at, at + OVERLAP_BYTES).match(/^Mesa (\d+\.\d+\.\d+)/)?.[1];
      if (version !== undefined) return version;
    }
    if (bytes.length <= CHUNK_BYTES) return undefined;
  }
  return undefined;
}

function osRelease(host: Host): string[] {
  const text = host.text("/etc/os-release") ?? host.text("/usr/lib/os-release") ?? "";
  return ["ID", "ID_LIKE", "VERSION_CODENAME"].flatMap((key) =>
    text.match(new RegExp(`^${key}="?([^"\\n]*)`, "m"))?.[1]?.split(" ") ?? []
  );
}
