import type { Kernel } from "../../runtime/kernel.ts";
import { foldedGrid, foldGrid, GRID_FOLD } from "../shared/shared.ts";
import text from "./copy.wgsl" with { type: "text" };

export interface CopyProblem {
  /** A multiple of 16. */
  readonly bytes: number;
}

const LANES = 256;

/** Copies a buffer: how fast a kernel can move memory, which is what others are measured by. */
export const copyBytes: Kernel<object, CopyProblem> = {
  name: "copy",
  sources: [{ file: "copy/copy.wgsl", text }, foldedGrid],
  bindings: { source: "read", out: "read_write" },
  params: { vectors: "u32" },
  header: () => ({ aliases: {}, consts: { LANES, GRID_FOLD } }),
  workgroupBytes: () => 0,
  workgroupInvocations: () => LANES,
  values: (_, p) => ({ vectors: p.bytes / 16 }),
  grid: (_, p) => foldGrid(Math.ceil(p.bytes / (16 * LANES))),
  work: (_, p) => ({ bytes: 2 * p.bytes, flops: 0 }),
};
