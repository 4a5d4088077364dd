/** Text tables and figures of reports. */

/** Columns padded to their widest cell, numbers to the right. @param leftColumns places of columns of words */
export function formatTable(
  header: readonly string[],
  rows: readonly (readonly string[])[],
  leftColumns: readonly number[],
): string {
  const widths = header.map((title, i) => Math.max(title.length, ...rows.map((row) => row[i]?.length ?? 0)));
  const line = (row: readonly string[]) =>
    row.map((cell, i) => leftColumns.includes(i) ? cell.padEnd(widths[i]!) : cell.padStart(widths[i]!))
      .join("  ").trimEnd();
  return [header, ...rows].map(line).join("\n");
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
