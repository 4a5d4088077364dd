/** `info`: the adapters of this machine, what they can do, and which kernels would run. */
import { type Choice, explainChoices } from "../kernels/index.ts";
import { type GPT2Config, readConfig } from "../model/config.ts";
import { kernelShape, largestContext } from "../model/memory_plan.ts";
import { chooseElem } from "../model/run_settings.ts";
import { formatBytes } from "../runtime/buffers.ts";
import { type Capabilities, listAdapters } from "../runtime/device.ts";
import { LongformError } from "../runtime/errors.ts";
import { adviceFor, describeSubgroups, type Elem } from "../runtime/kernel.ts";
import { modelFolder, openCommandDevice } from "./load.ts";
import type { InfoOptions } from "./options.ts";
import { writeJson, writeNote, writeResult } from "./output.ts";
import { formatChoices } from "./report.ts";
import { runtimeName, VERSION } from "./version.ts";

/** What `--json` prints. */
interface InfoReport {
  readonly version: string;
  readonly runtime: string;
  readonly adapters: readonly Capabilities[];
  /** The adapter that a run with the same flags takes; null when there is none, or it cannot be opened. */
  readonly chosen: Capabilities | null;
  /** Why such a run would not start, and what to do. */
  readonly problem: { readonly message: string; readonly hint: string | null } | null;
  readonly model: string;
  readonly dtype: string | null;
  /** Most tokens whose keys fit a binding, or the model's positions if that is less. */
  readonly largest_context: number | null;
  readonly kernels: readonly Choice[];
}

/** What a model runs with on an adapter, and what keeps it from running. */
type RunPlan = Pick<InfoReport, "problem" | "dtype" | "largest_context" | "kernels"> & {
  readonly exitCode: number;
};

/** Runs the command. @returns 0 when a run with the same flags would start; 3 without an adapter, else 1 */
export async function runInfo(options: InfoOptions): Promise<number> {
  const model = modelFolder(options);
  const config = await readConfig(model);
  const { exitCode, ...report } = await collect(options, model, config);
  if (options.json) writeJson(report);
  else {
    writeResult(formatInfo(report));
    if (report.problem) {
      writeNote(`error: ${report.problem.message}`);
      if (report.problem.hint) writeNote(`\nhint: ${report.problem.hint}`);
    }
  }
  return exitCode;
}

async function collect(
  options: InfoOptions,
  model: string,
  config: GPT2Config,
): Promise<InfoReport & { readonly exitCode: number }> {
  const common = { version: VERSION, runtime: runtimeName(), adapters: await listAdapters(), model };
  let chosen: Capabilities | null = null;
  try {
    const gpu = await openCommandDevice(options);
    chosen = gpu.caps;
    gpu.destroy();
    return { ...common, chosen, ...planRun(config, chooseElem(options.dtype, chosen), chosen, options) };
  } catch (error) {
    if (!(error instanceof LongformError)) throw error;
    const { message, hint = null, exitCode } = error;
    const nothing = { dtype: null, largest_context: null, kernels: [] };
    return { ...common, chosen, problem: { message, hint }, ...nothing, exitCode };
  }
}

function planRun(
  config: GPT2Config,
  elem: Elem,
  caps: Capabilities,
  options: Pick<InfoOptions, "kernels">,
): RunPlan {
  const kernels = explainChoices(kernelShape(config, elem, caps), caps, options.kernels);
  const missing = kernels.filter(({ chosen }) => !chosen);
  const problem = missing.length === 0 ? null : {
    message: `No kernel for this model runs on ${caps.name}: nothing for ${
      missing.map(({ role }) => role).join(", ")
    }`,
    hint: adviceFor(missing.flatMap(({ rejected }) => rejected.map(({ reason }) => reason))),
  };
  return {
    exitCode: problem ? 4 : 0, // as the run itself would end
    problem,
    dtype: elem,
    largest_context: Math.min(config.nPositions, largestContext(config, { elem }, caps)),
    kernels,
  };
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
    );
  }
  if (report.kernels.length > 0) {
    lines.push(
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
