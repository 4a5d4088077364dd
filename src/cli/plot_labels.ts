/** Where the names of points go, so that they hide neither each other nor the points. All sizes are pixels. */

/** A map from values to pixels: where Vega draws a point of the same domain. */
export interface Scale {
  readonly type: "linear" | "log";
  /** The value at pixel 0 and the one at pixel `size`. */
  readonly from: number;
  readonly to: number;
  readonly size: number;
}

export function pixelOf({ type, from, to, size }: Scale, value: number): number {
  const f = type === "log" ? Math.log : (x: number) => x;
  return size * (f(value) - f(from)) / (f(to) - f(from));
}

export interface Place {
  readonly x: number;
  readonly y: number;
}

/** A point with the text that names it. */
export interface Point extends Place {
  readonly text: string;
}

/** From the point to the middle of the text's height, at the side that `align` says. */
export interface Offset {
  readonly dx: number;
  readonly dy: number;
  readonly align: "left" | "center" | "right";
}

interface Box {
  readonly left: number;
  readonly right: number;
  readonly top: number;
  readonly bottom: number;
}

export const LABEL_SIZE = 11;
const LINE_HEIGHT = 1.15 * LABEL_SIZE;
/** Of a character, on average; wider than most fonts have it. */
const CHARACTER_WIDTH = 0.56 * LABEL_SIZE;
/** Half of a point's mark, with a margin. */
const MARK_RADIUS = 5;
/** Half of a line's width, with a margin. */
const LINE_RADIUS = 2;

// Costs are in square pixels of points and texts hidden.
/** Of a square pixel of a line: the rest of it can be followed. */
const LINE_COST = 0.5;
/** Of a pixel further away from the point. */
const DISTANCE_COST = 1;
/** Of each other point that is nearer to the text than its own. */
const DOUBT_COST = 50;
/** Each text is placed again when the others are. */
const ROUNDS = 5;

/** Near ones first. */
const OFFSETS: readonly Offset[] = [8, 14, 22, 32].flatMap((distance): Offset[] => {
  const slant = distance * 0.8;
  return [
    { dx: distance, dy: 0, align: "left" },
    { dx: -distance, dy: 0, align: "right" },
    { dx: 0, dy: -distance - 3, align: "center" },
    { dx: 0, dy: distance + 3, align: "center" },
    { dx: slant, dy: slant, align: "left" },
    { dx: slant, dy: -slant, align: "left" },
    { dx: -slant, dy: -slant, align: "right" },
    { dx: -slant, dy: slant, align: "right" },
  ];
});

function boxOf({ x, y, text }: Point, { dx, dy, align }: Offset): Box {
  const width = text.length * CHARACTER_WIDTH;
  const left = x + dx - (align === "left" ? 0 : align === "right" ? width : width / 2);
  return { left, right: left + width, top: y + dy - LINE_HEIGHT / 2, bottom: y + dy + LINE_HEIGHT / 2 };
}

function around({ x, y }: Place, radius: number): Box {
  return { left: x - radius, right: x + radius, top: y - radius, bottom: y + radius };
}

function areaOf({ left, right, top, bottom }: Box): number {
  return Math.max(0, right - left) * Math.max(0, bottom - top);
}

function overlapOf(a: Box, b: Box): number {
  return areaOf({
    left: Math.max(a.left, b.left),
    right: Math.min(a.right, b.right),
    top: Math.max(a.top, b.top),
    bottom: Math.min(a.bottom, b.bottom),
  });
}

function distanceOf({ left, right, top, bottom }: Box, { x, y }: Place): number {
  return Math.hypot(Math.max(left - x, 0, x - right), Math.max(top - y, 0, y - bottom));
}

/** Points of a line, next to each other, for `placeLabels`. */
export function lineBetween(from: Place, to: Place): Place[] {
  const steps = Math.ceil(Math.hypot(to.x - from.x, to.y - from.y) / (2 * LINE_RADIUS));
  return Array.from({ length: steps + 1 }, (_, i) => ({
    x: from.x + (to.x - from.x) * i / steps,
    y: from.y + (to.y - from.y) * i / steps,
  }));
}

/**
 * An offset for each point's text, such that texts hide as little as may be of points, of each other and of the
 * lines that `line` has points of, and stay within the width and height.
 */
export function placeLabels(
  points: readonly Point[],
  line: readonly Place[],
  width: number,
  height: number,
): Offset[] {
  const frame = { left: 0, right: width, top: 0, bottom: height };
  const marks = points.map((point) => around(point, MARK_RADIUS));
  const lines = line.map((place) => around(place, LINE_RADIUS));
  const placed: Offset[] = [];
  for (let round = 0; round < ROUNDS; round++) {
    points.forEach((point, i) => {
      const texts = placed.flatMap((offset, other) => other === i ? [] : [boxOf(points[other]!, offset)]);
      const taken = [...marks, ...texts];
      let least = Infinity;
      for (const offset of OFFSETS) {
        const box = boxOf(point, offset);
        const outside = areaOf(box) - overlapOf(box, frame);
        const own = distanceOf(box, point);
        const nearer = points.filter((other) => distanceOf(box, other) < own).length;
        const cost = outside + sumOf(taken, box) + LINE_COST * sumOf(lines, box) +
          DISTANCE_COST * Math.hypot(offset.dx, offset.dy) + DOUBT_COST * nearer;
        if (cost < least) [placed[i], least] = [offset, cost];
      }
    });
  }
  return placed;
}

function sumOf(boxes: readonly Box[], box: Box): number {
  return boxes.reduce((sum, other) => sum + overlapOf(box, other), 0);
}

/**
 * Moves heights apart, so that texts there have a line each, by as little as their order allows, and between 0
 * and `size` if they have room there.
 */
export function spread(heights: readonly number[], size: number): number[] {
  const order = heights.map((_, i) => i).sort((a, b) => heights[a]! - heights[b]!);
  const groups: Group[] = [];
  for (const i of order) {
    let group = groupOf([i], heights, size);
    for (let above = groups.at(-1); above && overlaps(above, group); above = groups.at(-1)) {
      groups.pop();
      group = groupOf([...above.members, ...group.members], heights, size);
    }
    groups.push(group);
  }
  const moved = [...heights];
  for (const { members, middle } of groups) {
    members.forEach((one, line) => moved[one] = middle + (line - (members.length - 1) / 2) * LINE_HEIGHT);
  }
  return moved;
}

/** Touching lines, from the top. */
interface Group {
  readonly members: readonly number[];
  readonly middle: number;
}

/** About the mean of where the lines belong. */
function groupOf(members: readonly number[], heights: readonly number[], size: number): Group {
  const mean = members.reduce((sum, one) => sum + heights[one]!, 0) / members.length;
  const half = members.length / 2 * LINE_HEIGHT;
  return { members, middle: Math.max(half, Math.min(mean, size - half)) };
}

function overlaps(above: Group, below: Group): boolean {
  return below.middle - above.middle < (above.members.length + below.members.length) / 2 * LINE_HEIGHT;
}

/** A text mark that reads its offset from fields `dx`, `dy` and `align` of its data. */
export const LABEL_MARK = {
  type: "text",
  fontSize: LABEL_SIZE,
  baseline: "middle",
  dx: { expr: "datum.dx" },
  dy: { expr: "datum.dy" },
  align: { expr: "datum.align" },
};
