// scores[h, i, j] = q[i]·k[j] · scale, the first of three steps: every score is written to memory. Tiles in which no key
// is visible are left out, here and in the other steps; the mask within a tile is the softmax's.
//
// One workgroup a (tile of TILE keys, tile of TILE queries, head); a lane computes four scores of four rows.
@group(0) @binding(0) var<storage, read> qkv: array<vec4<elem>>;            // [tokens, 3, HEADS, HEAD_DIM4]
@group(0) @binding(1) var<storage, read> k: array<vec4<elem>>;              // [cached heads, blocks, KV_BLOCK, HEAD_DIM4]
@group(0) @binding(2) var<storage, read> block_table: array<u32>;           // [blocks]
@group(0) @binding(3) var<storage, read_write> scores: array<vec4<elem>>;   // [heads here, tokens, tokens4]

const STRIDE4 = TILE_INNER4 + 1u;   // odd, so that neighbouring rows are in different banks
const TILE4 = TILE / 4u;

var<workgroup> q_tile: array<vec4f, TILE * STRIDE4>;
var<workgroup> k_tile: array<vec4f, TILE * STRIDE4>;    // key 4c + j is row TILE4·j + c: neighbours read neighbours

fn product(a: vec4f, b: vec4f) -> f32 {
    return fma(a.x, b.x, fma(a.y, b.y, fma(a.z, b.z, a.w * b.w)));
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) workgroup: vec3u, @builtin(local_invocation_index) lane: u32) {
    let first_key = workgroup.x * TILE;
    let first_query = workgroup.y * TILE;
    if (first_key > first_query) { return; }
    let head = params.first_head + workgroup.z;
    let tile = kv_row(params.first_cached + workgroup.z, first_key);    // a tile is within a block
    let column4 = lane % TILE4;
    let thread_row = lane / TILE4 * THREAD_ROWS;
    var s: array<vec4f, THREAD_ROWS>;

    for (var first = 0u; first < HEAD_DIM4; first += TILE_INNER4) {
        for (var i = lane; i < TILE * TILE_INNER4; i += LANES) {
            let row = i / TILE_INNER4;
            let d = i % TILE_INNER4;
            var query = vec4f(0.0);
            var key = vec4f(0.0);
            if (first + d < HEAD_DIM4) {
                if (first_query + row < params.tokens) {
                    query = vec4f(qkv[(3u * (first_query + row) * HEADS + head) * HEAD_DIM4 + first + d]);
                }
                if (first_key + row < params.tokens) { key = vec4f(k[(tile + row) * HEAD_DIM4 + first + d]); }
            }
            q_tile[row * STRIDE4 + d] = query;
            k_tile[(row % 4u * TILE4 + row / 4u) * STRIDE4 + d] = key;
        }
        workgroupBarrier();
        for (var d = 0u; d < trips(TILE_INNER4); d++) {
            let k0 = k_tile[column4 * STRIDE4 + d];
            let k1 = k_tile[(column4 + TILE4) * STRIDE4 + d];
            let k2 = k_tile[(column4 + 2u * TILE4) * STRIDE4 + d];
            let k3 = k_tile[(column4 + 3u * TILE4) * STRIDE4 + d];
            for (var r = 0u; r < trips(THREAD_ROWS); r++) {
                let a = q_tile[(thread_row + r) * STRIDE4 + d];
                s[r] += vec4f(product(a, k0), product(a, k1), product(a, k2), product(a, k3));
            }
        }
        workgroupBarrier();
    }

    let c4 = first_key / 4u + column4;
    if (c4 >= params.tokens4) { return; }
    for (var r = 0u; r < trips(THREAD_ROWS); r++) {
        let query = first_query + thread_row + r;
        if (query < params.tokens) {
            scores[(workgroup.z * params.tokens + query) * params.tokens4 + c4] = vec4<elem>(s[r] * params.scale);
        }
    }
}
