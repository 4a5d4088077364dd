// Adds the slices of every sum, within subgroups by shuffles and then through workgroup memory, and stores them. Each
// subgroup has SUBGROUP / STRIP4 slices; STRIP4 is a power of two.
const SUBGROUPS = LANES / SUBGROUP;

var<workgroup> partial: array<vec4f, ROWS * SUBGROUPS * STRIP4>;        // [ROWS, SUBGROUPS, STRIP4]

fn finish(sums: Sums, first_row: u32, first_column4: u32, lane: u32) {
    for (var r = 0u; r < ROWS; r++) {
        var sum = sums[r];
        for (var step = SUBGROUP / 2u; step >= STRIP4; step /= 2u) { sum += subgroupShuffleXor(sum, step); }
        if (lane % SUBGROUP < STRIP4) {
            partial[(r * SUBGROUPS + lane / SUBGROUP) * STRIP4 + lane % STRIP4] = sum;
        }
    }
    workgroupBarrier();
    let row = lane / STRIP4;
    let c4 = first_column4 + lane % STRIP4;
    if (row < ROWS && first_row + row < params.rows && c4 < params.columns4) {
        var sum = bias[c4];
        for (var s = 0u; s < SUBGROUPS; s++) { sum += partial[(row * SUBGROUPS + s) * STRIP4 + lane % STRIP4]; }
        store((first_row + row) * params.columns4 + c4, sum);
    }
}
