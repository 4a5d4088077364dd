/** Made-up machines: what is found of Vulkan on them, and what is said to be wrong. */
import { afterAll, describe, expect, test } from "bun:test";
import { join } from "node:path";
import { diagnose, type Finding, invisibleGpuNote } from "../../src/runtime/vulkan_diagnosis.ts";
import { inspectVulkan, type VulkanSetup } from "../../src/runtime/vulkan_setup.ts";
import { temporaryFolder } from "../support/checkpoint.ts";
import { library, type MadeUpFile, manifest, writeMachine } from "../support/machine.ts";

const folder = temporaryFolder();
afterAll(folder.remove);
let machines = 0;

type Files = Readonly<Record<string, MadeUpFile>>;
type Env = Readonly<Record<string, string>>;

function made(files: Files, env: Env = {}) {
  const root = writeMachine(join(folder.path, String(machines++)), files);
  return { root, env: { HOME: "/home/me", ...env }, platform: "linux" };
}

function inspect(files: Files, env: Env = {}): VulkanSetup {
  return inspectVulkan(made(files, env));
}

const LOADER: Files = {
  "/usr/lib/libvulkan.so.1.3.239": library(),
  "/usr/lib/libvulkan.so.1": { link: "libvulkan.so.1.3.239" },
};
const ICD = "/usr/share/vulkan/icd.d";
const LAVAPIPE: Files = {
  [`${ICD}/lvp_icd.json`]: manifest("libvulkan_lvp.so"),
  "/usr/lib/libvulkan_lvp.so": library({ text: "\0Mesa 25.0.7-2\0" }),
};
const OLD_LAVAPIPE: Files = {
  [`${ICD}/lvp_icd.json`]: manifest("/usr/lib/libvulkan_lvp.so", "1.1.230"),
  "/usr/lib/libvulkan_lvp.so": library({ text: "\0Mesa 22.3.6\0" }),
};
const RADEON: Files = {
  [`${ICD}/radeon_icd.json`]: manifest("libvulkan_radeon.so"),
  "/usr/lib/libvulkan_radeon.so": library({ text: "\0Mesa 25.0.7\0" }),
};
const NVIDIA_DRIVER: Files = {
  [`${ICD}/nvidia_icd.json`]: manifest("libGLX_nvidia.so.0"),
  "/usr/lib/libGLX_nvidia.so.0": library(),
};
const NVIDIA_GPU: Files = {
  "/dev/nvidia0": "",
  "/dev/nvidiactl": "",
  "/proc/driver/nvidia/version":
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build\nGCC version: 12\n",
};
const AMD_GPU: Files = { "/sys/class/drm/renderD128/device/vendor": "0x1002\n", "/dev/dri/renderD128": "" };

