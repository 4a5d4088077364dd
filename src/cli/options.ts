/**
 * argv to one frozen, typed record a command. `cac` matches commands, options and help; it never sees a value, because
 * it would turn `--stop 007` into 7 and `--temperature -1` into a flag: values travel as placeholders and are
 * converted here, once.
 */
import { type CAC, cac, type Command } from "cac";
import { parsePattern, type Pattern, PATTERN_GRAMMAR } from "../kvcache/patterns.ts";
import { PUBLISHED_SHAPES, type PublishedShape } from "../model/config.ts";
import { DEFAULT_TEMPLATE } from "../model/label_head.ts";
import type { Pooling } from "../model/memory_plan.ts";
import type { PositionMode } from "../model/positions.ts";
import { UsageError } from "../runtime/errors.ts";
import { writeResult } from "./output.ts";
import { parseShard, type Shard } from "./shard.ts";
import { runtimeName, VERSION } from "./version.ts";

/** Options that every command takes. */
export interface CommonOptions {
  readonly model: string | undefined;
  readonly dtype: "auto" | "f16" | "f32";
  /** Undefined asks for a random one, where anything is drawn at random. */
  readonly seed: number | undefined;
  readonly adapter: string | undefined;
  readonly fallbackAdapter: boolean;
  readonly json: boolean;
  readonly quiet: boolean;
  /** How often `-v` was given. */
  readonly verbose: number;
}

/** Options of the commands that run a model over a text. */
export interface RunOptions extends CommonOptions {
  /** A file of token ids in place of text. */
  readonly ids: string | undefined;
  readonly context: number | undefined;
  readonly positions: PositionMode;
  /** What tokens attend to; a mask file is yet to be read. */
  readonly sparsity: Pattern;
  readonly profile: boolean;
  /** A file for a trace of the run. */
  readonly trace: string | undefined;
  /** Kernels to run by role, in place of the program's choice. */
  readonly kernels: ReadonlyMap<string, string>;
}

export interface GenerateOptions extends RunOptions {
  readonly command: "generate";
  /** The positional prompt; `-` is standard input. */
  readonly prompt: string | undefined;
  readonly file: string | undefined;
  /** A file of prompts, to be generated from together. */
  readonly prompts: string | undefined;
  /** Prompts that are decoded together at most; undefined for the device's default. */
  readonly batch: number | undefined;
  readonly session: string | undefined;
  readonly maxTokens: number;
  readonly temperature: number;
  readonly topK: number;
  readonly topP: number;
  readonly minP: number;
  readonly repeatPenalty: number;
  readonly stop: readonly string[];
  readonly ignoreEos: boolean;
  readonly logprobs: number | undefined;
  /** Tokens that may be drawn ahead of those that have come back; undefined for the device's default. */
  readonly inFlight: number | undefined;
}

export interface ScoreOptions extends RunOptions {
  readonly command: "score";
  readonly files: readonly string[];
  /** Tokens of a window; undefined for the whole document, as far as the context goes. */
  readonly window: number | undefined;
  /** Tokens of each document to score; undefined for all. */
  readonly maxTokens: number | undefined;
  readonly tokenNll: boolean;
  /** Also run the text with dense attention, and say how far the sparse one is from it. */
  readonly compare: boolean;
  /** Tokens, from 0, whose rows of logits are wanted; increasing. */
  readonly logits: readonly number[];
}

export interface ClassifyOptions extends RunOptions {
  readonly command: "classify";
  /** Files, folders and patterns, or with `jsonl` files of records; none is standard input. */
  readonly files: readonly string[];
  readonly jsonl: boolean;
  /** Tokens that documents are cut to, increasing: each is classified by each. Undefined does not cut. */
  readonly maxTokens: readonly number[] | undefined;
  /** Labels as texts; undefined for the checkpoint's score head. */
  readonly labels: readonly string[] | undefined;
  readonly template: string | undefined;
  readonly calibrate: boolean;
  readonly pooling: Pooling;
  /** Tokens of windows that the score head is averaged over; undefined for one long context. */
  readonly window: number | undefined;
  /** The true label: a field of the records, or for files the folder that each lies in. Undefined compares nothing. */
  readonly expected: string | undefined;
  readonly out: string | undefined;
  readonly resume: boolean;
  readonly shard: Shard | undefined;
  /** Documents that share a pass at most; undefined for as many as fit. */
  readonly batch: number | undefined;
  /** Threads that encode; undefined for the machine's default. */
  readonly workers: number | undefined;
}

export interface BenchOptions extends CommonOptions {
  readonly command: "bench";
  readonly phases: readonly BenchPhase[];
  /** Tokens, increasing. */
  readonly contexts: readonly number[];
  readonly attention: readonly BenchAttention[];
  /** Patterns that prefill, decode and sparse attention are measured with; undefined for the defaults of each. */
  readonly sparsity: readonly Pattern[] | undefined;
  /** A published model's sizes with random weights; undefined for the model of `--model`. */
  readonly modelShape: PublishedShape | undefined;
  readonly runs: number;
  readonly profile: boolean;
  readonly trace: string | undefined;
  /** Sequences that `decode` decodes together, increasing. */
  readonly batch: readonly number[];
  readonly kernels: ReadonlyMap<string, string>;
  /** A folder for a page with plots. */
  readonly report: string | undefined;
  /** Recorded results to draw in place of measuring. */
  readonly from: readonly string[];
  /** Two result files to compare in place of measuring. */
  readonly compare: readonly [a: string, b: string] | undefined;
}

export interface InfoOptions extends CommonOptions {
  readonly command: "info";
  /** Also time the device: copies, arithmetic, dispatches. */
  readonly measure: boolean;
  readonly kernels: ReadonlyMap<string, string>;
}

export interface InspectOptions extends CommonOptions {
  readonly command: "inspect";
  readonly path: string;
}

