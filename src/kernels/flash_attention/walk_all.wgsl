// What a tile of queries attends to: all keys up to its last query's own, a tile of TILE_KV at a time.
struct Walk {
    tiles: u32,
    first_visible: u32,     // the last key that the first query sees
}

fn walk_of(head: u32, first_query: u32, kv_end: u32) -> Walk {
    return Walk((kv_end + TILE_KV - 1u) / TILE_KV, params.first_position + first_query);
}

// The first key of a tile.
fn key_of(walk: Walk, tile: u32) -> u32 {
    return tile * TILE_KV;
}

// Whether some query does not see all keys of a tile.
fn hides(walk: Walk, tile: u32) -> bool {
    return (tile + 1u) * TILE_KV > walk.first_visible + 1u;
}
