import { describe, test } from "bun:test";
import {
  packToken,
  type PositionPlace,
  positionRows,
  type RowRange,
  TOKEN_BYTES,
  tokenRows,
} from "../../src/kernels/embedding/embedding.ts";
import { embeddingReference } from "../../src/kernels/embedding/reference.ts";
import { GRID_FOLD } from "../../src/kernels/shared/shared.ts";
import { type Elem, op } from "../../src/runtime/kernel.ts";
import { expectClose, expectSame } from "../support/compare.ts";
import {
  eachElem,
  padRows,
  poison,
  rounded,
  runSteps,
  step,
  type Tensor,
  tensor,
  testDevice,
  thenNan,
} from "../support/device.ts";
import { normalArray, uniformArray } from "../support/random.ts";

const gpu = await testDevice();

interface Case {
  readonly elem: Elem;
  readonly width: number;
  readonly tokens: number;
  readonly vocab?: number;
  readonly positions?: number;
  /** Place of token t; t itself when left out. */
  readonly place?: (t: number) => PositionPlace;
  /** Rows at which the token table is cut. */
  readonly wteCuts?: readonly number[];
  readonly wpeCuts?: readonly number[];
}

function pieces(rows: number, cuts: readonly number[]): RowRange[] {
  const edges = [0, ...cuts, rows];
  return edges.slice(1).map((end, i) => ({ first: edges[i]!, rows: end - edges[i]! }));
}

function packed(ids: Uint32Array, places: readonly PositionPlace[]): Uint32Array {
  const bytes = new DataView(new ArrayBuffer(TOKEN_BYTES * ids.length));
  places.forEach((place, t) => packToken(bytes, t, ids[t]!, place));
  return new Uint32Array(bytes.buffer);
}

async function runEmbedding(c: Case) {
  const { elem, width, tokens, vocab = 101, wteCuts = [], wpeCuts = [] } = c;
  const stride = 4 * Math.ceil(width / 4);
  const places = Array.from({ length: tokens }, (_, t) => c.place?.(t) ?? { place: t, weight: 0 });
  const positions = c.positions ?? tokens;
  const wte = rounded(normalArray(1, vocab * width), elem);
  const wpe = rounded(normalArray(2, positions * width), elem);
  const ids = Uint32Array.from(uniformArray(3, tokens, 0, vocab));
  // Both sides of every cut, and both ends of the table.
  [0, vocab - 1, ...wteCuts.flatMap((cut) => [cut - 1, cut])].forEach((id, t) => {
    if (t < tokens) ids[t] = id;
  });

  const tensors: Record<string, Tensor> = {
    tokens: tensor("u32", packed(ids, places)),
    x: poison("f32", tokens * stride),
  };
  const dispatches = (kernel: typeof tokenRows, name: string, data: Float32Array, ranges: RowRange[]) =>
    ranges.map((piece) => {
      const { first, rows } = piece;
      const held = padRows(data.subarray(first * width, (first + rows) * width), width);
      tensors[`${name}_${first}`] = tensor(elem, thenNan(held, stride));
      return step(op(kernel, { elem, width4: stride / 4 }), { tokens, piece }, { rows: `${name}_${first}` });
    });
  const steps = [
    ...dispatches(tokenRows, "wte", wte, pieces(vocab, wteCuts)),
    ...dispatches(positionRows, "wpe", wpe, pieces(positions, wpeCuts)),
  ];
  const { x } = await runSteps(gpu, steps, tensors, ["x"]);
  return { x, wanted: padRows(embeddingReference(ids, places, wte, wpe, width), width) };
}

/** Checks that `x` is the f32 sum of the two rows: one rounding, so exactly. */
async function checkExact(c: Case): Promise<void> {
  const { x, wanted } = await runEmbedding(c);
  expectSame(x, Float32Array.from(wanted));
}

/** Rows between two: a handful of roundings of numbers below 8, whichever piece the two are in. */
async function checkBetween(c: Case): Promise<void> {
  const { x, wanted } = await runEmbedding(c);
  const options = { kernel: "embedding between rows", elem: c.elem, stored: "f32", magnitude: 8 } as const;
  expectClose(x, wanted, Float32Array.from(wanted), options);
}

describe("embedding", () => {
  eachElem(gpu, (elem) => {
    for (const tokens of [1, 63, 64, 65, 97, 257, 1025]) {
      test(`${elem} tokens=${tokens} is the exact sum`, () => checkExact({ elem, width: 10, tokens }));
    }
    for (const width of [1, 4, 257, 768]) {
      test(`${elem} width=${width} is the exact sum`, () => checkExact({ elem, width, tokens: 33 }));
    }
    test(`${elem} positions continue after those in the cache`, async () => {
      const after = (first: number) => (t: number) => ({ place: first + t, weight: 0 });
      await checkExact({ elem, width: 10, tokens: 1, positions: 1001, place: after(1000) });
      await checkExact({ elem, width: 10, tokens: 65, positions: 322, place: after(257) });
    });
    test(`${elem} tables in pieces give what whole ones give`, async () => {
      await checkExact({ elem, width: 10, tokens: 97, wteCuts: [1, 50], wpeCuts: [64] });
      const place = (t: number) => ({ place: (30 + t) % 97, weight: 0 });
      await checkExact({ elem, width: 10, tokens: 97, place, wteCuts: [37, 38, 100], wpeCuts: [7, 31] });
    });
    test(`${elem} places between rows mix the two, also across pieces`, async () => {
      const place = (t: number) => ({ place: Math.floor(t * 24 / 96), weight: t * 24 / 96 % 1 });
      const c = { elem, width: 10, tokens: 97, positions: 25, place };
      await checkBetween(c);
      await checkBetween({ ...c, wpeCuts: [1, 2, 12] });
    });
    for (const tokens of [GRID_FOLD, GRID_FOLD + 1, 2 * GRID_FOLD + 1]) {
      test(`${elem} tokens=${tokens} is the exact sum, over a folded grid`, () =>
        checkExact({ elem, width: 4, tokens }));
    }
  });
});
