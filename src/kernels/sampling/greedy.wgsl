// Takes the largest score of each row, the lowest id of equals: one workgroup a sequence.
@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) workgroup: vec3u, @builtin(local_invocation_index) lane: u32) {
    let row = row_of(workgroup.x);
    let key = lane_key(row, lane);
    let largest = largest_key(key, lane);
    let id = first_token(row, lane, key, largest);
    if (lane == 0u) { record(params.first_sequence + row.index, result_of(Ranked(largest, id))); }
}
