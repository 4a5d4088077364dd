/** GGUF files of small checkpoints, read back by the specification alone. */
import { afterAll, describe, expect, test } from "bun:test";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { readVocabulary, writeGguf } from "../../bench/peers/gguf.ts";
import type { GPT2Config } from "../../src/model/config.ts";
import { f16ToF32 } from "../../src/model/float16.ts";
import { openCheckpoint } from "../../src/model/safetensors.ts";
import type { Elem } from "../../src/runtime/kernel.ts";
import { temporaryFolder, type TinyOptions, writeTinyCheckpoint } from "../support/checkpoint.ts";

const folder = temporaryFolder();
afterAll(folder.remove);

interface ReadTensor {
  readonly dimensions: readonly number[];
  readonly type: number;
  readonly values: Float32Array;
}

/** A file of version 3; tensors must lie one after another, at multiples of 32 bytes, and be all there is. */
function readGguf(bytes: Uint8Array): { metadata: Map<string, unknown>; tensors: Map<string, ReadTensor> } {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  let at = 0;
  const u32 = () => view.getUint32((at += 4) - 4, true);
  const u64 = () => Number(view.getBigUint64((at += 8) - 8, true));
  const string = () => {
    const length = u64();
    return new TextDecoder("utf-8", { fatal: true }).decode(bytes.subarray(at, at += length));
  };
  const value = (type: number): unknown => {
    if (type === 4) return u32();
    if (type === 5) return view.getInt32((at += 4) - 4, true);
    if (type === 6) return view.getFloat32((at += 4) - 4, true);
    if (type === 7) return view.getUint8(at++) === 1;
    if (type === 8) return string();
    if (type !== 9) throw new Error(`value of type ${type}`);
    const of = u32();
    return Array.from({ length: u64() }, () => value(of));
  };
  expect(new TextDecoder().decode(bytes.subarray(0, 4))).toBe("GGUF");
  at = 4;
  expect(u32()).toBe(3);
  const tensorCount = u64();
  const metadata = new Map<string, unknown>();
  for (let left = u64(); left > 0; left--) metadata.set(string(), value(u32()));
  const infos = Array.from({ length: tensorCount }, () => {
    const name = string();
    const dimensions = Array.from({ length: u32() }, u64);
    return { name, dimensions, type: u32(), offset: u64() };
  });
  const start = Math.ceil(at / 32) * 32;
  let end = start;
  const tensors = new Map(infos.map(({ name, dimensions, type, offset }) => {
    expect(start + offset).toBe(Math.ceil(end / 32) * 32);
    const length = dimensions.reduce((product, size) => product * size, 1);
    const numbers = Float32Array.from(
      { length },
      (_, i) =>
        type === 0
          ? view.getFloat32(start + offset + 4 * i, true)
          : f16ToF32(view.getUint16(start + offset + 2 * i, true)),
    );
    end = start + offset + length * (type === 0 ? 4 : 2);
    return [name, { dimensions, type, values: numbers }];
  }));
  expect(bytes.length).toBe(Math.ceil(end / 32) * 32);
  return { metadata, tensors };
}

let count = 0;

async function convert(options: TinyOptions, elem: Elem, tokenizer?: object) {
  const dir = join(folder.path, String(count++));
  const tiny = writeTinyCheckpoint(dir, options);
  if (tokenizer) writeFileSync(join(dir, "tokenizer.json"), JSON.stringify(tokenizer));
  const source = await openCheckpoint(dir);
  try {
    const path = join(dir, "model.gguf");
    const vocabulary = await readVocabulary(dir, tiny.config.vocabSize);
    const bytes = await writeGguf(path, source, tiny.config, vocabulary, elem);
    const file = readFileSync(path);
    expect(file.length).toBe(bytes);
    return { original: tiny.values, ...readGguf(file) };
  } finally {
    await source.close();
  }
}

/** Sizes that all differ, but for the square of attention's output. */
const CONFIG: Partial<GPT2Config> = {
  nLayer: 2,
  nHead: 2,
  nEmbd: 8,
  nInner: 20,
  nPositions: 16,
  vocabSize: 11,
};

test("metadata are the config's", async () => {
  const { metadata } = await convert(
    { config: { ...CONFIG, layerNormEpsilon: 0.25, eosTokenId: [10] } },
    "f16",
  );
  expect(Object.fromEntries(metadata)).toMatchObject({
    "general.architecture": "gpt2",
    "general.file_type": 1,
    "gpt2.context_length": 16,
    "gpt2.embedding_length": 8,
    "gpt2.feed_forward_length": 20,
    "gpt2.block_count": 2,
    "gpt2.attention.head_count": 2,
    "gpt2.attention.layer_norm_epsilon": 0.25,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.eos_token_id": 10,
    "tokenizer.ggml.add_bos_token": false,
  });
  // 50256, the default, is outside the vocabulary.
  expect(metadata.has("tokenizer.ggml.bos_token_id")).toBe(false);
});

