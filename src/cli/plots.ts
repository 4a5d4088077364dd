/** Vega-Lite specifications to SVG, without a browser: what the pages of `bench --report` and bench/plots draw with. */
import { LongformError } from "../runtime/errors.ts";

export type Json = string | number | boolean | null | readonly Json[] | JsonObject;
export interface JsonObject {
  readonly [key: string]: Json;
}

/** Of marks and the texts beside them: all are dark enough to be read on white. */
export const COLOURS = [
  "#0072b2",
  "#c14e00",
  "#00795a",
  "#a04585",
  "#7a6200",
  "#3c3c3c",
  "#5a4fcf",
  "#217ba3",
  "#a1182f",
  "#5d7f00",
];

/** The SVG of a Vega-Lite specification, which brings its own background and `config`. */
export type Draw = (spec: JsonObject) => Promise<string>;

/**
 * Loads what draws. That takes half a second, so nothing that does not draw shall wait for it.
 * @throws LongformError where the packages are not installed
 */
export async function loadPlots(): Promise<Draw> {
  const [vega, vegaLite] = await Promise.all([import("vega"), import("vega-lite")]).catch((error) => {
    throw new LongformError("Cannot load the packages that draw, vega and vega-lite", {
      hint: "run `bun install` in longform's folder",
      cause: error,
    });
  });
  return async (spec) => {
    try {
      // The package's type spells out every property that there is; specifications here are plain JSON.
      const { spec: compiled } = vegaLite.compile(spec as unknown as Parameters<typeof vegaLite.compile>[0]);
      return await new vega.View(vega.parse(compiled), { renderer: "none" }).toSVG();
    } catch (error) {
      // A recorded result may call something "constructor", which Vega takes for a property of every object.
      throw new LongformError("Vega cannot draw these results", {
        hint: "look for unusual names and numbers in them, or use `longform bench compare`",
        cause: error,
      });
    }
  };
}

/** 4096 is 4K, 1500 is 1,500. */
export function formatTokens(tokens: number): string {
  return tokens > 0 && tokens % 1024 === 0 ? `${tokens / 1024}K` : tokens.toLocaleString("en-US");
}
