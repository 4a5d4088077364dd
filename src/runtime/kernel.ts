/**
 * What a kernel is: WGSL text, its bindings and parameters, and pure functions from a variant (what changes the text)
 * and a problem (sizes known only at run time) to the header, the limits it needs and the grid.
 */
import { allocateUnbound, createUnbound, type GpuBuffer, upload } from "./buffers.ts";
import type { Capabilities, Gpu } from "./device.ts";
import { IMMEDIATE_BYTES } from "./device.ts";
import { DoesNotFitError, ShaderError } from "./errors.ts";
import type { ArithmeticUnit } from "./profiler.ts";
import { timed } from "./timeline.ts";

/** How tensors are stored; all arithmetic is in f32 whichever it is. */
export type Elem = "f16" | "f32";

/** Bytes of one stored element. */
export function sizeOf(elem: Elem): number {
  return elem === "f16" ? 2 : 4;
}

/** One `.wgsl` file: its name is what compile errors point at. */
export interface ShaderFile {
  readonly file: string;
  readonly text: string;
}

/** The declarations put in front of a kernel's body; their text is the pipeline's cache key. */
export interface ShaderHeader {
  /** Storage types by the alias the body uses: `alias elem = f16;`. */
  readonly aliases: Readonly<Record<string, Elem>>;
  /** Lanes of a subgroup where the body uses subgroup operations; the device's must be exactly that many. */
  readonly subgroup?: number;
  /** The body multiplies 16×16 matrices of f16 into f32 on tensor cores, with subgroups of 32 lanes. */
  readonly subgroupMatrix?: boolean;
  /** Unsigned compile-time constants: `const TILE_Q = 64u;`. */
  readonly consts: Readonly<Record<string, number>>;
}

export type Grid = readonly [x: number, y: number, z: number];

/**
 * What no implementation of a dispatch can do without: the floor under its time, which `--profile` compares it with.
 * Rows count as they are stored, with the columns that pad them to a multiple of four; what pads tiles does not.
 */
export interface Work {
  /**
   * Bytes of device memory: of each tensor what the result depends on, read once, and the result, written once; what
   * is added to in place is read and written. Left out is what only says which rows are meant, and how many: block
   * tables and lists, segments, ids, lengths.
   */
  readonly bytes: number;
  /**
   * Floating-point operations in the sums of products of matrices and attention, a multiplication and an addition
   * being two. Left out is what is done to each element that is read: norms, exponentials, activations, sums of rows
   * and of slices.
   */
  readonly flops: number;
}

/**
 * A kernel with variants `V` and problems `P`. Bindings and parameters are listed once, here: the layout, the WGSL
 * `Params` struct and the order of the host's values all come from these lists.
 */
export interface Kernel<V, P> {
  /** Family and variant, as in the folder and file: `matmul/tiled`. */
  readonly name: string;
  readonly sources: readonly ShaderFile[];
  /** Storage buffers in binding order, as the body declares them. */
  readonly bindings: Readonly<Record<string, "read" | "read_write">>;
  /** Fields of `params`, at most sixteen. */
  readonly params: Readonly<Record<string, "u32" | "f32">>;
  /**
   * Where `params` is. Immediates, the default, are handed over with every dispatch; a uniform buffer is part of the bind
   * group, for kernels that run over and over with the same parameters: the host then has one call less to make.
   */
  readonly paramsIn?: "immediates" | "uniform";
  header(v: V): ShaderHeader;
  /** Bytes of workgroup memory the variant declares. */
  workgroupBytes(v: V): number;
  /** Invocations of one workgroup. */
  workgroupInvocations(v: V): number;
  values(v: V, p: P): Readonly<Record<string, number>>;
  grid(v: V, p: P): Grid;
  /**
   * @param lengths where the GPU keeps them: tokens of each sequence, with those that the dispatch adds; none where
   * nobody knows them, and then what depends on them does not count
   */
  work(v: V, p: P, lengths: readonly number[]): Work;
}

const NEEDS_F16 = "needs the shader-f16 feature";

/**
 * Says whether a variant runs on a device, or why not, in words for `info` and `-v`.
 * Workgroup memory is checked here because over-committing it loses the device on some drivers instead of failing.
 */