describe("manifests", () => {
  const where = (files: Files, env?: Env) => inspect(files, env).drivers.map(({ manifest }) => manifest);
  const everywhere = Object.fromEntries(
    [
      "/home/me/.config",
      "/etc/xdg",
      "/etc",
      "/home/me/.local/share",
      "/usr/local/share",
      "/usr/share",
      "/configured",
      "/data",
    ].map((path) => [`${path}/vulkan/icd.d/a.json`, manifest("liba.so")]),
  );

  test("are read from the loader's folders in its order", () => {
    expect(where(everywhere)).toEqual([
      "/home/me/.config/vulkan/icd.d/a.json",
      "/etc/xdg/vulkan/icd.d/a.json",
      "/etc/vulkan/icd.d/a.json",
      "/home/me/.local/share/vulkan/icd.d/a.json",
      "/usr/local/share/vulkan/icd.d/a.json",
      "/usr/share/vulkan/icd.d/a.json",
    ]);
    const moved = {
      XDG_CONFIG_HOME: "/none",
      XDG_CONFIG_DIRS: "/none:/configured",
      XDG_DATA_HOME: "/none",
      XDG_DATA_DIRS: "/data:/none",
    };
    expect(where(everywhere, moved)).toEqual([
      "/configured/vulkan/icd.d/a.json",
      "/etc/vulkan/icd.d/a.json",
      "/data/vulkan/icd.d/a.json",
    ]);
  });
  test("are those that a variable names, files and folders, and then no others", () => {
    const files = {
      ...everywhere,
      "/my/b.json": manifest("libb.so"),
      "/many/d.json": manifest("libd.so"),
      "/many/c.json": manifest("libc.so"),
      "/many/readme.txt": "",
    };
    const names = {
      VK_DRIVER_FILES: "/my/b.json:/none.json:/many",
      VK_ICD_FILENAMES: "/etc/vulkan/icd.d/a.json",
    };
    expect(where(files, names)).toEqual(["/my/b.json", "/many/c.json", "/many/d.json"]);
    expect(where(files, { VK_ICD_FILENAMES: "/my/b.json" })).toEqual(["/my/b.json"]);
    expect(where(files, { VK_DRIVER_FILES: "" })).toEqual([]);
    expect(where(files, { VK_ADD_DRIVER_FILES: "/my/b.json", XDG_DATA_DIRS: "/none" })).toEqual([
      "/my/b.json",
      "/home/me/.config/vulkan/icd.d/a.json",
      "/etc/xdg/vulkan/icd.d/a.json",
      "/etc/vulkan/icd.d/a.json",
      "/home/me/.local/share/vulkan/icd.d/a.json",
    ]);
  });
  test("lead to their library, or to what is wrong with them", () => {
    const { drivers } = inspect({
      ...LAVAPIPE,
      [`${ICD}/a_relative.json`]: manifest("../lib/libvulkan_intel.so"),
      "/usr/share/vulkan/lib/libvulkan_intel.so": library(),
      [`${ICD}/b_text.json`]: "driver",
      [`${ICD}/c_empty.json`]: "{}",
      [`${ICD}/d_missing.json`]: manifest("/usr/lib/libnone.so"),
      [`${ICD}/e_needy.json`]: manifest("libneedy.so"),
      "/usr/lib/libneedy.so": library({ needed: ["libX11.so.6"] }),
      [`${ICD}/f_null.json`]: "null",
    });
    expect(drivers.map(({ library, problem }) => ({ library, problem }))).toEqual([
      { library: "/usr/share/vulkan/lib/libvulkan_intel.so", problem: undefined },
      { library: undefined, problem: "it is not JSON" },
      { library: undefined, problem: "it names no ICD.library_path" },
      { library: undefined, problem: "/usr/lib/libnone.so is missing" },
      {
        library: "/usr/lib/libneedy.so",
        problem: "/usr/lib/libneedy.so: it needs libX11.so.6, which is missing",
      },
      { library: undefined, problem: "it names no ICD.library_path" },
      { library: "/usr/lib/libvulkan_lvp.so", problem: undefined },
    ]);
    expect(drivers.at(-1)).toMatchObject({
      isSoftware: true,
      maker: undefined,
      mesa: "25.0.7",
      apiVersion: "1.3.300",
    });
    expect(drivers[0]).toMatchObject({ isSoftware: false, maker: "Intel", mesa: undefined });
  });
  test("of Mesa have a version wherever in the library it is", () => {
    for (const at of [1000, (1 << 20) - 5, 1 << 20, (3 << 20) - 1]) {
      const text = "\0".repeat(at - library().length) + "Mesa 24.2.8-1";
      const { drivers } = inspect({ ...LAVAPIPE, "/usr/lib/libvulkan_lvp.so": library({ text }) });
      expect({ at, mesa: drivers[0]?.mesa }).toEqual({ at, mesa: "24.2.8" });
    }
  });
});

