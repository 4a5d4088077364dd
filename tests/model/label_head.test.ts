/** Heads from a checkpoint's config and from labels as texts. */
import { afterAll, describe, expect, test } from "bun:test";
import { join } from "node:path";
import { configFromSizes } from "../../src/model/config.ts";
import { checkpointLabels, DEFAULT_TEMPLATE, labelHead, scoreHead } from "../../src/model/label_head.ts";
import { loadTokenizer } from "../../src/model/tokenizer.ts";
import { UsageError } from "../../src/runtime/errors.ts";
import { temporaryFolder, writeTinyCheckpoint } from "../support/checkpoint.ts";

const tokenizer = await loadTokenizer(join(import.meta.dir, "../../weights/classics-16k"));
const folder = temporaryFolder();
afterAll(folder.remove);

const CONFIG = configFromSizes({ nLayer: 1, nHead: 1, nEmbd: 4, nPositions: 8, vocabSize: 5 });

describe("the head of a checkpoint", () => {
  test("has the names of its config, and Hugging Face's where there are none", () => {
    const named = { ...CONFIG, id2label: ["crime", "romance"] };
    expect(scoreHead(named, 2)).toEqual({
      kind: "score",
      labels: ["crime", "romance"],
      activation: "softmax",
    });
    expect(scoreHead(CONFIG, 3).labels).toEqual(["LABEL_0", "LABEL_1", "LABEL_2"]);
  });

  test("tells classes of one name apart", () => {
    const labels = (id2label: string[]) => scoreHead({ ...CONFIG, id2label }, id2label.length).labels;
    expect(labels(["a", "b", "a", "a"])).toEqual(["a", "b", "a (2)", "a (3)"]);
    for (const names of [["a", "a", "a (1)"], ["a (2)", "a", "a"], ["", "", " (1)"]]) {
      expect(new Set(labels(names)).size).toBe(3);
    }
  });

  test("takes time in proportion to its classes", () => {
    const started = performance.now();
    expect(scoreHead(CONFIG, 200_000).labels.length).toBe(200_000);
    expect(performance.now() - started).toBeLessThan(5000); // minutes where each is looked for among all
  });

  test("has scores as its config says", () => {
    expect(scoreHead({ ...CONFIG, problemType: "regression" }, 2).activation).toBe("none");
    expect(scoreHead({ ...CONFIG, problemType: "multi_label_classification" }, 2).activation).toBe("sigmoid");
    expect(scoreHead(CONFIG, 1).activation).toBe("sigmoid");
  });

  test("is found in its folder", async () => {
    const labels = (name: string, options: Parameters<typeof writeTinyCheckpoint>[1]) =>
      checkpointLabels(writeTinyCheckpoint(join(folder.path, name), options).dir);
    expect(await labels("named", { classes: 3 })).toEqual(["class 0", "class 1", "class 2"]);
    expect(await labels("plain", { classes: 2, config: { id2label: [] } })).toEqual(["LABEL_0", "LABEL_1"]);
    await expect(labels("none", {})).rejects.toThrow("has no score head to classify with");
  });
});

describe("labels as texts", () => {
  const LABELS = ["politics", "New York", "sports"];
  const DOCUMENT = "It was the best of times.";

  /** What the model reads for one of the labels. */
  function spelled(head: ReturnType<typeof labelHead>, label: number): number[] {
    return [...head.before, ...tokenizer.encode(DOCUMENT), ...head.between, ...head.texts[label]!];
  }

  test("have the tokens that the whole text would have", () => {
    const templates = [
      DEFAULT_TEMPLATE,
      "{text} {label}",
      "{text}\nThis text is about {label}.",
      "Review:\n\n{text}\nRating:\t{label} of five",
      "{text}{label}",
    ];
    for (const template of templates) {
      const head = labelHead(tokenizer, LABELS, template);
      expect(head.kind).toBe("labels");
      expect(head.labels).toEqual(LABELS);
      for (const [i, label] of LABELS.entries()) {
        const text = template.replace("{text}", DOCUMENT).replace("{label}", label);
        expect(tokenizer.decode(spelled(head, i))).toBe(text);
        // A label that touches the document may share a token with it.
        if (template !== "{text}{label}") expect(spelled(head, i)).toEqual(tokenizer.encode(text));
      }
    }
  });

  test("begin with the white space before them, as tokens do", () => {
    const { between, texts } = labelHead(tokenizer, LABELS);
    expect(tokenizer.decode([...between])).toBe("\n\nLabel:");
    expect(texts.map((ids) => tokenizer.decode([...ids]))).toEqual([" politics", " New York", " sports"]);
  });

  test("are behind the document where the template does not say", () => {
    expect(labelHead(tokenizer, LABELS, "\nTopic: {label}")).toEqual(
      labelHead(tokenizer, LABELS, "{text}\nTopic: {label}"),
    );
    const { before, between } = labelHead(tokenizer, LABELS, "{label}");
    expect([before.length, between.length]).toEqual([0, 0]);
  });

  test("may be spelled like what replaces patterns in other places", () => {
    const { texts } = labelHead(tokenizer, ["$&", "{text}", "{label}"]);
    expect(texts.map((ids) => tokenizer.decode([...ids]))).toEqual([" $&", " {text}", " {label}"]);
  });

  test("that cannot be used are refused", () => {
    const refused = (labels: string[], template?: string) => {
      try {
        labelHead(tokenizer, labels, template);
      } catch (error) {
        if (error instanceof UsageError) return error.message;
        throw error;
      }
      throw new Error("they are taken");
    };
    expect(refused([])).toBe("There are no labels to choose from");
    expect(refused(["a"])).toBe("There is one label to choose from");
    expect(refused(["a", "b", "a"])).toBe('The label "a" is given twice');
    expect(refused(["a", ""])).toBe("A label is empty");
    expect(refused(["a", "b"], "{text} is about")).toBe(
      'The template "{text} is about" does not have {label} once',
    );
    expect(refused(["a", "b"], "{label} {text} {label}")).toContain("does not have {label} once");
    expect(refused(["a", "b"], "")).toContain("does not have {label} once");
    expect(refused(["a", "b"], "{text} {text} {label}")).toBe(
      'The template "{text} {text} {label}" must have {text} once, in front of {label}',
    );
    expect(refused(["a", "b"], "{label}: {text}")).toContain("must have {text} once, in front of {label}");
  });
});
