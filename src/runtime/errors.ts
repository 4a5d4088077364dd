import { printableMessage } from "./printable.ts";

/**
 * Every failure a user can cause or meet is one of these classes: the message is one sentence that says what is
 * wrong and where, `hint` says what to do, `detail` is for whoever looks into it, and `exitCode` is the process status
 * that scripts rely on.
 */
export class LongformError extends Error {
  /** Process exit status: 1 the work failed, 2 wrong command line, 3 no adapter, 4 does not fit. */
  readonly exitCode: number = 1;
  readonly hint: string | undefined;
  /** Any number of lines that only `-v` shows. */
  readonly detail: string | undefined;

  constructor(message: string, options: { hint?: string; detail?: string; cause?: unknown } = {}) {
    // Both may name what a hostile file holds.
    super(printableMessage(message), options.cause === undefined ? undefined : { cause: options.cause });
    this.name = new.target.name;
    this.hint = options.hint === undefined ? undefined : printableMessage(options.hint);
    this.detail = options.detail;
  }
}

/** The command line is wrong: an unknown flag, a value out of range, arguments that contradict each other. */
export class UsageError extends LongformError {
  override readonly exitCode = 2;
}

/** There is no adapter that can run the request: no Vulkan driver, or none that matches `--adapter`. */
export class NoAdapterError extends LongformError {
  override readonly exitCode = 3;
}

/** The request needs more memory, a larger buffer or binding, or larger kernels than the device allows. */
export class DoesNotFitError extends LongformError {
  override readonly exitCode = 4;
}

/** A model folder, checkpoint, config or tokenizer that is missing, damaged or not GPT-2. */
export class ModelError extends LongformError {}

/** The Hugging Face Hub cannot be reached, refuses, or sends what it should not. */
export class HubError extends LongformError {}

/** A prompt or an input file that cannot be used. */
export class InputError extends LongformError {}

/** A result that cannot be written: a full disk, a device that fails. */
export class OutputError extends LongformError {}

/** A shader that does not compile; the message points at the `.wgsl` file and line, `detail` is the header before it. */
export class ShaderError extends LongformError {}

/** The device was lost, ran out of memory, or reported an error that no call returned. */
export class DeviceError extends LongformError {}
