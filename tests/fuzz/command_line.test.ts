/** Hostile arguments: argv itself, `--shard` and the scheduler's variables, `--labels` and `--template`. */
import fc from "fast-check";
import { parseOptions } from "../../src/cli/options.ts";
import { type Environment, isInShard, parseShard } from "../../src/cli/shard.ts";
import { labelHead } from "../../src/model/label_head.ts";
import { loadTokenizer } from "../../src/model/tokenizer.ts";
import { UsageError } from "../../src/runtime/errors.ts";
import { fuzz, judge, type Judged, reportTallies } from "../support/fuzz.ts";
import { hostileText } from "../support/fuzz_input.ts";

reportTallies();

/** What is wrong with a command line is a UsageError, which ends the process with the exit code 2. */
function requireUsage(judged: Judged<unknown>): void {
  if ("error" in judged && !(judged.error instanceof UsageError)) throw judged.error;
}

const FLAGS = [
  ...["-m", "--model", "--dtype", "--adapter", "--fallback-adapter", "--json", "-q", "--quiet", "-v"],
  ...["--verbose"],
  ...["--ids", "-c", "--context", "--positions", "--sparsity", "--profile", "--trace", "--kernel"],
  ...["-f", "--file"],
  ...["--prompts", "--batch", "--session", "-n", "--max-tokens", "--temperature", "--top-k"],
  ...["--top-p", "--min-p"],
  ...["--repeat-penalty", "--seed", "--stop", "--ignore-eos", "--logprobs", "--in-flight"],
  ...["--window", "--token-nll"],
  ...["--compare", "--logits", "--jsonl", "--labels", "--template", "--calibrate", "--pooling"],
  ...["--expected", "--eval"],
  ...["--out", "--resume", "--shard", "--workers", "--phases", "--contexts", "--attention"],
  ...["--model-shape", "--runs"],
  ...["--report", "--from", "--measure", "--", "-", "-qv", "-qn", "--no-json", "--Json"],
  ...["--maxTokens", "--stop.a"],
];
const VALUES = [
  ...["0", "1", "-1", "16k", "1e3", "0x10", "1e999", "NaN", "Infinity", "9007199254740993", "auto"],
  ...["f16", "dense"],
  ...["1/4", "0/0", "auto/2", "a,b", "1k,4k", "attention=flash_attention/tiled", "=", "a="],
  ...["prefill,gemm", "local:1k"],
  ...["last", "exact", "gpt2", "{text} {label}", "compare", "a.json"],
];
const argument = fc.oneof(
  { weight: 4, arbitrary: fc.constantFrom(...FLAGS) },
  { weight: 3, arbitrary: fc.constantFrom(...VALUES) },
  { weight: 2, arbitrary: hostileText },
  {
    weight: 2,
    arbitrary: fc.tuple(fc.constantFrom(...FLAGS), fc.constantFrom(...VALUES)).map((two) => two.join("=")),
  },
  { weight: 1, arbitrary: fc.tuple(fc.constantFrom(...FLAGS), hostileText).map((two) => two.join("=")) },
  {
    weight: 1,
    arbitrary: fc.tuple(fc.constantFrom("-n", "-m", "-c", "-q"), hostileText).map((two) => two.join("")),
  },
);
const COMMANDS = ["generate", "score", "classify", "bench", "info", "inspect", "pull"];

/** Help and versions are printed: they have tests of their own. */
function asksForHelp(args: readonly string[]): boolean {
  return args.length === 0 || args.some((arg) => /^-[^-]*h|^--(help|version)/.test(arg));
}

/** Everything that is parsed, as plain data. */
function plain(value: unknown): unknown {
  return JSON.stringify(value, (_, one: unknown) => one instanceof Map ? [...one] : one);
}

fuzz("argv: options or a UsageError", {
  runs: 2000,
  arbitrary: fc.tuple(
    fc.oneof({ weight: 12, arbitrary: fc.constantFrom(...COMMANDS) }, { weight: 1, arbitrary: hostileText }),
    fc.array(argument, { maxLength: 7 }),
    fc.boolean(),
  ).map(([command, args, isFirst]) => isFirst ? [command, ...args] : [...args, command]),
  check: async (args) => {
    if (asksForHelp(args)) return;
    // No argument of a process can hold a NUL.
    const given = args.map((arg) => arg.replaceAll("\0", ""));
    const inputBytes = given.join(" ").length;
    const judged = await judge({ inputBytes }, () => parseOptions(given));
    requireUsage(judged);
    if (!("value" in judged)) return;
    const options = judged.value;
    if (!Object.isFrozen(options)) throw new Error("options that can be changed");
    // What was not given has its default, whatever else was: nothing of one parse is left for the next.
    if (plain(parseOptions(given)) !== plain(options)) throw new Error("other options the second time");
  },
});

