/** The ONNX decoder of small checkpoints, run by an interpreter of the operators' documentation. */
import { afterAll, describe, expect, test } from "bun:test";
import { mkdtempSync, readFileSync } from "node:fs";
import { join } from "node:path";
import {
  cacheNames,
  encodeModel,
  headColumns,
  type OnnxModel,
  type OnnxNode,
  WEIGHTS_FILE,
  writeWeights,
} from "../../bench/peers/onnx.ts";
import { loadPackage } from "../../bench/peers/peer.ts";
import { attentionReference } from "../../src/kernels/flash_attention/reference.ts";
import { layerNormReference } from "../../src/kernels/layer_norm/reference.ts";
import { geluNewReference, matmulReference } from "../../src/kernels/matmul/reference.ts";
import type { GPT2Config } from "../../src/model/config.ts";
import { convertElements } from "../../src/model/float16.ts";
import { referenceForward } from "../../src/model/reference.ts";
import { openCheckpoint } from "../../src/model/safetensors.ts";
import { elementCount } from "../../src/model/weight_source.ts";
import type { Elem } from "../../src/runtime/kernel.ts";
import { temporaryFolder, type TinyOptions, writeTinyCheckpoint } from "../support/checkpoint.ts";

const folder = temporaryFolder();
afterAll(folder.remove);

const CONFIG = {
  nInner: 20,
  layerNormEpsilon: 0.01,
  scaleAttnByInverseLayerIdx: true,
};
const ids = [3, 1, 4, 10, 5, 9, 2, 6];

interface Written {
  readonly model: OnnxModel;
  readonly config: GPT2Config;
  /** The checkpoint's, by canonical name. */
  readonly original: ReadonlyMap<string, Float32Array>;
  readonly shapes: ReadonlyMap<string, readonly number[]>;
  /** Of the weights file, by initializer. */
  readonly weights: ReadonlyMap<string, Float32Array>;
}

async function write(options: TinyOptions, elem: Elem): Promise<Written> {
  const out = mkdtempSync(join(folder.path, "model-"));
  const { dir, config, values } = writeTinyCheckpoint(
    join(out, "checkpoint"),
    options,
  );
  const source = await openCheckpoint(dir);
  const model = await writeWeights(out, source, config, elem).finally(() => source.close());
  const file = readFileSync(join(out, WEIGHTS_FILE));
  const shapes = new Map<string, readonly number[]>();
  const weights = new Map<string, Float32Array>();
  for (
    const { name, dims, dataType, externalData, dataLocation } of model.graph
      .initializer
  ) {
    shapes.set(name, dims.map(Number));
    if (dataLocation !== 1) continue;
    expect(dataType).toBe(elem === "f16" ? 10 : 1);
    const { location, offset, length } = Object.fromEntries(
      externalData!.map(({ key, value }) => [key, value]),
    );
    expect(location).toBe(WEIGHTS_FILE);
    const bytes = file.subarray(
      Number(offset),
      Number(offset) + Number(length),
    );
    expect(bytes.length).toBe(
      elementCount(shapes.get(name)!) * (elem === "f16" ? 2 : 4),
    );
    const { bytes: f32 } = convertElements(
      bytes,
      elem === "f16" ? "F16" : "F32",
      "f32",
    );
    weights.set(name, new Float32Array(new Uint8Array(f32).buffer));
  }
  return { model, config, original: values, shapes, weights };
}

type Values = Map<string, ArrayLike<number>>;

