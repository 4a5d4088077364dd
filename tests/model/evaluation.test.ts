import { describe, expect, test } from "bun:test";
import {
  Evaluation,
  evaluationReport,
  formatByLength,
  formatEvaluation,
  wilsonInterval,
} from "../../src/model/evaluation.ts";
import { uniformArray } from "../support/random.ts";

type Pair = readonly [expected: string, predicted: string];

function evaluated(labels: readonly string[], pairs: readonly Pair[]): Evaluation {
  const evaluation = new Evaluation(labels);
  for (const [expected, predicted] of pairs) evaluation.add(expected, predicted);
  return evaluation;
}

/** `pairs` of labels by name and how often each comes. */
function repeated(pairs: readonly (readonly [expected: string, predicted: string, times: number])[]): Pair[] {
  return pairs.flatMap(([expected, predicted, times]) => Array<Pair>(times).fill([expected, predicted]));
}

/** The definitions, each from a pass of its own over all pairs. */
function bruteForce(pairs: readonly Pair[]) {
  const count = (matches: (pair: Pair) => boolean) => pairs.filter(matches).length;
  const labels = [...new Set(pairs.flat())];
  const classes = labels.map((label) => {
    const right = count(([e, p]) => e === label && p === label);
    const support = count(([e]) => e === label);
    const predicted = count(([, p]) => p === label);
    const precision = predicted === 0 ? 0 : right / predicted;
    const recall = support === 0 ? 0 : right / support;
    const f1 = precision + recall === 0 ? 0 : 2 * precision * recall / (precision + recall);
    return { label, support, predicted, precision, recall, f1 };
  });
  return {
    accuracy: count(([e, p]) => e === p) / pairs.length,
    macroF1: classes.reduce((sum, { f1 }) => sum + f1, 0) / classes.length,
    classes: new Map(classes.map((one) => [one.label, one])),
    confused: (expected: string, predicted: string) => count(([e, p]) => e === expected && p === predicted),
  };
}

describe("Evaluation", () => {
  test("agrees with the example of scikit-learn's f1_score", () => {
    const expected = [0, 1, 2, 0, 1, 2];
    const predicted = [0, 2, 1, 0, 0, 1];
    const evaluation = evaluated(
      ["0", "1", "2"],
      expected.map((label, i): Pair => [String(label), String(predicted[i])]),
    );
    expect(evaluation.macroF1()).toBeCloseTo(0.26666666666666666, 15);
    expect(evaluation.accuracy()).toBe(2 / 6);
    expect(evaluation.perClass().map(({ f1 }) => f1)).toEqual([0.8, 0, 0]);
  });

  test("agrees with a case counted by hand", () => {
    // cat: 5 expected, 4 found, 6 predicted; dog: 3, 1, 2; bird: 2, 1, 2.
    const evaluation = evaluated(
      ["cat", "dog", "bird"],
      repeated([["cat", "cat", 4], ["cat", "bird", 1], ["dog", "cat", 2], ["dog", "dog", 1], [
        "bird",
        "bird",
        1,
      ], [
        "bird",
        "dog",
        1,
      ]]),
    );
    expect(evaluation.count).toBe(10);
    expect(evaluation.correct).toBe(6);
    expect(evaluation.accuracy()).toBe(0.6);
    expect(evaluation.perClass()).toEqual([
      { label: "cat", support: 5, predicted: 6, precision: 4 / 6, recall: 4 / 5, f1: 8 / 11 },
      { label: "dog", support: 3, predicted: 2, precision: 1 / 2, recall: 1 / 3, f1: 2 / 5 },
      { label: "bird", support: 2, predicted: 2, precision: 1 / 2, recall: 1 / 2, f1: 1 / 2 },
    ]);
    expect(evaluation.macroF1()).toBeCloseTo((8 / 11 + 2 / 5 + 1 / 2) / 3, 15);
    expect(evaluation.confusion()).toEqual({
      labels: ["cat", "dog", "bird"],
      counts: [[4, 0, 1], [2, 1, 0], [0, 1, 1]],
    });
    expect(evaluation.mistakes()).toEqual([
      { expected: "dog", predicted: "cat", count: 2 },
      { expected: "cat", predicted: "bird", count: 1 },
      { expected: "bird", predicted: "dog", count: 1 },
    ]);
  });

  test("counts classes that are only expected, or only predicted, with an F1 of 0, and no others", () => {
    const evaluation = evaluated(["a", "b", "never", "c"], [["a", "a"], ["b", "c"]]);
    expect(evaluation.perClass()).toEqual([
      { label: "a", support: 1, predicted: 1, precision: 1, recall: 1, f1: 1 },
      { label: "b", support: 1, predicted: 0, precision: 0, recall: 0, f1: 0 },
      { label: "c", support: 0, predicted: 1, precision: 0, recall: 0, f1: 0 },
    ]);
    expect(evaluation.macroF1()).toBeCloseTo(1 / 3, 15);
    expect(evaluation.confusion().labels).toEqual(["a", "b", "c"]);
  });

  test("puts labels that the model does not know behind its own", () => {
    const evaluation = evaluated(["a", "b"], [["z", "b"], ["constructor", "a"], ["a", "a"]]);
    expect(evaluation.confusion()).toEqual({
      labels: ["a", "b", "z", "constructor"],
      counts: [[1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0]],
    });
    expect(evaluation.accuracy()).toBe(1 / 3);
  });

  test("has nulls and empty lists without documents", () => {
    expect(evaluationReport(new Evaluation(["a", "b"]))).toEqual({
      documents: 0,
      accuracy: null,
      accuracy_interval: null,
      macro_f1: null,
      classes: [],
      confusion: { labels: [], counts: [] },
    });
  });

  test("agrees with the definitions on random labels", () => {
    for (const [seed, classes, documents] of [[1, 1, 5], [2, 2, 40], [3, 3, 7], [4, 7, 300], [5, 30, 200]]) {
      const draws = uniformArray(seed!, 3 * documents!, 0, 1);
      const labelAt = (share: number) => `label ${Math.floor(share * share * classes!)}`;
      const pairs = Array.from({ length: documents! }, (_, i): Pair => {
        const expected = labelAt(draws[3 * i]!);
        return [expected, draws[3 * i + 1]! < 0.5 ? expected : labelAt(draws[3 * i + 2]!)];
      });
      const evaluation = evaluated(Array.from({ length: classes! }, (_, i) => `label ${i}`), pairs);
      const wanted = bruteForce(pairs);
      expect(evaluation.count).toBe(documents!);
      expect(evaluation.accuracy()).toBe(wanted.accuracy);
      expect(evaluation.macroF1()).toBeCloseTo(wanted.macroF1, 12);
      const scores = evaluation.perClass();
      expect(scores.map(({ label }) => label).sort()).toEqual([...wanted.classes.keys()].sort());
      for (const { f1, ...score } of scores) {
        const { f1: wantedF1, ...wantedScore } = wanted.classes.get(score.label)!;
        expect(score).toEqual(wantedScore);
        expect(f1).toBeCloseTo(wantedF1, 12);
      }
      const { labels, counts } = evaluation.confusion();
      expect(labels).toEqual(scores.map(({ label }) => label));
      for (const [i, row] of counts.entries()) {
        for (const [j, count] of row.entries()) expect(count).toBe(wanted.confused(labels[i]!, labels[j]!));
      }
      const mistakes = evaluation.mistakes();
      expect(mistakes.reduce((sum, { count }) => sum + count, 0)).toBe(documents! - evaluation.correct);
      for (const { expected, predicted, count } of mistakes) {
        expect(count).toBe(wanted.confused(expected, predicted));
      }
    }
  });
});