describe("the machine", () => {
  test("has a loader with the version of its real name, or none", () => {
    expect(inspect(LOADER).loader)
      .toEqual({ path: "/usr/lib/libvulkan.so.1", problem: undefined, version: "1.3.239" });
    expect(inspect({}).loader).toBeUndefined();
  });
  test("has the GPUs that the kernel shows, each once", () => {
    const { gpus, nvidia } = inspect({
      ...NVIDIA_GPU,
      "/dev/nvidia1": "",
      "/sys/class/drm/renderD128/device/vendor": "0x10de\n",
      "/sys/class/drm/renderD129/device/vendor": "0x8086\n",
      "/sys/class/drm/renderD130/device/vendor": "0x1af4\n",
      "/sys/class/drm/card0/device/vendor": "0x1002\n",
    });
    expect(gpus).toEqual([
      { maker: "NVIDIA", device: "/dev/nvidia0", state: "open" },
      { maker: "NVIDIA", device: "/dev/nvidia1", state: "open" },
      { maker: "Intel", device: "/dev/dri/renderD129", state: "missing" },
    ]);
    expect(nvidia.driver).toBe("580.159.04");
  });
  test("has an NVIDIA GPU where only the kernel's driver tells of it", () => {
    const { "/dev/nvidia0": _, ...files } = NVIDIA_GPU;
    expect(inspect(files).gpus).toEqual([{ maker: "NVIDIA", device: "/dev/nvidia0", state: "missing" }]);
  });
  test("outside Linux has nothing to look at, and nothing wrong", () => {
    const setup = inspectVulkan({ ...made({ ...LOADER, ...LAVAPIPE }), platform: "darwin" });
    expect(setup).toMatchObject({ isLinux: false, loader: undefined, drivers: [], gpus: [] });
    expect(diagnose(setup, [])).toEqual([]);
  });
});

const SOFTWARE = { name: "llvmpipe", isSoftware: true };
const causes = (findings: readonly Finding[]) => findings.map(({ cause }) => cause);
/** The only finding on a machine without adapters. */
function only(files: Files, env: Env = {}, adapters: readonly typeof SOFTWARE[] = []): Finding {
  const findings = diagnose(inspect(files, env), adapters);
  expect(causes(findings)).toHaveLength(1);
  return findings[0]!;
}

