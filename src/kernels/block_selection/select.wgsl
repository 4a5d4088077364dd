// The blocks of keys that a step of decoding attends to: one workgroup a (head, sequence) scores all blocks,
// searches for those to keep, and lists them in `selected`: how many, and then their numbers. A lane has a
// block to itself (ROW_LANES is 1).
var<workgroup> keys: array<u32, CAPACITY>;                  // by the block's number

fn row_sum(x: f32, lane: u32) -> f32 {
    return x;
}

fn put_key(sequence: u32, head: u32, block: u32, key: u32) {
    keys[block] = key;
}

fn lane_run(row: u32) -> u32 {
    return (row + LANES) / LANES;
}

fn lane_key(block: u32, i: u32) -> u32 {
    return keys[block];
}

alias List = u32;                                           // where the list begins

fn list_block(list: List, n: u32, block: u32, i: u32) {
    selected[list + n] = block;
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) workgroup: vec3u, @builtin(local_invocation_index) lane: u32) {
    let head = workgroup.x;
    let sequence = workgroup.y;
    let length = sequences[sequence].length;
    let row = length / KV_BLOCK;
    let count = (sequence * HEADS + params.first_head + head) * (1u + params.table_blocks);
    if (lane == 0u) { selected[count] = select(params.keep, row + 1u, keeps_all(row)); }
    if (keeps_all(row)) {
        for (var block = lane; block <= row; block += LANES) { selected[count + 1u + block] = block; }
    } else {
        for (var first = 1u; has_score(first, row); first += STEP) {
            score_blocks(places_of(sequence, first, lane), first, row, sequence, head, lane);
        }
        workgroupBarrier();
        list_blocks(count + 1u, row, search(row, params.keep - ALWAYS_KEPT, lane), lane);
    }
    summarize_completed(length, sequence, head, lane);
}
