// The same tensors as in bindings.wgsl, eight f16 a vector: matrices are loaded from any element type.
@group(0) @binding(0) var<storage, read> qkv: array<vec4u>;                  // [q_len, 3, HEADS, HEAD_DIM8]
@group(0) @binding(1) var<storage, read> k: array<vec4u>;                    // [heads here, blocks, KV_BLOCK, HEAD_DIM8]
@group(0) @binding(2) var<storage, read> v: array<vec4u>;                    // [heads here, blocks, KV_BLOCK, HEAD_DIM8]
@group(0) @binding(3) var<storage, read> block_table: array<u32>;            // [blocks]
@group(0) @binding(4) var<storage, read_write> out: array<vec4u>;            // [q_len, HEADS, HEAD_DIM8]

// A score no real one reaches, and finite: the difference of two masked scores is 0, not NaN.
const MASKED = -3.0e38;
