// The attention of tiled.wgsl without workgroup memory or barriers: one subgroup, which is the whole workgroup, a
// (tile of SUBGROUP queries, head). A lane holds one query; it loads one key or value of each group of SUBGROUP, and the
// others' come by broadcast. For software Vulkan, for the reasons given in matmul/subgroup.wgsl.
fn masked(products: vec4f, is_visible: bool) -> f32 {
    return select(MASKED, (products.x + products.y) + (products.z + products.w), is_visible);
}

fn largest(s: vec4f) -> f32 {
    return max(max(s.x, s.y), max(s.z, s.w));
}

@compute @workgroup_size(SUBGROUP)
fn main(
    @builtin(workgroup_id) workgroup: vec3u,
    @builtin(num_workgroups) grid: vec3u,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    let head = params.first_head + workgroup.y;
    let first_query = (grid.x - 1u - workgroup.x) * SUBGROUP;
    let query = min(first_query + lane, params.q_len - 1u);
    let position = params.first_position + query;
    let kv_end = params.first_position + min(first_query + SUBGROUP, params.q_len);

    var q: array<vec4f, HEAD_DIM4>;
    var o: array<vec4f, HEAD_DIM4>;
    var m = MASKED;
    var l = 0.0;
    for (var d = 0u; d < trips(HEAD_DIM4); d++) {
        q[d] = vec4f(qkv[(3u * query * HEADS + head) * HEAD_DIM4 + d]) * params.scale_log2;
    }

    for (var first = 0u; first < kv_end; first += SUBGROUP) {
        // Lanes past the last key repeat it: what the cache holds there may be anything, NaN included.
        let row = kv_row(workgroup.y, min(first + lane, kv_end - 1u)) * HEAD_DIM4;
        var s0 = vec4f(0.0);
        var s1 = vec4f(0.0);
        var s2 = vec4f(0.0);
        var s3 = vec4f(0.0);
        var s4 = vec4f(0.0);
        var s5 = vec4f(0.0);
        var s6 = vec4f(0.0);
        var s7 = vec4f(0.0);
        for (var d = 0u; d < trips(HEAD_DIM4); d++) {
            let key = vec4f(k[row + d]);
            let a = q[d];
            s0 = fma(a, subgroupBroadcast(key, 0u), s0);
            s1 = fma(a, subgroupBroadcast(key, 1u), s1);
            s2 = fma(a, subgroupBroadcast(key, 2u), s2);
            s3 = fma(a, subgroupBroadcast(key, 3u), s3);
            if (SUBGROUP == 8u) {
                s4 = fma(a, subgroupBroadcast(key, 4u), s4);
                s5 = fma(a, subgroupBroadcast(key, 5u), s5);
                s6 = fma(a, subgroupBroadcast(key, 6u), s6);
                s7 = fma(a, subgroupBroadcast(key, 7u), s7);
            }
        }
        let low = vec4f(
            masked(s0, first <= position),
            masked(s1, first + 1u <= position),
            masked(s2, first + 2u <= position),
            masked(s3, first + 3u <= position),
        );
        var high = vec4f(MASKED);
        if (SUBGROUP == 8u) {
            high = vec4f(
                masked(s4, first + 4u <= position),
                masked(s5, first + 5u <= position),
                masked(s6, first + 6u <= position),
                masked(s7, first + 7u <= position),
            );
        }
        // Key 0 is in the first group and every query sees it: m is a real score from then on.
        let m_new = max(m, max(largest(low), largest(high)));
        let rescale = exp2(m - m_new);
        m = m_new;
        let p = exp2(low - m);
        let p_high = exp2(high - m);
        l = l * rescale + dot(p, vec4f(1.0)) + dot(p_high, vec4f(1.0));
        for (var d = 0u; d < trips(HEAD_DIM4); d++) {
            let value = vec4f(v[row + d]);
            var sum = o[d] * rescale;
            sum = fma(vec4f(p.x), subgroupBroadcast(value, 0u), sum);
            sum = fma(vec4f(p.y), subgroupBroadcast(value, 1u), sum);
            sum = fma(vec4f(p.z), subgroupBroadcast(value, 2u), sum);
            sum = fma(vec4f(p.w), subgroupBroadcast(value, 3u), sum);
            if (SUBGROUP == 8u) {
                sum = fma(vec4f(p_high.x), subgroupBroadcast(value, 4u), sum);
                sum = fma(vec4f(p_high.y), subgroupBroadcast(value, 5u), sum);
                sum = fma(vec4f(p_high.z), subgroupBroadcast(value, 6u), sum);
                sum = fma(vec4f(p_high.w), subgroupBroadcast(value, 7u), sum);
            }
            o[d] = sum;
        }
    }

    if (first_query + lane >= params.q_len) { return; }
    for (var d = 0u; d < trips(HEAD_DIM4); d++) {
        out[(query * HEADS + head) * HEAD_DIM4 + d] = vec4<elem>(o[d] / l);
    }
}