describe("wilsonInterval", () => {
  test("agrees with published values", () => {
    // Wilson's score intervals in Newcombe 1998, table I: 81/263, 15/148, 0/20, 1/29.
    const cases: readonly (readonly [number, number, number, number])[] = [
      [81, 263, 0.2553, 0.3662],
      [15, 148, 0.0624, 0.1605],
      [0, 20, 0, 0.1611],
      [1, 29, 0.0061, 0.1718],
    ];
    for (const [successes, trials, low, high] of cases) {
      const found = wilsonInterval(successes, trials);
      expect(found.map((bound) => Number(bound.toFixed(4)))).toEqual([low, high]);
    }
  });

  test("holds the share, stays within 0 and 1, and is symmetric", () => {
    for (const trials of [1, 2, 3, 10, 1000, 1e9]) {
      for (const successes of new Set([0, 1, Math.floor(trials / 2), trials - 1, trials])) {
        const [low, high] = wilsonInterval(successes, trials);
        const [mirroredLow, mirroredHigh] = wilsonInterval(trials - successes, trials);
        expect(low).toBeGreaterThanOrEqual(0);
        expect(low).toBeLessThanOrEqual(successes / trials);
        expect(high).toBeGreaterThanOrEqual(successes / trials);
        expect(high).toBeLessThanOrEqual(1);
        expect(mirroredLow).toBeCloseTo(1 - high, 12);
        expect(mirroredHigh).toBeCloseTo(1 - low, 12);
      }
    }
    expect(wilsonInterval(0, 7)[0]).toBe(0);
    expect(wilsonInterval(7, 7)[1]).toBe(1);
  });
});