describe("without an adapter", () => {
  test("a missing loader is named, and the missing driver with it", () => {
    const debian = { "/etc/os-release": "NAME=x\nID=debian\nVERSION_CODENAME=bookworm\n" };
    expect(only({ ...LAVAPIPE, ...debian })).toEqual({
      cause: "no-loader",
      message: "there is no Vulkan loader (libvulkan.so.1)",
      hint: expect.stringContaining("`apt-get install libvulkan1`"),
    });
    const nothing = diagnose(inspect(debian), []);
    expect(causes(nothing)).toEqual(["no-loader", "no-icd"]);
    expect(nothing[0]?.hint).toContain(
      "`apt-get install -t bookworm-backports libvulkan1 mesa-vulkan-drivers`",
    );
  });
  test("a loader that does not load is named, with the file", () => {
    const finding = only({ ...LOADER, ...LAVAPIPE, "/fake/libvulkan.so.1": "" }, {
      LD_LIBRARY_PATH: "/fake",
    });
    expect(finding).toMatchObject({
      cause: "no-loader",
      message: "the Vulkan loader /fake/libvulkan.so.1 does not load: the file is too short",
      hint: expect.stringContaining("LD_LIBRARY_PATH"),
    });
  });
  test("folders without a manifest are listed, with how to install a driver here", () => {
    const hints = {
      'ID=debian\nVERSION_CODENAME="trixie"': "`apt-get install mesa-vulkan-drivers`",
      'ID=linuxmint\nID_LIKE="ubuntu debian"': "`apt-get install mesa-vulkan-drivers`",
      "ID=fedora": "`dnf install mesa-vulkan-drivers`",
      "ID=arch": "`pacman -S vulkan-swrast`",
      'ID="opensuse-leap"\nID_LIKE="suse opensuse"': "`zypper install libvulkan_lvp`",
      "ID=other": "install Mesa's Vulkan drivers, 23.0 or later",
    };
    for (const [release, hint] of Object.entries(hints)) {
      const finding = only({ ...LOADER, "/etc/os-release": `${release}\n` });
      expect(finding.cause).toBe("no-icd");
      expect(finding.message).toEndWith("/usr/local/share/vulkan/icd.d, /usr/share/vulkan/icd.d");
      expect(finding.hint).toContain(hint);
    }
  });
  test("a variable that names no manifest is named with its value, whatever GPU there is", () => {
    const finding = only({ ...LOADER, ...LAVAPIPE, ...NVIDIA_GPU }, { VK_DRIVER_FILES: "/none.json" });
    expect(finding.cause).toBe("no-icd");
    expect(finding.message).toBe("VK_DRIVER_FILES names no driver's manifest: there is none at /none.json");
    expect(finding.hint).toStartWith("unset VK_DRIVER_FILES");
    expect(only({ ...LOADER, ...LAVAPIPE }, { VK_ICD_FILENAMES: "" }).message).toContain(
      "VK_ICD_FILENAMES is empty",
    );
  });
  test("drivers of other hardware do not count", () => {
    const finding = only({ ...LOADER, ...RADEON });
    expect(finding.cause).toBe("no-icd");
    expect(finding.message).toContain(`those of ${ICD}/radeon_icd.json are for other hardware`);
    const named = only({ ...LOADER, ...LAVAPIPE, ...RADEON }, { VK_DRIVER_FILES: `${ICD}/radeon_icd.json` });
    expect(named.hint).toStartWith("unset VK_DRIVER_FILES");
  });
  test("a broken manifest or driver is named", () => {
    const file = `${ICD}/lvp_icd.json`;
    const messages = [
      [{ ...LAVAPIPE, [file]: "{" }, "it is not JSON"],
      [{ [file]: manifest("libvulkan_lvp.so") }, "libvulkan_lvp.so is missing"],
      [
        { ...LAVAPIPE, "/usr/lib/libvulkan_lvp.so": library({ needed: ["libLLVM-15.so.1"] }) },
        "/usr/lib/libvulkan_lvp.so: it needs libLLVM-15.so.1, which is missing",
      ],
    ] as const;
    for (const [files, problem] of messages) {
      const finding = only({ ...LOADER, ...files });
      expect(finding.cause).toBe("broken-icd");
      expect(finding.message).toBe(`the driver's manifest ${file} cannot be used: ${problem}`);
    }
  });
  test("a Mesa before 23 is too old, by its own word or its manifest's", () => {
    const debian = { "/etc/os-release": "ID=debian\nVERSION_CODENAME=bookworm\n" };
    const old = only({ ...LOADER, ...OLD_LAVAPIPE, ...debian });
    expect(old.cause).toBe("old-mesa");
    expect(old.message).toContain("/usr/lib/libvulkan_lvp.so is Mesa 22.3.6, 23.0 or later is needed");
    expect(old.hint).toContain("`apt-get install -t bookworm-backports mesa-vulkan-drivers`");
    const silent = only({ ...LOADER, ...OLD_LAVAPIPE, "/usr/lib/libvulkan_lvp.so": library() });
    expect(silent.cause).toBe("old-mesa");
    expect(silent.message).toContain("/usr/lib/libvulkan_lvp.so is one of Vulkan 1.1.230");
  });
  test("nothing wrong leaves what Dawn said, and where to look", () => {
    const [finding, ...rest] = diagnose(inspect({ ...LOADER, ...LAVAPIPE }), [], "out of memory");
    expect(rest).toEqual([]);
    expect(finding).toMatchObject({ cause: "unknown", message: expect.stringMatching(/: out of memory$/) });
    expect(finding?.hint).toContain("VK_LOADER_DEBUG=all");
  });
});

