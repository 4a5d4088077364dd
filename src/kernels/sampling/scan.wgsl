// How a workgroup shares a row of logits, and its largest one. Rows are read in blocks of four logits, aligned in the
// buffer; the at most three logits in front of a row's first block, and those behind its last, are edges: a lane has one
// or none. GROUP lanes take a run of blocks and step through it side by side: loads are coalesced, and the sums of groups
// are sums over ids in order. GROUPS divides LANES.
const GROUP = 32u;
const GROUPS = LANES / GROUP;

const NO_TOKEN = 0xffffffffu;
const INFINITY_BITS = 0x7f800000u;
const SIGN_BIT = 0x80000000u;

struct Row {
    index: u32,
    head: u32,          // ids in front of the first block
    first_block: u32,   // in the buffer
    blocks: u32,
}

fn row_of(index: u32) -> Row {
    let start = index * params.vocab;
    let head = min((4u - start % 4u) % 4u, params.vocab);
    return Row(index, head, (start + head) / 4u, (params.vocab - head) / 4u);
}

// The id of a block's first logit.
fn id_of(row: Row, block: u32) -> u32 {
    return row.head + 4u * block;
}

// Blocks of a group's run, a multiple of GROUP.
fn run_length(row: Row) -> u32 {
    return (row.blocks + LANES - 1u) / LANES * GROUP;
}

struct Share { first: u32, end: u32 }       // blocks first, first + GROUP, ... below end

fn share_of(row: Row, lane: u32) -> Share {
    let start = lane / GROUP * run_length(row);
    return Share(start + lane % GROUP, min(start + run_length(row), row.blocks));
}

// The id of a lane's edge, or NO_TOKEN: those in front are of the first lanes, those behind of the last.
fn edge_of(row: Row, lane: u32) -> u32 {
    let from_end = LANES - lane;
    if (lane < row.head) { return lane; }
    if (from_end <= params.vocab - id_of(row, row.blocks)) { return params.vocab - from_end; }
    return NO_TOKEN;
}

// Of the blocks first, first + GROUP, ... number c; those that are not below `end`, as `first` is, are `first` again.
fn block_at(first: u32, c: u32, end: u32) -> u32 {
    return select(first, first + c * GROUP, first + c * GROUP < end);
}

// LOADS of these blocks, all under way at once.
fn load_logits(row: Row, first: u32, end: u32) -> array<vec4u, LOADS> {
    var loaded = array<vec4u, LOADS>();
    for (var c = 0u; c < LOADS; c++) { loaded[c] = logits[row.first_block + block_at(first, c, end)]; }
    return loaded;
}

fn load_logit(row: Row, id: u32) -> u32 {
    let i = row.index * params.vocab + id;
    return logits[i / 4u][i % 4u];
}

// The order of floats as integers, both zeros as one; that of NaN is nobody's business. Devices may take floats below
// 2^-126 for 0 where they compare them, so scores are only compared by their keys.
fn key_of(bits: u32) -> u32 {
    return select(bits | SIGN_BIT, 0u - bits, bits >= SIGN_BIT);
}

fn score_of(key: u32) -> f32 {
    return bitcast<f32>(select(0u - key, key ^ SIGN_BIT, key >= SIGN_BIT));
}

// Below the keys of all tokens, which begin with that of -infinity.
const NO_KEY = 0u;
const LOWEST_KEY = SIGN_BIT - INFINITY_BITS;

// Above the keys of all numbers: among logits there is NaN.
const NAN_KEY = 0xffffffffu;

// Tokens rank by decreasing key, equal ones by id.
struct Ranked { key: u32, id: u32 }

fn is_before(a: Ranked, b: Ranked) -> bool {
    return a.key > b.key || (a.key == b.key && a.id < b.id);
}

// Of many logits what their largest key follows from: three comparisons a logit, where its key alone takes as many.
struct Extent {
    largest: vec4i,     // of the positive
    smallest: vec4u,    // of the negative, whose bits fall as they rise
    most: vec4u,        // tells NaN with a sign
}

