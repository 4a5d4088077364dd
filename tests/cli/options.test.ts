import { describe, expect, test } from "bun:test";
import {
  type BenchOptions,
  type ClassifyOptions,
  type GenerateOptions,
  parseOptions,
  type ScoreOptions,
} from "../../src/cli/options.ts";
import { UsageError } from "../../src/runtime/errors.ts";

function parsed(...args: string[]): GenerateOptions {
  return parseOptions(["generate", ...args]) as GenerateOptions;
}

function parsedScore(...args: string[]): ScoreOptions {
  return parseOptions(["score", ...args]) as ScoreOptions;
}

function parsedClassify(...args: string[]): ClassifyOptions {
  return parseOptions(["classify", ...args]) as ClassifyOptions;
}

function parsedBench(...args: string[]): BenchOptions {
  return parseOptions(["bench", ...args]) as BenchOptions;
}

function refusal(args: readonly string[]): UsageError {
  try {
    parseOptions(args);
  } catch (error) {
    if (error instanceof UsageError) return error;
    throw error;
  }
  throw new Error(`${JSON.stringify(args)} was accepted`);
}

describe("parseOptions accepts", () => {
  test("a prompt alone, with every default", () => {
    expect(parsed("Once upon a time")).toEqual({
      command: "generate",
      prompt: "Once upon a time",
      file: undefined,
      prompts: undefined,
      batch: undefined,
      ids: undefined,
      model: undefined,
      context: undefined,
      positions: "exact",
      sparsity: { kind: "dense" },
      session: undefined,
      dtype: "auto",
      adapter: undefined,
      fallbackAdapter: false,
      json: false,
      quiet: false,
      verbose: 0,
      maxTokens: 128,
      temperature: 0.8,
      topK: 40,
      topP: 0.95,
      minP: 0,
      repeatPenalty: 1,
      seed: undefined,
      stop: [],
      ignoreEos: false,
      logprobs: undefined,
      inFlight: undefined,
      profile: false,
      trace: undefined,
      kernels: new Map(),
    });
  });

  test("every option, in short and long form, with = and with a space, before and after the prompt", () => {
    const options = parsed(
      ...["-m", "dir", "--dtype=f32", "--adapter", "llvmpipe", "--fallback-adapter", "--json", "-q"],
      ...[
        "-n",
        "0",
        "-c",
        "16k",
        "--temperature",
        "0",
        "--top-k=0",
        "a prompt",
        "--top-p",
        "1",
        "--min-p",
        ".05",
      ],
      ...["--repeat-penalty", "1.1", "--seed", "-7", "--ignore-eos", "--logprobs", "5", "--profile"],
      ...["--positions", "interpolate", "--session=a/file.session", "--in-flight", "64"],
    );
    expect(options).toMatchObject({
      model: "dir",
      dtype: "f32",
      adapter: "llvmpipe",
      fallbackAdapter: true,
      json: true,
      quiet: true,
      maxTokens: 0,
      context: 16384,
      temperature: 0,
      topK: 0,
      prompt: "a prompt",
      topP: 1,
      minP: 0.05,
      repeatPenalty: 1.1,
      seed: -7,
      ignoreEos: true,
      logprobs: 5,
      profile: true,
      positions: "interpolate",
      session: "a/file.session",
      inFlight: 64,
    });
    expect(Object.isFrozen(options)).toBe(true);
  });

  test("many prompts from a file, or from standard input, so many at a time", () => {
    expect(parsed("--prompts", "p.jsonl")).toMatchObject({
      prompts: "p.jsonl",
      batch: undefined,
      prompt: undefined,
      file: undefined,
      ids: undefined,
    });
    expect(parsed("--prompts=-", "--batch", "1")).toMatchObject({ prompts: "-", batch: 1 });
    expect(parsed("--batch=256", "--prompts", "a file", "--in-flight=1")).toMatchObject({
      prompts: "a file",
      batch: 256,
      inFlight: 1,
    });
    expect(parsed("--prompts", "p", "--json", "--logprobs", "2")).toMatchObject({ json: true, logprobs: 2 });
  });

  test("short options with their values attached, and several at once", () => {
    expect(parsed("-n3", "5")).toMatchObject({ maxTokens: 3, prompt: "5" });
    expect(parsed("-n=3", "5")).toMatchObject({ maxTokens: 3, prompt: "5" });
    expect(parsed("-qvn", "3", "5")).toMatchObject({ quiet: true, verbose: 1, maxTokens: 3, prompt: "5" });
    expect(parsed("-qn3", "5")).toMatchObject({ quiet: true, maxTokens: 3, prompt: "5" });
    expect(parsed("-m=a=b", "x").model).toBe("a=b");
  });

  test("texts that look like numbers, switches or assignments as they are", () => {
    expect(parsed("42").prompt).toBe("42");
    expect(parsed("007").prompt).toBe("007");
    expect(parsed("1e3").prompt).toBe("1e3");
    expect(parsed("true").prompt).toBe("true");
    expect(parsed("--", "-5 degrees").prompt).toBe("-5 degrees");
    expect(parsed("-n", "3", "--", "--seed").prompt).toBe("--seed");
    expect(parsed("a=b").prompt).toBe("a=b");
    expect(parsed("-").prompt).toBe("-");
    expect(parsed("generate").prompt).toBe("generate");
    expect(parsed("--stop", "007", "x").stop).toEqual(["007"]);
    expect(parsed("--stop", "-1", "x").stop).toEqual(["-1"]);
    expect(parsed("--stop", "--json", "x")).toMatchObject({ stop: ["--json"], json: false });
    expect(parsed("--stop=a=b", "x").stop).toEqual(["a=b"]);
    expect(parsed("-m", "1", "x").model).toBe("1");
    expect(parsed("--adapter", "0", "x").adapter).toBe("0");
  });

  test("--stop several times, the last of other repeated options, and -v as often as it is given", () => {
    expect(parsed("--stop", "1", "--stop", "\n", "x").stop).toEqual(["1", "\n"]);
    expect(parsed("-n", "1", "-n", "2", "x").maxTokens).toBe(2);
    expect(parsed("-v", "x").verbose).toBe(1);
    expect(parsed("-vv", "x").verbose).toBe(2);
    expect(parsed("-qv", "x")).toMatchObject({ quiet: true, verbose: 1 });
    expect(parsed("-v", "-v", "x").verbose).toBe(2);
  });

  test("options before the command", () => {
    for (
      const before of [["-m", "dir"], ["-qm", "dir"], ["-mdir"], ["--model=dir"], [
        "--seed",
        "1",
        "--model",
        "dir",
      ]]
    ) {
      expect(parseOptions([...before, "generate", "x"])).toMatchObject({
        command: "generate",
        model: "dir",
        prompt: "x",
      });
    }
    expect(parseOptions(["--adapter", "info", "--json", "info"])).toMatchObject({
      adapter: "info",
      json: true,
    });
  });

  test("a prompt behind any switch", () => {
    for (const flag of ["--fallback-adapter", "--json", "-q", "--quiet", "-v", "--ignore-eos", "--profile"]) {
      expect({ flag, prompt: parsed(flag, "a prompt").prompt }).toEqual({ flag, prompt: "a prompt" });
    }
  });

  test("no prompt: it comes from standard input", () => {
    expect(parsed()).toMatchObject({ prompt: undefined, file: undefined, ids: undefined });
  });

  test("score with its defaults, over any number of files", () => {
    expect(parsedScore("a.txt")).toEqual({
      command: "score",
      files: ["a.txt"],
      ids: undefined,
      model: undefined,
      context: undefined,
      positions: "exact",
      sparsity: { kind: "dense" },
      window: undefined,
      maxTokens: undefined,
      tokenNll: false,
      compare: false,
      logits: [],
      dtype: "auto",
      seed: undefined,
      adapter: undefined,
      fallbackAdapter: false,
      json: false,
      quiet: false,
      verbose: 0,
      profile: false,
      trace: undefined,
      kernels: new Map(),
    });
    expect(parsedScore().files).toEqual([]);
    expect(parsedScore("--ids", "ids.json")).toMatchObject({ files: [], ids: "ids.json" });
    expect(parsedScore("a", "--json", "b", "-q", "c").files).toEqual(["a", "b", "c"]);
    expect(parsedScore("1", "-", "-n", "5", "--", "-x", "--json")).toMatchObject({
      files: ["1", "-", "-x", "--json"],
      json: false,
      maxTokens: 5,
    });
    expect(Object.isFrozen(parsedScore("a"))).toBe(true);
  });

  test("score with every option of its own", () => {
    expect(
      parsedScore(
        ...["a", "--window", "1k", "-c", "16k", "--max-tokens=4K", "--positions", "repeat", "--json"],
        ...["--token-nll", "--logits", "5,0,1023, 5", "--profile"],
      ),
    ).toMatchObject({
      window: 1024,
      context: 16384,
      maxTokens: 4096,
      positions: "repeat",
      tokenNll: true,
      // In order, each once.
      logits: [0, 5, 1023],
      profile: true,
    });
    expect(parsedScore("a", "--window", "64", "-c", "64").window).toBe(64);
  });

  test("classify with its defaults, over any number of files", () => {
    expect(parsedClassify("a.txt")).toEqual({
      command: "classify",
      files: ["a.txt"],
      jsonl: false,
      ids: undefined,
      model: undefined,
      context: undefined,
      positions: "exact",
      sparsity: { kind: "dense" },
      maxTokens: undefined,
      labels: undefined,
      template: undefined,
      calibrate: false,
      pooling: "last",
      window: undefined,
      expected: undefined,
      out: undefined,
      resume: false,
      shard: undefined,
      batch: undefined,
      workers: undefined,
      dtype: "auto",
      seed: undefined,
      adapter: undefined,
      fallbackAdapter: false,
      json: false,
      quiet: false,
      verbose: 0,
      profile: false,
      trace: undefined,
      kernels: new Map(),
    });
    expect(parsedClassify().files).toEqual([]);
    expect(parsedClassify("a", "--json", "b/", "-", "-q", "*.txt").files).toEqual(["a", "b/", "-", "*.txt"]);
    expect(parsedClassify("--jsonl", "a", "b")).toMatchObject({ jsonl: true, files: ["a", "b"] });
    expect(parsedClassify("--ids", "ids.json")).toMatchObject({ files: [], ids: "ids.json" });
    expect(Object.isFrozen(parsedClassify("a"))).toBe(true);
  });

  test("classify with every option of its own", () => {
    expect(
      parsedClassify(
        ...["--jsonl", "a", "-n", "8k, 512,2K,512", "--labels", " politics, science fiction ", "--calibrate"],
        ...["--template=About {label}:\\n{text}", "--expected", "label", "--out", "r.jsonl", "--resume"],
        ...["--shard", "3/8", "--batch", "1", "--workers", "0", "-c", "16k", "--positions", "repeat"],
      ),
    ).toMatchObject({
      // In order, each once.
      maxTokens: [512, 2048, 8192],
      labels: ["politics", "science fiction"],
      calibrate: true,
      template: "About {label}:\n{text}",
      expected: "label",
      out: "r.jsonl",
      resume: true,
      shard: { index: 2, count: 8 },
      batch: 1,
      workers: 0,
      context: 16384,
      positions: "repeat",
    });
    expect(
      parsedClassify("a", "--window=1k", "--pooling", "mean", "--sparsity", "local:64", "--workers", "64"),
    )
      .toMatchObject({
        window: 1024,
        pooling: "mean",
        sparsity: { kind: "local" },
        workers: 64,
      });
  });

  test("what is expected of classify: a field of records, which --eval calls label, or folders", () => {
    expect(parsedClassify("a/", "--eval")).toMatchObject({ jsonl: false, expected: "label" });
    expect(parsedClassify("--jsonl", "--eval").expected).toBe("label");
    expect(parsedClassify("--jsonl", "--eval", "--expected", "author").expected).toBe("author");
    expect(parsedClassify("--jsonl", "--json", "--out", "r.jsonl")).toMatchObject({
      json: true,
      jsonl: true,
    });
  });

  test("bench with its defaults", () => {
    expect(parsedBench()).toEqual({
      command: "bench",
      phases: ["prefill", "attention", "gemm"],
      contexts: [1024, 4096, 16384],
      attention: ["flash"],
      sparsity: undefined,
      modelShape: undefined,
      runs: 5,
      batch: [1],
      profile: false,
      trace: undefined,
      kernels: new Map(),
      report: undefined,
      from: [],
      compare: undefined,
      model: undefined,
      dtype: "auto",
      seed: undefined,
      adapter: undefined,
      fallbackAdapter: false,
      json: false,
      quiet: false,
      verbose: 0,
    });
    expect(Object.isFrozen(parsedBench())).toBe(true);
  });

  test("bench with every option of its own", () => {
    expect(
      parsedBench(
        ...["--phases", "gemm,decode,gemm", "--contexts", "4K, 64,1k,64", "--attention=standard,flash"],
        ...["--model-shape", "gpt2-xl", "--runs", "1", "--batch", "32, 1,8,32"],
      ),
    ).toMatchObject({
      phases: ["gemm", "decode"],
      // In order, each once.
      contexts: [64, 1024, 4096],
      attention: ["standard", "flash"],
      modelShape: "gpt2-xl",
      runs: 1,
      batch: [1, 8, 32],
    });
    expect(parsedBench("--contexts", "16").contexts).toEqual([16]);
  });

  test("--kernel several times, the last for a role", () => {
    const args = ["--kernel", "attention=a/b", "--kernel=lmHeadOne=c", "--kernel", "attention=d"];
    const kernels = new Map([["attention", "d"], ["lmHeadOne", "c"]]);
    expect(parsed(...args, "x").kernels).toEqual(kernels);
    expect(parsedScore(...args, "x").kernels).toEqual(kernels);
    expect(parsedBench(...args).kernels).toEqual(kernels);
    expect(parseOptions(["info", ...args])).toMatchObject({ kernels });
  });

  test("the other commands", () => {
    expect(parseOptions(["info", "--json"])).toMatchObject({ command: "info", json: true });
    expect(parseOptions(["inspect", "a/folder"])).toMatchObject({ command: "inspect", path: "a/folder" });
    expect(parseOptions(["inspect", "12"])).toMatchObject({ path: "12" });
  });
});

