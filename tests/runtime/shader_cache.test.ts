import { afterAll, expect, test } from "bun:test";
import { shaderCache } from "../../src/runtime/shader_cache.ts";
import { temporaryFolder } from "../support/checkpoint.ts";
import { writeMachine } from "../support/machine.ts";

const folder = temporaryFolder();
afterAll(folder.remove);
const root = writeMachine(folder.path, {
  "/home/me/.cache/mesa_shader_cache_db/part0/data": "12345",
  "/home/me/.cache/mesa_shader_cache_db/marker": "1",
  "/home/me/.cache/mesa_shader_cache": null,
  "/home/me/.cache/nvidia/GLCache/a/b": "123",
  "/home/me/.nv/GLCache/c": "1234",
  "/elsewhere/mesa_shader_cache_sf/x": "12",
});
const MESA = "llvmpipe: Mesa 25.0.7 (LLVM 15.0.6)";
const NVIDIA = "NVIDIA: 580.159.04";
const cacheOf = (driver: string, env: Readonly<Record<string, string>> = {}) =>
  shaderCache(driver, { root, env: { HOME: "/home/me", ...env } });

test("Mesa's cache is all its folders that there are, with the bytes in them", () => {
  expect(cacheOf(MESA)).toEqual({
    keeper: "Mesa",
    isEnabled: true,
    folders: [
      { path: "/home/me/.cache/mesa_shader_cache", bytes: 0 },
      { path: "/home/me/.cache/mesa_shader_cache_db", bytes: 6 },
    ],
  });
  const moved = [{ path: "/elsewhere/mesa_shader_cache_sf", bytes: 2 }];
  expect(cacheOf(MESA, { XDG_CACHE_HOME: "/elsewhere" })?.folders).toEqual(moved);
  expect(cacheOf(MESA, { XDG_CACHE_HOME: "/x", MESA_SHADER_CACHE_DIR: "/elsewhere" })?.folders).toEqual(
    moved,
  );
  expect(cacheOf(MESA, { MESA_SHADER_CACHE_DISABLE: "true" })?.isEnabled).toBe(false);
});

test("NVIDIA's cache is where its driver, or an older one, keeps it", () => {
  expect(cacheOf(NVIDIA)).toEqual({
    keeper: "NVIDIA",
    isEnabled: true,
    folders: [
      { path: "/home/me/.cache/nvidia/GLCache", bytes: 3 },
      { path: "/home/me/.nv/GLCache", bytes: 4 },
    ],
  });
  expect(cacheOf(NVIDIA, { __GL_SHADER_DISK_CACHE_PATH: "/home/me/.nv" })?.folders)
    .toEqual([{ path: "/home/me/.nv", bytes: 4 }]);
  expect(cacheOf(NVIDIA, { __GL_SHADER_DISK_CACHE: "0" })?.isEnabled).toBe(false);
});

test("the cache of another driver is not known", () => {
  expect(cacheOf("SwiftShader driver-5.0.0")).toBeUndefined();
});
