// A lane a head of a row.
fn prepare(first_row: u32, lane: u32) {
    for (var i = lane; i < ROWS * HEADS; i += LANES) {
        let row = min(first_row + i / HEADS, params.rows - 1u);
        let first = row * MAX_SPLITS * HEADS + i % HEADS;
        var splits = 0u;
        var top = -3.0e38;
        // Told so that a NaN counts as a slice, and is seen.
        while (splits < MAX_SPLITS && !(partial_ml[first + splits * HEADS].y == 0.0)) {
            top = max(top, partial_ml[first + splits * HEADS].x);
            splits++;
        }
        var total = 0.0;
        for (var s = 0u; s < splits; s++) {
            let slice = partial_ml[first + s * HEADS];
            total += exp2(slice.x - top) * slice.y;
        }
        for (var s = 0u; s < MAX_SPLITS; s++) {
            var weight = 0.0;
            if (s < splits) { weight = exp2(partial_ml[first + s * HEADS].x - top) / total; }
            slice_weights[i * MAX_SPLITS + s] = weight;
        }
        slice_counts[i] = splits;
    }
    workgroupBarrier();
}
