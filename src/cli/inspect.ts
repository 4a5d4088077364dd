/** `inspect`: what a model folder holds, and everything that would keep it from loading. */
import { stat } from "node:fs/promises";
import { join } from "node:path";
import { checkCheckpoint } from "../model/checkpoint.ts";
import { configToJson, readConfig } from "../model/config.ts";
import { scanElements, STORED_BYTES } from "../model/float16.ts";
import { type JsonObject, readJsonObject, requireFolder } from "../model/json_file.ts";
import { openCheckpoint } from "../model/safetensors.ts";
import {
  elementCount,
  formatShape,
  isStoredDType,
  quoteName,
  type TensorInfo,
  type WeightSource,
} from "../model/weight_source.ts";
import { ModelError } from "../runtime/errors.ts";
import { modelFolder } from "./load.ts";
import type { InspectOptions } from "./options.ts";
import { writeJson, writeResult } from "./output.ts";

export interface InspectedTensor {
  readonly name: string;
  readonly dtype: string;
  readonly shape: readonly number[];
  readonly bytes: number;
  readonly file: string;
}

export interface DTypeTotal {
  readonly tensors: number;
  readonly elements: number;
  readonly bytes: number;
}

/** Plain data: what `inspect --json` prints. */
export interface InspectReport {
  readonly path: string;
  /** The config under Hugging Face's keys with defaults filled in; null if it cannot be used. */
  readonly config: JsonObject | null;
  /** Elements of the tensors that GPT-2 uses; of all tensors where the config cannot be used. */
  readonly parameters: number;
  readonly bytes: number;
  readonly totals: Readonly<Record<string, DTypeTotal>>;
  readonly tensors: readonly InspectedTensor[];
  /** The output head is wte itself. */
  readonly tied: boolean | null;
  /** Outputs of the classification head, 0 without one. */
  readonly classes: number;
  /** The tokenizer's file name; null if there is none. */
  readonly tokenizer: string | null;
  /** What would not load, one sentence each. */
  readonly problems: readonly string[];
  /** What loads but is worth knowing, one sentence each. */
  readonly notes: readonly string[];
  /** Tensors that GPT-2 does not use. */
  readonly ignored: readonly string[];
}

export interface InspectSettings {
  /** Read every weight to find NaN, infinities and values beyond f16; on unless switched off. */
  readonly values?: boolean;
}

/** Lists of names in the text report are cut here; the JSON has them all. */
const MAX_LISTED = 20;
const CHUNK_BYTES = 1 << 24;

/**
 * Examines a model folder. Whatever is wrong with its files ends up in `problems`.
 * @throws ModelError if there is no such folder
 */
export async function inspectModel(dir: string, settings: InspectSettings = {}): Promise<InspectReport> {
  await requireFolder(dir);
  const problems: string[] = [];
  const notes: string[] = [];
  const config = await orProblem(readConfig(dir), problems);
  const source = await orProblem(openCheckpoint(dir), problems);
  const tokenizer = await findTokenizer(dir, problems, notes);
  try {
    const tensors = source ? [...source.tensors.values()] : [];
    const check = config && source ? checkCheckpoint(source, config) : undefined;
    for (const { message } of check?.problems ?? []) problems.push(message);
    if (source && settings.values !== false) {
      await checkValues(source, check ? [...check.tensors.values()] : tensors, problems, notes);
    }
    return {
      path: dir,
      config: config ? configToJson(config) : null,
      parameters: check ? check.parameters : sum(tensors, (info) => elementCount(info.shape)),
      bytes: sum(tensors, (info) => info.byteLength),
      totals: totalsByDType(tensors),
      tensors: tensors.map(({ name, dtype, shape, byteLength, file }) => ({
        name,
        dtype,
        shape,
        bytes: byteLength,
        file,
      })),
      tied: check ? check.tiedLmHead : null,
      classes: check?.tensors.get("score.weight")?.shape[0] ?? 0,
      tokenizer,
      problems,
      notes,
      ignored: check ? check.ignored : [],
    };
  } finally {
    await source?.close();
  }
}

/** The result, or undefined after noting the ModelError that prevented it. */
async function orProblem<T>(work: Promise<T>, problems: string[]): Promise<T | undefined> {
  try {
    return await work;
  } catch (error) {
    if (!(error instanceof ModelError)) throw error;
    problems.push(error.message);
    return undefined;
  }
}

async function findTokenizer(dir: string, problems: string[], notes: string[]): Promise<string | null> {
  const name = "tokenizer.json";
  const found = await stat(join(dir, name)).catch(() => undefined);
  if (!found) {
    notes.push(`There is no ${name} in ${dir}: prompts must be token ids (--ids)`);
    return null;
  }
  await orProblem(readJsonObject(join(dir, name)), problems);
  return name;
}

