// x[t] = wte[ids[t]] + wpe[first_position + t]: one workgroup a token.
// Tables too large for one binding come in pieces of whole rows; a dispatch writes the tokens for which both of its
// pieces hold the row, so over all pairs of pieces each token is written exactly once.
@group(0) @binding(0) var<storage, read> ids: array<u32>;              // [tokens]
@group(0) @binding(1) var<storage, read> wte: array<vec4<elem>>;       // [wte_rows, WIDTH4], from row wte_first
@group(0) @binding(2) var<storage, read> wpe: array<vec4<elem>>;       // [wpe_rows, WIDTH4], from row wpe_first
@group(0) @binding(3) var<storage, read_write> x: array<vec4f>;        // [tokens, WIDTH4]

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) workgroup: vec3u, @builtin(local_invocation_index) lane: u32) {
    let t = folded_row(workgroup);
    if (t >= params.tokens) { return; }
    // Unsigned: a row before the piece wraps around to a number no piece reaches.
    let wte_row = ids[t] - params.wte_first;
    let wpe_row = params.first_position + t - params.wpe_first;
    if (wte_row >= params.wte_rows || wpe_row >= params.wpe_rows) { return; }
    for (var i = lane; i < WIDTH4; i += 64u) {
        x[t * WIDTH4 + i] = vec4f(wte[wte_row * WIDTH4 + i]) + vec4f(wpe[wpe_row * WIDTH4 + i]);
    }
}
