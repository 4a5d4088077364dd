// Where the n-th block that is kept is in memory, looked up when its turn comes.
fn kept_place(kept: Kept, n: u32, sequence: u32) -> u32 {
    return block_table[sequence * params.table_blocks + kept_block(kept, n)];
}

// How many of its keys are in the cache, of which the sequence has `length`.
fn kept_keys(kept: Kept, n: u32, length: u32) -> u32 {
    return min(KV_BLOCK, length - kept_block(kept, n) * KV_BLOCK);
}

// There is nothing to find.
fn find_blocks(kept: Kept, slice: Slice, row: u32, lane: u32) {}
