import { afterAll, describe, expect, test } from "bun:test";
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { Worker } from "node:worker_threads";
import { defaultEncodingWorkers, EncodingPool } from "../../src/model/encoding_pool.ts";
import { philox4x32 } from "../../src/model/sampling.ts";
import { encodeUpTo, loadTokenizer } from "../../src/model/tokenizer.ts";
import { InputError, LongformError, ModelError } from "../../src/runtime/errors.ts";
import { deno, denoTest } from "../support/cli.ts";

const ROOT = join(import.meta.dir, "../..");
const modelDir = join(ROOT, "weights/classics-16k");
const tokenizer = await loadTokenizer(modelDir);
const tmp = mkdtempSync(join(tmpdir(), "encoding-pool-"));
afterAll(() => rmSync(tmp, { recursive: true }));

/** A folder whose tokenizer knows the letters a and b and the space, and no other bytes. */
const smallDir = join(tmp, "small");
mkdirSync(smallDir);
writeFileSync(
  join(smallDir, "tokenizer.json"),
  JSON.stringify({
    added_tokens: [],
    pre_tokenizer: { type: "ByteLevel", add_prefix_space: false },
    model: { type: "BPE", vocab: { a: 0, b: 1, Ġ: 2 }, merges: [] },
  }),
);

const FRAGMENTS = [
  ...[
    "It was",
    " the best",
    " of times",
    ",\r\n",
    "  ",
    "\t",
    "1859",
    " naïve",
    "東京",
    "👩‍👧",
    "\ud83d",
    "\ude00",
    "\0",
  ],
  ...["<|endoftext|>", "\u0085", "\u3000", "\ufeff", " don't", "x".repeat(100)],
];

/** Some are empty, some have thousands of tokens. */
function randomTexts(seed: number, count: number): { readonly text: string; readonly most: number }[] {
  let calls = 0;
  const pick = (n: number) => philox4x32([calls++, 0, 0, 0], [seed, 0])[0]! % n;
  return Array.from({ length: count }, (_, i) => {
    const fragments = pick(i % 10 === 0 ? 5000 : 100);
    return {
      text: Array.from({ length: fragments }, () => FRAGMENTS[pick(FRAGMENTS.length)]!).join(""),
      most: pick(3) === 0 ? Infinity : pick(200),
    };
  });
}

async function withPool<T>(
  workers: number,
  use: (pool: EncodingPool) => Promise<T>,
  dir = modelDir,
): Promise<T> {
  const pool = await EncodingPool.open(dir, workers);
  try {
    return await use(pool);
  } finally {
    await pool.close();
  }
}

function rejection(promise: Promise<unknown>): Promise<unknown> {
  return promise.then(() => undefined, (error: unknown) => error);
}

