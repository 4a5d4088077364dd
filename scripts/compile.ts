/**
 * Makes one executable of longform, which needs no other file: Bun, Dawn's native addon, the program with its shaders,
 * the thread that encodes texts and the embedded model are inside (docs/binary.md).
 *
 *     bun scripts/compile.ts [--target bun-linux-x64|bun-linux-arm64|bun-darwin-x64|bun-darwin-arm64] [--out FILE]
 *
 * It is made for this machine and of the Bun that runs this; for another machine, Bun fetches that machine's from the
 * npm registry. FILE is dist/longform-TARGET unless given.
 */
import { copyFile, mkdir, mkdtemp, readFile, rename, rm, stat } from "node:fs/promises";
import { isBuiltin } from "node:module";
import { basename, dirname, join, resolve } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import type { BuildMetafile, BunPlugin } from "bun";

const ROOT = fileURLToPath(new URL("..", import.meta.url).href);
const MODEL = "weights/classics-16k";
const MODEL_FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"];

/**
 * Where npm `webgpu` has Dawn for each target. Not for Windows, where Dawn loads two libraries that lie beside it, and not
 * for musl.
 */
const ADDONS = {
  "bun-linux-x64": "linux-x64",
  "bun-linux-arm64": "linux-arm64",
  "bun-darwin-x64": "darwin-universal",
  "bun-darwin-arm64": "darwin-universal",
} as const;

type Target = keyof typeof ADDONS;

/** The target that this machine is. */
const HOST = `bun-${process.platform}-${process.arch}`;

function isTarget(name: string): name is Target {
  return Object.hasOwn(ADDONS, name);
}

/** Replaces what occurs exactly once. @throws if it does not */
function replaceOnce(text: string, from: string, to: string, path: string): string {
  if (text.split(from).length !== 2) {
    throw new Error(`${path} is not as expected, \`${from}\` is not there once: was npm webgpu updated?`);
  }
  return text.replace(from, to);
}

/** npm `webgpu` puts the addon's path together when it runs; a bundler follows only a path that is written out. */
function dawnPlugin(target: Target): BunPlugin {
  return {
    name: "dawn",
    setup(build) {
      build.onLoad({ filter: /[\\/]node_modules[\\/]webgpu[\\/]index\.js$/ }, async ({ path }) => {
        const text = await readFile(path, "utf8");
        const bundled = replaceOnce(text, "const require = createRequire(import.meta.url);\n", "", path);
        const addon = `require("./dist/${ADDONS[target]}/dawn.node")`;
        return { contents: replaceOnce(bundled, "require(dawnNodePath)", addon, path), loader: "js" };
      });
    },
  };
}

/** Vega draws PNGs with it where it is installed, which it is not here. */
const ABSENT = "canvas";

/** What is imported if it is there: the executable would look for it from the folder where it is run. */
const absentPlugin: BunPlugin = {
  name: "absent",
  setup(build) {
    build.onResolve({ filter: new RegExp(`^${ABSENT}$`) }, ({ path }) => ({ path, namespace: "absent" }));
    build.onLoad({ filter: /.*/, namespace: "absent" }, () => ({ contents: "export {};", loader: "js" }));
  },
};

/** @throws if a package stays outside: whoever owns the folder where the executable is run could put one there */
function requireAllInside({ inputs }: BuildMetafile): void {
  for (const [file, { imports }] of Object.entries(inputs)) {
    // Relative paths are what a package offers and nobody uses.
    const outside = imports.find(({ path, external }) =>
      external && !path.startsWith(".") && !isBuiltin(path)
    );
    if (outside) throw new Error(`${file} imports ${outside.path}, which is not in the executable`);
  }
}

/** Writes the executable; nothing is there, or what was there before, until it is whole. @returns its size in bytes */
async function compile(target: Target, out: string): Promise<number> {
  await mkdir(dirname(out), { recursive: true });
  const stage = await mkdtemp(join(dirname(out), ".compile-"));
  try {
    // A folder becomes part of an executable by its own name and with all that it holds; `weights` may hold other models.
    await mkdir(join(stage, MODEL), { recursive: true });
    for (const name of MODEL_FILES) await copyFile(join(ROOT, MODEL, name), join(stage, MODEL, name));
    const outfile = join(stage, basename(out));
    const { success, logs, metafile } = await Bun.build({
      entrypoints: [join(ROOT, "main.ts"), join(ROOT, "src/model/encoding_worker.ts")],
      root: ROOT,
      throw: false,
      target: "bun",
      format: "esm",
      // Names stay: those of errors tell a user, and another thread, what has happened.
      minify: { whitespace: true, syntax: true, identifiers: false },
      define: { LONGFORM_EXECUTABLE: "true" },
      // Starts in a third of the time.
      bytecode: true,
      // Stack traces then name the sources' files and lines.
      sourcemap: "inline",
      metafile: true,
      plugins: [dawnPlugin(target), absentPlugin],
      compile: {
        target,
        outfile,
        assets: [join(stage, dirname(MODEL)), join(ROOT, "package.json")],
        // What lies in the folder where it is run is none of its business; bunfig.toml could make it run any code.
        autoloadBunfig: false,
        autoloadDotenv: false,
        autoloadPackageJson: false,
        autoloadTsconfig: false,
      },
    });
    if (!success) throw new Error(logs.map(({ message }) => message).join("\n"));
    requireAllInside(metafile!);
    await rename(outfile, out);
  } finally {
    await rm(stage, { recursive: true });
  }
  return (await stat(out)).size;
}

function requested(): { target: Target; out: string } {
  const { values } = parseArgs({ options: { target: { type: "string" }, out: { type: "string" } } });
  const target = values.target ?? HOST;
  if (!isTarget(target)) {
    throw new Error(`There is no target ${target}, the targets are ${Object.keys(ADDONS).join(", ")}`);
  }
  return { target, out: resolve(values.out ?? join(ROOT, `dist/longform-${target.slice("bun-".length)}`)) };
}

/** Says what is wrong and what may help, and ends. */
function fail(error: unknown, exitCode: number, help: string): never {
  process.stderr.write(`error: ${error instanceof Error ? error.message : error}\n${help}`);
  process.exit(exitCode);
}

let request: ReturnType<typeof requested>;
try {
  request = requested();
} catch (error) {
  fail(error, 2, `usage: compile.ts [--target ${Object.keys(ADDONS).join("|")}] [--out FILE]\n`);
}
const { target, out } = request;
try {
  process.chdir(ROOT); // source maps name sources from here
  const bytes = await compile(target, out);
  process.stderr.write(`wrote ${out}: ${(bytes / 1e6).toFixed(1)} MB for ${target}\n`);
} catch (error) {
  const help =
    "\nhint: Bun for another machine comes from the npm registry; on that machine this needs no network\n";
  fail(error, 1, target === HOST ? "" : help);
}
