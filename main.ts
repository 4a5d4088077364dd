/** Parse, run, turn errors into exit codes; nothing else. */
import process from "node:process";
import { runBench } from "./src/cli/bench.ts";
import { runClassify } from "./src/cli/classify.ts";
import { runGenerate } from "./src/cli/generate.ts";
import { runGenerateBatch } from "./src/cli/generate_batch.ts";
import { runInfo } from "./src/cli/info.ts";
import { runInspect } from "./src/cli/inspect.ts";
import { type Options, parseOptions } from "./src/cli/options.ts";
import { ClosedPipe, writeNote } from "./src/cli/output.ts";
import { runPull } from "./src/cli/pull.ts";
import { runScore } from "./src/cli/score.ts";
import { handleSignals } from "./src/cli/signals.ts";
import { removeTemporaryFiles } from "./src/model/atomic_file.ts";
import { LongformError } from "./src/runtime/errors.ts";

async function run(options: Options): Promise<number> {
  switch (options.command) {
    case "generate":
      return await (options.prompts === undefined ? runGenerate(options) : runGenerateBatch(options));
    case "score":
      return await runScore(options);
    case "classify":
      return await runClassify(options);
    case "bench":
      return await runBench(options);
    case "info":
      return await runInfo(options);
    case "inspect":
      return await runInspect(options);
    case "pull":
      return await runPull(options);
  }
}

let isVerbose = false;

async function main(args: readonly string[]): Promise<number> {
  try {
    const options = parseOptions(args);
    isVerbose = Boolean(options?.verbose);
    return options ? await run(options) : 0;
  } catch (error) {
    return report(error);
  }
}

/** Says what went wrong. @returns the exit code */
function report(error: unknown): number {
  if (error instanceof ClosedPipe) return 0;
  const known = error instanceof LongformError;
  writeNote(`error: ${error instanceof Error ? error.message : String(error)}`);
  const hint = known ? error.hint : "this is a bug in longform; `-v` shows where it happened";
  if (hint) writeNote(`\nhint: ${hint}`);
  if (isVerbose) {
    if (known && error.detail) writeNote(`\n${error.detail}`);
    if (error instanceof Error) writeNote(`\n${error.stack}`);
    if (known && error.cause) writeNote(`\ncause: ${String(error.cause).trim()}`);
  }
  return known ? error.exitCode : 1;
}

handleSignals();
// What fails where nobody waits for it ends the process as what fails elsewhere does.
for (const event of ["uncaughtException", "unhandledRejection"]) {
  process.on(event, (error) => {
    removeTemporaryFiles();
    process.exit(report(error));
  });
}
// Standard input may still be open and would keep the process alive.
process.exit(await main(process.argv.slice(2)));
