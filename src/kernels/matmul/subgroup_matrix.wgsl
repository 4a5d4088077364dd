// out = epilogue(x · w + bias) on tensor cores: x and w in f16, sums in f32. One workgroup a tile of TILE_ROWS by
// TILE_COLUMNS, SUBGROUPS_M × SUBGROUPS_N subgroups of 32 lanes, each with 64×64 of it: sixteen matrices of 16×16.
// TILE_INNER columns of x and rows of w are staged at a time: while their matrices are multiplied, the loads of the next
// are under way in registers.
//
// What shaped it, measured on an H100 (docs/benchmarks.md): one stage of 32 leaves room for two workgroups a
// multiprocessor, which hide each other's barriers, where two stages of 32 do not; stages of 16 read x in pieces of 32
// bytes, at two thirds of the speed. In arrays that loops index, the driver keeps matrices in memory and not in registers,
// so they are written out.
alias Left = subgroup_matrix_left<f16, 16, 16>;
alias Right = subgroup_matrix_right<f16, 16, 16>;
alias Sum = subgroup_matrix_result<f32, 16, 16>;

const LANES = 32u * SUBGROUPS_M * SUBGROUPS_N;
const TILE_ROWS = 64u * SUBGROUPS_M;
const TILE_COLUMNS = 64u * SUBGROUPS_N;
const TILE_INNER = 32u;
// Strides and counts in vectors of eight f16. Rows are padded by one, so that the rows of a matrix lie in different banks.
const INNER8 = TILE_INNER / 8u;
const COLUMNS8 = TILE_COLUMNS / 8u;
const X_STRIDE = INNER8 + 1u;
const W_STRIDE = COLUMNS8 + 1u;
const W_STAGE = TILE_ROWS * X_STRIDE;                      // where w is in the arena, behind x
const X_LOADS = TILE_ROWS * INNER8 / LANES;
const W_LOADS = TILE_INNER * COLUMNS8 / LANES;
const X_LOAD_ROWS = LANES / INNER8;
const W_LOAD_ROWS = LANES / COLUMNS8;
// One subgroup's finished sums on their way out: 16 rows of 64 in f32, padded, four rows of eight columns a lane.
const OUT_STRIDE = 17u;
const OUT_STAGE = 16u * OUT_STRIDE;
const OUT_ROWS = 4u;

const_assert SUBGROUPS_M * SUBGROUPS_N * OUT_STAGE <= W_STAGE + TILE_INNER * W_STRIDE;
var<workgroup> arena: array<vec4u, W_STAGE + TILE_INNER * W_STRIDE>;

fn multiply(a: Left, b: Right, sum: Sum) -> Sum {
    return subgroupMatrixMultiplyAccumulate(a, b, sum);
}

// Sixteen finished rows of a subgroup, from the arena to where they belong: this lane has every fourth from `row` on, and
// of them the columns of out8.
fn finish(sums: u32, row: u32, out8: u32, bias_low: vec4f, bias_high: vec4f) {
    if (out8 >= params.columns8) { return; }
    if (EPILOGUE == RESIDUAL) {
        // All loads before the first store: the compiler may not exchange them.
        var old = array<vec4f, 2u * OUT_ROWS>();
        for (var i = 0u; i < OUT_ROWS; i++) {
            let at = 2u * (min(row + 4u * i, params.rows - 1u) * params.columns8 + out8);
            old[2u * i] = bitcast<vec4f>(out[at]);
            old[2u * i + 1u] = bitcast<vec4f>(out[at + 1u]);
        }
        for (var i = 0u; i < OUT_ROWS; i++) {
            if (row + 4u * i >= params.rows) { return; }
            let at = 2u * ((row + 4u * i) * params.columns8 + out8);
            let low = bitcast<vec4f>(arena[sums + 4u * OUT_STRIDE * i]) + bias_low;
            let high = bitcast<vec4f>(arena[sums + 4u * OUT_STRIDE * i + 1u]) + bias_high;
            out[at] = bitcast<vec4u>(old[2u * i] + low);
            out[at + 1u] = bitcast<vec4u>(old[2u * i + 1u] + high);
        }
        return;
    }
    for (var i = 0u; i < OUT_ROWS; i++) {
        if (row + 4u * i >= params.rows) { return; }
        var low = bitcast<vec4f>(arena[sums + 4u * OUT_STRIDE * i]) + bias_low;
        var high = bitcast<vec4f>(arena[sums + 4u * OUT_STRIDE * i + 1u]) + bias_high;
        if (EPILOGUE == BIAS_GELU) {
            low = gelu_new(low);
            high = gelu_new(high);
        }
        out[(row + 4u * i) * params.columns8 + out8] = vec4u(
            pack2x16float(low.xy), pack2x16float(low.zw), pack2x16float(high.xy), pack2x16float(high.zw),
        );
    }
}

