/** How well predicted labels agree with the expected ones: accuracy, precision, recall and F1, confusions. */

export interface ClassScore {
  readonly label: string;
  /** Documents that the class is expected for. */
  readonly support: number;
  /** Documents that it was predicted for. */
  readonly predicted: number;
  /** Share of `predicted` that is right; 0 where nothing was predicted. */
  readonly precision: number;
  /** Share of `support` that was found; 0 where nothing was expected. */
  readonly recall: number;
  /** Harmonic mean of precision and recall; 0 where both are 0. */
  readonly f1: number;
}

export interface Confusion {
  /** Of the rows and of the columns. */
  readonly labels: readonly string[];
  /** `[expected][predicted]`, documents. */
  readonly counts: readonly (readonly number[])[];
}

/** What `--json` says of an evaluation; null where there are no documents. */
export interface EvaluationReport {
  readonly documents: number;
  readonly accuracy: number | null;
  /** Wilson's interval at 95 %. */
  readonly accuracy_interval: readonly [low: number, high: number] | null;
  readonly macro_f1: number | null;
  readonly classes: readonly ClassScore[];
  readonly confusion: Confusion;
}

/** Counts of expected and predicted labels; its size depends on how many labels there are, not on the documents. */
export class Evaluation {
  /** The labels of the model, then others in the order in which they came. */
  readonly #labels: string[] = [];
  readonly #places = new Map<string, number>();
  /** By the place of the expected label, then of the predicted one; pairs that never came are absent. */
  readonly #pairs: Map<number, number>[] = [];
  #count = 0;
  #correct = 0;

  /** @param labels in the order for reports; labels that are not among them may be added, and come last */
  constructor(labels: readonly string[]) {
    for (const label of labels) this.#placeOf(label);
  }

  add(expected: string, predicted: string): void {
    const row = this.#pairs[this.#placeOf(expected)]!;
    const column = this.#placeOf(predicted);
    row.set(column, (row.get(column) ?? 0) + 1);
    this.#count++;
    if (expected === predicted) this.#correct++;
  }

  /** Documents. */
  get count(): number {
    return this.#count;
  }

  /** Documents whose label is the expected one. */
  get correct(): number {
    return this.#correct;
  }

  /** Share of the documents whose label is the expected one. */
  accuracy(): number | null {
    return this.#count === 0 ? null : this.#correct / this.#count;
  }

  /**
   * Mean F1 of the classes that occur, expected or predicted, each with the same weight: scikit-learn's
   * `f1_score(expected, predicted, average="macro", zero_division=0)`.
   */
  macroF1(): number | null {
    const classes = this.perClass();
    return classes.length === 0 ? null : classes.reduce((sum, { f1 }) => sum + f1, 0) / classes.length;
  }

  /** The classes that occur, expected or predicted. */
  perClass(): ClassScore[] {
    const predicted = this.#labels.map(() => 0);
    for (const { column, count } of this.#cells()) predicted[column]! += count;
    return this.#labels.flatMap((label, i): ClassScore[] => {
      const right = this.#pairs[i]!.get(i) ?? 0;
      const support = this.#supportOf(i);
      const occurring = support + predicted[i]!;
      if (occurring === 0) return [];
      return [{
        label,
        support,
        predicted: predicted[i]!,
        precision: ratio(right, predicted[i]!),
        recall: ratio(right, support),
        f1: 2 * right / occurring,
      }];
    });
  }

  /** Of the classes that occur, in the order of `perClass()`. */
  confusion(): Confusion {
    const labels = this.perClass().map(({ label }) => label);
    const places = labels.map((label) => this.#places.get(label)!);
    return {
      labels,
      counts: places.map((row) => places.map((column) => this.#pairs[row]!.get(column) ?? 0)),
    };
  }

  /** Pairs of different labels, the most frequent first. */
  mistakes(): { expected: string; predicted: string; count: number }[] {
    return [...this.#cells()]
      .filter(({ row, column }) => row !== column)
      .sort((a, b) => b.count - a.count || a.row - b.row || a.column - b.column)
      .map(({ row, column, count }) => ({
        expected: this.#labels[row]!,
        predicted: this.#labels[column]!,
        count,
      }));
  }

  *#cells(): Generator<{ row: number; column: number; count: number }> {
    for (const [row, columns] of this.#pairs.entries()) {
      for (const [column, count] of columns) yield { row, column, count };
    }
  }

  #supportOf(row: number): number {
    return this.#pairs[row]!.values().reduce((sum, count) => sum + count, 0);
  }

  #placeOf(label: string): number {
    const known = this.#places.get(label);
    if (known !== undefined) return known;
    const place = this.#labels.push(label) - 1;
    this.#places.set(label, place);
    this.#pairs.push(new Map());
    return place;
  }
}

