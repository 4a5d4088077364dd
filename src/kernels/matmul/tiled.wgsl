// out = epilogue(x · w + bias): one workgroup a TILE_ROWS × TILE_COLUMNS tile of out, staged TILE_INNER deep in
// workgroup memory as f32; one invocation a THREAD_ROWS × 4 block of it in registers.
// Sums run over `inner` in ascending order whatever the tile, so all tile sizes give the same bits.
const TILE_INNER4 = TILE_INNER / 4u;
const TILE_COLUMNS4 = TILE_COLUMNS / 4u;
const LANES = (TILE_ROWS / THREAD_ROWS) * TILE_COLUMNS4;

var<workgroup> x_tile: array<vec4f, TILE_ROWS * TILE_INNER4>;       // [TILE_ROWS, TILE_INNER4]
var<workgroup> w_tile: array<vec4f, TILE_INNER * TILE_COLUMNS4>;    // [TILE_INNER, TILE_COLUMNS4]

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) workgroup: vec3u, @builtin(local_invocation_index) lane: u32) {
    let first_row = workgroup.y * TILE_ROWS;
    let first_column4 = workgroup.x * TILE_COLUMNS4;
    let column4 = lane % TILE_COLUMNS4;
    let thread_row = lane / TILE_COLUMNS4 * THREAD_ROWS;
    var sums: array<vec4f, THREAD_ROWS>;

    for (var first = 0u; first < params.inner4; first += TILE_INNER4) {
        for (var i = lane; i < TILE_ROWS * TILE_INNER4; i += LANES) {
            let row = first_row + i / TILE_INNER4;
            let k4 = first + i % TILE_INNER4;
            var value = vec4f(0.0);
            if (row < params.rows && k4 < params.inner4) { value = vec4f(x[row * params.inner4 + k4]); }
            x_tile[i] = value;
        }
        for (var i = lane; i < TILE_INNER * TILE_COLUMNS4; i += LANES) {
            let k = 4u * first + i / TILE_COLUMNS4;
            let c4 = first_column4 + i % TILE_COLUMNS4;
            var value = vec4f(0.0);
            if (k < 4u * params.inner4 && c4 < params.columns4) { value = vec4f(w[k * params.columns4 + c4]); }
            w_tile[i] = value;
        }
        workgroupBarrier();
        for (var k4 = 0u; k4 < trips(TILE_INNER4); k4++) {
            let w0 = w_tile[(4u * k4) * TILE_COLUMNS4 + column4];
            let w1 = w_tile[(4u * k4 + 1u) * TILE_COLUMNS4 + column4];
            let w2 = w_tile[(4u * k4 + 2u) * TILE_COLUMNS4 + column4];
            let w3 = w_tile[(4u * k4 + 3u) * TILE_COLUMNS4 + column4];
            for (var r = 0u; r < trips(THREAD_ROWS); r++) {
                let a = x_tile[(thread_row + r) * TILE_INNER4 + k4];
                var sum = sums[r];
                sum = fma(vec4f(a.x), w0, sum);
                sum = fma(vec4f(a.y), w1, sum);
                sum = fma(vec4f(a.z), w2, sum);
                sums[r] = fma(vec4f(a.w), w3, sum);
            }
        }
        workgroupBarrier();
    }

    let c4 = first_column4 + column4;
    if (c4 >= params.columns4) { return; }
    let shift = bias[c4];
    for (var r = 0u; r < trips(THREAD_ROWS); r++) {
        let row = first_row + thread_row + r;
        if (row < params.rows) { store(row * params.columns4 + c4, sums[r] + shift); }
    }
}
