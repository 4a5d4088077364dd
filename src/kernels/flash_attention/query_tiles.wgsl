// Tiles of queries that begin at multiples of TILE_Q queries.
fn first_query_of(tile: u32) -> u32 {
    return tile * TILE_Q;
}

fn query_end_of(tile: u32) -> u32 {
    return min((tile + 1u) * TILE_Q, params.q_len);
}
