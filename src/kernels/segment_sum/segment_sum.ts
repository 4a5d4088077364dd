import type { Kernel } from "../../runtime/kernel.ts";
import { foldedGrid, foldGrid, GRID_FOLD } from "../shared/shared.ts";
import text from "./segment_sum.wgsl" with { type: "text" };

/** Consecutive rows that are added up; `segment_sum.wgsl` has the same struct. */
export interface RowSegment {
  /** Their first row of `x`. */
  readonly first: number;
  /** How many there are, at least one. */
  readonly rows: number;
  /** Row of `out` that gets the sum. */
  readonly row: number;
  /** What the sum is multiplied by. */
  readonly scale: number;
}

export interface SegmentSumProblem {
  readonly segments: number;
  /** Index of the first in the buffer of segments. */
  readonly firstSegment: number;
  /** Columns of `x` and `out`, a multiple of four. */
  readonly width: number;
  /** Different rows of `x` in the segments, which only `work` asks for; one for each when left out. */
  readonly summedRows?: () => number;
}

/** Bytes of one segment. */
export const SEGMENT_BYTES = 16;

/** Segments as the kernel reads them. */
export function packSegments(segments: readonly RowSegment[]): DataView<ArrayBuffer> {
  const packed = new DataView(new ArrayBuffer(SEGMENT_BYTES * segments.length));
  segments.forEach(({ first, rows, row, scale }, i) => {
    packed.setUint32(SEGMENT_BYTES * i, first, true);
    packed.setUint32(SEGMENT_BYTES * i + 4, rows, true);
    packed.setUint32(SEGMENT_BYTES * i + 8, row, true);
    packed.setFloat32(SEGMENT_BYTES * i + 12, scale, true);
  });
  return packed;
}

const LANES = 64;

/**
 * Sums of consecutive rows of f32, each scaled: with one row a segment it gathers rows, in two rounds it takes the mean of
 * many (64 at a time first, so that long segments are added by many workgroups). Segments may overlap; their `row`s differ.
 */
export const segmentSum: Kernel<Record<string, never>, SegmentSumProblem> = {
  name: "segment_sum",
  sources: [{ file: "segment_sum/segment_sum.wgsl", text }, foldedGrid],
  bindings: { x: "read", segments: "read", out: "read_write" },
  params: { segments: "u32", first_segment: "u32", width4: "u32" },
  header: () => ({ aliases: {}, consts: { LANES, GRID_FOLD } }),
  workgroupBytes: () => 0,
  workgroupInvocations: () => LANES,
  values: (_, p) => ({ segments: p.segments, first_segment: p.firstSegment, width4: p.width / 4 }),
  grid(_, { segments, width }) {
    const [x, y] = foldGrid(segments);
    return [x, y, Math.ceil(width / 4 / LANES)];
  },
  work: (_, { segments, width, summedRows = () => segments }) => ({
    bytes: 4 * width * (summedRows() + segments),
    flops: 0,
  }),
};
