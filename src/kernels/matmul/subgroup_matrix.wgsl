// out = epilogue(x · w + bias) on tensor cores: x and w in f16, sums in f32. One workgroup a tile of TILE_ROWS by
// TILE_COLUMNS, SUBGROUPS_M × SUBGROUPS_N subgroups of 32 lanes, each with 64×64 of it: sixteen matrices of 16×16.
// TILE_INNER columns of x and rows of w are staged at a time, in two buffers by turns: while the matrices of one are
// multiplied, the loads of the next are under way. Rows of the stages are padded by 16 bytes, so that the rows of a matrix
// lie in different banks. The matrices are written out one by one: in arrays that loops index, NVIDIA's driver keeps them
// in memory and not in registers, at a third of the speed.
alias Left = subgroup_matrix_left<f16, 16, 16>;
alias Right = subgroup_matrix_right<f16, 16, 16>;
alias Sum = subgroup_matrix_result<f32, 16, 16>;

const LANES = 32u * SUBGROUPS_M * SUBGROUPS_N;
const TILE_ROWS = 64u * SUBGROUPS_M;
const TILE_COLUMNS = 64u * SUBGROUPS_N;
// Strides and counts in vectors of eight f16.
const X_STRIDE = TILE_INNER / 8u + 1u;
const W_STRIDE = TILE_COLUMNS / 8u + 1u;
const X_STAGE = TILE_ROWS * X_STRIDE;
const W_STAGE = TILE_INNER * W_STRIDE;
const X_LOADS = TILE_ROWS * TILE_INNER / 8u / LANES;
const W_LOADS = TILE_INNER * TILE_COLUMNS / 8u / LANES;
// One subgroup's finished sums on their way out: 16 rows of 64 in f32, padded.
const OUT_STRIDE = 17u;
const OUT_STAGE = 16u * OUT_STRIDE;

var<workgroup> arena: array<vec4u, 2u * (X_STAGE + W_STAGE)>;

// Eight columns of a row of x: zeros outside.
fn load_x(row: u32, inner8: u32) -> vec4u {
    if (row >= params.rows || inner8 >= params.inner8) { return vec4u(0u); }
    return x[row * params.inner8 + inner8];
}

fn load_w(inner: u32, column8: u32) -> vec4u {
    if (inner >= 8u * params.inner8 || column8 >= params.columns8) { return vec4u(0u); }
    return w[inner * params.columns8 + column8];
}

