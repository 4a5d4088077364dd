// Mean and deviation of each row by all lanes together.
fn prepare(first_row: u32, lane: u32) {
    for (var r = 0u; r < ROWS; r++) {
        let base = min(first_row + r, params.rows - 1u) * INNER4;
        var sum = 0.0;
        for (var i = lane; i < INNER4; i += LANES) { sum += dot(x[base + i], vec4f(1.0)); }
        let mean = workgroup_sum(sum, lane) / f32(WIDTH);
        var squares = 0.0;
        for (var i = lane; i < INNER4; i += LANES) {
            let centred = (x[base + i] - mean) * existing(i);
            squares += dot(centred, centred);
        }
        let inverse_deviation = inverseSqrt(workgroup_sum(squares, lane) / f32(WIDTH) + params.epsilon);
        if (lane == 0u) { moments[r] = vec2f(mean, inverse_deviation); }
    }
    workgroupBarrier();
}
