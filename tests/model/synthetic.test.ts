import { describe, expect, test } from "bun:test";
import { resolveCheckpoint } from "../../src/model/checkpoint.ts";
import { PUBLISHED_SHAPES } from "../../src/model/config.ts";
import { convertElements } from "../../src/model/float16.ts";
import { syntheticPrompt, syntheticSource } from "../../src/model/synthetic.ts";
import { fmix32 } from "../../src/runtime/fmix32.ts";
import vectors from "../golden/synthetic_vectors.json";

type Source = ReturnType<typeof syntheticSource>;

async function elements(source: Source, name: string, first: number, count: number): Promise<number[]> {
  const bytes = new Uint8Array(2 * count);
  await source.read(name, 2 * first, bytes);
  return [...new Float32Array(convertElements(bytes, "F16", "f32").bytes.buffer as ArrayBuffer)];
}

describe("synthetic checkpoints", () => {
  test("fmix32 matches the recorded values", () => {
    for (const [x, mixed] of vectors.fmix32) expect(fmix32(x!)).toBe(mixed!);
  });

  for (const shape of ["gpt2", "gpt2-medium"] as const) {
    test(`${shape} has the recorded tensors, values and sums`, async () => {
      const source = syntheticSource(PUBLISHED_SHAPES[shape]);
      expect(source.tensors.size).toBe(vectors.shapes[shape].tensors);
      for (const row of vectors.shapes[shape].rows) {
        const info = source.tensors.get(row.name)!;
        expect(info).toMatchObject({ dtype: "F16", shape: row.shape });
        const size = info.byteLength / 2;
        expect(await elements(source, row.name, 0, row.first.length)).toEqual(row.first);
        expect(await elements(source, row.name, size - row.last.length, row.last.length)).toEqual(row.last);
        if (size > 2e6) continue; // summing the largest takes seconds
        const all = await elements(source, row.name, 0, size);
        expect(all.reduce((sum, x) => sum + x, 0)).toBe(row.sum);
      }
    });
  }

  test("any byte range reads the same as the whole, unaligned ones too", async () => {
    const source = syntheticSource(PUBLISHED_SHAPES.gpt2);
    const name = "transformer.h.3.mlp.c_fc.bias";
    const whole = new Uint8Array(64);
    await source.read(name, 0, whole);
    for (const [offset, length] of [[0, 64], [1, 7], [3, 1], [4, 5], [10, 0], [7, 20]] as const) {
      const into = new Uint8Array(length + 1).subarray(1);
      await source.read(name, offset, into);
      expect(into).toEqual(whole.slice(offset, offset + length));
    }
    expect(source.read(name, 6140, new Uint8Array(8))).rejects.toThrow(RangeError);
    expect(source.read("transformer.h.12.ln_1.bias", 0, new Uint8Array(8))).rejects.toThrow(RangeError);
  });

  test("it resolves as a complete GPT-2 with a tied head", () => {
    const config = PUBLISHED_SHAPES.gpt2;
    const resolved = resolveCheckpoint(syntheticSource(config), config);
    expect(resolved).toMatchObject({
      tiedLmHead: true,
      classes: undefined,
      ignored: [],
      parameters: 124_439_808,
    });
  });

  test("the prompt matches the recorded tokens", () => {
    const { vocab, first, sum_1024 } = vectors.prompt;
    const prompt = syntheticPrompt(1024, vocab);
    expect([...prompt.subarray(0, first.length)]).toEqual(first);
    expect(prompt.reduce((sum, token) => sum + token, 0)).toBe(sum_1024);
  });
});