function ratio(part: number, whole: number): number {
  return whole === 0 ? 0 : part / whole;
}

/** The 0.975 quantile of the normal distribution. */
const Z = 1.959963984540054;

/**
 * The 95 % interval of a proportion (Wilson 1927, "Probable inference, the law of succession, and statistical
 * inference"): unlike the textbook's, it stays within 0 and 1 and holds for few documents and for shares near the ends.
 * @param trials at least 1
 */
export function wilsonInterval(successes: number, trials: number): [low: number, high: number] {
  const share = successes / trials;
  const shrink = 1 + Z * Z / trials;
  const center = (share + Z * Z / (2 * trials)) / shrink;
  const half = Z / shrink * Math.sqrt(share * (1 - share) / trials + Z * Z / (4 * trials * trials));
  // Exact at the ends, where the difference would leave a rounding error.
  return [successes === 0 ? 0 : center - half, successes === trials ? 1 : center + half];
}

export function evaluationReport(evaluation: Evaluation): EvaluationReport {
  const { count, correct } = evaluation;
  return {
    documents: count,
    accuracy: evaluation.accuracy(),
    accuracy_interval: count === 0 ? null : wilsonInterval(correct, count),
    macro_f1: evaluation.macroF1(),
    classes: evaluation.perClass(),
    confusion: evaluation.confusion(),
  };
}

/** Columns of a terminal that texts for people keep to. */
const WIDTH = 100;
/** Columns of a label in a table of classes, and in a list of confusions. */
const LABEL_WIDTH = 32;
/** Classes whose labels head the columns of a confusion matrix; for more, or for longer labels, there are numbers. */
const MOST_NAMED = 8;
/** Characters of a column of the matrix with such a label, the space before it included. */
const NAMED_WIDTH = 10;
/** Columns of the label of a row of the matrix, and the fewest that a longer one is cut to. */
const ROW_LABEL_WIDTH = 18;
const LEAST_ROW_LABEL_WIDTH = 10;
/** Confusions that are listed where the matrix has no room. */
const MOST_MISTAKES = 20;

/** Accuracy with its interval, macro-F1, the classes and their confusions, in 100 columns; no newline at the end. */
export function formatEvaluation(evaluation: Evaluation): string {
  const { count } = evaluation;
  if (count === 0) return "no documents with an expected label";
  const summary = `accuracy ${percent(evaluation.accuracy()!)} (95 % interval ${interval(evaluation)}), ` +
    `macro-F1 ${evaluation.macroF1()!.toFixed(4)}, ${grouped(count)} ${
      count === 1 ? "document" : "documents"
    }`;
  const classes = evaluation.perClass();
  const isNamed = classes.length <= MOST_NAMED &&
    classes.every(({ label }) => [...shown(label)].length < NAMED_WIDTH);
  const most = WIDTH / 2; // a digit and a space for each column
  const matrix = isNamed
    ? namedMatrix(evaluation.confusion())
    : classes.length <= most
    ? numberedMatrix(evaluation.confusion())
    : undefined;
  return [summary, "", ...classLines(classes), "", ...matrix ?? mistakeLines(evaluation)].join("\n");
}

/**
 * Accuracy for documents of several lengths, a line each, in 100 columns; no newline at the end.
 * @param rows `tokens` is what the caller tells the rows apart by, such as how much of each document was read
 */
export function formatByLength(
  rows: readonly { readonly tokens: number; readonly evaluation: Evaluation }[],
): string {
  const line = (cells: readonly string[]) =>
    cells.map((cell, i) => cell.padStart([12, 11, 11, 20, 10][i]!)).join("");
  return [
    line(["tokens", "documents", "accuracy", "95 % interval", "macro-F1"]),
    ...rows.map(({ tokens, evaluation }) => {
      const accuracy = evaluation.accuracy();
      const head = [grouped(tokens), grouped(evaluation.count)];
      if (accuracy === null) return line([...head, "-", "-", "-"]);
      return line([...head, percent(accuracy), interval(evaluation), evaluation.macroF1()!.toFixed(4)]);
    }),
  ].join("\n");
}