export interface PullOptions extends CommonOptions {
  readonly command: "pull";
  /** As it was typed: `REPO` or `REPO@REVISION`. */
  readonly repo: string;
}

export type Options =
  | GenerateOptions
  | ScoreOptions
  | ClassifyOptions
  | BenchOptions
  | InfoOptions
  | InspectOptions
  | PullOptions;

export const BENCH_PHASES = ["prefill", "decode", "attention", "gemm"] as const;
export type BenchPhase = typeof BENCH_PHASES[number];
const BENCH_ATTENTION = ["flash", "sparse", "standard"] as const;
export type BenchAttention = typeof BENCH_ATTENTION[number];
/** The fewest tokens that `bench` takes for a context: below, nothing is measured but overheads. */
const LEAST_BENCH_CONTEXT = 16;

type Convert = (text: string, flag: string) => unknown;

export interface OptionSpec {
  readonly flags: string;
  readonly description: string;
  /** A command line that uses it, for the manual and for who gets its value wrong. */
  readonly example: string;
  /** Absent for switches. */
  readonly convert?: Convert;
  readonly repeatable?: boolean;
}

const text: Convert = (value) => value;

function number(check: (n: number) => boolean, wanted: string): Convert {
  return (value, flag) => {
    const n = value.trim() === "" ? NaN : Number(value);
    if (!check(n)) throw new UsageError(`\`${flag} ${value}\` is out of range: it must be ${wanted}`);
    return n;
  };
}

function integer(least: number, wanted = `a whole number from ${least}`): Convert {
  return number((n) => Number.isSafeInteger(n) && n >= least, wanted);
}

/** Token counts may be written as `16k`. */
const tokens: Convert = (value, flag) => {
  const match = /^(\d+)([kK]?)$/.exec(value);
  const n = match ? Number(match[1]) * (match[2] ? 1024 : 1) : NaN;
  if (!Number.isSafeInteger(n) || n < 1) {
    throw new UsageError(
      `\`${flag} ${value}\` is out of range: it must be a whole number from 1, such as 4096 or 4k`,
    );
  }
  return n;
};

function oneOf(...choices: readonly string[]): Convert {
  return (value, flag) => {
    if (!choices.includes(value)) {
      throw new UsageError(`\`${flag} ${value}\` is not one of ${choices.join(", ")}`);
    }
    return value;
  };
}

/** `0,1023,4095`: places of tokens, in any order. */
const places: Convert = (value, flag) => {
  const list = value.split(",").map((part) => /^\s*\d+\s*$/.test(part) ? Number(part) : NaN);
  if (!list.every(Number.isSafeInteger)) {
    throw new UsageError(`\`${flag} ${value}\` is not a list of token numbers such as 0,1023,4095`);
  }
  return [...new Set(list)].sort((a, b) => a - b);
};

/** `prefill,gemm`: some of the choices, each once. */
function someOf(...choices: readonly string[]): Convert {
  return (value, flag) => {
    const list = value.split(",").map((part) => part.trim());
    const unknown = list.find((part) => !choices.includes(part));
    if (unknown !== undefined) {
      throw new UsageError(
        `\`${flag} ${value}\` has "${unknown}", which is not one of ${choices.join(", ")}`,
      );
    }
    return [...new Set(list)];
  };
}

/** `1k,4k,16k`: contexts in any order. */
const contexts: Convert = (value, flag) => {
  const list = value.split(",").map((part) => tokens(part.trim(), flag) as number);
  const small = list.find((n) => n < LEAST_BENCH_CONTEXT);
  if (small !== undefined) {
    throw new UsageError(
      `\`${flag} ${value}\` is out of range: a context of ${small} is too short to measure`,
      {
        hint: `give contexts from ${LEAST_BENCH_CONTEXT} tokens`,
      },
    );
  }
  return [...new Set(list)].sort((a, b) => a - b);
};

/** Sequences that can be decoded together, at most. */
const MOST_BATCH = 256;

/** `1,8,32`: sizes of batches in any order. */
const batches: Convert = (value, flag) => {
  const list = value.split(",").map((part) => /^\s*\d+\s*$/.test(part) ? Number(part) : NaN);
  if (!list.every((n) => n >= 1 && n <= MOST_BATCH)) {
    throw new UsageError(
      `\`${flag} ${value}\` is out of range: it must be numbers from 1 to ${MOST_BATCH}, such as 1,8,32`,
    );
  }
  return [...new Set(list)].sort((a, b) => a - b);
};

/** `512,2k,8k`: lengths in any order. */
const lengths: Convert = (value, flag) => {
  const list = value.split(",").map((part) => tokens(part.trim(), flag) as number);
  return [...new Set(list)].sort((a, b) => a - b);
};

/** `politics, sports`: names, without the white space around them. */
const names: Convert = (value) => value.split(",").map((part) => part.trim());

const pattern: Convert = (value) => parsePattern(value);

/** `attention=flash_attention/tiled` as a pair. */
const roleAndKernel: Convert = (value, flag) => {
  const match = /^([^=]+)=(.+)$/.exec(value);
  if (!match) {
    throw new UsageError(
      `\`${flag} ${value}\` is not a role and a kernel, such as attention=flash_attention/tiled`,
      { hint: "`longform info` lists roles and kernels" },
    );
  }
  return [match[1]!.trim(), match[2]!.trim()];
};