describe("formatEvaluation", () => {
  test("shows few classes by name", () => {
    const evaluation = evaluated(
      ["fiction", "history", "unused"],
      repeated([["fiction", "fiction", 1200], ["fiction", "history", 34], ["history", "history", 5]]),
    );
    expect(formatEvaluation(evaluation)).toBe(
      [
        "accuracy 97.26 % (95 % interval 96.19 to 98.03 %), macro-F1 0.6067, 1,239 documents",
        "",
        "class    documents  predicted  precision     recall         F1",
        "fiction      1,234      1,200     1.0000     0.9724     0.9860",
        "history          5         39     0.1282     1.0000     0.2273",
        "",
        "rows: expected, columns: predicted",
        "          fiction   history",
        "fiction      1200        34",
        "history         0         5",
      ].join("\n"),
    );
    expect(evaluation.macroF1()).toBeCloseTo((2 * 1200 / 2434 + 10 / 44) / 2, 12);
  });

  test("numbers the columns of many classes, and of long labels", () => {
    const nine = Array.from({ length: 9 }, (_, i) => `class ${i}`);
    const text = formatEvaluation(
      evaluated(nine, nine.map((label, i): Pair => [label, nine[(i + i % 2) % 9]!])),
    );
    expect(text).toContain(
      "\n          1 2 3 4 5 6 7 8 9\n1 class 0 1 0 0 0 0 0 0 0 0\n2 class 1 0 0 1 0 0 0 0 0 0\n",
    );
    const long = evaluated([], [["a very long label that goes on and on and on", "b"]]);
    expect(formatEvaluation(long)).toContain("\n1 a very long label… 0 1\n2 b                  0 0");
    expect(formatEvaluation(long)).toContain("\na very long label that goes on …          1 ");
  });

  test("lists confusions where the matrix has no room", () => {
    const labels = Array.from({ length: 60 }, (_, i) => `class ${i}`);
    const pairs = repeated(labels.map((label, i) => [label, labels[Math.min(i, 40)]!, i + 1]));
    const text = formatEvaluation(evaluated(labels, pairs));
    expect(text).toContain("\nthe most frequent of 19 confusions\n  documents  expected  predicted\n");
    expect(text).toContain("\n         60  class 59  class 40\n         59  class 58  class 40\n");
    const perfect = evaluated(labels, labels.map((label): Pair => [label, label]));
    expect(formatEvaluation(perfect)).toEndWith("\n\nno confusions");
  });

  test("keeps to 100 columns, whatever the classes", () => {
    for (const classes of [1, 2, 8, 9, 20, 21, 22, 25, 30, 45, 46, 50, 51, 100]) {
      for (const length of [1, 9, 10, 60]) {
        for (const weight of [1, 123_456]) {
          const labels = Array.from({ length: classes }, (_, i) => "x".repeat(length) + i);
          const evaluation = evaluated(labels, labels.map((label, i): Pair => [label, labels[i >> 1]!]));
          for (let i = 0; i < weight; i++) evaluation.add(labels[0]!, labels[0]!);
          for (const line of formatEvaluation(evaluation).split("\n")) {
            expect(line.length).toBeLessThanOrEqual(100);
            expect(line).toBe(line.trimEnd());
          }
        }
      }
    }
  });

  test("shows no control characters of a label, and an empty one in quotes", () => {
    const text = formatEvaluation(evaluated([], [["\x1b[2Ja\nb", ""], ["a\u202eb", "a"]]));
    expect(text).not.toContain("\x1b");
    expect(text).toContain("\ufffd[2Ja\ufffdb");
    expect(text).toContain("a\ufffdb");
    expect(text).toContain('\n""  ');
  });

  test("says that there is nothing, and counts one document", () => {
    expect(formatEvaluation(new Evaluation(["a"]))).toBe("no documents with an expected label");
    expect(formatEvaluation(evaluated(["a"], [["a", "a"]])).split("\n")[0]).toBe(
      "accuracy 100.00 % (95 % interval 20.65 to 100.00 %), macro-F1 1.0000, 1 document",
    );
  });
});

describe("formatByLength", () => {
  test("has a line for each length", () => {
    const evaluation = evaluated(["a", "b"], repeated([["a", "a", 8], ["b", "a", 2]]));
    const rows = [{ tokens: 1024, evaluation }, { tokens: 65536, evaluation: new Evaluation(["a"]) }];
    expect(formatByLength(rows)).toBe([
      "      tokens  documents   accuracy       95 % interval  macro-F1",
      "       1,024         10    80.00 %    49.02 to 94.33 %    0.4444",
      "      65,536          0          -                   -         -",
    ].join("\n"));
  });
});

describe("evaluationReport", () => {
  test("has everything under the names that scripts rely on", () => {
    const report = evaluationReport(evaluated(["a", "b"], repeated([["a", "a", 8], ["b", "a", 2]])));
    expect(JSON.parse(JSON.stringify(report))).toEqual({
      documents: 10,
      accuracy: 0.8,
      accuracy_interval: wilsonInterval(8, 10),
      macro_f1: 8 / 9 / 2,
      classes: [
        { label: "a", support: 8, predicted: 10, precision: 0.8, recall: 1, f1: 16 / 18 },
        { label: "b", support: 2, predicted: 0, precision: 0, recall: 0, f1: 0 },
      ],
      confusion: { labels: ["a", "b"], counts: [[8, 0], [2, 0]] },
    });
  });
});