/** What one node computes in f64 of a batch of one; a cache is `[keys, nEmbd]` here, without spare capacity. */
function compute(
  { opType, input, attribute }: OnnxNode,
  values: Values,
  { config: { nEmbd, nHead, headDim }, shapes }: Written,
): ArrayLike<number>[] {
  const has = (i: number) => (input[i] ?? "") !== "";
  const read = (i: number) => values.get(input[i]!)!;
  const attributes = new Map(
    attribute.map(({ name, i, f }) => [name, Number(i ?? f)]),
  );
  const add = (x: ArrayLike<number>, y: ArrayLike<number>) =>
    Float64Array.from(x, (value, i) => value + y[i % y.length]!);
  const rows = (x: ArrayLike<number>, chosen: ArrayLike<number>) =>
    Float64Array.from(
      { length: chosen.length * nEmbd },
      (_, i) => x[chosen[Math.floor(i / nEmbd)]! * nEmbd + i % nEmbd]!,
    );
  switch (opType) {
    case "Gather": {
      const count = read(0).length / nEmbd;
      return [
        rows(
          read(0),
          Array.from(read(1), (index) => index < 0 ? index + count : index),
        ),
      ];
    }
    case "MatMul": {
      const [inner, columns] = shapes.get(input[1]!) as [number, number];
      return [
        matmulReference(read(0), read(1), new Float64Array(columns), inner),
      ];
    }
    case "Add":
      return [add(read(0), read(1))];
    case "FastGelu":
      return [add(read(0), read(1)).map(geluNewReference)];
    case "Cast":
      expect(attributes.get("to")).toBe(1);
      return [read(0)];
    case "SkipLayerNormalization": {
      const sum = has(4) ? add(add(read(0), read(1)), read(4)) : add(read(0), read(1));
      return [
        layerNormReference(
          sum,
          read(2),
          read(3),
          nEmbd,
          attributes.get("epsilon")!,
        ),
        [],
        [],
        sum,
      ];
    }
    case "GroupQueryAttention": {
      expect([has(1), has(2)]).toEqual([false, false]); // queries, keys and values are packed
      expect([attributes.get("num_heads"), attributes.get("kv_num_heads")])
        .toEqual([nHead, nHead]);
      const count = read(0).length / (3 * nEmbd);
      const third = (n: number) =>
        Array.from(
          { length: count * nEmbd },
          (_, i) => read(0)[(3 * Math.floor(i / nEmbd) + n) * nEmbd + i % nEmbd]!,
        );
      const keys = [...Array.from(read(3)), ...third(1)];
      const total = read(6)[0]!;
      expect([keys.length / nEmbd, read(5)[0]]).toEqual([total, total - 1]);
      const held = [...Array.from(read(4)), ...third(2)];
      const scale = attributes.get("scale")!;
      const shape = {
        heads: nHead,
        headDim,
        firstPosition: total - count,
        scale,
      };
      return [attentionReference(third(0), keys, held, shape), keys, held];
    }
    default:
      throw new Error(`no such operator: ${opType}`);
  }
}

/** Runs the graph's nodes one after another; every input must be there when its node's turn comes. */
function run(
  written: Written,
  inputs: Readonly<Record<string, ArrayLike<number>>>,
): Values {
  const { graph } = written.model;
  expect(Object.keys(inputs).toSorted()).toEqual(
    graph.input.map(({ name }) => name).toSorted(),
  );
  const values: Values = new Map([
    ...written.weights,
    ["last", [-1]],
    ...Object.entries(inputs),
  ]);
  for (const node of graph.node) {
    for (const name of node.input) {
      if (name !== "") expect([...values.keys()]).toContain(name);
    }
    const results = compute(node, values, written);
    node.output.forEach((name, i) => name !== "" && values.set(name, results[i]!));
  }
  for (const { name } of graph.output) {
    expect([...values.keys()]).toContain(name);
  }
  return values;
}

/** The inputs for tokens behind `length` others. */
function inputsFor(
  tokens: readonly number[],
  length: number,
  cache: Readonly<Record<string, ArrayLike<number>>>,
) {
  const total = length + tokens.length;
  return {
    input_ids: tokens,
    position_ids: tokens.map((_, i) => length + i),
    last_key: [total - 1],
    total_length: [total],
    ...cache,
  };
}