describe.each(["f16", "f32"] as const)("%s", (elem) => {
  test("every tensor has llama.cpp's name, dimensions from the contiguous one on, and its type", async () => {
    const { tensors, metadata } = await convert({ config: CONFIG, classes: 3 }, elem);
    const matrix = elem === "f16" ? 1 : 0;
    expect(metadata.get("general.file_type")).toBe(matrix);
    const block = (layer: number) => [
      `blk.${layer}.attn_norm.weight 8 0`,
      `blk.${layer}.attn_norm.bias 8 0`,
      `blk.${layer}.attn_qkv.weight 8x24 ${matrix}`,
      `blk.${layer}.attn_qkv.bias 24 0`,
      `blk.${layer}.attn_output.weight 8x8 ${matrix}`,
      `blk.${layer}.attn_output.bias 8 0`,
      `blk.${layer}.ffn_norm.weight 8 0`,
      `blk.${layer}.ffn_norm.bias 8 0`,
      `blk.${layer}.ffn_up.weight 8x20 ${matrix}`,
      `blk.${layer}.ffn_up.bias 20 0`,
      `blk.${layer}.ffn_down.weight 20x8 ${matrix}`,
      `blk.${layer}.ffn_down.bias 8 0`,
    ];
    const found = [...tensors].map(([name, tensor]) =>
      `${name} ${tensor.dimensions.join("x")} ${tensor.type}`
    );
    expect(found.toSorted()).toEqual(
      [
        `token_embd.weight 8x11 ${matrix}`,
        "position_embd.weight 8x16 0",
        ...block(0),
        ...block(1),
        "output_norm.weight 8 0",
        "output_norm.bias 8 0",
      ].toSorted(),
    );
  });

  test("values are the checkpoint's, Conv1D weights with rows and columns exchanged", async () => {
    const { tensors, original } = await convert({ config: CONFIG, dtype: "F16", lmHead: "separate" }, elem);
    const kept = {
      "token_embd.weight": "wte.weight",
      "position_embd.weight": "wpe.weight",
      "output.weight": "lm_head.weight",
      "output_norm.weight": "ln_f.weight",
      "blk.1.attn_norm.weight": "h.1.ln_1.weight",
      "blk.1.ffn_norm.bias": "h.1.ln_2.bias",
      "blk.1.attn_qkv.bias": "h.1.attn.c_attn.bias",
    };
    for (const [name, canonical] of Object.entries(kept)) {
      expect(tensors.get(name)!.values).toEqual(original.get(canonical)!);
    }
    const exchanged = {
      "blk.1.attn_qkv.weight": "h.1.attn.c_attn.weight",
      "blk.1.attn_output.weight": "h.1.attn.c_proj.weight",
      "blk.1.ffn_up.weight": "h.1.mlp.c_fc.weight",
      "blk.1.ffn_down.weight": "h.1.mlp.c_proj.weight",
    };
    for (const [name, canonical] of Object.entries(exchanged)) {
      const { values, dimensions: [inner, columns] } = tensors.get(name)!;
      const wanted = original.get(canonical)!;
      const back = Array.from(wanted, (_, i) => values[(i % columns!) * inner! + Math.floor(i / columns!)]!);
      expect(back).toEqual([...wanted]);
    }
  });
});

test("a value that f16 cannot hold is an error", async () => {
  const inject = { tensor: "h.1.mlp.c_fc.weight", element: 7, value: 1e5 };
  await expect(convert({ config: CONFIG, inject }, "f16")).rejects.toThrow(
    "h.1.mlp.c_fc.weight is too large",
  );
});

test("attention that llama.cpp would scale otherwise is an error", async () => {
  const config = { ...CONFIG, scaleAttnByInverseLayerIdx: true };
  await expect(convert({ config }, "f32")).rejects.toThrow("scales attention scores");
});

describe("the vocabulary", () => {
  const model = { type: "BPE", vocab: { a: 1, b: 0, ab: 3, "é": 2 }, merges: ["a b"] };

  test("is tokenizer.json's, by id, with added tokens and fillers for rows without one", async () => {
    const tokenizer = {
      model,
      added_tokens: [{ id: 5, content: "<|endoftext|>", special: true }, {
        id: 4,
        content: "x",
        special: false,
      }],
    };
    const { metadata } = await convert({ config: { ...CONFIG, vocabSize: 7 } }, "f16", tokenizer);
    expect(metadata.get("tokenizer.ggml.tokens")).toEqual([
      "b",
      "a",
      "é",
      "ab",
      "x",
      "<|endoftext|>",
      "[PAD6]",
    ]);
    expect(metadata.get("tokenizer.ggml.token_type")).toEqual([1, 1, 1, 1, 1, 3, 1]);
    expect(metadata.get("tokenizer.ggml.merges")).toEqual(["a b"]);
  });

  test("may list a merge as two texts", async () => {
    const tokenizer = { model: { ...model, merges: [["a", "b"]] } };
    const { metadata } = await convert({ config: CONFIG }, "f16", tokenizer);
    expect(metadata.get("tokenizer.ggml.merges")).toEqual(["a b"]);
  });

  test("is made up of different tokens where there is no tokenizer", async () => {
    const { metadata } = await convert({ config: CONFIG }, "f16");
    expect(new Set(metadata.get("tokenizer.ggml.tokens") as string[]).size).toBe(11);
  });

  test("that is larger than the model's is an error", async () => {
    await expect(convert({ config: { ...CONFIG, vocabSize: 3 } }, "f16", { model })).rejects.toThrow(
      "ids up to 3",
    );
  });
});
