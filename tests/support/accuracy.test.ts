import { expect, test } from "bun:test";
import { maxAbsDifference } from "./accuracy.ts";

test("the largest difference is NaN when any value is, wherever it stands", () => {
  for (const got of [[NaN, 1, 5], [1, NaN, 5], [1, 1, NaN]]) {
    expect(maxAbsDifference(got, [0, 0, 0])).toBeNaN();
  }
});

test("the largest difference of too few values is NaN, of more the first ones count", () => {
  expect(maxAbsDifference([1], [1, 2])).toBeNaN();
  expect(maxAbsDifference([1, 4, 9], [1, 2])).toBe(2);
});
