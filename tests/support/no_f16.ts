/** A module to preload: no adapter has the f16 feature, as on older GPUs. */
import { hideFeature } from "./hide_feature.ts";

hideFeature("shader-f16");
