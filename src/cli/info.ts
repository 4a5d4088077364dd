/** `info`: the adapters of this machine, what they can do, and which kernels would run. */
import { type Choice, explainChoices } from "../kernels/index.ts";
import { type GPT2Config, readConfig } from "../model/config.ts";
import { kernelShape, largestContext } from "../model/memory_plan.ts";
import { formatBytes } from "../runtime/buffers.ts";
import { type Capabilities, listAdapters } from "../runtime/device.ts";
import { LongformError } from "../runtime/errors.ts";
import { describeSubgroups } from "../runtime/kernel.ts";
import { chooseElem, modelFolder, openCommandDevice } from "./load.ts";
import type { InfoOptions } from "./options.ts";
import { writeJson, writeNote, writeResult } from "./output.ts";
import { runtimeName, VERSION } from "./version.ts";

/** What `--json` prints. */
interface InfoReport {
  readonly version: string;
  readonly runtime: string;
  readonly adapters: readonly Capabilities[];
  /** The adapter that a run with the same flags takes; null when there is none. */
  readonly chosen: Capabilities | null;
  /** Why none was chosen, and what to do. */
  readonly problem: { readonly message: string; readonly hint: string | null } | null;
  readonly model: string;
  readonly dtype: string | null;
  /** Most tokens whose keys fit a binding, or the model's positions if that is less. */
  readonly largest_context: number | null;
  readonly kernels: readonly Choice[];
}

/** Runs the command. @returns 0, or 3 when there is no adapter to run on */
export async function runInfo(options: InfoOptions): Promise<number> {
  const model = modelFolder(options);
  const config = await readConfig(model);
  const report = await collect(options, model, config);
  if (options.json) writeJson(report);
  else {
    writeResult(formatInfo(report));
    if (report.problem) {
      writeNote(`error: ${report.problem.message}`);
      if (report.problem.hint) writeNote(`\nhint: ${report.problem.hint}`);
    }
  }
  return report.chosen ? 0 : 3;
}

async function collect(options: InfoOptions, model: string, config: GPT2Config): Promise<InfoReport> {
  const common = { version: VERSION, runtime: runtimeName(), adapters: await listAdapters(), model };
  try {
    const gpu = await openCommandDevice(options);
    const { caps } = gpu;
    gpu.destroy();
    const elem = chooseElem(options.dtype, caps);
    return {
      ...common,
      chosen: caps,
      problem: null,
      dtype: elem,
      largest_context: Math.min(config.nPositions, largestContext(config, elem, caps)),
      kernels: explainChoices(kernelShape(config, elem, caps), caps),
    };
  } catch (error) {
    if (!(error instanceof LongformError)) throw error;
    const problem = { message: error.message, hint: error.hint ?? null };
    return { ...common, chosen: null, problem, dtype: null, largest_context: null, kernels: [] };
  }
}

function formatInfo(report: InfoReport): string {
  const lines = [`longform ${report.version} on ${report.runtime}`, "", "adapters"];
  report.adapters.forEach((adapter, i) => {
    const kind = adapter.isSoftware ? "CPU" : "GPU";
    lines.push(`  ${i}  ${adapter.name} (${kind}; ${adapter.driver})`);
  });
  if (report.adapters.length === 0) lines.push("  none");
  const caps = report.chosen;
  if (caps) {
    lines.push(
      "",
      `a run takes ${caps.name}`,
      `  f16 ${yesNo(caps.f16)}, timestamps ${yesNo(caps.timestamps)}, matrix units ${
        yesNo(caps.subgroupMatrix)
      }, ` +
        `subgroups ${describeSubgroups(caps)}`,
      `  buffers up to ${formatBytes(caps.maxBufferBytes)}, bindings up to ${
        formatBytes(caps.maxBindingBytes)
      }, ` +
        `workgroup memory ${formatBytes(caps.workgroupBytes)}, ${caps.workgroupInvocations} invocations`,
      "",
      `kernels for ${report.model} in ${report.dtype}, context up to ${report.largest_context} tokens`,
      formatChoices(report.kernels),
    );
  }
  return lines.join("\n") + "\n";
}

function yesNo(value: boolean): string {
  return value ? "yes" : "no";
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