/** What every command takes. */
export const COMMON: readonly OptionSpec[] = [
  {
    flags: "-m, --model <dir|repo>",
    description:
      "Folder with config.json, tokenizer.json and model.safetensors, or what `pull` has downloaded of a " +
      "repository (default: weights/classics-16k)",
    example: 'longform generate -m weights/classics-16k "It was a dark night"',
    convert: text,
  },
  {
    flags: "--dtype <type>",
    description: "Storage of weights, activations and cache: auto, f16 or f32 (default: auto)",
    example: "longform score book.txt --dtype f32",
    convert: oneOf("auto", "f16", "f32"),
  },
  {
    flags: "--seed <n>",
    description:
      "Same seed, same text (default: random, shown with the timings); only `generate` draws at random",
    example: 'longform generate "Once upon a time" --seed 7',
    convert: number((n) => Number.isSafeInteger(n), "a whole number"),
  },
  {
    flags: "--adapter <name|index>",
    description: "The adapter to run on, as `info` lists them",
    example: "longform info --adapter 1",
    convert: text,
  },
  {
    flags: "--fallback-adapter",
    description: "Run on the CPU even where there is a GPU",
    example: "longform score book.txt --fallback-adapter",
  },
  {
    flags: "--json",
    description: "Print one JSON document on stdout",
    example: "longform score book.txt --json > book.json",
  },
  {
    flags: "-q, --quiet",
    description: "No progress, timings or notices on stderr",
    example: 'longform generate -q "Once upon a time" > story.txt',
  },
  {
    flags: "-v, --verbose",
    description: "Say which device and kernels run, and show stack traces",
    example: 'longform generate -v "Once upon a time" -n 1',
  },
];

const KERNEL: OptionSpec = {
  flags: "--kernel <role=kernel>",
  description: "Run this kernel for a role, as `info` lists them; may be given several times",
  example: "longform generate -f book.txt --kernel attention=flash_attention/tiled",
  convert: roleAndKernel,
  repeatable: true,
};

const PROFILE: OptionSpec = {
  flags: "--profile",
  description:
    "Say on stderr, or with --json, where time and memory went: by kernel, on the host, in loading",
  example: "longform generate -f book.txt -n 100 --profile",
};

const TRACE: OptionSpec = {
  flags: "--trace <path>",
  description: "Write a Chrome trace of the run, for ui.perfetto.dev, chrome://tracing or speedscope",
  example: "longform generate -f book.txt -n 100 --trace trace.json",
  convert: text,
};

/** What the commands that run a model take besides. */
const RUN: readonly OptionSpec[] = [
  {
    flags: "--ids <path>",
    description: "Read a JSON array of token ids in place of text, - for stdin",
    example: "longform generate --ids prompt.json -n 20",
    convert: text,
  },
  {
    flags: "-c, --context <n>",
    description: "Tokens to plan memory for (default: what the text needs)",
    example: "longform generate -f book.txt --context 16k -n 500",
    convert: tokens,
  },
  {
    flags: "--positions <mode>",
    description: "Beyond the model's positions: exact (an error), interpolate or repeat (default: exact)",
    example: "longform score book.txt --positions interpolate --window 32k",
    convert: oneOf("exact", "interpolate", "repeat"),
  },
  {
    flags: "--sparsity <pattern>",
    description: `Block-sparse attention: ${PATTERN_GRAMMAR} (default: dense)`,
    example: "longform generate -f book.txt --sparsity sink:64+local:4096",
    convert: pattern,
  },
  PROFILE,
  TRACE,
  KERNEL,
];

