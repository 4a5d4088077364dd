import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { f32ToF16 } from "../../src/model/float16.ts";
import {
  createBuffer,
  download,
  formatBytes,
  type GpuBuffer,
  MemoryLedger,
  Readback,
  upload,
} from "../../src/runtime/buffers.ts";
import { type Gpu, openDevice } from "../../src/runtime/device.ts";
import { DoesNotFitError } from "../../src/runtime/errors.ts";
import { Recorder } from "../../src/runtime/pass.ts";

const KIB = 1024;
let gpu: Gpu;

beforeAll(async () => {
  gpu = await openDevice({ restrict: { maxBindingBytes: 64 * KIB } });
});
afterAll(() => gpu.destroy());

async function withBuffer<T>(bytes: number, use: (buffer: GpuBuffer) => Promise<T>): Promise<T> {
  const buffer = createBuffer(gpu, "test", "activations", bytes);
  try {
    return await use(buffer);
  } finally {
    buffer.destroy();
  }
}

describe("createBuffer", () => {
  test("larger than the device binds is refused by name, with both sizes", () => {
    const create = () => createBuffer(gpu, "layer 0 keys", "kv", 64 * KIB + 4);
    expect(create).toThrow(DoesNotFitError);
    expect(create).toThrow('Cannot bind "layer 0 keys": it needs 64.0 KiB, this device binds at most 64 KiB');
    expect(gpu.memory.bytes("kv")).toBe(0);
  });
  test("as large as the device binds is created", () =>
    withBuffer(64 * KIB, async (buffer) => {
      expect(buffer.byteLength).toBe(64 * KIB);
      expect((await download(buffer, 64 * KIB - 16)).byteLength).toBe(16);
    }));
  test("sizes are rounded up to vectors of 16 bytes, and zero is not empty", async () => {
    for (const [asked, given] of [[0, 16], [1, 16], [16, 16], [17, 32], [100, 112]] as const) {
      await withBuffer(asked, (buffer) => Promise.resolve(expect(buffer.byteLength).toBe(given)));
    }
  });
  test("a new buffer reads as zeros", () =>
    withBuffer(4 * KIB, async (buffer) => {
      expect(new Uint8Array(await download(buffer)).every((byte) => byte === 0)).toBe(true);
    }));
});

describe("upload and download", () => {
  test("a round trip keeps every byte", () =>
    withBuffer(4 * KIB, async (buffer) => {
      const bytes = Uint8Array.from({ length: 4 * KIB }, (_, i) => (i * 37) & 255);
      upload(buffer, bytes);
      expect(new Uint8Array(await download(buffer))).toEqual(bytes);
    }));
  test("a part goes to its offset and comes from its offset", () =>
    withBuffer(64, async (buffer) => {
      upload(buffer, Float32Array.of(1, 2, 3), 20);
      expect([...new Float32Array(await download(buffer, 16, 20))]).toEqual([0, 1, 2, 3, 0]);
    }));
  test("a view into a larger array uploads its own elements only", () =>
    withBuffer(32, async (buffer) => {
      upload(buffer, Float32Array.of(1, 2, 3, 4, 5).subarray(1, 3));
      expect([...new Float32Array(await download(buffer))]).toEqual([2, 3, 0, 0, 0, 0, 0, 0]);
    }));
  test("a Float16Array uploads: Dawn itself would end the process", () =>
    withBuffer(16, async (buffer) => {
      const values = [1, -2.5, 65504, 2 ** -24, 0.1, -0];
      upload(buffer, Float16Array.from(values));
      expect([...new Uint16Array(await download(buffer, 0, 12))]).toEqual(values.map(f32ToF16));
    }));
  test("lengths that are no multiple of four come back whole", () =>
    withBuffer(16, async (buffer) => {
      upload(buffer, Uint16Array.of(1, 2, 3, 4));
      expect([...new Uint16Array(await download(buffer, 0, 6))]).toEqual([1, 2, 3]);
    }));
  test("the host's bytes may change right after the upload", () =>
    withBuffer(16, async (buffer) => {
      const data = Uint32Array.of(7, 7, 7, 7);
      upload(buffer, data);
      data.fill(9);
      expect([...new Uint32Array(await download(buffer))]).toEqual([7, 7, 7, 7]);
    }));
  test("a readback can be used again", () =>
    withBuffer(16, async (buffer) => {
      const readback = new Readback(gpu, "test", 16);
      for (const value of [1, 2, 3]) {
        upload(buffer, new Uint32Array(4).fill(value));
        const recorder = new Recorder(gpu, "test");
        recorder.copy(buffer, 0, readback, 0, 16);
        recorder.submit();
        expect([...new Uint32Array(await readback.read())]).toEqual([value, value, value, value]);
      }
      readback.destroy();
    }));
});

describe("the memory ledger", () => {
  test("counts by purpose, and the peak stays when buffers go", async () => {
    const { memory } = await openDevice({ nullBackend: true }).then((other) => {
      const buffers = [
        createBuffer(other, "a", "weights", 1000),
        createBuffer(other, "b", "kv", 500),
        createBuffer(other, "c", "kv", 16),
      ];
      expect(other.memory.bytes("weights")).toBe(1008);
      expect(other.memory.bytes("kv")).toBe(528);
      expect(other.memory.bytes("activations")).toBe(0);
      buffers[0]!.destroy();
      buffers[1]!.destroy();
      createBuffer(other, "d", "activations", 32);
      return other;
    });
    expect(memory.bytes("weights")).toBe(0);
    expect(memory.bytes("kv")).toBe(16);
    expect(memory.bytes("activations")).toBe(32);
    expect(memory.peakBytes).toBe(1536);
  });
  test("a download leaves nothing behind", async () => {
    await withBuffer(64, (buffer) => download(buffer));
    expect(gpu.memory.bytes("staging")).toBe(0);
    expect(gpu.memory.bytes("activations")).toBe(0);
  });
  test("starts at nothing", () => {
    const ledger = new MemoryLedger();
    expect(ledger.peakBytes).toBe(0);
    ledger.add("kv", 10);
    ledger.add("kv", -10);
    expect([ledger.bytes("kv"), ledger.peakBytes]).toEqual([0, 10]);
  });
});

test("sizes are printed in the largest unit that leaves at least one", () => {
  const sizes = [0, 1023, 1024, 1536, 10 * KIB + 512, 128 * KIB * KIB, 2 ** 31 - 4, 5 * 2 ** 40, 2 ** 55];
  expect(sizes.map(formatBytes)).toEqual(
    ["0 B", "1023 B", "1 KiB", "1.50 KiB", "10.5 KiB", "128 MiB", "2.00 GiB", "5 TiB", "32768 TiB"],
  );
});
