/**
 * Matches the tensors of a checkpoint with the ones that GPT-2 needs, by the names of the published models: with or
 * without the `transformer.` prefix, output head tied or stored, Conv1D weights `[in, out]`.
 */
import { ModelError } from "../runtime/errors.ts";
import type { GPT2Config } from "./config.ts";
import {
  elementCount,
  formatShape,
  isStoredDType,
  quoteName,
  type StoredDType,
  type TensorInfo,
  type WeightSource,
} from "./weight_source.ts";

/** A tensor that GPT-2 can load. */
export interface LoadableTensor extends TensorInfo {
  readonly dtype: StoredDType;
}

export interface ResolvedCheckpoint {
  /** By canonical name: `wte.weight`, `h.0.attn.c_attn.weight`, … without prefix; no `lm_head.weight` when tied. */
  readonly tensors: ReadonlyMap<string, LoadableTensor>;
  /** The output head is `wte.weight`. */
  readonly tiedLmHead: boolean;
  /** Rows of `score.weight` `[classes, nEmbd]`, the head for classification; undefined where there is none. */
  readonly classes: number | undefined;
  /** Names of tensors that GPT-2 does not use, attention mask buffers aside. */
  readonly ignored: readonly string[];
  /** Elements of all tensors in `tensors`. */
  readonly parameters: number;
}

/** What can be loaded, and why the rest cannot: complete if `problems` is empty. */
export interface CheckpointCheck extends ResolvedCheckpoint {
  readonly problems: readonly ModelError[];
}

const PREFIX = "transformer.";
/** Causal masks that older versions of transformers stored with every block; they are constants. */
const MASK_BUFFER = /^h\.\d+\.attn\.(bias|masked_bias)$/;
const INCOMPLETE = "the checkpoint may be incomplete or of another model: download it again";

/** Canonical names and shapes of a model without its heads, in the order of the forward pass. */
export function expectedShapes(config: GPT2Config): ReadonlyMap<string, readonly number[]> {
  const { vocabSize, nPositions, nEmbd, nInner, nLayer } = config;
  const shapes = new Map<string, readonly number[]>();
  shapes.set("wte.weight", [vocabSize, nEmbd]);
  shapes.set("wpe.weight", [nPositions, nEmbd]);
  for (let layer = 0; layer < nLayer; layer++) {
    const add = (name: string, shape: readonly number[]) => shapes.set(`h.${layer}.${name}`, shape);
    add("ln_1.weight", [nEmbd]);
    add("ln_1.bias", [nEmbd]);
    add("attn.c_attn.weight", [nEmbd, 3 * nEmbd]);
    add("attn.c_attn.bias", [3 * nEmbd]);
    add("attn.c_proj.weight", [nEmbd, nEmbd]);
    add("attn.c_proj.bias", [nEmbd]);
    add("ln_2.weight", [nEmbd]);
    add("ln_2.bias", [nEmbd]);
    add("mlp.c_fc.weight", [nEmbd, nInner]);
    add("mlp.c_fc.bias", [nInner]);
    add("mlp.c_proj.weight", [nInner, nEmbd]);
    add("mlp.c_proj.bias", [nEmbd]);
  }
  shapes.set("ln_f.weight", [nEmbd]);
  shapes.set("ln_f.bias", [nEmbd]);
  return shapes;
}

/** Finds every tensor that GPT-2 needs, or throws what is wrong with the first that does not fit. */
export function resolveCheckpoint(source: WeightSource, config: GPT2Config): ResolvedCheckpoint {
  const { problems, ...resolved } = checkCheckpoint(source, config);
  const [first, ...others] = problems;
  if (!first) return resolved;
  if (others.length === 0) throw first;
  const more = others.length === 1 ? "1 more problem" : `${others.length} more problems`;
  throw new ModelError(`${first.message} (and ${more})`, {
    hint: `${first.hint ?? INCOMPLETE}; \`inspect\` lists every problem`,
  });
}

