/**
 * longform, as its library is used, in the peers' place (see peer.ts for the command line):
 *
 *     bun bench/peers/longform.ts --model DIR --contexts 1k,4k --out FILE.json
 *
 * `longform bench` would time a number of decoded tokens of its own choice, and `generate` one prompt in a
 * process that has just started; peers are timed when they are warm.
 */
import { VERSION } from "../../src/cli/version.ts";
import { load } from "../../mod.ts";
import { type Engine, type PeerOptions, runPeer } from "./peer.ts";

async function openLongform({ model, dtype, contexts }: PeerOptions): Promise<Engine> {
  if (model === undefined) {
    throw new Error("longform loads folders: scripts/make_synthetic.ts writes one of a published shape");
  }
  const starting = performance.now();
  const longform = await load({ model, dtype, uses: ["generate"], context: Math.max(...contexts) });
  const loadMs = performance.now() - starting;
  return {
    device: longform.gpu.caps.name,
    loadMs,
    async *generate(prompt, maxTokens) {
      for await (const { id } of longform.generate(prompt, { temperature: 0, maxTokens, ignoreEos: true })) {
        if (id !== undefined) yield id;
      }
    },
    close: () => longform.close(),
  };
}

await runPeer({ peer: "longform", provider: "webgpu", version: () => VERSION }, {}, openLongform);
