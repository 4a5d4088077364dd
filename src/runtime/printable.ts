/** Text from files, folders and arguments as it may be written to a terminal. */

/** Control and format characters, separators of lines, halves of pairs: what moves a cursor or turns the text. */
const UNPRINTABLE = /[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu;
const UNPRINTABLE_IN_LINES = /[^\P{Cc}\n\t]|[\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu;

/** Characters of a message, at most: it may name two paths. */
const MAX_MESSAGE = 2000;

/** The text on one line, with `\u001b` in place of the character. */
export function printable(text: string): string {
  return text.replace(UNPRINTABLE, escaped);
}

/** The same for text of several lines, which keeps its lines and tabs. */
export function printableLines(text: string): string {
  return text.replace(UNPRINTABLE_IN_LINES, escaped);
}

/** The text as a message: on one line, cut where it is longer than any that says something. */
export function printableMessage(text: string): string {
  const line = printable(text.length > MAX_MESSAGE ? text.slice(0, MAX_MESSAGE) : text);
  return line.length > MAX_MESSAGE || text.length > MAX_MESSAGE ? `${line.slice(0, MAX_MESSAGE)}…` : line;
}

function escaped(char: string): string {
  if (char === "\n") return "\\n";
  const code = char.codePointAt(0)!.toString(16);
  return code.length > 4 ? `\\u{${code}}` : `\\u${code.padStart(4, "0")}`;
}
