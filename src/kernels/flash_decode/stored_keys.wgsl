// The keys of a lane's blocks, and where those are, read whenever they are wanted: lanes are few, and their
// runs too long for registers.
var<private> first_key: u32;
var<private> first_place: u32;

fn load_keys(sequence: u32, head: u32, lane: u32) {
    first_key = (sequence * HEADS + head) * (1u + params.table_blocks) + 1u;
    first_place = sequence * params.table_blocks;
}

fn lane_run(row: u32) -> u32 {
    return (row + LANES) / LANES;
}

fn lane_key(block: u32, i: u32) -> u32 {
    return selected[first_key + block];
}

fn lane_place(block: u32, i: u32) -> u32 {
    return block_table[first_place + block];
}
