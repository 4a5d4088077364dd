import { afterAll, describe, expect, test } from "bun:test";
import { mkdirSync, rmSync, truncateSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { formatInspect, inspectModel } from "../../src/cli/inspect.ts";
import { ModelError } from "../../src/runtime/errors.ts";
import { temporaryFolder, type TinyOptions, writeTinyCheckpoint } from "../support/checkpoint.ts";

const folder = temporaryFolder();
afterAll(folder.remove);
let folders = 0;

function tiny(options: TinyOptions = {}): string {
  return writeTinyCheckpoint(join(folder.path, String(folders++)), options).dir;
}

describe("inspectModel", () => {
  test("the embedded model has no problems", async () => {
    const dir = join(import.meta.dir, "../../weights/classics-16k");
    const report = await inspectModel(dir);
    expect(report).toMatchObject({
      parameters: 8_282_688,
      bytes: 16_565_376,
      totals: { F16: { tensors: 101, elements: 8_282_688, bytes: 16_565_376 } },
      tied: true,
      classes: 25,
      tokenizer: "tokenizer.json",
      problems: [],
      notes: [],
      ignored: [],
    });
    expect(report.config).toMatchObject({
      n_layer: 8,
      n_head: 3,
      n_embd: 192,
      n_positions: 16384,
      vocab_size: 8192,
    });
  });

  test("the report is plain data", async () => {
    const report = await inspectModel(tiny());
    expect(JSON.parse(JSON.stringify(report))).toEqual(report);
  });

  test("a missing folder is the only thing that throws", async () => {
    const dir = join(folder.path, "nowhere");
    await expect(inspectModel(dir)).rejects.toBeInstanceOf(ModelError);
    await expect(inspectModel(dir)).rejects.toThrow(dir);
  });

  test("an empty folder is reported as lacking everything", async () => {
    const dir = join(folder.path, "empty");
    mkdirSync(dir);
    const report = await inspectModel(dir);
    expect(report).toMatchObject({ config: null, tensors: [], parameters: 0, tied: null, tokenizer: null });
    expect(report.problems).toEqual([
      expect.stringContaining("config.json"),
      expect.stringContaining("model.safetensors"),
    ]);
  });

  test("an unusable config is reported, the tensors are still listed", async () => {
    const dir = tiny();
    writeFileSync(join(dir, "config.json"), `{"model_type":"llama"}`);
    const report = await inspectModel(dir);
    expect(report.problems).toEqual([expect.stringContaining(`"llama"`)]);
    expect(report.tensors.length).toBe(28);
  });

  test("a truncated file is reported", async () => {
    const dir = tiny();
    truncateSync(join(dir, "model.safetensors"), 3000);
    const report = await inspectModel(dir);
    expect(report.problems).toEqual([expect.stringContaining("model.safetensors")]);
  });

  test("every missing tensor and wrong shape is reported", async () => {
    const { problems } = await inspectModel(tiny({ omit: ["ln_f.bias"], reshape: { "wpe.weight": [3, 8] } }));
    expect(problems).toEqual([expect.stringContaining("wpe.weight"), expect.stringContaining("ln_f.bias")]);
  });

  for (const dtype of ["F32", "F16", "BF16"] as const) {
    test(`a NaN among ${dtype} weights is reported with its place`, async () => {
      const dir = tiny({ dtype, inject: { tensor: "h.1.mlp.c_fc.weight", element: 37 } });
      const { problems } = await inspectModel(dir);
      expect(problems).toEqual([
        expect.stringMatching(/h\.1\.mlp\.c_fc\.weight.*NaN or an infinity at element 37/),
      ]);
      expect((await inspectModel(dir, { values: false })).problems).toEqual([]);
    });
  }

  test("a value beyond f16 is a note, not a problem", async () => {
    const report = await inspectModel(tiny({ inject: { tensor: "wte.weight", element: 5, value: 1e6 } }));
    expect(report.problems).toEqual([]);
    expect(report.notes).toContainEqual(expect.stringMatching(/wte\.weight.*element 5.*--dtype f32/));
  });

  test("a broken tokenizer is a problem, an absent one a note", async () => {
    const dir = tiny();
    expect((await inspectModel(dir)).notes).toEqual([expect.stringContaining("tokenizer.json")]);
    writeFileSync(join(dir, "tokenizer.json"), "{");
    expect((await inspectModel(dir)).problems).toEqual([expect.stringContaining("tokenizer.json")]);
    rmSync(join(dir, "tokenizer.json"));
  });
});

describe("formatInspect", () => {
  test("a sound model is a summary and an aligned table", async () => {
    const text = formatInspect(await inspectModel(tiny({ dtype: "F16", classes: 2 })));
    expect(text).toContain("2 layers, 2 heads, width 8");
    expect(text).toContain("tied to wte");
    expect(text).toEndWith("no problems found\n");
    const table = text.split("\n").filter((line) => line.includes("F16  "));
    expect(table.length).toBe(29);
    expect(new Set(table.map((line) => line.length)).size).toBe(1);
  });

  test("problems come last, one a line", async () => {
    const text = formatInspect(await inspectModel(tiny({ omit: ["wte.weight", "ln_f.bias"] })));
    expect(text.trimEnd().split("\n").slice(-2)).toEqual([
      expect.stringMatching(/^problem: .*wte\.weight/),
      expect.stringMatching(/^problem: .*ln_f\.bias/),
    ]);
  });

  test("hostile tensor names cannot write to the terminal", async () => {
    const extra = [{ name: "\u001b[2Jx\n\u009b", dtype: "U8", shape: [0], bytes: new Uint8Array(0) }];
    const text = formatInspect(await inspectModel(tiny({ extra })));
    expect(text).toContain(String.raw`"\u001b[2Jx\n\u009b"`);
    expect(text).toMatch(/^[\x20-\x7e\n]*$/);
  });
});
