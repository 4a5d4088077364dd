/** Heads for classification: the checkpoint's classes, and labels as texts in a template. */
import { InputError, UsageError } from "../runtime/errors.ts";
import { resolveCheckpoint } from "./checkpoint.ts";
import { type Activation, activationOf, type LabelHead, type ScoreHead } from "./classification.ts";
import { type GPT2Config, readConfig } from "./config.ts";
import { openCheckpoint } from "./safetensors.ts";
import type { GPT2Tokenizer } from "./tokenizer.ts";

/** How a label follows a document unless the caller says otherwise. */
export const DEFAULT_TEMPLATE = "{text}\n\nLabel: {label}";

/** The head that a checkpoint stores; outputs without a name get Hugging Face's. */
export function scoreHead({ id2label, problemType }: GPT2Config, classes: number): ScoreHead {
  const labels = new Set<string>();
  for (let i = 0; i < classes; i++) {
    let label = id2label[i] ?? `LABEL_${i}`;
    // Two classes of one name would be one key of a result.
    while (labels.has(label)) label += ` (${i})`;
    labels.add(label);
  }
  const activation: Activation = activationOf(problemType, classes);
  return { kind: "score", labels: [...labels], activation };
}

/** What is said of a model without a score head. */
export function noScoreHead(dir: string): InputError {
  return new InputError(`The checkpoint in ${dir} has no score head to classify with`, {
    hint: "give labels as texts, with `--labels a,b,c`, or a checkpoint of GPT2ForSequenceClassification",
  });
}

/** The names of a checkpoint's classes. @throws ModelError, and InputError where it has no score head */
export async function checkpointLabels(dir: string): Promise<readonly string[]> {
  const config = await readConfig(dir);
  const source = await openCheckpoint(dir);
  try {
    const { classes } = resolveCheckpoint(source, config);
    if (classes === undefined) throw noScoreHead(dir);
    return scoreHead(config, classes).labels;
  } finally {
    await source.close();
  }
}

/**
 * Labels as texts that may follow a document. What is between is encoded without the white space at its end, which belongs
 * to the label's first token, as GPT-2's tokens begin with their space.
 * @param template `{text}`, the document, at the beginning if it is not there, and behind it `{label}`
 * @throws UsageError for a template or labels that cannot be used
 */
export function labelHead(
  tokenizer: GPT2Tokenizer,
  labels: readonly string[],
  template: string = DEFAULT_TEMPLATE,
): LabelHead {
  const { before, between, after } = parseTemplate(template);
  if (labels.length < 2) {
    throw new UsageError(`There ${labels.length === 1 ? "is one label" : "are no labels"} to choose from`, {
      hint: "give two or more, such as `--labels politics,sports,science`",
    });
  }
  const twice = labels.find((label, i) => labels.indexOf(label) !== i);
  if (twice !== undefined) throw new UsageError(`The label "${twice}" is given twice`);
  if (labels.includes("")) throw new UsageError("A label is empty");
  const stripped = between.trimEnd();
  const encode = (text: string) => Uint32Array.from(tokenizer.encode(text));
  return {
    kind: "labels",
    labels,
    texts: labels.map((label) => encode(between.slice(stripped.length) + label + after)),
    before: encode(before),
    between: encode(stripped),
  };
}

function parseTemplate(template: string): { before: string; between: string; after: string } {
  const parts = template.split("{label}");
  const [front, after] = parts;
  if (front === undefined || after === undefined || parts.length !== 2) {
    throw new UsageError(`The template "${template}" does not have {label} once`, {
      hint: `write where the label goes, such as "${DEFAULT_TEMPLATE.replaceAll("\n", "\\n")}"`,
    });
  }
  const [before, between, ...more] = front.split("{text}");
  if (more.length > 0 || after.includes("{text}")) {
    throw new UsageError(`The template "${template}" must have {text} once, in front of {label}`);
  }
  return between === undefined ? { before: "", between: front, after } : { before: before!, between, after };
}