export const COMMANDS = {
  generate: {
    usage: "generate [prompt]",
    description: "Continue a text",
    positional: { name: "prompt", least: 0, most: 1 },
    options: [
      {
        flags: "-f, --file <path>",
        description: "Read the prompt from a UTF-8 file",
        example: "longform generate -f chapter.txt -n 200",
        convert: text,
      },
      {
        flags: "--prompts <path>",
        description: "Read many prompts, one a line or JSONL with a prompt and an id, and write JSONL",
        example: "longform generate --prompts prompts.jsonl -n 100 > continued.jsonl",
        convert: text,
      },
      {
        flags: "--batch <n>",
        description: "With --prompts: prompts to decode together, 1 to 256 (default: 32, on a CPU 4)",
        example: "longform generate --prompts prompts.jsonl --batch 16",
        convert: number(
          (n) => Number.isSafeInteger(n) && n >= 1 && n <= MOST_BATCH,
          `a whole number from 1 to ${MOST_BATCH}`,
        ),
      },
      ...RUN,
      {
        flags: "--session <path>",
        description:
          "Restore the prompt's keys and values from this file, or save them there if there is none",
        example: "longform generate -f book.txt --session book.session",
        convert: text,
      },
      {
        flags: "-n, --max-tokens <n>",
        description: "Tokens to generate at most (default: 128)",
        example: 'longform generate "Call me" -n 500',
        convert: integer(0),
      },
      {
        flags: "--temperature <t>",
        description: "Spread of the sampling, 0 is greedy (default: 0.8)",
        example: 'longform generate "The answer is" --temperature 0',
        convert: number((n) => Number.isFinite(n) && n >= 0, "a number from 0"),
      },
      {
        flags: "--top-k <n>",
        description: "Sample from the n likeliest tokens, 0 is all (default: 40)",
        example: 'longform generate "Once upon a time" --top-k 100',
        convert: integer(0),
      },
      {
        flags: "--top-p <p>",
        description: "Sample from the likeliest tokens that add up to p (default: 0.95)",
        example: 'longform generate "Once upon a time" --top-p 0.9',
        convert: number((n) => n > 0 && n <= 1, "above 0 and at most 1"),
      },
      {
        flags: "--min-p <p>",
        description: "Drop tokens below p times the likeliest one (default: 0)",
        example: 'longform generate "Once upon a time" --min-p 0.05 --top-k 0 --top-p 1',
        convert: number((n) => n >= 0 && n <= 1, "from 0 to 1"),
      },
      {
        flags: "--repeat-penalty <x>",
        description: "Make tokens that have occurred less likely, 1 is off (default: 1)",
        example: 'longform generate "Once upon a time" --repeat-penalty 1.1',
        convert: number((n) => Number.isFinite(n) && n > 0, "a number above 0"),
      },
      {
        flags: "--stop <text>",
        description: "End before this text; may be given several times",
        example: 'longform generate -f play.txt --stop "Exit" --stop "Exeunt"',
        convert: (value, flag) => {
          if (value === "") throw new UsageError(`\`${flag}\` is empty: every text would end at once`);
          return value;
        },
        repeatable: true,
      },
      {
        flags: "--ignore-eos",
        description: "Go on after the end-of-text token",
        example: 'longform generate "The end" --ignore-eos -n 300',
      },
      {
        flags: "--logprobs <k>",
        description: "With --json: log-probabilities of each token and of the k likeliest",
        example: 'longform generate "The sky is" -n 1 --logprobs 5 --json',
        convert: integer(0),
      },
      {
        flags: "--in-flight <n>",
        description: "Tokens that the GPU may be at work on at a time, 1 to 64 (default: 12, on a CPU 2)",
        example: 'longform generate "Once upon a time" --in-flight 4',
        convert: number((n) => Number.isSafeInteger(n) && n >= 1 && n <= 64, "a whole number from 1 to 64"),
      },
    ],
    examples: [
      'longform generate "It was the best of times" -n 60 --seed 1',
      "longform generate -f chapter.txt -n 200 --temperature 0 --json",
      "longform generate -f book.txt -n 200 --session book.session",
      "longform generate --prompts prompts.jsonl -n 100 > continued.jsonl",
    ],
  },
  score: {
    usage: "score [...files]",
    description: "Measure how well the model predicts texts: perplexity, by position too",
    positional: { name: "file", least: 0, most: Infinity },
    options: [
      ...RUN,
      {
        flags: "--window <n>",
        description: "Score windows of n tokens, each from position 0 (default: as long as the context)",
        example: "longform score book.txt --window 1k",
        convert: tokens,
      },
      {
        flags: "-n, --max-tokens <n>",
        description: "Score only the first n tokens of each file (default: all)",
        example: "longform score a.txt b.txt --max-tokens 16k",
        convert: tokens,
      },
      {
        flags: "--token-nll",
        description: "With --json: the negative log-likelihood of each token",
        example: "longform score book.txt --token-nll --json > losses.json",
      },
      {
        flags: "--compare <what>",
        description:
          "With --sparsity: how far from dense attention the predictions are; the one choice is dense",
        example: "longform score book.txt --sparsity local:1k --compare dense",
        convert: oneOf("dense"),
      },
      {
        flags: "--logits <places>",
        description: "With --json: the logits after these tokens, such as 0,1023,4095",
        example: "longform score book.txt --logits 0,1023 --json",
        convert: places,
      },
    ],
    examples: [
      "longform score book.txt",
      "longform score a.txt b.txt --max-tokens 16k --window 1k --json",
    ],
  },
  classify: {
    usage: "classify [...files]",
    description: "Label documents of any length, one or a million",
    positional: { name: "file", least: 0, most: Infinity },
    options: [
      {
        flags: "--jsonl",
        description:
          'Read records {"id", "text"}, one a line, from stdin or the files, and write a line for each',
        example: "longform classify --jsonl < documents.jsonl > labels.jsonl",
      },
      ...RUN,
      {
        flags: "-n, --max-tokens <list>",
        description: "Cut documents to n tokens; with several, such as 512,2k,8k, classify each by each",
        example: "longform classify books/ --eval --max-tokens 512,2k,8k",
        convert: lengths,
      },
      {
        flags: "--labels <list>",
        description: "Choose among these texts, such as politics,sports (default: the checkpoint's classes)",
        example: "longform classify books/ --labels adventure,romance,crime",
        convert: names,
      },
      {
        flags: "--template <text>",
        description: `With --labels: where {text} and {label} go (default: "${
          DEFAULT_TEMPLATE.replaceAll("\n", "\\n")
        }")`,
        example:
          "longform classify news.txt --labels sports,politics --template '{text}\\n\\nThis is about {label}'",
        convert: (value) => value.replaceAll("\\n", "\n"),
      },
      {
        flags: "--calibrate",
        description: "With --labels: subtract how likely each label is without the document",
        example: "longform classify news.txt --labels sports,politics --calibrate",
      },
      {
        flags: "--pooling <how>",
        description: "What the head reads: the last token, or the mean of all (default: last)",
        example: "longform classify books/ --pooling mean",
        convert: oneOf("last", "mean"),
      },
      {
        flags: "--window <n>",
        description:
          "Average the head over windows of n tokens, each from position 0: a baseline for long contexts",
        example: "longform classify books/ --window 512",
        convert: tokens,
      },
      {
        flags: "--expected <field>",
        description:
          "Field of the records with the true label: adds accuracy, macro-F1 and a confusion matrix",
        example: "longform classify --jsonl test.jsonl --expected genre > results.jsonl",
        convert: text,
      },
      {
        flags: "--eval",
        description: 'The same with the field "label", or for files with the folder that each lies in',
        example: "longform classify books/ --eval",
      },
      {
        flags: "--out <path>",
        description: "Write the lines to this file, which survives a crash",
        example: "longform classify --jsonl documents.jsonl --out labels.jsonl",
        convert: text,
      },
      {
        flags: "--resume",
        description: "With --out: go on behind the results that the file has",
        example: "longform classify --jsonl documents.jsonl --out labels.jsonl --resume",
      },
      {
        flags: "--shard <i/n>",
        description: "Take every nth document, from the ith; auto or auto/n asks SLURM or Kubernetes for i",
        example: "longform classify books/ --shard 2/8 --out labels.2.jsonl",
        convert: (value) => parseShard(value),
      },
      {
        flags: "--batch <n>",
        description: "Documents that share a pass at most, which changes no result (default: as many as fit)",
        example: "longform classify books/ --batch 4",
        convert: integer(1),
      },
      {
        flags: "--workers <n>",
        description: "Threads that encode texts, 0 to 64 (default: by the number of cores)",
        example: "longform classify books/ --workers 2",
        convert: number((n) => Number.isSafeInteger(n) && n >= 0 && n <= 64, "a whole number from 0 to 64"),
      },
    ],
    examples: [
      "longform classify chapter.txt --max-tokens 16k",
      "longform classify books/ --labels adventure,romance,crime --calibrate -n 8k",
      "longform classify --jsonl --out labels.jsonl --resume < documents.jsonl",
      "longform classify books/ --eval --max-tokens 512,2k,8k,16k",
    ],
  },
  bench: {
    usage: "bench [...compare]",
    description: "Measure prefill, decode, attention and matrix products, results checked",
    positional: { name: "result", least: 0, most: 3 },
    options: [
      {
        flags: "--phases <list>",
        description: `What to measure of ${BENCH_PHASES.join(", ")} (default: prefill,attention,gemm)`,
        example: "longform bench --phases prefill,decode",
        convert: someOf(...BENCH_PHASES),
      },
      {
        flags: "--contexts <list>",
        description: "Lengths to measure at (default: 1k,4k,16k)",
        example: "longform bench --contexts 1k,16k,64k --model-shape gpt2",
        convert: contexts,
      },
      {
        flags: "--attention <list>",
        description: "flash, sparse, or standard, which writes all scores to memory (default: flash)",
        example: "longform bench --phases attention --attention flash,standard",
        convert: someOf(...BENCH_ATTENTION),
      },
      {
        flags: "--sparsity <pattern>",
        description:
          "A pattern for prefill, decode and sparse attention; may be given several times (default: " +
          "dense, for sparse attention random blocks of some densities)",
        example: "longform bench --phases prefill --sparsity local:1k --sparsity sink:64+local:1k",
        convert: pattern,
        repeatable: true,
      },
      {
        flags: "--model-shape <name>",
        description: `Sizes of ${Object.keys(PUBLISHED_SHAPES).join(", ")}, with random weights`,
        example: "longform bench --model-shape gpt2-xl",
        convert: oneOf(...Object.keys(PUBLISHED_SHAPES)),
      },
      {
        flags: "--batch <list>",
        description: "Sequences to decode together, such as 1,8,32 (default: 1)",
        example: "longform bench --phases decode --batch 1,8,32",
        convert: batches,
      },
      {
        flags: "--runs <n>",
        description: "Timed runs of each, after a warm-up (default: 5)",
        example: "longform bench --runs 20",
        convert: integer(1),
      },
      PROFILE,
      TRACE,
      {
        flags: "--report <dir>",
        description:
          "Write a page with plots, report.html, and report.json to a folder; measures more by default: " +
          "decode too, and attention of every kind",
        example: "longform bench --model-shape gpt2 --report report",
        convert: text,
      },
      {
        flags: "--from <file>",
        description: "With --report: draw recorded results, and measure nothing; may be given several times",
        example: "longform bench --report report --from bench/results/h100/gpt2.json",
        convert: text,
        repeatable: true,
      },
      KERNEL,
    ],
    examples: [
      "longform bench",
      "longform bench --model-shape gpt2 --phases attention --attention flash,standard --contexts 1k,4k,16k,64k",
      "longform bench --model-shape gpt2 --phases attention,prefill --attention sparse --sparsity sink:64+local:1k",
      "longform bench --model-shape gpt2 --report report",
      "longform bench compare before.json after.json",
    ],
  },
  info: {
    usage: "info",
    description: "Show what Vulkan finds here, what fits, which kernels would run, and what is wrong",
    positional: { name: "argument", least: 0, most: 0 },
    options: [
      {
        flags: "--measure",
        description: "Also measure how fast the device copies, computes and dispatches",
        example: "longform info --measure",
      },
      KERNEL,
    ],
    examples: ["longform info", "longform info --measure", "longform info --json --adapter 1"],
  },
  inspect: {
    usage: "inspect <model>",
    description: "Show a model folder's tensors, and what would not load",
    positional: { name: "model", least: 1, most: 1 },
    options: [],
    examples: ["longform inspect weights/classics-16k"],
  },
  pull: {
    usage: "pull <repo>",
    description: "Download a model from the Hugging Face Hub: REPO or REPO@REVISION, resumed and checked",
    positional: { name: "repo", least: 1, most: 1 },
    options: [],
    examples: [
      "longform pull openai-community/gpt2",
      "longform pull openai-community/gpt2@main --json",
      'longform generate "It was the best of times" -m openai-community/gpt2',
    ],
  },
} as const satisfies Record<
  string,
  {
    usage: string;
    description: string;
    positional: { readonly name: string; readonly least: number; readonly most: number };
    options: readonly OptionSpec[];
    examples: readonly string[];
  }
