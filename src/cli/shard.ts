/** `--shard I/N`: which part of a collection a process takes, given by hand or by the scheduler that started it. */
import process from "node:process";
import { UsageError } from "../runtime/errors.ts";

/** One of `count` parts of a collection: the documents whose index leaves `index` when divided by `count`. */
export interface Shard {
  /** From 0. */
  readonly index: number;
  readonly count: number;
}

export type Environment = Readonly<Record<string, string | undefined>>;

const EXAMPLE = "give it as I/N, such as `--shard 1/4` for the first of four";
const WORK_ARRAY =
  "start the tasks as an array with consecutive numbers, or give each its part as `--shard I/N`";

/** Whether a document belongs to the shard; every document does where there is none. */
export function isInShard(shard: Shard | undefined, index: number): boolean {
  return shard === undefined || index % shard.count === shard.index;
}

/**
 * The value of `--shard`. `I/N`: I counts from 1. `auto`: the place of this task in a SLURM job array. `auto/N`: the
 * same, or the index of this pod in a Kubernetes indexed job of N completions.
 * @param env variables of the environment; one that may not be read counts as not set
 * @throws UsageError
 */
export function parseShard(value: string, env: Environment = process.env): Shard {
  const match = /^(\d+|auto)\/(\d+)$/.exec(value);
  if (!match && value !== "auto") {
    throw new UsageError(`\`--shard ${value}\` is neither I/N, auto nor auto/N`, { hint: EXAMPLE });
  }
  const [, part, countText] = match ?? [];
  const count = countText === undefined ? undefined : Number(countText);
  if (count !== undefined && !(count >= 1 && Number.isSafeInteger(count))) {
    throw outOfRange(value, "there is at least one shard");
  }
  if (part === undefined || part === "auto") return scheduledShard(value, count, env);
  const number = Number(part);
  if (number < 1 || number > count!) {
    throw outOfRange(value, `the shards are numbered from 1 to ${count}`);
  }
  return { index: number - 1, count: count! };
}

function outOfRange(value: string, why: string): UsageError {
  return new UsageError(`\`--shard ${value}\` is out of range: ${why}`, { hint: EXAMPLE });
}

/** @param count of `auto/N`; undefined for `auto` */
function scheduledShard(value: string, count: number | undefined, env: Environment): Shard {
  if (variable(env, "SLURM_ARRAY_TASK_ID") !== undefined) return slurmShard(value, count, env);
  if (variable(env, "JOB_COMPLETION_INDEX") === undefined) {
    const names = count === undefined
      ? "SLURM_ARRAY_TASK_ID is not"
      : "neither SLURM_ARRAY_TASK_ID nor JOB_COMPLETION_INDEX is";
    throw new UsageError(`\`--shard ${value}\` finds no job array: ${names} set`, { hint: EXAMPLE });
  }
  if (count === undefined) {
    throw new UsageError("`--shard auto` cannot tell how many shards there are: Kubernetes does not say", {
      hint: "give the job's completions, such as `--shard auto/8`",
    });
  }
  return checked(value, wholeNumber(value, "JOB_COMPLETION_INDEX", env), count, "JOB_COMPLETION_INDEX");
}

/** The tasks of an array are numbered from any number in any steps: `--array=10-40:10`. */
function slurmShard(value: string, count: number | undefined, env: Environment): Shard {
  const id = wholeNumber(value, "SLURM_ARRAY_TASK_ID", env);
  const least = wholeNumber(value, "SLURM_ARRAY_TASK_MIN", env);
  const step = variable(env, "SLURM_ARRAY_TASK_STEP") === undefined
    ? 1
    : wholeNumber(value, "SLURM_ARRAY_TASK_STEP", env);
  const tasks = count !== undefined && variable(env, "SLURM_ARRAY_TASK_COUNT") === undefined
    ? count
    : wholeNumber(value, "SLURM_ARRAY_TASK_COUNT", env);
  // A part of an array that is run again begins at another number: its tasks would take the wrong shards.
  if (count !== undefined && tasks !== count) {
    throw new UsageError(`\`--shard ${value}\` asks for ${count} shards, the job array has ${tasks} tasks`, {
      hint: "give a part that is run again by hand, as `--shard I/N`",
    });
  }
  return checked(value, (id - least) / step, tasks, "SLURM_ARRAY_TASK_ID");
}

function checked(value: string, index: number, count: number, name: string): Shard {
  if (!(Number.isInteger(index) && index >= 0 && index < count)) {
    throw new UsageError(
      `\`--shard ${value}\` finds no shard for this task: ${name} gives the index ${index} of ${count}`,
      { hint: WORK_ARRAY },
    );
  }
  return { index, count };
}

function wholeNumber(value: string, name: string, env: Environment): number {
  const text = variable(env, name);
  if (text === undefined) {
    throw new UsageError(`\`--shard ${value}\` finds no complete job array: ${name} is not set`, {
      hint: EXAMPLE,
    });
  }
  const number = /^\d+$/.test(text) ? Number(text) : NaN;
  if (!Number.isSafeInteger(number)) {
    throw new UsageError(`\`--shard ${value}\` cannot use ${name}: "${text}" is not a whole number`, {
      hint: EXAMPLE,
    });
  }
  return number;
}

/** Undefined where the variable is not set, empty, or not to be read: Deno throws without the permission. */
function variable(env: Environment, name: string): string | undefined {
  try {
    return env[name] || undefined;
  } catch {
    return undefined;
  }
}
