/** docs/faults.md: each row names a test that exists, and each test of this folder is in a row. */
import { describe, expect, test } from "bun:test";
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";

const ROOT = join(import.meta.dir, "../..");

interface Row {
  readonly fault: string;
  readonly exitCode: string;
  readonly file: string;
  readonly name: string;
}

/** The rows of tables that have a test in their last column. */
const rows = readFileSync(join(ROOT, "docs/faults.md"), "utf8").split("\n")
  .filter((line) => line.startsWith("| ") && !/^\| (?:fault|---) /.test(line))
  .map((line): Row => {
    const [fault = "", , exitCode = "", , shownBy = ""] = line.slice(2, -2).split(/(?<!\\)\|/).map((cell) =>
      cell.trim()
    );
    const [, file = "", name = ""] = /^`(.+\.test\.ts)`: (.+)$/.exec(shownBy) ?? [];
    return { fault, exitCode, file, name };
  });

/** A file in which `…` stands for what differs between tests that are made alike. */
function sourceOf(path: string): string {
  return readFileSync(path, "utf8").replace(/\$\{[^}]*\}/g, "…");
}

describe("docs/faults.md", () => {
  test("has rows, each with an exit code and a test", () => {
    expect(rows.length).toBeGreaterThan(40);
    expect(rows.filter(({ name }) => name === "")).toEqual([]);
    expect(rows.filter(({ exitCode }) => !/^\d+(?:, (?:or )?\d+)*$/.test(exitCode))).toEqual([]);
  });

  for (const { fault, file, name } of rows) {
    test(`names the test of: ${fault}`, () => {
      const path = join(ROOT, file);
      expect({ file, exists: existsSync(path) }).toEqual({ file, exists: true });
      expect({ file, name, isFound: sourceOf(path).includes(name) })
        .toEqual({ file, name, isFound: true });
    });
  }

  test("has a row for each test of this folder", () => {
    const files = readdirSync(import.meta.dir).filter((file) => file !== "table.test.ts");
    const titles = files.flatMap((file) => {
      const found = sourceOf(join(import.meta.dir, file)).matchAll(
        /\btest(?:\.skipIf\([^"`]*\))?\(\s*(?:"([^"]+)"|`([^`]+)`)/g,
      );
      return [...found].map(([, plain, template]) => plain ?? template!);
    });
    expect(titles.length).toBeGreaterThan(20);
    expect(titles.filter((title) => !rows.some(({ name }) => title.includes(name)))).toEqual([]);
  });
});
