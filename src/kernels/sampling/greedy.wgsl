// Takes the largest score of each row, the lowest id of equals: one workgroup a sequence.
@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) workgroup: vec3u, @builtin(local_invocation_index) lane: u32) {
    let best = best_token(workgroup.x, lane);
    if (lane == 0u) { record(params.first_sequence + workgroup.x, problem_of(best)); }
}
