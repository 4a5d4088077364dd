// The attention of tiled.wgsl on tensor cores, for heads of 64 columns: q, k, v and the probabilities in f16, scores,
// statistics and output in f32. One workgroup a (tile of 32 · SUBGROUPS queries, head); a subgroup of 32 lanes owns 32
// rows of it, from their scores to their output. A tile of keys is one block of the cache.
//
// A matrix has no elements: scores go to workgroup memory, where each lane takes one row, keeps its maximum and sum, and
// leaves its probabilities, in f16, in the same place. The output stays in matrices. It is rescaled, through workgroup
// memory, only when some row's maximum has grown by more than GROWTH in base 2 since the last time (the conditional
// rescaling of FlashAttention-4): until then probabilities may exceed 1, up to 2^GROWTH, which f16 holds, and the division
// by the sum at the end makes the result exact all the same.
//
// Matrices are written out one by one: in arrays indexed by loops the driver keeps them in memory, not in registers.
alias Left = subgroup_matrix_left<f16, 16, 16>;
alias Right = subgroup_matrix_right<f16, 16, 16>;
alias Sum = subgroup_matrix_result<f32, 16, 16>;

const LANES = 32u * SUBGROUPS;
const TILE_Q = 32u * SUBGROUPS;
const GROWTH = 8.0;
const HEAD_DIM8 = 8u;
// Rows of the arena in vectors of 16 bytes: 64 scores in f32, then probabilities in f16 and half of an output in f32; the
// odd stride puts neighbouring rows in different banks.
const STRIDE = 17u;
const KV_STRIDE = 9u;
const KV_LOADS = KV_BLOCK * HEAD_DIM8 / LANES;

var<workgroup> arena: array<vec4u, TILE_Q * STRIDE>;
var<workgroup> kv_tile: array<vec4u, KV_BLOCK * KV_STRIDE>;     // keys, then values
var<workgroup> grew: u32;

fn multiply(a: Left, b: Right, sum: Sum) -> Sum {
    return subgroupMatrixMultiplyAccumulate(a, b, sum);
}

