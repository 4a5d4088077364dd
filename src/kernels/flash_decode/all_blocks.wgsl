// What a sequence's next token attends to: all blocks up to its own.
struct Kept {
    count: u32,         // blocks
    sees_new: bool,     // whether the new token's own is among them
}

fn kept_blocks(sequence: u32, head: u32, length: u32, lane: u32) -> Kept {
    return Kept(length / KV_BLOCK + 1u, true);
}

fn kept_block(kept: Kept, i: u32) -> u32 {
    return i;
}
