// Copies the keys and values of new tokens from the packed QKV rows into the cache: one workgroup a token.
@group(0) @binding(0) var<storage, read> qkv: array<vec4<elem>>;             // [tokens, 3, HEADS, HEAD_DIM4]
@group(0) @binding(1) var<storage, read> block_table: array<u32>;            // [blocks]
@group(0) @binding(2) var<storage, read_write> k: array<vec4<elem>>;         // [range_heads, blocks, KV_BLOCK, HEAD_DIM4]
@group(0) @binding(3) var<storage, read_write> v: array<vec4<elem>>;         // [range_heads, blocks, KV_BLOCK, HEAD_DIM4]

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) workgroup: vec3u, @builtin(local_invocation_index) lane: u32) {
    let t = folded_row(workgroup);
    if (t >= params.tokens) { return; }
    for (var i = lane; i < params.range_heads * HEAD_DIM4; i += 64u) {
        let head = i / HEAD_DIM4;
        let to = kv_row(head, params.first_position + t) * HEAD_DIM4 + i % HEAD_DIM4;
        let row = 3u * t * HEADS + params.first_head;
        k[to] = qkv[(row + HEADS) * HEAD_DIM4 + i];
        v[to] = qkv[(row + 2u * HEADS) * HEAD_DIM4 + i];
    }
}