@compute @workgroup_size(LANES)
fn main(
    @builtin(workgroup_id) workgroup: vec3u,
    @builtin(local_invocation_index) lane: u32,
    @builtin(subgroup_id) subgroup: u32,
) {
    let first_row = workgroup.y * TILE_ROWS;
    let first_column = workgroup.x * TILE_COLUMNS;
    let sub_row = subgroup / SUBGROUPS_N * 64u;
    let sub_column = subgroup % SUBGROUPS_N * 64u;

    // Four lanes load a row of x. Of each eight lanes, which write at the same time, the second four have the row four
    // further down: it lies in the other half of the banks.
    let x_row = lane / 32u * 8u + lane / 4u % 2u * 4u + lane / 8u % 4u;
    let x_slot = x_row * X_STRIDE + lane % INNER8;
    let w_slot = W_STAGE + lane / COLUMNS8 * W_STRIDE + lane % COLUMNS8;
    // Rows and columns outside repeat the last: what becomes of them is not stored.
    var x_at = array<u32, X_LOADS>();
    for (var i = 0u; i < X_LOADS; i++) {
        x_at[i] = min(first_row + x_row + i * X_LOAD_ROWS, params.rows - 1u) * params.inner8 + lane % INNER8;
    }
    var w_at = lane / COLUMNS8 * params.columns8 + min(first_column / 8u + lane % COLUMNS8, params.columns8 - 1u);
    let w_step = W_LOAD_ROWS * params.columns8;
    var x_next = array<vec4u, X_LOADS>();
    var w_next = array<vec4u, W_LOADS>();
    for (var i = 0u; i < X_LOADS; i++) { x_next[i] = x[x_at[i]]; }
    for (var i = 0u; i < W_LOADS; i++) { w_next[i] = w[w_at + i * w_step]; }

    var c00 = Sum();
    var c01 = Sum();
    var c02 = Sum();
    var c03 = Sum();
    var c10 = Sum();
    var c11 = Sum();
    var c12 = Sum();
    var c13 = Sum();
    var c20 = Sum();
    var c21 = Sum();
    var c22 = Sum();
    var c23 = Sum();
    var c30 = Sum();
    var c31 = Sum();
    var c32 = Sum();
    var c33 = Sum();
    let steps = params.inner8 / INNER8;
    for (var step = 1u; step <= steps; step++) {
        for (var i = 0u; i < X_LOADS; i++) { arena[x_slot + i * X_LOAD_ROWS * X_STRIDE] = x_next[i]; }
        for (var i = 0u; i < W_LOADS; i++) { arena[w_slot + i * W_LOAD_ROWS * W_STRIDE] = w_next[i]; }
        workgroupBarrier();
        // The last step loads its own tiles again: loads in a branch would have their registers copied every step.
        for (var i = 0u; i < X_LOADS; i++) {
            x_at[i] += select(0u, INNER8, step < steps);
            x_next[i] = x[x_at[i]];
        }
        w_at += select(0u, TILE_INNER * params.columns8, step < steps);
        for (var i = 0u; i < W_LOADS; i++) { w_next[i] = w[w_at + i * w_step]; }
        for (var k = 0u; k < TILE_INNER / 16u; k++) {
            let x_sub = sub_row * X_STRIDE + 2u * k;
            let w_sub = W_STAGE + 16u * k * W_STRIDE + sub_column / 8u;
            let w0 = subgroupMatrixLoad<Right, row_major>(&arena, w_sub + 0u, W_STRIDE);
            let w1 = subgroupMatrixLoad<Right, row_major>(&arena, w_sub + 2u, W_STRIDE);
            let w2 = subgroupMatrixLoad<Right, row_major>(&arena, w_sub + 4u, W_STRIDE);
            let w3 = subgroupMatrixLoad<Right, row_major>(&arena, w_sub + 6u, W_STRIDE);
            let x0 = subgroupMatrixLoad<Left, row_major>(&arena, x_sub + 0u * X_STRIDE, X_STRIDE);
            c00 = multiply(x0, w0, c00);
            c01 = multiply(x0, w1, c01);
            c02 = multiply(x0, w2, c02);
            c03 = multiply(x0, w3, c03);
            let x1 = subgroupMatrixLoad<Left, row_major>(&arena, x_sub + 16u * X_STRIDE, X_STRIDE);
            c10 = multiply(x1, w0, c10);
            c11 = multiply(x1, w1, c11);
            c12 = multiply(x1, w2, c12);
            c13 = multiply(x1, w3, c13);
            let x2 = subgroupMatrixLoad<Left, row_major>(&arena, x_sub + 32u * X_STRIDE, X_STRIDE);
            c20 = multiply(x2, w0, c20);
            c21 = multiply(x2, w1, c21);
            c22 = multiply(x2, w2, c22);
            c23 = multiply(x2, w3, c23);
            let x3 = subgroupMatrixLoad<Left, row_major>(&arena, x_sub + 48u * X_STRIDE, X_STRIDE);
            c30 = multiply(x3, w0, c30);
            c31 = multiply(x3, w1, c31);
            c32 = multiply(x3, w2, c32);
            c33 = multiply(x3, w3, c33);
        }
        workgroupBarrier();
    }

    // Sums have no elements here: they go through workgroup memory, sixteen rows of each subgroup at a time.
    let out_stage = subgroup * OUT_STAGE;
    let sums = out_stage + lane % 32u / 8u * OUT_STRIDE + 2u * (lane % 8u);
    let out_row = first_row + sub_row + lane % 32u / 8u;
    let out8 = (first_column + sub_column) / 8u + lane % 8u;
    let bias_low = bias[2u * min(out8, params.columns8 - 1u)];
    let bias_high = bias[2u * min(out8, params.columns8 - 1u) + 1u];
    subgroupMatrixStore<row_major>(&arena, out_stage + 0u, c00, OUT_STRIDE);
    subgroupMatrixStore<row_major>(&arena, out_stage + 4u, c01, OUT_STRIDE);
    subgroupMatrixStore<row_major>(&arena, out_stage + 8u, c02, OUT_STRIDE);
    subgroupMatrixStore<row_major>(&arena, out_stage + 12u, c03, OUT_STRIDE);
    workgroupBarrier();
    finish(sums, out_row + 0u, out8, bias_low, bias_high);
    workgroupBarrier();
    subgroupMatrixStore<row_major>(&arena, out_stage + 0u, c10, OUT_STRIDE);
    subgroupMatrixStore<row_major>(&arena, out_stage + 4u, c11, OUT_STRIDE);
    subgroupMatrixStore<row_major>(&arena, out_stage + 8u, c12, OUT_STRIDE);
    subgroupMatrixStore<row_major>(&arena, out_stage + 12u, c13, OUT_STRIDE);
    workgroupBarrier();
    finish(sums, out_row + 16u, out8, bias_low, bias_high);
    workgroupBarrier();
    subgroupMatrixStore<row_major>(&arena, out_stage + 0u, c20, OUT_STRIDE);
    subgroupMatrixStore<row_major>(&arena, out_stage + 4u, c21, OUT_STRIDE);
    subgroupMatrixStore<row_major>(&arena, out_stage + 8u, c22, OUT_STRIDE);
    subgroupMatrixStore<row_major>(&arena, out_stage + 12u, c23, OUT_STRIDE);
    workgroupBarrier();
    finish(sums, out_row + 32u, out8, bias_low, bias_high);
    workgroupBarrier();
    subgroupMatrixStore<row_major>(&arena, out_stage + 0u, c30, OUT_STRIDE);
    subgroupMatrixStore<row_major>(&arena, out_stage + 4u, c31, OUT_STRIDE);
    subgroupMatrixStore<row_major>(&arena, out_stage + 8u, c32, OUT_STRIDE);
    subgroupMatrixStore<row_major>(&arena, out_stage + 12u, c33, OUT_STRIDE);
    workgroupBarrier();
    finish(sums, out_row + 48u, out8, bias_low, bias_high);
}