fuzz("argv: values arrive as they were given", {
  runs: 500,
  arbitrary: fc.tuple(hostileText, hostileText, fc.boolean()),
  check: async ([first, second, isAttached]) => {
    const [stop, prompt] = [first, second].map((text) => text.replaceAll("\0", ""));
    if (stop === "" || prompt === "") return;
    const flag = isAttached ? [`--stop=${stop}`] : ["--stop", stop!];
    const judged = await judge(
      { inputBytes: stop!.length + prompt!.length },
      () => parseOptions(["generate", ...flag, "--", prompt!]),
    );
    if (!("value" in judged)) throw judged.error;
    const options = judged.value;
    if (options?.command !== "generate" || options.prompt !== prompt) throw new Error("another prompt");
    // Behind a flag, `=` and `=` both begin a value.
    const expected = isAttached ? stop : stop!.replace(/^=/, "");
    if (options.stop.join() !== expected) throw new Error(`the value ${JSON.stringify(options.stop)}`);
  },
});

const digits = fc.oneof(
  fc.nat(6).map(String),
  fc.constantFrom("", "-1", "00", "1e1", "9007199254740993", "9".repeat(400), "auto", "٣"),
  hostileText,
);
const VARIABLES = [
  ...["SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_STEP", "SLURM_ARRAY_TASK_COUNT"],
  "JOB_COMPLETION_INDEX",
];

fuzz("--shard: a part of the collection, or a UsageError", {
  runs: 2000,
  arbitrary: fc.tuple(
    fc.oneof(fc.tuple(digits, digits).map((two) => two.join("/")), digits),
    fc.dictionary(fc.constantFrom(...VARIABLES), digits),
  ),
  check: async ([value, env]: [string, Environment]) => {
    const judged = await judge({ inputBytes: value.length + 2000 }, () => parseShard(value, env));
    requireUsage(judged);
    if (!("value" in judged)) return;
    const { index, count } = judged.value;
    if (!(Number.isSafeInteger(count) && Number.isSafeInteger(index) && index >= 0 && index < count)) {
      throw new Error(`shard ${index} of ${count}`);
    }
    if (!isInShard(judged.value, index) || (count > 1 && isInShard(judged.value, index + 1))) {
      throw new Error("parts");
    }
  },
});

const tokenizer = await loadTokenizer("weights/classics-16k");
const template = fc.array(
  fc.oneof(fc.constantFrom("{text}", "{label}", "{label", "}", "{", "\n", " ", "Label: "), hostileText),
  { maxLength: 6 },
).map((parts) => parts.join(""));

fuzz("--labels and --template: a head, or a UsageError", {
  runs: 800,
  arbitrary: fc.tuple(
    fc.oneof(template, fc.constantFrom("{text} {label}", "{label}")),
    fc.array(fc.oneof(fc.constantFrom("politics", "sports"), hostileText), { maxLength: 4 }),
  ),
  check: async (given) => {
    // Halves of pairs come from no argument of a process, and two of them would join where they meet.
    const [template, labels] = [given[0].toWellFormed(), given[1].map((label) => label.toWellFormed())];
    const allowance = { inputBytes: template.length + labels.join().length, constantBytes: 16 << 20 };
    const judged = await judge(allowance, () => labelHead(tokenizer, labels, template));
    requireUsage(judged);
    if (!("value" in judged)) return;
    const { before, between, texts } = judged.value;
    texts.forEach((text, i) => {
      const ids = [...before, ...between, ...text];
      const written = template.replace("{text}", "").replace("{label}", () => labels[i]!);
      // The white space between the text and the label may have moved, and is in no other order.
      const found = tokenizer.decode(ids);
      if (found.replace(/\s/g, "") !== written.replace(/\s/g, "")) throw new Error(`${found} for ${written}`);
    });
  },
});