export function supports<V, P>(kernel: Kernel<V, P>, v: V, caps: Capabilities): true | string {
  if (Object.values(kernel.header(v).aliases).includes("f16") && !caps.f16) return NEEDS_F16;
  if (kernel.header(v).subgroupMatrix && !caps.subgroupMatrix) {
    return "needs subgroup matrices of 16x16, f16 into f32, and subgroups of 32 lanes";
  }
  const lanes = kernel.header(v).subgroup;
  if (lanes !== undefined && (caps.subgroupMinSize !== lanes || caps.subgroupMaxSize !== lanes)) {
    return `needs subgroups of ${lanes} lanes, the device has ${describeSubgroups(caps)}`;
  }
  const bytes = kernel.workgroupBytes(v);
  if (bytes > caps.workgroupBytes) {
    return `needs ${bytes} B of workgroup memory, the device has ${caps.workgroupBytes} B`;
  }
  const invocations = kernel.workgroupInvocations(v);
  if (invocations > caps.workgroupInvocations) {
    return `needs ${invocations} invocations a workgroup, the device allows ${caps.workgroupInvocations}`;
  }
  return true;
}

/** `none`, `32 lanes`, `8 to 32 lanes`. */
export function describeSubgroups(caps: Capabilities): string {
  const { subgroupMinSize, subgroupMaxSize } = caps;
  if (subgroupMaxSize === 0) return "none";
  return subgroupMinSize === subgroupMaxSize
    ? `${subgroupMaxSize} lanes`
    : `${subgroupMinSize} to ${subgroupMaxSize} lanes`;
}

/** A kernel with one of its variants: what a dispatch runs. The variant's type is the kernel's business. */
export interface Op<P> {
  // deno-lint-ignore no-explicit-any
  readonly kernel: Kernel<any, P>;
  readonly variant: object;
}

/** Pairs kernel and variant, checked to belong together. */
export function op<V extends object, P>(kernel: Kernel<V, P>, variant: V): Op<P> {
  return { kernel, variant };
}

/** The candidates without those that repeat an earlier one: small models make different choices come out the same. */
export function distinct<P>(candidates: readonly Op<P>[]): Op<P>[] {
  const known = new Set<string>();
  return candidates.filter(({ kernel, variant }) => {
    const key = `${kernel.name} ${JSON.stringify(variant)}`;
    return !known.has(key) && known.add(key);
  });
}

/** What may help where no candidate runs, from why each of them does not. */
export function adviceFor(reasons: readonly string[]): string {
  const isF16 = reasons.length > 0 && reasons.every((reason) => reason === NEEDS_F16);
  return isF16
    ? "use `--dtype f32`, or another `--adapter`"
    : "the model's heads or rows are too large for it: choose another `--adapter`, `info` lists them";
}

/**
 * The first candidate that the device supports.
 * @throws DoesNotFitError with the reason of each when it supports none
 */
export function firstSupported<P>(candidates: readonly Op<P>[], caps: Capabilities): Op<P> {
  const verdicts: string[] = [];
  for (const candidate of candidates) {
    const verdict = supports(candidate.kernel, candidate.variant, caps);
    if (verdict === true) return candidate;
    verdicts.push(verdict);
  }
  const reasons = candidates.map(({ kernel }, i) => `${kernel.name} ${verdicts[i]}`);
  throw new DoesNotFitError(
    `No kernel for this model runs on ${caps.name}: ` +
      ([...new Set(reasons)].join("; ") || "there is no variant for this shape"),
    { hint: adviceFor(verdicts) },
  );
}

/** Renders the header: WGSL in front of the body, complete in itself and readable in a log. */
export function renderHeader<V, P>(kernel: Kernel<V, P>, v: V): string {
  const { aliases, consts, subgroup, subgroupMatrix } = kernel.header(v);
  const lines: string[] = [];
  if (Object.values(aliases).includes("f16")) lines.push("enable f16;");
  if (subgroup !== undefined || subgroupMatrix) lines.push("enable subgroups;");
  if (subgroupMatrix) lines.push("enable chromium_experimental_subgroup_matrix;");
  const isUniform = kernel.paramsIn === "uniform";
  if (!isUniform) lines.push("requires immediate_address_space;");
  if (subgroup !== undefined) lines.push(`const SUBGROUP = ${subgroup}u;`);
  for (const [name, elem] of Object.entries(aliases)) lines.push(`alias ${name} = ${elem};`);
  for (const [name, value] of Object.entries(consts)) lines.push(`const ${name} = ${value}u;`);
  const fields = Object.entries(kernel.params).map(([name, type]) => `${name}: ${type}`);
  const place = isUniform
    ? `@group(0) @binding(${Object.keys(kernel.bindings).length}) var<uniform>`
    : "var<immediate>";
  lines.push(`struct Params { ${fields.join(", ")} }`, `${place} params: Params;`);
  return lines.join("\n") + "\n";
}