>;

type CommandName = keyof typeof COMMANDS;

/** Marks a placeholder for the value at an index; no argument of a process can hold a NUL. */
const PLACEHOLDER = "\0";

/** Names of an option as they are typed: `-n`, `--max-tokens`. */
export function namesOf(spec: OptionSpec): string[] {
  return spec.flags.replace(/<.*>/, "").split(",").map((name) => name.trim());
}

function takesValue(spec: OptionSpec): boolean {
  return spec.convert !== undefined;
}

/**
 * Replaces every value and positional after the command's name by a placeholder, and puts the positionals first. Every
 * flag is checked here, because `cac` takes too much: `--no-seed`, `--maxTokens`, `--stop.a`, and what follows a switch
 * with a hyphen in its name as that switch's value.
 */
function hideValues(
  name: CommandName,
  argv: readonly string[],
  specs: readonly OptionSpec[],
): { argv: string[]; values: string[] } {
  const values: string[] = [];
  const positionals: string[] = [];
  const hidden: string[] = [];
  const hide = (value: string) => `${PLACEHOLDER}${values.push(value) - 1}`;
  const valued = new Set(specs.filter(takesValue).flatMap(namesOf));
  const switches = new Set(["-h", "--help", ...specs.filter((spec) => !takesValue(spec)).flatMap(namesOf)]);
  const rest = [...argv];
  for (let arg = rest.shift(); arg !== undefined; arg = rest.shift()) {
    const [flag, attached] = splitFlag(arg);
    if (arg === "--") {
      positionals.push(...rest.splice(0).map(hide));
    } else if (!arg.startsWith("-") || arg === "-") {
      positionals.push(hide(arg));
    } else if (valued.has(flag)) {
      const value = attached ?? rest.shift();
      if (value === undefined) {
        throw new UsageError(`\`${flag}\` needs a value`, {
          hint: `\`longform ${name} --help\` shows what it takes`,
        });
      }
      hidden.push(flag, hide(value.replace(/^=/, "")));
    } else if (!switches.has(flag)) {
      throw new UsageError(`There is no option \`${flag}\``, {
        hint: `\`longform ${name} --help\` lists the options; a text that begins with - goes behind \`--\``,
      });
    } else if (attached?.startsWith("=")) {
      throw new UsageError(`\`${flag}\` takes no value`, { hint: `leave \`${attached}\` away` });
    } else {
      hidden.push(flag);
      if (attached !== undefined) rest.unshift(`-${attached}`);
    }
  }
  return { argv: [...positionals, ...hidden], values };
}

