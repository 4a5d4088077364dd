import { afterAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { type Environment, isInShard, parseShard } from "../../src/cli/shard.ts";
import { UsageError } from "../../src/runtime/errors.ts";
import { temporaryFolder } from "../support/checkpoint.ts";
import { deno, denoTest, RUN_TIMEOUT_MS } from "../support/cli.ts";

setDefaultTimeout(RUN_TIMEOUT_MS);

const folder = temporaryFolder();
afterAll(folder.remove);

/** The environment of a task of `--array=MIN-…`. */
function slurm(id: number, min: number, count: number, step?: number): Environment {
  return {
    SLURM_ARRAY_TASK_ID: String(id),
    SLURM_ARRAY_TASK_MIN: String(min),
    SLURM_ARRAY_TASK_COUNT: String(count),
    ...step === undefined ? {} : { SLURM_ARRAY_TASK_STEP: String(step) },
  };
}

function refusal(value: string, env: Environment = {}): UsageError {
  try {
    parseShard(value, env);
  } catch (error) {
    expect(error).toBeInstanceOf(UsageError);
    expect((error as UsageError).hint).toBeString();
    return error as UsageError;
  }
  throw new Error(`${value} was not refused`);
}

describe("parseShard", () => {
  test("counts I from 1", () => {
    expect(parseShard("1/4")).toEqual({ index: 0, count: 4 });
    expect(parseShard("4/4")).toEqual({ index: 3, count: 4 });
    expect(parseShard("1/1")).toEqual({ index: 0, count: 1 });
    expect(parseShard("03/16")).toEqual({ index: 2, count: 16 });
    expect(parseShard("1000000/1000000")).toEqual({ index: 999_999, count: 1_000_000 });
  });

  test("refuses what is no shard", () => {
    const cases: readonly (readonly [value: string, message: string])[] = [
      ["0/4", "`--shard 0/4` is out of range: the shards are numbered from 1 to 4"],
      ["5/4", "`--shard 5/4` is out of range: the shards are numbered from 1 to 4"],
      ["0/0", "`--shard 0/0` is out of range: there is at least one shard"],
      ["auto/0", "`--shard auto/0` is out of range: there is at least one shard"],
      ["1/99999999999999999999", "`--shard 1/99999999999999999999` is out of range"],
      ...[
        "",
        "3",
        "/4",
        "1/",
        "-1/4",
        "1/-4",
        "1.5/4",
        "1/4/2",
        " 1/4",
        "a/4",
        "1e0/4",
        "AUTO",
        "auto/",
        "auto/x",
      ]
        .map((value) => [value, `\`--shard ${value}\` is neither I/N, auto nor auto/N`] as const),
    ];
    for (const [value, message] of cases) expect(refusal(value, slurm(1, 1, 4)).message).toStartWith(message);
  });

  test("takes the place of a task in a SLURM job array", () => {
    for (const value of ["auto", "auto/4"]) {
      for (const [min, step] of [[0, 1], [1, 1], [7, 1], [10, 10], [0, 3]]) {
        for (let i = 0; i < 4; i++) {
          expect(parseShard(value, slurm(min! + i * step!, min!, 4, step))).toEqual({ index: i, count: 4 });
        }
      }
      expect(parseShard(value, slurm(3, 1, 4))).toEqual({ index: 2, count: 4 });
    }
    const { SLURM_ARRAY_TASK_COUNT: _, ...uncounted } = slurm(3, 1, 4);
    expect(parseShard("auto/4", uncounted)).toEqual({ index: 2, count: 4 });
  });

  test("takes the index of a pod in a Kubernetes indexed job, where there is no SLURM", () => {
    expect(parseShard("auto/8", { JOB_COMPLETION_INDEX: "0" })).toEqual({ index: 0, count: 8 });
    expect(parseShard("auto/8", { JOB_COMPLETION_INDEX: "7" })).toEqual({ index: 7, count: 8 });
    expect(parseShard("auto/4", { ...slurm(2, 1, 4), JOB_COMPLETION_INDEX: "3" })).toEqual({
      index: 1,
      count: 4,
    });
    expect(parseShard("auto/8", { JOB_COMPLETION_INDEX: "2", SLURM_ARRAY_TASK_ID: "" }).index).toBe(2);
    expect(refusal("auto", { JOB_COMPLETION_INDEX: "0" })).toMatchObject({
      message: "`--shard auto` cannot tell how many shards there are: Kubernetes does not say",
      hint: "give the job's completions, such as `--shard auto/8`",
    });
    expect(refusal("auto/8", { JOB_COMPLETION_INDEX: "8" }).message).toBe(
      "`--shard auto/8` finds no shard for this task: JOB_COMPLETION_INDEX gives the index 8 of 8",
    );
  });

  test("says which variable is missing or wrong", () => {
    expect(refusal("auto").message).toBe(
      "`--shard auto` finds no job array: SLURM_ARRAY_TASK_ID is not set",
    );
    expect(refusal("auto/4").message).toBe(
      "`--shard auto/4` finds no job array: neither SLURM_ARRAY_TASK_ID nor JOB_COMPLETION_INDEX is set",
    );
    for (const name of ["SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_COUNT"]) {
      expect(refusal("auto", { ...slurm(1, 1, 4), [name]: undefined }).message).toContain(
        `${name} is not set`,
      );
    }
    for (const name of Object.keys(slurm(1, 1, 4, 1))) {
      for (const wrong of ["x", "-1", "1.5", "4294967294 ", "99999999999999999999"]) {
        expect(refusal("auto", { ...slurm(1, 1, 4, 1), [name]: wrong }).message).toContain(
          `${name}: "${wrong}" is not a whole number`,
        );
      }
    }
  });

  test("refuses tasks that no shard would belong to", () => {
    // --array=1,3,7: the third of three.
    expect(refusal("auto", slurm(7, 1, 3)).message).toBe(
      "`--shard auto` finds no shard for this task: SLURM_ARRAY_TASK_ID gives the index 6 of 3",
    );
    for (const env of [slurm(1, 2, 3), slurm(4, 1, 4, 2), slurm(1, 1, 0), slurm(1, 1, 4, 0)]) {
      expect(refusal("auto", env).message).toContain("finds no shard for this task");
    }
    // --array=7 alone, after the others of 16 have succeeded: it would take the first shard.
    expect(refusal("auto/16", slurm(7, 7, 1))).toMatchObject({
      message: "`--shard auto/16` asks for 16 shards, the job array has 1 tasks",
      hint: "give a part that is run again by hand, as `--shard I/N`",
    });
  });

  denoTest("on deno: a variable that may not be read counts as not set", async () => {
    const script = join(folder.path, "shard.ts");
    writeFileSync(
      script,
      `import { parseShard } from ${JSON.stringify(join(import.meta.dir, "../../src/cli/shard.ts"))};
      try {
        console.log(JSON.stringify(parseShard("auto/4")));
      } catch (error) {
        console.log(error.name);
      }`,
    );
    const run = async (...permissions: string[]) => {
      const child = Bun.spawn([deno!, "run", "-q", "--no-prompt", "--allow-read", ...permissions, script], {
        env: { ...process.env, ...slurm(3, 1, 4), JOB_COMPLETION_INDEX: "1" },
        stderr: "inherit",
      });
      return (await new Response(child.stdout).text()).trim();
    };
    expect(
      await Promise.all([
        run(),
        run("--allow-env=JOB_COMPLETION_INDEX"),
        run(`--allow-env=${Object.keys(slurm(1, 1, 1, 1))}`),
      ]),
    ).toEqual(["UsageError", '{"index":1,"count":4}', '{"index":2,"count":4}']);
  });
});

describe("isInShard", () => {
  test("gives every document to exactly one shard, in turn", () => {
    for (const count of [1, 2, 3, 7]) {
      for (let document = 0; document < 20; document++) {
        const takers = Array.from({ length: count }, (_, index) => ({ index, count }))
          .filter((shard) => isInShard(shard, document));
        expect(takers).toEqual([{ index: document % count, count }]);
      }
    }
    expect(isInShard(undefined, 5)).toBe(true);
  });
});
