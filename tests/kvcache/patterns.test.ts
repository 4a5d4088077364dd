import { describe, expect, test } from "bun:test";
import {
  type BlockLists,
  blockLists,
  checkMask,
  type Csr,
  density,
  isStatic,
  keptBlocks,
  maskLists,
  parseMask,
  parsePattern,
  type Pattern,
  PATTERN_GRAMMAR,
  patternName,
  type StaticPattern,
} from "../../src/kvcache/patterns.ts";
import { InputError, UsageError } from "../../src/runtime/errors.ts";

const MOST_ROWS = 70;

function staticPattern(text: string): StaticPattern {
  const pattern = parsePattern(text);
  if (!isStatic(pattern)) throw new Error(`${text} has no lists`);
  return pattern;
}

function listsOf(text: string, rows: number): BlockLists {
  return blockLists(staticPattern(text), rows);
}

function rowOf({ indptr, indices }: Csr, row: number): number[] {
  return [...indices.subarray(indptr[row], indptr[row + 1])];
}

/** The columns of each row; fails unless the lists are well formed: ascending, causal, the diagonal apart. */
function rowsOf(lists: BlockLists): number[][] {
  const { rows, full, partial } = lists;
  for (const { indptr, indices } of [full, partial]) {
    expect(indptr.length).toBe(rows + 1);
    expect(indptr[0]).toBe(0);
    expect(indptr[rows]).toBe(indices.length);
  }
  expect(keptBlocks(lists)).toBe(full.indices.length + partial.indices.length);
  return Array.from({ length: rows }, (_, row) => {
    const whole = rowOf(full, row);
    const parts = rowOf(partial, row);
    if (whole.some((column, i) => column >= row || (i > 0 && column <= whole[i - 1]!))) {
      throw new Error(`Row ${row} has whole blocks ${whole}`);
    }
    if (parts.some((column) => column !== row) || parts.length > 1) {
      throw new Error(`Row ${row} has blocks in part ${parts}`);
    }
    return [...whole, ...parts];
  });
}

/** The causal columns for which `keeps` holds. */
function naiveRows(rows: number, keeps: (i: number, j: number) => boolean): number[][] {
  return Array.from(
    { length: rows },
    (_, i) => Array.from({ length: i + 1 }, (_, j) => j).filter((j) => keeps(i, j)),
  );
}

function isPowerOfTwo(n: number): boolean {
  return Number.isInteger(Math.log2(n));
}

const butterflyOf = (size: number) => (i: number, j: number) => {
  const difference = Math.floor(i / size) ^ Math.floor(j / size);
  return difference === 0 || isPowerOfTwo(difference);
};

const DEFINITIONS: readonly (readonly [string, (i: number, j: number) => boolean])[] = [
  ["dense", () => true],
  ["local:64", (i, j) => i === j],
  ["local:65", (i, j) => i - j < 2],
  ["local:128", (i, j) => i - j < 2],
  ["local:1k", (i, j) => i - j < 16],
  ["local:4096", (i, j) => i - j < 64],
  ["local:64k", () => true],
  ["sink:1+local:64", (i, j) => i === j || j === 0],
  ["sink:64+local:1024", (i, j) => i - j < 16 || j < 1],
  ["sink:129+local:100", (i, j) => i - j < 2 || j < 3],
  ["sink:64k+local:64", () => true],
  ["strided:64,64", () => true],
  ["strided:64,128", (i, j) => i === j || j % 2 === 0],
  ["strided:256,500", (i, j) => i - j < 4 || j % 8 === 0],
  ["strided:64,64k", (i, j) => i === j || j === 0],
  ["strided:128,448", (i, j) => i - j < 2 || j % 7 === 0],
  ["butterfly", butterflyOf(1)],
  ["butterfly:1", butterflyOf(1)],
  ["butterfly:65", butterflyOf(2)],
  ["butterfly:192", butterflyOf(3)],
  ["butterfly:1k", butterflyOf(16)],
  ["butterfly:64k", () => true],
];

