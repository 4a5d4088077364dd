// What the lanes of a workgroup say to each other, within subgroups by subgroup operations.
const SUBGROUPS = LANES / SUBGROUP;

var<workgroup> subgroup_sums: array<u32, SUBGROUPS>;

// The sum over the lanes of a group, the same bits in all of them.
fn row_sum(x: f32, lane: u32) -> f32 {
    var sum = x;
    for (var other = 1u; other < ROW_LANES; other <<= 1u) { sum += subgroupShuffleXor(sum, other); }
    return sum;
}

// The sum over the lanes before this one. There must be a barrier before the next.
fn exclusive_sum(x: u32, lane: u32) -> u32 {
    var sum = subgroupExclusiveAdd(x);
    if (lane % SUBGROUP == SUBGROUP - 1u) { subgroup_sums[lane / SUBGROUP] = sum + x; }
    workgroupBarrier();
    // All of them are loaded at once: none waits for a comparison.
    for (var i = 0u; i < SUBGROUPS; i++) { sum += select(0u, subgroup_sums[i], i < lane / SUBGROUP); }
    return sum;
}

// Zeros say nothing.
fn note_extremes(of_lane: vec2u, lane: u32) {
    let of_subgroup = subgroupMax(of_lane);
    if (lane % SUBGROUP == 0u) {
        atomicMax(&extremes[0], of_subgroup.x);
        atomicMax(&extremes[1], of_subgroup.y);
    }
}

@compute @workgroup_size(LANES)
fn main(
    @builtin(workgroup_id) workgroup: vec3u,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    select_blocks(workgroup, subgroup * SUBGROUP + lane);
}
