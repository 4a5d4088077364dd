// out[i] = Σ_j p[i, j] v[j], the last step: the product of matmul/tiled.wgsl over the keys that a tile of queries sees.
// One workgroup a (tile of TILE queries, 64 columns, head); a lane computes four rows of four columns.
@group(0) @binding(0) var<storage, read> scores: array<vec4<elem>>;         // [heads here, tokens, tokens4]: probabilities
@group(0) @binding(1) var<storage, read> v: array<vec4<elem>>;              // [cached heads, blocks, KV_BLOCK, HEAD_DIM4]
@group(0) @binding(2) var<storage, read> block_table: array<u32>;           // [blocks]
@group(0) @binding(3) var<storage, read_write> out: array<vec4<elem>>;      // [tokens, HEADS, HEAD_DIM4]

const TILE_KV = 4u * TILE_INNER4;
const TILE4 = TILE / 4u;

var<workgroup> p_tile: array<vec4f, TILE * TILE_INNER4>;        // [TILE, TILE_INNER4]
var<workgroup> v_tile: array<vec4f, TILE_KV * TILE4>;           // [TILE_KV, TILE4]

@compute @workgroup_size(LANES)
fn main(
    @builtin(workgroup_id) workgroup: vec3u,
    @builtin(num_workgroups) grid: vec3u,
    @builtin(local_invocation_index) lane: u32,
) {
    // Late tiles attend to the most keys: started first, they do not run alone at the end.
    let first_query = (grid.x - 1u - workgroup.x) * TILE;
    let first_column4 = workgroup.y * TILE4;
    let head = params.first_head + workgroup.z;
    let kv_end = min(first_query + TILE, params.tokens);
    let column4 = lane % TILE4;
    let thread_row = lane / TILE4 * THREAD_ROWS;
    var sums: array<vec4f, THREAD_ROWS>;

    for (var first = 0u; first < kv_end; first += TILE_KV) {
        let tile = kv_row(params.first_cached + workgroup.z, first);    // a tile is within a block
        for (var i = lane; i < TILE * TILE_INNER4; i += LANES) {
            let query = first_query + i / TILE_INNER4;
            let c4 = first / 4u + i % TILE_INNER4;
            var p = vec4f(0.0);
            if (query < params.tokens && c4 < params.tokens4) {
                p = vec4f(scores[(workgroup.z * params.tokens + query) * params.tokens4 + c4]);
            }
            p_tile[i] = p;
        }
        for (var i = lane; i < TILE_KV * TILE4; i += LANES) {
            let c4 = first_column4 + i % TILE4;
            // Zeros past the last key: what the cache holds there may be anything, NaN included, and 0 · NaN is NaN.
            var value = vec4f(0.0);
            if (first + i / TILE4 < kv_end && c4 < HEAD_DIM4) {
                value = vec4f(v[(tile + i / TILE4) * HEAD_DIM4 + c4]);
            }
            v_tile[i] = value;
        }
        workgroupBarrier();
        for (var k4 = 0u; k4 < trips(TILE_INNER4); k4++) {
            let v0 = v_tile[4u * k4 * TILE4 + column4];
            let v1 = v_tile[(4u * k4 + 1u) * TILE4 + column4];
            let v2 = v_tile[(4u * k4 + 2u) * TILE4 + column4];
            let v3 = v_tile[(4u * k4 + 3u) * TILE4 + column4];
            for (var r = 0u; r < trips(THREAD_ROWS); r++) {
                let p = p_tile[(thread_row + r) * TILE_INNER4 + k4];
                var sum = sums[r];
                sum = fma(vec4f(p.x), v0, sum);
                sum = fma(vec4f(p.y), v1, sum);
                sum = fma(vec4f(p.z), v2, sum);
                sums[r] = fma(vec4f(p.w), v3, sum);
            }
        }
        workgroupBarrier();
    }

    let c4 = first_column4 + column4;
    if (c4 >= HEAD_DIM4) { return; }
    for (var r = 0u; r < trips(THREAD_ROWS); r++) {
        let query = first_query + thread_row + r;
        if (query < params.tokens) { out[(query * HEADS + head) * HEAD_DIM4 + c4] = vec4<elem>(sums[r]); }
    }
}