describe("parseOptions refuses", () => {
  const cases: readonly (readonly [name: string, args: readonly string[], message: RegExp])[] = [
    ["an unknown command", ["generat", "x"], /no command `generat`/],
    ["a number as a command", ["7"], /no command `7`/],
    ["the name of an inherited property", ["toString"], /no command `toString`/],
    ["options without a command", ["--json"], /no command in `longform --json`/],
    ["an option and its value without a command", ["-m", "info"], /no command in `longform -m info`/],
    ["another command's option before it", ["--top-k", "1", "info"], /no option `--top-k`/],
    ["an unknown option", ["generate", "x", "--sed", "1"], /no option `--sed`/],
    ["an unknown short option", ["generate", "x", "-z"], /no option `-z`/],
    ["another command's option", ["info", "--top-k", "1"], /no option `--top-k`/],
    ["a name in camel case", ["generate", "x", "--maxTokens=3"], /no option `--maxTokens`/],
    ["a negated option", ["generate", "x", "--no-seed"], /no option `--no-seed`/],
    ["a dotted option", ["generate", "x", "--stop.a"], /no option `--stop.a`/],
    ["the name of an inherited property as an option", ["generate", "x", "--constructor"], /`--constructor`/],
    ["three hyphens", ["generate", "x", "---"], /no option `---`/],
    ["an unknown option among short ones", ["generate", "x", "-qzv"], /no option `-z`/],
    ["a value for a switch", ["generate", "x", "--json=false"], /`--json` takes no value/],
    ["a missing value", ["generate", "x", "--seed"], /`--seed` needs a value/],
    ["a missing value of a short option", ["generate", "x", "-n"], /`-n` needs a value/],
    ["--temperature -1", ["generate", "x", "--temperature", "-1"], /`--temperature -1`.*a number from 0/],
    ["--temperature Infinity", ["generate", "x", "--temperature", "Infinity"], /`--temperature Infinity`/],
    ["--temperature hot", ["generate", "x", "--temperature", "hot"], /`--temperature hot`/],
    ["an empty --temperature", ["generate", "x", "--temperature", ""], /`--temperature `/],
    ["--top-p 0", ["generate", "x", "--top-p", "0"], /`--top-p 0`.*above 0 and at most 1/],
    ["--top-p 1.1", ["generate", "x", "--top-p", "1.1"], /`--top-p 1.1`/],
    ["--top-k -1", ["generate", "x", "--top-k", "-1"], /`--top-k -1`.*whole number from 0/],
    ["--top-k 1.5", ["generate", "x", "--top-k", "1.5"], /`--top-k 1.5`/],
    ["--min-p 2", ["generate", "x", "--min-p", "2"], /`--min-p 2`.*from 0 to 1/],
    ["--repeat-penalty 0", ["generate", "x", "--repeat-penalty", "0"], /`--repeat-penalty 0`/],
    ["-n x", ["generate", "x", "-n", "x"], /`--max-tokens x`.*whole number from 0/],
    ["-n -1", ["generate", "x", "-n", "-1"], /`--max-tokens -1`/],
    ["-c 0", ["generate", "x", "-c", "0"], /`--context 0`/],
    ["-c 1.5k", ["generate", "x", "-c", "1.5k"], /`--context 1.5k`/],
    ["--seed 1.5", ["generate", "x", "--seed", "1.5"], /`--seed 1.5`.*whole number/],
    ["--seed 1e99", ["generate", "x", "--seed", "1e99"], /`--seed 1e99`/],
    ["--dtype f64", ["generate", "x", "--dtype", "f64"], /`--dtype f64` is not one of auto, f16, f32/],
    ["--stop with nothing", ["generate", "x", "--stop", ""], /`--stop` is empty/],
    ["--logprobs without --json", ["generate", "x", "--logprobs", "2"], /add `--json`/],
    ["an empty prompt", ["generate", ""], /prompt is empty/],
    ["two prompts", ["generate", "once", "upon"], /does not take "upon"/],
    ["a prompt and a file", ["generate", "x", "-f", "y"], /several prompts/],
    ["a file and ids", ["generate", "-f", "x", "--ids", "y"], /several prompts/],
    ["a prompt and --prompts", ["generate", "x", "--prompts", "y"], /several prompts: .*`--prompts`/],
    ["a file and --prompts", ["generate", "-f", "x", "--prompts", "y"], /several prompts/],
    ["ids and --prompts", ["generate", "--ids", "x", "--prompts", "y"], /several prompts/],
    [
      "a session and --prompts",
      ["generate", "--session", "x", "--prompts", "y"],
      /`--session` is for a single/,
    ],
    ["--prompts without a file", ["generate", "--prompts"], /`--prompts` needs a value/],
    [
      "--prompts and --logprobs without --json",
      ["generate", "--prompts", "x", "--logprobs", "2"],
      /add `--json`/,
    ],
    [
      "--batch without --prompts",
      ["generate", "x", "--batch", "2"],
      /`--batch` .*give them with `--prompts`/,
    ],
    ["--batch 0", ["generate", "--prompts", "x", "--batch", "0"], /`--batch 0`.*whole number from 1 to 256/],
    ["--batch 257", ["generate", "--prompts", "x", "--batch", "257"], /`--batch 257`/],
    ["--batch 1.5", ["generate", "--prompts", "x", "--batch", "1.5"], /`--batch 1.5`/],
    ["--batch all", ["generate", "--prompts", "x", "--batch", "all"], /`--batch all`/],
    ["--in-flight 0", ["generate", "x", "--in-flight", "0"], /`--in-flight 0`.*whole number from 1 to 64/],
    ["--in-flight 65", ["generate", "x", "--in-flight", "65"], /`--in-flight 65`/],
    ["--in-flight 2.5", ["generate", "x", "--in-flight", "2.5"], /`--in-flight 2.5`/],
    ["an empty --in-flight", ["generate", "x", "--in-flight="], /`--in-flight `/],
    ["--prompts to score", ["score", "a", "--prompts", "x"], /no option `--prompts`/],
    ["an argument to info", ["info", "x"], /does not take "x"/],
    ["inspect without a model", ["inspect"], /needs a model/],
    ["--positions none", ["generate", "x", "--positions", "none"], /not one of exact, interpolate, repeat/],
    ["--session without a file", ["generate", "x", "--session"], /`--session` needs a value/],
    ["a session to score", ["score", "a", "--session", "x"], /no option `--session`/],
    ["files and ids", ["score", "a", "--ids", "b"], /files and `--ids`/],
    ["standard input twice", ["score", "-", "a", "-"], /named twice/],
    ["--window 0", ["score", "a", "--window", "0"], /`--window 0`/],
    ["--window beyond --context", ["score", "a", "--window", "2k", "-c", "1k"], /`--window 2048`.*1024/],
    ["-n 0 to score", ["score", "a", "-n", "0"], /`--max-tokens 0`/],
    ["--token-nll without --json", ["score", "a", "--token-nll"], /`--token-nll`.*add `--json`/],
    ["--logits without --json", ["score", "a", "--logits", "0"], /`--logits`.*add `--json`/],
    ["no place for logits", ["score", "a", "--json", "--logits", ""], /not a list of token numbers/],
    ["a place that is no number", ["score", "a", "--json", "--logits", "1,x"], /not a list of token numbers/],
    ["a negative place", ["score", "a", "--json", "--logits", "-1"], /not a list of token numbers/],
    ["a place left out", ["score", "a", "--json", "--logits", "1,,2"], /not a list of token numbers/],
    ["an argument to bench", ["bench", "x"], /does not take "x"/],
    [
      "an unknown phase",
      ["bench", "--phases", "gemm,load"],
      /`--phases gemm,load` has "load".*prefill, decode/,
    ],
    ["no phase", ["bench", "--phases", ""], /has "", which is not one of/],
    ["a context that is no number", ["bench", "--contexts", "1k,many"], /`--contexts many`/],
    ["a context that is left out", ["bench", "--contexts", "1k,,2k"], /`--contexts `/],
    ["a context too short to measure", ["bench", "--contexts", "1k,15"], /a context of 15 is too short/],
    [
      "a pattern that is none",
      ["generate", "x", "--sparsity", "window:64"],
      /begins with "window", which names no pattern/,
    ],
    [
      "a window below a block",
      ["score", "a", "--sparsity", "local:32"],
      /32 for W, smaller than a block of 64/,
    ],
    ["a sink without a window", ["generate", "x", "--sparsity", "sink:64"], /sink without a window/],
    ["topk to score", ["score", "a", "--sparsity", "topk:1k"], /`score` does not decode/],
    ["--compare without --sparsity", ["score", "a", "--compare", "dense"], /needs something to compare/],
    [
      "--compare with something else",
      ["score", "a", "--sparsity", "butterfly", "--compare", "flash"],
      /`--compare flash` is not one of dense/,
    ],
    ["files and ids to classify", ["classify", "a", "--ids", "b"], /There are files and `--ids`/],
    ["records and ids", ["classify", "--jsonl", "--ids", "b"], /There are `--jsonl` and `--ids`/],
    ["ids with a true label", ["classify", "--ids", "b", "--eval"], /without a label: leave `--eval` away/],
    [
      "ids to be divided",
      ["classify", "--ids", "b", "--shard", "1/2"],
      /one document, which cannot be divided/,
    ],
    ["lines and one document", ["classify", "--jsonl", "--json"], /a line for each record, .*one of them/],
    ["a field of files", ["classify", "a", "--expected", "x"], /`--expected` names a field of records/],
    ["--resume without a file", ["classify", "a", "--resume"], /`--resume` needs the file.*add `--out`/],
    [
      "--template without labels",
      ["classify", "a", "--template", "{label}"],
      /`--template` is .*add `--labels`/,
    ],
    ["--calibrate without labels", ["classify", "a", "--calibrate"], /`--calibrate` is .*add `--labels`/],
    [
      "pooling of labels",
      ["classify", "a", "--labels", "a,b", "--pooling", "mean"],
      /`--pooling` is for the/,
    ],
    ["windows with labels", ["classify", "a", "--labels", "a,b", "--window", "1k"], /`--window` is for the/],
    ["topk to classify", ["classify", "a", "--sparsity", "topk:1k"], /`classify` does not decode/],
    [
      "sparsity with labels",
      ["classify", "a", "--labels", "a,b", "--sparsity", "local:64"],
      /reads all of a/,
    ],
    ["unknown pooling", ["classify", "a", "--pooling", "max"], /`--pooling max` is not one of last, mean/],
    ["-n 0 to classify", ["classify", "a", "-n", "0"], /`--max-tokens 0`.*from 1, such as 4096 or 4k/],
    ["a length left out", ["classify", "a", "-n", "512,,2k"], /`--max-tokens `/],
    ["--batch 0 to classify", ["classify", "a", "--batch", "0"], /`--batch 0`.*whole number from 1/],
    ["--workers 65", ["classify", "a", "--workers", "65"], /`--workers 65`.*whole number from 0 to 64/],
    ["--shard 0/4", ["classify", "a", "--shard", "0/4"], /`--shard 0\/4`.*numbered from 1 to 4/],
    ["a shard that is none", ["classify", "a", "--shard", "1of4"], /neither I\/N, auto nor auto\/N/],
    ["a prompt's option to classify", ["classify", "a", "--temperature", "0"], /no option `--temperature`/],
    ["unknown attention", ["bench", "--attention", "linear"], /has "linear", which is not one of flash/],
    ["an unknown shape", ["bench", "--model-shape", "gpt3"], /`--model-shape gpt3` is not one of distilgpt2/],
    ["a shape and a model", ["bench", "--model-shape", "gpt2", "-m", "x"], /`--model` and `--model-shape`/],
    ["--runs 0", ["bench", "--runs", "0"], /`--runs 0`.*whole number from 1/],
    ["--batch 257 to bench", ["bench", "--batch", "1,257"], /`--batch 1,257`.*numbers from 1 to 256/],
    ["--batch 0 to bench", ["bench", "--batch", "0"], /`--batch 0`/],
    ["a batch left out", ["bench", "--batch", "1,,8"], /`--batch 1,,8`/],
    ["--kernel without a role", ["bench", "--kernel", "matmul/tiled"], /not a role and a kernel/],
    ["--kernel without a kernel", ["generate", "x", "--kernel", "attention="], /not a role and a kernel/],
    ["--kernel to inspect", ["inspect", "x", "--kernel", "a=b"], /no option `--kernel`/],
    [
      "a place in scientific notation",
      ["score", "a", "--json", "--logits", "1e3"],
      /not a list of token numbers/,
    ],
  ];
  for (const [name, args, message] of cases) {
    test(name, () => {
      const error = refusal(args);
      expect(error.message).toMatch(message);
      expect(error.message).not.toMatch(/[\n\0]|\.$/);
      expect(error.exitCode).toBe(2);
    });
  }
});
