// The attention of tiled.wgsl without workgroup memory or barriers: one subgroup, which is the whole workgroup, a
// (tile of 2 · SUBGROUP queries, head, strip of 8 · SUBGROUP columns of the output).
// For scores a lane holds two queries; it loads two keys of each tile of 2 · SUBGROUP, and the others' come by
// broadcast. For the output a lane holds eight columns of all queries; it loads these of a value, and the queries'
// probabilities come by broadcast. For software Vulkan, for the reasons given in matmul/subgroup.wgsl.

const TILE_Q = 2u * SUBGROUP;
const TILE_KV = 2u * SUBGROUP;

// Of TILE_KV keys; of the vectors, the first SUBGROUP / 2 are used.
alias Scores = array<vec4f, 4>;

fn low_scores(q: vec4f, key: vec4f) -> vec4f {
    return vec4f(
        dot(q, subgroupBroadcast(key, 0u)),
        dot(q, subgroupBroadcast(key, 1u)),
        dot(q, subgroupBroadcast(key, 2u)),
        dot(q, subgroupBroadcast(key, 3u)),
    );
}

fn high_scores(q: vec4f, key: vec4f) -> vec4f {
    return vec4f(
        dot(q, subgroupBroadcast(key, 4u)),
        dot(q, subgroupBroadcast(key, 5u)),
        dot(q, subgroupBroadcast(key, 6u)),
        dot(q, subgroupBroadcast(key, 7u)),
    );
}

// Adds four columns' share to the scores of this lane's query and all lanes' keys.
fn add_scores(s: ptr<function, Scores>, q: vec4f, key0: vec4f, key1: vec4f) {
    if (SUBGROUP == 8u) {
        (*s)[0] += low_scores(q, key0);
        (*s)[1] += high_scores(q, key0);
        (*s)[2] += low_scores(q, key1);
        (*s)[3] += high_scores(q, key1);
    } else {
        (*s)[0] += low_scores(q, key0);
        (*s)[1] += low_scores(q, key1);
    }
}

fn masked(s: vec4f, first_key: u32, sight: Sight) -> vec4f {
    return select(vec4f(MASKED), s, sees(sight, vec4u(first_key) + vec4u(0u, 1u, 2u, 3u)));
}

fn largest(s: vec4f) -> f32 {
    return max(max(s.x, s.y), max(s.z, s.w));
}

// Turns scores into probabilities below the maximum so far, and returns the factor of what was summed below the last.
fn soften(
    s: ptr<function, Scores>,
    is_partial: bool,
    first_key: u32,
    sight: Sight,
    m: ptr<function, f32>,
    l: ptr<function, f32>,
) -> f32 {
    var s0 = (*s)[0];
    var s1 = (*s)[1];
    var s2 = vec4f(MASKED);
    var s3 = vec4f(MASKED);
    if (SUBGROUP == 8u) {
        s2 = (*s)[2];
        s3 = (*s)[3];
    }
    if (is_partial) {
        s0 = masked(s0, first_key, sight);
        s1 = masked(s1, first_key + 4u, sight);
        s2 = masked(s2, first_key + 8u, sight);
        s3 = masked(s3, first_key + 12u, sight);
    }
    // Every query sees the first key of its first tile: m is a real score from then on.
    let m_new = max(*m, largest(max(max(s0, s1), max(s2, s3))));
    let rescale = exp2(*m - m_new);
    *m = m_new;
    *s = Scores(exp2(s0 - m_new), exp2(s1 - m_new), exp2(s2 - m_new), exp2(s3 - m_new));
    *l = *l * rescale + dot(((*s)[0] + (*s)[1]) + ((*s)[2] + (*s)[3]), vec4f(1.0));
    return rescale;
}

// Takes the first key's probability off and moves the others up.
fn pop_key(p: ptr<function, Scores>) -> f32 {
    let first = (*p)[0].x;
    (*p)[0] = vec4f((*p)[0].yzw, (*p)[1].x);
    (*p)[1] = vec4f((*p)[1].yzw, (*p)[2].x);
    (*p)[2] = vec4f((*p)[2].yzw, (*p)[3].x);
    (*p)[3] = (*p)[3].yzwx;
    return first;
}

// Lane r has the factor of row r.
fn add_term(rows: ptr<function, Rows>, p: f32, value: vec4f) {
    (*rows)[0] = fma(vec4f(subgroupBroadcast(p, 0u)), value, (*rows)[0]);
    (*rows)[1] = fma(vec4f(subgroupBroadcast(p, 1u)), value, (*rows)[1]);
    (*rows)[2] = fma(vec4f(subgroupBroadcast(p, 2u)), value, (*rows)[2]);
    (*rows)[3] = fma(vec4f(subgroupBroadcast(p, 3u)), value, (*rows)[3]);
    if (SUBGROUP == 8u) {
        (*rows)[4] = fma(vec4f(subgroupBroadcast(p, 4u)), value, (*rows)[4]);
        (*rows)[5] = fma(vec4f(subgroupBroadcast(p, 5u)), value, (*rows)[5]);
        (*rows)[6] = fma(vec4f(subgroupBroadcast(p, 6u)), value, (*rows)[6]);
        (*rows)[7] = fma(vec4f(subgroupBroadcast(p, 7u)), value, (*rows)[7]);
    }
}

