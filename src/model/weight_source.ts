/** Where weights come from: a file, several shards, or arithmetic. Nothing here knows GPT-2 or a GPU. */
import { printable } from "../runtime/printable.ts";

/** The element types that longform can load. */
export type StoredDType = "F32" | "F16" | "BF16";

export interface TensorInfo {
  /** The name in the source, prefix included. */
  readonly name: string;
  /** As the file spells it; only a `StoredDType` can be loaded. */
  readonly dtype: string;
  readonly shape: readonly number[];
  readonly byteLength: number;
  /** The file that holds it, for messages. */
  readonly file: string;
}

export interface WeightSource {
  /** The path, or what stands in for one, shown in messages. */
  readonly description: string;
  readonly tensors: ReadonlyMap<string, TensorInfo>;
  /** Fills all of `into` with the tensor's bytes from byte `offset`. */
  read(name: string, offset: number, into: Uint8Array): Promise<void>;
  close(): Promise<void>;
}

export function isStoredDType(dtype: string): dtype is StoredDType {
  return dtype === "F32" || dtype === "F16" || dtype === "BF16";
}

/** Elements of a tensor of this shape; a scalar (`[]`) has one. */
export function elementCount(shape: readonly number[]): number {
  return shape.reduce((product, size) => product * size, 1);
}

/** As `[2, 3]`; of a shape with more sizes than any tensor has, the first ones. */
export function formatShape(shape: readonly number[]): string {
  const rest = shape.length - MAX_SHOWN_SIZES;
  return `[${shape.slice(0, MAX_SHOWN_SIZES).join(", ")}${rest > 0 ? ` and ${rest} more` : ""}]`;
}

/**
 * The tensor that `read` was asked for, or an error if the range is not inside it: both are mistakes of the caller,
 * not of the file.
 */
export function tensorForRead(
  source: WeightSource,
  name: string,
  offset: number,
  length: number,
): TensorInfo {
  const info = source.tensors.get(name);
  if (!info) throw new RangeError(`Cannot read ${quoteName(name)}: ${source.description} has no such tensor`);
  if (!Number.isSafeInteger(offset) || offset < 0 || offset + length > info.byteLength) {
    throw new RangeError(
      `Cannot read ${length} bytes at ${offset} of ${quoteName(name)}: it has ${info.byteLength} bytes`,
    );
  }
  return info;
}

/** Sizes of a shape that a message shows. */
const MAX_SHOWN_SIZES = 8;
/** Longest name shown in a message. */
const MAX_SHOWN = 100;

/**
 * A name from a file as one line of a message: quoted, shortened, control and direction characters escaped, so that a
 * hostile checkpoint cannot write to the terminal.
 */
export function quoteName(name: string): string {
  const shown = name.length > MAX_SHOWN ? name.slice(0, MAX_SHOWN) + "…" : name;
  return printable(JSON.stringify(shown));
}