/** `--seed=7` is `--seed` and `=7`, `-n7` is `-n` and `7`, `-qn` is `-q` and `n`. */
function splitFlag(arg: string): [flag: string, attached: string | undefined] {
  const length = !arg.startsWith("--") ? 2 : arg.includes("=") ? arg.indexOf("=") : arg.length;
  return [arg.slice(0, length), arg.length > length ? arg.slice(length) : undefined];
}

function declare(cli: CAC, name: CommandName): Command {
  const { usage, description, options, examples } = COMMANDS[name];
  const command = cli.command(usage, description);
  for (const spec of [...options, ...COMMON]) command.option(spec.flags, spec.description);
  for (const example of examples) command.example(`  $ ${example}`);
  return command;
}

/** Parsed options, or undefined when help or the version was asked for and has been printed. */
export function parseOptions(args: readonly string[]): Options | undefined {
  if (args[0] === "help") return parseOptions([...args.slice(1), "--help"]);
  const cli = cac("longform");
  cli.help((sections) => {
    sections.splice(1, 0, { title: "Try", body: `  $ ${COMMANDS.generate.examples[0]}` });
  });
  cli.showHelpOnExit = false; // by us, below
  cli.option("--version", "Show the version and the runtime");
  for (const name of Object.keys(COMMANDS) as CommandName[]) declare(cli, name);

  const at = findCommand(args);
  const name = at < 0 ? undefined : args[at]!;
  if (name === undefined) {
    const isHelp = args.length === 0 || args.some((arg) => arg === "-h" || arg === "--help");
    if (isHelp) showHelp(cli);
    else if (args.includes("--version")) writeResult(`longform ${VERSION} (${runtimeName()})\n`);
    else {
      throw new UsageError(`There is no command in \`longform ${args.join(" ")}\``, { hint: commandsHint() });
    }
    return undefined;
  }
  if (!isCommand(name)) throw new UsageError(`There is no command \`${name}\``, { hint: commandsHint() });
  const specs: readonly OptionSpec[] = [...COMMANDS[name].options, ...COMMON];
  const { argv, values } = hideValues(name, [...args.slice(0, at), ...args.slice(at + 1)], specs);
  cli.parse(["", "longform", name, ...argv], { run: false });
  if (cli.options["help"]) {
    showHelp(cli);
    return undefined;
  }
  const shown = (placeholder: unknown) => values[Number(String(placeholder).slice(PLACEHOLDER.length))]!;
  const positionals = cli.args.map(shown);
  checkPositionals(name, positionals);
  return Object.freeze(typed(name, positionals, (flag) => lookUp(cli, specs, flag, shown)));
}

/** The place of the command: the first argument that is neither an option, of whichever command, nor its value. */
function findCommand(args: readonly string[]): number {
  const specs: readonly OptionSpec[] = [
    ...COMMON,
    ...Object.values(COMMANDS).flatMap(({ options }) => options),
  ];
  const valued = new Set(specs.filter(takesValue).flatMap(namesOf));
  for (let i = 0; i < args.length; i++) {
    if (!args[i]!.startsWith("-")) return i;
    let [flag, attached] = splitFlag(args[i]!);
    // Of several short options only the last can take the next argument.
    while (attached && !valued.has(flag) && !flag.startsWith("--")) {
      [flag, attached] = splitFlag(`-${attached}`);
    }
    if (valued.has(flag) && attached === undefined) i++;
  }
  return -1;
}

/** Writes the help of the matched command, or of all, as a result: `console.info` loses it on a full disk, silently. */
function showHelp(cli: CAC): void {
  const { info } = console;
  try {
    console.info = (help: string) => writeResult(`${help}\n`);
    cli.outputHelp();
  } finally {
    console.info = info;
  }
}

function isCommand(name: string): name is CommandName {
  return Object.hasOwn(COMMANDS, name);
}

function commandsHint(): string {
  return `the commands are ${Object.keys(COMMANDS).join(", ")}; \`longform --help\` shows them`;
}

function checkPositionals(name: CommandName, positionals: readonly string[]): void {
  const { positional, usage } = COMMANDS[name];
  if (positionals.length > positional.most) {
    throw new UsageError(`\`${name}\` does not take "${positionals[positional.most]}"`, {
      hint: positional.most === 1
        ? `put the ${positional.name} in quotes: longform ${usage}`
        : `use it as: longform ${usage}`,
    });
  }
  if (positionals.length < positional.least) {
    throw new UsageError(`\`${name}\` needs a ${positional.name}`, { hint: `use it as: longform ${usage}` });
  }
}

