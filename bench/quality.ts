/**
 * What the measurements of attention patterns share: their options and texts, models that are on the device
 * only while they are used, and decoding of tokens that are known.
 */
import { readIds } from "../src/cli/input.ts";
import { chooseElem, openSparsity } from "../src/model/run_settings.ts";
import type { CommonOptions } from "../src/cli/options.ts";
import { parsePattern, patternName } from "../src/kvcache/patterns.ts";
import type { Sparsity } from "../src/kvcache/sparsity.ts";
import { type GPT2Config, readConfig } from "../src/model/config.ts";
import { Gpt2, type Gpt2Options } from "../src/model/gpt2.ts";
import type { PositionMode } from "../src/model/positions.ts";
import { openCheckpoint } from "../src/model/safetensors.ts";
import type { WeightSource } from "../src/model/weight_source.ts";
import { type Gpu, openDevice } from "../src/runtime/device.ts";
import { provenance, writeResult } from "./provenance.ts";

/** Every static pattern at two densities, masks with some layers dense, and the choice of blocks while decoding. */
const PATTERNS = [
  ...["local:1024", "local:4096", "sink:64+local:1024", "sink:64+local:4096"],
  ...["strided:1024,1024", "strided:1024,256", "bigbird:64,1024,1024", "bigbird:64,1024,4096"],
  ...["butterfly", "butterfly:512"],
  ...["layers-0-2-dense", "layers-3-5-local"].map((name) => `file:bench/masks/${name}.json`),
  ...["topk:1024", "topk:2048"],
];

/** For `parseArgs`. */
export const PATTERN_OPTIONS = {
  model: { type: "string", default: "weights/classics-16k" },
  dtype: { type: "string", default: "auto" },
  window: { type: "string", default: "16k" },
  positions: { type: "string", default: "exact" },
  patterns: { type: "string", default: PATTERNS.join(";") },
  commit: { type: "string" },
  out: { type: "string" },
} as const;

export interface PatternValues {
  readonly model: string;
  readonly dtype: string;
  readonly window: string;
  readonly positions: string;
  /** Separated by semicolons. */
  readonly patterns: string;
  readonly commit?: string | undefined;
  readonly out?: string | undefined;
}

/**
 * A number of tokens such as 4096 or 4k.
 * @throws Error when it is none
 */
export function parseTokens(text: string): number {
  const match = /^(\d+)(k?)$/i.exec(text);
  if (!match) throw new Error(`\`${text}\` is no number of tokens such as 4096 or 4k`);
  return Number(match[1]) * (match[2] ? 1024 : 1);
}

/**
 * The first `most` tokens of a text.
 * @throws Error when it has fewer
 */
export async function readText(path: string, most: number): Promise<Uint32Array> {
  const ids = await readIds(path);
  if (ids.length < most) throw new Error(`${path} has ${ids.length} tokens, and ${most} are needed`);
  return Uint32Array.from(ids.slice(0, most));
}

/** One line of a Markdown table. */
export function tableRow(cells: readonly string[]): string {
  return `| ${cells.join(" | ")} |`;
}

export function tableHead(names: readonly string[]): string {
  return `${tableRow(names)}\n${tableRow(names.map(() => "---"))}`;
}

/** To decode known tokens with: nothing is drawn, and each step waits for the one before. */
export const KNOWN_DECODING = { sequences: 1, inFlight: 2 };

/** The device and the checkpoint of a measurement. */
export class PatternBench {
  readonly window: number;
  readonly sparsities: readonly Sparsity[];
  readonly #gpu: Gpu;
  readonly #source: WeightSource;
  readonly #config: GPT2Config;
  readonly #options: Pick<Gpt2Options, "context" | "elem" | "positions">;
  readonly #values: PatternValues;

