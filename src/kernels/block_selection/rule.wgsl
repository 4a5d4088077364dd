// Which blocks of a sequence are kept whatever their scores are. The block of the new token is `row`, its last.

// Of a sequence that does not keep all: the first block and the two last.
const ALWAYS_KEPT = 3u;

fn keeps_all(row: u32) -> bool {
    return row < params.keep || row + 1u < params.least_blocks;
}

// Whether a block is one of those that are chosen by their score.
fn has_score(block: u32, row: u32) -> bool {
    return block > 0u && block + 1u < row;
}
