// How the keys of one query are cut for split-KV attention: slices of whole blocks, all but the last of the same length, and
// at most MAX_SPLITS of them. It depends on nothing but the number of blocks.
fn blocks_per_split(blocks: u32) -> u32 {
    return (blocks + MAX_SPLITS - 1u) / MAX_SPLITS;
}