// Sixteen finished rows of a subgroup, from the arena to where they belong.
fn finish(out_stage: u32, first_row: u32, first_column4: u32, lane: u32) {
    for (var at = lane; at < 256u; at += 32u) {
        let row = first_row + at / 16u;
        let column4 = first_column4 + at % 16u;
        if (row < params.rows && column4 < 2u * params.columns8) {
            let sum = bitcast<vec4f>(arena[out_stage + at / 16u * OUT_STRIDE + at % 16u]);
            store(row * 2u * params.columns8 + column4, sum + bias[column4]);
        }
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
    var x_next = array<vec4u, X_LOADS>();
    var w_next = array<vec4u, W_LOADS>();
    for (var i = 0u; i < X_LOADS; i++) {
        let at = lane + i * LANES;
        x_next[i] = load_x(first_row + at / (TILE_INNER / 8u), at % (TILE_INNER / 8u));
    }
    for (var i = 0u; i < W_LOADS; i++) {
        let at = lane + i * LANES;
        w_next[i] = load_w(at / (TILE_COLUMNS / 8u), first_column / 8u + at % (TILE_COLUMNS / 8u));
    }

    var stage = 0u;
    for (var inner = 0u; inner < 8u * params.inner8; inner += TILE_INNER) {
        let x_stage = stage * (X_STAGE + W_STAGE);
        let w_stage = x_stage + X_STAGE;
        for (var i = 0u; i < X_LOADS; i++) {
            let at = lane + i * LANES;
            arena[x_stage + at / (TILE_INNER / 8u) * X_STRIDE + at % (TILE_INNER / 8u)] = x_next[i];
        }
        for (var i = 0u; i < W_LOADS; i++) {
            let at = lane + i * LANES;
            arena[w_stage + at / (TILE_COLUMNS / 8u) * W_STRIDE + at % (TILE_COLUMNS / 8u)] = w_next[i];
        }
        workgroupBarrier();
        let next = inner + TILE_INNER;
        for (var i = 0u; i < X_LOADS; i++) {
            let at = lane + i * LANES;
            x_next[i] = load_x(first_row + at / (TILE_INNER / 8u), next / 8u + at % (TILE_INNER / 8u));
        }
        for (var i = 0u; i < W_LOADS; i++) {
            let at = lane + i * LANES;
            w_next[i] = load_w(next + at / (TILE_COLUMNS / 8u), first_column / 8u + at % (TILE_COLUMNS / 8u));
        }
        for (var k = 0u; k < TILE_INNER / 16u; k++) {
            let x_at = x_stage + sub_row * X_STRIDE + 2u * k;
            let w_at = w_stage + 16u * k * W_STRIDE + sub_column / 8u;
            let w0 = subgroupMatrixLoad<Right, row_major>(&arena, w_at + 0u, W_STRIDE);
            let w1 = subgroupMatrixLoad<Right, row_major>(&arena, w_at + 2u, W_STRIDE);
            let w2 = subgroupMatrixLoad<Right, row_major>(&arena, w_at + 4u, W_STRIDE);
            let w3 = subgroupMatrixLoad<Right, row_major>(&arena, w_at + 6u, W_STRIDE);
            let x0 = subgroupMatrixLoad<Left, row_major>(&arena, x_at + 0u * X_STRIDE, X_STRIDE);
            c00 = subgroupMatrixMultiplyAccumulate(x0, w0, c00);
            c01 = subgroupMatrixMultiplyAccumulate(x0, w1, c01);
            c02 = subgroupMatrixMultiplyAccumulate(x0, w2, c02);
            c03 = subgroupMatrixMultiplyAccumulate(x0, w3, c03);
            let x1 = subgroupMatrixLoad<Left, row_major>(&arena, x_at + 16u * X_STRIDE, X_STRIDE);
            c10 = subgroupMatrixMultiplyAccumulate(x1, w0, c10);
            c11 = subgroupMatrixMultiplyAccumulate(x1, w1, c11);
            c12 = subgroupMatrixMultiplyAccumulate(x1, w2, c12);
            c13 = subgroupMatrixMultiplyAccumulate(x1, w3, c13);
            let x2 = subgroupMatrixLoad<Left, row_major>(&arena, x_at + 32u * X_STRIDE, X_STRIDE);
            c20 = subgroupMatrixMultiplyAccumulate(x2, w0, c20);
            c21 = subgroupMatrixMultiplyAccumulate(x2, w1, c21);
            c22 = subgroupMatrixMultiplyAccumulate(x2, w2, c22);
            c23 = subgroupMatrixMultiplyAccumulate(x2, w3, c23);
            let x3 = subgroupMatrixLoad<Left, row_major>(&arena, x_at + 48u * X_STRIDE, X_STRIDE);
            c30 = subgroupMatrixMultiplyAccumulate(x3, w0, c30);
            c31 = subgroupMatrixMultiplyAccumulate(x3, w1, c31);
            c32 = subgroupMatrixMultiplyAccumulate(x3, w2, c32);
            c33 = subgroupMatrixMultiplyAccumulate(x3, w3, c33);
        }
        stage = 1u - stage;
    }
    workgroupBarrier();

    // Sums have no elements here: they go through workgroup memory, sixteen rows of each subgroup at a time.
    let out_stage = subgroup * OUT_STAGE;
    subgroupMatrixStore<row_major>(&arena, out_stage + 0u, c00, OUT_STRIDE);
    subgroupMatrixStore<row_major>(&arena, out_stage + 4u, c01, OUT_STRIDE);
    subgroupMatrixStore<row_major>(&arena, out_stage + 8u, c02, OUT_STRIDE);
    subgroupMatrixStore<row_major>(&arena, out_stage + 12u, c03, OUT_STRIDE);
    workgroupBarrier();
    finish(out_stage, first_row + sub_row + 0u, (first_column + sub_column) / 4u, lane % 32u);
    workgroupBarrier();
    subgroupMatrixStore<row_major>(&arena, out_stage + 0u, c10, OUT_STRIDE);
    subgroupMatrixStore<row_major>(&arena, out_stage + 4u, c11, OUT_STRIDE);
    subgroupMatrixStore<row_major>(&arena, out_stage + 8u, c12, OUT_STRIDE);
    subgroupMatrixStore<row_major>(&arena, out_stage + 12u, c13, OUT_STRIDE);
    workgroupBarrier();
    finish(out_stage, first_row + sub_row + 16u, (first_column + sub_column) / 4u, lane % 32u);
    workgroupBarrier();
    subgroupMatrixStore<row_major>(&arena, out_stage + 0u, c20, OUT_STRIDE);
    subgroupMatrixStore<row_major>(&arena, out_stage + 4u, c21, OUT_STRIDE);
    subgroupMatrixStore<row_major>(&arena, out_stage + 8u, c22, OUT_STRIDE);
    subgroupMatrixStore<row_major>(&arena, out_stage + 12u, c23, OUT_STRIDE);
    workgroupBarrier();
    finish(out_stage, first_row + sub_row + 32u, (first_column + sub_column) / 4u, lane % 32u);
    workgroupBarrier();
    subgroupMatrixStore<row_major>(&arena, out_stage + 0u, c30, OUT_STRIDE);
    subgroupMatrixStore<row_major>(&arena, out_stage + 4u, c31, OUT_STRIDE);
    subgroupMatrixStore<row_major>(&arena, out_stage + 8u, c32, OUT_STRIDE);
    subgroupMatrixStore<row_major>(&arena, out_stage + 12u, c33, OUT_STRIDE);
    workgroupBarrier();
    finish(out_stage, first_row + sub_row + 48u, (first_column + sub_column) / 4u, lane % 32u);
    workgroupBarrier();
}