/** The converted value of an option; all of them for a repeatable one, a count for a switch. */
function lookUp(
  cli: CAC,
  specs: readonly OptionSpec[],
  flag: string,
  shown: (placeholder: unknown) => string,
): unknown {
  const spec = specs.find((s) => namesOf(s).includes(flag))!;
  const key = flag.slice(2).replace(/-(.)/g, (_, letter: string) => letter.toUpperCase());
  const raw = cli.options[key];
  const given = raw === undefined ? [] : [raw].flat();
  if (!spec.convert) return given.filter(Boolean).length;
  const converted = given.map((placeholder) => convertValue(spec, shown(placeholder), flag));
  return spec.repeatable ? converted : converted.at(-1);
}

/** @throws UsageError with an example, unless the option's own hint says more */
function convertValue(spec: OptionSpec, value: string, flag: string): unknown {
  try {
    return spec.convert!(value, flag);
  } catch (error) {
    if (!(error instanceof UsageError) || error.hint !== undefined) throw error;
    throw new UsageError(error.message, { hint: `for example: ${spec.example}` });
  }
}

function typed(name: CommandName, positionals: readonly string[], get: (flag: string) => unknown): Options {
  const optional = <T>(flag: string) => get(flag) as T | undefined;
  const common: CommonOptions = {
    model: optional("--model"),
    dtype: optional<CommonOptions["dtype"]>("--dtype") ?? "auto",
    seed: optional("--seed"),
    adapter: optional("--adapter"),
    fallbackAdapter: get("--fallback-adapter") !== 0,
    json: get("--json") !== 0,
    quiet: get("--quiet") !== 0,
    verbose: get("--verbose") as number,
  };
  const kernels = () => new Map(get("--kernel") as [role: string, kernel: string][]);
  if (name === "info") {
    return { ...common, command: "info", measure: get("--measure") !== 0, kernels: kernels() };
  }
  if (name === "bench") return typedBench(common, positionals, kernels(), get);
  if (name === "inspect") return { ...common, command: "inspect", path: positionals[0]! };
  if (name === "pull") return { ...common, command: "pull", repo: positionals[0]! };
  const run: RunOptions = {
    ...common,
    ids: optional("--ids"),
    context: optional("--context"),
    positions: optional<PositionMode>("--positions") ?? "exact",
    sparsity: optional<Pattern>("--sparsity") ?? { kind: "dense" },
    profile: get("--profile") !== 0,
    trace: optional("--trace"),
    kernels: kernels(),
  };
  if (name === "classify") return typedClassify(run, positionals, get);
  return name === "score" ? typedScore(run, positionals, get) : typedGenerate(run, positionals, get);
}

function typedClassify(
  run: RunOptions,
  files: readonly string[],
  get: (flag: string) => unknown,
): ClassifyOptions {
  const optional = <T>(flag: string) => get(flag) as T | undefined;
  const jsonl = get("--jsonl") !== 0;
  const options: ClassifyOptions = {
    ...run,
    command: "classify",
    files,
    jsonl,
    maxTokens: optional("--max-tokens"),
    labels: optional("--labels"),
    template: optional("--template"),
    calibrate: get("--calibrate") !== 0,
    pooling: optional<Pooling>("--pooling") ?? "last",
    window: optional("--window"),
    expected: optional("--expected") ?? (get("--eval") !== 0 ? "label" : undefined),
    out: optional("--out"),
    resume: get("--resume") !== 0,
    shard: optional("--shard"),
    batch: optional("--batch"),
    workers: optional("--workers"),
  };
  const { ids, labels, sparsity } = options;
  if (ids !== undefined && (files.length > 0 || jsonl)) {
    throw new UsageError(`There are ${jsonl ? "`--jsonl`" : "files"} and \`--ids\`: give one or the other`);
  }
  if (jsonl && options.json && options.out === undefined) {
    throw new UsageError(
      "`--jsonl` prints a line for each record, and `--json` one document: give one of them",
    );
  }
  if (optional("--expected") !== undefined && !jsonl) {
    throw new UsageError("`--expected` names a field of records, which come with `--jsonl`", {
      hint: "use `--eval` for files that lie in folders named after their labels",
    });
  }
  if (ids !== undefined && options.expected !== undefined) {
    throw new UsageError("`--ids` is one document without a label: leave `--eval` away");
  }
  if (ids !== undefined && options.shard !== undefined) {
    throw new UsageError("`--ids` is one document, which cannot be divided: leave `--shard` away");
  }
  if (options.resume && options.out === undefined) {
    throw new UsageError("`--resume` needs the file to go on with: add `--out`");
  }
  if (!labels && (options.template !== undefined || options.calibrate)) {
    throw new UsageError(
      `\`${
        options.template === undefined ? "--calibrate" : "--template"
      }\` is for labels that are texts: add \`--labels\``,
    );
  }
  if (labels && (options.pooling === "mean" || options.window !== undefined)) {
    const flag = options.window === undefined ? "--pooling" : "--window";
    throw new UsageError(`\`${flag}\` is for the score head, and \`--labels\` does not use it`);
  }
  if (sparsity.kind === "topk") {
    throw new UsageError("`--sparsity topk` chooses blocks while decoding, and `classify` does not decode", {
      hint: `use ${PATTERN_GRAMMAR.replace(", topk:K", "")}`,
    });
  }
  if (labels && sparsity.kind !== "dense") {
    throw new UsageError(
      "`--labels` reads all of a document: leave `--sparsity` away, or use the score head",
    );
  }
  return options;
}

/** What says what to measure. */
const MEASURING = [
  "--phases",
  "--contexts",
  "--attention",
  "--sparsity",
  "--model-shape",
  "--batch",
  "--runs",
  "--kernel",
  "--trace",
] as const;

