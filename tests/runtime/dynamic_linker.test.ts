/** Libraries of made-up machines, and one of this machine, found as ld.so(8) finds them. */
import { afterAll, describe, expect, test } from "bun:test";
import { join } from "node:path";
import { DynamicLinker } from "../../src/runtime/dynamic_linker.ts";
import { Host } from "../../src/runtime/host.ts";
import { temporaryFolder } from "../support/checkpoint.ts";
import { library, linkerCache, type MadeUpFile, writeMachine } from "../support/machine.ts";

const folder = temporaryFolder();
afterAll(folder.remove);
let machines = 0;

function linker(files: Readonly<Record<string, MadeUpFile>>, env: Readonly<Record<string, string>> = {}) {
  const root = writeMachine(join(folder.path, String(machines++)), files);
  return new DynamicLinker(new Host({ root, env }));
}

describe("a library is looked for", () => {
  const everywhere = {
    "/first/liba.so": library(),
    "/second/liba.so": library(),
    "/opt/cached/liba.so": library(),
    "/etc/ld.so.cache": linkerCache([["libz.so", "/opt/cached/libz.so"], ["liba.so", "/opt/cached/liba.so"]]),
    "/usr/lib/liba.so": library(),
  };

  test("in LD_LIBRARY_PATH, then where the cache says, then in the default folders", () => {
    const { "/etc/ld.so.cache": _, ...uncached } = everywhere;
    const { "/opt/cached/liba.so": __, ...stale } = everywhere;
    expect(linker(everywhere, { LD_LIBRARY_PATH: "/none:/second:/first" }).find("liba.so")?.path)
      .toBe("/second/liba.so");
    expect(linker(everywhere).find("liba.so")?.path).toBe("/opt/cached/liba.so");
    expect(linker(stale).find("liba.so")?.path).toBe("/usr/lib/liba.so");
    expect(linker(uncached).find("liba.so")?.path).toBe("/usr/lib/liba.so");
    expect(linker(uncached).find("libb.so")).toBeUndefined();
  });
  test("at its path where it has one, and nowhere else", () => {
    expect(linker(everywhere).find("/first/liba.so")).toEqual({ path: "/first/liba.so", problem: undefined });
    expect(linker(everywhere).find("/none/liba.so")).toBeUndefined();
  });
  test("past those for other processors, but no further than to a damaged one", () => {
    const files = { ...everywhere, "/first/liba.so": library({ isForeign: true }) };
    const env = { LD_LIBRARY_PATH: "/first:/second" };
    expect(linker(files, env).find("liba.so")?.path).toBe("/second/liba.so");
    expect(linker({ ...files, "/first/liba.so": "" }, env).find("liba.so"))
      .toEqual({ path: "/first/liba.so", problem: "the file is too short" });
    expect(linker({ ...files, "/first/liba.so": "x".repeat(64) }, env).find("liba.so")?.problem)
      .toBe("it is not an ELF file");
  });
  test("in a cache behind one of the old format, and in what there is of a damaged one", () => {
    const cache = everywhere["/etc/ld.so.cache"];
    const old = new TextEncoder().encode("ld.so-1.7.0\0" + "\0".repeat(20));
    const joined = { ...everywhere, "/etc/ld.so.cache": new Uint8Array([...old, ...cache]) };
    expect(linker(joined).find("liba.so")?.path).toBe("/opt/cached/liba.so");
    const cutOff = { ...everywhere, "/etc/ld.so.cache": cache.subarray(0, cache.length - 4) };
    expect(linker(cutOff).find("liba.so")?.path).toBe("/usr/lib/liba.so");
  });
});

describe("what a library needs", () => {
  const needy = library({ needed: ["libb.so.1", "libc.so.6"] });

  test("is named if it is missing or damaged", () => {
    const files = { "/lib/liba.so": needy, "/lib/libb.so.1": library() };
    expect(linker(files).find("liba.so")?.problem).toBe("it needs libc.so.6, which is missing");
    expect(linker({ ...files, "/lib/libc.so.6": "" }).find("liba.so")?.problem)
      .toBe("it needs libc.so.6, which is missing");
    expect(linker({ ...files, "/lib/libc.so.6": library() }).find("liba.so")?.problem).toBeUndefined();
  });
  test("is also looked for in its RUNPATH", () => {
    const own = library({ needed: ["libb.so.1"], runpath: "/none:$ORIGIN/own" });
    expect(linker({ "/opt/liba.so": own, "/opt/own/libb.so.1": library() }).find("/opt/liba.so")?.problem)
      .toBeUndefined();
    expect(linker({ "/opt/liba.so": own, "/opt/libb.so.1": library() }).find("/opt/liba.so")?.problem)
      .toBe("it needs libb.so.1, which is missing");
  });
  test("of a file that ends too soon is not guessed at", () => {
    expect(linker({ "/lib/liba.so": needy.subarray(0, 80) }).find("liba.so"))
      .toEqual({ path: "/lib/liba.so", problem: undefined });
  });
  test("is all here of the C library that runs this test", () => {
    const libc = new DynamicLinker(new Host()).find("libc.so.6");
    expect(libc).toEqual({ path: expect.stringMatching(/libc\.so\.6$/), problem: undefined });
  });
});
