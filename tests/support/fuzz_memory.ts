/** Counts the memory that code asks for by name of a size: what a hostile number in a file would reach. */

const TYPED_ARRAYS = [
  "Int8Array",
  "Uint8Array",
  "Uint8ClampedArray",
  "Int16Array",
  "Uint16Array",
  "Int32Array",
  "Uint32Array",
  "Float32Array",
  "Float64Array",
  "BigInt64Array",
  "BigUint64Array",
] as const;
const BUFFER_MAKERS = ["alloc", "allocUnsafe", "allocUnsafeSlow"] as const;
const TEXT_MAKERS = ["repeat", "padStart", "padEnd"] as const;

type Callable = (...args: unknown[]) => unknown;
type Constructor = new (...args: unknown[]) => object;

export interface MemoryCount {
  /** Bytes since it was asked last. */
  take(): number;
  stop(): void;
}

/**
 * Adds up the bytes of every typed array, `ArrayBuffer`, `Buffer` and array that is made by its length, and of every
 * text that is repeated or padded, until it is stopped. What grows as it is filled, as text and parsed JSON do, is not
 * counted: its size is that of what it was made of.
 */
export function countMemory(): MemoryCount {
  let bytes = 0;
  const stop = replaceMakers((count, size) => {
    if (typeof count === "number" && count > 0) bytes += count * size;
  });
  return {
    take() {
      const taken = bytes;
      bytes = 0;
      return taken;
    },
    stop,
  };
}

type Add = (count: unknown, size: number) => void;

/** @returns what puts the makers back */
function replaceMakers(add: Add): () => void {
  const undo: (() => void)[] = [];
  const replace = (owner: object, name: string, made: (original: never) => unknown) => {
    const before = Object.getOwnPropertyDescriptor(owner, name)!;
    Object.defineProperty(owner, name, { ...before, value: made(before.value as never) });
    undo.push(() => Object.defineProperty(owner, name, before));
  };
  const counted = (size: number) => (original: Constructor) =>
    new Proxy(original, {
      construct(target, args: unknown[], made) {
        add(lengthOf(args[0]), size);
        return Reflect.construct(target, args, made) as object;
      },
    });
  for (const name of TYPED_ARRAYS) replace(globalThis, name, counted(globalThis[name].BYTES_PER_ELEMENT));
  for (const name of ["ArrayBuffer", "SharedArrayBuffer"]) replace(globalThis, name, counted(1));
  replace(globalThis, "Array", (original: ArrayConstructor) =>
    new Proxy(original, {
      construct(target, args: unknown[], made) {
        if (args.length === 1) add(args[0], 8);
        return Reflect.construct(target, args, made) as object;
      },
      apply(target, self, args: unknown[]) {
        if (args.length === 1) add(args[0], 8);
        return Reflect.apply(target, self, args) as unknown;
      },
    }));
  const calling = (count: (self: unknown, args: unknown[]) => void) => (original: Callable) =>
    function (this: unknown, ...args: unknown[]) {
      count(this, args);
      return original.apply(this, args);
    };
  for (const name of BUFFER_MAKERS) replace(Buffer, name, calling((_, [length]) => add(length, 1)));
  for (const name of TEXT_MAKERS) {
    replace(
      String.prototype,
      name,
      calling((self, [count]) => {
        add(name === "repeat" ? Number(count) * String(self).length : count, 1);
      }),
    );
  }
  return () => undo.reverse().forEach((step) => step());
}

function lengthOf(value: unknown): unknown {
  if (typeof value === "number") return value;
  // A view of memory that is there already asks for none.
  if (typeof value !== "object" || value === null || ArrayBuffer.isView(value)) return 0;
  return "length" in value ? value.length : 0;
}
