// out[i] = Σ_j softmax_j(q[i]·k[j] · scale) v[j] over j <= first_position + i: exact causal attention that never holds
// more than TILE_Q × KEYS scores, over all keys, those of a block mask or those of a segment (walk_all.wgsl,
// walk_lists.wgsl, walk_segments.wgsl). Tiling: Dao et al. 2022, algorithm 1, with the loops exchanged as in
// FlashAttention-2 (Dao 2023, section 3.1). Online softmax: Milakov & Gimelshein 2018, here in base 2 with log2(e) folded
// into the scale.
//
// One workgroup a (tile of TILE_Q queries, head), one invocation a query: its q, its running maximum m, sum l and
// unnormalised output o stay in registers in f32; tiles of TILE_KV keys and values are staged in workgroup memory, from
// which all invocations read the same address at once.
var<workgroup> k_tile: array<vec4f, TILE_KV * HEAD_DIM4>;
var<workgroup> v_tile: array<vec4f, TILE_KV * HEAD_DIM4>;

@compute @workgroup_size(TILE_Q)
fn main(
    @builtin(workgroup_id) workgroup: vec3u,
    @builtin(num_workgroups) grid: vec3u,
    @builtin(local_invocation_index) lane: u32,
) {
    let head = params.first_head + workgroup.y;
    // Late tiles attend to the most keys: started first, they do not run alone at the end.
    let tile_q = grid.x - 1u - workgroup.x;
    let first_query = first_query_of(tile_q);
    let query_end = query_end_of(tile_q);
    let query = first_query + lane;
    let sight = sight_of(query);
    let kv_end = params.first_position + query_end;
    let walk = walk_of(head, first_query, kv_end);

    var q: array<vec4f, HEAD_DIM4>;
    var o: array<vec4f, HEAD_DIM4>;
    var m = MASKED;
    var l = 0.0;
    if (query < query_end) {
        for (var d = 0u; d < trips(HEAD_DIM4); d++) {
            q[d] = vec4f(qkv[(3u * query * HEADS + head) * HEAD_DIM4 + d]) * params.scale_log2;
        }
    }

    for (var tile = 0u; tile < walk.tiles; tile++) {
        let first = key_of(walk, tile);
        let is_partial = hides(walk, tile);
        let end = keys_end(walk, tile, kv_end);
        let row = kv_row(workgroup.y, first) * HEAD_DIM4;
        for (var i = lane; i < TILE_KV * HEAD_DIM4; i += TILE_Q) {
            // Zeros past the last key: what the cache holds there may be anything, NaN included, and 0 · NaN is NaN.
            var key = vec4f(0.0);
            var value = vec4f(0.0);
            if (first + i / HEAD_DIM4 < end) {
                key = vec4f(k[row + i]);
                value = vec4f(v[row + i]);
            }
            k_tile[i] = key;
            v_tile[i] = value;
        }
        workgroupBarrier();
        for (var group = 0u; group < TILE_KV; group += KEYS) {
            var s = array<f32, KEYS>();
            var m_new = m;
            for (var j = 0u; j < trips(KEYS); j++) {
                var products = vec4f(0.0);
                for (var d = 0u; d < trips(HEAD_DIM4); d++) {
                    products = fma(q[d], k_tile[(group + j) * HEAD_DIM4 + d], products);
                }
                s[j] = (products.x + products.y) + (products.z + products.w);
                // Every query sees the first key of its first group: m is a real score from then on.
                if (is_partial) { s[j] = select(MASKED, s[j], sees(sight, vec4u(first + group + j)).x); }
                m_new = max(m_new, s[j]);
            }
            let rescale = exp2(m - m_new);
            m = m_new;
            l *= rescale;
            for (var d = 0u; d < trips(HEAD_DIM4); d++) { o[d] *= rescale; }
            for (var j = 0u; j < trips(KEYS); j++) {
                let p = exp2(s[j] - m);
                l += p;
                for (var d = 0u; d < trips(HEAD_DIM4); d++) {
                    o[d] = fma(vec4f(p), v_tile[(group + j) * HEAD_DIM4 + d], o[d]);
                }
            }
        }
        workgroupBarrier();
    }

    if (query >= query_end) { return; }
    for (var d = 0u; d < trips(HEAD_DIM4); d++) {
        out[(query * HEADS + head) * HEAD_DIM4 + d] = vec4<elem>(normalized(o[d], l));
    }
}
