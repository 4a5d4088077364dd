import { afterAll, describe, expect, test } from "bun:test";
import { join } from "node:path";
import { checkCheckpoint, resolveCheckpoint } from "../../src/model/checkpoint.ts";
import { parameterCount, readConfig } from "../../src/model/config.ts";
import { openCheckpoint } from "../../src/model/safetensors.ts";
import { ModelError } from "../../src/runtime/errors.ts";
import {
  decodeElements,
  temporaryFolder,
  type TinyOptions,
  writeTinyCheckpoint,
} from "../support/checkpoint.ts";

const folder = temporaryFolder();
afterAll(folder.remove);
let folders = 0;

/** Writes a checkpoint and opens it as the program would. */
async function opened(options: TinyOptions) {
  const tiny = writeTinyCheckpoint(join(folder.path, String(folders++)), options);
  const source = await openCheckpoint(tiny.dir);
  return { ...tiny, config: await readConfig(tiny.dir), source };
}

async function resolved(options: TinyOptions) {
  const { source, config, ...tiny } = await opened(options);
  try {
    return { ...tiny, config, checkpoint: resolveCheckpoint(source, config) };
  } finally {
    await source.close();
  }
}

async function problems(options: TinyOptions): Promise<readonly ModelError[]> {
  const { source, config } = await opened(options);
  await source.close();
  return checkCheckpoint(source, config).problems;
}

