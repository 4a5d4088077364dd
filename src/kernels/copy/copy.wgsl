// out = source: each invocation moves one vector.
@group(0) @binding(0) var<storage, read> source: array<vec4u>;
@group(0) @binding(1) var<storage, read_write> out: array<vec4u>;

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) workgroup: vec3u, @builtin(local_invocation_index) lane: u32) {
    let i = folded_row(workgroup) * LANES + lane;
    if (i < params.vectors) { out[i] = source[i]; }
}