@compute @workgroup_size(LANES)
fn main(
    @builtin(workgroup_id) workgroup: vec3u,
    @builtin(num_workgroups) grid: vec3u,
    @builtin(local_invocation_index) lane: u32,
    @builtin(subgroup_id) subgroup: u32,
) {
    let head = params.first_head + workgroup.y;
    // Late tiles attend to the most keys: started first, they do not run alone at the end.
    let first_query = (grid.x - 1u - workgroup.x) * TILE_Q;
    let first_visible = params.first_position + first_query;
    let kv_end = params.first_position + min(first_query + TILE_Q, params.q_len);
    let position = first_visible + lane;
    let row = lane * STRIDE;                                   // this lane's row of the arena
    let upper = 32u * subgroup * STRIDE;                       // this subgroup's first and second 16 rows
    let lower = upper + 16u * STRIDE;

    let q_stride = 3u * HEADS * HEAD_DIM8;
    let q_upper = (first_query + 32u * subgroup) * q_stride + head * HEAD_DIM8;
    let q_lower = q_upper + 16u * q_stride;
    let q00 = subgroupMatrixLoad<Left, row_major>(&qkv, q_upper, q_stride);
    let q01 = subgroupMatrixLoad<Left, row_major>(&qkv, q_upper + 2u, q_stride);
    let q02 = subgroupMatrixLoad<Left, row_major>(&qkv, q_upper + 4u, q_stride);
    let q03 = subgroupMatrixLoad<Left, row_major>(&qkv, q_upper + 6u, q_stride);
    let q10 = subgroupMatrixLoad<Left, row_major>(&qkv, q_lower, q_stride);
    let q11 = subgroupMatrixLoad<Left, row_major>(&qkv, q_lower + 2u, q_stride);
    let q12 = subgroupMatrixLoad<Left, row_major>(&qkv, q_lower + 4u, q_stride);
    let q13 = subgroupMatrixLoad<Left, row_major>(&qkv, q_lower + 6u, q_stride);
    var o00 = Sum();
    var o01 = Sum();
    var o02 = Sum();
    var o03 = Sum();
    var o10 = Sum();
    var o11 = Sum();
    var o12 = Sum();
    var o13 = Sum();
    var m = MASKED;
    var l = 0.0;

    // A tile is on its way from storage while the one before it is used: keys during the second product, values during
    // the first.
    var staged = array<vec4u, KV_LOADS>();
    for (var i = 0u; i < KV_LOADS; i++) { staged[i] = k[kv_row(workgroup.y, 0u) * HEAD_DIM8 + lane + i * LANES]; }

    for (var first = 0u; first < kv_end; first += KV_BLOCK) {
        let tile = kv_row(workgroup.y, first) * HEAD_DIM8;
        for (var i = 0u; i < KV_LOADS; i++) {
            let at = lane + i * LANES;
            kv_tile[at / HEAD_DIM8 * KV_STRIDE + at % HEAD_DIM8] = staged[i];
        }
        workgroupBarrier();
        for (var i = 0u; i < KV_LOADS; i++) {
            let at = lane + i * LANES;
            // Zeros past the last key: what the cache holds there may be anything, NaN included, and 0 · NaN is NaN.
            staged[i] = select(vec4u(0u), v[tile + at], first + at / HEAD_DIM8 < kv_end);
        }
        for (var n = 0u; n < KV_BLOCK / 16u; n++) {
            let keys = 16u * n * KV_STRIDE;
            let k0 = subgroupMatrixLoad<Right, col_major>(&kv_tile, keys, KV_STRIDE);
            let k1 = subgroupMatrixLoad<Right, col_major>(&kv_tile, keys + 2u, KV_STRIDE);
            let k2 = subgroupMatrixLoad<Right, col_major>(&kv_tile, keys + 4u, KV_STRIDE);
            let k3 = subgroupMatrixLoad<Right, col_major>(&kv_tile, keys + 6u, KV_STRIDE);
            let s0 = multiply(q03, k3, multiply(q02, k2, multiply(q01, k1, multiply(q00, k0, Sum()))));
            let s1 = multiply(q13, k3, multiply(q12, k2, multiply(q11, k1, multiply(q10, k0, Sum()))));
            subgroupMatrixStore<row_major>(&arena, upper + 4u * n, s0, STRIDE);
            subgroupMatrixStore<row_major>(&arena, lower + 4u * n, s1, STRIDE);
        }
        if (lane == 0u) { grew = 0u; }
        workgroupBarrier();
        for (var i = 0u; i < KV_LOADS; i++) {
            let at = lane + i * LANES;
            kv_tile[at / HEAD_DIM8 * KV_STRIDE + at % HEAD_DIM8] = staged[i];
        }

        var scores = array<vec4f, KV_BLOCK / 4u>();
        var top = vec4f(MASKED);
        if (first + KV_BLOCK > first_visible + 1u) {
            for (var j = 0u; j < KV_BLOCK / 4u; j++) {
                let keys = vec4u(first + 4u * j) + vec4u(0u, 1u, 2u, 3u);
                scores[j] = select(vec4f(MASKED), bitcast<vec4f>(arena[row + j]), keys <= vec4u(position));
                top = max(top, scores[j]);
            }
        } else {
            for (var j = 0u; j < KV_BLOCK / 4u; j++) {
                scores[j] = bitcast<vec4f>(arena[row + j]);
                top = max(top, scores[j]);
            }
        }
        let largest = max(max(top.x, top.y), max(top.z, top.w)) * params.scale_log2;
        var rescale = 1.0;
        if (first == 0u) {
            // Key 0 is in the first tile and every query sees it: m is a real score from then on.
            m = largest;
        } else if (largest > m + GROWTH) {
            rescale = exp2(m - largest);
            m = largest;
            l *= rescale;
            grew = 1u;
        }
        var sums = vec4f(0.0);
        for (var j = 0u; j < KV_BLOCK / 8u; j++) {
            let p0 = exp2(fma(scores[2u * j], vec4f(params.scale_log2), vec4f(-m)));
            let p1 = exp2(fma(scores[2u * j + 1u], vec4f(params.scale_log2), vec4f(-m)));
            sums += p0 + p1;
            arena[row + j] = vec4u(pack2x16float(p0.xy), pack2x16float(p0.zw), pack2x16float(p1.xy), pack2x16float(p1.zw));
        }
        l += (sums.x + sums.y) + (sums.z + sums.w);
        if (workgroupUniformLoad(&grew) != 0u) {
            // Rows hold eight vectors of probabilities; behind them is room for half of the output at a time.
            subgroupMatrixStore<row_major>(&arena, upper + 8u, o00, STRIDE);
            subgroupMatrixStore<row_major>(&arena, upper + 12u, o01, STRIDE);
            subgroupMatrixStore<row_major>(&arena, lower + 8u, o10, STRIDE);
            subgroupMatrixStore<row_major>(&arena, lower + 12u, o11, STRIDE);
            workgroupBarrier();
            for (var j = 8u; j < 16u; j++) { arena[row + j] = bitcast<vec4u>(bitcast<vec4f>(arena[row + j]) * rescale); }
            workgroupBarrier();
            o00 = subgroupMatrixLoad<Sum, row_major>(&arena, upper + 8u, STRIDE);
            o01 = subgroupMatrixLoad<Sum, row_major>(&arena, upper + 12u, STRIDE);
            o10 = subgroupMatrixLoad<Sum, row_major>(&arena, lower + 8u, STRIDE);
            o11 = subgroupMatrixLoad<Sum, row_major>(&arena, lower + 12u, STRIDE);
            workgroupBarrier();
            subgroupMatrixStore<row_major>(&arena, upper + 8u, o02, STRIDE);
            subgroupMatrixStore<row_major>(&arena, upper + 12u, o03, STRIDE);
            subgroupMatrixStore<row_major>(&arena, lower + 8u, o12, STRIDE);
            subgroupMatrixStore<row_major>(&arena, lower + 12u, o13, STRIDE);
            workgroupBarrier();
            for (var j = 8u; j < 16u; j++) { arena[row + j] = bitcast<vec4u>(bitcast<vec4f>(arena[row + j]) * rescale); }
            workgroupBarrier();
            o02 = subgroupMatrixLoad<Sum, row_major>(&arena, upper + 8u, STRIDE);
            o03 = subgroupMatrixLoad<Sum, row_major>(&arena, upper + 12u, STRIDE);
            o12 = subgroupMatrixLoad<Sum, row_major>(&arena, lower + 8u, STRIDE);
            o13 = subgroupMatrixLoad<Sum, row_major>(&arena, lower + 12u, STRIDE);
        }
        let next = min(first + KV_BLOCK, kv_end - 1u) / KV_BLOCK * KV_BLOCK;
        let next_tile = kv_row(workgroup.y, next) * HEAD_DIM8;
        for (var i = 0u; i < KV_LOADS; i++) { staged[i] = k[next_tile + lane + i * LANES]; }
        for (var n = 0u; n < KV_BLOCK / 16u; n++) {
            let p0 = subgroupMatrixLoad<Left, row_major>(&arena, upper + 2u * n, STRIDE);
            let p1 = subgroupMatrixLoad<Left, row_major>(&arena, lower + 2u * n, STRIDE);
            let v0 = subgroupMatrixLoad<Right, row_major>(&kv_tile, 16u * n * KV_STRIDE, KV_STRIDE);
            o00 = multiply(p0, v0, o00);
            o10 = multiply(p1, v0, o10);
            let v1 = subgroupMatrixLoad<Right, row_major>(&kv_tile, 16u * n * KV_STRIDE + 2u, KV_STRIDE);
            o01 = multiply(p0, v1, o01);
            o11 = multiply(p1, v1, o11);
            let v2 = subgroupMatrixLoad<Right, row_major>(&kv_tile, 16u * n * KV_STRIDE + 4u, KV_STRIDE);
            o02 = multiply(p0, v2, o02);
            o12 = multiply(p1, v2, o12);
            let v3 = subgroupMatrixLoad<Right, row_major>(&kv_tile, 16u * n * KV_STRIDE + 6u, KV_STRIDE);
            o03 = multiply(p0, v3, o03);
            o13 = multiply(p1, v3, o13);
        }
        // The next scores and values must not overwrite those that are still being loaded.
        workgroupBarrier();
    }

    subgroupMatrixStore<row_major>(&arena, upper, o00, STRIDE);
    subgroupMatrixStore<row_major>(&arena, upper + 4u, o01, STRIDE);
    subgroupMatrixStore<row_major>(&arena, upper + 8u, o02, STRIDE);
    subgroupMatrixStore<row_major>(&arena, upper + 12u, o03, STRIDE);
    subgroupMatrixStore<row_major>(&arena, lower, o10, STRIDE);
    subgroupMatrixStore<row_major>(&arena, lower + 4u, o11, STRIDE);
    subgroupMatrixStore<row_major>(&arena, lower + 8u, o12, STRIDE);
    subgroupMatrixStore<row_major>(&arena, lower + 12u, o13, STRIDE);
    workgroupBarrier();
    if (first_query + lane >= params.q_len) { return; }
    for (var d = 0u; d < HEAD_DIM8; d++) {
        let a = bitcast<vec4f>(arena[row + 2u * d]) / l;
        let b = bitcast<vec4f>(arena[row + 2u * d + 1u]) / l;
        out[((first_query + lane) * HEADS + head) * HEAD_DIM8 + d] =
            vec4u(pack2x16float(a.xy), pack2x16float(a.zw), pack2x16float(b.xy), pack2x16float(b.zw));
    }
}
