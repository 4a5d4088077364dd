// The keys of a lane's blocks, and where those are, in registers. They are loaded before the sequence's length
// is known, so a lane's run is as long as the longest sequence wants it.
const LANE_KEYS = (CAPACITY + LANES - 1u) / LANES;

var<private> lane_keys: array<u32, LANE_KEYS>;
var<private> lane_places: array<u32, LANE_KEYS>;

fn load_keys(sequence: u32, head: u32, lane: u32) {
    let keys = (sequence * HEADS + head) * (1u + params.table_blocks) + 1u;
    for (var i = 0u; i < LANE_KEYS; i++) {
        let block = min(lane * LANE_KEYS + i, params.table_blocks - 1u);
        lane_keys[i] = selected[keys + block];
        lane_places[i] = block_table[sequence * params.table_blocks + block];
    }
}

fn lane_run(row: u32) -> u32 {
    return LANE_KEYS;
}

fn lane_key(block: u32, i: u32) -> u32 {
    return lane_keys[i];
}

fn lane_place(block: u32, i: u32) -> u32 {
    return lane_places[i];
}