describe("with an adapter", () => {
  const sound = { ...LOADER, ...LAVAPIPE };

  test("that is a GPU nothing is wrong", () => {
    const gpu = { name: "NVIDIA", isSoftware: false };
    expect(diagnose(inspect({ ...LOADER, ...NVIDIA_GPU }), [SOFTWARE, gpu])).toEqual([]);
  });
  test("on the CPU alone, a machine without a GPU is told how a container gets one", () => {
    const finding = only(sound, {}, [SOFTWARE]);
    expect(finding.cause).toBe("software-only");
    expect(finding.message).toBe("Vulkan shows no GPU, only llvmpipe, which computes on the CPU");
    expect(finding.hint).toContain("`docker run --gpus all -e NVIDIA_DRIVER_CAPABILITIES=all`");
  });
});

describe("a GPU that Vulkan does not show", () => {
  /** What follows `software-only`, which comes first. */
  function gpuFinding(files: Files, env: Env = {}): Finding {
    const [first, second, ...rest] = diagnose(inspect({ ...LOADER, ...LAVAPIPE, ...files }, env), [SOFTWARE]);
    expect([first?.cause, rest.length]).toEqual(["software-only", 0]);
    return second!;
  }

  test("of NVIDIA in a container without the graphics capability", () => {
    const finding = gpuFinding(NVIDIA_GPU, { NVIDIA_DRIVER_CAPABILITIES: "compute,utility" });
    expect(finding.cause).toBe("no-nvidia-graphics");
    expect(finding.message).toContain('NVIDIA_DRIVER_CAPABILITIES is "compute,utility", without graphics');
    expect(finding.hint).toContain("`docker run --gpus all -e NVIDIA_DRIVER_CAPABILITIES=all`");
    const { message } = gpuFinding(NVIDIA_GPU, { NVIDIA_DRIVER_CAPABILITIES: "all" });
    expect(message).not.toContain("without graphics");
  });
  test("of NVIDIA without the driver's Vulkan part", () => {
    const bare = gpuFinding(NVIDIA_GPU);
    expect(bare.cause).toBe("no-nvidia-graphics");
    expect(bare.message).toContain("no manifest that names libGLX_nvidia.so.0");
    expect(bare.hint).toMatch(/nvidia-vulkan-icd \(Debian\) or libnvidia-gl \(Ubuntu\).*580\.159\.04/);
    const half = gpuFinding({ ...NVIDIA_GPU, [`${ICD}/nvidia_icd.json`]: manifest("libGLX_nvidia.so.0") });
    expect(half.cause).toBe("no-nvidia-graphics");
    expect(half.message).toContain(`${ICD}/nvidia_icd.json cannot be used: libGLX_nvidia.so.0 is missing`);
  });
  test("of NVIDIA whose library no manifest names", () => {
    const { "/usr/lib/libGLX_nvidia.so.0": library } = NVIDIA_DRIVER;
    const finding = gpuFinding({ ...NVIDIA_GPU, "/usr/lib/libGLX_nvidia.so.0": library! });
    expect(finding.cause).toBe("no-nvidia-graphics");
    expect(finding.message).toEndWith("no manifest names /usr/lib/libGLX_nvidia.so.0");
    const written = finding.hint.match(/write (.*) to (.*)/)!;
    expect(
      gpuFinding({ ...NVIDIA_GPU, "/usr/lib/libGLX_nvidia.so.0": library!, [written[2]!]: written[1]! })
        .cause,
    )
      .toBe("unknown"); // with it, all is in order
  });
  test("of NVIDIA where a container host has put the manifest elsewhere", () => {
    const stray = "/usr/local/nvidia/share/vulkan/icd.d/nvidia_icd.json";
    const files = { ...NVIDIA_GPU, [stray]: manifest("libGLX_nvidia.so.0") };
    expect(gpuFinding(files)).toMatchObject({
      cause: "no-nvidia-graphics",
      hint: `set VK_ADD_DRIVER_FILES=${stray}, as \`./longform\` does`,
    });
  });
  test("of NVIDIA for want of a library that small images leave out", () => {
    const needy = library({ needed: ["libXext.so.6"] });
    const finding = gpuFinding({ ...NVIDIA_GPU, ...NVIDIA_DRIVER, "/usr/lib/libGLX_nvidia.so.0": needy });
    expect(finding.cause).toBe("broken-icd");
    expect(finding.message).toContain("it needs libXext.so.6, which is missing");
    expect(finding.hint).toContain("libxext6");
  });
  test("of NVIDIA that the container was not given", () => {
    const { "/dev/nvidia0": _, ...files } = NVIDIA_GPU;
    const finding = gpuFinding({ ...files, "/.dockerenv": "" });
    expect(finding.cause).toBe("no-device");
    expect(finding.message).toContain("/dev/nvidia0 is missing");
    expect(finding.hint).toContain("`docker run --gpus all");
  });
  test("of AMD without a device file, a permission, a driver, a new enough driver", () => {
    const { "/dev/dri/renderD128": _, ...unreachable } = AMD_GPU;
    expect(gpuFinding({ ...unreachable, ...RADEON }).hint).toContain("`docker run --device /dev/dri`");
    const driverless = gpuFinding({ ...AMD_GPU, "/etc/os-release": "ID=arch\n" });
    expect(driverless.cause).toBe("no-icd");
    expect(driverless.hint).toContain("`pacman -S vulkan-radeon`");
    const text = "Mesa 22.3.6";
    const old = gpuFinding({ ...AMD_GPU, ...RADEON, "/usr/lib/libvulkan_radeon.so": library({ text }) });
    expect(old.cause).toBe("old-mesa");
    const setup = inspect({ ...LOADER, ...LAVAPIPE, ...AMD_GPU, ...RADEON });
    const forbidden = { ...setup, gpus: setup.gpus.map((gpu) => ({ ...gpu, state: "forbidden" as const })) };
    const [, permission] = diagnose(forbidden, [SOFTWARE]);
    expect(permission).toMatchObject({
      cause: "no-permission",
      message: "this user may not open /dev/dri/renderD128",
    });
  });
  test("because a variable leaves its driver out", () => {
    const files = { ...NVIDIA_GPU, ...NVIDIA_DRIVER };
    const finding = gpuFinding(files, { VK_DRIVER_FILES: `${ICD}/lvp_icd.json` });
    expect(finding.cause).toBe("no-icd");
    expect(finding.message).toContain("VK_DRIVER_FILES leaves out the driver of this machine's NVIDIA GPU");
  });
  test("for a reason that is not among these", () => {
    expect(gpuFinding({ ...NVIDIA_GPU, ...NVIDIA_DRIVER }).cause).toBe("unknown");
  });
  test("is noted in one line by a run on the CPU; where there is none, nothing is", () => {
    const noteOf = (files: Files) => invisibleGpuNote(made({ ...LOADER, ...LAVAPIPE, ...files }));
    expect(noteOf(NVIDIA_GPU)).toMatch(
      /^this machine has an NVIDIA GPU, but not [^\n]*: install nvidia-vulkan-icd/,
    );
    expect(noteOf(AMD_GPU)).toMatch(/^this machine has an AMD GPU, but there is no Vulkan driver for it: /);
    expect(noteOf({})).toBeUndefined();
    expect(noteOf({ "/sys/class/drm/renderD128/device/vendor": "0x1af4\n" })).toBeUndefined();
    const both = { ...AMD_GPU, "/sys/class/drm/renderD127/device/vendor": "0x1af4\n" };
    expect(noteOf(both)).toContain("AMD");
  });
});
