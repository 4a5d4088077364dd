// A subgroup a head of a row, a lane a slice. Subgroups beyond the last repeat it, to stay in step.
const_assert MAX_SPLITS <= SUBGROUP;

fn prepare(first_row: u32, lane: u32) {
    let s = lane % SUBGROUP;
    for (var first = 0u; first < ROWS * HEADS; first += SUBGROUPS) {
        let i = min(first + lane / SUBGROUP, ROWS * HEADS - 1u);
        let row = min(first_row + i / HEADS, params.rows - 1u);
        var slice = vec2f(-3.0e38, 0.0);
        if (s < MAX_SPLITS) { slice = partial_ml[(row * MAX_SPLITS + s) * HEADS + i % HEADS]; }
        // Told so that a NaN counts as a slice, and is seen.
        let exists = !(slice.y == 0.0);
        let splits = subgroupAdd(select(0u, 1u, exists));
        let weight = exp2(slice.x - subgroupMax(slice.x));
        let total = subgroupAdd(weight * slice.y);
        if (s < MAX_SPLITS && lane / SUBGROUP == i - first) {
            slice_weights[i * MAX_SPLITS + s] = select(0.0, weight / total, exists);
            if (s == 0u) { slice_counts[i] = splits; }
        }
    }
    workgroupBarrier();
}
