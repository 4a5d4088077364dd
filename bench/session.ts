/**
 * Time to the first token with a restored session against without one.
 *
 *     bun bench/session.ts --model DIR --tokens 16384 [--dtype f16] [--runs 3] [--out FILE.json] [--commit ID]
 *
 * All runs are whole processes with the same prompt; the tokens they generate must be equal.
 */
import { mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { syntheticPrompt } from "../src/model/synthetic.ts";
import { runLongform } from "./process.ts";
import { deviceOf, provenance, writeResult } from "./provenance.ts";

const { values } = parseArgs({
  options: {
    model: { type: "string", default: "weights/classics-16k" },
    tokens: { type: "string", default: "16000" },
    dtype: { type: "string", default: "auto" },
    runs: { type: "string", default: "3" },
    commit: { type: "string" },
    out: { type: "string" },
  },
});

interface Report {
  readonly tokens: readonly number[];
  readonly timings: Readonly<Record<string, number | null>>;
  readonly session?: {
    readonly restored_tokens: number;
    readonly restore_ms: number | null;
    readonly save_ms: number | null;
  };
}

const tokens = Number(values.tokens);
const { vocab_size: vocabSize } = JSON.parse(readFileSync(join(values.model, "config.json"), "utf8"));
const folder = mkdtempSync(join(tmpdir(), "longform-session-"));
const rows = [];
try {
  const ids = join(folder, "prompt.json");
  writeFileSync(ids, JSON.stringify([...syntheticPrompt(tokens, vocabSize)]));
  const session = join(folder, "prompt.session");
  const run = async (...more: string[]) => {
    const { result } = await runLongform<Report>([
      ...["generate", "-m", values.model, "--ids", ids, "-n", "8", "--dtype", values.dtype],
      ...["--temperature", "0", "--ignore-eos", "--json", "-q", ...more],
    ]);
    return result;
  };
  const without = [];
  for (let i = 0; i < Number(values.runs); i++) without.push(await run());
  const saving = await run("--session", session);
  const restoring = [];
  for (let i = 0; i < Number(values.runs); i++) restoring.push(await run("--session", session));
  for (const { tokens: generated } of [saving, ...restoring]) {
    if (generated.join() !== without[0]!.tokens.join()) throw new Error("A session changed the tokens");
  }
  if (restoring.some((result) => result.session?.restored_tokens !== tokens)) {
    throw new Error("A session was not restored whole");
  }
  const runs = { without, saving: [saving], restored: restoring };
  for (const [name, results] of Object.entries(runs)) {
    const sorted = results.map(({ timings }) => timings["first_token_ms"] ?? NaN).sort((a, b) => a - b);
    const [min, median, max] = [sorted[0]!, sorted[sorted.length >> 1]!, sorted.at(-1)!];
    const { timings, session: part } = results[0]!;
    rows.push({
      name,
      first_token_ms: { median, min, max },
      prefill_ms: timings["prefill_ms"],
      session: part,
    });
  }
  const bytes = statSync(session).size;
  console.log(`| ${tokens} tokens, session of ${(bytes / 1e6).toFixed(1)} MB | first token s | of that |`);
  console.log("| --- | --- | --- |");
  for (const { name, first_token_ms: time, prefill_ms: prefill, session: part } of rows) {
    const of = part?.restore_ms != null
      ? `restore ${part.restore_ms.toFixed(0)} ms`
      : `prefill ${prefill?.toFixed(0)} ms` +
        (part?.save_ms != null ? `, save ${part.save_ms.toFixed(0)} ms` : "");
    console.log(
      `| ${name} | ${(time.median / 1000).toFixed(2)} (${(time.min / 1000).toFixed(2)} to ${
        (time.max / 1000).toFixed(2)
      }) | ${of} |`,
    );
  }
  if (values.out) {
    writeResult(values.out, { ...deviceOf(), ...provenance(values.commit), tokens, bytes, rows });
  }
} finally {
  rmSync(folder, { recursive: true });
}