describe("EncodingPool", () => {
  for (const workers of [0, 1, 3]) {
    test(`gives each of 200 texts its ids: ${workers} threads`, async () => {
      await withPool(workers, async (pool) => {
        expect(pool.workers).toBe(workers);
        const texts = randomTexts(workers, 200);
        const all = await Promise.all(texts.map(({ text, most }) => pool.encode(text, most)));
        all.forEach(({ encodeMs, ...first }, i) => {
          const { text, most } = texts[i]!;
          expect({ i, ...first }).toEqual({ i, ...encodeUpTo(tokenizer, text, most) });
          expect(encodeMs).toBeGreaterThanOrEqual(0);
        });
      });
    });
  }

  test("lets a short text overtake a long one", async () => {
    await withPool(2, async (pool) => {
      const order: string[] = [];
      // One thread has both texts until the other has loaded its tokenizer.
      for (let round = 0; order[0] !== "short" && round < 100; round++) {
        order.length = 0;
        const newWords = Array.from({ length: 5000 }, (_, i) => `word${round}of${i} `).join("");
        await Promise.all([
          pool.encode(newWords, Infinity).then(() => order.push("long")),
          pool.encode("short", Infinity).then(() => order.push("short")),
        ]);
      }
      expect(order).toEqual(["short", "long"]);
    });
  }, 20_000);

  test("takes texts again when it has had nothing to do", async () => {
    await withPool(2, async (pool) => {
      for (let round = 0; round < 3; round++) {
        await Bun.sleep(20);
        expect((await pool.encode("It was", 5)).ids).toEqual(Uint32Array.from(tokenizer.encode("It was")));
      }
    });
  });

  for (const workers of [0, 2]) {
    test(`a text that the vocabulary cannot spell fails alone: ${workers} threads`, async () => {
      await withPool(workers, async (pool) => {
        const texts = Array.from({ length: 40 }, (_, i) => i % 7 === 3 ? "a c" : "ab a");
        const results = await Promise.all(texts.map((text) => pool.encode(text, 9).catch((error) => error)));
        const small = await loadTokenizer(smallDir);
        const expected = await rejection(Promise.try(() => small.encode("c"))) as InputError;
        expect(expected.hint).toBeString();
        results.forEach((result, i) => {
          if (i % 7 !== 3) return expect(result.ids).toEqual(Uint32Array.of(0, 1, 2, 0));
          expect(result).toBeInstanceOf(InputError);
          const { name, message, hint, detail } = result as InputError;
          expect({ name, message, hint, detail }).toEqual({
            name: "InputError",
            message: expected.message,
            hint: expected.hint,
            detail: undefined,
          });
        });
      }, smallDir);
    });

    test(`a folder without a tokenizer is a ModelError when the pool is opened: ${workers} threads`, async () => {
      const error = await rejection(EncodingPool.open(tmp, workers));
      expect(error).toBeInstanceOf(ModelError);
      expect(String(error)).toContain(`No tokenizer.json in ${tmp}`);
      expect((error as ModelError).hint).toContain("a model folder holds");
    });

    test(`a closed pool takes no texts: ${workers} threads`, async () => {
      const pool = await EncodingPool.open(modelDir, workers);
      await pool.close();
      await pool.close();
      expect(String(await rejection(pool.encode("a", 1)))).toContain("is closed");
    });
  }

  test("what is no failure of ours keeps its name and its stack", async () => {
    await withPool(1, async (pool) => {
      const error = await rejection(pool.encode("a", 1n as unknown as number)) as Error;
      expect(error.name).toBe("TypeError");
      expect(error.stack).toContain("tokenizer.ts");
      expect((await pool.encode("a", 1)).ids.length).toBe(1);
    });
  });

  test("closing rejects what is under way and what waits", async () => {
    const pool = await EncodingPool.open(modelDir, 2);
    const texts = randomTexts(5, 100).map(({ text }) => pool.encode(`${text} `.repeat(100), Infinity));
    const rejected = Promise.all(texts.map(rejection));
    await pool.close();
    for (const error of await rejected) expect(String(error)).toContain("is closed");
  });

  test("a thread that ends by itself ends the pool", async () => {
    const { postMessage } = Worker.prototype;
    const posted = new Set<Worker>();
    Worker.prototype.postMessage = function (...args: Parameters<typeof postMessage>) {
      posted.add(this);
      return postMessage.apply(this, args);
    };
    try {
      const pool = await EncodingPool.open(modelDir, 2);
      const texts = Array.from(
        { length: 50 },
        (_, i) => pool.encode(`${i} new words `.repeat(10_000), Infinity),
      );
      const results = Promise.all(texts.map(rejection));
      await [...posted][0]!.terminate();
      const errors = await results;
      expect(errors.at(-1)).toBeInstanceOf(LongformError);
      expect(await rejection(pool.encode("a", 1))).toBe(errors.at(-1));
      expect(String(errors.at(-1))).toContain("A thread that encodes text has ended");
      await pool.close();
    } finally {
      Worker.prototype.postMessage = postMessage;
    }
  });
});

describe("the process", () => {
  /** Encodes on two threads as on none, with no closing, and with the last text under way at the end of the module. */
  const script = join(tmp, "unclosed.ts");
  writeFileSync(
    script,
    `import { EncodingPool } from ${JSON.stringify(join(ROOT, "src/model/encoding_pool.ts"))};
    const texts = ${JSON.stringify(randomTexts(9, 200).map(({ text }) => text))};
    const encode = async (workers) => {
      const pool = await EncodingPool.open(${JSON.stringify(modelDir)}, workers);
      const all = await Promise.all(texts.map((text) => pool.encode(text, 300)));
      return { pool, ids: JSON.stringify(all.map(({ ids, truncated }) => [[...ids], truncated])) };
    };
    const { pool, ids } = await encode(2);
    console.log((await encode(0)).ids === ids);
    const failed = await EncodingPool.open("/nowhere", 1).catch((error) => error);
    console.log(failed.name, failed.hint !== undefined);
    const closed = await EncodingPool.open(${JSON.stringify(modelDir)}, 1);
    const rejected = closed.encode(texts.join(" new "), Infinity).catch((error) => error.message);
    await closed.close();
    console.log(await rejected);
    pool.encode("the last", 9).then(() => console.log("done"));`,
  );

  async function run(command: readonly string[]): Promise<void> {
    const child = Bun.spawn([...command, script], { stdout: "pipe", stderr: "pipe", timeout: 20_000 });
    const [stdout, stderr] = await Promise.all([
      new Response(child.stdout).text(),
      new Response(child.stderr).text(),
    ]);
    expect({ stdout, stderr, code: await child.exited }).toEqual({
      stdout: "true\nModelError true\nThe encoding pool is closed\ndone\n",
      stderr: "",
      code: 0,
    });
  }

  test(
    "waits for a text, and ends without the pool's being closed: Bun",
    () => run([process.execPath]),
    30_000,
  );

  denoTest(
    "waits for a text, and ends without the pool's being closed: Deno",
    () => run([deno!, "run", "-q", "-P", "--config", join(ROOT, "deno.json")]),
  );
});

test("a machine with few cores gets no threads, and none gets many", () => {
  const threads = [1, 2, 3, 4, 5, 6, 8, 16, 128].map(defaultEncodingWorkers);
  expect(threads).toEqual([0, 0, 0, 2, 2, 3, 4, 8, 8]);
});
