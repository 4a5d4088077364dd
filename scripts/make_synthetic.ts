/**
 * Writes a synthetic checkpoint (see src/model/synthetic.ts) as model.safetensors and config.json:
 *   bun scripts/make_synthetic.ts gpt2-medium weights/synthetic-medium --positions 65536
 * There is no tokenizer.json: give it prompts as token ids (`--ids`).
 */
import { mkdir, open, rename, writeFile } from "node:fs/promises";
import { join } from "node:path";
import process from "node:process";
import { parseArgs } from "node:util";
import {
  configFromSizes,
  configToJson,
  type GPT2Config,
  isPublishedShape,
  PUBLISHED_SHAPES,
} from "../src/model/config.ts";
import { encodeSafetensorsHeader } from "../src/model/safetensors.ts";
import { syntheticSource } from "../src/model/synthetic.ts";

const CHUNK_BYTES = 1 << 24;

async function writeCheckpoint(config: GPT2Config, dir: string): Promise<number> {
  await mkdir(dir, { recursive: true });
  const source = syntheticSource(config);
  const path = join(dir, "model.safetensors");
  const file = await open(`${path}.part`, "w");
  let written = 0;
  try {
    const put = async (bytes: Uint8Array) => {
      for (let done = 0; done < bytes.length;) {
        done += (await file.write(bytes, done, bytes.length - done, written + done)).bytesWritten;
      }
      written += bytes.length;
    };
    await put(encodeSafetensorsHeader(source.tensors.values(), { format: "pt" }));
    const chunk = new Uint8Array(CHUNK_BYTES);
    for (const { name, byteLength } of source.tensors.values()) {
      for (let offset = 0; offset < byteLength; offset += CHUNK_BYTES) {
        const part = chunk.subarray(0, Math.min(CHUNK_BYTES, byteLength - offset));
        await source.read(name, offset, part);
        await put(part);
      }
    }
  } finally {
    await file.close();
  }
  await rename(`${path}.part`, path);
  await writeFile(join(dir, "config.json"), JSON.stringify(configToJson(config), null, 2) + "\n");
  return written;
}

function requested(): { config: GPT2Config; dir: string } {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: { positions: { type: "string", default: "1024" } },
  });
  const [shape = "", dir = ""] = positionals;
  if (!isPublishedShape(shape) || dir === "") {
    throw new Error(`Not a shape and a folder: "${positionals.join(" ")}"`);
  }
  const nPositions = Number(values.positions);
  return { config: configFromSizes({ ...PUBLISHED_SHAPES[shape], nPositions }), dir };
}

try {
  const { config, dir } = requested();
  const bytes = await writeCheckpoint(config, dir);
  process.stderr.write(`wrote ${bytes} bytes to ${dir}\n`);
} catch (error) {
  const shapes = Object.keys(PUBLISHED_SHAPES).join("|");
  process.stderr.write(`error: ${error instanceof Error ? error.message : error}\n`);
  process.stderr.write(`usage: make_synthetic.ts ${shapes} DIR [--positions N]\n`);
  process.exitCode = 2;
}