  private constructor(
    values: PatternValues,
    sparsities: readonly Sparsity[],
    gpu: Gpu,
    source: WeightSource,
    config: GPT2Config,
  ) {
    const { nPositions } = config;
    const context = parseTokens(values.window);
    this.window = context;
    this.sparsities = sparsities;
    this.#gpu = gpu;
    this.#source = source;
    this.#config = config;
    this.#options = {
      context,
      elem: chooseElem(values.dtype as CommonOptions["dtype"], gpu.caps),
      positions: { mode: values.positions as PositionMode, nPositions, context },
    };
    this.#values = values;
  }

  static async open(values: PatternValues): Promise<PatternBench> {
    const patterns = values.patterns.split(";").map(parsePattern);
    const sparsities = await Promise.all(patterns.map(openSparsity));
    const config = await readConfig(values.model);
    const source = await openCheckpoint(values.model);
    return new PatternBench(values, sparsities, await openDevice(), source, config);
  }

  /** The model, for counting the blocks of a pattern. */
  get heads(): { readonly layers: number; readonly heads: number } {
    return { layers: this.#config.nLayer, heads: this.#config.nHead };
  }

  /** Lends a model for each of the patterns, all on the device at once, and destroys them when `use` ends. */
  async withModels<T>(
    sparsities: readonly Sparsity[],
    options: Pick<Gpt2Options, "scoring" | "comparing" | "decoding">,
    use: (models: readonly Gpt2[]) => Promise<T>,
  ): Promise<T> {
    const models: Gpt2[] = [];
    try {
      for (const sparsity of sparsities) {
        const all = { ...this.#options, ...options, sparsity };
        models.push(await Gpt2.load(this.#gpu, this.#source, this.#config, all));
      }
      return await use(models);
    } finally {
      for (const model of models) model.destroy();
    }
  }

  /** Gives the device back and writes the result where `--out` says. */
  async finish(result: object): Promise<void> {
    const { out, commit, positions } = this.#values;
    const { name, driver } = this.#gpu.caps;
    const { elem } = this.#options;
    if (out) {
      const measured = { window: this.window, positions, dtype: elem, ...result };
      writeResult(out, { adapter: name, driver, ...provenance(commit), ...measured });
    }
    await this.#source.close();
    this.#gpu.destroy();
  }
}

export function nameOf({ pattern }: Sparsity): string {
  return patternName(pattern);
}

/** Whether the pattern changes decoding alone. */
export function isDecoded({ pattern }: Sparsity): boolean {
  return pattern.kind === "topk";
}

/** A model that remembers what it has prefilled, so that of documents that begin alike only the rest is run. */
export class Reader {
  readonly model: Gpt2;
  /** The cache begins with these tokens; what is behind them is of no use. */
  #held = new Uint32Array(0);

  constructor(model: Gpt2) {
    this.model = model;
  }

  /** Leaves the first `end` tokens of a document in the cache, and nothing else. */
  async read(document: Uint32Array, end: number): Promise<void> {
    let common = 0;
    const most = Math.min(end, this.#held.length);
    while (common < most && document[common] === this.#held[common]) common++;
    this.model.truncate(common);
    if (common < end) await this.model.prefill(document.subarray(common, end));
    this.#held = document.slice(0, end);
  }
}

/** What models say of a token of which they have seen all those before. */
export interface Prediction {
  readonly position: number;
  readonly token: number;
  /** Of each model, `[vocab]`. */
  readonly logits: readonly Float32Array[];
}

/**
 * Prefills `start` tokens of a document and decodes the `count` after them. Yields, behind each decoded token,
 * what the models predict to come next. They take every step together, so that their ways to the GPU and back
 * overlap.
 */
export async function* decodeKnown(
  readers: readonly Reader[],
  document: Uint32Array,
  { start, count }: { readonly start: number; readonly count: number },
): AsyncGenerator<Prediction> {
  for (const reader of readers) await reader.read(document, start);
  for (let position = start + 1; position <= start + count; position++) {
    const logits = await Promise.all(readers.map(({ model }) => model.decodeStep(document[position - 1]!)));
    yield { position, token: document[position]!, logits };
  }
}
