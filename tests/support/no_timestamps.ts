/** A module to preload: no adapter has timestamp queries, as on some phones and in some browsers' engines. */
import { hideFeature } from "./hide_feature.ts";

hideFeature("timestamp-query");
