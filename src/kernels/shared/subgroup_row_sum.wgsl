// The sum over ROW_LANES lanes side by side, the same bits in all of them.
fn subgroup_row_sum(x: f32) -> f32 {
    var sum = x;
    for (var other = 1u; other < ROW_LANES; other <<= 1u) { sum += subgroupShuffleXor(sum, other); }
    return sum;
}
