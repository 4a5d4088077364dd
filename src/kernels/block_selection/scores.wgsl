// Scores of blocks,
//
//     Σ_d q_d mean_d + |q_d| spread_d,
//
// the query's product with a key that is one standard deviation better than the block's mean in every column,
// as integer keys of the same order. ROW_LANES lanes share a block, and are a group: VECTORS vectors each of
// the mean, and as many of the spread, a trip; a group has BATCH blocks at a time.
//
// Said by the file joined to this one: `row_sum`, and `put_key`, which is told every block's key once.
//
// qkv is [sequences, 3, HEADS, HEAD_DIM4], k [heads here, blocks, KV_BLOCK, HEAD_DIM4], block_table [sequences,
// table_blocks], summaries [heads here, blocks, 2, HEAD_DIM4], selected [sequences, HEADS, 1 + table_blocks].
@group(0) @binding(0) var<storage, read> qkv: array<vec4<elem>>;
@group(0) @binding(1) var<storage, read> k: array<vec4<elem>>;
@group(0) @binding(2) var<storage, read> block_table: array<u32>;
@group(0) @binding(3) var<storage, read> sequences: array<Sequence>;
@group(0) @binding(4) var<storage, read_write> summaries: array<vec4<elem>>;
@group(0) @binding(5) var<storage, read_write> selected: array<u32>;

const GROUPS = LANES / ROW_LANES;
const STEP = GROUPS * BATCH;                                // blocks of all groups together
const TRIP4 = ROW_LANES * VECTORS;
const TRIPS = (HEAD_DIM4 + TRIP4 - 1u) / TRIP4;

const ZERO_KEY = 0x80000000u;                               // that of a score of 0

alias Places = array<u32, BATCH>;
alias Rows = array<vec4<elem>, BATCH * VECTORS>;

// Floats' order as integers, with one key for both zeros.
fn key_of(score: f32) -> u32 {
    let bits = bitcast<u32>(score);
    return select(select(bits | 0x80000000u, ~bits, bits >= 0x80000000u), ZERO_KEY, score == 0.0);
}

// Where in memory the blocks of a lane's group are, of the STEP from `first` on. Nothing of it waits for the
// sequence's length: what is behind its last block is no block.
fn places_of(sequence: u32, first: u32, lane: u32) -> Places {
    var places = Places();
    for (var i = 0u; i < BATCH; i++) {
        let block = min(first + i * GROUPS + lane / ROW_LANES, params.table_blocks - 1u);
        places[i] = block_table[sequence * params.table_blocks + block];
    }
    return places;
}

// Scores those of the STEP blocks from `first` on that have a score. `head` counts within the bound buffers.
fn score_blocks(places: Places, first: u32, row: u32, sequence: u32, head: u32, lane: u32) {
    let column = lane % ROW_LANES;
    let group = lane / ROW_LANES;
    let query = (3u * sequence * HEADS + params.first_head + head) * HEAD_DIM4;
    var from_block = Places();
    for (var i = 0u; i < BATCH; i++) {
        // Groups that are left over keep what they find at place 0 to themselves.
        let place = select(0u, places[i], has_score(first + i * GROUPS + group, row));
        from_block[i] = (head * params.blocks + place) * 2u * HEAD_DIM4;
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
                let from_row = from_block[i] + min(at + j * ROW_LANES, HEAD_DIM4 - 1u);
                means[i * VECTORS + j] = summaries[from_row];
                spreads[i * VECTORS + j] = summaries[from_row + HEAD_DIM4];
            }
        }
        for (var j = 0u; j < VECTORS; j++) {
            let d = at + j * ROW_LANES;
            let q = select(vec4f(0.0), vec4f(qkv[query + min(d, HEAD_DIM4 - 1u)]), d < HEAD_DIM4);
            for (var i = 0u; i < BATCH; i++) {
                sums[i] += dot(q, vec4f(means[i * VECTORS + j]));
                sums[i] += dot(abs(q), vec4f(spreads[i * VECTORS + j]));
            }
        }
    }
    for (var i = 0u; i < BATCH; i++) {
        let key = key_of(row_sum(sums[i], lane));
        let block = first + i * GROUPS + group;
        if (column == 0u && has_score(block, row)) { put_key(sequence, head, block, key); }
    }
}

// Writes the summary of the block that the step before has completed, if it has. No load of a summary may be
// moved before a store to one, so this is to stand last. Nobody reads this one in this step: its block is the
// last but one.
fn summarize_completed(length: u32, sequence: u32, head: u32, lane: u32) {
    if (length % KV_BLOCK == 0u && length > 0u) {
        let block = sequence * params.table_blocks + length / KV_BLOCK - 1u;
        summarize_block(head, block_table[block], lane);
    }
}
