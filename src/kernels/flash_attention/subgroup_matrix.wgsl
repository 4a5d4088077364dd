// The attention of tiled.wgsl on tensor cores, for heads of 64 columns: q, k, v and the probabilities in f16, scores,
// statistics and output in f32. One workgroup a (head, tile of 32 · SUBGROUPS queries); a subgroup of 32 lanes owns 32
// rows of it, from their scores to their output.
//
// A matrix has no elements: scores go to workgroup memory, where each lane takes one row and leaves its probabilities, in
// f16, in the same place. The output stays in matrices. Probabilities are taken relative to a row maximum m that is
// allowed to be out of date (the conditional rescaling of FlashAttention-4): while those of a tile add up to no more than
// LIMIT, none of them overflows f16. Only when they do is m renewed and the output rescaled, through workgroup memory. The
// division by the sum at the end makes the result exact all the same.
//
// What shaped it, measured on an H100 (docs/benchmarks.md): workgroups that share a multiprocessor must fit about 48 KiB of
// workgroup memory together, and two of them hide each other's barriers, hence tiles of 32 keys; matrices in arrays that
// loops index stay in memory, so they are written out; a matrix that is changed in one branch only is copied on every
// round, so the rescaling lies outside the inner loop.
alias Left = subgroup_matrix_left<f16, 16, 16>;
alias Right = subgroup_matrix_right<f16, 16, 16>;
alias Sum = subgroup_matrix_result<f32, 16, 16>;

const LANES = 32u * SUBGROUPS;
const TILE_Q = 32u * SUBGROUPS;
const TILE_KV = 32u;
const LIMIT = 8192.0;
const HEAD_DIM8 = 8u;
// Rows of the arena in vectors of 16 bytes: 32 scores in f32, or probabilities in f16 and a quarter of an output in f32.
// The odd strides put neighbouring rows in different banks.
const STRIDE = 9u;
const KV_STRIDE = 9u;
const KV_LOADS = TILE_KV * HEAD_DIM8 / LANES;

var<workgroup> arena: array<vec4u, TILE_Q * STRIDE>;
var<workgroup> kv_tile: array<vec4u, TILE_KV * KV_STRIDE>;      // keys, then values
var<workgroup> grew: u32;                                       // whether some row's m was renewed

fn multiply(a: Left, b: Right, sum: Sum) -> Sum {
    return subgroupMatrixMultiplyAccumulate(a, b, sum);
}

fn pack(a: vec4f, b: vec4f) -> vec4u {
    return vec4u(pack2x16float(a.xy), pack2x16float(a.zw), pack2x16float(b.xy), pack2x16float(b.zw));
}

// Scores of a subgroup's 32 rows with the 32 keys in kv_tile, from its rows of q to its rows of the arena.
fn store_scores(
    q00: Left, q01: Left, q02: Left, q03: Left, q10: Left, q11: Left, q12: Left, q13: Left, upper: u32, lower: u32,
) {
    const HALF = 16u * KV_STRIDE;
    let k00 = subgroupMatrixLoad<Right, col_major>(&kv_tile, 0u, KV_STRIDE);
    let k10 = subgroupMatrixLoad<Right, col_major>(&kv_tile, HALF, KV_STRIDE);
    let k01 = subgroupMatrixLoad<Right, col_major>(&kv_tile, 2u, KV_STRIDE);
    let k11 = subgroupMatrixLoad<Right, col_major>(&kv_tile, HALF + 2u, KV_STRIDE);
    let k02 = subgroupMatrixLoad<Right, col_major>(&kv_tile, 4u, KV_STRIDE);
    let k12 = subgroupMatrixLoad<Right, col_major>(&kv_tile, HALF + 4u, KV_STRIDE);
    let k03 = subgroupMatrixLoad<Right, col_major>(&kv_tile, 6u, KV_STRIDE);
    let k13 = subgroupMatrixLoad<Right, col_major>(&kv_tile, HALF + 6u, KV_STRIDE);
    let s00 = multiply(q03, k03, multiply(q02, k02, multiply(q01, k01, multiply(q00, k00, Sum()))));
    let s01 = multiply(q03, k13, multiply(q02, k12, multiply(q01, k11, multiply(q00, k10, Sum()))));
    let s10 = multiply(q13, k03, multiply(q12, k02, multiply(q11, k01, multiply(q10, k00, Sum()))));
    let s11 = multiply(q13, k13, multiply(q12, k12, multiply(q11, k11, multiply(q10, k10, Sum()))));
    subgroupMatrixStore<row_major>(&arena, upper, s00, STRIDE);
    subgroupMatrixStore<row_major>(&arena, upper + 4u, s01, STRIDE);
    subgroupMatrixStore<row_major>(&arena, lower, s10, STRIDE);
    subgroupMatrixStore<row_major>(&arena, lower + 4u, s11, STRIDE);
}

