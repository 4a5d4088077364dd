// The attention of tiled.wgsl with both products tiled in registers: a lane computes ROWS × 4 scores, then O_ROWS rows of
// four output columns, so that every vector read from workgroup memory is used several times. One workgroup a (tile of
// TILE_Q queries, head); online softmax in base 2; m, l and o are f32 in registers.
//
// Scores: lane (row group, key group) has rows `group + ROW_GROUPS·i` and keys `group + KEY_GROUPS·j`: neighbouring lanes
// read neighbouring rows of a tile, whose odd stride puts them in different banks. Probabilities go to p_tile as a vec4
// a lane, that is in the order of key groups, and the second product reads the values in that order.
const STRIDE4 = HEAD_DIM4 + 1u;
const QUARTER4 = HEAD_DIM4 / 4u;
const KEY_GROUPS = TILE_KV / 4u;
const ROW_GROUPS = LANES / KEY_GROUPS;
const ROWS = TILE_Q / ROW_GROUPS;
const P_STRIDE = KEY_GROUPS + 1u;
const O_GROUPS = LANES / HEAD_DIM4;
const O_ROWS = TILE_Q / O_GROUPS;
const LOADS = TILE_KV * HEAD_DIM4 / LANES;

var<workgroup> q_tile: array<vec4f, TILE_Q * STRIDE4>;
var<workgroup> kv_tile: array<vec4f, TILE_KV * STRIDE4>;            // keys, then values
var<workgroup> p_tile: array<vec4f, TILE_Q * P_STRIDE>;
var<workgroup> row_part: array<f32, TILE_Q * KEY_GROUPS>;           // maxima by key group, at the end sums
var<workgroup> row_scale: array<f32, TILE_Q>;                       // what o is multiplied by

fn dot_add(a: vec4f, b: vec4f, sum: f32) -> f32 {
    return fma(a.x, b.x, fma(a.y, b.y, fma(a.z, b.z, fma(a.w, b.w, sum))));
}

