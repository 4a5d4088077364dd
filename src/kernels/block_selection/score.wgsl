// The keys of blocks, for an attention that searches them itself (`flash_decode/choosing_blocks.wgsl`): one
// workgroup a (part of the blocks, head, sequence) writes those of STEP blocks, each where `selected` has an
// entry for the block. Nothing else of `selected` is written, and nothing at all of it for a sequence that
// keeps all of its blocks.
fn put_key(sequence: u32, head: u32, block: u32, key: u32) {
    selected[(sequence * HEADS + params.first_head + head) * (1u + params.table_blocks) + 1u + block] = key;
}

fn score_part(workgroup: vec3u, lane: u32) {
    let head = workgroup.y;
    let sequence = workgroup.z;
    let first = 1u + workgroup.x * STEP;
    // These loads do not wait for the sequence's length.
    let places = places_of(sequence, first, lane);
    let length = sequences[sequence].length;
    let row = length / KV_BLOCK;
    if (has_score(first, row) && !keeps_all(row)) {
        score_blocks(places, first, row, sequence, head, lane);
    }
    if (workgroup.x == 0u) { summarize_completed(length, sequence, head, lane); }
}
