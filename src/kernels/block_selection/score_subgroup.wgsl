// Scores are added up within subgroups.

// The sum over the lanes of a group.
fn row_sum(x: f32, lane: u32) -> f32 {
    return subgroup_row_sum(x);
}

@compute @workgroup_size(LANES)
fn main(
    @builtin(workgroup_id) workgroup: vec3u,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    score_part(workgroup, subgroup * SUBGROUP + lane);
}
