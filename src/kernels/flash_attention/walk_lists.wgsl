// What a tile of queries attends to: the blocks listed for its row of the block mask, a tile of TILE_KV keys at a time. A
// row is KV_BLOCK positions and no tile may reach over its end: tiles begin where positions, not queries, are multiples of
// TILE_Q, and the first one may be shorter.
struct Walk {
    tiles: u32,
    partial: u32,           // tiles from here on are of blocks that not all queries see whole
    list: u32,              // where the blocks are listed
}

const BLOCK_TILES = KV_BLOCK / TILE_KV;
const_assert KV_BLOCK % TILE_Q == 0u;

fn first_query_of(tile: u32) -> u32 {
    return max(tile * TILE_Q, params.first_position % TILE_Q) - params.first_position % TILE_Q;
}

fn query_end_of(tile: u32) -> u32 {
    return min((tile + 1u) * TILE_Q - params.first_position % TILE_Q, params.q_len);
}

fn walk_of(head: u32, first_query: u32, kv_end: u32) -> Walk {
    let list = row_list(head, (params.first_position + first_query) / KV_BLOCK);
    return Walk((list.end - list.first) * BLOCK_TILES, (list.partial - list.first) * BLOCK_TILES, list.first);
}

// The first key of a tile.
fn key_of(walk: Walk, tile: u32) -> u32 {
    return block_lists[walk.list + tile / BLOCK_TILES] * KV_BLOCK + tile % BLOCK_TILES * TILE_KV;
}

// Whether some query does not see all keys of a tile.
fn hides(walk: Walk, tile: u32) -> bool {
    return tile >= walk.partial;
}