/** A compiled variant. */
export interface Pipeline {
  /** Short, unlike the header: part of every bind group's key. */
  readonly id: number;
  /** Names in binding order, and parameters in the order of the `Params` struct. */
  readonly bindings: readonly string[];
  readonly params: readonly (readonly [name: string, type: "u32" | "f32"])[];
  readonly paramsIn: "immediates" | "uniform";
  readonly unit: ArithmeticUnit;
  readonly handle: GPUComputePipeline;
  readonly layout: GPUBindGroupLayout;
}

/** Compiled pipelines by `name` and header, and the bind groups made for them. */
export class PipelineCache {
  readonly #gpu: Gpu;
  readonly #compiling = new Map<string, Promise<Pipeline>>();
  readonly #ready = new Map<string, Pipeline>();
  /** Pipelines by the kernel and variant objects: rendering the key takes longer than recording a dispatch. */
  readonly #byObjects = new WeakMap<object, WeakMap<object, Pipeline>>();
  readonly #bindGroups = new Map<string, GPUBindGroup>();
  readonly #parameters: ParameterSlots;

  constructor(gpu: Gpu) {
    this.#gpu = gpu;
    this.#parameters = new ParameterSlots(() => createParameters(gpu, parametersBytes(BUFFER_SLOTS)));
  }

  /** Starts compiling a variant, unless it was started before. */
  prepare<V, P>(kernel: Kernel<V, P>, v: V): Promise<Pipeline> {
    const key = `${kernel.name}\n${renderHeader(kernel, v)}`;
    let compiling = this.#compiling.get(key);
    if (!compiling) {
      const id = this.#compiling.size;
      compiling = timed(this.#gpu.timeline, "compilation", kernel.name, async () => {
        const pipeline = await compile(this.#gpu, kernel, v, id);
        this.#ready.set(key, pipeline);
        return pipeline;
      });
      // The caller of `prepare` may await it much later, when the weights are loaded.
      compiling.catch(() => {});
      this.#compiling.set(key, compiling);
    }
    return compiling;
  }

  /** A pipeline whose `prepare` has resolved. */
  get<V extends object, P>(kernel: Kernel<V, P>, v: V): Pipeline {
    let byVariant = this.#byObjects.get(kernel);
    if (!byVariant) this.#byObjects.set(kernel, byVariant = new WeakMap());
    const known = byVariant.get(v);
    if (known) return known;
    const pipeline = this.#ready.get(`${kernel.name}\n${renderHeader(kernel, v)}`);
    if (!pipeline) throw new Error(`${kernel.name} was dispatched before it was compiled`);
    byVariant.set(v, pipeline);
    return pipeline;
  }

  /**
   * The bind group of these buffers, in binding order, and of the parameters if it holds them; made once.
   * @param slots where those are; in buffers of the cache's own when left out, which live as long as the device
   */
  bindGroup(
    pipeline: Pipeline,
    buffers: readonly { readonly id: number; readonly handle: GPUBuffer }[],
    params: Uint32Array<ArrayBuffer>,
    slots = this.#parameters,
  ) {
    const slot = pipeline.paramsIn === "uniform" ? slots.of(params) : undefined;
    let key = `${pipeline.id}`;
    for (const { id } of buffers) key += `,${id}`;
    if (slot) key += `;${slot.key}`;
    let group = this.#bindGroups.get(key);
    if (!group) {
      group = this.#gpu.device.createBindGroup({
        label: pipeline.handle.label,
        layout: pipeline.layout,
        entries: [
          ...buffers.map(({ handle }) => ({ buffer: handle })),
          ...(slot ? [slot.resource] : []),
        ].map((resource, binding) => ({ binding, resource })),
      });
      this.#bindGroups.set(key, group);
    }
    return group;
  }

  /** Drops all bind groups: they keep the buffers they were made for alive. */
  forgetBindGroups(): void {
    this.#bindGroups.clear();
  }
}

/** Bytes of a slot: what the offset of a uniform binding must be a multiple of on every device. */
const SLOT_BYTES = 256;
/** Slots of a buffer for dispatches that belong to no list. */
const BUFFER_SLOTS = 64;

/** Bytes of a buffer for this many different sets of parameters. */
export function parametersBytes(sets: number): number {
  return SLOT_BYTES * sets;
}

/** Creates a buffer for parameters, as `createUnbound` does. */
export function createParameters(gpu: Gpu, byteLength: number): GpuBuffer {
  return createUnbound(gpu, "parameters", "staging", byteLength, parametersUsage());
}

/** The same, but waits for the memory. @throws OutOfMemoryError when it is used up */
export async function allocateParameters(gpu: Gpu, byteLength: number): Promise<GpuBuffer> {
  return await allocateUnbound(gpu, "parameters", "staging", byteLength, parametersUsage());
}

