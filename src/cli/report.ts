/** What every command reports of a run: times, memory, the profile. */
import type { Choice } from "../kernels/index.ts";
import { patternName } from "../kvcache/patterns.ts";
import { sparsityDensity } from "../kvcache/sparsity.ts";
import type { Gpt2 } from "../model/gpt2.ts";
import type { Gpu } from "../runtime/device.ts";

/** Milliseconds, and tokens a second; null where a part does not apply. */
export interface Timings {
  readonly load_ms: number;
  readonly tokenize_ms: number | null;
  /** From the start of the process. */
  readonly first_token_ms: number | null;
  readonly prefill_ms: number;
  readonly prefill_tokens_per_s: number | null;
  readonly decode_ms: number | null;
  readonly decode_tokens_per_s: number | null;
}

/** Bytes of GPU buffers, counted when they are allocated. */
export interface Memory {
  readonly peak_bytes: number;
  readonly weights_bytes: number;
  readonly kv_bytes: number;
  readonly activations_bytes: number;
  readonly bytes_per_token: number;
  /** What the plan said that the run would take. */
  readonly planned_bytes: number;
}

export function memoryReport(gpu: Gpu, model: Gpt2): Memory {
  return {
    peak_bytes: gpu.memory.peakBytes,
    weights_bytes: gpu.memory.bytes("weights"),
    kv_bytes: gpu.memory.bytes("kv"),
    activations_bytes: gpu.memory.bytes("activations"),
    bytes_per_token: model.plan.bytesPerToken,
    planned_bytes: model.plan.totalBytes,
  };
}

/** What `--json` says of block-sparse attention. */
export interface SparsityReport {
  readonly pattern: string;
  /** Kept blocks as a share of the causal ones, over the planned context; of `topk` for its last token. */
  readonly density: number;
}

/** Undefined for dense attention. */
export function sparsityReport({ sparsity, plan }: Gpt2): SparsityReport | undefined {
  if (sparsity.pattern.kind === "dense") return undefined;
  const { shape, sequenceBlocks } = plan.kv;
  return {
    pattern: patternName(sparsity.pattern),
    density: sparsityDensity(sparsity, shape, sequenceBlocks),
  };
}

/** One line a role with the variant that runs, then a line for each better one that cannot. */
export function formatChoices(choices: readonly Choice[]): string {
  const show = ({ kernel, variant }: { kernel: string; variant: object }) => {
    const settings = Object.entries(variant).map(([name, value]) => `${name} ${String(value)}`);
    return `${kernel} (${settings.join(", ")})`;
  };
  return choices.flatMap(({ role, chosen, rejected }) => [
    `  ${role.padEnd(20)} ${chosen ? show(chosen) : "nothing runs here"}`,
    ...rejected.map((candidate) => `    not ${show(candidate)}: ${candidate.reason}`),
  ]).join("\n");
}
