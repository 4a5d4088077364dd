/**
 * Compile and run time of the attention and matmul variants on a software adapter, f32, classics-16k's sizes, 1,024
 * tokens; the evidence for docs/decisions/0003.
 *
 *     MESA_SHADER_CACHE_DISABLE=true bun bench/software_variants.ts [--out FILE.json]
 *
 * llvmpipe compiles at the first dispatch, so that one (a single token) is the compile time.
 */
import { KV_BLOCK } from "../src/kernels/shared/shared.ts";
import { parseArgs } from "node:util";
import {
  type FlashAttentionProblem,
  subgroupAttention,
  tiledAttention,
} from "../src/kernels/flash_attention/flash_attention.ts";
import { type MatmulProblem, subgroupMatmul, tiledMatmul } from "../src/kernels/matmul/matmul.ts";
import { createBuffer, type GpuBuffer, upload } from "../src/runtime/buffers.ts";
import { openDevice } from "../src/runtime/device.ts";
import { type Op, op } from "../src/runtime/kernel.ts";
import { Recorder } from "../src/runtime/pass.ts";
import { provenance, writeResult } from "./provenance.ts";

const { values } = parseArgs({ options: { out: { type: "string" } } });
const TOKENS = 1024;
const [HEADS, HEAD_DIM, WIDTH, INNER] = [3, 64, 192, 768];

const gpu = await openDevice();
const subgroup = gpu.caps.subgroupMaxSize;

async function timed<P>(
  { kernel, variant }: Op<P>,
  problem: P,
  buffers: Record<string, GpuBuffer>,
): Promise<number> {
  const start = performance.now();
  const r = new Recorder(gpu, kernel.name);
  r.dispatch(kernel, variant, problem, buffers);
  r.submit();
  await gpu.idle();
  return performance.now() - start;
}

async function measure<P>(ops: readonly Op<P>[], small: P, large: P, flop: number) {
  const rows: { kernel: string; variant: object; compileMs: number; runMs: number; gflops: number }[] = [];
  for (const candidate of ops) {
    const { kernel, variant } = candidate;
    await gpu.pipelines.prepare(kernel, variant);
    const buffers = Object.fromEntries(
      Object.keys(kernel.bindings).map((name) => {
        const buffer = createBuffer(gpu, name, "staging", 4 * TOKENS * INNER);
        upload(buffer, Float32Array.from({ length: TOKENS * INNER }, (_, i) => Math.sin(i)));
        return [name, buffer];
      }),
    );
    const compileMs = await timed(candidate, small, buffers);
    const runs: number[] = [];
    for (let i = 0; i < 5; i++) runs.push(await timed(candidate, large, buffers));
    const runMs = runs.sort((a, b) => a - b)[2]!;
    rows.push({ kernel: kernel.name, variant, compileMs, runMs, gflops: flop / runMs / 1e6 });
    for (const buffer of Object.values(buffers)) buffer.destroy();
  }
  return rows;
}

const attention = { elem: "f32", heads: HEADS, headDim4: HEAD_DIM / 4 } as const;
const tiled = { ...attention, tileQ: 64, tileKv: 32, keys: 8 };
const attentionProblem = (qLen: number): FlashAttentionProblem => ({
  qLen,
  firstPosition: 0,
  blocks: TOKENS / KV_BLOCK,
  range: { first: 0, heads: HEADS },
  scale: 1 / 8,
});
const matmul = { elem: "f32", epilogue: "bias" } as const;
const tile = { ...matmul, tileRows: 64, tileColumns: 64, tileInner: 16, threadRows: 4 };
const matmulProblem = (rows: number): MatmulProblem => ({ rows, inner: WIDTH, columns: INNER });

const rows = [
  ...await measure(
    [
      op(tiledAttention, { ...tiled, tileKv: 16, keys: 4, unroll: true }),
      op(tiledAttention, { ...tiled, unroll: true }),
      op(tiledAttention, { ...tiled, unroll: false }),
      op(subgroupAttention, { ...attention, subgroup, unroll: false }),
    ],
    attentionProblem(1),
    attentionProblem(TOKENS),
    4 * HEADS * HEAD_DIM * TOKENS * (TOKENS + 1) / 2,
  ),
  ...await measure(
    [
      op(tiledMatmul, { ...tile, unroll: true }),
      op(tiledMatmul, { ...tile, unroll: false }),
      op(subgroupMatmul, { ...matmul, subgroup, tileRows: 4 * subgroup, unroll: false }),
    ],
    matmulProblem(2),
    matmulProblem(TOKENS),
    2 * TOKENS * WIDTH * INNER,
  ),
];
for (const { kernel, variant, compileMs, runMs, gflops } of rows) {
  const unroll = "unroll" in variant ? variant.unroll : "";
  console.log(
    `| ${kernel} | ${unroll} | ${(compileMs / 1000).toFixed(1)} s | ${runMs.toFixed(0)} ms | ${
      gflops.toFixed(1)
    } |`,
  );
}
if (values.out) {
  const { name, driver } = gpu.caps;
  writeResult(values.out, { adapter: name, driver, ...provenance(undefined), rows });
}
gpu.destroy();
