// How the keys of one query are cut for split-KV attention: slices of whole blocks of KV_BLOCK keys, all but the last of
// the same length, and at most MAX_SPLITS of them. It depends on nothing but the number of keys.
fn blocks_per_split(kv_len: u32) -> u32 {
    let blocks = (kv_len + KV_BLOCK - 1u) / KV_BLOCK;
    return (blocks + MAX_SPLITS - 1u) / MAX_SPLITS;
}

fn split_count(kv_len: u32) -> u32 {
    let keys = blocks_per_split(kv_len) * KV_BLOCK;
    return (kv_len + keys - 1u) / keys;
}
