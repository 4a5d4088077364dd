import { describe, expect, test } from "bun:test";
import type { PositionPlace } from "../../src/kernels/embedding/embedding.ts";
import {
  describePositions,
  exactPositions,
  positionLimit,
  type PositionMode,
  positionPlace,
  type Positions,
} from "../../src/model/positions.ts";

const MODES: readonly PositionMode[] = ["exact", "interpolate", "repeat"];
/** Rows of tables and tokens of contexts that meet at, below and above each other, primes and powers of two. */
const SIZES = [1, 2, 3, 7, 8, 64, 97, 1000, 1024, 1025, 16384];

function places(positions: Positions, tokens: number): PositionPlace[] {
  return Array.from({ length: tokens }, (_, position) => positionPlace(positions, position));
}

/** Row of the table, between two rows where it is no whole number. */
function rows(positions: Positions, tokens: number): number[] {
  return places(positions, tokens).map(({ place, weight }) => place + weight);
}

describe("exact positions", () => {
  test("are the table's rows, and no others exist", () => {
    const positions = exactPositions(97);
    expect(rows(positions, 97)).toEqual(Array.from({ length: 97 }, (_, position) => position));
    expect(positionLimit(positions)).toBe(97);
  });

  test("are what every mode gives within the table", () => {
    for (const mode of MODES) {
      for (const nPositions of SIZES) {
        for (const context of SIZES.filter((size) => size <= nPositions)) {
          const positions = { mode, nPositions, context };
          expect(places(positions, context)).toEqual(places(exactPositions(nPositions), context));
          expect(positionLimit(positions)).toBeGreaterThanOrEqual(nPositions);
        }
      }
    }
  });
});

describe("interpolated positions", () => {
  const stretched = SIZES.flatMap((nPositions) =>
    SIZES.filter((context) => context > nPositions).map((context): Positions => ({
      mode: "interpolate",
      nPositions,
      context,
    }))
  );

  test("go from the first row to the last, and end there", () => {
    for (const positions of stretched) {
      const { nPositions, context } = positions;
      expect(positionPlace(positions, 0)).toEqual({ place: 0, weight: 0 });
      expect(positionPlace(positions, context - 1)).toEqual({ place: nPositions - 1, weight: 0 });
      expect(positionLimit(positions)).toBe(context);
    }
  });

  test("grow in equal steps: position · (rows - 1) / (context - 1)", () => {
    for (const positions of stretched) {
      const { nPositions, context } = positions;
      let before = -1;
      places(positions, context).forEach(({ place, weight }, position) => {
        const row = position * (nPositions - 1) / (context - 1);
        if (place + weight !== row || (nPositions > 1 && row <= before)) {
          throw new Error(
            `${nPositions} rows over ${context}: position ${position} is at ${place} + ${weight}`,
          );
        }
        before = row;
      });
    }
  });

  test("name rows that exist: a weight is below one, and zero at the last row", () => {
    for (const positions of stretched) {
      for (const { place, weight } of places(positions, positions.context)) {
        const last = weight === 0 ? place : place + 1;
        if (Number.isInteger(place) && weight >= 0 && weight < 1 && last < positions.nPositions) continue;
        throw new Error(`${positions.nPositions} rows over ${positions.context}: ${place} + ${weight}`);
      }
    }
  });
});

describe("repeated positions", () => {
  test("start again behind the last row, without end", () => {
    for (const nPositions of [1, 2, 7, 64, 1000]) {
      const positions: Positions = { mode: "repeat", nPositions, context: 10 };
      places(positions, 3 * nPositions + 2).forEach((place, position) => {
        expect(place).toEqual({ place: position % nPositions, weight: 0 });
      });
      expect(positionPlace(positions, 2 ** 40 + 1).place).toBe((2 ** 40 + 1) % nPositions);
      expect(positionLimit(positions)).toBe(Infinity);
    }
  });
});

describe("describePositions", () => {
  test("is the same where a table's places are the same, and differs where they differ", () => {
    // From two tokens on: a single one is in row 0 whatever is said.
    for (const nPositions of [2, 3, 8, 9, 64]) {
      const all = MODES.flatMap((mode) =>
        [1, 2, 3, 8, 9, 16, 17, 64, 65].map((context): Positions => ({ mode, nPositions, context }))
      );
      for (const tokens of [2, 3, 8, 9, 16, 17, 20, 65]) {
        const wordsOf = new Map<string, string>();
        const placesOf = new Map<string, string>();
        for (const positions of all) {
          if (tokens > positionLimit(positions)) continue;
          const words = describePositions(positions, tokens);
          const places = rows(positions, tokens).join(" ");
          expect(wordsOf.get(places) ?? words).toBe(words);
          expect(placesOf.get(words) ?? places).toBe(places);
          wordsOf.set(places, words);
          placesOf.set(words, places);
        }
      }
    }
  });

  test("says it in words", () => {
    const of = (mode: PositionMode, context: number): Positions => ({ mode, nPositions: 64, context });
    expect(describePositions(exactPositions(64), 10)).toBe("exact");
    expect(describePositions(of("repeat", 200), 64)).toBe("exact");
    expect(describePositions(of("repeat", 200), 65)).toBe("repeat 64");
    expect(describePositions(of("interpolate", 64), 64)).toBe("exact");
    expect(describePositions(of("interpolate", 200), 10)).toBe("interpolate 64 to 200");
  });
});
