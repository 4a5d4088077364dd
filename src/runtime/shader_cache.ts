/** Where drivers keep compiled shaders between processes. Dawn keeps none of its own in npm `webgpu`. */
import { Host, type HostOptions } from "./host.ts";

export interface ShaderCache {
  readonly keeper: "Mesa" | "NVIDIA";
  /** False where a variable of the environment turns it off. */
  readonly isEnabled: boolean;
  /** The folders that there are, with the bytes of their files. */
  readonly folders: readonly { readonly path: string; readonly bytes: number }[];
}

/**
 * The cache of the driver that an adapter runs on.
 * @param driver as `Capabilities` describe it
 * @returns undefined for a driver whose cache is not known
 */
export function shaderCache(driver: string, options: HostOptions = {}): ShaderCache | undefined {
  const host = new Host(options);
  const home = host.variable("HOME") ?? "";
  const caches = host.variable("XDG_CACHE_HOME") || `${home}/.cache`;
  const there = (paths: readonly string[]) =>
    paths.filter((path) => host.isFolder(path)).map((path) => ({ path, bytes: folderBytes(host, path) }));
  // docs.mesa3d.org, "Environment Variables": one file a shader, one for all, or a database.
  if (/\bMesa\b/.test(driver)) {
    const folder = host.variable("MESA_SHADER_CACHE_DIR") || caches;
    const names = ["mesa_shader_cache", "mesa_shader_cache_sf", "mesa_shader_cache_db"];
    return {
      keeper: "Mesa",
      isEnabled: !/^(1|true|yes|y)$/i.test(host.variable("MESA_SHADER_CACHE_DISABLE") ?? ""),
      folders: there(names.map((name) => `${folder}/${name}`)),
    };
  }
  // README of NVIDIA's driver, on the variables of its shader disk cache; older drivers have it in ~/.nv.
  if (/\bNVIDIA\b/i.test(driver)) {
    const folder = host.variable("__GL_SHADER_DISK_CACHE_PATH");
    return {
      keeper: "NVIDIA",
      isEnabled: host.variable("__GL_SHADER_DISK_CACHE") !== "0",
      folders: there(folder ? [folder] : [`${caches}/nvidia/GLCache`, `${home}/.nv/GLCache`]),
    };
  }
  return undefined;
}

function folderBytes(host: Host, path: string): number {
  return host.names(path).map((name) => `${path}/${name}`).reduce(
    (sum, entry) => sum + (host.isFolder(entry) ? folderBytes(host, entry) : host.fileBytes(entry)),
    0,
  );
}
