/** What the text of shaders must not contain. */
import { expect, test } from "bun:test";
import { Glob } from "bun";
import { readFileSync } from "node:fs";
import { join } from "node:path";

const KERNELS = join(import.meta.dir, "../../src/kernels");

/** Lines, from 1, that declare a variable without a value inside a loop. */
function unsetInLoops(text: string): number[] {
  const blocks: boolean[] = [];
  const found: number[] = [];
  let statement = "";
  text.split("\n").forEach((line, i) => {
    for (const character of line.replace(/\/\/.*/, "") + " ") {
      if (character === "{") blocks.push(/\b(for|while|loop)\b/.test(statement));
      else if (character === "}") blocks.pop();
      else if (character !== ";" || /\bfor\s*\([^)]*$/.test(statement)) {
        statement += character;
        continue;
      } else if (blocks.includes(true) && /\bvar\s+\w+\s*:[^=]*$/.test(statement)) found.push(i + 1);
      statement = "";
    }
  });
  return found;
}

test("a variable without a value in a loop is found, one in front of it is not", () => {
  const text = `
fn main() {
    var fine: array<f32, 4>;
    for (var i = 0u; i < 4u; i++) {
        var set = 0.0;
        if set > 1.0 {
            var stale: vec4f;
        }
    }
    loop { var other: f32; }
    if true { var also_fine: f32; }
}`;
  expect(unsetInLoops(text)).toEqual([7, 10]);
});

// WGSL wants zero in each iteration; the SPIR-V of this Dawn has it in the first alone, and then what was left.
test("no kernel declares a variable without a value inside a loop", () => {
  const files = [...new Glob("**/*.wgsl").scanSync(KERNELS)];
  expect(files.length).toBeGreaterThan(50);
  const found = files.flatMap((file) =>
    unsetInLoops(readFileSync(join(KERNELS, file), "utf8")).map((line) => `${file}:${line}`)
  );
  expect(found).toEqual([]);
});
