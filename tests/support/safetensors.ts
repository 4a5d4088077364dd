/** A few lines of safetensors for fixtures, apart from the reader under test. Only f32 and i32. */

export interface NamedTensor {
  readonly shape: readonly number[];
  readonly data: Float32Array | Int32Array;
}

export interface SafetensorsFile {
  readonly metadata: Readonly<Record<string, string>>;
  readonly tensors: Readonly<Record<string, NamedTensor>>;
}

interface HeaderEntry {
  dtype: string;
  shape: number[];
  data_offsets: [number, number];
}

/** u64 header length, JSON header, data; the tensors are copies, so their alignment does not matter. */
export function parseSafetensors(file: Uint8Array): SafetensorsFile {
  const view = new DataView(file.buffer, file.byteOffset, file.byteLength);
  const dataStart = 8 + Number(view.getBigUint64(0, true));
  const { __metadata__: metadata = {}, ...entries } = JSON.parse(
    new TextDecoder().decode(file.subarray(8, dataStart)),
  ) as { __metadata__?: Record<string, string> } & Record<string, HeaderEntry>;
  const tensors: Record<string, NamedTensor> = {};
  for (const [name, { dtype, shape, data_offsets: [from, to] }] of Object.entries(entries)) {
    const { buffer } = new Uint8Array(file.subarray(dataStart + from, dataStart + to)); // a copy, unlike Buffer's slice
    if (dtype !== "F32" && dtype !== "I32") {
      throw new Error(`${name} is ${dtype}, a fixture holds F32 or I32`);
    }
    tensors[name] = { shape, data: dtype === "F32" ? new Float32Array(buffer) : new Int32Array(buffer) };
  }
  return { metadata, tensors };
}

/** Tensors in order of name; the header is padded with spaces to a multiple of 8 bytes. */
export function writeSafetensors(
  metadata: Readonly<Record<string, string>>,
  tensors: Readonly<Record<string, NamedTensor>>,
): Uint8Array {
  const header: Record<string, unknown> = { __metadata__: metadata };
  const parts: Uint8Array[] = [];
  let offset = 0;
  for (const [name, { shape, data }] of Object.entries(tensors).sort(([a], [b]) => a < b ? -1 : 1)) {
    const dtype = data instanceof Float32Array ? "F32" : "I32";
    header[name] = { dtype, shape, data_offsets: [offset, offset + data.byteLength] };
    parts.push(new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
    offset += data.byteLength;
  }
  const json = JSON.stringify(header);
  const headerBytes = new TextEncoder().encode(json + " ".repeat(-new TextEncoder().encode(json).length & 7));
  const length = new Uint8Array(8);
  new DataView(length.buffer).setBigUint64(0, BigInt(headerBytes.length), true);
  return Buffer.concat([length, headerBytes, ...parts]);
}
