/** What must hold for any model, shown on small random ones. */
import { afterAll, describe, expect, test } from "bun:test";
import { join } from "node:path";
import { referenceForward } from "../../src/model/reference.ts";
import { openDevice } from "../../src/runtime/device.ts";
import { ModelError } from "../../src/runtime/errors.ts";
import { maxAbsDifference, withClassics } from "../support/accuracy.ts";
import { temporaryFolder, writeTinyCheckpoint } from "../support/checkpoint.ts";
import { testDevice, testElems } from "../support/device.ts";
import { loadModel, logitTolerance, readReference, someIds } from "../support/model.ts";

const LONG = 300_000;
/** Awkward for every tile: one, one less and one more than 64, primes, one more than 1,024. */
const LENGTHS = [1, 63, 64, 65, 97, 257, 1025];

const gpu = await testDevice();
const elems = testElems(gpu);
const folder = temporaryFolder();
const root = folder.path;
afterAll(() => folder.remove());

/** Sizes that nothing divides: head_dim 10 and width 30 are padded, an odd vocabulary. */
const AWKWARD = { nLayer: 2, nHead: 3, nEmbd: 30, nPositions: 1100, vocabSize: 101 };

for (const elem of elems) {
  describe(`in ${elem}`, () => {
    test("logits of every awkward length equal the CPU reference's", async () => {
      const dir = join(root, `awkward-${elem}`);
      await writeTinyCheckpoint(dir, { config: AWKWARD, dtype: "F16", seed: 1 });
      const { config, parameters } = await readReference(dir);
      // Causal: the reference of the longest holds that of all shorter ones.
      const longest = LENGTHS.at(-1)!;
      const { logits } = referenceForward(parameters, config, someIds(longest, config.vocabSize));
      const model = await loadModel(gpu, dir, { context: longest, elem });
      for (const length of LENGTHS) {
        model.truncate(0);
        const got = await model.prefill(someIds(length, config.vocabSize));
        const wanted = logits.subarray((length - 1) * config.vocabSize, length * config.vocabSize);
        expect(maxAbsDifference(got, wanted)).toBeLessThan(logitTolerance(elem, wanted));
      }
      model.destroy();
    }, LONG);

    test("prefill(n) then decode equals prefill(n + 1), and chunks do not matter", async () => {
      await withClassics(gpu, elem, 258, async (model) => {
        for (const length of [1, 64, 257]) {
          const tokens = someIds(length + 1, model.config.vocabSize);
          model.truncate(0);
          const whole = await model.prefill(tokens);
          model.truncate(0);
          await model.prefill(tokens.slice(0, length));
          const stepped = await model.decodeStep(tokens[length]!);
          expect(maxAbsDifference(stepped, whole)).toBeLessThan(logitTolerance(elem, whole));
          model.truncate(0);
          const chunked = await model.prefill(tokens, { chunkTokens: 50 });
          expect(maxAbsDifference(chunked, whole)).toBeLessThan(logitTolerance(elem, whole));
        }
      });
    }, LONG);

    test("ten runs are bit-identical", async () => {
      await withClassics(gpu, elem, 120, async (model) => {
        const tokens = someIds(97, model.config.vocabSize);
        let first: Float32Array[] | undefined;
        for (let run = 0; run < 10; run++) {
          model.truncate(0);
          const rows = [await model.prefill(tokens)];
          for (let step = 0; step < 3; step++) rows.push(await model.decodeStep(tokens[step]!));
          first ??= rows;
          rows.forEach((row, i) => expect(maxAbsDifference(row, first![i]!)).toBe(0));
        }
      });
    }, LONG);
  });
}

test("tables cut into pieces by a small binding limit give the same bits", async () => {
  const dir = join(root, "pieces");
  await writeTinyCheckpoint(dir, { config: AWKWARD, dtype: "F32", seed: 2 });
  const small = await openDevice({ restrict: { maxBindingBytes: 64 * 1024 } });
  const [whole, pieced] = [
    await loadModel(gpu, dir, { context: 40, elem: "f32" }),
    await loadModel(small, dir, { context: 40, elem: "f32" }),
  ];
  const tokens = someIds(40, AWKWARD.vocabSize);
  // wpe is 1100 rows of 32 f32 values: 137 KiB in three pieces.
  expect(maxAbsDifference(await pieced.prefill(tokens), await whole.prefill(tokens))).toBe(0);
  whole.destroy();
  pieced.destroy();
  small.destroy();
}, LONG);

test("a model on a device without f16 runs in f32 and refuses f16", async () => {
  const plain = await openDevice({ restrict: { f16: false } });
  const logits = await withClassics(plain, "f32", 8, (model) => model.prefill([5, 6, 7]));
  expect(logits.every(Number.isFinite)).toBe(true);
  await expect(withClassics(plain, "f16", 8, (model) => model.prefill([5]))).rejects.toThrow("shader-f16");
  plain.destroy();
}, LONG);

test("a NaN weight is named and nothing stays allocated", async () => {
  const dir = join(root, "nan");
  await writeTinyCheckpoint(dir, {
    config: AWKWARD,
    dtype: "F16",
    seed: 3,
    inject: { tensor: "h.1.mlp.c_fc.weight", element: 65 },
  });
  const before = gpu.memory.bytes("weights");
  const error = await loadModel(gpu, dir, { context: 8, elem: "f32" }).catch((e) => e);
  expect(error).toBeInstanceOf(ModelError);
  expect(error.message).toContain("h.1.mlp.c_fc.weight");
  expect(gpu.memory.bytes("weights")).toBe(before);
}, LONG);
