import type { RowSegment } from "./segment_sum.ts";

/** `out[row] = scale · Σ x[first … first + rows - 1]` of `x[.., width]` in f64, by row of the result. */
export function segmentSumReference(
  x: ArrayLike<number>,
  segments: readonly RowSegment[],
  width: number,
): Map<number, Float64Array> {
  return new Map(segments.map(({ first, rows, row, scale }) => {
    const sum = new Float64Array(width);
    for (let r = first; r < first + rows; r++) {
      for (let c = 0; c < width; c++) sum[c]! += x[r * width + c]!;
    }
    return [row, sum.map((value) => value * scale)];
  }));
}
