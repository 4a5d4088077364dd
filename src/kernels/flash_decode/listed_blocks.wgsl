// What a sequence's next token attends to: the blocks listed for its row of the block mask.
@group(0) @binding(7) var<storage, read> block_lists: array<u32>;          // see shared/block_lists.wgsl

struct Kept {
    count: u32,         // blocks
    sees_new: bool,     // whether the new token's own is among them
    list: u32,          // where they are listed
}

fn kept_blocks(sequence: u32, head: u32, length: u32, lane: u32) -> Kept {
    let list = row_list(head, length / KV_BLOCK);
    return Kept(list.end - list.first, list.partial < list.end, list.first);
}

fn kept_block(kept: Kept, i: u32) -> u32 {
    return block_lists[kept.list + i];
}
