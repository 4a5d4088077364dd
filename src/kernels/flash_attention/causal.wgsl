// What a query sees of the tiles that its tile of queries walks over, where nothing but its position says so.
alias Sight = u32;

fn sight_of(query: u32) -> Sight {
    return params.first_position + query;
}

fn sees(position: Sight, keys: vec4u) -> vec4<bool> {
    return keys <= vec4u(position);
}

// Where the keys of a tile end that are there to be read; `kv_end` is where those end that the last query sees.
fn keys_end(walk: Walk, tile: u32, kv_end: u32) -> u32 {
    return kv_end;
}