describe("blockLists", () => {
  for (const [text, keeps] of DEFINITIONS) {
    test(`${text} keeps the blocks of its definition`, () => {
      const wanted = naiveRows(MOST_ROWS, keeps);
      for (let rows = 0; rows <= MOST_ROWS; rows++) {
        expect(rowsOf(listsOf(text, rows))).toEqual(wanted.slice(0, rows));
      }
    });
  }

  test("butterfly is the flat butterfly as drawn for 8 blocks", () => {
    expect(rowsOf(listsOf("butterfly", 8))).toEqual([
      [0],
      [0, 1],
      [0, 2],
      [1, 2, 3],
      [0, 4],
      [1, 4, 5],
      [2, 4, 6],
      [3, 5, 6, 7],
    ]);
  });

  test("a long context with a window takes time that grows with what is kept", () => {
    const starting = performance.now();
    const lists = listsOf("sink:64+local:1024", 16384);
    expect(performance.now() - starting).toBeLessThan(500);
    expect(keptBlocks(lists)).toBe(136 + 17 * (16384 - 16));
    expect(rowOf(lists.full, 16383)).toEqual([0, ...Array.from({ length: 15 }, (_, i) => 16368 + i)]);
  });
});

describe("bigbird", () => {
  const CASES: readonly (readonly [string, number, number, number])[] = [
    ["bigbird:64,64,64", 1, 1, 1],
    ["bigbird:64,192,192", 1, 3, 3],
    ["bigbird:1,65,129", 1, 2, 3],
    ["bigbird:320,128,1000,7", 5, 2, 16],
    ["bigbird:64,64,64k", 1, 1, 1024],
    ["bigbird:64k,64,64", 1024, 1, 1],
    ["bigbird:64,64k,64,4294967295", 1, 1024, 1],
  ];
  /** Columns that neither sink nor window keeps. */
  const drawnOf = (text: string, rows: number, sink: number, window: number) =>
    rowsOf(listsOf(text, rows)).map((row, i) => row.filter((j) => j >= sink && i - j >= window));

  for (const [text, sink, window, random] of CASES) {
    test(`${text} keeps sink and window, and draws as many blocks of the rest as it says`, () => {
      for (let rows = 0; rows <= MOST_ROWS; rows++) {
        rowsOf(listsOf(text, rows)).forEach((row, i) => {
          const kept = new Set(row);
          expect(kept.size).toBe(row.length);
          const fixed = naiveRows(i + 1, (i, j) => i - j < window || j < sink)[i]!;
          expect(fixed.every((column) => kept.has(column))).toBe(true);
          expect(row.length - fixed.length).toBe(Math.min(random, i + 1 - fixed.length));
        });
      }
    });
    test(`${text} draws the same again, however many rows there are`, () => {
      const all = rowsOf(listsOf(text, MOST_ROWS));
      for (let rows = 0; rows <= MOST_ROWS; rows++) {
        expect(rowsOf(listsOf(text, rows))).toEqual(all.slice(0, rows));
      }
    });
  }

  test("draws what the definition, written in Python, draws", () => {
    const lastRows = (text: string) => drawnOf(text, MOST_ROWS, 1, 1).slice(-3);
    expect(lastRows("bigbird:64,64,192")).toEqual([[38, 46, 56], [5, 10, 62], [8, 41, 66]]);
    expect(lastRows("bigbird:64,64,192,1")).toEqual([[23, 42, 59], [16, 20, 25], [34, 37, 55]]);
  });

  test("another seed draws other blocks, and no seed is seed 0", () => {
    const rows = (seed: string) => rowsOf(listsOf(`bigbird:64,64,192${seed}`, MOST_ROWS));
    expect(rows(",0")).toEqual(rows(""));
    const seeds = ["", ",1", ",2", ",2147483648", ",4294967295"].map((seed) => JSON.stringify(rows(seed)));
    expect(new Set(seeds).size).toBe(seeds.length);
  });

  test("rows draw apart from one another, each block about as often as any other", () => {
    // Row 65 of 4,000 seeds: 3 of 64 blocks each, a binomial count of deviation √(4000 · 3/64 · 61/64) = 13.4.
    const counts = new Array<number>(64).fill(0);
    const alike = new Map<string, number>();
    for (let seed = 0; seed < 4000; seed++) {
      const drawn = drawnOf(`bigbird:64,64,192,${seed}`, 66, 1, 1);
      for (const column of drawn[65]!) counts[column - 1]!++;
      const [a, b] = drawn.slice(-2).map((row) => row.join());
      if (a === b) alike.set(a!, (alike.get(a!) ?? 0) + 1);
    }
    for (const count of counts) expect(Math.abs(count - 187.5)).toBeLessThan(5 * 13.4);
    // One in C(64, 3) = 41,664 by chance.
    expect(alike.size).toBeLessThan(5);
  });
});

