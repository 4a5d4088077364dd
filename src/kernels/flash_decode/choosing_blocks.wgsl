// What a sequence's next token attends to: the blocks with the largest of the keys that block_selection/score
// has written, and those that are kept whatever their score. Every slice's workgroup searches its head's keys
// anew, and keeps of what it finds the blocks of its own slice: that takes less time than another dispatch
// with a workgroup for each head, whose list all slices would wait for.
//
// Said by the file joined to this one: `load_keys`, `lane_place` and what block_selection/search wants.
@group(0) @binding(7) var<storage, read> selected: array<u32>;           // [sequences, HEADS, 1 + table_blocks]

const SLICE_BLOCKS = (CAPACITY + MAX_SPLITS - 1u) / MAX_SPLITS;

// Where the n-th block that is kept is in memory is entry n % SLICE_BLOCKS: a slice has no more blocks.
var<workgroup> slice_places: array<u32, SLICE_BLOCKS>;

struct Kept {
    count: u32,         // blocks
    sees_new: bool,     // whether the new token's own is among them
    is_all: bool,       // whether these are all that the sequence has
}

fn kept_blocks(sequence: u32, head: u32, length: u32, lane: u32) -> Kept {
    load_keys(sequence, head, lane);
    let row = length / KV_BLOCK;
    let is_all = keeps_all(row);
    return Kept(select(params.keep, row + 1u, is_all), true, is_all);
}

fn kept_place(kept: Kept, n: u32, sequence: u32) -> u32 {
    return slice_places[n % SLICE_BLOCKS];
}

// The last block is the new token's own, and all others are complete.
fn kept_keys(kept: Kept, n: u32, length: u32) -> u32 {
    return select(KV_BLOCK, length % KV_BLOCK, n + 1u == kept.count);
}

alias List = Slice;

fn list_block(slice: List, n: u32, block: u32, i: u32) {
    if (n >= slice.first && n < slice.end) { slice_places[n % SLICE_BLOCKS] = lane_place(block, i); }
}

fn find_blocks(kept: Kept, slice: Slice, row: u32, lane: u32) {
    var bracket = Bracket();
    if (!kept.is_all) { bracket = search(row, params.keep - ALWAYS_KEPT, lane); }
    list_blocks(slice, row, bracket, lane);
    workgroupBarrier();
}
