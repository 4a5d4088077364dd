// The blocks of keys that a step of decoding attends to: one workgroup a (head, sequence). The first block
// and the two last are always among them, the others are those with the largest scores
//
//     Σ_d q_d mean_d + |q_d| spread_d,
//
// the query's product with a key that is one standard deviation better than the block's mean in every column.
//
// Four steps: scores become integer keys of the same order; a search narrows a bracket of keys down to the
// last one that is kept, by counting what falls into each of BINS parts of it; flags are added up so that
// every block that is kept knows its place; and if the step before has completed a block, its summary is
// written.
//
// Said by the file joined to this one: `main`, `row_sum`, `exclusive_sum` and `note_extremes`.
//
// qkv is [sequences, 3, HEADS, HEAD_DIM4], k [heads here, blocks, KV_BLOCK, HEAD_DIM4], block_table [sequences,
// table_blocks], summaries [heads here, blocks, 2, HEAD_DIM4], selected [sequences, HEADS, 1 + table_blocks].
@group(0) @binding(0) var<storage, read> qkv: array<vec4<elem>>;
@group(0) @binding(1) var<storage, read> k: array<vec4<elem>>;
@group(0) @binding(2) var<storage, read> block_table: array<u32>;
@group(0) @binding(3) var<storage, read> sequences: array<Sequence>;
@group(0) @binding(4) var<storage, read_write> summaries: array<vec4<elem>>;
@group(0) @binding(5) var<storage, read_write> selected: array<u32>;

// ROW_LANES lanes share a block, and are a group: VECTORS vectors each of the mean, and as many of the
// spread, a trip.
const GROUPS = LANES / ROW_LANES;
const STEP = GROUPS * BATCH;                                // blocks of all groups together
const TRIP4 = ROW_LANES * VECTORS;
const TRIPS = (HEAD_DIM4 + TRIP4 - 1u) / TRIP4;

const BINS = 256u;
const LANE_BINS = (BINS + LANES - 1u) / LANES;
const ZERO_KEY = 0x80000000u;                               // that of a score of 0

// A dense sequence apart, what is kept besides the blocks with the largest scores: the first and the two last.
const ALWAYS_KEPT = 3u;

alias Rows = array<vec4<elem>, BATCH * VECTORS>;

var<workgroup> query: array<vec4f, TRIPS * TRIP4>;          // zero behind its end
// By the block's number where it is in memory, then its score's key.
var<workgroup> keys: array<u32, CAPACITY>;
var<workgroup> extremes: array<atomic<u32>, 2>;             // of the range to search: end, ~beginning
var<workgroup> bins: array<atomic<u32>, BINS>;
var<workgroup> found: vec4u;                                // a bracket

// Floats' order as integers, with one key for both zeros.
fn key_of(score: f32) -> u32 {
    let bits = bitcast<u32>(score);
    return select(select(bits | 0x80000000u, ~bits, bits >= 0x80000000u), ZERO_KEY, score == 0.0);
}

// Whether a block is one of those that are chosen by their score; the last block is `row`.
fn has_score(block: u32, row: u32) -> bool {
    return block > 0u && block + 1u < row;
}

// Scores all blocks that have a score, as keys, and notes the range of keys that holds the goal-th largest:
// the largest of every group are enough to reach any goal up to their number. That is a fraction of the range
// of all, which scores on both sides of 0 make almost that of all floats.
fn score_blocks(head: u32, row: u32, goal: u32, lane: u32) {
    let column = lane % ROW_LANES;
    let group = lane / ROW_LANES;
    var largest = 0u;
    var smallest = ~0u;
    for (var first = 1u; first + 1u < row; first += STEP) {
        var places = array<u32, BATCH>();
        for (var i = 0u; i < BATCH; i++) {
            // Groups that are left over take block 0, whose entry stays what it is, and keep it to themselves.
            let block = first + i * GROUPS + group;
            let place = keys[select(0u, block, has_score(block, row))];
            places[i] = (head * params.blocks + place) * 2u * HEAD_DIM4;
        }
        var sums = array<f32, BATCH>();
        for (var t = 0u; t < trips(TRIPS); t++) {
            // Hidden by trips() too: from the length of an array that a loop walks software Vulkan guesses how
            // often to unroll it.
            let at = trips(t * TRIP4) + column;
            // Enough bytes are on their way only if all loads stand before anything that waits for one.
            var means = Rows();
            var spreads = Rows();
            for (var i = 0u; i < BATCH; i++) {
                for (var j = 0u; j < VECTORS; j++) {
                    let from_row = places[i] + min(at + j * ROW_LANES, HEAD_DIM4 - 1u);
                    means[i * VECTORS + j] = summaries[from_row];
                    spreads[i * VECTORS + j] = summaries[from_row + HEAD_DIM4];
                }
            }
            for (var j = 0u; j < VECTORS; j++) {
                let q = query[at + j * ROW_LANES];
                for (var i = 0u; i < BATCH; i++) {
                    sums[i] += dot(q, vec4f(means[i * VECTORS + j]));
                    sums[i] += dot(abs(q), vec4f(spreads[i * VECTORS + j]));
                }
            }
        }
        for (var i = 0u; i < BATCH; i++) {
            // All lanes of the group have read the block's place: the sum is of what they found there.
            let key = key_of(row_sum(sums[i], lane));
            let block = first + i * GROUPS + group;
            if (column == 0u && has_score(block, row)) {
                keys[block] = key;
                largest = max(largest, key);
                smallest = min(smallest, key);
            }
        }
    }
    let lowest = select(smallest, largest, goal <= min(GROUPS, row - 2u));
    note_extremes(select(vec2u(0u), vec2u(largest, ~lowest), column == 0u && has_score(1u + group, row)), lane);
    workgroupBarrier();
}

