// What lanes that search say to each other, within subgroups by subgroup operations. SUBGROUPS is said by the
// file joined to this one.
const MAX_GROUP = SUBGROUP;

var<workgroup> subgroup_sums: array<u32, SUBGROUPS>;

// The sum over the lanes before this one. There must be a barrier before the next.
fn exclusive_sum(x: u32, lane: u32) -> u32 {
    var sum = subgroupExclusiveAdd(x);
    if (lane % SUBGROUP == SUBGROUP - 1u) { subgroup_sums[lane / SUBGROUP] = sum + x; }
    workgroupBarrier();
    // All of them are loaded at once: none waits for a comparison.
    for (var i = 0u; i < SUBGROUPS; i++) { sum += select(0u, subgroup_sums[i], i < lane / SUBGROUP); }
    return sum;
}

// The largest of this many neighbouring lanes, a power of two up to SUBGROUP.
fn group_max(x: u32, lanes: u32) -> u32 {
    var largest = x;
    for (var other = 1u; other < lanes; other <<= 1u) {
        largest = max(largest, subgroupShuffleXor(largest, other));
    }
    return largest;
}

// Zeros say nothing.
fn note_extremes(of_lane: vec2u, lane: u32) {
    let of_subgroup = subgroupMax(of_lane);
    if (lane % SUBGROUP == 0u) {
        atomicMax(&extremes[0], of_subgroup.x);
        atomicMax(&extremes[1], of_subgroup.y);
    }
}
