/** Where keys and values lie, how a prompt is cut, what was saved between: none of it changes a result. */
import { afterAll, describe, expect, test } from "bun:test";
import { join } from "node:path";
import type { Gpt2 } from "../../src/model/gpt2.ts";
import { describePositions, type Positions } from "../../src/model/positions.ts";
import { referenceForward } from "../../src/model/reference.ts";
import { openSession, saveSession } from "../../src/model/session.ts";
import { openDevice } from "../../src/runtime/device.ts";
import type { Elem } from "../../src/runtime/kernel.ts";
import { maxAbsDifference } from "../support/accuracy.ts";
import { temporaryFolder, writeTinyCheckpoint } from "../support/checkpoint.ts";
import { eachElem, testDevice } from "../support/device.ts";
import { loadModel, logitTolerance, readReference, someIds } from "../support/model.ts";

const gpu = await testDevice();
const folder = temporaryFolder();
afterAll(folder.remove);

/** Sizes that nothing divides: head_dim 10 and width 30 are padded, an odd vocabulary. */
const AWKWARD = { nLayer: 2, nHead: 3, nEmbd: 30, nPositions: 4200, vocabSize: 101 };
const awkward = writeTinyCheckpoint(join(folder.path, "awkward"), { config: AWKWARD, dtype: "F16" }).dir;
const VOCAB = AWKWARD.vocabSize;

/** Every seventh block after the other: no two neighbours stay neighbours. */
function permutedTable(context: number): Uint32Array {
  const blocks = Math.ceil(context / 64);
  const step = [7, 5, 3].find((n) => blocks % n !== 0)!;
  return Uint32Array.from({ length: blocks }, (_, i) => (step * i + 2) % blocks);
}

/** The logits after a prompt, and after each of the tokens behind it. */
async function logitsOf(
  model: Gpt2,
  prompt: readonly number[],
  steps: readonly number[],
): Promise<Float32Array[]> {
  model.truncate(0);
  const rows = [await model.prefill(prompt)];
  for (const id of steps) rows.push(await model.decodeStep(id));
  return rows;
}

function expectSameBits(got: readonly Float32Array[], wanted: readonly Float32Array[]): void {
  expect(got.length).toBe(wanted.length);
  got.forEach((row, i) =>
    expect({ row: i, difference: maxAbsDifference(row, wanted[i]!) }).toEqual({ row: i, difference: 0 })
  );
}

describe("chunks", () => {
  eachElem(gpu, (elem) => {
    test(`of any length give the same bits in ${elem}`, async () => {
      const model = await loadModel(gpu, awkward, { context: 4200, elem, chunkTokens: 4150 });
      const prompt = someIds(4150, VOCAB);
      const whole = [await model.prefill(prompt), await model.decodeStep(3)];
      // A row's sums do not depend on the rows beside it. None of these leaves a rest so short that other kernels,
      // which add up in another order, would take it.
      for (const chunkTokens of [4096, 1000, 256]) {
        expect(prompt.length % chunkTokens).toBeGreaterThan(32);
        model.truncate(0);
        expectSameBits([await model.prefill(prompt, { chunkTokens }), await model.decodeStep(3)], whole);
      }
      model.destroy();
    });

    test(`so short that other kernels take them agree in ${elem}`, async () => {
      const model = await loadModel(gpu, awkward, { context: 2200, elem });
      const prompt = someIds(130, VOCAB);
      const whole = await model.prefill(prompt);
      // One token at the end goes the way of a decode step, 20 through small tiles.
      for (const chunkTokens of [129, 64, 20]) {
        model.truncate(0);
        const logits = await model.prefill(prompt, { chunkTokens });
        expect(maxAbsDifference(logits, whole)).toBeLessThan(logitTolerance(elem, whole));
      }
      model.destroy();
    });
  });
});

describe("the cache's layout", () => {
  const CONTEXT = 1100;
  const prompt = someIds(1000, VOCAB);
  // Over the end of a block.
  const steps = someIds(30, VOCAB);
  const wanted = new Map<Elem, Float32Array[]>();

  async function inOrder(elem: Elem): Promise<Float32Array[]> {
    const known = wanted.get(elem);
    if (known) return known;
    const model = await loadModel(gpu, awkward, { context: CONTEXT, elem });
    const rows = await logitsOf(model, prompt, steps);
    model.destroy();
    wanted.set(elem, rows);
    return rows;
  }

  eachElem(gpu, (elem) => {
    test(`in ${elem}: blocks in any order give the same bits`, async () => {
      const blockTable = permutedTable(CONTEXT);
      expect(blockTable.toSorted()).toEqual(Uint32Array.from(blockTable, (_, i) => i));
      const model = await loadModel(gpu, awkward, { context: CONTEXT, elem, blockTable });
      expectSameBits(await logitsOf(model, prompt, steps), await inOrder(elem));
      model.destroy();
    });

    // Heads take 54 KiB in f32 and 27 KiB in f16.
    for (
      const [buffers, kib] of [[2, { f32: 112, f16: 80 }[elem]], [3, { f32: 80, f16: 48 }[elem]]] as const
    ) {
      test(`in ${elem}: heads in ${buffers} buffers give the same bits, in order and not`, async () => {
        const small = await openDevice({ restrict: { maxBindingBytes: kib << 10 } });
        for (const table of [{}, { blockTable: permutedTable(CONTEXT) }]) {
          const model = await loadModel(small, awkward, { context: CONTEXT, elem, ...table });
          expect(model.plan.kv.ranges).toHaveLength(buffers);
          expectSameBits(await logitsOf(model, prompt, steps), await inOrder(elem));
          model.destroy();
        }
        small.destroy();
      });
    }
  });
});