function parametersUsage(): GPUBufferUsageFlags {
  return GPUBufferUsage.UNIFORM | GPUBufferUsage.COPY_DST;
}

/** Where a set of parameters is. */
interface ParameterSlot {
  /** Different for every slot of every buffer. */
  readonly key: string;
  readonly resource: GPUBufferBinding;
}

/** Parameters in uniform buffers, each set of values once. */
export class ParameterSlots {
  readonly #next: () => GpuBuffer;
  readonly #slots = new Map<string, ParameterSlot>();
  #buffer: GpuBuffer | undefined;
  #used = 0;

  /** @param next gives a buffer when the one before is full */
  constructor(next: () => GpuBuffer) {
    this.#next = next;
  }

  of(params: Uint32Array<ArrayBuffer>): ParameterSlot {
    const values = params.join();
    let slot = this.#slots.get(values);
    if (!slot) {
      if (!this.#buffer || SLOT_BYTES * this.#used === this.#buffer.byteLength) {
        this.#buffer = this.#next();
        this.#used = 0;
      }
      const offset = SLOT_BYTES * this.#used++;
      upload(this.#buffer, params, offset);
      const { id, handle } = this.#buffer;
      slot = { key: `${id}+${offset}`, resource: { buffer: handle, offset, size: SLOT_BYTES } };
      this.#slots.set(values, slot);
    }
    return slot;
  }
}

async function compile<V, P>(gpu: Gpu, kernel: Kernel<V, P>, v: V, id: number): Promise<Pipeline> {
  const { device } = gpu;
  const label = kernel.name;
  const paramBytes = 4 * Object.keys(kernel.params).length;
  if (paramBytes > IMMEDIATE_BYTES) {
    throw new Error(`${label} has more than ${IMMEDIATE_BYTES / 4} parameters`);
  }
  const header = renderHeader(kernel, v);
  const detail = `header of ${label}:\n${header.trimEnd()}`;
  device.pushErrorScope("validation");
  const module = device.createShaderModule({
    label,
    code: header + kernel.sources.map((s) => s.text).join(""),
  });
  const scope = device.popErrorScope();
  const isUniform = kernel.paramsIn === "uniform";
  const types = Object.values(kernel.bindings).map((access) =>
    access === "read" ? "read-only-storage" as const : "storage" as const
  );
  const layout = device.createBindGroupLayout({
    label,
    entries: [...types, ...(isUniform ? ["uniform" as const] : [])].map((type, binding) => ({
      binding,
      visibility: GPUShaderStage.COMPUTE,
      buffer: { type },
    })),
  });
  const descriptor: GPUPipelineLayoutDescriptor & { immediateSize: number } = {
    label,
    bindGroupLayouts: [layout],
    immediateSize: isUniform ? 0 : paramBytes,
  };
  const pipeline = device.createComputePipelineAsync({
    label,
    layout: device.createPipelineLayout(descriptor),
    compute: { module, entryPoint: "main" },
  });
  pipeline.catch(() => {});
  const moduleError = await gpu.wait(scope);
  if (moduleError) {
    const { messages } = await gpu.wait(module.getCompilationInfo());
    const problem = locateMessages(kernel, header, messages) || moduleError.message;
    throw new ShaderError(`${problem} (in the kernel ${label})`, { detail });
  }
  try {
    return {
      id,
      bindings: Object.keys(kernel.bindings),
      params: Object.entries(kernel.params),
      paramsIn: kernel.paramsIn ?? "immediates",
      unit: kernel.header(v).subgroupMatrix ? "matrix" : "fma",
      handle: await gpu.wait(pipeline),
      layout,
    };
  } catch (error) {
    gpu.check();
    throw new ShaderError(`${label} does not compile on ${gpu.caps.name}: ${String(error)}`, {
      detail,
      cause: error,
    });
  }
}

/** Turns positions in the joined text into positions in the `.wgsl` files. */
function locateMessages<V, P>(
  kernel: Kernel<V, P>,
  header: string,
  messages: Iterable<{ type: string; lineNum: number; linePos: number; message: string }>,
): string {
  const lines: string[] = [];
  for (const { type, lineNum, linePos, message } of messages) {
    if (type !== "error") continue;
    let line = lineNum - header.split("\n").length + 1;
    let file = "header";
    if (line <= 0) line = lineNum;
    else {
      for (const source of kernel.sources) {
        const length = source.text.split("\n").length - 1;
        file = source.file;
        // The end of the text is past the last line.
        if (line <= length || source === kernel.sources.at(-1)) break;
        line -= length;
      }
    }
    lines.push(`${file}:${line}:${linePos} ${message}`);
  }
  return lines.join("; ");
}
