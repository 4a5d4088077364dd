import { describe, expect, test } from "bun:test";
import { StopMatcher } from "../../src/model/stop_matcher.ts";

/** All pieces through one matcher: what is emitted in the end, and whether it stopped. */
function run(stops: readonly string[], pieces: readonly string[]): { text: string; stopped: boolean } {
  const matcher = new StopMatcher(stops);
  let text = "";
  let stopped = false;
  for (const piece of pieces) {
    const result = matcher.push(piece);
    text += result.emit;
    stopped = result.stopped;
  }
  return { text: text + matcher.flush(), stopped };
}

/** The definition, on the whole text: the smallest end at which a stop string is complete, the longest one there. */
function naive(stops: readonly string[], text: string): { text: string; stopped: boolean } {
  for (let end = 1; end <= text.length; end++) {
    const here = stops.filter((stop) => text.slice(0, end).endsWith(stop)).map((stop) => stop.length);
    if (here.length > 0) return { text: text.slice(0, end - Math.max(...here)), stopped: true };
  }
  return { text, stopped: false };
}

describe("StopMatcher", () => {
  test("equals the naive definition on random text, however it is cut", () => {
    let state = 7;
    const pick = (n: number) => {
      state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
      return Math.floor(state / 2 ** 32 * n);
    };
    const word = (length: number) => Array.from({ length }, () => "ab\n"[pick(3)]).join("");
    for (let round = 0; round < 3000; round++) {
      const stops = Array.from({ length: pick(4) }, () => word(1 + pick(6)));
      const pieces = Array.from({ length: pick(12) }, () => word(pick(5)));
      expect({ stops, pieces, ...run(stops, pieces) }).toEqual({
        stops,
        pieces,
        ...naive(stops, pieces.join("")),
      });
    }
  });

  test("finds a stop string across token borders and emits only what precedes it", () => {
    const matcher = new StopMatcher(["\n\nEND"]);
    expect(matcher.push("one\n")).toEqual({ emit: "one", stopped: false });
    expect(matcher.push("\nEN")).toEqual({ emit: "", stopped: false });
    expect(matcher.push("D two")).toEqual({ emit: "", stopped: true });
    expect(matcher.flush()).toBe("");
  });

  test("lets held text go as soon as it cannot begin a stop string", () => {
    const matcher = new StopMatcher(["abc"]);
    expect(matcher.push("xab")).toEqual({ emit: "x", stopped: false });
    expect(matcher.push("ab")).toEqual({ emit: "ab", stopped: false });
    expect(matcher.flush()).toBe("ab");
  });

  test("holds nothing back without stop strings, empty ones included", () => {
    for (const stops of [[], [""]]) {
      expect(new StopMatcher(stops).push("text")).toEqual({ emit: "text", stopped: false });
    }
  });

  test("ignores everything after the stop", () => {
    const matcher = new StopMatcher(["."]);
    expect(matcher.push("a.b")).toEqual({ emit: "a", stopped: true });
    expect(matcher.push("c.")).toEqual({ emit: "", stopped: true });
  });

  test("never emits half of a surrogate pair", () => {
    const matcher = new StopMatcher(["😀!"]);
    const emitted = ["a😁", "😀", "?"].map((piece) => matcher.push(piece).emit);
    expect(emitted).toEqual(["a😁", "", "😀?"]);
  });
});
