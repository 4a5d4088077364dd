// The slices of split_kv.wgsl without workgroup memory or barriers among the keys: ROW_LANES lanes of a
// subgroup hold a row, VECTORS vectors each, and are a group; every GROUPS-th key is a group's own, so that
// the groups together read one run of memory. Dot products are added up by shuffles. A group has its own
// maximum, sum and output, which are merged at the end, first within subgroups, then between them.
const SUBGROUPS = LANES / SUBGROUP;
const GROUPS = LANES / ROW_LANES;
const STEP = GROUPS * KEYS;                                 // keys of all groups together; divides KV_BLOCK

alias Columns = array<vec4f, VECTORS>;
alias NewRow = array<vec4<elem>, VECTORS>;
alias Rows = array<vec4<elem>, KEYS * VECTORS>;

var<workgroup> outs: array<vec4f, SUBGROUPS * HEAD_DIM4>;   // [SUBGROUPS, HEAD_DIM4]
var<workgroup> maxima_sums: array<vec2f, SUBGROUPS>;

@compute @workgroup_size(LANES)
fn main(
    @builtin(workgroup_id) workgroup: vec3u,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    let sequence = workgroup.z;
    let head = params.first_head + workgroup.y;
    let column = lane % ROW_LANES;
    let group = (subgroup * SUBGROUP + lane) / ROW_LANES;

    // These loads do not wait for the sequence's length.
    let new_row = (3u * sequence * HEADS + head) * HEAD_DIM4 + column;
    var q = Columns();
    var new_key = NewRow();
    var new_value = NewRow();
    for (var j = 0u; j < VECTORS; j++) {
        q[j] = vec4f(qkv[new_row + j * ROW_LANES]) * params.scale_log2;
        new_key[j] = qkv[new_row + HEADS * HEAD_DIM4 + j * ROW_LANES];
        new_value[j] = qkv[new_row + 2u * HEADS * HEAD_DIM4 + j * ROW_LANES];
    }
    let length = sequences[sequence].length;
    let kept = kept_blocks(sequence, head, length, subgroup * SUBGROUP + lane);
    let slice = slice_of(kept, workgroup.x);
    let partial = (sequence * MAX_SPLITS + workgroup.x) * HEADS + head;
    if (slice.first == slice.end && !slice.is_last) {
        if (subgroup == 0u && lane == 0u) { partial_ml[partial] = vec2f(MASKED, 0.0); }
        return;
    }

    var m = MASKED;
    var l = 0.0;
    var o = Columns();
    if (slice.sees_new) {
        // The new token is attended to from here and its row of the cache is not read: nothing has to wait
        // for it.
        var product = 0.0;
        for (var j = 0u; j < VECTORS; j++) { product += dot(q[j], vec4f(new_key[j])); }
        let score = subgroup_row_sum(product);
        if (group == 0u) {
            m = score;
            l = 1.0;
            for (var j = 0u; j < VECTORS; j++) { o[j] = vec4f(new_value[j]); }
        }
    }

    find_blocks(kept, slice, length / KV_BLOCK, subgroup * SUBGROUP + lane);
    for (var n = slice.first; n < slice.end; n++) {
        let block_row = (workgroup.y * params.blocks + kept_place(kept, n, sequence)) * KV_BLOCK;
        let row = block_row * HEAD_DIM4 + column;
        let held = kept_keys(kept, n, length);
        for (var first = 0u; first < held; first += STEP) {
            // Enough bytes are on their way only if all loads stand before anything that waits for one. Keys
            // past the last repeat it: what the cache holds there may be anything, NaN included.
            var keys = Rows();
            var values = Rows();
            for (var i = 0u; i < KEYS; i++) {
                let at = row + min(first + i * GROUPS + group, held - 1u) * HEAD_DIM4;
                for (var j = 0u; j < VECTORS; j++) { keys[i * VECTORS + j] = k[at + j * ROW_LANES]; }
            }
            for (var i = 0u; i < KEYS; i++) {
                let at = row + min(first + i * GROUPS + group, held - 1u) * HEAD_DIM4;
                for (var j = 0u; j < VECTORS; j++) { values[i * VECTORS + j] = v[at + j * ROW_LANES]; }
            }

            var scores = array<f32, KEYS>();
            var top = m;
            for (var i = 0u; i < KEYS; i++) {
                var product = 0.0;
                for (var j = 0u; j < VECTORS; j++) { product += dot(q[j], vec4f(keys[i * VECTORS + j])); }
                scores[i] = select(MASKED, subgroup_row_sum(product), first + i * GROUPS + group < held);
                top = max(top, scores[i]);
            }
            // A group that has seen no key yet adds up nonsense below MASKED, which the merge weighs with 0.
            let rescale = exp2(m - top);
            m = top;
            l *= rescale;
            for (var j = 0u; j < VECTORS; j++) { o[j] *= rescale; }
            for (var i = 0u; i < KEYS; i++) {
                let p = exp2(scores[i] - m);
                l += p;
                for (var j = 0u; j < VECTORS; j++) {
                    o[j] = fma(vec4f(p), vec4f(values[i * VECTORS + j]), o[j]);
                }
            }
        }
    }

    // Last, because no load of a key may be moved before a store among the keys.
    if (slice.is_last && group == 0u) {
        let row = kv_row_of(sequence, workgroup.y, length) * HEAD_DIM4 + column;
        for (var j = 0u; j < VECTORS; j++) {
            k[row + j * ROW_LANES] = new_key[j];
            v[row + j * ROW_LANES] = new_value[j];
        }
    }

    for (var other = ROW_LANES; other < SUBGROUP; other <<= 1u) {
        let top = max(m, subgroupShuffleXor(m, other));
        let weight = exp2(m - top);
        m = top;
        l *= weight;
        l += subgroupShuffleXor(l, other);
        for (var j = 0u; j < VECTORS; j++) {
            o[j] *= weight;
            o[j] += subgroupShuffleXor(o[j], other);
        }
    }
    if (lane < ROW_LANES) {
        for (var j = 0u; j < VECTORS; j++) { outs[subgroup * HEAD_DIM4 + lane + j * ROW_LANES] = o[j]; }
        if (lane == 0u) { maxima_sums[subgroup] = vec2f(m, l); }
    }
    workgroupBarrier();
    for (var d = subgroup * SUBGROUP + lane; d < HEAD_DIM4; d += LANES) {
        var top = MASKED;
        for (var s = 0u; s < SUBGROUPS; s++) { top = max(top, maxima_sums[s].x); }
        var sum = 0.0;
        var out = vec4f(0.0);
        for (var s = 0u; s < SUBGROUPS; s++) {
            let weight = exp2(maxima_sums[s].x - top);
            sum = fma(weight, maxima_sums[s].y, sum);
            out = fma(vec4f(weight), outs[s * HEAD_DIM4 + d], out);
        }
        partial_out[partial * HEAD_DIM4 + d] = out;
        if (d == 0u) { partial_ml[partial] = vec2f(top, sum); }
    }
}
