// Scores are added up through the workgroup's memory.
var<workgroup> lane_terms: array<f32, LANES>;

// The sum over the lanes of a group.
fn row_sum(x: f32, lane: u32) -> f32 {
    lane_terms[lane] = x;
    workgroupBarrier();
    var sum = 0.0;
    for (var i = 0u; i < trips(ROW_LANES); i++) { sum += lane_terms[lane / ROW_LANES * ROW_LANES + i]; }
    workgroupBarrier();
    return sum;
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) workgroup: vec3u, @builtin(local_invocation_index) lane: u32) {
    score_part(workgroup, lane);
}
