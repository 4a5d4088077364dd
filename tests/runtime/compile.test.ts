import { describe, expect, test } from "bun:test";
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { copyBytes } from "../../src/kernels/copy/copy.ts";
import { candidates, type KernelShape } from "../../src/kernels/index.ts";
import { fmaPeak, subgroupMatrixPeak } from "../../src/kernels/peak/peak.ts";
import { STANDARD_ATTENTION } from "../../src/kernels/standard_attention/standard_attention.ts";
import { type Capabilities, openDevice } from "../../src/runtime/device.ts";
import { ShaderError } from "../../src/runtime/errors.ts";
import {
  type Elem,
  type Kernel,
  type Op,
  renderHeader,
  type ShaderFile,
  supports,
} from "../../src/runtime/kernel.ts";

/** Dawn's null backend validates everything and runs nothing: shaders compile on machines without a GPU. */
const gpu = await openDevice({ nullBackend: true });

const MODELS = {
  "gpt2": { width: 768, heads: 12, headDim: 64 },
  "gpt2-xl": { width: 1600, heads: 25, headDim: 64 },
  "classics": { width: 192, heads: 3, headDim: 64 },
  "odd heads of 6": { width: 30, heads: 5, headDim: 6 },
  "one head of 1": { width: 1, heads: 1, headDim: 1 },
  "heads of 80": { width: 240, heads: 3, headDim: 80 },
  "heads of 128": { width: 1024, heads: 8, headDim: 128 },
  "a head of 512": { width: 512, heads: 1, headDim: 512 },
} as const;

// Kernels of different variants stand in one list; each comes with its own variants.
// deno-lint-ignore no-explicit-any
type AnyKernel = Kernel<any, any>;

interface KernelVariant {
  readonly role: string;
  readonly kernel: AnyKernel;
  readonly variant: object;
}

function variantsOf(model: { width: number; heads: number; headDim: number }): KernelVariant[] {
  const { width, heads, headDim } = model;
  const shapes = (["f32", "f16"] as Elem[]).flatMap((elem) =>
    [true, false].map((unroll): KernelShape => ({
      elem,
      width,
      heads,
      headDim4: Math.ceil(headDim / 4),
      inner: 16 * Math.ceil(width / 4),
      sequences: unroll ? 8 : 1,
      selectableBlocks: unroll ? 1025 : 0,
      unroll,
    }))
  );
  const inModels = shapes
    .flatMap((shape) => Object.entries(candidates(shape)) as [string, readonly Op<never>[]][])
    .flatMap(([role, ops]) => ops.map(({ kernel, variant }) => ({ role, kernel, variant })));
  const inBenchmarks = shapes.flatMap(({ elem, unroll, headDim4 }): KernelVariant[] => [
    ...STANDARD_ATTENTION.map((kernel) => ({
      role: "standard attention",
      kernel,
      variant: { elem, heads, headDim4, unroll },
    })),
    { role: "copy", kernel: copyBytes, variant: {} },
    { role: "peak", kernel: fmaPeak, variant: {} },
    { role: "peak", kernel: subgroupMatrixPeak, variant: {} },
  ]);
  return [...inModels, ...inBenchmarks];
}

/** The null device as if its subgroups had the lanes that a variant needs: compiling does not depend on them. */
function capsFor(kernel: AnyKernel, variant: object): Capabilities {
  const { subgroup: lanes, subgroupMatrix } = kernel.header(variant);
  if (subgroupMatrix) return { ...gpu.caps, subgroupMatrix: true };
  return lanes === undefined ? gpu.caps : { ...gpu.caps, subgroupMinSize: lanes, subgroupMaxSize: lanes };
}

const everyVariant = Object.values(MODELS).flatMap(variantsOf);
const everyKernel = [...new Set(everyVariant.map(({ kernel }) => kernel))];

function body(kernel: AnyKernel): string {
  return kernel.sources.map((source) => source.text.replace(/\/\/.*$/gm, "")).join("");
}

/** Value of a WGSL expression of unsigned constants: names, numbers, + - * / and parentheses. */
function evaluate(expression: string, consts: ReadonlyMap<string, string>): number {
  const tokens = expression.match(/\w+|[-+*/()]/g) ?? [];
  let next = 0;
  const operand = (): number => {
    const token = tokens[next++]!;
    if (token === "(") {
      const value = sum();
      next++; // the closing parenthesis
      return value;
    }
    if (/^\d+u?$/.test(token)) return parseInt(token);
    const meaning = consts.get(token);
    if (meaning === undefined) throw new Error(`${token} in "${expression}" is not a constant`);
    return evaluate(meaning, consts);
  };
  const product = (): number => {
    let value = operand();
    while (tokens[next] === "*" || tokens[next] === "/") {
      value = tokens[next++] === "*" ? value * operand() : Math.floor(value / operand());
    }
    return value;
  };
  const sum = (): number => {
    let value = product();
    while (tokens[next] === "+" || tokens[next] === "-") {
      value = tokens[next++] === "+" ? value + product() : value - product();
    }
    return value;
  };
  return sum();
}

