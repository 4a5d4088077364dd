import { afterAll, describe, test } from "bun:test";
import {
  ATTENTION_ROWS,
  attentionCandidates,
  type AttentionWalk,
  type FlashAttentionProblem,
} from "../../src/kernels/flash_attention/flash_attention.ts";
import { attentionReference } from "../../src/kernels/flash_attention/reference.ts";
import { KV_BLOCK } from "../../src/kernels/shared/shared.ts";
import { packLists } from "../../src/kvcache/block_lists.ts";
import type { BlockLists } from "../../src/kvcache/patterns.ts";
import type { Elem, Op } from "../../src/runtime/kernel.ts";
import {
  type AttentionInputs,
  attentionMagnitude,
  type AttentionShape,
  headRanges,
  listsWhere,
  nextGroup,
  type Pack,
  packBranches,
  packCache,
  packDocuments,
  packQueries,
  packSegments,
  plainAttention,
  randomInputs,
  scrambledTable,
  seenBy,
  seenInPack,
  type Sees,
  type Segment,
  shapeOf,
} from "../support/attention.ts";
import { expectClose, expectSame, expectTenIdenticalRuns, reportErrors } from "../support/compare.ts";
import {
  attentionOps,
  eachElem,
  padRows,
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
import { normalArray, uniformArray } from "../support/random.ts";

const gpu = await testDevice();

interface Case {
  readonly attention: Op<FlashAttentionProblem>;
  readonly elem: Elem;
  /** For kernels that walk lists: those of the heads for so many blocks of queries; every block when left out. */
  readonly lists?: (heads: number, rows: number) => readonly BlockLists[];
  /** For kernels over packs: those of all queries; one over everything when left out. */
  readonly segments?: readonly Segment[];
}

/** The lists of a case over a shape, which sees every block unless the case says otherwise. */
function listsOf({ lists }: Case, { heads, qLen, firstPosition }: AttentionShape): readonly BlockLists[] {
  const rows = Math.ceil((firstPosition + qLen) / KV_BLOCK);
  return lists ? lists(heads, rows) : listsWhere(heads, rows, () => true);
}

function segmentsOf({ segments }: Case, { qLen }: AttentionShape): readonly Segment[] {
  const everything = { sharedFirst: 0, sharedEnd: 0, ownFirst: 0, start: 0 };
  return segments ?? new Array<Segment>(qLen).fill(everything);
}

function seesOf(c: Case, shape: AttentionShape): Sees {
  return c.segments ? seenInPack(c.segments, shape.firstPosition) : seenBy(listsOf(c, shape));
}

/** Runs with NaN wherever the kernel has no business: keys past the last, rows past `qLen`, the K and V of `qkv`. */
async function runAttention(
  c: Case,
  { q, k, v }: AttentionInputs,
  shape: AttentionShape,
  splitHeads = false,
): Promise<Float32Array> {
  const { attention, elem } = c;
  const { heads, headDim, qLen, firstPosition, scale } = shape;
  const stride = 4 * Math.ceil(headDim / 4);
  const table = scrambledTable(firstPosition + qLen);
  const tensors: Record<string, Tensor> = {
    qkv: tensor(elem, thenNan(packQueries(q, shape), ATTENTION_ROWS * 3 * heads * stride)),
    block_table: tensor("u32", table),
    block_lists: tensor("u32", packLists(listsOf(c, shape))),
    segments: tensor("u32", packSegments(segmentsOf(c, shape))),
    out: poison(elem, qLen * heads * stride),
  };
  const steps = headRanges(heads, splitHeads).map((range) => {
    const names = { k: `k${range.first}`, v: `v${range.first}` };
    tensors[names.k] = tensor(elem, packCache(k, shape, table, range));
    tensors[names.v] = tensor(elem, packCache(v, shape, table, range));
    return step(attention, { qLen, firstPosition, blocks: table.length, range, scale }, names);
  });
  const { out } = await runSteps(gpu, steps, tensors, ["out"]);
  return out;
}

/**
 * @param hard whether scores are so large that their rounding decides the weights
 * @param poisoned what the kernel is given: the same with NaN where it has no business
 */
async function checkAttention(
  c: Case,
  shape: AttentionShape,
  given = randomInputs(shape, c.elem, shape.qLen),
  hard = false,
  poisoned = given,
): Promise<void> {
  const { heads, headDim } = shape;
  const sees = seesOf(c, shape);
  const wanted = padRows(attentionReference(given.q, given.k, given.v, shape, sees), headDim);
  const plain = padRows(plainAttention(given, shape, sees), headDim);
  expectClose(await runAttention(c, poisoned, shape), wanted, plain, {
    kernel: c.attention.kernel.name + (hard ? ", large scores" : ""),
    elem: c.elem,
    stored: c.elem,
    magnitude: attentionMagnitude(given, shape, hard),
    rowLength: heads * 4 * Math.ceil(headDim / 4),
  });
}

/** The queries from `from` up to `to`, at positions that begin at 0, and the keys that they may see. */
function chunkOf({ q, k, v }: AttentionInputs, shape: AttentionShape, from: number, to: number) {
  const { heads, headDim } = shape;
  const rows = (all: ArrayLike<number>, first: number) =>
    Array.from(all).slice(first * heads * headDim, to * heads * headDim);
  const given = { q: rows(q, from), k: rows(k, 0), v: rows(v, 0) };
  return { given, shape: { ...shape, qLen: to - from, firstPosition: from } };
}

/** Runs a prompt in two chunks. */
async function runCut(
  c: Case,
  given: AttentionInputs,
  shape: AttentionShape,
  cut: number,
): Promise<Float32Array> {
  const parts = [[0, cut], [cut, shape.qLen]].map(([from, to]) => chunkOf(given, shape, from!, to!));
  const [a, b] = await Promise.all(parts.map((part) => runAttention(c, part.given, part.shape)));
  return Float32Array.from([...a!, ...b!]);
}

function shapeOfPack({ segments, firstPosition }: Pack, heads: number, headDim: number): AttentionShape {
  return shapeOf(heads, headDim, segments.length, firstPosition);
}

/** NaN for keys and values at the places that `isUsed` refuses, and for queries there. */
function poisonUnused(
  given: AttentionInputs,
  { heads, headDim, firstPosition }: AttentionShape,
  isUsed: (place: number) => boolean,
): AttentionInputs {
  const width = heads * headDim;
  const only = (rows: ArrayLike<number>, first: number) =>
    Array.from(rows, (x, i) => isUsed(first + Math.floor(i / width)) ? x : NaN);
  return { q: only(given.q, firstPosition), k: only(given.k, 0), v: only(given.v, 0) };
}

/** Inputs with NaN for every key that no query of the pack sees. */
function poisonUnseen(given: AttentionInputs, shape: AttentionShape, { segments }: Pack): AttentionInputs {
  const { firstPosition } = shape;
  const seen = new Set<number>();
  segments.forEach(({ sharedFirst, sharedEnd, start }, i) => {
    for (let key = sharedFirst; key < sharedEnd; key++) seen.add(key);
    for (let key = start; key <= firstPosition + i; key++) seen.add(key);
  });
  return poisonUnused(given, shape, (place) => seen.has(place));
}

/** Branches of one document of a length that is cut by a block's end, or by a tile's, or by neither. */
const BRANCHES = [1, 64, 100, 200].map((length) =>
  packBranches([{ first: 64, end: 64 + length, branches: [1, 5, 2, 4, 3, 70, 2, 5] }])
);
/** Branches of two documents in one call, a third document of the cache having none. */
const TWO_DOCUMENTS = packBranches([
  { first: 256, end: 353, branches: [3, 1, 2] },
  { first: 0, end: 65, branches: [2, 5, 4, 100, 1] },
]);

describe("flash_attention", () => {
  afterAll(reportErrors);
  eachElem(gpu, (elem) => {
    for (const [heads, headDim] of [[1, 4], [3, 8], [5, 6], [3, 64], [1, 80], [1, 128]] as const) {
      const headDim4 = Math.ceil(headDim / 4);
      const candidates = (unroll: boolean) => attentionCandidates(elem, heads, headDim4, unroll);
      const sparse = (unroll: boolean) => attentionCandidates(elem, heads, headDim4, unroll, "lists");
      const packed = (unroll: boolean) => attentionCandidates(elem, heads, headDim4, unroll, "segments");
      // The size of heads has nothing to do with which blocks are walked: two of them are enough for lists.
      const walks = [6, 64].includes(headDim) ? [candidates, sparse] : [candidates];
      const chosen = walks.flatMap((some) => attentionOps(gpu, some, headDim4));
      if (headDim === 64) {
        // Wide heads take long to compile on software Vulkan: it gets the kernel that models run there.
        const ops = attentionOps(gpu, packed, headDim4);
        chosen.push(...(gpu.caps.isSoftware ? ops.slice(0, 1) : ops));
      }
      for (const attention of chosen) {
        test(`${titleOf(attention)} matches the f64 reference`, async () => {
          const c = { attention, elem };
          for (const qLen of [1, 33, 65]) await checkAttention(c, shapeOf(heads, headDim, qLen, 0));
          await checkAttention(c, shapeOf(heads, headDim, 1, 64));
          // Packs begin where blocks do.
          const first = attention.kernel.name.includes("packed") ? 128 : 97;
          await checkAttention(c, shapeOf(heads, headDim, 31, first));
        });
      }
    }

    const casesOf = (headDim: number, walk: AttentionWalk): Case[] =>
      runnable(gpu, attentionCandidates(elem, 3, headDim / 4, false, walk))
        .map((attention) => ({ attention, elem }));
    const matrixOf = (walk: AttentionWalk) =>
      casesOf(64, walk).filter(({ attention }) => attention.kernel.name.endsWith("subgroup_matrix"));
    /** All kernels of a walk, with the size of heads that they are tested with where it is not about that. */
    const sizedOf = (walk: AttentionWalk) => [
      ...matrixOf(walk).map((c) => ({ c, headDim: 64 })),
      ...casesOf(8, walk).map((c) => ({ c, headDim: 8 })),
      ...casesOf(32, walk)
        .filter(({ attention }) => attention.kernel.name.endsWith("register_tiled"))
        .map((c) => ({ c, headDim: 32 })),
    ];
    const small = casesOf(8, "all");
    const matrix = matrixOf("all");
    for (const { c, headDim } of [...sizedOf("all"), ...sizedOf("lists")]) {
      const title = titleOf(c.attention);
      test(`${title} matches the f64 reference for awkward numbers of queries`, async () => {
        for (const qLen of [1, 2, 7, 8, 9, 63, 64, 65, 97, 127, 128, 129, 257]) {
          await checkAttention(c, shapeOf(3, headDim, qLen, 0));
        }
      });
      test(`${title} matches the f64 reference for chunks that continue a cache`, async () => {
        for (const [qLen, first] of [[1, 1], [1, 1024], [63, 64], [64, 63], [65, 1000]] as const) {
          await checkAttention(c, shapeOf(3, headDim, qLen, first));
        }
      });
      test(`${title}: heads in two buffers give the same bits`, async () => {
        const shape = shapeOf(3, headDim, 97, 65);
        const given = randomInputs(shape, elem, 1);
        expectSame(await runAttention(c, given, shape, true), await runAttention(c, given, shape));
      });
      test(`${title}: ten runs are bit-identical`, async () => {
        const shape = shapeOf(3, headDim, 257, 65);
        const given = randomInputs(shape, elem, 1);
        await expectTenIdenticalRuns(() => runAttention(c, given, shape));
      });
    }
    const dense = sizedOf("all");
    for (const [i, { c, headDim }] of sizedOf("lists").entries()) {
      const title = titleOf(c.attention);
      test(`${title}: a list of every block gives the bits of dense attention`, async () => {
        const other = dense[i]!;
        for (const [qLen, first] of [[1, 0], [65, 0], [257, 0], [1, 64], [31, 97], [130, 127]] as const) {
          const shape = shapeOf(3, headDim, qLen, first);
          const given = randomInputs(shape, elem, qLen);
          expectSame(await runAttention(c, given, shape), await runAttention(other.c, given, shape));
        }
      });
      test(`${title} matches the f64 reference with random masks, other ones for each head`, async () => {
        for (const share of [0.8, 0.4, 0.1]) {
          const kept = uniformArray(100 * share, 3 * 64 * 64, 0, 1);
          const lists = (heads: number, rows: number) =>
            listsWhere(heads, rows, (head, row, block) => kept[(head * 64 + row) * 64 + block]! < share);
          for (
            const [qLen, first] of [[1, 0], [63, 0], [65, 0], [129, 0], [400, 0], [1, 640], [64, 64], [
              257,
              97,
            ]] as const
          ) {
            await checkAttention({ ...c, lists }, shapeOf(3, headDim, qLen, first));
          }
        }
      });
      test(`${title}: queries that see nothing get zeros`, async () => {
        const lists = (heads: number, rows: number) =>
          listsWhere(heads, rows, (head, row) => (row + head) % 2 === 0);
        for (const [qLen, first] of [[1, 0], [1, 64], [300, 0], [200, 31]] as const) {
          await checkAttention({ ...c, lists }, shapeOf(3, headDim, qLen, first));
        }
        const shape = shapeOf(3, headDim, 200, 31);
        const none = { ...c, lists: (heads: number, rows: number) => listsWhere(heads, rows, () => false) };
        const out = await runAttention(none, randomInputs(shape, elem, 1), shape);
        expectSame(out, new Float32Array(out.length));
      });
      test(`${title}: a cut into chunks changes no bit`, async () => {
        const shape = shapeOf(3, headDim, 300, 0);
        const given = randomInputs(shape, elem, 5);
        const lists = (heads: number, rows: number) =>
          listsWhere(heads, rows, (head, row, block) => (row + block + head) % 3 !== 0);
        const whole = await runAttention({ ...c, lists }, given, shape);
        for (const cut of [1, 37, 64, 100, 256]) {
          expectSame(await runCut({ ...c, lists }, given, shape, cut), whole);
        }
      });
    }
    const sparse = sizedOf("lists");
    for (const [i, { c, headDim }] of sizedOf("segments").entries()) {
      const title = titleOf(c.attention);
      const width = 3 * headDim;
      test(`${title}: one segment over everything gives the bits of the other walks over everything`, async () => {
        for (const [qLen, first] of [[1, 0], [65, 0], [257, 0], [1, 64], [130, 128]] as const) {
          const shape = shapeOf(3, headDim, qLen, first);
          const given = randomInputs(shape, elem, qLen);
          const got = await runAttention(c, given, shape);
          for (const other of [dense[i]!, sparse[i]!]) {
            expectSame(got, await runAttention(other.c, given, shape));
          }
        }
      });
      test(`${title} matches the f64 reference for documents of awkward lengths`, async () => {
        for (const first of [0, 128]) {
          const pack = packDocuments([1, 63, 64, 65, 97, 2, 130], first);
          const shape = shapeOfPack(pack, 3, headDim);
          const given = randomInputs(shape, elem, 2);
          const poisoned = poisonUnseen(given, shape, pack);
          await checkAttention({ ...c, segments: pack.segments }, shape, given, false, poisoned);
        }
      });
      test(`${title}: a document has the same bits alone, elsewhere and among documents of NaN`, async () => {
        const lengths = [65, 1, 130, 64, 97];
        const pack = packDocuments(lengths);
        const shape = shapeOfPack(pack, 3, headDim);
        const given = randomInputs(shape, elem, 1);
        const all = await runAttention({ ...c, segments: pack.segments }, given, shape);
        for (const [d, length] of lengths.entries()) {
          const place = pack.places[d]!;
          const rows = (from: ArrayLike<number>, first: number) =>
            Array.from(from).slice(first * width, (first + length) * width);
          const own = { q: rows(given.q, place), k: rows(given.k, place), v: rows(given.v, place) };
          const wanted = rows(all, place);

          expectSame(await runAttention(c, own, shapeOf(3, headDim, length, 0)), wanted);

          const inNan = poisonUnused(given, shape, (p) => place <= p && p < nextGroup(place + length));
          const amongNan = await runAttention({ ...c, segments: pack.segments }, inNan, shape);
          expectSame(rows(amongNan, place), wanted);

          const moved = packDocuments([70, 200, length, 3]);
          const movedShape = shapeOfPack(moved, 3, headDim);
          const others = randomInputs(movedShape, elem, 7);
          const there = moved.places[2]!;
          const among = (from: ArrayLike<number>, mine: readonly number[]) =>
            Array.from(from, (x, at) => mine[at - there * width] ?? x);
          const elsewhere = await runAttention(
            { ...c, segments: moved.segments },
            { q: among(others.q, own.q), k: among(others.k, own.k), v: among(others.v, own.v) },
            movedShape,
          );
          expectSame(rows(elsewhere, there), wanted);
        }
      });
      test(`${title} matches the f64 reference for branches of cached documents`, async () => {
        for (const pack of [...BRANCHES, TWO_DOCUMENTS]) {
          const shape = shapeOfPack(pack, 3, headDim);
          const given = randomInputs(shape, elem, 1);
          const poisoned = poisonUnseen(given, shape, pack);
          await checkAttention({ ...c, segments: pack.segments }, shape, given, false, poisoned);
        }
      });
      test(`${title}: a cut into chunks changes no bit`, async () => {
        const shape = shapeOf(3, headDim, 300, 0);
        const given = randomInputs(shape, elem, 5);
        const whole = await runAttention(c, given, shape);
        for (const cut of [64, 128, 256]) expectSame(await runCut(c, given, shape, cut), whole);
      });
      test(`${title}: ten runs are bit-identical`, async () => {
        const shape = shapeOfPack(TWO_DOCUMENTS, 3, headDim);
        const given = randomInputs(shape, elem, 1);
        await expectTenIdenticalRuns(() =>
          runAttention({ ...c, segments: TWO_DOCUMENTS.segments }, given, shape)
        );
      });
    }
    if (elem === "f16") {
      const skipped = matrix.length === 0 ? ": needs subgroup matrices" : "";
      test.skipIf(skipped !== "")(
        `tensor cores rescale their output where scores grow${skipped}`,
        async () => {
          const branches = BRANCHES.at(-1)!;
          const packed = matrixOf("segments").map((c) => ({ ...c, segments: branches.segments }));
          for (
            const [cases, shape] of [
              [[...matrix, ...matrixOf("lists")], shapeOf(3, 64, 257, 130)],
              [packed, shapeOfPack(branches, 3, 64)],
            ] as const
          ) {
            const { q, v } = randomInputs(shape, elem, 3);
            const noise = normalArray(2, v.length, 0, 0.1);
            for (const slope of [0.02, -0.02, 0.5, -0.5, 3, -3]) {
              const along = (length: number, value: (row: number) => number) =>
                rounded(
                  noise.subarray(0, length).map((x, i) => i % 64 ? x : value(Math.floor(i / 192))),
                  elem,
                );
              const given = { q: along(q.length, () => 8), k: along(v.length, (j) => j * slope), v };
              for (const c of cases) await checkAttention(c, shape, given, true);
            }
          }
        },
      );
    }
    test(`${elem} n=1025 matches the f64 reference`, async () => {
      for (const c of small) await checkAttention(c, shapeOf(3, 8, 1025, 0));
    });

    test(`${elem} scores that grow along the keys match: every group of keys rescales the output`, async () => {
      const shape = shapeOf(3, 8, 257, 0);
      const width = 24;
      const { v } = randomInputs(shape, elem, 3);
      const noise = normalArray(2, 257 * width, 0, 0.1);
      for (const slope of [0.01, -0.01, 0.5, -0.5, 3, -3]) {
        // Queries and keys point along the first axis, and the score of key j is j · slope.
        const along = (value: (row: number) => number) =>
          rounded(noise.map((x, i) => i % 8 ? x : value(Math.floor(i / width))), elem);
        const given = { q: along(() => Math.sqrt(8)), k: along((j) => j * slope), v };
        for (const c of small) await checkAttention(c, shape, given, true);
      }
    });

    test(`${elem} scores of 1e4 and -1e4 match, without overflow`, async () => {
      const shape = shapeOf(3, 8, 129, 0);
      const { v } = randomInputs(shape, elem, 1);
      const q = rounded(uniformArray(2, 129 * 24, -100, 100), elem);
      const k = rounded(uniformArray(3, 129 * 24, -100, 100), elem);
      for (const c of small) await checkAttention(c, shape, { q, k, v }, true);
      // All alike and far from zero: the maximum must be subtracted before the exponential.
      for (const sign of [1, -1]) {
        const constant = rounded(new Float64Array(129 * 24).fill(59.5), elem);
        const given = { q: constant.map((x) => sign * x), k: constant, v };
        for (const c of small) await checkAttention(c, shape, given, true);
      }
    });

    test(`${elem} equal scores give the mean of the values`, async () => {
      const shape = shapeOf(3, 8, 257, 0);
      const { k, v } = randomInputs(shape, elem, 1);
      const given = { q: new Float32Array(257 * 24), k, v };
      for (const c of small) await checkAttention(c, shape, given);
    });
  });
});
