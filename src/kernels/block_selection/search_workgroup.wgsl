// What lanes that search say to each other, through the workgroup's memory.
const CHUNK = 16u;
const CHUNKS = LANES / CHUNK;
const MAX_GROUP = 1u;

var<workgroup> lane_words: array<u32, LANES>;
var<workgroup> chunk_sums: array<u32, CHUNKS>;

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

fn group_max(x: u32, lanes: u32) -> u32 {
    return x;
}

// Zeros say nothing.
fn note_extremes(of_lane: vec2u, lane: u32) {
    atomicMax(&extremes[0], of_lane.x);
    atomicMax(&extremes[1], of_lane.y);
}
