import { afterAll, describe, test } from "bun:test";
import type { RowRange } from "../../src/kernels/embedding/embedding.ts";
import {
  type LmHeadProblem,
  manyRowsCandidates,
  oneRowCandidates,
} from "../../src/kernels/lm_head/lm_head.ts";
import { lmHeadReference } from "../../src/kernels/lm_head/reference.ts";
import type { Elem, Op } from "../../src/runtime/kernel.ts";
import { expectClose, expectTenIdenticalRuns, reportErrors } from "../support/compare.ts";
import {
  eachElem,
  poison,
  rounded,
  runnable,
  runSteps,
  step,
  type Tensor,
  tensor,
  testDevice,
  thenNan,
  titleOf,
} from "../support/device.ts";
import { normalArray } from "../support/random.ts";

const gpu = await testDevice();

interface Size {
  readonly rows: number;
  readonly inner: number;
  readonly vocab: number;
}

function inputs(elem: Elem, { rows, inner, vocab }: Size) {
  return {
    x: rounded(normalArray(1, rows * inner, 0, 4), "f32"),
    head: rounded(normalArray(2, vocab * inner, 0, 0.2), elem),
  };
}

/** Dot products with running f32 sums. */
function plainLmHead(x: Float32Array, head: Float32Array, inner: number): Float32Array {
  const { fround } = Math;
  const vocab = head.length / inner;
  return Float32Array.from({ length: x.length / inner * vocab }, (_, i) => {
    const row = Math.floor(i / vocab) * inner;
    const token = i % vocab * inner;
    let sum = 0;
    for (let c = 0; c < inner; c++) sum = fround(sum + fround(x[row + c]! * head[token + c]!));
    return sum;
  });
}

interface Case {
  readonly lmHead: Op<LmHeadProblem>;
  readonly elem: Elem;
}

async function runLmHead(
  c: Case,
  size: Size,
  { x, head }: ReturnType<typeof inputs>,
  cuts: readonly number[] = [],
): Promise<Float32Array> {
  const { rows, inner, vocab } = size;
  const edges = [0, ...cuts, vocab];
  const tensors: Record<string, Tensor> = {
    x: tensor("f32", thenNan(x, 8 * inner)),
    logits: poison("f32", rows * vocab),
  };
  const steps = edges.slice(1).map((end, i) => {
    const piece: RowRange = { first: edges[i]!, rows: end - edges[i]! };
    const w = head.subarray(piece.first * inner, end * inner);
    tensors[`w_${i}`] = tensor(c.elem, thenNan(w, 8 * inner));
    return step(c.lmHead, { rows, inner, vocab, piece }, { w: `w_${i}` });
  });
  return (await runSteps(gpu, steps, tensors, ["logits"])).logits;
}

async function checkLmHead(c: Case, size: Size, cuts: readonly number[] = []): Promise<void> {
  const { elem } = c;
  const given = inputs(elem, size);
  const { x, head } = given;
  const absolute = lmHeadReference(x.map(Math.abs), head.map(Math.abs), size.inner);
  expectClose(
    await runLmHead(c, size, given, cuts),
    lmHeadReference(x, head, size.inner),
    plainLmHead(x, head, size.inner),
    {
      kernel: c.lmHead.kernel.name,
      elem,
      stored: "f32",
      magnitude: absolute.reduce((a, b) => Math.max(a, b), 0),
    },
  );
}

describe("lm_head", () => {
  afterAll(reportErrors);
  eachElem(gpu, (elem) => {
    const candidates = [
      ...oneRowCandidates(elem),
      ...manyRowsCandidates(elem, false),
      ...manyRowsCandidates(elem, true).filter(({ variant }) => "unroll" in variant),
    ];
    for (const lmHead of runnable(gpu, candidates)) {
      const title = titleOf(lmHead);
      const c = { lmHead, elem };
      test(`${title} matches the f64 reference for vocabularies of awkward sizes`, async () => {
        for (const vocab of [1, 7, 8, 63, 64, 65, 97, 257, 1025]) {
          await checkLmHead(c, { rows: 1, inner: 20, vocab });
        }
      });
      test(`${title} matches the f64 reference for rows and widths of awkward sizes`, async () => {
        for (const rows of [1, 7, 8, 9, 63, 64, 65, 97, 257]) {
          await checkLmHead(c, { rows, inner: 20, vocab: 65 });
        }
        for (const inner of [4, 60, 64, 68, 768]) await checkLmHead(c, { rows: 9, inner, vocab: 65 });
      });
      test(`${title} matches the f64 reference when the head is in pieces`, async () => {
        await checkLmHead(c, { rows: 1, inner: 68, vocab: 257 }, [1, 64, 65]);
        await checkLmHead(c, { rows: 9, inner: 68, vocab: 257 }, [100, 163]);
      });
      test(`${title} matches the f64 reference past a grid dimension's 65,535 tiles of tokens`, async () => {
        await checkLmHead(c, { rows: 1, inner: 4, vocab: 8 * 65_535 + 9 });
      });
      test(`${title}: ten runs are bit-identical`, async () => {
        const size = { rows: 9, inner: 192, vocab: 257 };
        await expectTenIdenticalRuns(() => runLmHead(c, size, inputs(elem, size), [97]));
      });
    }
  });
});
