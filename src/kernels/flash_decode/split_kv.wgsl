// Attention of one query of each sequence over a slice of the blocks of keys that it attends to: one workgroup a
// (slice, head, sequence). Whoever needs the attention merges the slices: with M the largest of their maxima
// it is Σ 2^(m - M) o / Σ 2^(m - M) l. Split-KV as in Flash-Decoding (Dao et al. 2023): with one query there
// are too few heads to fill a GPU. Slices end where shared/splits.wgsl says, so the result does not depend on
// the device.
//
// The last slice's workgroup also appends the query's own key and value to the cache.
//
// ROW_LANES lanes hold a row, VECTORS vectors each, and are a group; every GROUPS-th key is a group's own, so
// that the groups together read one run of memory. A group has its own maximum, sum and output, which are
// merged at the end.
const STEP = GROUPS * KEYS;                                 // keys of all groups together; divides KV_BLOCK
const STRIDE = ROW_LANES + 1u;                              // odd for most heads: lanes read different banks

alias Columns = array<vec4f, VECTORS>;

var<workgroup> products: array<f32, STEP * STRIDE>;         // [STEP, STRIDE]
var<workgroup> scores: array<f32, STEP>;
var<workgroup> outs: array<vec4f, GROUPS * HEAD_DIM4>;      // [GROUPS, HEAD_DIM4]
var<workgroup> maxima_sums: array<vec2f, GROUPS>;

fn sum_of(a: vec4f) -> f32 {
    return (a.x + a.y) + (a.z + a.w);
}

fn sum_of_products(key: u32) -> f32 {
    var sum = 0.0;
    for (var i = 0u; i < trips(ROW_LANES); i++) { sum += products[key * STRIDE + i]; }
    return sum;
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) workgroup: vec3u, @builtin(local_invocation_index) lane: u32) {
    let sequence = workgroup.z;
    let head = params.first_head + workgroup.y;
    let length = sequences[sequence].length;
    let kept = kept_blocks(sequence, head, length, lane);
    let slice = slice_of(kept, workgroup.x);
    let partial = (sequence * MAX_SPLITS + workgroup.x) * HEADS + head;
    if (slice.first == slice.end && !slice.is_last) {
        if (lane == 0u) { partial_ml[partial] = vec2f(MASKED, 0.0); }
        return;
    }
    let column = lane % ROW_LANES;
    // Lanes that are left over do what others do and keep it to themselves.
    let group = lane / ROW_LANES % GROUPS;
    let is_working = lane < GROUPS * ROW_LANES;

    let new_row = (3u * sequence * HEADS + head) * HEAD_DIM4 + column;
    var q = Columns();
    for (var j = 0u; j < VECTORS; j++) { q[j] = vec4f(qkv[new_row + j * ROW_LANES]) * params.scale_log2; }
    var m = MASKED;
    var l = 0.0;
    var o = Columns();
    if (slice.is_last) {
        // The new token is attended to from here and its row of the cache is not read: nothing has to wait
        // for it.
        let row = kv_row_of(sequence, workgroup.y, length) * HEAD_DIM4 + column;
        var product = vec4f(0.0);
        for (var j = 0u; j < VECTORS; j++) {
            let new_key = qkv[new_row + HEADS * HEAD_DIM4 + j * ROW_LANES];
            let new_value = qkv[new_row + 2u * HEADS * HEAD_DIM4 + j * ROW_LANES];
            product = fma(q[j], vec4f(new_key), product);
            if (group == 0u && slice.sees_new) { o[j] = vec4f(new_value); }
            if (lane < ROW_LANES) {
                k[row + j * ROW_LANES] = new_key;
                v[row + j * ROW_LANES] = new_value;
            }
        }
        if (lane < ROW_LANES) { products[lane] = sum_of(product); }
        workgroupBarrier();
        if (group == 0u && slice.sees_new) {
            m = sum_of_products(0u);
            l = 1.0;
        }
        workgroupBarrier();
    }

    find_blocks(kept, slice, length / KV_BLOCK, lane);
    for (var n = slice.first; n < slice.end; n++) {
        let block_row = (workgroup.y * params.blocks + kept_place(kept, n, sequence)) * KV_BLOCK;
        let held = kept_keys(kept, n, length);
        for (var first = 0u; first < held; first += STEP) {
            // Keys past the last repeat it: what the cache holds there may be anything, NaN included.
            let row = (block_row + first) * HEAD_DIM4 + column;
            let last = held - 1u - first;
            for (var i = 0u; i < trips(KEYS); i++) {
                let key = i * GROUPS + group;
                var product = vec4f(0.0);
                for (var j = 0u; j < VECTORS; j++) {
                    product = fma(q[j], vec4f(k[row + min(key, last) * HEAD_DIM4 + j * ROW_LANES]), product);
                }
                if (is_working) { products[key * STRIDE + column] = sum_of(product); }
            }
            workgroupBarrier();
            for (var key = lane; key < STEP; key += LANES) {
                scores[key] = select(MASKED, sum_of_products(key), key <= last);
            }
            workgroupBarrier();
            for (var i = 0u; i < trips(KEYS); i++) {
                let key = i * GROUPS + group;
                // A group that has seen no key yet adds up nonsense below MASKED, which the merge weighs with 0.
                let top = max(m, scores[key]);
                let rescale = exp2(m - top);
                let p = exp2(scores[key] - top);
                m = top;
                l = fma(l, rescale, p);
                for (var j = 0u; j < VECTORS; j++) {
                    let value = vec4f(v[row + min(key, last) * HEAD_DIM4 + j * ROW_LANES]);
                    o[j] = fma(vec4f(p), value, o[j] * rescale);
                }
            }
        }
    }

    if (is_working) {
        for (var j = 0u; j < VECTORS; j++) { outs[group * HEAD_DIM4 + column + j * ROW_LANES] = o[j]; }
        if (column == 0u) { maxima_sums[group] = vec2f(m, l); }
    }
    workgroupBarrier();
    for (var d = lane; d < HEAD_DIM4; d += LANES) {
        var top = MASKED;
        for (var g = 0u; g < trips(GROUPS); g++) { top = max(top, maxima_sums[g].x); }
        var sum = 0.0;
        var out = vec4f(0.0);
        for (var g = 0u; g < trips(GROUPS); g++) {
            let weight = exp2(maxima_sums[g].x - top);
            sum = fma(weight, maxima_sums[g].y, sum);
            out = fma(vec4f(weight), outs[g * HEAD_DIM4 + d], out);
        }
        partial_out[partial * HEAD_DIM4 + d] = out;
        if (d == 0u) { partial_ml[partial] = vec2f(top, sum); }
    }
}
