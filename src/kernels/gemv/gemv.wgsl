// out = epilogue(x · w + bias) for the one or few rows of decoding, limited by reading w once: one workgroup a strip of
// 4 · STRIP4 columns and ROWS rows. SLICES groups of lanes share each sum over INNER4 vectors of x; every lane takes STEPS
// of them a pass, so all of w that it needs in a pass is loaded at once, the first before x is even looked at. What x is
// (`prepare`, `stage`) and how the lanes' sums become one (`finish`) is said by the files joined to this one.
const LANES = STRIP4 * SLICES;
const TILE4 = SLICES * STEPS;
const PASSES = (INNER4 + TILE4 - 1u) / TILE4;

alias Sums = array<vec4f, ROWS>;
alias Weights = array<vec4<elem>, 4u * STEPS>;

// Of x, zero behind its end.
var<workgroup> x_tile: array<vec4f, ROWS * TILE4>;

// A lane's rows of w for a pass; past the end the last row again, which meets a zero.
fn load_weights(first4: u32, column4: u32) -> Weights {
    var weights = Weights();
    for (var i = 0u; i < STEPS; i++) {
        let base = 4u * min(first4 + i * SLICES, INNER4 - 1u) * params.columns4 + column4;
        weights[4u * i] = w[base];
        weights[4u * i + 1u] = w[base + params.columns4];
        weights[4u * i + 2u] = w[base + 2u * params.columns4];
        weights[4u * i + 3u] = w[base + 3u * params.columns4];
    }
    return weights;
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) workgroup: vec3u, @builtin(local_invocation_index) lane: u32) {
    let slice = lane / STRIP4;
    let first_row = workgroup.y * ROWS;
    let c4 = workgroup.x * STRIP4 + lane % STRIP4;
    let column4 = min(c4, params.columns4 - 1u);
    var weights = load_weights(slice, column4);
    prepare(first_row, lane);
    var sums = Sums();
    for (var pass_index = 0u; pass_index < PASSES; pass_index++) {
        let first4 = pass_index * TILE4;
        for (var i = lane; i < ROWS * TILE4; i += LANES) {
            let k4 = first4 + i % TILE4;
            let row = min(first_row + i / TILE4, params.rows - 1u);
            x_tile[i] = select(vec4f(0.0), stage(row, i / TILE4, min(k4, INNER4 - 1u)), k4 < INNER4);
        }
        workgroupBarrier();
        let current = weights;
        if (PASSES > 1u) { weights = load_weights(first4 + TILE4 + slice, column4); }
        for (var i = 0u; i < STEPS; i++) {
            let w0 = vec4f(current[4u * i]);
            let w1 = vec4f(current[4u * i + 1u]);
            let w2 = vec4f(current[4u * i + 2u]);
            let w3 = vec4f(current[4u * i + 3u]);
            for (var r = 0u; r < ROWS; r++) {
                let a = x_tile[r * TILE4 + i * SLICES + slice];
                var sum = sums[r];
                sum = fma(vec4f(a.x), w0, sum);
                sum = fma(vec4f(a.y), w1, sum);
                sum = fma(vec4f(a.z), w2, sum);
                sums[r] = fma(vec4f(a.w), w3, sum);
            }
        }
        if (PASSES > 1u) { workgroupBarrier(); }
    }
    finish(sums, first_row, workgroup.x * STRIP4, lane);
}
