// Tiles of tokens go along x and, past GRID_FOLD of them, along z; rows of x go along y.
fn folded_tile(workgroup: vec3u) -> u32 {
    return workgroup.x + workgroup.z * GRID_FOLD;
}

// A head too large for one binding comes in pieces of whole rows.
@group(0) @binding(0) var<storage, read> x: array<vec4f>;                    // [rows, inner4]
@group(0) @binding(1) var<storage, read> w: array<vec4<elem>>;               // [piece_rows, inner4], from token first_token
@group(0) @binding(2) var<storage, read_write> logits: array<f32>;           // [rows, vocab]
