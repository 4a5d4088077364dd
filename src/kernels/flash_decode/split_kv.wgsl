// Attention of one query over a slice of SPLIT keys: one workgroup a (slice, head), to be merged by combine.wgsl.
// Split-KV as in Flash-Decoding (Dao et al. 2023): with one query there are too few heads to fill a GPU.
// Slices are cut at fixed positions, so the result does not depend on the device.
@group(0) @binding(0) var<storage, read> qkv: array<vec4<elem>>;             // [3, HEADS, HEAD_DIM4]
@group(0) @binding(1) var<storage, read> k: array<vec4<elem>>;               // [heads here, blocks, KV_BLOCK, HEAD_DIM4]
@group(0) @binding(2) var<storage, read> v: array<vec4<elem>>;               // [heads here, blocks, KV_BLOCK, HEAD_DIM4]
@group(0) @binding(3) var<storage, read> block_table: array<u32>;            // [blocks]
@group(0) @binding(4) var<storage, read_write> partial_out: array<vec4f>;    // [splits, HEADS, HEAD_DIM4], unnormalised
@group(0) @binding(5) var<storage, read_write> partial_ml: array<vec2f>;     // [splits, HEADS]: maximum (base 2), sum

// Lanes that share the sum over one slice's values for the same four output columns.
const SLICES = LANES / HEAD_DIM4;

var<workgroup> q: array<vec4f, HEAD_DIM4>;
var<workgroup> scores: array<f32, SPLIT>;
var<workgroup> lane_max: array<f32, LANES>;
var<workgroup> sums: array<vec4f, SLICES * HEAD_DIM4>;      // [SLICES, HEAD_DIM4]

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) workgroup: vec3u, @builtin(local_invocation_index) lane: u32) {
    let split = workgroup.x;
    let head = params.first_head + workgroup.y;
    let first = split * SPLIT;
    let keys = min(SPLIT, params.kv_len - first);

    for (var d = lane; d < HEAD_DIM4; d += LANES) {
        q[d] = vec4f(qkv[head * HEAD_DIM4 + d]) * params.scale_log2;
    }
    workgroupBarrier();

    var m = -3.0e38;
    for (var j = lane; j < keys; j += LANES) {
        let row = kv_row(workgroup.y, first + j) * HEAD_DIM4;
        var products = vec4f(0.0);
        for (var d = 0u; d < trips(HEAD_DIM4); d++) {
            products = fma(q[d], vec4f(k[row + d]), products);
        }
        let score = (products.x + products.y) + (products.z + products.w);
        scores[j] = score;
        m = max(m, score);
    }
    lane_max[lane] = m;
    workgroupBarrier();
    for (var i = 0u; i < trips(LANES); i++) { m = max(m, lane_max[i]); }

    var l = 0.0;
    for (var j = lane; j < keys; j += LANES) {
        let p = exp2(scores[j] - m);
        scores[j] = p;
        l += p;
    }
    l = workgroup_sum(l, lane);

    if (lane < SLICES * HEAD_DIM4) {
        var sum = vec4f(0.0);
        for (var j = lane / HEAD_DIM4; j < keys; j += SLICES) {
            let row = kv_row(workgroup.y, first + j) * HEAD_DIM4;
            sum = fma(vec4f(scores[j]), vec4f(v[row + lane % HEAD_DIM4]), sum);
        }
        sums[lane] = sum;
    }
    workgroupBarrier();
    let row = split * HEADS + head;
    if (lane < HEAD_DIM4) {
        var total = vec4f(0.0);
        for (var s = 0u; s < trips(SLICES); s++) { total += sums[s * HEAD_DIM4 + lane]; }
        partial_out[row * HEAD_DIM4 + lane] = total;
    }
    if (lane == 0u) { partial_ml[row] = vec2f(m, l); }
}
