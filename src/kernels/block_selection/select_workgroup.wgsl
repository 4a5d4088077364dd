// What the lanes of a workgroup say to each other, through its memory.
const CHUNK = 16u;
const CHUNKS = LANES / CHUNK;

var<workgroup> lane_words: array<u32, LANES>;
var<workgroup> chunk_sums: array<u32, CHUNKS>;

// The sum over the lanes of a group.
fn row_sum(x: f32, lane: u32) -> f32 {
    if (ROW_LANES == 1u) { return x; }
    lane_words[lane] = bitcast<u32>(x);
    workgroupBarrier();
    var sum = 0.0;
    for (var i = 0u; i < trips(ROW_LANES); i++) {
        sum += bitcast<f32>(lane_words[lane / ROW_LANES * ROW_LANES + i]);
    }
    workgroupBarrier();
    return sum;
}

// The sum over the lanes before this one. There must be a barrier before the next.
fn exclusive_sum(x: u32, lane: u32) -> u32 {
    lane_words[lane] = x;
    workgroupBarrier();
    if (lane < CHUNKS) {
        var sum = 0u;
        for (var i = 0u; i < trips(CHUNK); i++) {
            let here = lane_words[lane * CHUNK + i];
            lane_words[lane * CHUNK + i] = sum;
            sum += here;
        }
        chunk_sums[lane] = sum;
    }
    workgroupBarrier();
    var sum = lane_words[lane];
    for (var i = 0u; i < lane / CHUNK; i++) { sum += chunk_sums[i]; }
    return sum;
}

// Zeros say nothing.
fn note_extremes(of_lane: vec2u, lane: u32) {
    if (lane % ROW_LANES == 0u) {
        atomicMax(&extremes[0], of_lane.x);
        atomicMax(&extremes[1], of_lane.y);
    }
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) workgroup: vec3u, @builtin(local_invocation_index) lane: u32) {
    select_blocks(workgroup, lane);
}
