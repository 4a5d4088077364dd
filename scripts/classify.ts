/**
 * Classifies long documents: copy it, and change what goes in and what comes out.
 *
 *     bun scripts/classify.ts chapter.txt book.txt …
 *     deno run -P scripts/classify.ts chapter.txt book.txt …
 */
import { readFile } from "node:fs/promises";
import process from "node:process";
import { load } from "../mod.ts";

const paths = process.argv.slice(2);

/** Documents are read when their turn comes: there may be any number of them. */
async function* documents() {
  for (const path of paths) yield { path, text: await readFile(path, "utf8") };
}

const longform = await load({ uses: ["classify"] }); // `model: "DIR"` for another checkpoint
for await (const outcome of longform.classify(documents(), { maxTokens: 16_384 })) {
  const { path } = outcome.document;
  if ("error" in outcome) {
    console.error(`${path}: ${outcome.error}`);
    process.exitCode = 1;
    continue;
  }
  const { label, scores, tokens } = outcome.classified;
  console.log(`${path}: ${label}, ${(100 * scores[label]!).toFixed(1)} %, by ${tokens} tokens`);
}
await longform.close();
