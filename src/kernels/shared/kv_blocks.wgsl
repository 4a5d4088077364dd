// Rows of keys and values in the cache, in headDim vectors: positions go in blocks of KV_BLOCK, which the table places
// anywhere among the `blocks` that each head has room for. The layout is described in src/kvcache/cache.ts.
// `head` counts within the bound buffer, which may hold only some of the heads.
fn kv_row(head: u32, position: u32) -> u32 {
    return (head * params.blocks + block_table[position / KV_BLOCK]) * KV_BLOCK + position % KV_BLOCK;
}
