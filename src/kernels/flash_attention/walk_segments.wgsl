// What a tile of queries attends to in a pack: the keys that its documents share, if there are any, then those of the
// pack itself, a tile of TILE_KV keys at a time.
//
// Each query has a segment (shared_first, shared_end, own_first, start), places in the cache: at place p it sees the keys
// [shared_first, shared_end) and [start, p], own_first <= start <= p. Queries come in groups of KV_BLOCK places, of which
// the first query begins one. A group has one shared_first, shared_end and own_first; start may differ within it where
// something is shared, and is own_first elsewhere. shared_first and own_first are multiples of KV_BLOCK, and
// shared_first <= shared_end <= own_first.
//
// No tile reaches over the end of a group, and none over the end of a block: a query's result does not depend on what its
// document is packed with. Keys and values from own_first to the end of the group must be finite, those of rows that only
// fill it up too: one that is hidden from a query weighs 0, and 0 · NaN is NaN.
//
// Every query sees the first key of its first tile: shared_first where something is shared, and own_first, which is its
// start, where nothing is.
struct Walk {
    tiles: u32,
    shared_tiles: u32,      // tiles before this one are of shared keys
    shared_first: u32,
    shared_end: u32,
    own_base: u32,          // tile t of the pack's own keys is t tiles behind it
    first_visible: u32,     // the last key that the first query sees
}

struct Sight {
    shared_end: u32,
    start: u32,
    position: u32,
}

const_assert KV_BLOCK % TILE_Q == 0u;

fn walk_of(head: u32, first_query: u32, kv_end: u32) -> Walk {
    let segment = segments[first_query];
    let shared_tiles = (segment.y - segment.x + TILE_KV - 1u) / TILE_KV;
    let own_tiles = (kv_end - segment.z + TILE_KV - 1u) / TILE_KV;
    // Not below 0: the shared tiles end in the block of the last shared key, and own keys begin in a later one.
    let own_base = segment.z - shared_tiles * TILE_KV;
    let first_visible = params.first_position + first_query;
    return Walk(shared_tiles + own_tiles, shared_tiles, segment.x, segment.y, own_base, first_visible);
}

// The first key of a tile.
fn key_of(walk: Walk, tile: u32) -> u32 {
    return select(walk.own_base, walk.shared_first, tile < walk.shared_tiles) + tile * TILE_KV;
}

// Whether some query does not see all keys of a tile.
fn hides(walk: Walk, tile: u32) -> bool {
    let end = key_of(walk, tile) + TILE_KV;
    if (tile < walk.shared_tiles) { return end > walk.shared_end; }
    return walk.shared_tiles != 0u || end > walk.first_visible + 1u;
}

// A query past the last one, of which a tile may have some, has the last one's segment; nothing is stored for it.
fn sight_of(query: u32) -> Sight {
    let segment = segments[min(query, params.q_len - 1u)];
    return Sight(segment.y, segment.w, params.first_position + query);
}

// Of the keys of its tiles, none of which are between the shared ones and its group's own.
fn sees(sight: Sight, keys: vec4u) -> vec4<bool> {
    return (keys < vec4u(sight.shared_end)) | ((keys >= vec4u(sight.start)) & (keys <= vec4u(sight.position)));
}

// Where the keys of a tile end that are there to be read: behind shared_end the cache may hold anything.
fn keys_end(walk: Walk, tile: u32, kv_end: u32) -> u32 {
    return select(kv_end, walk.shared_end, tile < walk.shared_tiles);
}