function typedBench(
  common: CommonOptions,
  positionals: readonly string[],
  kernels: ReadonlyMap<string, string>,
  get: (flag: string) => unknown,
): BenchOptions {
  const optional = <T>(flag: string) => get(flag) as T | undefined;
  const sparsity = get("--sparsity") as Pattern[];
  const report = optional<string>("--report");
  const [word, a, b] = positionals;
  if (word !== undefined && (word !== "compare" || a === undefined || b === undefined)) {
    throw new UsageError(`\`bench\` does not take "${positionals.join(" ")}"`, {
      hint: "two results are compared by `longform bench compare A.json B.json`",
    });
  }
  const options: BenchOptions = {
    ...common,
    command: "bench",
    phases: optional<BenchPhase[]>("--phases") ??
      (report === undefined ? ["prefill", "attention", "gemm"] : ["prefill", "decode", "attention", "gemm"]),
    contexts: optional<number[]>("--contexts") ?? [1024, 4096, 16384],
    attention: optional<BenchAttention[]>("--attention") ??
      (report === undefined ? ["flash"] : ["flash", "sparse", "standard"]),
    sparsity: sparsity.length > 0 ? sparsity : undefined,
    modelShape: optional<PublishedShape>("--model-shape"),
    runs: optional("--runs") ?? 5,
    batch: optional<number[]>("--batch") ?? [1],
    kernels,
    profile: get("--profile") !== 0,
    trace: optional("--trace"),
    report,
    from: get("--from") as string[],
    compare: a === undefined || b === undefined ? undefined : [a, b],
  };
  const { from, compare } = options;
  if (compare && (report !== undefined || from.length > 0)) {
    throw new UsageError("`bench compare` prints a table: leave `--report` and `--from` away");
  }
  if (from.length > 0 && report === undefined) {
    throw new UsageError("`--from` names results to draw: add `--report` with a folder for the page");
  }
  const measuring = MEASURING.find((flag) => [get(flag) ?? []].flat().length > 0);
  if (measuring !== undefined && (compare || from.length > 0)) {
    throw new UsageError(
      `\`${measuring}\` says what to measure, and ${compare ? "`compare`" : "`--from`"} measures nothing`,
    );
  }
  if (options.model !== undefined && options.modelShape !== undefined) {
    throw new UsageError("There are `--model` and `--model-shape`: give one or the other");
  }
  return options;
}

function typedScore(
  run: RunOptions,
  files: readonly string[],
  get: (flag: string) => unknown,
): ScoreOptions {
  const optional = <T>(flag: string) => get(flag) as T | undefined;
  const options: ScoreOptions = {
    ...run,
    command: "score",
    files,
    window: optional("--window"),
    maxTokens: optional("--max-tokens"),
    tokenNll: get("--token-nll") !== 0,
    compare: get("--compare") !== undefined,
    logits: optional<number[]>("--logits") ?? [],
  };
  const { kind } = options.sparsity;
  if (kind === "topk") {
    throw new UsageError("`--sparsity topk` chooses blocks while decoding, and `score` does not decode", {
      hint: "score with another pattern; docs/sparsity.md has what `topk` costs in quality",
    });
  }
  if (options.compare && kind === "dense") {
    throw new UsageError("`--compare dense` needs something to compare: add `--sparsity`", {
      hint: `use ${PATTERN_GRAMMAR.replace("dense, ", "").replace(", topk:K", "")}`,
    });
  }
  if (files.length > 0 && options.ids !== undefined) {
    throw new UsageError("There are files and `--ids`: give one or the other");
  }
  if (files.filter((file) => file === "-").length > 1) {
    throw new UsageError("Standard input, `-`, is named twice and can be read once");
  }
  const { window, context } = options;
  if (window !== undefined && context !== undefined && window > context) {
    throw new UsageError(`\`--window ${window}\` is more than \`--context ${context}\``, {
      hint: "give a smaller window or a larger context",
    });
  }
  if ((options.tokenNll || options.logits.length > 0) && !options.json) {
    throw new UsageError(
      `\`${options.tokenNll ? "--token-nll" : "--logits"}\` has nowhere to go: add \`--json\``,
    );
  }
  return options;
}

function typedGenerate(
  run: RunOptions,
  positionals: readonly string[],
  get: (flag: string) => unknown,
): GenerateOptions {
  const optional = <T>(flag: string) => get(flag) as T | undefined;
  const options: GenerateOptions = {
    ...run,
    command: "generate",
    prompt: positionals[0],
    file: optional("--file"),
    prompts: optional("--prompts"),
    batch: optional("--batch"),
    session: optional("--session"),
    maxTokens: optional("--max-tokens") ?? 128,
    temperature: optional("--temperature") ?? 0.8,
    topK: optional("--top-k") ?? 40,
    topP: optional("--top-p") ?? 0.95,
    minP: optional("--min-p") ?? 0,
    repeatPenalty: optional("--repeat-penalty") ?? 1,
    stop: get("--stop") as string[],
    ignoreEos: get("--ignore-eos") !== 0,
    logprobs: optional("--logprobs"),
    inFlight: optional("--in-flight"),
  };
  const sources = [options.prompt, options.file, options.ids, options.prompts];
  if (sources.filter((source) => source !== undefined).length > 1) {
    throw new UsageError(
      "There are several prompts: give one of a prompt, `--file`, `--ids` and `--prompts`",
    );
  }
  if (options.prompts !== undefined && options.session !== undefined) {
    throw new UsageError("`--session` is for a single prompt: leave it or `--prompts` away");
  }
  if (options.batch !== undefined && options.prompts === undefined) {
    throw new UsageError("`--batch` is for many prompts: give them with `--prompts`");
  }
  if (options.prompt === "") {
    throw new UsageError("The prompt is empty", { hint: "give at least one character" });
  }
  if (options.logprobs !== undefined && !options.json) {
    throw new UsageError("`--logprobs` has nowhere to go: add `--json`");
  }
  return options;
}
