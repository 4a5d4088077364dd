// Mean and deviation of each row by one subgroup, from registers: the rows are normalised at the same time, and one
// barrier is all that the workgroup waits for. Subgroups beyond the rows repeat the last one's, to stay in step.
const PER_LANE = (INNER4 + SUBGROUP - 1u) / SUBGROUP;

fn prepare(first_row: u32, lane: u32) {
    let sublane = lane % SUBGROUP;
    for (var first = 0u; first < ROWS; first += SUBGROUPS) {
        let r = min(first + lane / SUBGROUP, ROWS - 1u);
        let base = min(first_row + r, params.rows - 1u) * INNER4;
        var values = array<vec4f, PER_LANE>();
        for (var j = 0u; j < PER_LANE; j++) {
            let i = sublane + j * SUBGROUP;
            if (i < INNER4) { values[j] = x[base + i]; }
        }
        var sum = 0.0;
        for (var j = 0u; j < PER_LANE; j++) { sum += dot(values[j], vec4f(1.0)); }
        let mean = subgroupAdd(sum) / f32(WIDTH);
        var squares = 0.0;
        for (var j = 0u; j < PER_LANE; j++) {
            let centred = (values[j] - mean) * existing(sublane + j * SUBGROUP);
            squares += dot(centred, centred);
        }
        let inverse_deviation = inverseSqrt(subgroupAdd(squares) / f32(WIDTH) + params.epsilon);
        if (sublane == 0u && lane / SUBGROUP == r - first) { moments[r] = vec2f(mean, inverse_deviation); }
    }
    workgroupBarrier();
}
