/** Typed access to `tests/golden/`; its README says what the files hold and how they were recorded. */
import { readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { parseSafetensors, type SafetensorsFile } from "./safetensors.ts";

/** The residual stream of 48 tokens all the way through classics-16k. */
export interface ShortGolden {
  readonly text: string;
  readonly startToken: number;
  readonly inputIds: Int32Array;
  /** `[48, 192]`: token plus position embedding. */
  readonly embedding: Float32Array;
  /** Eight of `[48, 192]`: the residual stream after each block. */
  readonly blocks: readonly Float32Array[];
  /** `[48, 192]` */
  readonly lnF: Float32Array;
  /** Position to the logits `[8192]` after its token; 4 positions, from 0. */
  readonly logits: ReadonlyMap<number, Float32Array>;
  /** Largest absolute difference of the recorded float32 values to the same network in float64. */
  readonly maxAbsDiffToFloat64: {
    readonly embedding: number;
    readonly blocks: readonly number[];
    readonly lnF: number;
    readonly logits: number;
  };
}

/** Tokens of the recorded prompts, and of the contexts that perplexity is recorded for. */
export type RecordedLength = 1024 | 4096 | 16384;

/** A long prompt through classics-16k. */
export interface PromptGolden {
  readonly text: string;
  readonly startToken: number;
  readonly inputIds: Int32Array;
  /** nll[i] is that of token i + 1 given tokens 0 … i; one fewer than there are tokens. */
  readonly nll: Float32Array;
  readonly meanNll: number;
  /** Position to the logits `[8192]` after its token; 4 positions, from 0, the last among them. */
  readonly logits: ReadonlyMap<number, Float32Array>;
  /** Largest absolute difference of the recorded float32 logits to the same network in float64. */
  readonly maxAbsLogitDiffToFloat64: number;
}

/** Perplexity of classics-16k on six books. */
export interface PerplexityGolden {
  /** In words: which tokens are scored, and how the figures follow from the sums. */
  readonly definition: string;
  /** Over all the windows, by context. */
  readonly perplexity: Readonly<Record<RecordedLength, number>>;
  readonly windows: readonly {
    /** Name of the book's file. */
    readonly text: string;
    /** The book's first 16,384 tokens. */
    readonly inputIds: Int32Array;
    /**
     * In nats, by context C: the window is cut into pieces of C tokens, each runs from position 0, and of each all
     * tokens but the first are scored.
     */
    readonly sumNll: Readonly<Record<RecordedLength, number>>;
  }[];
}

/** Greedy continuation of a prompt; all arrays but the prompt have one entry a step. */
export interface GreedyGolden {
  readonly text: string;
  readonly startToken: number;
  readonly promptIds: readonly number[];
  readonly greedyIds: readonly number[];
  /** The runner-up of each step. */
  readonly secondIds: readonly number[];
  readonly topLogit: readonly number[];
  /** Top logit minus runner-up: below your tolerance, a different choice is no error, and nothing after it compares. */
  readonly gap: readonly number[];
}

/** Lengths that classification is recorded for. */
export type ClassifiedLength = 512 | 2048 | 8192 | 16384;

/** A document and its logits by `GPT2ForSequenceClassification`. */
export interface ClassifyGolden {
  readonly text: string;
  /** Its first 16,384 tokens. */
  readonly inputIds: Int32Array;
  /** The true class. */
  readonly label: number;
  /** After so many tokens of it, `[25]`. */
  readonly logits: Readonly<Record<ClassifiedLength, readonly number[]>>;
}

export interface TokenizerGolden {
  readonly text: string;
  readonly ids: readonly number[];
}

/** Published shapes of GPT-2 with 1,024 positions, and gpt2 with 16,384 and 65,536. */
export type SyntheticCase = "gpt2" | "gpt2-medium" | "gpt2-16k" | "gpt2-64k";

/** Outputs of a checkpoint generated from integers in one of these shapes, for a prompt that fills all positions. */
export interface SyntheticGolden {
  readonly config: {
    readonly nLayer: number;
    readonly nHead: number;
    readonly nEmbd: number;
    readonly nPositions: number;
    readonly vocabSize: number;
  };
  readonly tokens: number;
  readonly firstTokens: readonly number[];
  readonly lastTokens: readonly number[];
  readonly tokenSum: number;
  /** The 64 ids whose logits `rows[].columns` gives. */
  readonly vocabColumns: readonly number[];
  /** The positions of `rows` and of `afterBlock`. */
  readonly positions: readonly number[];
  readonly rows: readonly {
    readonly position: number;
    readonly logsumexp: number;
    readonly topIds: readonly number[];
    readonly topLogits: readonly number[];
    readonly columns: readonly number[];
  }[];
  /** `[position][block]`: root mean square and sum of the residual stream after each block. */
  readonly afterBlock: {
    readonly rms: readonly (readonly number[])[];
    readonly sum: readonly (readonly number[])[];
  };
  /**
   * The state after ln_f, all positions cut into 64 equal parts of `blockPositions`; `signed` is the sum with sign
   * `1 - 2 * (fmix32(j ^ 0x2545f491) & 1)` for the j-th number of a part, row-major.
   */
  readonly finalHidden: {
    readonly blockPositions: number;
    readonly sum: readonly number[];
    readonly sumAbs: readonly number[];
    readonly sumSq: readonly number[];
    readonly signed: readonly number[];
  };
  /** How far the recorded float32 run is from float64: the floor of any float32 tolerance. */
  readonly float64Check: {
    readonly maxAbsLogitDiff: number;
    readonly maxAbsHiddenDiff: number;
    readonly hiddenRms: number;
    readonly logitStd: number;
  };
  /** How far PyTorch's own half-precision runs are from float64; argmaxAgree counts the rows. */
  readonly halfPrecisionDrift: {
    readonly float16: { readonly maxAbsLogitDiff: number; readonly argmaxAgree: number };
    readonly bfloat16: { readonly maxAbsLogitDiff: number; readonly argmaxAgree: number };
  };
}

export function loadShort(): ShortGolden {
  const { metadata, tensors } = readTensors("short.safetensors");
  const f32 = (name: string) => tensors[name]!.data as Float32Array;
  const diff = JSON.parse(metadata.max_abs_diff_to_float64!) as Record<string, number>;
  const blocks = Array.from({ length: 8 }, (_, i) => `block_${i}`);
  return {
    text: metadata.text!,
    startToken: Number(metadata.start_token),
    inputIds: tensors.input_ids!.data as Int32Array,
    embedding: f32("embedding"),
    blocks: blocks.map(f32),
    lnF: f32("ln_f"),
    logits: rowsByPosition(f32("logits"), tensors.logit_positions!.data as Int32Array),
    maxAbsDiffToFloat64: {
      embedding: diff.embedding!,
      blocks: blocks.map((name) => diff[name]!),
      lnF: diff.ln_f!,
      logits: diff.logits!,
    },
  };
}

export function loadPrompt(tokens: RecordedLength): PromptGolden {
  const { metadata, tensors } = readTensors(`prompt_${tokens}.safetensors`);
  const measured = () =>
    (readJson("float64.json") as Record<RecordedLength, { logits: number }>)[tokens].logits;
  return {
    text: metadata.text!,
    startToken: Number(metadata.start_token),
    inputIds: tensors.input_ids!.data as Int32Array,
    nll: tensors.nll!.data as Float32Array,
    meanNll: Number(metadata.mean_nll),
    logits: rowsByPosition(tensors.logits!.data as Float32Array, tensors.positions!.data as Int32Array),
    maxAbsLogitDiffToFloat64: Number(metadata.max_abs_logit_diff_to_float64 ?? measured()),
  };
}

export function loadPerplexity(): PerplexityGolden {
  const { definition, perplexity, sum_nll } = readJson("perplexity.json") as {
    definition: string;
    perplexity: Record<RecordedLength, number>;
    sum_nll: ({ text: string; window: number } & Record<RecordedLength, number>)[];
  };
  const { tensors } = readTensors("perplexity.safetensors");
  return {
    definition,
    perplexity,
    windows: sum_nll.map(({ text, window, ...sumNll }) => ({
      text,
      inputIds: tensors[`${text}.${window}`]!.data as Int32Array,
      sumNll,
    })),
  };
}

/** Ten documents. */
export function loadClassify(): ClassifyGolden[] {
  const { cases } = readJson("classify.json") as {
    cases: { text: string; tokens: ClassifiedLength; label: number; logits: number[] }[];
  };
  const { tensors } = readTensors("classify.safetensors");
  return Object.entries(tensors).map(([text, { data }]) => {
    const own = cases.filter((one) => one.text === text);
    const logits = Object.fromEntries(own.map(({ tokens, logits }) => [tokens, logits]));
    return {
      text,
      inputIds: data as Int32Array,
      label: own[0]!.label,
      logits: logits as unknown as ClassifyGolden["logits"],
    };
  });
}

/** How far the recorded logits of so many tokens are from float64, at most. */
export function classifyDrift(tokens: ClassifiedLength): number {
  return (readJson("classify_float64.json") as Record<ClassifiedLength, number>)[tokens];
}

/** Prompts of 16, 32, 64, 128, 512, 1024, 4096 and 16000 tokens, 64 steps each. */
export function loadGreedy(): GreedyGolden[] {
  return (camelCased(readJson("greedy.json")) as { cases: GreedyGolden[] }).cases;
}

export function loadTokenizerCases(): TokenizerGolden[] {
  return (readJson("tokenizer.json") as { cases: TokenizerGolden[] }).cases;
}

export function loadSynthetic(name: SyntheticCase): SyntheticGolden {
  const all = readJson("synthetic.json") as { vocab_columns: number[]; cases: Record<string, object> };
  return camelCased({ ...all.cases[name], vocab_columns: all.vocab_columns }) as SyntheticGolden;
}

function goldenPath(name: string): string {
  return join(dirname(fileURLToPath(import.meta.url)), "../golden", name);
}

function readTensors(name: string): SafetensorsFile {
  return parseSafetensors(readFileSync(goldenPath(name)));
}

function readJson(name: string): unknown {
  return JSON.parse(readFileSync(goldenPath(name), "utf8"));
}

/** The files keep the snake_case of the recording script, the records here are camelCase. */
function camelCased(value: unknown): unknown {
  if (Array.isArray(value)) return value.map(camelCased);
  if (typeof value !== "object" || value === null) return value;
  return Object.fromEntries(
    Object.entries(value).map(([key, inner]) => [
      key.replace(/_([a-z])/g, (_, letter: string) => letter.toUpperCase()),
      camelCased(inner),
    ]),
  );
}

function rowsByPosition(matrix: Float32Array, positions: Int32Array): Map<number, Float32Array> {
  const width = matrix.length / positions.length;
  return new Map(
    [...positions].map((position, i) => [position, matrix.subarray(i * width, (i + 1) * width)]),
  );
}
