@group(0) @binding(5) var<storage, read> segments: array<vec4u>;             // [q_len], see walk_segments.wgsl