describe("density", () => {
  test("is the share of the causal blocks, of all lists together", () => {
    const sparse = listsOf("sink:64+local:1024", 1024);
    // Rows 0 to 15 keep all they have; the others the sink and 16 blocks.
    expect(keptBlocks(sparse)).toBe(16 * 17 / 2 + 1008 * 17);
    expect(density([sparse])).toBe(17272 / 524800);
    const dense = listsOf("dense", 1024);
    expect(density([dense])).toBe(1);
    expect(density([dense, sparse, sparse])).toBe((524800 + 2 * 17272) / (3 * 524800));
    expect(density([listsOf("local:64", 100)])).toBe(100 / 5050);
    expect(density([listsOf("butterfly", 8)])).toBe((8 + 3 * 8 / 2) / 36);
    expect(density([listsOf("dense", 10), listsOf("local:64", 5)])).toBe(60 / 70);
  });

  test("is 1 where there is nothing to keep", () => {
    expect(density([])).toBe(1);
    expect(density([listsOf("local:64", 0)])).toBe(1);
  });
});

describe("parsePattern", () => {
  const CASES: readonly (readonly [string, Pattern])[] = [
    ["dense", { kind: "dense" }],
    ["local:64", { kind: "local", window: 64 }],
    ["local:4k", { kind: "local", window: 4096 }],
    ["local:4K", { kind: "local", window: 4096 }],
    ["local:100", { kind: "local", window: 100 }],
    ["local:67108864", { kind: "local", window: 2 ** 26 }],
    ["sink:64+local:1024", { kind: "sink+local", sink: 64, window: 1024 }],
    ["sink:1+local:1k", { kind: "sink+local", sink: 1, window: 1024 }],
    ["strided:128,1k", { kind: "strided", window: 128, stride: 1024 }],
    ["bigbird:64,192,256", { kind: "bigbird", sink: 64, window: 192, random: 256, seed: 0 }],
    ["bigbird:64,192,1,0", { kind: "bigbird", sink: 64, window: 192, random: 1, seed: 0 }],
    ["bigbird:64,3k,64,4294967295", {
      kind: "bigbird",
      sink: 64,
      window: 3072,
      random: 64,
      seed: 2 ** 32 - 1,
    }],
    ["butterfly", { kind: "butterfly", block: 64 }],
    ["butterfly:64", { kind: "butterfly", block: 64 }],
    ["butterfly:100", { kind: "butterfly", block: 100 }],
    ["topk:256", { kind: "topk", keys: 256 }],
    ["topk:2k", { kind: "topk", keys: 2048 }],
    ["file:mask.json", { kind: "file", path: "mask.json" }],
    ["file:C:\\a b, c+d\\mask.json", { kind: "file", path: "C:\\a b, c+d\\mask.json" }],
    [" local:64\n", { kind: "local", window: 64 }],
  ];
  for (const [text, wanted] of CASES) {
    test(`${JSON.stringify(text)} is read, named and read back`, () => {
      const pattern = parsePattern(text);
      expect(pattern).toEqual(wanted);
      expect(parsePattern(patternName(pattern))).toEqual(wanted);
    });
  }

  test("names are short and have plain numbers", () => {
    const names = [
      "local:4k",
      "sink:1k+local:2k",
      "strided:1k,2k",
      "bigbird:1k,2k,3k,0",
      "bigbird:64,64,64,07",
    ]
      .concat("butterfly:64", "butterfly:1k", "topk:1k", "file:a", "dense")
      .map((text) => patternName(parsePattern(text)));
    expect(names).toEqual([
      "local:4096",
      "sink:1024+local:2048",
      "strided:1024,2048",
      "bigbird:1024,2048,3072",
      "bigbird:64,64,64,7",
      "butterfly",
      "butterfly:1024",
      "topk:1024",
      "file:a",
      "dense",
    ]);
  });

  test("topk and file have no lists of their own", () => {
    for (const [text, pattern] of CASES) {
      expect(isStatic(pattern)).toBe(!/^(topk|file)/.test(text));
    }
  });

  const NOT_TOKENS = "which is no number of tokens such as 4096 or 4k";
  const SMALL = "smaller than a block of 64 tokens";
  const REFUSED: readonly (readonly [string, string])[] = [
    ["", "is empty"],
    ["  ", "is empty"],
    ["dense:", "has a colon, and `dense` takes no sizes"],
    ["dense:64", "has a colon, and `dense` takes no sizes"],
    ["Dense", 'begins with "Dense", which names no pattern: names are in lower case'],
    ["LOCAL:64", 'begins with "LOCAL", which names no pattern: names are in lower case'],
    ["dence", 'begins with "dence", which names no pattern'],
    [":64", 'begins with "", which names no pattern'],
    ["+local:64", 'begins with "+local", which names no pattern'],
    ["constructor", 'begins with "constructor", which names no pattern'],
    ["local", "lacks W"],
    ["local:", "lacks W"],
    ["local:x", `has "x" for W, ${NOT_TOKENS}`],
    ["local:1e3", `has "1e3" for W, ${NOT_TOKENS}`],
    ["local:-64", `has "-64" for W, ${NOT_TOKENS}`],
    ["local:64.0", `has "64.0" for W, ${NOT_TOKENS}`],
    ["local:0x40", `has "0x40" for W, ${NOT_TOKENS}`],
    ["local:4m", `has "4m" for W, ${NOT_TOKENS}`],
    ["local: 64", `has " 64" for W, ${NOT_TOKENS}`],
    ["local:64+sink:64", `has "64+sink:64" for W, ${NOT_TOKENS}`],
    ["local:1,2", 'has "1,2" where W belongs'],
    ["local:32", `has 32 for W, ${SMALL}`],
    ["local:0", `has 0 for W, ${SMALL}`],
    ["local:0k", `has 0 for W, ${SMALL}`],
    ["local:67108865", "has more than 67108864 tokens for W"],
    ["local:99999999999999999999", "has more than 67108864 tokens for W"],
    [`local:${"9".repeat(400)}k`, "has more than 67108864 tokens for W"],
    ["sink", "has a sink without a window: it must end in `+local:W`"],
    ["sink:64", "has a sink without a window: it must end in `+local:W`"],
    ["sink:64+", "has a sink without a window: it must end in `+local:W`"],
    ["sink:64+local", "has a sink without a window: it must end in `+local:W`"],
    ["sink:64+strided:64,64", "has a sink without a window: it must end in `+local:W`"],
    ["sink:+local:64", "lacks S"],
    ["sink:64+local:", "lacks W"],
    ["sink:0+local:64", "has 0 for S, less than one token"],
    ["sink:64+local:63", `has 63 for W, ${SMALL}`],
    ["sink:x+local:64", `has "x" for S, ${NOT_TOKENS}`],
    ["sink:64+local:64+local:64", `has "64+local:64" for W, ${NOT_TOKENS}`],
    ["sink:1,2+local:64", 'has "1,2" where S belongs'],
    ["strided", "lacks W,K"],
    ["strided:64", 'has "64" where W,K belongs'],
    ["strided:64,64,64", 'has "64,64,64" where W,K belongs'],
    ["strided:64,", `has "" for K, ${NOT_TOKENS}`],
    ["strided:,64", `has "" for W, ${NOT_TOKENS}`],
    ["strided:63,64", `has 63 for W, ${SMALL}`],
    ["strided:64,63", `has 63 for K, ${SMALL}`],
    ["bigbird", "lacks S,W,R"],
    ["bigbird:64,64", 'has "64,64" where S,W,R belongs'],
    ["bigbird:1,2,3,4,5", 'has "1,2,3,4,5" where S,W,R belongs'],
    ["bigbird:0,64,64", "has 0 for S, less than one token"],
    ["bigbird:64,1,64", `has 1 for W, ${SMALL}`],
    ["bigbird:64,64,0", "has 0 for R, less than one token"],
    ["bigbird:64,64,64,-1", 'has "-1" for SEED, which is no whole number from 0 to 4294967295'],
    ["bigbird:64,64,64,", 'has "" for SEED, which is no whole number from 0 to 4294967295'],
    ["bigbird:64,64,64,1k", 'has "1k" for SEED, which is no whole number from 0 to 4294967295'],
    ["bigbird:64,64,64,4294967296", 'has "4294967296" for SEED, which is no whole number'],
    ["butterfly:", "lacks B"],
    ["butterfly:0", "has 0 for B, less than one token"],
    ["butterfly:64,64", 'has "64,64" where B belongs'],
    ["topk", "lacks K"],
    ["topk:0", "has 0 for K, less than the 256 tokens of the first block, the two latest and a chosen one"],
    ["topk:255", "has 255 for K, less than the 256 tokens"],
    ["topk:-1", `has "-1" for K, ${NOT_TOKENS}`],
    ["file", "names no file"],
    ["file:", "names no file"],
    ["file: ", "names no file"],
  ];
  for (const [text, problem] of REFUSED) {
    test(`${JSON.stringify(text.slice(0, 40))} is refused: ${problem}`, () => {
      let refusal: unknown;
      try {
        parsePattern(text);
      } catch (error) {
        refusal = error;
      }
      expect(refusal).toBeInstanceOf(UsageError);
      const { message, hint } = refusal as UsageError;
      expect(message).toContain(`The attention pattern \`${text.trim()}\` ${problem}`);
      expect(hint).toContain(PATTERN_GRAMMAR);
      for (const size of ["W is", "S the", "R further", "K the"]) expect(hint).toContain(size);
    });
  }
});