function classLines(classes: readonly ClassScore[]): string[] {
  const width = labelWidth(["class", ...classes.map(({ label }) => label)], LABEL_WIDTH);
  const line = (label: string, cells: readonly string[]) =>
    fitted(label, width) + cells.map((cell) => cell.padStart(11)).join("");
  return [
    line("class", ["documents", "predicted", "precision", "recall", "F1"]),
    ...classes.map(({ label, support, predicted, precision, recall, f1 }) =>
      line(label, [
        grouped(support),
        grouped(predicted),
        ...[precision, recall, f1].map((share) => share.toFixed(4)),
      ])
    ),
  ];
}

const MATRIX_TITLE = "rows: expected, columns: predicted";

function namedMatrix({ labels, counts }: Confusion): string[] {
  const width = labelWidth(labels, ROW_LABEL_WIDTH);
  const heads = labels.map((label) => shown(label).padStart(NAMED_WIDTH));
  return [
    MATRIX_TITLE,
    " ".repeat(width) + heads.join(""),
    ...labels.map((label, i) =>
      fitted(label, width) + counts[i]!.map((count) => String(count).padStart(NAMED_WIDTH)).join("")
    ),
  ];
}

/** Undefined where there are too many classes for the width. */
function numberedMatrix({ labels, counts }: Confusion): string[] | undefined {
  const numberWidth = String(labels.length).length;
  const cellWidth = 1 + Math.max(numberWidth, String(Math.max(...counts.flat())).length);
  const room = WIDTH - numberWidth - 1 - labels.length * cellWidth;
  if (room < LEAST_ROW_LABEL_WIDTH) return undefined;
  const width = labelWidth(labels, Math.min(room, ROW_LABEL_WIDTH));
  const line = (head: string, cells: readonly number[]) =>
    head + cells.map((cell) => String(cell).padStart(cellWidth)).join("");
  return [
    MATRIX_TITLE,
    line(" ".repeat(numberWidth + 1 + width), labels.map((_, i) => i + 1)),
    ...labels.map((label, i) =>
      line(`${String(i + 1).padStart(numberWidth)} ${fitted(label, width)}`, counts[i]!)
    ),
  ];
}

function mistakeLines(evaluation: Evaluation): string[] {
  const mistakes = evaluation.mistakes();
  if (mistakes.length === 0) return ["no confusions"];
  const listed = mistakes.slice(0, MOST_MISTAKES);
  const width = labelWidth(["expected", ...listed.map(({ expected }) => expected)], LABEL_WIDTH);
  const line = (count: string, expected: string, predicted: string) =>
    `${count.padStart(11)}  ${fitted(expected, width)}  ${fitted(predicted, LABEL_WIDTH).trimEnd()}`;
  return [
    `the most frequent of ${grouped(mistakes.length)} confusions`,
    line("documents", "expected", "predicted"),
    ...listed.map(({ count, expected, predicted }) => line(grouped(count), expected, predicted)),
  ];
}

/** Columns for the longest of the labels, at most `most`. */
function labelWidth(labels: readonly string[], most: number): number {
  return labels.reduce((width, label) => Math.max(width, Math.min(most, [...shown(label)].length)), 0);
}

/** A label in exactly so many columns; a longer one is cut. */
function fitted(label: string, width: number): string {
  const characters = [...shown(label)];
  if (characters.length > width) return characters.slice(0, width - 1).join("") + "…";
  return characters.join("") + " ".repeat(width - characters.length);
}

/** Labels come from folders and from data: what would move a terminal's cursor is replaced. */
function shown(label: string): string {
  return label === "" ? '""' : label.replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu, "\ufffd");
}

function interval({ correct, count }: Evaluation): string {
  const [low, high] = wilsonInterval(correct, count);
  return `${(100 * low).toFixed(2)} to ${percent(high)}`;
}

function percent(share: number): string {
  return `${(100 * share).toFixed(2)} %`;
}

function grouped(n: number): string {
  return n.toLocaleString("en-US");
}
