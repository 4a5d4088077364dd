/** A thread of `EncodingPool`: loads the tokenizer of the folder that it is given, then encodes what comes. */
import { parentPort, workerData } from "node:worker_threads";
import { LongformError } from "../runtime/errors.ts";
import {
  type EncodedText,
  encodeTimed,
  type EncodingReply,
  type EncodingRequest,
  type Failure,
} from "./encoding_pool.ts";
import { type GPT2Tokenizer, loadTokenizer } from "./tokenizer.ts";

function failureOf(error: unknown): Failure {
  const { name, message, stack } = error instanceof Error ? error : new Error(String(error));
  const { hint, detail } = error instanceof LongformError ? error : {};
  return { name, message, stack, hint, detail };
}

function encode(tokenizer: GPT2Tokenizer, { text, most }: EncodingRequest): EncodedText | Failure {
  try {
    return encodeTimed(tokenizer, text, most);
  } catch (error) {
    return failureOf(error);
  }
}

function reply(message: EncodingReply, transferred: ArrayBuffer[] = []): void {
  parentPort!.postMessage(message, transferred);
}

try {
  const tokenizer = await loadTokenizer(workerData as string);
  parentPort!.on("message", (requests: readonly EncodingRequest[]) => {
    const results = requests.map((request) => encode(tokenizer, request));
    reply(results, results.flatMap((result) => "ids" in result ? [result.ids.buffer] : []));
  });
  reply("ready");
} catch (error) {
  reply(failureOf(error));
}
