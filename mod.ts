/**
 * longform as a library: a GPT-2 checkpoint that is loaded once, and generates, scores and classifies on the GPU.
 *
 * ```ts
 * import { load } from "longform";
 *
 * const longform = await load({ uses: ["generate"] });
 * for await (const { text } of longform.generate("It was the best of times")) process.stdout.write(text);
 * await longform.close();
 * ```
 *
 * Errors are of the classes below, with a message for people and, where there is one, a `hint` what to do.
 *
 * @module
 */
import { type LoadOptions, Longform } from "./src/model/longform.ts";

export type { Classification, ClassifiedDocument, Outcome } from "./src/model/classification.ts";
export type { FinishReason } from "./src/model/generation.ts";
export type {
  ClassifyInput,
  ClassifyOptions,
  GeneratedPiece,
  GenerateOptions,
  LoadOptions,
  Longform,
  ScoreOptions,
  ScoreResult,
  Use,
} from "./src/model/longform.ts";
export {
  DeviceError,
  DoesNotFitError,
  InputError,
  LongformError,
  ModelError,
  NoAdapterError,
  UsageError,
} from "./src/runtime/errors.ts";

/**
 * Opens the device and loads a model, the embedded one when nothing is said.
 * @throws ModelError for a checkpoint that cannot be used, NoAdapterError, DoesNotFitError with the largest context that fits
 */
export function load(options: LoadOptions = {}): Promise<Longform> {
  return Longform.load(options);
}
