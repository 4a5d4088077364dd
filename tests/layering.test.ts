import { describe, expect, test } from "bun:test";
import { readdirSync, readFileSync } from "node:fs";
import { dirname, join, relative, resolve, sep } from "node:path";
import { fileURLToPath } from "node:url";

/** What each layer may import besides itself: arrows point down only. */
const MAY_IMPORT: Readonly<Record<string, readonly string[]>> = {
  cli: ["model", "kvcache", "kernels", "runtime"],
  model: ["kernels", "kvcache", "runtime"],
  kvcache: ["kernels", "runtime"],
  kernels: ["runtime"],
  runtime: [],
};

const SRC = resolve(dirname(fileURLToPath(import.meta.url)), "../src");

/** The TypeScript of src by its path there; declarations for files that are not TypeScript aside. */
const files = new Map(
  readdirSync(SRC, { recursive: true, encoding: "utf8" })
    .filter((path) => path.endsWith(".ts") && !path.endsWith(".d.ts"))
    .map((path) => [path.split(sep).join("/"), readFileSync(join(SRC, path), "utf8")]),
);

function withoutComments(text: string): string {
  return text.replace(/\/\*[^]*?\*\//g, "").replace(/(?<!:)\/\/.*$/gm, "");
}

/** Specifiers of static, dynamic, side-effect and re-exporting imports. */
function importsOf(text: string): string[] {
  const found = withoutComments(text).matchAll(/(?:\bfrom\s*|\bimport\s*\(?\s*)["']([^"']+)["']/g);
  return [...found].map((match) => match[1]!);
}

/** The layer that a file of src imports from, if any: `../runtime/device.ts` in `kernels/index.ts` is `runtime`. */
function importedLayer(file: string, specifier: string): string | undefined {
  if (!specifier.startsWith(".")) return undefined;
  return relative(SRC, resolve(SRC, dirname(file), specifier)).split(sep)[0];
}

describe("layering", () => {
  test("every file belongs to a layer of the table", () => {
    const strays = [...files.keys()].filter((file) => !Object.hasOwn(MAY_IMPORT, file.split("/")[0]!));
    expect(strays).toEqual([]);
    expect(files.size).toBeGreaterThan(20);
  });

  test("layers import only those below them", () => {
    const offences = [...files].flatMap(([file, text]) => {
      const layer = file.split("/")[0]!;
      return importsOf(text)
        .filter((specifier) => {
          const imported = importedLayer(file, specifier);
          return imported !== undefined && imported !== layer && !MAY_IMPORT[layer]?.includes(imported);
        })
        .map((specifier) => `src/${file} imports ${specifier}`);
    });
    expect(offences).toEqual([]);
  });

  test("only runtime/dawn.ts imports webgpu", () => {
    const importers = [...files].filter(([, text]) =>
      importsOf(text).some((s) => /^(npm:)?webgpu\b/.test(s))
    );
    expect(importers.map(([file]) => file)).toEqual(["runtime/dawn.ts"]);
  });

  test("nothing uses what only Bun or only Deno has", () => {
    const offences = [...files].flatMap(([file, text]) =>
      (withoutComments(text).match(/(?<![.\w"'`])(?:Bun|Deno)\s*\??\.\s*\w+|["']bun:\w+["']/g) ?? [])
        .map((use) => `src/${file} uses ${use}`)
    );
    expect(offences).toEqual([]);
  });

  test("the reading of imports sees every form", () => {
    const text = `
      import a from "./a.ts"; import type { B } from "./b.ts";
      import {
        c,
      } from "./c.ts";
      export * from "./d.ts"; import "./e.ts"; const f = await import("./f.ts");
      import g from "./g.wgsl" with { type: "text" }; // import h from "./h.ts"
      /* import i from "./i.ts" */`;
    expect(importsOf(text)).toEqual(
      ["a.ts", "b.ts", "c.ts", "d.ts", "e.ts", "f.ts", "g.wgsl"].map((f) => `./${f}`),
    );
    expect(importedLayer("kernels/matmul/matmul.ts", "../../runtime/kernel.ts")).toBe("runtime");
    expect(importedLayer("kernels/matmul/matmul.ts", "./tiled.wgsl")).toBe("kernels");
    expect(importedLayer("cli/info.ts", "cac")).toBeUndefined();
  });
});
