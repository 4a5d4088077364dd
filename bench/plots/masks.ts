/**
 * The blocks that patterns keep, at 2,048 tokens: docs/images/masks.svg.
 *
 *     bun bench/plots/masks.ts [--out FILE.svg]
 */
import { KV_BLOCK } from "../../src/kernels/shared/shared.ts";
import {
  blockLists,
  type Csr,
  density,
  isStatic,
  parsePattern,
  type StaticPattern,
} from "../../src/kvcache/patterns.ts";
import type { JsonObject } from "../../src/cli/plots.ts";
import { drawPicture, formatPercent, readCommand } from "./picture.ts";

const PATTERNS = [
  "local:512",
  "sink:64+local:512",
  "strided:256,512",
  "bigbird:64,256,256",
  "butterfly",
  "butterfly:256",
];
const TOKENS = 2048;
const ROWS = TOKENS / KV_BLOCK;
/** Pixels of a block, whole ones so that edges are sharp. */
const BLOCK_SIZE = 7;
const PANEL_SIZE = ROWS * BLOCK_SIZE;

const FULL = "kept in full";
const PARTIAL = "kept, with the causal mask";
const SKIPPED = "skipped";
const COLOUR_OF = { [FULL]: "#0072b2", [PARTIAL]: "#e69f00", [SKIPPED]: "#dedede" };

/** Columns `from` to `to` - 1 of a row of blocks. */
interface Stretch {
  readonly kind: keyof typeof COLOUR_OF;
  readonly row: number;
  readonly from: number;
  readonly to: number;
}

/** The blocks of a row in as few stretches as they have. */
function stretchesOf({ indptr, indices }: Csr, row: number, kind: Stretch["kind"]): Stretch[] {
  const stretches: Stretch[] = [];
  for (const column of indices.subarray(indptr[row], indptr[row + 1])) {
    const last = stretches.at(-1);
    if (last?.to === column) stretches[stretches.length - 1] = { ...last, to: column + 1 };
    else stretches.push({ kind, row, from: column, to: column + 1 });
  }
  return stretches;
}

function staticPattern(text: string): StaticPattern {
  const pattern = parsePattern(text);
  if (!isStatic(pattern)) throw new Error(`${text} keeps no blocks that are known beforehand`);
  return pattern;
}

const axis = (title: string) => ({ title, values: [0, 512, 1024, 1536, 2048], grid: false });
const scale = { domain: [0, TOKENS], nice: false };

function panel(text: string): JsonObject {
  const lists = blockLists(staticPattern(text), ROWS);
  const rows = Array.from({ length: ROWS }, (_, row) => row);
  const stretches = rows.flatMap((row): Stretch[] => [
    // Underneath what is kept.
    { kind: SKIPPED, row, from: 0, to: row + 1 },
    ...stretchesOf(lists.full, row, FULL),
    ...stretchesOf(lists.partial, row, PARTIAL),
  ]);
  const values = stretches.map(({ kind, row, from, to }) => ({
    kind,
    x: from * KV_BLOCK,
    x2: to * KV_BLOCK,
    y: row * KV_BLOCK,
    y2: (row + 1) * KV_BLOCK,
  }));
  const lines = { values: rows.slice(1).map((row) => ({ at: row * KV_BLOCK })) };
  const line = { type: "rule", color: "white", strokeWidth: 0.5 };
  return {
    title: { text, subtitle: `${formatPercent(density([lists]))} of the causal blocks` },
    width: PANEL_SIZE,
    height: PANEL_SIZE,
    layer: [
      {
        data: { values },
        mark: "rect",
        encoding: {
          x: { field: "x", type: "quantitative", axis: axis("keys, tokens"), scale },
          x2: { field: "x2" },
          y: {
            field: "y",
            type: "quantitative",
            axis: axis("queries, tokens"),
            scale: { ...scale, reverse: true },
          },
          y2: { field: "y2" },
          color: {
            field: "kind",
            type: "nominal",
            scale: { domain: Object.keys(COLOUR_OF), range: Object.values(COLOUR_OF) },
            legend: { title: null, orient: "bottom", symbolType: "square", symbolSize: 140 },
          },
        },
      },
      { data: lines, mark: line, encoding: { x: { field: "at", type: "quantitative" } } },
      { data: lines, mark: line, encoding: { y: { field: "at", type: "quantitative" } } },
    ],
  };
}

await drawPicture(
  { columns: 3, spacing: { row: 28, column: 0 }, concat: PATTERNS.map(panel) },
  readCommand("masks.svg").out,
);