/** The header's constants and those that the body derives from them, unevaluated. */
function constsOf(kernel: AnyKernel, variant: object): Map<string, string> {
  const text = renderHeader(kernel, variant) + body(kernel);
  return new Map(
    [...text.matchAll(/^const (\w+)(?:\s*:\s*u32)?\s*=\s*([^;]+);/gm)].map((m) => [m[1]!, m[2]!]),
  );
}

const BYTES_OF: Readonly<Record<string, number>> = {
  f32: 4,
  u32: 4,
  "atomic<u32>": 4,
  vec2f: 8,
  vec4f: 16,
  vec4u: 16,
  f16: 2,
};

/** Workgroup memory that the text declares, each variable rounded up to 16 bytes as Dawn counts it. */
function declaredWorkgroupBytes(kernel: AnyKernel, variant: object): number {
  const consts = constsOf(kernel, variant);
  const { aliases } = kernel.header(variant);
  const text = body(kernel);
  let total = 0;
  for (
    const [, type, element, count] of text.matchAll(/var<workgroup>\s*\w+\s*:\s*(array<(.+),(.+)>|\w+);/g)
  ) {
    const name = (element ?? type)!.trim();
    const vector = /^vec4<(\w+)>$/.exec(name)?.[1];
    const bytes = vector ? 4 * BYTES_OF[aliases[vector] ?? vector]! : BYTES_OF[aliases[name] ?? name];
    if (bytes === undefined) throw new Error(`${kernel.name} declares workgroup memory of type ${name}`);
    total += Math.ceil(bytes * (count ? evaluate(count, consts) : 1) / 16) * 16;
  }
  expect(text.match(/var<workgroup>/g)?.length ?? 0).toBe(
    text.match(/var<workgroup>\s*\w+\s*:[^;]+;/g)?.length ?? 0,
  );
  return total;
}

const TOO_NARROW =
  /The x-dimension of workgroup_size \(\d+\) must be a multiple of the device maxSubgroupSize/;

/**
 * Subgroups of the null device have up to 128 lanes, and it wants matrices in workgroups of a multiple of that. This is
 * the last thing that it checks: the text has passed then.
 */
function isTooNarrow(kernel: AnyKernel, variant: object): boolean {
  const { subgroupMatrix = false } = kernel.header(variant);
  return subgroupMatrix && kernel.workgroupInvocations(variant) % 128 !== 0;
}

describe("variants on the null backend", () => {
  for (const [name, model] of Object.entries(MODELS)) {
    test(`${name}: what supports() accepts compiles, what it refuses does not`, async () => {
      const problems: string[] = [];
      await Promise.all(
        variantsOf(model).map(async ({ role, kernel, variant }) => {
          const verdict = supports(kernel, variant, capsFor(kernel, variant));
          const error = await gpu.pipelines.prepare(kernel, variant).then(() => undefined, (e: unknown) => e);
          if (isTooNarrow(kernel, variant)) {
            if (!TOO_NARROW.test(String(error))) problems.push(`${role}: compiling says ${error}`);
            return;
          }
          if ((verdict === true) === (error === undefined)) return;
          problems.push(
            `${role} ${JSON.stringify(variant)}: supports() says ${verdict}, compiling says ${error}`,
          );
        }),
      );
      expect(problems).toEqual([]);
    });
    test(`${name}: each role has a variant for a device with the default limits and no subgroups`, () => {
      const caps = { ...gpu.caps, subgroupMinSize: 0, subgroupMaxSize: 0 };
      const variants = variantsOf(model);
      const roles = (of: KernelVariant[]) => [...new Set(of.map(({ role }) => role))];
      expect(roles(variants.filter((v) => supports(v.kernel, v.variant, caps) === true))).toEqual(
        roles(variants),
      );
    });
  }
});