// Keys from `low` to `low + last`, above which there are `above`, less than the goal. Those of all keys from
// `low` on are `skip` more than the goal.
struct Bracket {
    low: u32,
    last: u32,
    above: u32,
    skip: u32,
}

fn unpack_bracket(words: vec4u) -> Bracket {
    return Bracket(words.x, words.y, words.z, words.w);
}

// The bracket that ends at the goal-th largest key: either all keys in it are kept, or it is of one key, and
// the first `skip` blocks that have it are not. Counts do not depend on the order in which lanes add to them.
fn narrow(row: u32, goal: u32, lane: u32) -> Bracket {
    let low = ~atomicLoad(&extremes[1]);
    var bracket = Bracket(low, atomicLoad(&extremes[0]) - low, 0u, 0u);
    loop {
        let shift = 24u - min(countLeadingZeros(bracket.last), 24u);
        for (var block = 1u + lane; block + 1u < row; block += LANES) {
            let key = keys[block];
            if (key >= bracket.low && key - bracket.low <= bracket.last) {
                atomicAdd(&bins[(key - bracket.low) >> shift], 1u);
            }
        }
        workgroupBarrier();
        // From the highest bin down.
        var count = 0u;
        for (var i = 0u; i < trips(LANE_BINS); i++) {
            let nth = lane * LANE_BINS + i;
            if (nth < BINS) { count += atomicLoad(&bins[BINS - 1u - nth]); }
        }
        var above = bracket.above + exclusive_sum(count, lane);
        for (var i = 0u; i < trips(LANE_BINS); i++) {
            let nth = lane * LANE_BINS + i;
            if (nth < BINS) {
                let bin = BINS - 1u - nth;
                let here = atomicExchange(&bins[bin], 0u);  // empty for the next time
                if (above < goal && above + here >= goal) {
                    found = vec4u(bracket.low + (bin << shift), (1u << shift) - 1u, above, above + here - goal);
                }
                above += here;
            }
        }
        bracket = unpack_bracket(workgroupUniformLoad(&found));
        if (bracket.skip == 0u || bracket.last == 0u) { break; }
    }
    return bracket;
}

// Writes the blocks that are kept in order, from selected[first] on.
fn list_blocks(first: u32, row: u32, bracket: Bracket, lane: u32) {
    // A run of blocks for each lane, so that lanes are in the order of their blocks.
    let run = (row + LANES) / LANES;
    let start = lane * run;
    let end = min(start + run, row + 1u);
    var counts = 0u;                                        // kept whatever ties say; ties << 16
    for (var block = start; block < end; block++) {
        if (!has_score(block, row) || keys[block] > bracket.low) {
            counts += 1u;
        } else if (keys[block] == bracket.low) {
            counts += 0x10000u;
        }
    }
    let before = exclusive_sum(counts, lane);
    var kept = before & 0xffffu;
    var ties = before >> 16u;
    for (var block = start; block < end; block++) {
        let is_kept = !has_score(block, row) || keys[block] > bracket.low;
        let is_tie = !is_kept && keys[block] == bracket.low;
        if (is_kept || (is_tie && ties >= bracket.skip)) {
            selected[first + kept + max(ties, bracket.skip) - bracket.skip] = block;
        }
        if (is_kept) { kept++; }
        if (is_tie) { ties++; }
    }
}

fn select_blocks(workgroup: vec3u, lane: u32) {
    let sequence = workgroup.y;
    let head = params.first_head + workgroup.x;
    let line = sequence * params.table_blocks;
    let list = (sequence * HEADS + head) * (1u + params.table_blocks);

    // These loads do not wait for the sequence's length.
    for (var i = lane; i < TRIPS * TRIP4; i += LANES) {
        let at = (3u * sequence * HEADS + head) * HEAD_DIM4 + min(i, HEAD_DIM4 - 1u);
        query[i] = select(vec4f(0.0), vec4f(qkv[at]), i < HEAD_DIM4);
    }
    for (var block = lane; block < params.table_blocks; block += LANES) {
        keys[block] = block_table[line + block];
    }
    let length = sequences[sequence].length;
    let row = length / KV_BLOCK;
    let is_dense = row < params.keep || row + 1u < params.least_blocks;
    if (lane == 0u) { selected[list] = select(params.keep, row + 1u, is_dense); }
    if (is_dense) {
        for (var block = lane; block <= row; block += LANES) { selected[list + 1u + block] = block; }
    } else {
        workgroupBarrier();
        let goal = params.keep - ALWAYS_KEPT;
        score_blocks(workgroup.x, row, goal, lane);
        list_blocks(list + 1u, row, narrow(row, goal, lane), lane);
    }
    // Last, because no load of a summary may be moved before a store to one. Nobody has read this one: its
    // block is the last but one.
    if (length % KV_BLOCK == 0u && length > 0u) {
        summarize_block(workgroup.x, block_table[line + row - 1u], lane);
    }
}
