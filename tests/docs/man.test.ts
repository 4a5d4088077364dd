/** docs/longform.1 is what scripts/man.ts makes of the program's options, and their examples work. */
import { describe, expect, test } from "bun:test";
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { ENVIRONMENT, manPage } from "../../scripts/man.ts";
import { COMMANDS, COMMON, namesOf, type OptionSpec, parseOptions } from "../../src/cli/options.ts";

const ROOT = join(import.meta.dir, "../..");
const PAGE = join(ROOT, "docs/longform.1");

const commands = Object.entries(COMMANDS);
const specsOf = (command: string): readonly OptionSpec[] => [
  ...COMMANDS[command as keyof typeof COMMANDS].options,
  ...COMMON,
];

/** The arguments of a command line as a shell would split it, without redirections. */
function argumentsOf(commandLine: string): string[] {
  const words = [...commandLine.replace(/ [<>] \S+/g, "").matchAll(/"([^"]*)"|'([^']*)'|(\S+)/g)];
  const [program, ...args] = words.map(([, double, single, plain]) => double ?? single ?? plain!);
  expect(program).toBe("longform");
  return args;
}

describe("docs/longform.1", () => {
  test("is what scripts/man.ts writes", () => {
    expect(readFileSync(PAGE, "utf8")).toBe(manPage());
  });

  test("is ASCII, with lines that no program cuts", () => {
    const odd = manPage().split("\n").filter((line) => !/^[\x20-\x7e]{0,500}$/.test(line));
    expect(odd).toEqual([]);
  });

  for (const check of [["groff", "-man", "-Tutf8", "-ww", "-z"], ["mandoc", "-Tlint", "-Wwarning"]]) {
    const [program] = check as [string, ...string[]];
    const needs = Bun.which(program) ? "" : `: needs ${program}`;
    test.skipIf(needs !== "")(`${program} has nothing to say about it${needs}`, () => {
      const { stdout, stderr } = Bun.spawnSync([...check, PAGE]);
      expect(String(stdout) + String(stderr)).toBe("");
    });
  }

  test("names the variables that the program and its launcher read, and no other", () => {
    const paths = readdirSync(join(ROOT, "src"), { recursive: true, encoding: "utf8" })
      .filter((path) => path.endsWith(".ts")).map((path) => join("src", path));
    const text = ["longform", ...paths].map((path) => readFileSync(join(ROOT, path), "utf8")).join("\n");
    const named = ENVIRONMENT.flatMap(([names]) => names);
    const form = /"((?:HF|HUGGING_?FACE|VK|XDG|SLURM|JOB|LONGFORM|NVIDIA|MESA|__GL|LD)_[A-Z_]+)"/g;
    const read = [...text.matchAll(form)].map(([, name]) => name!);
    expect(read.filter((name) => !named.includes(name))).toEqual([]);
    expect(named.filter((name) => !text.includes(name))).toEqual([]);
  });
});

describe("the example of", () => {
  const specs = new Set(commands.flatMap(([name]) => specsOf(name)));
  for (const spec of specs) {
    test(`${spec.flags} parses, and without the option it means something else: ${spec.example}`, () => {
      const args = argumentsOf(spec.example);
      expect(specsOf(args[0]!)).toContain(spec);
      const options = parseOptions(args)!;
      expect(options.command).toBe(args[0] as typeof options.command);
      const at = args.findIndex((arg) => namesOf(spec).includes(arg));
      expect(at).toBeGreaterThan(0);
      const without = args.toSpliced(at, spec.convert ? 2 : 1);
      let other: unknown;
      try {
        other = parseOptions(without);
      } catch {
        other = undefined; // it needs the option
      }
      expect(other).not.toEqual(options);
    });
  }

  for (const [name, { examples }] of commands) {
    test(`${name} parses: ${examples[0]}`, () => {
      const [first, ...others] = examples.map((text) => parseOptions(argumentsOf(text))!);
      expect(first!.command).toBe(name as keyof typeof COMMANDS);
      expect(others).not.toContain(undefined!);
    });
  }
});
