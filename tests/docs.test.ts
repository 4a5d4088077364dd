/** The documentation points at files that exist. */
import { expect, test } from "bun:test";
import { existsSync, readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const root = join(dirname(fileURLToPath(import.meta.url)), "..");
const pages = [...new Bun.Glob("**/*.md").scanSync({ cwd: root })].filter((path) =>
  !/(^|\/)(node_modules|\.[^/]+)\//.test(path)
);

test("there are pages to check", () => {
  expect(pages).toContain("README.md");
});

for (const page of pages) {
  test(`links and paths in ${page} lead to files`, () => {
    const text = readFileSync(join(root, page), "utf8");
    const links = [...text.matchAll(/\]\((?!https?:|#)([^)#]+)/g)].map(([, target]) =>
      join(dirname(page), target!)
    );
    const paths = [...text.matchAll(/`((?:src|docs|tests|bench|scripts)\/[\w./-]+)`/g)].map(([, path]) =>
      path!
    );
    expect([...links, ...paths].filter((path) => !existsSync(join(root, path)))).toEqual([]);
  });
}