test("kernels for tensor cores are valid on the null backend, where workgroup memory alone may be too small", async () => {
  const matrix = everyVariant.filter(({ kernel, variant }) => kernel.header(variant).subgroupMatrix);
  const names = new Set(matrix.map(({ kernel }) => kernel.name));
  expect([...names].sort()).toEqual([
    "flash_attention/packed_subgroup_matrix",
    "flash_attention/sparse_subgroup_matrix",
    "flash_attention/subgroup_matrix",
    "matmul/subgroup_matrix",
    "peak/subgroup_matrix",
  ]);
  for (const { kernel, variant } of matrix) {
    const error: unknown = await gpu.pipelines.prepare(kernel, variant).then(
      () => undefined,
      (e: unknown) => e,
    );
    if (kernel === subgroupMatrixPeak) expect(error).toBeUndefined(); // it has no workgroup memory
    else if (isTooNarrow(kernel, variant)) expect(String(error)).toMatch(TOO_NARROW);
    // The module has passed validation, and so has the entry point: this is the last thing that is checked.
    else expect(String(error)).toMatch(/The total use of workgroup storage \(\d+ bytes\) is larger than/);
  }
});

describe("descriptors", () => {
  test("bindings are those of the text, in order, with the same access", () => {
    for (const kernel of everyKernel) {
      const declared = [
        ...body(kernel).matchAll(
          /@group\((\d+)\)\s*@binding\((\d+)\)\s*var<storage,\s*(\w+)>\s*(\w+)/g,
        ),
      ].map(([, group, binding, access, name]) => `${group}.${binding} ${name} ${access}`);
      const described = Object.entries(kernel.bindings).map(([name, access], i) =>
        `0.${i} ${name} ${access}`
      );
      expect([kernel.name, ...declared.sort()]).toEqual([kernel.name, ...described.sort()]);
    }
  });
  test("there are at most sixteen parameters", () => {
    for (const kernel of everyKernel) expect(Object.keys(kernel.params).length).toBeLessThanOrEqual(16);
  });
  test("workgroupBytes is what the text declares", () => {
    for (const { kernel, variant } of everyVariant) {
      expect([kernel.name, kernel.workgroupBytes(variant)])
        .toEqual([kernel.name, declaredWorkgroupBytes(kernel, variant)]);
    }
  });
  test("workgroupInvocations is what the text declares", () => {
    for (const { kernel, variant } of everyVariant) {
      const size = /@workgroup_size\(([^@{]+)\)\s*fn/.exec(body(kernel))![1]!;
      const declared = size.split(",").map((n) => evaluate(n, constsOf(kernel, variant))).reduce((a, b) =>
        a * b
      );
      expect([kernel.name, kernel.workgroupInvocations(variant)]).toEqual([kernel.name, declared]);
    }
  });
  test("every file ends with a line break: the positions of errors are counted in lines", () => {
    for (const kernel of everyKernel) {
      for (const { file, text } of kernel.sources) expect([file, text.endsWith("\n")]).toEqual([file, true]);
    }
  });
  test("a kernel's name is the folder of its last own file", () => {
    for (const kernel of everyKernel) {
      const folder = kernel.name.split("/")[0]!;
      expect(kernel.sources.some(({ file }) => file.startsWith(`${folder}/`))).toBe(true);
    }
  });
});

/** `file:line name` of each `var name: T;` in the body of a loop: docs/decisions/0004 says what they do. */
function uninitialisedInLoops({ file, text }: ShaderFile): string[] {
  const code = text.replace(/\/\*[^]*?\*\/|\/\/.*$/gm, (comment) => comment.replace(/[^\n]/g, " "));
  const found: string[] = [];
  /** Of each block that is open, whether it is a loop's. */
  const blocks: boolean[] = [];
  let isLoopNext = false;
  const declaration = /\bvar\b(?:\s*<\s*function\s*>)?\s*(\w+)\s*:[^=;]*;/;
  for (const match of code.matchAll(new RegExp(`\\b(?:for|while|loop)\\b|[{}]|${declaration.source}`, "g"))) {
    const [token, name] = match;
    if (token === "{") {
      blocks.push(isLoopNext);
      isLoopNext = false;
    } else if (token === "}") blocks.pop();
    else if (name === undefined) isLoopNext = true;
    else if (blocks.includes(true)) {
      found.push(`${file}:${code.slice(0, match.index).split("\n").length} ${name}`);
    }
  }
  return found;
}

describe("variables in loops", () => {
  const src = join(import.meta.dir, "../../src");
  const files = readdirSync(src, { recursive: true, encoding: "utf8" })
    .filter((path) => path.endsWith(".wgsl"))
    .map((path): ShaderFile => ({ file: path, text: readFileSync(join(src, path), "utf8") }));

  test("have an initial value in every shader", () => {
    expect(files.length).toBeGreaterThan(10);
    expect(files.flatMap(uninitialisedInLoops)).toEqual([]);
  });
  test("are found without one in each kind of loop, and at any depth", () => {
    const text = `
      var<workgroup> tile: array<f32, 4>;
      fn main() {
        var before: f32; // for (;;) { var comment: f32; }
        for (var i = 0u; i < trips(4u); i++) {
          var a: array<vec4f, 2>;
          var fine = vec4f(); var typed: f32 = 0.0;
          if (i == 0u) { { var<function> b: f32; } }
        }
        while (true) { for (var c: u32; c < 2u; c++) {} }
        loop { continuing { var d: f32; } }
        var after: vec4f;
      }`;
    expect(uninitialisedInLoops({ file: "f", text })).toEqual(["f:6 a", "f:8 b", "f:10 c", "f:11 d"]);
  });
  test("would have been found where the rule comes from", () => {
    const subgroup = files.find(({ file }) => file.endsWith(join("flash_attention", "subgroup.wgsl")))!;
    const text = subgroup.text.replace("var p0 = Scores();", "var p0: Scores;");
    const line = subgroup.text.split("\n").findIndex((l) => l.includes("var p0")) + 1;
    expect(uninitialisedInLoops({ ...subgroup, text })).toEqual([`${subgroup.file}:${line} p0`]);
  });
});

describe("a shader that does not compile", () => {
  const valid = "// fine\nfn twice(x: f32) -> f32 {\n    return 2.0 * x;\n}\n";
  const main = (statement: string) =>
    `@group(0) @binding(0) var<storage, read_write> out: array<f32>;\n\n@compute @workgroup_size(1)\nfn main() {\n` +
    `    ${statement}\n}\n`;

  function kernelOf(sources: AnyKernel["sources"]): AnyKernel {
    return {
      name: "broken",
      sources,
      bindings: { out: "read_write" },
      params: { value: "f32" },
      header: () => ({ aliases: { elem: "f32" }, consts: { SIZE: 4 } }),
      workgroupBytes: () => 0,
      workgroupInvocations: () => 1,
      values: () => ({ value: 1 }),
      grid: () => [1, 1, 1],
      work: () => ({ bytes: 0, flops: 0 }),
    };
  }

  async function errorOf(kernel: AnyKernel): Promise<ShaderError> {
    const error: unknown = await gpu.pipelines.prepare(kernel, {}).catch((e: unknown) => e);
    expect(error).toBeInstanceOf(ShaderError);
    return error as ShaderError;
  }

  test("a valid kernel of the same form compiles", async () => {
    const sources = [{ file: "a.wgsl", text: main("out[0] = twice(params.value);") }, {
      file: "b.wgsl",
      text: valid,
    }];
    await gpu.pipelines.prepare({ ...kernelOf(sources), name: "valid" }, {});
  });
  test("in the first file: the message has its name, line and column, the detail the header", async () => {
    const error = await errorOf(kernelOf([
      { file: "broken/first.wgsl", text: main("out[0] = thrice(params.value);") },
      { file: "broken/second.wgsl", text: valid },
    ]));
    expect(error.message).toContain("broken/first.wgsl:5:14 ");
    expect(error.message).toContain("thrice");
    expect(error.detail).toContain("const SIZE = 4u;");
    expect(error.hint).toBeUndefined();
  });
  test("in a later file: lines count from that file's first", async () => {
    const error = await errorOf({
      ...kernelOf([
        { file: "broken/first.wgsl", text: valid },
        { file: "broken/second.wgsl", text: main("out[0] = twice(1u);") },
      ]),
      name: "broken/later",
    });
    expect(error.message).toContain("broken/second.wgsl:5:");
    expect(error.message).not.toContain("first.wgsl");
  });
  test("at the end of the text: in the last file, behind its last line", async () => {
    const error = await errorOf({
      ...kernelOf([
        { file: "broken/first.wgsl", text: main("out[0] = twice(params.value);") },
        { file: "broken/second.wgsl", text: valid.replace("}", "") },
      ]),
      name: "broken/end",
    });
    expect(error.message).toContain("broken/second.wgsl:4:");
  });
  test("a missing entry point names the kernel and the device", async () => {
    const error = await errorOf({
      ...kernelOf([{ file: "broken/none.wgsl", text: valid }]),
      name: "broken/none",
    });
    expect(error.message).toContain("broken/none does not compile on null-backend");
  });
  test("more than sixteen parameters are refused by name", async () => {
    const params = Object.fromEntries(Array.from({ length: 17 }, (_, i) => [`p${i}`, "u32" as const]));
    const kernel = { ...kernelOf([{ file: "many.wgsl", text: valid }]), name: "many", params };
    const error: unknown = await gpu.pipelines.prepare(kernel, {}).catch((e: unknown) => e);
    expect(String(error)).toContain("many has more than 16 parameters");
  });
});
