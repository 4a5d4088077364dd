/**
 * Writes docs/longform.1, the manual page, from the commands and options that the program parses:
 *   bun scripts/man.ts
 * Read it with `man -l docs/longform.1`. Macros are those of man(7), which groff and mandoc know.
 */
import { writeFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { COMMANDS, COMMON, namesOf, type OptionSpec } from "../src/cli/options.ts";
import { VERSION } from "../src/cli/version.ts";

/** When the version came out, or the page was last looked through. */
const DATE = "2026-11-23";

const SUMMARY = "generate from, score and classify long texts with GPT-2 on the GPU";

const DESCRIPTION = [
  "longform runs GPT-2 checkpoints over texts of tens of thousands of tokens on any GPU with a Vulkan driver, " +
  "without a window or a browser. Attention is computed in tiles (FlashAttention) or over a pattern of blocks, so " +
  "memory grows linearly with the text. Without a GPU it runs on the CPU, through Mesa's software Vulkan.",
  "Results go to standard output and nothing else does; progress, timings and notices go to standard error. There " +
  "are no colours. `-` names standard input, and what follows `--` is no option. Numbers of tokens may be written " +
  "as `16k`, which is 16,384.",
];

/** Variables that the program or its launcher reads. */
export const ENVIRONMENT: readonly (readonly [names: readonly string[], meaning: string])[] = [
  [
    ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"],
    "The token that pull shows to the Hugging Face Hub; without it, what `hf auth login` has stored.",
  ],
  [["HF_TOKEN_PATH"], "The file with the stored token (default: token in HF_HOME)."],
  [["HF_HUB_DISABLE_IMPLICIT_TOKEN"], "Set to 1, no token is shown."],
  [["HF_ENDPOINT"], "The address of a mirror in place of https://huggingface.co."],
  [["HF_HUB_OFFLINE"], "Set to 1, pull asks no server and takes what is cached."],
  [["HF_HOME"], "Hugging Face's folder (default: huggingface in XDG_CACHE_HOME)."],
  [["XDG_CACHE_HOME"], "The user's cache (default: ~/.cache); drivers keep compiled shaders there, too."],
  [
    ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"],
    "Where downloads are kept and models are looked up, as Python's tools do (default: hub in HF_HOME).",
  ],
  [
    ["SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_STEP", "SLURM_ARRAY_TASK_COUNT"],
    "Which part of the documents `classify --shard auto` takes, in a SLURM job array.",
  ],
  [["JOB_COMPLETION_INDEX"], "The same with `--shard auto/N`, in a Kubernetes indexed job."],
  [["LONGFORM_RUNTIME"], "For the launcher ./longform: bun (the default) or deno."],
  [
    ["VK_DRIVER_FILES", "VK_ICD_FILENAMES", "VK_ADD_DRIVER_FILES"],
    "Manifests of the Vulkan drivers to load, in place of the system's or besides them. The loader reads them; " +
    "info names them where they leave out the driver of a GPU.",
  ],
  [
    ["XDG_CONFIG_HOME", "XDG_CONFIG_DIRS", "XDG_DATA_HOME", "XDG_DATA_DIRS", "LD_LIBRARY_PATH"],
    "Where the loader looks for manifests and libraries, and info after it.",
  ],
  [
    ["NVIDIA_DRIVER_CAPABILITIES"],
    "Which parts of NVIDIA's driver a container has been given; Vulkan needs graphics, or all.",
  ],
  [
    [
      "MESA_SHADER_CACHE_DIR",
      "MESA_SHADER_CACHE_DISABLE",
      "__GL_SHADER_DISK_CACHE",
      "__GL_SHADER_DISK_CACHE_PATH",
    ],
    "Where the driver keeps compiled shaders, which make the second start faster; info shows it.",
  ],
];

const FILES: readonly (readonly [path: string, meaning: string])[] = [
  ["weights/classics-16k", "The embedded model, which runs where --model names none."],
  [
    "config.json, tokenizer.json, model.safetensors",
    "What a model's folder holds; in place of the last there may be model.safetensors.index.json and its shards.",
  ],
  [
    "~/.cache/huggingface/hub",
    "What pull has downloaded, shared with Python's tools; a checkout's weights/ has links.",
  ],
  [
    ".longform-*.tmp",
    "A result that is being written, beside the place that it is moved to once it is complete.",
  ],
];

const EXIT_STATUS: readonly (readonly [status: string, meaning: string])[] = [
  ["0", "Done."],
  [
    "1",
    "The work failed: a bad file, a device error; or some of many documents or prompts could not be used.",
  ],
  ["2", "The command line is wrong; nothing was begun."],
  ["3", "No GPU adapter can be used."],
  ["4", "It does not fit: memory or a limit of the device. The message names the largest context that does."],
  ["130", "Interrupted (SIGINT), with what there was printed; 143 by SIGTERM, 129 by SIGHUP."],
];

/** Options of which several commands take the same, with those commands. */
function sharedOptions(): Map<OptionSpec, string[]> {
  const takers = new Map<OptionSpec, string[]>();
  for (const [name, { options }] of Object.entries(COMMANDS)) {
    for (const spec of options) takers.set(spec, [...takers.get(spec) ?? [], name]);
  }
  return new Map([...takers].filter(([, names]) => names.length > 1));
}

/** Text as roff shows it: hyphens to be copied, no request at the start of a line, `code` in bold. */
function roff(text: string): string {
  const escaped = text.replaceAll("\\", "\\e").replaceAll("-", "\\-").replaceAll("'", "\\(aq")
    .replaceAll('"', "\\(dq").replaceAll("^", "\\(ha").replaceAll("~", "\\(ti");
  return escaped.replace(/`([^`]+)`/g, "\\fB$1\\fR").replace(/^\./, "\\&.");
}

function bold(text: string): string {
  return `\\fB${roff(text)}\\fR`;
}

/** Entries as `.TP` has them: a term, then what it means. */
function list(entries: Iterable<readonly [term: string, meaning: string]>): string[] {
  return [...entries].flatMap(([term, meaning]) => [".TP", term, meaning]);
}

function example(commandLine: string): string[] {
  return [".IP", ".EX", roff(commandLine), ".EE"];
}

function option(spec: OptionSpec, takers: readonly string[]): string[] {
  const value = /<(.+)>/.exec(spec.flags)?.[1];
  const names = namesOf(spec).map(bold).join(", ");
  const who = takers.length === 0 ? "" : ` (${takers.join(", ")})`;
  const term = value === undefined ? names : `${names} \\fI${roff(value)}\\fR`;
  return [...list([[term, `${roff(spec.description)}.${who}`]]), ...example(spec.example)];
}

function section(title: string, lines: Iterable<string>): string[] {
  return [`.SH ${title}`, ...lines];
}

function subsection(title: string, lines: readonly string[]): string[] {
  return lines.length === 0 ? [] : [`.SS ${title}`, ...lines];
}

/** The whole page. */
export function manPage(): string {
  const commands = Object.entries(COMMANDS);
  const shared = sharedOptions();
  const own = commands.flatMap(([name, { options }]) => {
    const specs: readonly OptionSpec[] = options;
    return subsection(
      `Options of ${name}`,
      specs.filter((spec) => !shared.has(spec)).flatMap((spec) => option(spec, [])),
    );
  });
  const lines = [
    `.\\" Written by scripts/man.ts: change that, or the options in src/cli/options.ts.`,
    `.TH LONGFORM 1 "${DATE}" "longform ${VERSION}" "User Commands"`,
    ...section("NAME", [`longform \\- ${roff(SUMMARY)}`]),
    ...section("SYNOPSIS", [
      `.B longform`,
      `.I command`,
      `[options] [arguments]`,
      ".br",
      `.B longform`,
      `.I command`,
      `.B \\-\\-help`,
    ]),
    ...section("DESCRIPTION", DESCRIPTION.flatMap((text) => [".PP", roff(text)]).slice(1)),
    ...section(
      "COMMANDS",
      list(commands.map(([, { usage, description }]) => [bold(usage), `${roff(description)}.`])),
    ),
    ...section("OPTIONS", [
      ...subsection("Options of every command", [
        ...COMMON.flatMap((spec) => option(spec, [])),
        ...list([
          [
            bold("-h") + ", " + bold("--help"),
            roff("Show the options of the command, or the commands; as `longform help` and its name do."),
          ],
          [bold("--version"), "Show the version and the runtime; without a command."],
        ]),
      ]),
      ...subsection(
        "Options of several commands",
        [...shared].flatMap(([spec, takers]) => option(spec, takers)),
      ),
      ...own,
    ]),
    ...section(
      "ENVIRONMENT",
      list(ENVIRONMENT.map(([names, meaning]) => [names.map(bold).join(", "), roff(meaning)])),
    ),
    ...section("FILES", list(FILES.map(([path, meaning]) => [`\\fI${roff(path)}\\fR`, roff(meaning)]))),
    ...section("EXIT STATUS", list(EXIT_STATUS.map(([status, meaning]) => [bold(status), roff(meaning)]))),
    ...section(
      "EXAMPLES",
      commands.flatMap(([, { examples }]) => examples).flatMap((text) => [".PP", ".EX", roff(text), ".EE"])
        .slice(1),
    ),
    ...section("SEE ALSO", [
      roff(
        "docs/troubleshooting.md explains every error, docs/long_context.md contexts beyond the model's " +
          "positions, docs/sparsity.md block-sparse attention, docs/classification.md and docs/scaling.md many " +
          "documents.",
      ),
      ".PP",
      `${bold("nvidia-smi")}(1), ${bold("vulkaninfo")}(1), ${bold("iconv")}(1)`,
    ]),
  ];
  return lines.join("\n") + "\n";
}

if (import.meta.main) {
  writeFileSync(fileURLToPath(new URL("../docs/longform.1", import.meta.url).href), manPage());
}
