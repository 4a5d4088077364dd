/** docs/troubleshooting.md explains every error that src can make, and no other. */
import { describe, expect, test } from "bun:test";
import { readFileSync } from "node:fs";
import { constants } from "node:os";
import { join } from "node:path";
import { ioReason } from "../../src/runtime/io_error.ts";
import { type ErrorSite, errorSites } from "./error_messages.ts";

const ROOT = join(import.meta.dir, "../..");
const PAGE = readFileSync(join(ROOT, "docs/troubleshooting.md"), "utf8");
const BUGS = "This is a bug in longform";

/** A heading with the messages that it explains: those of a block of text below it, then `Exit code N.` and a cure. */
interface Entry {
  readonly heading: string;
  readonly skeletons: readonly string[];
  readonly exitCode: number;
  readonly explanation: string;
}

function entriesOf(page: string): Entry[] {
  const form = /^### (.+)\n\n```text\n([^]+?)\n```\n\nExit code (\d)\. ([^]+?)(?=\n\n#|\n*$(?![^]))/gm;
  return [...page.matchAll(form)].map(([, heading, messages, code, explanation]) => ({
    heading: heading!,
    skeletons: messages!.split("\n"),
    exitCode: Number(code),
    explanation: explanation!,
  }));
}

/** What is to be added, in the form of the page. */
function missingEntry({ where, errorClass, exitCode, skeletons }: ErrorSite): string {
  const fence = "```";
  return `### …\n\n${fence}text\n${skeletons.join("\n")}\n${fence}\n\nExit code ${exitCode}. … ` +
    `<!-- ${errorClass}, ${where} -->`;
}

const sites = await errorSites(ROOT);
const entries = entriesOf(PAGE);
const explained = new Map(entries.flatMap((entry) => entry.skeletons.map((text) => [text, entry] as const)));

describe("docs/troubleshooting.md", () => {
  test("every block of messages is read as an entry with an exit code and an explanation", () => {
    expect(entries.length).toBe(PAGE.match(/^```text$/gm)!.length);
    expect(entries.filter(({ explanation }) => explanation.split(/\s+/).length < 10)).toEqual([]);
  });

  test("every error of src has an entry", () => {
    expect(sites.length).toBeGreaterThan(200);
    const missing = sites.map((site) => ({
      ...site,
      skeletons: site.skeletons.filter((text) => !explained.has(text)),
    })).filter(({ skeletons }) => skeletons.length > 0);
    expect(missing.map(missingEntry).join("\n\n")).toBe("");
  });

  test("every message of an entry is one of src", () => {
    const made = new Set(sites.flatMap(({ skeletons }) => skeletons));
    expect([...explained.keys()].filter((text) => !made.has(text))).toEqual([]);
  });

  test("no message has two entries", () => {
    const all = entries.flatMap(({ skeletons }) => skeletons);
    expect(all.filter((text, i) => all.indexOf(text) !== i)).toEqual([]);
  });

  test("entries state the exit codes of their errors", () => {
    const wrong = sites.flatMap(({ skeletons, exitCode, errorClass, where }) =>
      skeletons.filter((text) => explained.has(text) && explained.get(text)!.exitCode !== exitCode)
        .map((text) => `${where}: ${errorClass} "${text}" ends with ${exitCode}`)
    );
    expect(wrong).toEqual([]);
  });

  test("what main.ts calls a bug is in the entry for bugs, and nothing else is", () => {
    const misplaced = sites.flatMap(({ skeletons, isBug, where }) =>
      skeletons.filter((text) => (explained.get(text)?.heading === BUGS) !== isBug)
        .map((text) => `${where}: "${text}"`)
    );
    expect(misplaced).toEqual([]);
  });

  test("its links lead to headings that it has", () => {
    const anchors = [...PAGE.matchAll(/^##+ (.+)$/gm)].map(([, heading]) =>
      heading!.toLowerCase().replace(/[^\w\s-]/g, "").replaceAll(" ", "-")
    );
    const links = [...PAGE.matchAll(/\]\(#([^)]+)\)/g)].map(([, anchor]) => anchor!);
    expect(links.filter((anchor) => !anchors.includes(anchor))).toEqual([]);
    expect(anchors.filter((anchor, i) => anchors.indexOf(anchor) !== i)).toEqual([]);
  });

  test("the reasons of the system are those of src/runtime/io_error.ts", () => {
    const rows = [...PAGE.matchAll(/^\| (.+) \| (E[A-Z]+) \| .+ \|$/gm)].map((
      [, reason, code],
    ) => [code, reason]);
    const known = Object.keys(constants.errno).map((code) => [code, ioReason({ code })])
      .filter(([code, reason]) => code !== reason);
    expect(rows.sort()).toEqual(known.sort());
  });
});
