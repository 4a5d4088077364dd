import { describe, expect, test } from "bun:test";
import { convertElements, f16ToF32, f32ToF16, scanElements } from "../../src/model/float16.ts";

/** Every f16 bit pattern that is not NaN. */
const NUMBERS = Array.from({ length: 65536 }, (_, bits) => bits).filter((bits) => (bits & 0x7fff) <= 0x7c00);

function bytesOf(values: ArrayLike<number>, type: "f32" | "u16"): Uint8Array {
  return new Uint8Array((type === "f32" ? Float32Array.from(values) : Uint16Array.from(values)).buffer);
}

function asF32(bytes: Uint8Array): Float32Array {
  return new Float32Array(bytes.slice().buffer);
}

function asU16(bytes: Uint8Array): Uint16Array {
  return new Uint16Array(bytes.slice().buffer);
}

describe("float16", () => {
  test("every f16 widens to the number the format defines and narrows back to itself", () => {
    for (const bits of NUMBERS) {
      const exponent = (bits >> 10) & 31;
      const mantissa = bits & 1023;
      const magnitude = exponent === 31
        ? Infinity
        : exponent === 0
        ? mantissa * 2 ** -24
        : (1 + mantissa / 1024) * 2 ** (exponent - 15);
      const value = f16ToF32(bits);
      expect(Object.is(value, bits & 0x8000 ? -magnitude : magnitude)).toBe(true);
      expect(f32ToF16(value)).toBe(bits);
    }
  });

  test("narrowing agrees with the engine's own Float16Array around every rounding boundary", () => {
    const oracle = new Float16Array(1);
    const oracleBits = new Uint16Array(oracle.buffer);
    const step = new Float32Array(1);
    const stepBits = new Uint32Array(step.buffer);
    for (let bits = 0; bits < 0x7c00; bits++) {
      step[0] = (f16ToF32(bits) + (bits === 0x7bff ? 65536 : f16ToF32(bits + 1))) / 2; // the tie
      for (const nudge of [-1, 0, 1]) {
        stepBits[0] = stepBits[0]! + nudge;
        oracle[0] = step[0];
        expect(f32ToF16(step[0])).toBe(oracleBits[0]!);
        expect(f32ToF16(-step[0])).toBe(oracleBits[0]! | 0x8000);
        stepBits[0] -= nudge;
      }
    }
  });

  test("NaN stays NaN in both directions", () => {
    expect(f16ToF32(0x7e01)).toBeNaN();
    expect(f16ToF32(f32ToF16(NaN))).toBeNaN();
    expect(f16ToF32(0xfc01)).toBeNaN();
  });

  test("F16 to f32 converts every bit pattern", () => {
    const { bytes, firstNonFinite, firstOverflow } = convertElements(bytesOf(NUMBERS, "u16"), "F16", "f32");
    expect(asF32(bytes)).toEqual(Float32Array.from(NUMBERS, f16ToF32));
    expect(firstNonFinite).toBe(NUMBERS.indexOf(0x7c00));
    expect(firstOverflow).toBe(-1);
  });

  test("BF16 widens exactly and narrows like the f32 it abbreviates", () => {
    const bfloats = [0, 0x8000, 0x3f80, 0xc049, 0x3400, 0x3300, 0x0001, 0x477f, 0x7f7f, 0x7f80];
    const numbers = Float32Array.from(
      new Float32Array(Uint32Array.from(bfloats, (bits) => bits << 16).buffer),
    );
    const wide = convertElements(bytesOf(bfloats, "u16"), "BF16", "f32");
    expect(asF32(wide.bytes)).toEqual(numbers);
    expect(wide).toMatchObject({ firstNonFinite: 9, firstOverflow: -1 });
    const narrow = convertElements(bytesOf(bfloats, "u16"), "BF16", "f16");
    expect([...asU16(narrow.bytes)]).toEqual([...numbers].map(f32ToF16));
    expect(narrow).toMatchObject({ firstNonFinite: 9, firstOverflow: 8 });
  });

  test("F32 to f16 rounds, and reports the first value beyond f16", () => {
    const { bytes, firstNonFinite, firstOverflow } = convertElements(
      bytesOf([1, 65504, 65519.996, -65520, 1e30, 1e-10], "f32"),
      "F32",
      "f16",
    );
    expect([...asU16(bytes)]).toEqual([0x3c00, 0x7bff, 0x7bff, 0xfc00, 0x7c00, 0]);
    expect(firstNonFinite).toBe(-1);
    expect(firstOverflow).toBe(3);
  });

  test("the first non-finite element is found in every conversion", () => {
    const floats = bytesOf([1, 2, -Infinity, NaN], "f32");
    for (const to of ["f16", "f32"] as const) {
      expect(convertElements(floats, "F32", to)).toMatchObject({ firstNonFinite: 2, firstOverflow: -1 });
      expect(convertElements(bytesOf([0, 0x7fff], "u16"), "F16", to).firstNonFinite).toBe(1);
      expect(convertElements(bytesOf([0, 0, 0xffc0], "u16"), "BF16", to).firstNonFinite).toBe(2);
    }
    expect(scanElements(floats, "F32")).toEqual({ firstNonFinite: 2, firstOverflow: -1 });
  });

  test("matching types return the source itself, scanned", () => {
    const floats = bytesOf([1, 2, 3], "f32");
    expect(convertElements(floats, "F32", "f32").bytes).toBe(floats);
    expect(convertElements(floats, "F16", "f16").bytes).toBe(floats);
  });

  test("an unaligned source gives the same result", () => {
    const cases = [["F32", bytesOf([1.5, -2.25], "f32")], ["F16", bytesOf([0x3e00, 0xc080], "u16")]] as const;
    for (const [from, aligned] of cases) {
      for (const offset of [1, 2, 3]) {
        const shifted = new Uint8Array(aligned.length + offset).subarray(offset);
        shifted.set(aligned);
        expect(asF32(convertElements(shifted, from, "f32").bytes)).toEqual(Float32Array.of(1.5, -2.25));
        expect([...asU16(convertElements(shifted, from, "f16").bytes)]).toEqual([0x3e00, 0xc080]);
      }
    }
  });

  test("no elements are converted to no elements, and half an element is refused", () => {
    expect(convertElements(new Uint8Array(0), "BF16", "f32").bytes.length).toBe(0);
    expect(() => convertElements(new Uint8Array(6), "F32", "f16")).toThrow(RangeError);
  });
});