fn no_extent() -> Extent {
    return Extent(vec4i(bitcast<i32>(SIGN_BIT)), vec4u(NAN_KEY), vec4u(0u));
}

fn extended(extent: Extent, bits: vec4u) -> Extent {
    return Extent(
        max(extent.largest, bitcast<vec4i>(bits)),
        min(extent.smallest, bits),
        max(extent.most, bits),
    );
}

// The largest key of an extent that is not empty, or NAN_KEY.
fn key_of_extent(extent: Extent) -> u32 {
    let largest = max(max(extent.largest.x, extent.largest.y), max(extent.largest.z, extent.largest.w));
    let smallest = min(min(extent.smallest.x, extent.smallest.y), min(extent.smallest.z, extent.smallest.w));
    let most = max(max(extent.most.x, extent.most.y), max(extent.most.z, extent.most.w));
    if (largest > bitcast<i32>(INFINITY_BITS) || most > (INFINITY_BITS | SIGN_BIT)) { return NAN_KEY; }
    return key_of(select(bitcast<u32>(largest), smallest, largest < 0));
}

// The largest key of a lane's share and edge: NO_KEY if it has none.
fn lane_key(row: Row, lane: u32) -> u32 {
    let share = share_of(row, lane);
    let edge = edge_of(row, lane);
    var extent = no_extent();
    for (var block = share.first; block < share.end; block += LOADS * GROUP) {
        let scores = load_scores(row, block, share.end);
        for (var c = 0u; c < LOADS; c++) { extent = extended(extent, scores[c]); }
    }
    if (edge != NO_TOKEN) { extent = extended(extent, vec4u(load_score(row, edge))); }
    if (edge == NO_TOKEN && share.first >= share.end) { return NO_KEY; }
    return key_of_extent(extent);
}

var<workgroup> lane_keys: array<u32, LANES>;
var<workgroup> column_words: array<u32, GROUP + GROUP>;
var<workgroup> picked: vec4u;

// The largest of all lanes' keys, for all of them; each stays in `lane_keys`.
fn largest_key(key: u32, lane: u32) -> u32 {
    lane_keys[lane] = key;
    workgroupBarrier();
    if (lane < GROUP) {
        var largest = NO_KEY;
        for (var i = 0u; i < trips(GROUPS); i++) { largest = max(largest, lane_keys[lane + i * GROUP]); }
        column_words[lane] = largest;
    }
    workgroupBarrier();
    if (lane == 0u) {
        var largest = NO_KEY;
        for (var i = 0u; i < trips(GROUP); i++) { largest = max(largest, column_words[i]); }
        picked.x = largest;
    }
    return workgroupUniformLoad(&picked).x;
}

// The lowest of all lanes' ids, for all of them.
fn lowest_id(id: u32, lane: u32) -> u32 {
    return ~largest_key(~id, lane);
}

fn is_wanted(bits: u32, key: u32) -> bool {
    let is_nan = (bits & ~SIGN_BIT) > INFINITY_BITS;
    return select(key_of(bits) == key && !is_nan, is_nan, key == NAN_KEY);
}

// The first token whose key is the largest of all, `own` that of the lane's tokens; for NAN_KEY the first NaN. Few lanes
// have a part in it.
fn first_token(row: Row, lane: u32, own: u32, largest: u32) -> u32 {
    var first = NO_TOKEN;
    if (own == largest) {
        let share = share_of(row, lane);
        let edge = edge_of(row, lane);
        for (var block = share.first; block < share.end && first == NO_TOKEN; block += LOADS * GROUP) {
            let scores = load_scores(row, block, share.end);
            for (var c = 0u; c < LOADS; c++) {
                let id = id_of(row, block_at(block, c, share.end));
                for (var i = 0u; i < trips(4u); i++) {
                    if (is_wanted(scores[c][i], largest)) { first = min(first, id + i); }
                }
            }
        }
        if (edge != NO_TOKEN && is_wanted(load_score(row, edge), largest)) { first = min(first, edge); }
    }
    return lowest_id(first, lane);
}
