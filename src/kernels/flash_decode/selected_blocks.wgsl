// What a sequence's next token attends to: the blocks that block_selection/select has chosen, the last of them its own.
@group(0) @binding(7) var<storage, read> selected: array<u32>;             // [sequences, HEADS, 1 + table_blocks]

struct Kept {
    count: u32,         // blocks
    sees_new: bool,     // whether the new token's own is among them
    list: u32,          // where they are listed
}

fn kept_blocks(sequence: u32, head: u32, length: u32, lane: u32) -> Kept {
    let at = (sequence * HEADS + head) * (1u + params.table_blocks);
    return Kept(selected[at], true, at + 1u);
}

fn kept_block(kept: Kept, i: u32) -> u32 {
    return selected[kept.list + i];
}