// Eight scores of a row as probabilities relative to m.
fn probabilities(row: u32, j: u32, m: f32) -> array<vec4f, 2> {
    let scale = vec4f(params.scale_log2);
    return array<vec4f, 2>(
        exp2(fma(bitcast<vec4f>(arena[row + 2u * j]), scale, vec4f(-m))),
        exp2(fma(bitcast<vec4f>(arena[row + 2u * j + 1u]), scale, vec4f(-m))),
    );
}

fn sum_of(a: vec4f) -> f32 {
    return (a.x + a.y) + (a.z + a.w);
}

// One row's scores of a tile of keys that starts at `first` become probabilities, in place; returns what the row's output
// must be multiplied by.
fn softmax(
    row: u32, tile: u32, first: u32, sight: Sight, is_partial: bool, m: ptr<function, f32>, l: ptr<function, f32>,
) -> f32 {
    if (is_partial) {
        for (var j = 0u; j < TILE_KV / 4u; j++) {
            let keys = vec4u(first + 4u * j) + vec4u(0u, 1u, 2u, 3u);
            let scores = select(vec4f(MASKED), bitcast<vec4f>(arena[row + j]), sees(sight, keys));
            arena[row + j] = bitcast<vec4u>(scores);
        }
    }
    var packed = array<vec4u, TILE_KV / 8u>();
    var sums = vec4f(0.0);
    for (var j = 0u; j < TILE_KV / 8u; j++) {
        let p = probabilities(row, j, *m);
        sums += p[0] + p[1];
        packed[j] = pack(p[0], p[1]);
    }
    let sum = sum_of(sums);
    if (tile != 0u && sum <= LIMIT) {
        for (var j = 0u; j < TILE_KV / 8u; j++) { arena[row + j] = packed[j]; }
        *l += sum;
        return 1.0;
    }

    // On the first tile m is still to be found: every query sees its first key, so m is a real score from then on.
    var top = bitcast<vec4f>(arena[row]);
    for (var j = 1u; j < TILE_KV / 4u; j++) { top = max(top, bitcast<vec4f>(arena[row + j])); }
    let largest = max(max(top.x, top.y), max(top.z, top.w)) * params.scale_log2;
    let rescale = exp2(*m - largest);
    *m = largest;
    sums = vec4f(0.0);
    for (var j = 0u; j < TILE_KV / 8u; j++) {
        let p = probabilities(row, j, largest);
        sums += p[0] + p[1];
        arena[row + j] = pack(p[0], p[1]);
    }
    *l = fma(*l, rescale, sum_of(sums));
    // Before the first tile there is no output to rescale.
    if (tile != 0u) { grew = 1u; }
    return rescale;
}

// A quarter of the output of this lane's row, behind the probabilities.
fn rescale_row(row: u32, rescale: f32) {
    for (var j = TILE_KV / 8u; j < TILE_KV / 4u; j++) {
        arena[row + j] = bitcast<vec4u>(bitcast<vec4f>(arena[row + j]) * rescale);
    }
}