@compute @workgroup_size(LANES)
fn main(
    @builtin(workgroup_id) workgroup: vec3u,
    @builtin(num_workgroups) grid: vec3u,
    @builtin(local_invocation_index) lane: u32,
) {
    let head = params.first_head + workgroup.x;
    // Late tiles attend to the most keys: those of all heads are started first, so that none runs alone at the end.
    let tile_q = grid.y - 1u - workgroup.y;
    let first_query = first_query_of(tile_q);
    let query_end = query_end_of(tile_q);
    let kv_end = params.first_position + query_end;
    let walk = walk_of(head, first_query, kv_end);
    let last_tile = max(walk.tiles, 1u) - 1u;
    let key_group = lane % KEY_GROUPS;
    let row_group = lane / KEY_GROUPS;
    let column = lane % HEAD_DIM4;
    let o_group = lane / HEAD_DIM4;

    for (var i = lane; i < TILE_Q * HEAD_DIM4; i += LANES) {
        let query = first_query + i / HEAD_DIM4;
        var value = vec4f(0.0);
        if (query < query_end) {
            value = vec4f(qkv[(3u * query * HEADS + head) * HEAD_DIM4 + i % HEAD_DIM4]) * params.scale_log2;
        }
        q_tile[i / HEAD_DIM4 * STRIDE4 + i % HEAD_DIM4] = value;
    }

    var m: array<f32, ROWS>;
    var l: array<f32, ROWS>;                                        // of this lane's keys only
    var sights: array<Sight, ROWS>;
    for (var i = 0u; i < ROWS; i++) {
        m[i] = MASKED;
        sights[i] = sight_of(first_query + row_group + ROW_GROUPS * i);
    }
    var o: array<vec4f, O_ROWS>;

    // Keys and values are on their way from storage for a whole round before they are used.
    let slot = lane / HEAD_DIM4 * STRIDE4 + lane % HEAD_DIM4;
    let slot_step = LANES / HEAD_DIM4 * STRIDE4;
    var k_next: array<vec4<elem>, LOADS>;
    var v_next: array<vec4<elem>, LOADS>;
    var next = kv_row(workgroup.x, key_of(walk, 0u)) * HEAD_DIM4 + lane;
    for (var i = 0u; i < trips(LOADS); i++) {
        k_next[i] = k[next + i * LANES];
        v_next[i] = v[next + i * LANES];
    }

    for (var tile = 0u; tile < walk.tiles; tile++) {
        let first = key_of(walk, tile);
        let end = keys_end(walk, tile, kv_end);
        next = kv_row(workgroup.x, key_of(walk, min(tile + 1u, last_tile))) * HEAD_DIM4 + lane;
        for (var i = 0u; i < trips(LOADS); i++) {
            // Zeros past the last key: what the cache holds there may be anything, NaN included, and 0 · NaN is NaN.
            let is_key = first + (lane + i * LANES) / HEAD_DIM4 < end;
            kv_tile[slot + i * slot_step] = select(vec4f(0.0), vec4f(k_next[i]), is_key);
            k_next[i] = k[next + i * LANES];
        }
        workgroupBarrier();

        var s = array<vec4f, ROWS>();
        // A quarter of the columns at a time: four short sums are off by half as much as one long one.
        for (var d0 = 0u; d0 < HEAD_DIM4; d0 += QUARTER4) {
            var part = array<vec4f, ROWS>();
            for (var d = d0; d < d0 + trips(QUARTER4); d++) {
                let k0 = kv_tile[key_group * STRIDE4 + d];
                let k1 = kv_tile[(key_group + KEY_GROUPS) * STRIDE4 + d];
                let k2 = kv_tile[(key_group + 2u * KEY_GROUPS) * STRIDE4 + d];
                let k3 = kv_tile[(key_group + 3u * KEY_GROUPS) * STRIDE4 + d];
                for (var i = 0u; i < ROWS; i++) {
                    let a = q_tile[(row_group + ROW_GROUPS * i) * STRIDE4 + d];
                    part[i] = vec4f(
                        dot_add(a, k0, part[i].x),
                        dot_add(a, k1, part[i].y),
                        dot_add(a, k2, part[i].z),
                        dot_add(a, k3, part[i].w),
                    );
                }
            }
            for (var i = 0u; i < ROWS; i++) { s[i] += part[i]; }
        }
        if (hides(walk, tile)) {
            let key = vec4u(first + key_group) + vec4u(0u, 1u, 2u, 3u) * KEY_GROUPS;
            for (var i = 0u; i < ROWS; i++) { s[i] = select(vec4f(MASKED), s[i], sees(sights[i], key)); }
        }
        for (var i = 0u; i < ROWS; i++) {
            let largest = max(max(s[i].x, s[i].y), max(s[i].z, s[i].w));
            row_part[(row_group + ROW_GROUPS * i) * KEY_GROUPS + key_group] = largest;
        }
        workgroupBarrier();

        for (var i = 0u; i < trips(LOADS); i++) {
            let is_key = first + (lane + i * LANES) / HEAD_DIM4 < end;
            kv_tile[slot + i * slot_step] = select(vec4f(0.0), vec4f(v_next[i]), is_key);
            v_next[i] = v[next + i * LANES];
        }
        for (var i = 0u; i < ROWS; i++) {
            let row = row_group + ROW_GROUPS * i;
            // Every query sees the first key of its first tile: m is a real score from then on.
            var m_new = m[i];
            for (var g = 0u; g < KEY_GROUPS; g++) { m_new = max(m_new, row_part[row * KEY_GROUPS + g]); }
            let rescale = exp2(m[i] - m_new);
            m[i] = m_new;
            let p = exp2(s[i] - m_new);
            l[i] = l[i] * rescale + ((p.x + p.y) + (p.z + p.w));
            p_tile[row * P_STRIDE + key_group] = p;
            if (key_group == 0u) { row_scale[row] = rescale; }
        }
        workgroupBarrier();

        for (var i = 0u; i < O_ROWS; i++) { o[i] *= row_scale[o_group + O_GROUPS * i]; }
        for (var g = 0u; g < trips(KEY_GROUPS); g++) {
            let v0 = kv_tile[g * STRIDE4 + column];
            let v1 = kv_tile[(g + KEY_GROUPS) * STRIDE4 + column];
            let v2 = kv_tile[(g + 2u * KEY_GROUPS) * STRIDE4 + column];
            let v3 = kv_tile[(g + 3u * KEY_GROUPS) * STRIDE4 + column];
            for (var i = 0u; i < O_ROWS; i++) {
                let p = p_tile[(o_group + O_GROUPS * i) * P_STRIDE + g];
                o[i] = fma(vec4f(p.x), v0, fma(vec4f(p.y), v1, fma(vec4f(p.z), v2, fma(vec4f(p.w), v3, o[i]))));
            }
        }
        workgroupBarrier();
    }

    for (var i = 0u; i < ROWS; i++) {
        row_part[(row_group + ROW_GROUPS * i) * KEY_GROUPS + key_group] = l[i];
    }
    workgroupBarrier();
    for (var i = 0u; i < O_ROWS; i++) {
        let row = o_group + O_GROUPS * i;
        var sum = 0.0;
        for (var g = 0u; g < KEY_GROUPS; g++) { sum += row_part[row * KEY_GROUPS + g]; }
        if (first_query + row < query_end) {
            out[((first_query + row) * HEADS + head) * HEAD_DIM4 + column] = vec4<elem>(normalized(o[i], sum));
        }
    }
}