describe("a session", () => {
  const CONTEXT = 300;
  const prompt = someIds(150, VOCAB);
  const steps = someIds(20, VOCAB);

  eachElem(gpu, (elem) => {
    test(`continues with the same bits in ${elem}, in whatever cache it is restored to`, async () => {
      const path = join(folder.path, `${elem}.session`);
      const first = await loadModel(gpu, awkward, { context: CONTEXT, elem });
      const logits = await first.prefill(prompt);
      await saveSession(path, {
        model: "awkward",
        positions: "exact",
        attention: "dense",
        ids: Uint32Array.from(prompt),
        logits,
        rows: first.cache,
      });
      const unstopped: Float32Array[] = [logits];
      for (const id of steps) unstopped.push(await first.decodeStep(id));
      // The same beginning, then something else.
      const [common, rest] = [100, someIds(50, VOCAB).reverse()];
      first.truncate(common);
      const branch = await first.prefill(rest);
      first.destroy();

      const small = await openDevice({ restrict: { maxBindingBytes: 40 << 10 } });
      const session = (await openSession(path))!;
      expect(session.ids).toEqual(Uint32Array.from(prompt));
      for (
        const [device, table] of [
          [gpu, {}],
          [gpu, { blockTable: permutedTable(CONTEXT) }],
          [small, { blockTable: Uint32Array.of(4, 3, 1, 2, 0) }],
        ] as const
      ) {
        const model = await loadModel(device, awkward, { context: CONTEXT, elem, ...table });
        await session.restore(model.cache, prompt.length);
        model.cache.adopt(prompt.length);
        const continued: Float32Array[] = [await session.logits()];
        for (const id of steps) continued.push(await model.decodeStep(id));
        expectSameBits(continued, unstopped);

        model.truncate(0);
        await session.restore(model.cache, common);
        model.cache.adopt(common);
        expectSameBits([await model.prefill(rest)], [branch]);
        model.destroy();
      }
      await session.close();
      small.destroy();
    });
  });
});

describe("positions beyond the table", () => {
  // 12 columns in three heads; 600 rows of positions are 28 KB in f32.
  const sizes = { nLayer: 2, nHead: 3, nEmbd: 12, nPositions: 600, vocabSize: VOCAB };
  const dir =
    writeTinyCheckpoint(join(folder.path, "positions"), { config: sizes, dtype: "F16", seed: 4 }).dir;
  const LENGTH = 700;
  const prompt = someIds(LENGTH, VOCAB);
  const modes: readonly Positions[] = [
    { mode: "interpolate", nPositions: 600, context: LENGTH },
    { mode: "repeat", nPositions: 600, context: LENGTH },
  ];

  for (const positions of modes) {
    let reference: Promise<Float64Array> | undefined;
    const computed = async () => {
      const { config, parameters } = await readReference(dir);
      return referenceForward(parameters, config, prompt, positions).logits;
    };
    eachElem(gpu, (elem) => {
      test(`${describePositions(positions, LENGTH)}: logits equal the CPU reference's in ${elem}`, async () => {
        const logits = await (reference ??= computed());
        // The table in one piece and in several, whose ends are between two rows that are mixed.
        const small = await openDevice({ restrict: { maxBindingBytes: 12 << 10 } });
        for (const device of [gpu, small]) {
          const model = await loadModel(device, dir, { context: LENGTH, elem, positions, scoring: true });
          const pieces = model.plan.buffers.filter(({ label }) => label.startsWith("wpe"));
          expect(pieces).toHaveLength(device === gpu ? 1 : { f32: 3, f16: 2 }[elem]);
          let rows = 0;
          await model.prefill(prompt.slice(0, LENGTH - 1), {
            onLogits: (token, row) => {
              const wanted = logits.subarray(token * VOCAB, (token + 1) * VOCAB);
              expect(maxAbsDifference(row, wanted)).toBeLessThan(logitTolerance(elem, wanted));
              rows++;
            },
          });
          expect(rows).toBe(LENGTH - 1);
          const last = logits.subarray((LENGTH - 1) * VOCAB);
          const stepped = await model.decodeStep(prompt.at(-1)!);
          expect(maxAbsDifference(stepped, last)).toBeLessThan(logitTolerance(elem, last));
          model.destroy();
        }
        small.destroy();
      });
    });
  }
});
