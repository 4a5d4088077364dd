/** `bench` as users run it, on a tiny model and short contexts for software Vulkan's sake; and `--kernel`. */
import { afterAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { join } from "node:path";
import type { ProfileReport } from "../../src/cli/profile.ts";
import { chooseKernels, explainChoices, type KernelShape } from "../../src/kernels/index.ts";
import { openDevice } from "../../src/runtime/device.ts";
import { DoesNotFitError, UsageError } from "../../src/runtime/errors.ts";
import { temporaryFolder } from "../support/checkpoint.ts";
import {
  denoTest,
  expectFailure,
  RUN_TIMEOUT_MS,
  runCli,
  type RunOptions,
  withoutNotices,
  writeTinyModel,
} from "../support/cli.ts";

setDefaultTimeout(2 * RUN_TIMEOUT_MS);

interface Row {
  readonly phase: string;
  readonly kernel?: string;
  readonly variant: string;
  readonly context: number;
  readonly dtype: string;
  readonly ms: { min: number; median: number; max: number } | null;
  readonly tokens_per_s: number | null;
  readonly tflops: number | null;
  readonly gb_per_s: number | null;
  readonly peak_bytes: number | null;
  readonly checked_against?: string;
  readonly largest_difference?: number;
  readonly tolerance?: number;
  readonly error?: string;
  readonly needed_bytes?: number;
}

interface Report {
  readonly model: string;
  readonly runs: number;
  readonly copy_gb_per_s: number;
  readonly peak_tflops: number | null;
  readonly peak_unit: string;
  readonly rows: readonly Row[];
}

const folder = temporaryFolder();
afterAll(folder.remove);
/** 64 positions, 2 layers, 2 heads of 4 columns. */
const model = writeTinyModel(join(folder.path, "tiny")).dir;
const base = ["bench", "-m", model, "--dtype", "f32", "--runs", "3"];

async function bench(args: readonly string[], options?: RunOptions, wantedCode = 0): Promise<Report> {
  const { code, stdout, notes } = await runCli([...args, "--json"], options);
  expect({ code, notes: withoutNotices(notes) }).toEqual({ code: wantedCode, notes: "" });
  return JSON.parse(stdout);
}

/** What does not depend on how fast it was. */
function named({ rows }: Report) {
  return rows.map(({ phase, variant, context }) => `${phase} ${variant} ${context}`);
}

/** Numbers that any row with a time has. */
function expectSane(row: Row): void {
  const { min, median, max } = row.ms!;
  expect(min).toBeGreaterThan(0);
  expect(median).toBeGreaterThanOrEqual(min);
  expect(max).toBeGreaterThanOrEqual(median);
  const tokens = row.phase === "decode" ? 1 : row.context;
  expect(row.tokens_per_s).toBeCloseTo(1000 * tokens / median, 6);
  expect(row.tflops).toBeGreaterThan(0);
  expect(row.peak_bytes).toBeGreaterThan(0);
}

describe("bench", () => {
  test("--json has a row for each phase, variant and context, checked and with sane numbers", async () => {
    const report = await bench([
      ...base,
      ...["--phases", "attention,gemm,decode,prefill", "--contexts", "130,64"],
      ...["--attention", "standard,flash"],
    ]);
    expect(Object.keys(report)).toEqual([
      ...[
        "adapter",
        "driver",
        "runtime",
        "version",
        "model",
        "runs",
        "kernel_clock",
        "copy_gb_per_s",
        "peak_tflops",
        "peak_unit",
        "heads",
        "rows",
      ],
    ]);
    // Tensor cores are for f16 alone.
    expect(report).toMatchObject({ model, runs: 3, peak_unit: "fma" });
    expect(report.copy_gb_per_s).toBeGreaterThan(0);
    expect(report.peak_tflops).toBeGreaterThan(0);
    expect(named(report)).toEqual([
      ...["attention standard 64", "attention flash 64", "attention standard 130", "attention flash 130"],
      ...[64, 130].flatMap((n) =>
        ["c_attn", "c_proj", "c_fc", "mlp_c_proj"].map((name) => `gemm ${name} ${n}`)
      ),
      // Beyond the model's positions, too.
      ...["decode flash 64", "decode flash 130", "prefill flash 64", "prefill flash 130"],
    ]);
    for (const row of report.rows) {
      expect(row.dtype).toBe("f32");
      expectSane(row);
      const isKernel = row.phase === "attention" || row.phase === "gemm";
      expect(Object.keys(row)).toEqual([
        ...["phase", "variant", "context", "dtype", ...isKernel ? ["kernel"] : [], "ms", "tokens_per_s"],
        ...["tflops", "gb_per_s", "peak_bytes"],
        ...isKernel ? ["checked_against", "largest_difference", "tolerance"] : [],
      ]);
      if (!isKernel) continue;
      expect(row.checked_against).not.toBe(row.kernel);
      expect(row.largest_difference).toBeLessThanOrEqual(row.tolerance!);
    }
    const [standard, flash] = report.rows.filter(({ phase, context }) =>
      phase === "attention" && context === 130
    );
    expect(standard).toMatchObject({ kernel: "standard_attention", checked_against: flash!.kernel });
    // Both hold the same tensors, and one the scores of both heads besides.
    expect(standard!.peak_bytes! - flash!.peak_bytes!).toBe(2 * 130 * 132 * 4);
    // Two products of 4 columns over half the square, for each of two heads.
    const flop = 4 * 2 * 4 * 130 * 131 / 2;
    expect(flash!.tflops).toBeCloseTo(flop / flash!.ms!.median / 1e9, 12);
    const gemm = report.rows.find(({ variant, context }) => variant === "c_fc" && context === 130)!;
    expect(gemm.tflops).toBeCloseTo(2 * 130 * 8 * 32 / gemm.ms!.median / 1e9, 12);
    const bytes = 4 * (130 * 8 + 8 * 32 + 32 + 130 * 32);
    expect(gemm.gb_per_s).toBeCloseTo(bytes / gemm.ms!.median / 1e6, 9);
  });

  test("prints an aligned table, and nothing on stderr with -q", async () => {
    const { code, stdout, notes } = await runCli([
      ...base,
      ...["--phases", "attention,prefill", "--contexts", "64", "--attention", "flash,standard", "-q"],
    ]);
    expect({ code, notes }).toEqual({ code: 0, notes: "" });
    const [title, , header, ...lines] = stdout.split("\n");
    expect(title).toContain(`${model}, 3 runs`);
    const rows = lines.slice(0, lines.indexOf(""));
    expect(rows).toHaveLength(3);
    expect(header).toMatch(
      /^phase +variant +context +type +ms +min to max +tokens\/s +TFLOP\/s +GB\/s +memory/,
    );
    for (const row of rows) {
      expect(row).toMatch(/^(attention +(flash|standard)|prefill +flash) +64 +f32 +[\d.,]+ /);
      expect(row).toMatch(/ [\d.,]+ \([\d.]+ %\) +(-|[\d.,]+ \([\d.]+ %\)) +[\d.]+ [KM]iB/);
      // Numbers end where their titles do.
      const end = header!.indexOf("context") + "context".length;
      expect(row.slice(end - 3, end)).toBe(" 64");
    }
    expect(stdout).toMatch(
      /\npercentages are of .*:\n +a kernel that copies memory: [\d.,]+ GB\/s\n +multiply-adds from registers: [\d.,]+ TFLOP\/s\n/,
    );
    expect(stdout).toContain("\n2 of 3 results agree with another kernel's");
  });

  test("a published shape needs no files, and --kernel is what runs and is checked", async () => {
    const report = await bench([
      ...["bench", "--model-shape", "distilgpt2", "--phases", "attention", "--contexts", "64", "--runs", "1"],
      ...["--dtype", "f32", "--kernel", "attention=flash_attention/register_tiled"],
    ]);
    expect(report).toMatchObject({ model: "distilgpt2, random weights", runs: 1 });
    expect(report.rows).toMatchObject([{
      kernel: "flash_attention/register_tiled",
      checked_against: "flash_attention/tiled",
    }]);
    const { min, median, max } = report.rows[0]!.ms!;
    expect([min, max]).toEqual([median, median]);
  });

  test("scores that do not fit are a row that says what they need, and no failure", async () => {
    const report = await bench([
      ...base,
      ...["--phases", "attention", "--contexts", "64,256k", "--attention", "standard"],
    ]);
    const [fits, tooLong] = report.rows;
    expectSane(fits!);
    const needed = 2 * 2 ** 36 * 4;
    expect(tooLong).toEqual({
      phase: "attention",
      variant: "standard",
      context: 2 ** 18,
      dtype: "f32",
      ms: null,
      tokens_per_s: null,
      tflops: null,
      gb_per_s: null,
      peak_bytes: null,
      error: expect.stringMatching(
        new RegExp(`scores of standard attention need 512 GiB \\(${needed} bytes\\), .* binds at most`),
      ),
      needed_bytes: needed,
    });
  });

  const wrong: readonly (readonly [kernel: string, from: string, to: string, rows: readonly string[]])[] = [
    // Keys of the future, seen, but not by the smallest tile: where there is no other kernel, that is the other one.
    ["flash_attention/tiled", "keys <= vec4u(position)", "keys <= vec4u(position + TILE_KV - 4u)", [
      "flash",
      "standard",
    ]],
    ["standard_attention/softmax", "<= vec4u(row)", "<= vec4u(row + 1u)", ["standard"]],
    ["matmul/tiled", "+ shift", "+ f32(TILE_ROWS) * shift", ["c_attn", "c_proj", "c_fc", "mlp_c_proj"]],
  ];
  for (const [kernel, from, to, variants] of wrong) {
    test(`a wrong result of ${kernel} is a row without a time, and exit code 1`, async () => {
      const report = await bench(
        [
          ...base,
          ...["--phases", "attention,gemm", "--attention", "flash,standard", "--contexts", "64"],
          ...["--runs", "1", "--kernel", "attention=flash_attention/tiled"],
          ...["--kernel", "matmulBias=matmul/tiled", "--kernel", "matmulBiasGelu=matmul/tiled"],
          ...["--kernel", "matmulResidual=matmul/tiled"],
        ],
        {
          preload: join(import.meta.dir, "../support/alter_shader.ts"),
          env: { ALTER_KERNEL: kernel, ALTER_FROM: from, ALTER_TO: to },
        },
        1,
      );
      expect(named(report)).toHaveLength(6);
      for (const row of report.rows) {
        if (!variants.includes(row.variant)) {
          expectSane(row);
          continue;
        }
        expect(row.ms).toBeNull();
        expect(row.largest_difference).toBeGreaterThan(row.tolerance!);
        expect(row.error).toMatch(
          /^\S+ and \S+( \(.+\))? differ by [\d.e+-]+ of a row's largest value, allowed is /,
        );
        expect(row.error).toContain(kernel.split("/")[0]!);
      }
    });
  }

  // Timed kernels are submitted 21 times at least.
  for (
    const { during, done } of [{ during: "peak/fma", done: [] }, { during: "matmul/tiled", done: ["flash"] }]
  ) {
    test(`SIGINT during ${during} ends it with what is done, and exit code 130`, async () => {
      const report = await bench(
        [
          ...[...base, "--phases", "attention,gemm", "--contexts", "64", "--runs", "20"],
          ...["--kernel", "matmulBias=matmul/tiled"],
        ],
        {
          preload: join(import.meta.dir, "../support/interrupt.ts"),
          env: { INTERRUPT_FROM: during, INTERRUPT_AFTER: "10" },
        },
        130,
      );
      expect(report.rows.map(({ variant }) => variant)).toEqual(done);
      report.rows.forEach(expectSane);
      expect(report.copy_gb_per_s).toBeGreaterThan(0);
      expect(report.peak_tflops === null).toBe(during === "peak/fma");
    });
  }

  denoTest("Deno measures the same", async () => {
    const args = [...base, "--phases", "attention,gemm,prefill,decode", "--contexts", "64", "--runs", "1"];
    const report = await bench(args, { runtime: "deno" });
    expect(named(report)).toHaveLength(7);
    report.rows.forEach(expectSane);
  });
});

describe("bench fails", () => {
  test("on a model folder that is not there", async () => {
    expectFailure(await runCli(["bench", "-m", join(folder.path, "none")]), 1, /none/);
  });
});

describe("--kernel", () => {
  const ids = ["--ids", "-", "-n", "4", "--temperature", "0", "--seed", "1", "-q"];
  const generate = ["generate", "-m", model, "--dtype", "f32", ...ids];
  const stdin = JSON.stringify(Array.from({ length: 40 }, (_, i) => i));

  test("runs the named kernels, as the profile shows, with the same text", async () => {
    const plain = await runCli([...generate, "--json"], { stdin });
    const forced = await runCli([
      ...generate,
      "--json",
      "--profile",
      ...["--kernel", "attention=flash_attention/tiled", "--kernel", "matmulBias=matmul/tiled"],
    ], { stdin });
    expect(forced.code).toBe(0);
    const report = JSON.parse(forced.stdout);
    expect(report.tokens).toEqual(JSON.parse(plain.stdout).tokens);
    const kernels = (report.profile as ProfileReport).kernels.map(({ kernel }) => kernel);
    expect(kernels).toContain("flash_attention/tiled");
    expect(kernels).toContain("matmul/tiled");
    expect(kernels).not.toContain("flash_attention/subgroup");
  });

  test("shows in info", async () => {
    const { code, stdout } = await runCli([
      ...["info", "-m", model, "--dtype", "f32", "--json", "--kernel", "attention=flash_attention/tiled"],
    ]);
    expect(code).toBe(0);
    const choice = JSON.parse(stdout).kernels.find(({ role }: { role: string }) => role === "attention");
    expect(choice).toMatchObject({ chosen: { kernel: "flash_attention/tiled" }, rejected: [] });
  });

  const refused: readonly (readonly [name: string, kernel: string, message: RegExp])[] = [
    ["a role that there is not", "attend=flash_attention/tiled", /no role `attend`.*\n\nhint: .*attention,/],
    ["an inherited property", "toString=matmul/tiled", /no role `toString`/],
    [
      "a kernel that there is not",
      "attention=flash_attention/fast",
      /no kernel `flash_attention\/fast` for attention in f32\n\nhint: there is .*flash_attention\/tiled/,
    ],
    ["another role's kernel", "attention=matmul/tiled", /no kernel `matmul\/tiled` for attention/],
  ];
  for (const [name, kernel, message] of refused) {
    test(`refuses ${name}: exit code 2`, async () => {
      expectFailure(await runCli([...generate, "--kernel", kernel], { stdin }), 2, message);
      expectFailure(await runCli([...base, "--kernel", kernel]), 2, message);
    });
  }

  test("refuses a kernel that the device cannot run, and says which it can", async () => {
    const gpu = await openDevice({ nullBackend: true });
    const shape: KernelShape = {
      elem: "f16",
      width: 128,
      heads: 2,
      headDim4: 16,
      inner: 512,
      sequences: 1,
      selectableBlocks: 0,
      unroll: true,
    };
    const caps = { ...gpu.caps, f16: true, subgroupMatrix: false };
    const forced = new Map([["attention", "flash_attention/subgroup_matrix"]]);
    const refusal = (() => {
      try {
        chooseKernels(shape, caps, forced);
      } catch (error) {
        return error;
      }
    })();
    expect(refusal).toBeInstanceOf(DoesNotFitError);
    const { message, hint, exitCode } = refusal as DoesNotFitError;
    expect(message).toMatch(
      /^flash_attention\/subgroup_matrix does not run on .*: it needs subgroup matrices/,
    );
    expect(hint).toMatch(/^for attention there is .*flash_attention\/tiled$/);
    expect(exitCode).toBe(4);
    expect(explainChoices(shape, caps, forced).find(({ role }) => role === "attention")).toMatchObject({
      chosen: undefined,
      rejected: [{ kernel: "flash_attention/subgroup_matrix" }],
    });
    // Tensor cores are for f16 alone.
    expect(() => chooseKernels({ ...shape, elem: "f32" }, caps, forced)).toThrow(UsageError);
    const tiled = new Map([["attention", "flash_attention/tiled"]]);
    expect(chooseKernels(shape, caps, tiled).attention.kernel.name).toBe("flash_attention/tiled");
    gpu.destroy();
  });
});
