/** Text tables and figures of reports. */
import { printable } from "../runtime/printable.ts";

/** Characters of a cell, at most: every row is as wide as the widest. */
const MOST_CELL = 100;

/** What a recorded result or a folder calls something, as a cell or a line has room for it. */
export function shortName(name: string): string {
  const shown = printable(name);
  return shown.length > MOST_CELL ? `${shown.slice(0, MOST_CELL - 1)}…` : shown;
}

/** Columns padded to their widest cell, numbers to the right. @param leftColumns places of columns of words */
export function formatTable(
  header: readonly string[],
  rows: readonly (readonly string[])[],
  leftColumns: readonly number[],
): string {
  const cells = [header, ...rows].map((row) => row.map(shortName));
  const widths = header.map((_, i) => cells.reduce((width, row) => Math.max(width, row[i]?.length ?? 0), 0));
  const line = (row: readonly string[]) =>
    row.map((cell, i) => leftColumns.includes(i) ? cell.padEnd(widths[i]!) : cell.padStart(widths[i]!))
      .join("  ").trimEnd();
  return cells.map(line).join("\n");
}

/** Four digits, without an exponent. */
export function figure(n: number | null): string {
  if (n === null) return "-";
  if (n >= 1000) return Math.round(n).toLocaleString("en-US");
  return n >= 0.001 || n === 0 ? String(Number(n.toPrecision(4))) : n.toFixed(6);
}

/** A share as whole percents, tenths below ten. */
export function percent(share: number | null): string {
  if (share === null) return "-";
  const percents = 100 * share;
  return percents < 9.95 ? percents.toFixed(1) : percents.toFixed(0);
}
