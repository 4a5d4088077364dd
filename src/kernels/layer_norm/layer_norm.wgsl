// out[row] = (x[row] - mean) / sqrt(variance + epsilon) * gain + shift: one workgroup of LANES lanes a row.
// The row stays in registers, and the variance is that of the centred row: E[x²] - E[x]² cancels in f32 when the mean
// is large against the spread, which GPT-2's residual stream reaches.
@group(0) @binding(0) var<storage, read> x: array<vec4f>;                       // [.., WIDTH4], from row first_row
@group(0) @binding(1) var<storage, read> gain: array<vec4f>;                    // [WIDTH4]
@group(0) @binding(2) var<storage, read> shift: array<vec4f>;                   // [WIDTH4]
@group(0) @binding(3) var<storage, read_write> out: array<vec4<out_elem>>;      // [rows, WIDTH4]

const WIDTH4 = (WIDTH + 3u) / 4u;
const PER_LANE = (WIDTH4 + LANES - 1u) / LANES;

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) workgroup: vec3u, @builtin(local_invocation_index) lane: u32) {
    let row = folded_row(workgroup);
    if (row >= params.rows) { return; }
    let base = (params.first_row + row) * WIDTH4;

    var values: array<vec4f, PER_LANE>;
    var sum = 0.0;
    for (var j = 0u; j < PER_LANE; j++) {
        let i = lane + j * LANES;
        if (i < WIDTH4) { values[j] = x[base + i]; }
        sum += dot(values[j], vec4f(1.0));
    }
    let mean = workgroup_sum(sum, lane) / f32(WIDTH);

    var squares = 0.0;
    for (var j = 0u; j < PER_LANE; j++) {
        values[j] = (values[j] - mean) * existing(lane + j * LANES);
        squares += dot(values[j], values[j]);
    }
    let inverse_deviation = inverseSqrt(workgroup_sum(squares, lane) / f32(WIDTH) + params.epsilon);

    for (var j = 0u; j < PER_LANE; j++) {
        let i = lane + j * LANES;
        if (i < WIDTH4) {
            out[row * WIDTH4 + i] = vec4<out_elem>(values[j] * inverse_deviation * gain[i] + shift[i]);
        }
    }
}