fn scale(rows: ptr<function, Rows>, factor: f32) {
    (*rows)[0] *= subgroupBroadcast(factor, 0u);
    (*rows)[1] *= subgroupBroadcast(factor, 1u);
    (*rows)[2] *= subgroupBroadcast(factor, 2u);
    (*rows)[3] *= subgroupBroadcast(factor, 3u);
    if (SUBGROUP == 8u) {
        (*rows)[4] *= subgroupBroadcast(factor, 4u);
        (*rows)[5] *= subgroupBroadcast(factor, 5u);
        (*rows)[6] *= subgroupBroadcast(factor, 6u);
        (*rows)[7] *= subgroupBroadcast(factor, 7u);
    }
}

fn store(query: u32, query_end: u32, head: u32, column4: u32, o: vec4f) {
    if (query < query_end && column4 < HEAD_DIM4) {
        out[(query * HEADS + head) * HEAD_DIM4 + column4] = vec4<elem>(o);
    }
}

@compute @workgroup_size(SUBGROUP)
fn main(
    @builtin(workgroup_id) workgroup: vec3u,
    @builtin(num_workgroups) grid: vec3u,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    let head = params.first_head + workgroup.y;
    let tile_q = grid.x - 1u - workgroup.x;
    let first_query = first_query_of(tile_q);
    let query_end = query_end_of(tile_q);
    let query0 = min(first_query + lane, query_end - 1u);
    let query1 = min(first_query + SUBGROUP + lane, query_end - 1u);
    let q0 = (3u * query0 * HEADS + head) * HEAD_DIM4;
    let q1 = (3u * query1 * HEADS + head) * HEAD_DIM4;
    let kv_end = params.first_position + query_end;
    let walk = walk_of(head, first_query, kv_end);
    let sight0 = sight_of(query0);
    let sight1 = sight_of(query1);
    let left4 = workgroup.z * 2u * SUBGROUP + lane;
    let right4 = left4 + SUBGROUP;

    // Four columns of SUBGROUP queries each.
    var left0: Rows;
    var left1: Rows;
    var right0: Rows;
    var right1: Rows;
    var m0 = MASKED;
    var m1 = MASKED;
    var l0 = 0.0;
    var l1 = 0.0;
    for (var tile = 0u; tile < walk.tiles; tile++) {
        let first = key_of(walk, tile);
        let end = keys_end(walk, tile, kv_end);
        // A tile of keys that lies behind the last query: the rest of a listed block has no more.
        if (first >= end) { break; }
        let is_partial = hides(walk, tile);
        // A tile lies within a block. Keys past the last repeat it: what the cache holds there may be anything, NaN
        // included.
        let row = kv_row(workgroup.y, first);
        let last = end - 1u - first;
        let k0 = (row + min(lane, last)) * HEAD_DIM4;
        let k1 = (row + min(SUBGROUP + lane, last)) * HEAD_DIM4;
        var p0 = Scores();
        var p1 = Scores();
        for (var d = 0u; d < trips(HEAD_DIM4); d++) {
            let key0 = vec4f(k[k0 + d]);
            let key1 = vec4f(k[k1 + d]);
            let a0 = vec4f(qkv[q0 + d]) * params.scale_log2;
            let a1 = vec4f(qkv[q1 + d]) * params.scale_log2;
            add_scores(&p0, a0, key0, key1);
            add_scores(&p1, a1, key0, key1);
        }
        let rescale0 = soften(&p0, is_partial, first, sight0, &m0, &l0);
        let rescale1 = soften(&p1, is_partial, first, sight1, &m1, &l1);
        scale(&left0, rescale0);
        scale(&left1, rescale1);
        scale(&right0, rescale0);
        scale(&right1, rescale1);
        for (var i = 0u; i < trips(2u * SUBGROUP); i++) {
            let value = (row + min(i, last)) * HEAD_DIM4;
            let p_query0 = pop_key(&p0);
            let p_query1 = pop_key(&p1);
            let left = vec4f(v[value + min(left4, HEAD_DIM4 - 1u)]);
            var right = vec4f(0.0);
            if (HEAD_DIM4 > SUBGROUP) { right = vec4f(v[value + min(right4, HEAD_DIM4 - 1u)]); }
            add_term(&left0, p_query0, left);
            add_term(&left1, p_query1, left);
            if (HEAD_DIM4 > SUBGROUP) {
                add_term(&right0, p_query0, right);
                add_term(&right1, p_query1, right);
            }
        }
    }

    // Zeros for a query that attends to nothing.
    let weight0 = select(1.0 / l0, 0.0, l0 == 0.0);
    let weight1 = select(1.0 / l1, 0.0, l1 == 0.0);
    scale(&left0, weight0);
    scale(&left1, weight1);
    scale(&right0, weight0);
    scale(&right1, weight1);
    for (var first = first_query; first < first_query + trips(2u * SUBGROUP); first += SUBGROUP) {
        for (var query = first; query < first + trips(SUBGROUP); query++) {
            store(query, query_end, head, left4, pop_row(&left0));
            store(query, query_end, head, right4, pop_row(&right0));
        }
        left0 = left1;
        right0 = right1;
    }
}
