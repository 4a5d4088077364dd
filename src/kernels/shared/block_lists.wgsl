// Block lists as src/kvcache/block_lists.ts packs them: for each head where its rows begin, for each row where its blocks
// begin and where those of them that are seen in part only, and in between all rows' blocks.
struct RowList {
    first: u32,
    partial: u32,
    end: u32,
}

fn row_list(head: u32, row: u32) -> RowList {
    let at = block_lists[head] + 2u * row;
    return RowList(block_lists[at], block_lists[at + 1u], block_lists[at + 2u]);
}
