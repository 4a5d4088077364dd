/** Every option of every command does something in a test that runs the program: where, and here the rest of them. */
import { afterAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { COMMANDS, COMMON, namesOf, type OptionSpec } from "../../src/cli/options.ts";
import { inspectVulkan } from "../../src/runtime/vulkan_setup.ts";
import { temporaryFolder } from "../support/checkpoint.ts";
import { expectFailure, RUN_TIMEOUT_MS, runCli, withoutNotices, writeTinyModel } from "../support/cli.ts";
import { traceProblems } from "../support/trace.ts";

setDefaultTimeout(RUN_TIMEOUT_MS);

const SELF = "flags.test.ts";
const DRAWING = `${SELF}: filters of the sampler leave one token, and a penalty none that has occurred`;
const INSTRUMENTS = `${SELF}: \${name} runs the kernel of --kernel, profiles and traces it`;
const KERNEL = "bench.test.ts: runs the named kernels, as the profile shows, with the same text";
const PROFILE = "profile.test.ts: ${name} on ${runtime} reports and traces";
const POSITIONS =
  "score.test.ts: positions beyond the model's are interpolated or repeated on demand, and change what they should";
const RESUME = "classify.test.ts: leaves results that are there alone, unless --resume finds all of them";

/** By command and option: the file in tests/cli and the name of the test. */
const EXERCISED: Readonly<Record<string, Readonly<Record<string, string>>>> = {
  common: {
    "--model": "generate.test.ts: streams the text of --json, and the timings go to stderr",
    "--dtype": "session.test.ts: by another element type: exit code 1",
    "--seed": "generate.test.ts: another seed gives another text, a random one is reported and repeats",
    "--adapter": `${SELF}: an adapter is chosen by its number, or by a part of its name`,
    "--fallback-adapter": `${SELF}: --fallback-adapter runs on the CPU`,
    "--json": "generate.test.ts: --json has the documented keys, with sane numbers",
    "--quiet": "generate.test.ts: -q leaves nothing on stderr but Dawn's own warnings",
    "--verbose": "failures.test.ts: ${flag} adds the stack",
  },
  generate: {
    "--file": "generate.test.ts: the prompt may come from a file, a pipe, - or as ids",
    "--prompts":
      "generate_batch.test.ts: takes JSONL with names, in any order, and gives one document with --json",
    "--batch":
      "generate_batch.test.ts: gives the same one at a time, all at once, and with any number of steps in flight",
    "--ids": "generate.test.ts: the prompt may come from a file, a pipe, - or as ids",
    "--context": "generate_batch.test.ts: is a line with its error; the others are continued; exit code 1",
    "--positions": "session.test.ts: beyond the model's positions is kept with how they were mapped",
    "--sparsity":
      "sparsity.test.ts: generates with a pattern, says what it keeps, and a pattern that keeps all changes nothing",
    "--profile": PROFILE,
    "--trace": PROFILE,
    "--kernel": KERNEL,
    "--session": "session.test.ts: serves a prompt that ${name}",
    "--max-tokens": "generate.test.ts: the context's end is an end like -n, and -n 0 prints nothing",
    "--temperature": "generate.test.ts: greedy text does not depend on the seed, and --logprobs explains it",
    "--top-k": DRAWING,
    "--top-p": DRAWING,
    "--min-p": DRAWING,
    "--repeat-penalty": DRAWING,
    "--stop": "generate.test.ts: --stop ends before its text, in the stream as in --json",
    "--ignore-eos": "generate.test.ts: the end-of-text token ends it, --ignore-eos goes on",
    "--logprobs": "generate.test.ts: greedy text does not depend on the seed, and --logprobs explains it",
    "--in-flight":
      "generate.test.ts: the text does not depend on how many steps are in flight, nor on where it ends",
  },
  score: {
    "--ids": "score.test.ts: a text may come through a pipe, by - or as ids",
    "--context":
      "score.test.ts: windows begin anew and their first tokens have no likelihood, up to --max-tokens",
    "--positions": POSITIONS,
    "--sparsity": "sparsity.test.ts: scores with a mask file, and compares with dense attention",
    "--profile": PROFILE,
    "--trace": PROFILE,
    "--kernel": INSTRUMENTS,
    "--window":
      "score.test.ts: windows begin anew and their first tokens have no likelihood, up to --max-tokens",
    "--max-tokens":
      "score.test.ts: windows begin anew and their first tokens have no likelihood, up to --max-tokens",
    "--token-nll":
      "score.test.ts: likelihoods and logits are those of the CPU reference, aligned with the tokens",
    "--compare": "sparsity.test.ts: scores with a mask file, and compares with dense attention",
    "--logits":
      "score.test.ts: likelihoods and logits are those of the CPU reference, aligned with the tokens",
  },
  classify: {
    "--jsonl":
      "classify.test.ts: --jsonl prints a line a record in their order, however they are encoded and packed",
    "--ids": "classify.test.ts: takes token ids, as a document or in records",
    "--context": "classify.test.ts: may be cut to what there is room for",
    "--positions": "classify.test.ts: may be cut to what there is room for",
    "--sparsity": "classify.test.ts: --sparsity and --pooling change what they should, and are told of",
    "--profile":
      "classify.test.ts: --profile prints a table of kernels, or puts it into the report of a file",
    "--trace": INSTRUMENTS,
    "--kernel": INSTRUMENTS,
    "--max-tokens":
      "classify.test.ts: --max-tokens cuts; with several it gives each, which is what the cut text alone gives",
    "--labels": "classify.test.ts: --labels chooses the likeliest text, whatever the checkpoint's head",
    "--template": "classify.test.ts: --labels chooses the likeliest text, whatever the checkpoint's head",
    "--calibrate": "classify.test.ts: --labels chooses the likeliest text, whatever the checkpoint's head",
    "--pooling": "classify.test.ts: --sparsity and --pooling change what they should, and are told of",
    "--window": "classify.test.ts: --window averages over windows, each as a document of its own",
    "--expected":
      "classify.test.ts: or with a field of records, by each length; the table leaves stdout to the lines",
    "--eval": "classify.test.ts: compares labels with folders: a table, or a document with --json",
    "--out": RESUME,
    "--resume": RESUME,
    "--shard": "classify.test.ts: takes files in the same way",
    "--batch":
      "classify.test.ts: --jsonl prints a line a record in their order, however they are encoded and packed",
    "--workers":
      "classify.test.ts: --jsonl prints a line a record in their order, however they are encoded and packed",
  },
  bench: {
    "--phases":
      "bench.test.ts: --json has a row for each phase, variant and context, checked and with sane numbers",
    "--contexts":
      "bench.test.ts: --json has a row for each phase, variant and context, checked and with sane numbers",
    "--attention":
      "bench.test.ts: --json has a row for each phase, variant and context, checked and with sane numbers",
    "--sparsity": "sparsity.test.ts: bench measures patterns, and random blocks where none is given",
    "--model-shape":
      "bench.test.ts: a published shape needs no files, and --kernel is what runs and is checked",
    "--batch": `${SELF}: bench decodes as many sequences together as --batch says`,
    "--runs":
      "bench.test.ts: --json has a row for each phase, variant and context, checked and with sane numbers",
    "--profile": INSTRUMENTS,
    "--trace": INSTRUMENTS,
    "--report": "bench_report.test.ts: --report measures, and the page shows what it printed",
    "--from": "bench_report.test.ts: --from draws without measuring (${runtime})",
    "--kernel": "bench.test.ts: a published shape needs no files, and --kernel is what runs and is checked",
  },
  info: {
    "--measure":
      "info.test.ts: prints sections for people, without colour, and with --measure what the device reaches",
    "--kernel": "bench.test.ts: shows in info",
  },
  inspect: {},
  pull: {},
};

const declared = Object.entries(COMMANDS).map((
  [name, { options }],
): [string, readonly OptionSpec[]] => [name, options]);

/** `-n` and `--max-tokens`, by the latter. */
const shortNames = new Map([...COMMON, ...declared.flatMap(([, specs]) => specs)].map((spec) => {
  const names = namesOf(spec);
  return [names.at(-1)!, names[0]!];
}));

function longNames(specs: readonly OptionSpec[]): string[] {
  return specs.map((spec) => namesOf(spec).at(-1)!).sort();
}

describe("every option is exercised", () => {
  test("the table has the commands and options that the program has", () => {
    const listed = Object.entries(EXERCISED).map(([name, flags]) => [name, Object.keys(flags).sort()]);
    expect(Object.fromEntries(listed)).toEqual({
      common: longNames(COMMON),
      ...Object.fromEntries(declared.map(([name, specs]) => [name, longNames(specs)])),
    });
  });

  test("the tests that it names are there, in files that use the option", () => {
    const places = Object.values(EXERCISED).flatMap((flags) => Object.entries(flags));
    const missing = places.filter(([flag, place]) => {
      const [, file, name] = /^(\S+): (.+)$/.exec(place)!;
      const text = readFileSync(join(import.meta.dir, file!), "utf8");
      const isThere = new RegExp(`\\(\\s*["\`]${RegExp.escape(name!)}`).test(text);
      return !isThere || ![flag, shortNames.get(flag)].some((used) => text.includes(`"${used}"`));
    });
    expect(missing).toEqual([]);
  });
});

const folder = temporaryFolder();
afterAll(folder.remove);
const { dir: model } = writeTinyModel(join(folder.path, "tiny"), { classes: 3 });
const file = join(folder.path, "text.txt");
writeFileSync(file, "hello world, this is a text\n");

async function json(args: readonly string[]) {
  const { code, stdout, notes } = await runCli([...args, "--json"]);
  expect({ code, notes: withoutNotices(notes) }).toEqual({ code: 0, notes: "" });
  return JSON.parse(stdout);
}

describe("options that no other test runs", () => {
  test("filters of the sampler leave one token, and a penalty none that has occurred", async () => {
    const args = ["generate", "-m", model, "--dtype", "f32", "-n", "20", "--ignore-eos", "hello"];
    const free = ["--temperature", "2", "--seed", "3", "--top-k", "0", "--top-p", "1"];
    const [greedy, penalized, any, ...filtered] = await Promise.all([
      ["--temperature", "0"],
      ["--temperature", "0", "--repeat-penalty", "1e6"],
      free,
      [...free, "--top-k", "1"],
      [...free, "--top-p", "1e-6"],
      [...free, "--min-p", "1"],
    ].map(async (sampling): Promise<number[]> => (await json([...args, ...sampling])).tokens));
    expect(any).not.toEqual(greedy);
    expect(filtered).toEqual([greedy!, greedy!, greedy!]);
    expect(new Set(greedy).size).toBeLessThan(20);
    expect(new Set(penalized).size).toBe(20);
  });

  test("--seed is taken by every command, and changes nothing where nothing is drawn", async () => {
    const perplexities = await Promise.all(["1", "2"].map(async (seed) => {
      const [{ perplexity }] = await json(["score", "-m", model, "--dtype", "f32", "--seed", seed, file]);
      return perplexity;
    }));
    expect(perplexities[0]).toBeGreaterThan(1);
    expect(perplexities[1]).toBe(perplexities[0]);
    expect((await json(["inspect", model, "--seed", "1"])).problems).toEqual([]);
  });

  test("`help` shows what `--help` does, of a command and of all", async () => {
    for (const command of [[], ["score"]]) {
      const asked = await runCli([...command, "--help"]);
      expect(asked.stdout).toContain("Usage:");
      expect(await runCli(["help", ...command])).toEqual(asked);
    }
    expectFailure(await runCli(["help", "scores"]), 2, /no command `scores`/);
  });

  test("an adapter is chosen by its number, or by a part of its name", async () => {
    const { adapters, chosen } = await json(["info", "-m", model, "--adapter", "0"]);
    expect(chosen).toEqual(adapters[0]);
    const byName = await json(["info", "-m", model, "--adapter", chosen.name.slice(1, -1)]);
    expect(byName.chosen).toEqual(chosen);
  });

  const software = inspectVulkan().drivers.some(({ isSoftware, problem }) =>
    isSoftware && problem === undefined
  );
  const needs = software ? "" : ": needs a software driver";
  test.skipIf(!software)(`--fallback-adapter runs on the CPU${needs}`, async () => {
    expect((await json(["info", "-m", model, "--fallback-adapter"])).chosen.isSoftware).toBe(true);
    expect((await json(["score", "-m", model, "--fallback-adapter", file]))[0].tokens).toBe(28);
  });

  const runs: readonly (readonly [name: string, args: readonly string[], role: string, kernel: string])[] = [
    ["score", ["score", file], "attention", "flash_attention/tiled"],
    ["classify", ["classify", file], "matmulBias", "matmul/tiled"],
    [
      "bench",
      ["bench", "--phases", "prefill", "--contexts", "64", "--runs", "1"],
      "attention",
      "flash_attention/tiled",
    ],
  ];
  for (const [name, args, role, kernel] of runs) {
    test(`${name} runs the kernel of --kernel, profiles and traces it`, async () => {
      const trace = join(folder.path, `${name}.json`);
      const common = ["-m", model, "--dtype", "f32", "--kernel", `${role}=${kernel}`];
      const { code, stdout, notes } = await runCli([
        ...args,
        ...common,
        "--profile",
        "--trace",
        trace,
        "--json",
      ]);
      expect({ code, notes }).toMatchObject({ code: 0 });
      expect(stdout + notes).toContain(kernel);
      const traced = JSON.parse(readFileSync(trace, "utf8"));
      expect(traceProblems(traced)).toEqual([]);
      expect(JSON.stringify(traced)).toContain(kernel);
    });
  }

  test("bench decodes as many sequences together as --batch says", async () => {
    const decode = ["--phases", "decode", "--contexts", "64", "--runs", "1", "--batch", "1,3"];
    const { rows } = await json(["bench", "-m", model, "--dtype", "f32", ...decode]);
    expect(rows.map(({ variant }: { variant: string }) => variant)).toEqual(["flash", "batch 3"]);
    const [one, three] = rows;
    expect(one.tokens_per_s * one.ms.median).toBeCloseTo(1000, 6);
    expect(three.tokens_per_s * three.ms.median).toBeCloseTo(3000, 6);
  });
});