/** As `resolveCheckpoint`, but returns everything that is wrong instead of throwing. */
export function checkCheckpoint(source: WeightSource, config: GPT2Config): CheckpointCheck {
  const problems: ModelError[] = [];
  const found = canonicalTensors(source, problems);
  const tensors = new Map<string, LoadableTensor>();
  const take = (name: string, shape: readonly number[]) => {
    const info = found.get(name);
    if (!info) {
      problems.push(new ModelError(`${source.description} has no tensor ${name}`, { hint: INCOMPLETE }));
      return;
    }
    const faults = [shapeProblem(info, shape), dtypeProblem(info)].filter((fault) => fault !== undefined);
    problems.push(...faults);
    if (faults.length === 0) tensors.set(name, info as LoadableTensor);
  };
  for (const [name, shape] of expectedShapes(config)) take(name, shape);
  if (!config.tieWordEmbeddings) take("lm_head.weight", [config.vocabSize, config.nEmbd]);
  const score = found.get("score.weight");
  if (score) take("score.weight", [config.id2label.length || (score.shape[0] ?? 1), config.nEmbd]);
  problems.push(...surplusBlocks(found, config, source.description));
  return {
    tensors,
    tiedLmHead: config.tieWordEmbeddings,
    classes: tensors.get("score.weight")?.shape[0],
    ignored: unusedTensors(found, config),
    parameters: [...tensors.values()].reduce((sum, info) => sum + elementCount(info.shape), 0),
    problems,
  };
}

/** The name without prefix; only GPT-2's own parts can have it. */
function canonicalName(name: string): string {
  return /^transformer\.(wte|wpe|h|ln_f)\./.test(name) ? name.slice(PREFIX.length) : name;
}

function canonicalTensors(source: WeightSource, problems: ModelError[]): Map<string, TensorInfo> {
  const found = new Map<string, TensorInfo>();
  for (const info of source.tensors.values()) {
    const name = canonicalName(info.name);
    const other = found.get(name);
    if (other) {
      problems.push(
        new ModelError(
          `${source.description} has both ${quoteName(other.name)} and ${quoteName(info.name)}`,
          {
            hint: `keep one of them: a checkpoint is stored with the prefix "${PREFIX}" or without`,
          },
        ),
      );
    } else found.set(name, info);
  }
  return found;
}

function shapeProblem(info: TensorInfo, wanted: readonly number[]): ModelError | undefined {
  const { shape } = info;
  if (shape.length === wanted.length && shape.every((size, axis) => size === wanted[axis])) return undefined;
  const transposed = wanted.length === 2 && shape.length === 2 && shape[0] === wanted[1] &&
    shape[1] === wanted[0];
  return new ModelError(
    `Tensor ${quoteName(info.name)} in ${info.file} has shape ${formatShape(shape)}, config.json wants ${
      formatShape(wanted)
    }`,
    {
      hint: transposed
        ? "the weight is transposed: GPT-2 stores Conv1D weights as [in, out]"
        : "config.json and the weights belong to different models: download both again",
    },
  );
}

function dtypeProblem(info: TensorInfo): ModelError | undefined {
  if (isStoredDType(info.dtype)) return undefined;
  return new ModelError(
    `Tensor ${
      quoteName(info.name)
    } in ${info.file} is stored as ${info.dtype}, longform loads F32, F16 and BF16`,
    { hint: "convert the checkpoint to one of these, or use one that is not quantized" },
  );
}

/** Blocks beyond `n_layer`: leaving them out would run without complaint and compute another model. */
function surplusBlocks(
  found: ReadonlyMap<string, TensorInfo>,
  config: GPT2Config,
  where: string,
): ModelError[] {
  let last = -1;
  for (const name of found.keys()) last = Math.max(last, Number(/^h\.(\d+)\./.exec(name)?.[1] ?? -1));
  if (last < config.nLayer) return [];
  return [
    new ModelError(`${where} has a block h.${last}, but config.json has n_layer ${config.nLayer}`, {
      hint: `set n_layer to ${last + 1} in config.json, or download both again`,
    }),
  ];
}

function unusedTensors(found: ReadonlyMap<string, TensorInfo>, config: GPT2Config): string[] {
  const expected = expectedShapes(config);
  // A tied head that is stored all the same is a copy of wte, not something unexpected.
  const heads = ["lm_head.weight", "score.weight"];
  return [...found].filter(([name]) =>
    !expected.has(name) && !heads.includes(name) && !MASK_BUFFER.test(name)
  )
    .map(([, info]) => info.name);
}