const PATH = "masks/mask.json";

function maskOf(json: unknown) {
  return parseMask(JSON.stringify(json), PATH);
}

/** The columns of each head's rows. */
function headRows(json: unknown, layer: number, heads: number, rows: number): number[][][] {
  return maskLists(maskOf(json), layer, heads, rows).map(rowsOf);
}

describe("parseMask and maskLists", () => {
  const ROWS = [[0], [1, 0], [2], [], [4, 0, 2]];
  const SORTED = [[0], [0, 1], [2], [], [0, 2, 4]];

  test("rows are of all layers and heads, in any order, and may be empty or lack the diagonal", () => {
    for (const json of [{ rows: ROWS }, { block: 64, rows: ROWS }, { rows: ROWS, block: 64 }]) {
      for (const layer of [0, 11]) {
        for (let rows = 0; rows <= ROWS.length; rows++) {
          const wanted = SORTED.slice(0, rows);
          expect(headRows(json, layer, 3, rows)).toEqual([wanted, wanted, wanted]);
        }
      }
    }
    expect(headRows({ rows: [[0], [0]] }, 0, 1, 2)).toEqual([[[0], [0]]]);
  });

  test("a larger block is all its causal blocks of 64 tokens", () => {
    const coarse = [[0], [0], [0, 2], [], [4, 1]];
    for (const size of [2, 3, 16]) {
      const wanted = naiveRows(
        5 * size,
        (i, j) => coarse[Math.floor(i / size)]!.includes(Math.floor(j / size)),
      );
      for (let rows = 0; rows <= 5 * size; rows++) {
        expect(headRows({ block: 64 * size, rows: coarse }, 0, 1, rows)).toEqual([wanted.slice(0, rows)]);
      }
    }
  });

  test("the first mask that names a layer and head counts, then the default", () => {
    const json = {
      default: "local:64",
      masks: [
        { layers: [0, 2], heads: [1], rows: ROWS },
        { layers: [2], pattern: "dense" },
        { heads: [0], pattern: " sink:1+local:64 " },
      ],
    };
    const dense = rowsOf(listsOf("dense", 5));
    const local = rowsOf(listsOf("local:64", 5));
    const sink = rowsOf(listsOf("sink:1+local:64", 5));
    expect(headRows(json, 0, 3, 5)).toEqual([sink, SORTED, local]);
    expect(headRows(json, 1, 3, 5)).toEqual([sink, local, local]);
    expect(headRows(json, 2, 3, 5)).toEqual([dense, SORTED, dense]);
    expect(headRows({ masks: json.masks }, 0, 3, 5)).toEqual([sink, SORTED, dense]);
    expect(headRows({ masks: [{ rows: ROWS }], default: "local:64" }, 9, 2, 5)).toEqual([SORTED, SORTED]);
  });

  test("every static pattern may stand in a mask", () => {
    for (const text of [...DEFINITIONS.map(([text]) => text), "bigbird:64,64,192,5"]) {
      const wanted = [rowsOf(listsOf(text, MOST_ROWS))];
      expect(headRows({ masks: [{ pattern: text }] }, 0, 1, MOST_ROWS)).toEqual(wanted);
      expect(headRows({ default: text, masks: [{ layers: [1], pattern: "dense" }] }, 0, 1, MOST_ROWS))
        .toEqual(wanted);
    }
  });

  test("heads of one entry have one object, in all layers; those of others another", () => {
    const mask = maskOf({
      masks: [{ heads: [1, 3], pattern: "local:64" }, { layers: [1], pattern: "local:64" }],
    });
    const [a, b, c, d, e] = maskLists(mask, 0, 5, 9);
    expect(c).toBe(a!);
    expect(e).toBe(a!);
    expect(d).toBe(b!);
    expect(b).not.toBe(a!);
    const next = maskLists(mask, 1, 5, 9);
    expect(next[1]).toBe(b!);
    expect(next[0]).not.toBe(a!);
    expect(next[0]).not.toBe(b!);
    expect(maskLists(mask, 2, 5, 9)).toEqual([a!, b!, a!, b!, a!]);
    expect(maskLists(mask, 0, 5, 8).map(({ rows }) => rows)).toEqual([8, 8, 8, 8, 8]);
  });

  test("more rows than a mask has are an error where it counts", () => {
    const json = { block: 128, masks: [{ layers: [0], pattern: "dense" }, { heads: [1], rows: [[0], [1]] }] };
    const mask = maskOf(json);
    expect(maskLists(mask, 1, 2, 4)).toHaveLength(2);
    expect(maskLists(mask, 0, 2, 5)).toHaveLength(2);
    expect(maskLists(mask, 1, 1, 5)).toHaveLength(1);
    const refusal = refusalOf(() => maskLists(mask, 1, 2, 5));
    expect(refusal.message).toBe("masks/mask.json: masks[1] covers 256 tokens, and 320 are needed");
    expect(refusal.hint).toBe("add rows to its 2, or run at most 256 tokens");
    expect(refusalOf(() => maskLists(maskOf({ rows: [[0]] }), 0, 1, 2)).message)
      .toBe("masks/mask.json: rows covers 64 tokens, and 128 are needed");
  });

  const array = (noun: string) => `not an array of ${noun}s`;
  const REFUSED: readonly (readonly [string, unknown, string])[] = [
    ["a list", [[0]], " is an array, not an object"],
    ["a word", "dense", ' is "dense", not an object'],
    ["null", null, " is null, not an object"],
    ["nothing", {}, ' has neither "rows" nor "masks"'],
    ["block alone", { block: 64 }, ' has neither "rows" nor "masks"'],
    ["both forms", { rows: [[0]], masks: [{ pattern: "dense" }] }, ' has both "rows" and "masks"'],
    ["a default beside rows", { rows: [[0]], default: "dense" }, ' has "default" and "rows"'],
    ["an unknown key", { rows: [[0]], size: 64 }, ' has no use for "size"'],
    ["four", { a: 1, b: 1, c: 1, d: 1 }, ' has no use for "a", "b", "c" and 1 more'],
    ["a hostile key", { "\u001b[2J\u202e": 1 }, ' has no use for "\\u001b[2J\\u202e"'],
    ["a long key", { ["x".repeat(1000)]: 1 }, ` has no use for "${"x".repeat(100)}"…`],
    ["block 0", { block: 0, rows: [[0]] }, ": block is 0, which is no multiple of 64 from 64 to 67108864"],
    ["block -64", { block: -64, rows: [[0]] }, ": block is -64, which is no multiple"],
    ["block 100", { block: 100, rows: [[0]] }, ": block is 100, which is no multiple"],
    ["block 64.5", { block: 64.5, rows: [[0]] }, ": block is 64.5, which is no multiple"],
    ["block 2^27", { block: 2 ** 27, rows: [[0]] }, ": block is 134217728, which is no multiple"],
    ["a block in quotes", { block: "64", rows: [[0]] }, ': block is "64", which is no multiple'],
    ["block null", { block: null, rows: [[0]] }, ": block is null, which is no multiple"],
    ["rows that are none", { rows: 3 }, `: rows is 3, ${array("row")}`],
    ["rows null", { rows: null }, `: rows is null, ${array("row")}`],
    ["an object of rows", { rows: { 0: [0] } }, `: rows is an object, ${array("row")}`],
    ["no rows", { rows: [] }, ": rows is empty"],
    [
      "too many rows",
      { rows: new Array(2 ** 20 + 1).fill(0) },
      ": rows has 1048577 rows, and at most 1048576",
    ],
    ["a row that is none", { rows: [[0], 1] }, `: rows[1] is 1, ${array("block")}`],
    ["a row in quotes", { rows: [[0], "0,1"] }, `: rows[1] is "0,1", ${array("block")}`],
    ["half a block", { rows: [[0], [0.5]] }, ": rows[1] has 0.5, which is no whole number"],
    ["a block in quotes", { rows: [[0], ["0"]] }, ': rows[1] has "0", which is no whole number'],
    ["a nested row", { rows: [[0], [[0]]] }, ": rows[1] has an array, which is no whole number"],
    ["a huge block", { rows: [[2 ** 60]] }, ": rows[0] has 1152921504606847000, which is no whole number"],
    ["a negative block", { rows: [[0], [0, -1]] }, ": rows[1] has block -1, and blocks count from 0"],
    [
      "a block behind",
      { rows: [[0], [1], [2], [1, 5]] },
      ": rows[3] has block 5, which is behind its own: query block 3 sees blocks 0 to 3",
    ],
    [
      "a block behind the first",
      { rows: [[4294967296]] },
      ": rows[0] has block 4294967296, which is behind its own: query block 0 sees block 0",
    ],
    ["a block twice", { rows: [[0], [1, 0, 1]] }, ": rows[1] has block 1 more than once"],
    ["masks that are none", { masks: "dense" }, `: masks is "dense", ${array("mask")}`],
    ["no masks", { masks: [] }, ": masks is empty"],
    ["a mask that is none", { masks: [{ pattern: "dense" }, 7] }, ": masks[1] is 7, not an object"],
    ["a mask of nothing", { masks: [{ layers: [0] }] }, ': masks[0] has neither "rows" nor "pattern"'],
    [
      "a mask of both",
      { masks: [{ rows: [[0]], pattern: "dense" }] },
      ': masks[0] has both "rows" and "pattern"',
    ],
    ["a block of its own", { masks: [{ block: 64, rows: [[0]] }] }, ': masks[0] has no use for "block"'],
    [
      "a bad row of a mask",
      { masks: [{ pattern: "dense" }, { rows: [[0], [2]] }] },
      ": masks[1].rows[1] has block 2, which is behind its own: query block 1 sees blocks 0 to 1",
    ],
    [
      "layers that are none",
      { masks: [{ layers: 0, rows: [[0]] }] },
      `: masks[0].layers is 0, ${array("layer")}`,
    ],
    [
      "layers null",
      { masks: [{ layers: null, rows: [[0]] }] },
      `: masks[0].layers is null, ${array("layer")}`,
    ],
    ["no layers", { masks: [{ layers: [], rows: [[0]] }] }, ": masks[0].layers is empty"],
    ["no heads", { masks: [{ heads: [], rows: [[0]] }] }, ": masks[0].heads is empty"],
    [
      "a layer in quotes",
      { masks: [{ layers: ["0"], rows: [[0]] }] },
      ': masks[0].layers has "0", which is no',
    ],
    [
      "layer -1",
      { masks: [{ layers: [-1], rows: [[0]] }] },
      ": masks[0].layers has layer -1, and layers count",
    ],
    ["head 1.5", { masks: [{ heads: [1.5], rows: [[0]] }] }, ": masks[0].heads has 1.5, which is no whole"],
    [
      "a head twice",
      { masks: [{ heads: [2, 2], rows: [[0]] }] },
      ": masks[0].heads has head 2 more than once",
    ],
    [
      "a pattern that is none",
      { masks: [{ pattern: 64 }] },
      ": masks[0].pattern is 64, not a pattern in quotes",
    ],
    [
      "a wrong pattern",
      { masks: [{ pattern: "local:32" }] },
      ': masks[0].pattern is "local:32", which has 32',
    ],
    [
      "a hostile pattern",
      { masks: [{ pattern: "\u009b31m:" }] },
      ': masks[0].pattern is "\\u009b31m:", which begins with "\\u009b31m", which names',
    ],
    [
      "topk",
      { masks: [{ pattern: "topk:1k" }] },
      ': masks[0].pattern is "topk:1k", which has no blocks before decoding',
    ],
    [
      "a file",
      { masks: [{ pattern: "file:a.json" }] },
      ': masks[0].pattern is "file:a.json", which is another file',
    ],
    [
      "a default that is none",
      { default: null, masks: [{ rows: [[0]] }] },
      ": default is null, not a pattern",
    ],
    ["a wrong default", { default: "", masks: [{ rows: [[0]] }] }, ': default is "", which is empty'],
    [
      "a default topk",
      { default: "topk:1k", masks: [{ rows: [[0]] }] },
      ': default is "topk:1k", which has no',
    ],
  ];
  for (const [what, json, problem] of REFUSED) {
    test(`${what} is refused by place: ${problem.slice(0, 80)}`, () => {
      const { message, hint } = refusalOf(() => maskOf(json));
      expect(message).toStartWith(`${PATH}${problem}`);
      expect(message).toMatch(/^[\x20-\x7e…]+$/);
      expect(message.length).toBeLessThan(300);
      expect(hint).toBeDefined();
    });
  }

  test("what is not JSON is refused, and says nothing to the terminal", () => {
    for (const text of ["", "{", "rows", '{"rows": [[0],]}', "\u001b[2J", '{"rows": [[NaN]]}']) {
      const { message, hint, detail } = refusalOf(() => parseMask(text, PATH));
      expect(message).toBe(`${PATH} is not valid JSON`);
      expect(hint).toContain('"rows"');
      expect(detail).toMatch(/^[\x20-\x7e]+$/);
    }
  });

  test("numbers and keys that only JSON can write are refused as well", () => {
    const refusals = ['{"rows": [[1e999]]}', '{"__proto__": {"rows": [[0]]}}'].map((text) =>
      refusalOf(() => parseMask(text, PATH)).message
    );
    expect(refusals).toEqual([
      `${PATH}: rows[0] has Infinity, which is no whole number`,
      `${PATH} has no use for "__proto__"`,
    ]);
    expect(maskLists(parseMask('{"rows": [[-0]]}', PATH), 0, 1, 1).map(rowsOf)).toEqual([[[0]]]);
  });
});

describe("checkMask", () => {
  const mask = maskOf({
    masks: [{ pattern: "dense" }, { layers: [11, 3], heads: [7, 0], pattern: "dense" }],
  });

  test("accepts what the model has", () => {
    checkMask(mask, 12, 8);
    checkMask(maskOf({ rows: [[0]] }), 1, 1);
  });

  test("names the layer or head that the model lacks", () => {
    expect(refusalOf(() => checkMask(mask, 11, 8)).message)
      .toBe("masks/mask.json: masks[1].layers names layer 11, and the model has layers 0 to 10");
    expect(refusalOf(() => checkMask(mask, 12, 7)).message)
      .toBe("masks/mask.json: masks[1].heads names head 7, and the model has heads 0 to 6");
    expect(refusalOf(() => checkMask(mask, 12, 7)).hint).toBeDefined();
  });
});

function refusalOf(act: () => unknown): InputError {
  try {
    act();
  } catch (error) {
    expect(error).toBeInstanceOf(InputError);
    return error as InputError;
  }
  throw new Error("It was accepted");
}