// Half of the columns of a finished row, which this lane has in its row of the arena.
fn store_half(row: u32, query: u32, query_end: u32, head: u32, half: u32, l: f32) {
    if (query >= query_end) { return; }
    for (var d = 0u; d < HEAD_DIM8 / 2u; d++) {
        let a = normalized(bitcast<vec4f>(arena[row + 2u * d]), l);
        let b = normalized(bitcast<vec4f>(arena[row + 2u * d + 1u]), l);
        out[(query * HEADS + head) * HEAD_DIM8 + half * HEAD_DIM8 / 2u + d] = pack(a, b);
    }
}

@compute @workgroup_size(LANES)
fn main(
    @builtin(workgroup_id) workgroup: vec3u,
    @builtin(num_workgroups) grid: vec3u,
    @builtin(local_invocation_index) lane: u32,
    @builtin(subgroup_id) subgroup: u32,
) {
    let head = params.first_head + workgroup.x;
    // Late tiles attend to the most keys: those of all heads are started first, so that none runs alone at the end.
    let tile_q = grid.y - 1u - workgroup.y;
    let first_query = first_query_of(tile_q);
    let query_end = query_end_of(tile_q);
    let kv_end = params.first_position + query_end;
    let walk = walk_of(head, first_query, kv_end);
    let last_tile = max(walk.tiles, 1u) - 1u;
    let sight = sight_of(first_query + lane);
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
    var rescale = 1.0;

    // Keys and values are on their way from storage for a whole round before they are used.
    let slot = lane / HEAD_DIM8 * KV_STRIDE + lane % HEAD_DIM8;
    let slot_step = LANES / HEAD_DIM8 * KV_STRIDE;
    var k_next = array<vec4u, KV_LOADS>();
    var v_next = array<vec4u, KV_LOADS>();
    var next = kv_row(workgroup.x, key_of(walk, 0u)) * HEAD_DIM8 + lane;
    for (var i = 0u; i < KV_LOADS; i++) {
        k_next[i] = k[next + i * LANES];
        v_next[i] = v[next + i * LANES];
    }
    next = kv_row(workgroup.x, key_of(walk, min(1u, last_tile))) * HEAD_DIM8 + lane;

    var tile = 0u;
    while (tile < walk.tiles) {
        var is_done = false;
        // Round after round, until some row's m is renewed or the keys end.
        loop {
            let first = key_of(walk, tile);
            let end = keys_end(walk, tile, kv_end);
            for (var i = 0u; i < KV_LOADS; i++) { kv_tile[slot + i * slot_step] = k_next[i]; }
            workgroupBarrier();
            for (var i = 0u; i < KV_LOADS; i++) { k_next[i] = k[next + i * LANES]; }
            store_scores(q00, q01, q02, q03, q10, q11, q12, q13, upper, lower);
            if (lane == 0u) { grew = 0u; }
            workgroupBarrier();
            for (var i = 0u; i < KV_LOADS; i++) {
                // Zeros past the last key: what the cache holds there may be anything, NaN included, and 0 · NaN is NaN.
                let key = first + (lane + i * LANES) / HEAD_DIM8;
                kv_tile[slot + i * slot_step] = select(vec4u(0u), v_next[i], key < end);
                v_next[i] = v[next + i * LANES];
            }
            next = kv_row(workgroup.x, key_of(walk, min(tile + 2u, last_tile))) * HEAD_DIM8 + lane;
            rescale = softmax(row, tile, first, sight, hides(walk, tile), &m, &l);
            if (workgroupUniformLoad(&grew) != 0u) { break; }
            {
                let p0 = subgroupMatrixLoad<Left, row_major>(&arena, upper, STRIDE);
                let p1 = subgroupMatrixLoad<Left, row_major>(&arena, lower, STRIDE);
                let v0 = subgroupMatrixLoad<Right, row_major>(&kv_tile, 0u, KV_STRIDE);
                o00 = multiply(p0, v0, o00);
                o10 = multiply(p1, v0, o10);
                let v1 = subgroupMatrixLoad<Right, row_major>(&kv_tile, 2u, KV_STRIDE);
                o01 = multiply(p0, v1, o01);
                o11 = multiply(p1, v1, o11);
                let v2 = subgroupMatrixLoad<Right, row_major>(&kv_tile, 4u, KV_STRIDE);
                o02 = multiply(p0, v2, o02);
                o12 = multiply(p1, v2, o12);
                let v3 = subgroupMatrixLoad<Right, row_major>(&kv_tile, 6u, KV_STRIDE);
                o03 = multiply(p0, v3, o03);
                o13 = multiply(p1, v3, o13);
            }
            {
                let p0 = subgroupMatrixLoad<Left, row_major>(&arena, upper + 2u, STRIDE);
                let p1 = subgroupMatrixLoad<Left, row_major>(&arena, lower + 2u, STRIDE);
                let v0 = subgroupMatrixLoad<Right, row_major>(&kv_tile, 16u * KV_STRIDE, KV_STRIDE);
                o00 = multiply(p0, v0, o00);
                o10 = multiply(p1, v0, o10);
                let v1 = subgroupMatrixLoad<Right, row_major>(&kv_tile, 16u * KV_STRIDE + 2u, KV_STRIDE);
                o01 = multiply(p0, v1, o01);
                o11 = multiply(p1, v1, o11);
                let v2 = subgroupMatrixLoad<Right, row_major>(&kv_tile, 16u * KV_STRIDE + 4u, KV_STRIDE);
                o02 = multiply(p0, v2, o02);
                o12 = multiply(p1, v2, o12);
                let v3 = subgroupMatrixLoad<Right, row_major>(&kv_tile, 16u * KV_STRIDE + 6u, KV_STRIDE);
                o03 = multiply(p0, v3, o03);
                o13 = multiply(p1, v3, o13);
            }
            // The next keys and scores must not overwrite what is still being loaded.
            workgroupBarrier();
            tile++;
            if (tile >= walk.tiles) {
                is_done = true;
                break;
            }
        }
        if (is_done) { break; }

        // What is left of the round in which m was renewed.
        subgroupMatrixStore<row_major>(&arena, upper + 4u, o00, STRIDE);
        subgroupMatrixStore<row_major>(&arena, lower + 4u, o10, STRIDE);
        workgroupBarrier();
        rescale_row(row, rescale);
        workgroupBarrier();
        o00 = subgroupMatrixLoad<Sum, row_major>(&arena, upper + 4u, STRIDE);
        o10 = subgroupMatrixLoad<Sum, row_major>(&arena, lower + 4u, STRIDE);
        workgroupBarrier();
        subgroupMatrixStore<row_major>(&arena, upper + 4u, o01, STRIDE);
        subgroupMatrixStore<row_major>(&arena, lower + 4u, o11, STRIDE);
        workgroupBarrier();
        rescale_row(row, rescale);
        workgroupBarrier();
        o01 = subgroupMatrixLoad<Sum, row_major>(&arena, upper + 4u, STRIDE);
        o11 = subgroupMatrixLoad<Sum, row_major>(&arena, lower + 4u, STRIDE);
        workgroupBarrier();
        subgroupMatrixStore<row_major>(&arena, upper + 4u, o02, STRIDE);
        subgroupMatrixStore<row_major>(&arena, lower + 4u, o12, STRIDE);
        workgroupBarrier();
        rescale_row(row, rescale);
        workgroupBarrier();
        o02 = subgroupMatrixLoad<Sum, row_major>(&arena, upper + 4u, STRIDE);
        o12 = subgroupMatrixLoad<Sum, row_major>(&arena, lower + 4u, STRIDE);
        workgroupBarrier();
        subgroupMatrixStore<row_major>(&arena, upper + 4u, o03, STRIDE);
        subgroupMatrixStore<row_major>(&arena, lower + 4u, o13, STRIDE);
        workgroupBarrier();
        rescale_row(row, rescale);
        workgroupBarrier();
        o03 = subgroupMatrixLoad<Sum, row_major>(&arena, upper + 4u, STRIDE);
        o13 = subgroupMatrixLoad<Sum, row_major>(&arena, lower + 4u, STRIDE);
        {
            let p0 = subgroupMatrixLoad<Left, row_major>(&arena, upper, STRIDE);
            let p1 = subgroupMatrixLoad<Left, row_major>(&arena, lower, STRIDE);
            let v0 = subgroupMatrixLoad<Right, row_major>(&kv_tile, 0u, KV_STRIDE);
            o00 = multiply(p0, v0, o00);
            o10 = multiply(p1, v0, o10);
            let v1 = subgroupMatrixLoad<Right, row_major>(&kv_tile, 2u, KV_STRIDE);
            o01 = multiply(p0, v1, o01);
            o11 = multiply(p1, v1, o11);
            let v2 = subgroupMatrixLoad<Right, row_major>(&kv_tile, 4u, KV_STRIDE);
            o02 = multiply(p0, v2, o02);
            o12 = multiply(p1, v2, o12);
            let v3 = subgroupMatrixLoad<Right, row_major>(&kv_tile, 6u, KV_STRIDE);
            o03 = multiply(p0, v3, o03);
            o13 = multiply(p1, v3, o13);
        }
        {
            let p0 = subgroupMatrixLoad<Left, row_major>(&arena, upper + 2u, STRIDE);
            let p1 = subgroupMatrixLoad<Left, row_major>(&arena, lower + 2u, STRIDE);
            let v0 = subgroupMatrixLoad<Right, row_major>(&kv_tile, 16u * KV_STRIDE, KV_STRIDE);
            o00 = multiply(p0, v0, o00);
            o10 = multiply(p1, v0, o10);
            let v1 = subgroupMatrixLoad<Right, row_major>(&kv_tile, 16u * KV_STRIDE + 2u, KV_STRIDE);
            o01 = multiply(p0, v1, o01);
            o11 = multiply(p1, v1, o11);
            let v2 = subgroupMatrixLoad<Right, row_major>(&kv_tile, 16u * KV_STRIDE + 4u, KV_STRIDE);
            o02 = multiply(p0, v2, o02);
            o12 = multiply(p1, v2, o12);
            let v3 = subgroupMatrixLoad<Right, row_major>(&kv_tile, 16u * KV_STRIDE + 6u, KV_STRIDE);
            o03 = multiply(p0, v3, o03);
            o13 = multiply(p1, v3, o13);
        }
        workgroupBarrier();
        tile++;
    }

    subgroupMatrixStore<row_major>(&arena, upper, o00, STRIDE);
    subgroupMatrixStore<row_major>(&arena, upper + 4u, o01, STRIDE);
    subgroupMatrixStore<row_major>(&arena, lower, o10, STRIDE);
    subgroupMatrixStore<row_major>(&arena, lower + 4u, o11, STRIDE);
    workgroupBarrier();
    store_half(row, first_query + lane, query_end, head, 0u, l);
    workgroupBarrier();
    subgroupMatrixStore<row_major>(&arena, upper, o02, STRIDE);
    subgroupMatrixStore<row_major>(&arena, upper + 4u, o03, STRIDE);
    subgroupMatrixStore<row_major>(&arena, lower, o12, STRIDE);
    subgroupMatrixStore<row_major>(&arena, lower + 4u, o13, STRIDE);
    workgroupBarrier();
    store_half(row, first_query + lane, query_end, head, 1u, l);
}
