/** The block-sparse attention of a run: a pattern with what it needs, and the block lists of a model's layers. */
import { KV_BLOCK } from "../kernels/shared/shared.ts";
import { listBytes } from "./block_lists.ts";
import {
  type BlockLists,
  blockLists,
  type BlockMask,
  density,
  maskEntries,
  maskLists,
  mostBlocks,
  type Pattern,
  patternName,
} from "./patterns.ts";

/** What a run attends to. */
export type Sparsity =
  | { readonly pattern: Exclude<Pattern, { readonly kind: "file" }> }
  | {
    readonly pattern: Extract<Pattern, { readonly kind: "file" }>;
    readonly mask: BlockMask;
    /** Of the file, so that other masks can be told from it. */
    readonly sha256: string;
  };

export const DENSE: Sparsity = { pattern: { kind: "dense" } };

/** Where the layers of a model have their lists. */
export interface ListGroup {
  /** Layers that share them. */
  readonly layers: readonly number[];
  /** Room for them, planned without making them. */
  readonly bytes: number;
}

export interface ModelHeads {
  readonly layers: number;
  readonly heads: number;
}

/** Whether prefill, and decoding with it, walks lists of blocks. */
export function hasLists({ pattern }: Sparsity): boolean {
  return pattern.kind !== "dense" && pattern.kind !== "topk";
}

/** The lists that a context of `rows` blocks needs, grouped by the layers that share them; none without lists. */
export function listGroups(sparsity: Sparsity, { layers, heads }: ModelHeads, rows: number): ListGroup[] {
  if (!hasLists(sparsity)) return [];
  const all = Array.from({ length: layers }, (_, layer) => layer);
  if (!("mask" in sparsity)) {
    const { pattern } = sparsity;
    if (pattern.kind === "topk") return [];
    return [{ layers: all, bytes: listBytes(heads, [{ rows, blocks: mostBlocks(pattern, rows) }]) }];
  }
  const { mask } = sparsity;
  const groups = new Map<string, { layers: number[]; bytes: number }>();
  for (const layer of all) {
    const entries = maskEntries(mask, layer, heads);
    const key = entries.map((entry) => mask.entries.indexOf(entry)).join();
    const known = groups.get(key);
    if (known) {
      known.layers.push(layer);
      continue;
    }
    const sizes = [...new Set(entries)].map(({ kept }) => ({ rows, blocks: mostBlocks(kept, rows) }));
    groups.set(key, { layers: [layer], bytes: listBytes(heads, sizes) });
  }
  return [...groups.values()];
}

/**
 * A layer's lists, one for each head: the same object for heads that keep the same blocks. Needs `hasLists`.
 * @throws InputError when a mask has fewer rows
 */
export function layerLists(sparsity: Sparsity, layer: number, heads: number, rows: number): BlockLists[] {
  if ("mask" in sparsity) return maskLists(sparsity.mask, layer, heads, rows);
  const { pattern } = sparsity;
  if (pattern.kind === "topk") throw new Error("Blocks of `topk` are chosen while decoding");
  return new Array<BlockLists>(heads).fill(blockLists(pattern, rows));
}

/** Those of all layers and heads, each made once. */
export function modelLists(sparsity: Sparsity, model: ModelHeads, rows: number): BlockLists[] {
  return listGroups(sparsity, model, rows).flatMap(({ layers }) => {
    const lists = layerLists(sparsity, layers[0]!, model.heads, rows);
    return layers.flatMap(() => lists);
  });
}

/** Kept blocks as a share of the causal ones, over all layers and heads of a context; of `topk` for its last token. */
export function sparsityDensity(sparsity: Sparsity, model: ModelHeads, rows: number): number {
  const { pattern } = sparsity;
  if (pattern.kind === "dense") return 1;
  if (pattern.kind === "topk") return rows < TOPK_LEAST_BLOCKS ? 1 : Math.min(1, keptByTopk(pattern) / rows);
  return density(modelLists(sparsity, model, rows));
}

/** Sequences of fewer blocks, 4,096 tokens, keep all of them with `topk`: choosing takes longer there than reading. */
export const TOPK_LEAST_BLOCKS = 64;

/** Blocks that each token keeps. */
export function keptByTopk({ keys }: Extract<Pattern, { readonly kind: "topk" }>): number {
  return Math.ceil(keys / KV_BLOCK);
}

/** What keys and values of a prefix depend on: equal words mean equal attention. */
export function attentionOf(sparsity: Sparsity): string {
  if ("mask" in sparsity) return `file:${sparsity.sha256}`;
  // Blocks are chosen behind the prefix.
  return sparsity.pattern.kind === "topk" ? "dense" : patternName(sparsity.pattern);
}