/** Reads the given tensors once, in pieces, and reports the first bad value of each. */
async function checkValues(
  source: WeightSource,
  tensors: readonly TensorInfo[],
  problems: string[],
  notes: string[],
): Promise<void> {
  const largest = tensors.reduce((most, { byteLength }) => Math.max(most, byteLength), 0);
  const chunk = new Uint8Array(Math.min(CHUNK_BYTES, largest));
  for (const { name, dtype, byteLength, file } of tensors) {
    if (!isStoredDType(dtype)) continue;
    let nonFinite = -1;
    let overflow = -1;
    for (let offset = 0; offset < byteLength && nonFinite < 0; offset += chunk.length) {
      const part = chunk.subarray(0, Math.min(chunk.length, byteLength - offset));
      if (!await orProblem(source.read(name, offset, part).then(() => true), problems)) return;
      const found = scanElements(part, dtype);
      const start = offset / STORED_BYTES[dtype];
      if (found.firstNonFinite >= 0) nonFinite = start + found.firstNonFinite;
      if (found.firstOverflow >= 0 && overflow < 0) overflow = start + found.firstOverflow;
    }
    const where = `Tensor ${quoteName(name)} in ${file}`;
    if (nonFinite >= 0) problems.push(`${where} holds NaN or an infinity at element ${nonFinite}`);
    if (overflow >= 0) {
      notes.push(`${where} holds a value beyond f16 at element ${overflow}: use --dtype f32`);
    }
  }
}

function totalsByDType(tensors: readonly TensorInfo[]): Record<string, DTypeTotal> {
  const totals: Record<string, DTypeTotal> = {};
  for (const { dtype, shape, byteLength } of tensors) {
    const before = totals[dtype] ?? { tensors: 0, elements: 0, bytes: 0 };
    totals[dtype] = {
      tensors: before.tensors + 1,
      elements: before.elements + elementCount(shape),
      bytes: before.bytes + byteLength,
    };
  }
  return totals;
}

/** The report as text for people: no colour, one aligned table. */
export function formatInspect(report: InspectReport): string {
  const lines = [report.path, ...summaryLines(report), ""];
  if (report.tensors.length > 0) {
    const rows = report.tensors.map(({ name, dtype, shape, bytes }) =>
      [plainName(name), dtype, formatShape(shape), grouped(bytes)] as const
    );
    lines.push(alignColumns([["tensor", "dtype", "shape", "bytes"], ...rows]).join("\n"), "");
  }
  lines.push(...listing("ignored", report.ignored.map(plainName)), ...listing("note", report.notes));
  lines.push(...listing("problem", report.problems));
  if (report.problems.length === 0) lines.push("no problems found");
  return lines.join("\n") + "\n";
}

function summaryLines(
  { config, parameters, bytes, totals, tensors, tied, classes, tokenizer }: InspectReport,
): string[] {
  const facts: (readonly [string, string])[] = [];
  if (config) {
    const { n_layer, n_head, n_embd, n_positions, vocab_size } = config;
    facts.push(["shape", `${n_layer} layers, ${n_head} heads, width ${n_embd}`]);
    facts.push(["positions", String(n_positions)], ["vocabulary", String(vocab_size)]);
  }
  facts.push(["parameters", grouped(parameters)]);
  const dtypes = Object.entries(totals).map(([dtype, total]) =>
    `${total.tensors} ${dtype} (${grouped(total.bytes)} B)`
  );
  facts.push([
    "tensors",
    tensors.length === 0 ? "none" : `${dtypes.join(", ")}, ${grouped(bytes)} bytes in all`,
  ]);
  if (tied !== null) facts.push(["output head", tied ? "tied to wte" : "lm_head.weight"]);
  if (classes > 0) facts.push(["classes", String(classes)]);
  facts.push(["tokenizer", tokenizer ?? "none"]);
  return facts.map(([label, value]) => `  ${label.padEnd(12)} ${value}`);
}

/** Left-aligned columns, the last one right-aligned. */
function alignColumns(rows: readonly (readonly [string, string, string, string])[]): string[] {
  const widths = [0, 1, 2, 3].map((column) =>
    rows.reduce((width, row) => Math.max(width, row[column]!.length), 0)
  );
  return rows.map((row) =>
    row.map((cell, column) => column === 3 ? cell.padStart(widths[column]!) : cell.padEnd(widths[column]!))
      .join("  ")
  );
}

function listing(label: string, items: readonly string[]): string[] {
  const lines = items.slice(0, MAX_LISTED).map((item) => `${label}: ${item}`);
  if (items.length > MAX_LISTED) {
    lines.push(`${label}: ${items.length - MAX_LISTED} more (all of them with --json)`);
  }
  return lines;
}

/** The name as it is, unless it is long or holds characters that could disturb a terminal. */
function plainName(name: string): string {
  const quoted = quoteName(name);
  return quoted === `"${name}"` ? name : quoted;
}

function grouped(count: number): string {
  return String(count).replace(/\B(?=(\d{3})+$)/g, ",");
}

function sum<T>(items: readonly T[], value: (item: T) => number): number {
  return items.reduce((total, item) => total + value(item), 0);
}

/** Runs the command. @returns 0, or 1 when something would not load */
export async function runInspect(options: InspectOptions): Promise<number> {
  const report = await inspectModel(await modelFolder({ model: options.path }));
  if (options.json) writeJson(report);
  else writeResult(formatInspect(report));
  return report.problems.length > 0 ? 1 : 0;
}