for (const lmHead of ["tied", "separate"] as const) {
  test(`prefill and decode are GPT-2's, with a head that is ${lmHead}`, async () => {
    const written = await write({ config: CONFIG, lmHead }, "f32");
    const { config, original } = written;
    const { logits } = referenceForward(original, config, ids);
    const names = cacheNames(config);
    const empty = Object.fromEntries(names.map(({ past }) => [past, []]));
    let values = run(written, inputsFor(ids.slice(0, 6), 0, empty));
    const expectLogits = (position: number) => {
      const found = Array.from(values.get("logits")!);
      expect(found.length).toBe(headColumns(config));
      const wanted = logits.subarray(
        position * config.vocabSize,
        (position + 1) * config.vocabSize,
      );
      wanted.forEach((value, token) => expect(found[token]).toBeCloseTo(value, 10));
      expect(found.slice(config.vocabSize)).toEqual([0]);
    };
    expectLogits(5);
    for (const position of [6, 7]) {
      const cache = Object.fromEntries(
        names.map(({ past, present }) => [past, values.get(present)!]),
      );
      values = run(written, inputsFor([ids[position]!], position, cache));
      expectLogits(position);
    }
  });
}

test("attention is not scaled where the config says so", async () => {
  const { model } = await write({
    config: { ...CONFIG, scaleAttnWeights: false },
  }, "f32");
  const scales = model.graph.node.flatMap(({ attribute }) =>
    attribute.filter(({ name }) => name === "scale")
  );
  expect(scales.map(({ f }) => f)).toEqual([1, 0.5]);
});

describe.each(["f16", "f32"] as const)("%s", (elem) => {
  test("the weights are the checkpoint's, the head with rows and columns exchanged", async () => {
    const { weights, original, config } = await write({
      config: CONFIG,
      dtype: "F16",
      classes: 3,
    }, elem);
    const { nEmbd, vocabSize } = config;
    const names = [...original.keys()].filter((name) => name !== "score.weight");
    expect([...weights.keys()].toSorted()).toEqual(
      [...names, "lm_head.weight"].toSorted(),
    );
    for (const name of names) {
      expect(weights.get(name)!).toEqual(original.get(name)!);
    }
    const head = weights.get("lm_head.weight")!;
    const columns = head.length / nEmbd;
    expect(columns).toBe(12);
    const wte = original.get("wte.weight")!;
    const wanted = Array.from(head, (_, i) => {
      const [column, token] = [Math.floor(i / columns), i % columns];
      return token < vocabSize ? wte[token * nEmbd + column]! : 0;
    });
    expect([...head]).toEqual(wanted);
  });

  test("values on the way are of the same type", async () => {
    const { model } = await write({ config: CONFIG }, elem);
    const typeOf = new Map(
      [...model.graph.input, ...model.graph.output].map((
        { name, type },
      ) => [name, type.value.value.elemType]),
    );
    const { past, present } = cacheNames({ nLayer: 2 } as GPT2Config)[3]!;
    const type = elem === "f16" ? 10 : 1;
    expect([past, present, "logits"].map((name) => typeOf.get(name))).toEqual([
      type,
      type,
      1,
    ]);
  });
});

test("a value that f16 cannot hold is an error", async () => {
  const inject = { tensor: "h.1.mlp.c_fc.weight", element: 7, value: 1e5 };
  await expect(write({ config: CONFIG, inject }, "f16")).rejects.toThrow(
    "h.1.mlp.c_fc.weight is too large",
  );
});

const isInstalled = await loadPackage("onnx-buf").then(() => true, () => false);
test.skipIf(!isInstalled)(
  "the file parses back (needs `npm ci` in bench/peers)",
  async () => {
    const { fromBinary } = await loadPackage("@bufbuild/protobuf") as {
      fromBinary(schema: unknown, bytes: Uint8Array): OnnxModel;
    };
    const { ModelProtoSchema } = await loadPackage("onnx-buf") as {
      ModelProtoSchema: unknown;
    };
    const { model } = await write({ config: CONFIG }, "f16");
    // Floats are stored in f32.
    const stored = JSON.stringify(
      model,
      (key, value) => key === "f" ? Math.fround(value) : typeof value === "bigint" ? `${value}` : value,
    );
    const parsed = JSON.stringify(
      fromBinary(ModelProtoSchema, await encodeModel(model)),
      (_, value) => typeof value === "bigint" ? `${value}` : value,
    );
    expect(JSON.parse(parsed)).toMatchObject(JSON.parse(stored));
  },
);
