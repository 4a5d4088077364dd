// Adds the slices of every sum, through workgroup memory and in a fixed order, and stores them.
const GROUPS = min(SLICES, 16u);

var<workgroup> partial: array<vec4f, LANES>;        // [SLICES, STRIP4], then [GROUPS, STRIP4]

fn finish(sums: Sums, first_row: u32, first_column4: u32, lane: u32) {
    for (var r = 0u; r < ROWS; r++) {
        partial[lane] = sums[r];
        workgroupBarrier();
        if (lane < GROUPS * STRIP4) {
            var sum = partial[lane];
            for (var i = lane + GROUPS * STRIP4; i < LANES; i += GROUPS * STRIP4) { sum += partial[i]; }
            partial[lane] = sum;
        }
        workgroupBarrier();
        let c4 = first_column4 + lane;
        if (lane < STRIP4 && c4 < params.columns4 && first_row + r < params.rows) {
            var sum = bias[c4];
            for (var g = 0u; g < GROUPS; g++) { sum += partial[g * STRIP4 + lane]; }
            store((first_row + r) * params.columns4 + c4, sum);
        }
        if (ROWS > 1u) { workgroupBarrier(); }
    }
}
