/** Hostile `--sparsity` patterns and block masks. */
import fc from "fast-check";
import {
  type BlockLists,
  blockLists,
  type BlockMask,
  checkMask,
  density,
  isStatic,
  keptBlocks,
  maskLists,
  mostBlocks,
  parseMask,
  parsePattern,
  type Pattern,
  patternName,
} from "../../src/kvcache/patterns.ts";
import { fuzz, judge, reportTallies } from "../support/fuzz.ts";
import { anyJson, damagedBytes, damagedJson, hostileText, jsonOf, textOf } from "../support/fuzz_input.ts";

reportTallies();

const ROWS = 24;

/** Whether every row is ascending and causal, its diagonal in a list of its own. */
function requireCausal({ rows, full, partial }: BlockLists): void {
  for (let row = 0; row < rows; row++) {
    const own = full.indices.subarray(full.indptr[row], full.indptr[row + 1]);
    if (own.some((column, i) => column >= row || (i > 0 && column <= own[i - 1]!))) {
      throw new Error(`row ${row} keeps ${own.join()}`);
    }
    const diagonal = partial.indices.subarray(partial.indptr[row], partial.indptr[row + 1]);
    if (diagonal.length > 1 || diagonal.some((column) => column !== row)) throw new Error(`row ${row}`);
  }
  const share = density([{ rows, full, partial }]);
  if (!(share >= 0 && share <= 1)) throw new Error(`a density of ${share}`);
}

function requireSound(pattern: Pattern): void {
  const again = JSON.stringify(parsePattern(patternName(pattern)));
  if (again !== JSON.stringify(pattern)) throw new Error(`${patternName(pattern)} is read back as ${again}`);
  if (!isStatic(pattern)) return;
  const lists = blockLists(pattern, ROWS);
  requireCausal(lists);
  if (keptBlocks(lists) > mostBlocks(pattern, ROWS)) {
    throw new Error("more blocks than memory is planned for");
  }
}

const size = fc.oneof(
  fc.constantFrom(
    "0",
    "1",
    "63",
    "64",
    "65",
    "1k",
    "4K",
    "67108864",
    "67108865",
    "65536k",
    "1e3",
    "-64",
    "",
    "٣",
  ),
  fc.nat(5000).map(String),
  fc.constant("9".repeat(400)),
);
const grammar = fc.tuple(
  fc.constantFrom(
    ...["dense", "local", "sink", "strided", "bigbird", "butterfly", "topk", "file", "Local"],
    ...[" dense", "toString"],
  ),
  fc.constantFrom("", ":", "::"),
  fc.array(fc.oneof(size, hostileText), { maxLength: 5 }),
  fc.constantFrom(",", "+local:", "+", " "),
).map(([name, colon, sizes, between]) => name + colon + sizes.join(between));

fuzz("patterns: the grammar and what is near it", {
  runs: 3000,
  arbitrary: fc.oneof(grammar, hostileText),
  check: async (text) => {
    const judged = await judge({ inputBytes: text.length }, () => parsePattern(text));
    if ("value" in judged) requireSound(judged.value);
  },
});

fuzz("patterns: damaged ones", {
  runs: 1500,
  arbitrary: fc.constantFrom(
    ...["dense", "local:1024", "sink:64+local:4k", "strided:128,1024", "bigbird:64,192,128,7"],
    ...["butterfly:256"],
    ...["topk:2048", "file:mask.json"],
  ).chain((text) => damagedBytes(new TextEncoder().encode(text))),
  check: async (bytes) => {
    const text = new TextDecoder().decode(bytes);
    const judged = await judge({ inputBytes: text.length }, () => parsePattern(text));
    if ("value" in judged) requireSound(judged.value);
  },
});

const HEADS = 3;
const LAYERS = 3;

async function checkMaskText(text: string): Promise<void> {
  const judged = await judge({ inputBytes: text.length }, () => parseMask(text, "mask.json"));
  if (!("value" in judged)) return;
  const mask: BlockMask = judged.value;
  // Lists have a length for each block that is kept, of at most all of a short context.
  const allowance = { inputBytes: text.length, constantBytes: 4 << 20 };
  await judge(allowance, () => checkMask(mask, LAYERS, HEADS));
  for (let layer = 0; layer < LAYERS; layer++) {
    const lists = await judge(allowance, () => maskLists(mask, layer, HEADS, ROWS));
    if (!("value" in lists)) continue;
    if (lists.value.length !== HEADS) throw new Error(`${lists.value.length} lists`);
    lists.value.forEach(requireCausal);
  }
}

const MASK_ROWS = Array.from({ length: ROWS }, (_, row) => row < 2 ? [row] : [0, row - 1, row]);
const MASKS = [
  { block: 64, rows: MASK_ROWS },
  { block: 128, rows: MASK_ROWS.slice(0, ROWS / 2) },
  {
    default: "sink:64+local:128",
    masks: [{ layers: [0, 1], heads: [0], rows: MASK_ROWS }, { layers: [2], pattern: "bigbird:64,64,64" }],
  },
];
const WORDS = [
  ...["block", "rows", "default", "masks", "layers", "heads", "pattern", "dense", "topk:4096"],
  ...["file:mask.json"],
  ...["local:64", "butterfly"],
];

for (const [i, mask] of MASKS.entries()) {
  fuzz(`block masks: damaged JSON, form ${i + 1}`, {
    runs: 1000,
    arbitrary: damagedJson(jsonOf(mask), WORDS).map(textOf),
    check: checkMaskText,
  });
}

fuzz("block masks: any JSON", { runs: 800, arbitrary: anyJson, check: checkMaskText });
