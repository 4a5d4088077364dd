/**
 * Host to GPU by `queue.writeBuffer` and by the ring of mapped buffers that weights and sessions go through.
 *
 *     bun bench/uploads.ts [--out FILE.json] [--commit ID]
 */
import { parseArgs } from "node:util";
import { createBuffer, upload } from "../src/runtime/buffers.ts";
import { openDevice } from "../src/runtime/device.ts";
import { UploadRing } from "../src/runtime/upload_ring.ts";
import { provenance, writeResult } from "./provenance.ts";

const { values } = parseArgs({ options: { commit: { type: "string" }, out: { type: "string" } } });

const TOTAL = 120 << 20;
const SLICES = [1, 4, 8].map((mib) => mib << 20);
const ROUNDS = 5;

const gpu = await openDevice();
const target = createBuffer(gpu, "target", "activations", TOTAL);
const host = new Uint8Array(8 << 20).fill(7);
const rows: { how: string; sliceBytes: number; gbPerSecond: number }[] = [];
console.log("| how | slices | GB/s (median of 5) |\n| --- | --- | --- |");
for (const how of ["writeBuffer", "ring"] as const) {
  for (const sliceBytes of SLICES) {
    const speeds: number[] = [];
    for (let round = 0; round < ROUNDS; round++) {
      const ring = how === "ring" ? await UploadRing.create(gpu) : undefined;
      await gpu.idle();
      const starting = performance.now();
      for (let offset = 0; offset < TOTAL; offset += sliceBytes) {
        const slice = host.subarray(0, sliceBytes);
        if (ring) await ring.write(target, slice, offset);
        else upload(target, slice, offset);
      }
      ring?.flush();
      await gpu.idle();
      speeds.push(TOTAL / (performance.now() - starting) / 1e6);
      ring?.destroy();
    }
    const gbPerSecond = speeds.sort((a, b) => a - b)[ROUNDS >> 1]!;
    rows.push({ how, sliceBytes, gbPerSecond });
    console.log(`| ${how} | ${sliceBytes >> 20} MiB | ${gbPerSecond.toFixed(2)} |`);
  }
}
if (values.out) {
  const { name, driver } = gpu.caps;
  writeResult(values.out, { adapter: name, driver, ...provenance(values.commit), totalBytes: TOTAL, rows });
}
gpu.destroy();