describe("resolveCheckpoint", () => {
  for (const prefix of ["transformer.", ""]) {
    for (const dtype of ["F32", "F16", "BF16"] as const) {
      test(`${dtype} tensors with the prefix "${prefix}" resolve to canonical names and their own bytes`, async () => {
        const { source, config, values } = await opened({ prefix, dtype });
        const { tensors, ...rest } = resolveCheckpoint(source, config);
        expect([...tensors.keys()]).toEqual([...values.keys()]);
        for (const [name, info] of tensors) {
          const bytes = new Uint8Array(info.byteLength);
          await source.read(info.name, 0, bytes);
          expect(decodeElements(bytes, info.dtype)).toEqual(values.get(name)!);
        }
        const parameters = parameterCount(config);
        expect(rest).toEqual({ tiedLmHead: true, classes: undefined, ignored: [], parameters });
        await source.close();
      });
    }
  }

  test("an inner width of its own is respected", async () => {
    const { checkpoint } = await resolved({ config: { nInner: 12 } });
    expect(checkpoint.tensors.get("h.1.mlp.c_proj.weight")!.shape).toEqual([12, 8]);
  });

  test("a tied head that is stored all the same is left out, and is nothing unexpected", async () => {
    const { checkpoint } = await resolved({ lmHead: "listed" });
    expect(checkpoint.tiedLmHead).toBe(true);
    expect(checkpoint.tensors.has("lm_head.weight")).toBe(false);
    expect(checkpoint.ignored).toEqual([]);
  });

  test("a separate head is taken and counted", async () => {
    const { checkpoint, config } = await resolved({ lmHead: "separate" });
    expect(checkpoint.tiedLmHead).toBe(false);
    expect(checkpoint.tensors.get("lm_head.weight")!.shape).toEqual([11, 8]);
    expect(checkpoint.parameters).toBe(parameterCount(config));
  });

  test("a separate head that is missing is named", async () => {
    const [problem, ...others] = await problems({ lmHead: "separate", omit: ["lm_head.weight"] });
    expect(problem!.message).toContain("no tensor lm_head.weight");
    expect(others).toEqual([]);
  });

  test("a classification head is found, and must have a row for every label", async () => {
    const { checkpoint } = await resolved({ classes: 3 });
    expect(checkpoint.classes).toBe(3);
    expect(checkpoint.tensors.get("score.weight")!.shape).toEqual([3, 8]);
    const [problem] = await problems({ classes: 3, config: { id2label: ["only", "two"] } });
    expect(problem!.message).toMatch(/"score\.weight".* has shape \[3, 8\], config\.json wants \[2, 8\]/);
    expect((await problems({ classes: 3, config: { id2label: [] } })).length).toBe(0);
  });

  test("mask buffers are skipped silently, other strangers are listed", async () => {
    const stranger = {
      name: "multiple_choice_head.summary.bias",
      dtype: "I64",
      shape: [1],
      bytes: new Uint8Array(8),
    };
    const { checkpoint } = await resolved({ buffers: true, extra: [stranger] });
    expect(checkpoint.ignored).toEqual(["multiple_choice_head.summary.bias"]);
  });

  test("a missing tensor is refused by name and file", async () => {
    const { source, config, dir } = await opened({ omit: ["h.1.attn.c_proj.bias"] });
    await source.close();
    expect(() => resolveCheckpoint(source, config)).toThrow(ModelError);
    expect(() => resolveCheckpoint(source, config)).toThrow(
      `${join(dir, "model.safetensors")} has no tensor h.1.attn.c_proj.bias`,
    );
  });

  test("all problems are listed, and resolving says how many there are", async () => {
    const options: TinyOptions = {
      omit: ["ln_f.bias", "h.0.ln_1.weight"],
      reshape: { "wpe.weight": [15, 8] },
    };
    expect((await problems(options)).map((problem) => problem.message)).toEqual([
      expect.stringMatching(
        /"transformer\.wpe\.weight" in .* has shape \[15, 8\], config\.json wants \[16, 8\]/,
      ),
      expect.stringMatching(/no tensor h\.0\.ln_1\.weight/),
      expect.stringMatching(/no tensor ln_f\.bias/),
    ]);
    await expect(resolved(options)).rejects.toThrow("(and 2 more problems)");
  });

  test("more positions than config.json says are refused too", async () => {
    const [problem] = await problems({ reshape: { "wpe.weight": [17, 8] } });
    expect(problem!.message).toMatch(/\[17, 8\].*\[16, 8\]/);
  });

  test("a transposed weight gets its own advice", async () => {
    const [problem] = await problems({ reshape: { "h.0.attn.c_attn.weight": [24, 8] } });
    expect(problem!.message).toMatch(/h\.0\.attn\.c_attn\.weight.*\[24, 8\].*\[8, 24\]/);
    expect(problem!.hint).toContain("transposed");
  });

  test("a tensor of the wrong rank is refused by name", async () => {
    const [problem] = await problems({ reshape: { "h.0.ln_1.bias": [1, 8] } });
    expect(problem!.message).toMatch(/h\.0\.ln_1\.bias.*\[1, 8\].*\[8\]/);
  });

  test("a type that cannot be loaded is refused by name", async () => {
    for (const [dtype, bytesPerElement] of [["F64", 8], ["I8", 1], ["F8_E4M3", 1]] as const) {
      const [problem] = await problems({ retype: { tensor: "wte.weight", dtype, bytesPerElement } });
      expect(problem!.message).toContain(`"transformer.wte.weight"`);
      expect(problem!.message).toContain(`stored as ${dtype}`);
    }
  });

  test("blocks beyond n_layer are refused: without them it would be another model", async () => {
    const { source, config } = await opened({ config: { nLayer: 3 } });
    await source.close();
    const [problem, ...others] = checkCheckpoint(source, { ...config, nLayer: 2 }).problems;
    expect(problem!.message).toContain("has a block h.2, but config.json has n_layer 2");
    expect(problem!.hint).toContain("n_layer to 3");
    expect(others).toEqual([]);
  });

  test("a tensor stored with and without the prefix is ambiguous", async () => {
    const extra = [{ name: "ln_f.bias", dtype: "F32", shape: [8], bytes: new Uint8Array(32) }];
    const [problem] = await problems({ extra });
    expect(problem!.message).toContain(`both "transformer.ln_f.bias" and "ln_f.bias"`);
  });
});
