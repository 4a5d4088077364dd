// Copies the keys and values of new tokens from the packed QKV rows into the cache: one workgroup a token.
@group(0) @binding(0) var<storage, read> qkv: array<vec4<elem>>;             // [tokens, 3, HEADS, HEAD_DIM4]
@group(0) @binding(1) var<storage, read_write> k: array<vec4<elem>>;         // [HEADS, capacity, HEAD_DIM4]
@group(0) @binding(2) var<storage, read_write> v: array<vec4<elem>>;         // [HEADS, capacity, HEAD_DIM4]

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) workgroup: vec3u, @builtin(local_invocation_index) lane: u32) {
    let t = folded_row(workgroup);
    if (t >= params.tokens) { return; }
    for (var i = lane; i < HEADS * HEAD_DIM4; i += 64u) {
        let head = i / HEAD_DIM4;
        let to = (head * params.capacity + params.first_position + t) * HEAD_DIM4 + i % HEAD_DIM4;
        k[to] = qkv[(3u * t + 1u) * HEADS * HEAD_DIM4 + i];
        v[to] = qkv[(3u * t + 2u) * HEADS * HEAD_DIM4 + i];
    }
}
