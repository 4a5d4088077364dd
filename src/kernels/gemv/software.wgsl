// The same for software Vulkan, where a barrier saves all registers and every load is a branch for each lane: one small
// workgroup a strip of 4 · STRIP4 columns, a lane four of them, with x staged whole and no sums to share.
// A loop of up to 32 trips would be unrolled, and compiled for up to 18 seconds. Its trips must not be a constant then, nor
// may the compiler take them for the length of the array that the loop reads: X_TILE is always more.
const LANES = STRIP4;

var<workgroup> x_tile: array<vec4f, X_TILE>;       // [ROWS, INNER4]

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) workgroup: vec3u, @builtin(local_invocation_index) lane: u32) {
    let first_row = workgroup.y * ROWS;
    let c4 = workgroup.x * STRIP4 + lane;
    let column4 = min(c4, params.columns4 - 1u);
    prepare(first_row, lane);
    for (var i = lane; i < ROWS * INNER4; i += LANES) {
        x_tile[i] = stage(min(first_row + i / INNER4, params.rows - 1u), i / INNER4, i % INNER4);
    }
    workgroupBarrier();
    var sums = array<vec4f, ROWS>();
    let trips = INNER4 * min(params.rows, 1u);      // there is a row
    for (var k4 = 0u; k4 < trips; k4++) {
        let base = 4u * k4 * params.columns4 + column4;
        let w0 = vec4f(w[base]);
        let w1 = vec4f(w[base + params.columns4]);
        let w2 = vec4f(w[base + 2u * params.columns4]);
        let w3 = vec4f(w[base + 3u * params.columns4]);
        for (var r = 0u; r < ROWS; r++) {
            let a = x_tile[r * INNER4 + k4];
            sums[r] = fma(vec4f(a.w), w3, fma(vec4f(a.z), w2, fma(vec4f(a.y), w1, fma(vec4f(a.x), w0, sums[r]))));
        }
    }
    if (c4 >= params.columns4) { return; }
    for (var r = 0u; r < ROWS; r++) {
        if (first_row + r < params.rows) { store((first_row + r) * params.columns4 + c4, sums[r] + bias[c4]); }
    }
}
