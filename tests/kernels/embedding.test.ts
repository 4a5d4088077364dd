import { describe, test } from "bun:test";
import { embedding, type RowRange } from "../../src/kernels/embedding/embedding.ts";
import { embeddingReference } from "../../src/kernels/embedding/reference.ts";
import { GRID_FOLD } from "../../src/kernels/shared/shared.ts";
import { type Elem, op } from "../../src/runtime/kernel.ts";
import { expectSame } from "../support/compare.ts";
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
  readonly firstPosition?: number;
  readonly vocab?: number;
  /** Rows at which the token table is cut. */
  readonly wteCuts?: readonly number[];
  readonly wpeCuts?: readonly number[];
}

function pieces(rows: number, cuts: readonly number[]): RowRange[] {
  const edges = [0, ...cuts, rows];
  return edges.slice(1).map((end, i) => ({ first: edges[i]!, rows: end - edges[i]! }));
}

/** Checks that `x` is the f32 sum of the two rows: one rounding, so exactly. */
async function checkEmbedding(c: Case): Promise<void> {
  const { elem, width, tokens, firstPosition = 0, vocab = 101, wteCuts = [], wpeCuts = [] } = c;
  const stride = 4 * Math.ceil(width / 4);
  const positions = firstPosition + tokens;
  const wte = rounded(normalArray(1, vocab * width), elem);
  const wpe = rounded(normalArray(2, positions * width), elem);
  const ids = Uint32Array.from(uniformArray(3, tokens, 0, vocab));
  // Both sides of every cut, and both ends of the table.
  [0, vocab - 1, ...wteCuts.flatMap((cut) => [cut - 1, cut])].forEach((id, t) => {
    if (t < tokens) ids[t] = id;
  });

  const tensors: Record<string, Tensor> = {
    ids: tensor("u32", ids),
    x: poison("f32", tokens * stride),
  };
  const table = (name: string, data: Float32Array, { first, rows }: RowRange) => {
    const piece = padRows(data.subarray(first * width, (first + rows) * width), width);
    tensors[`${name}_${first}`] = tensor(elem, thenNan(piece, stride));
    return `${name}_${first}`;
  };
  const steps = pieces(vocab, wteCuts).flatMap((wteRows) =>
    pieces(positions, wpeCuts).map((wpeRows) =>
      step(
        op(embedding, { elem, width4: stride / 4 }),
        { tokens, firstPosition, wte: wteRows, wpe: wpeRows },
        {
          wte: table("wte", wte, wteRows),
          wpe: table("wpe", wpe, wpeRows),
        },
      )
    )
  );
  const { x } = await runSteps(gpu, steps, tensors, ["x"]);
  const wanted = embeddingReference(ids, wte, wpe, width, firstPosition);
  expectSame(x, Float32Array.from(padRows(wanted, width)));
}

describe("embedding", () => {
  eachElem(gpu, (elem) => {
    for (const tokens of [1, 63, 64, 65, 97, 257, 1025]) {
      test(`${elem} tokens=${tokens} is the exact sum`, () => checkEmbedding({ elem, width: 10, tokens }));
    }
    for (const width of [1, 4, 257, 768]) {
      test(`${elem} width=${width} is the exact sum`, () => checkEmbedding({ elem, width, tokens: 33 }));
    }
    test(`${elem} positions continue after those in the cache`, async () => {
      await checkEmbedding({ elem, width: 10, tokens: 1, firstPosition: 1000 });
      await checkEmbedding({ elem, width: 10, tokens: 65, firstPosition: 257 });
    });
    test(`${elem} tables in pieces give what whole ones give`, async () => {
      await checkEmbedding({ elem, width: 10, tokens: 97, wteCuts: [1, 50], wpeCuts: [64] });
      await checkEmbedding({
        elem,
        width: 10,
        tokens: 97,
        firstPosition: 30,
        wteCuts: [37, 38, 100],
        wpeCuts: [7, 31],
      });
    });
    for (const tokens of [GRID_FOLD, GRID_FOLD + 1, 2 * GRID_FOLD + 1]) {
      test(`${elem} tokens=${tokens} is the exact sum, over a folded grid`, () =>
        checkEmbedding({ elem, width: 4, tokens }));
    }
  });
});
