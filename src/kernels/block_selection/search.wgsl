// Which blocks of those with a score have the goal-th largest keys, by all lanes of a workgroup: a search
// narrows a bracket of keys down to the last one that is kept, by counting what falls into each of BINS parts
// of it; then flags are added up so that every block that is kept knows its place among them. A run of blocks
// is a lane's own, so that lanes are in the order of their blocks.
//
// Said by the files joined to this one: `lane_run`, how many blocks are a lane's own; `lane_key`, the key of
// one of them, with its number and its place in the run; `list_block`, which is told every block that is kept
// with its place among them, and the `List` that it is handed; `exclusive_sum`, `group_max`, MAX_GROUP and
// `note_extremes`.
const BINS = 256u;
const LANE_BINS = (BINS + LANES - 1u) / LANES;

var<workgroup> extremes: array<atomic<u32>, 2>;             // of the range to search: end, ~beginning
var<workgroup> bins: array<atomic<u32>, BINS>;
var<workgroup> found: vec4u;                                // a bracket

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

// Notes a range of keys that holds the goal-th largest. The largest of every group of lanes are enough to
// reach any goal up to the number of groups, and groups are as large as that allows: the range is then a
// fraction of that of all keys, which scores on both sides of 0 make almost that of all floats.
fn note_range(row: u32, goal: u32, lane: u32) {
    let run = lane_run(row);
    var largest = 0u;                                       // of no score
    var smallest = ~0u;
    for (var i = 0u; i < run; i++) {
        let block = lane * run + i;
        if (has_score(block, row)) {
            let key = lane_key(block, i);
            largest = max(largest, key);
            smallest = min(smallest, key);
        }
    }
    // There are row - 2 scores, so at least as many groups that have one as this divided by a group's blocks.
    if (goal * run <= row - 2u) {
        var lanes = 1u;
        while (2u * lanes <= MAX_GROUP && 2u * lanes * goal * run <= row - 2u) { lanes *= 2u; }
        let of_group = group_max(largest, lanes);
        smallest = select(of_group, ~0u, of_group == 0u);
    }
    note_extremes(vec2u(largest, ~smallest), lane);
    workgroupBarrier();
}

// The bracket that ends at the goal-th largest key: either all keys in it are kept, or it is of one key, and
// the first `skip` blocks that have it are not. Counts do not depend on the order in which lanes add to them.
fn search(row: u32, goal: u32, lane: u32) -> Bracket {
    note_range(row, goal, lane);
    let run = lane_run(row);
    let low = ~atomicLoad(&extremes[1]);
    var bracket = Bracket(low, atomicLoad(&extremes[0]) - low, 0u, 0u);
    loop {
        let shift = 24u - min(countLeadingZeros(bracket.last), 24u);
        for (var i = 0u; i < run; i++) {
            let block = lane * run + i;
            if (has_score(block, row)) {
                let key = lane_key(block, i);
                if (key >= bracket.low && key - bracket.low <= bracket.last) {
                    atomicAdd(&bins[(key - bracket.low) >> shift], 1u);
                }
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

// Lists the blocks that are kept in order: all that have no score, and those that the bracket says. Brackets
// of zeros keep every block, whatever its key is.
fn list_blocks(list: List, row: u32, bracket: Bracket, lane: u32) {
    let run = lane_run(row);
    var counts = 0u;                                        // kept whatever ties say; ties << 16
    for (var i = 0u; i < run; i++) {
        let block = lane * run + i;
        if (block <= row) {
            let is_kept = !has_score(block, row) || lane_key(block, i) > bracket.low;
            let is_tie = !is_kept && lane_key(block, i) == bracket.low;
            counts += select(select(0u, 0x10000u, is_tie), 1u, is_kept);
        }
    }
    let before = exclusive_sum(counts, lane);
    var kept = before & 0xffffu;
    var ties = before >> 16u;
    for (var i = 0u; i < run; i++) {
        let block = lane * run + i;
        if (block <= row) {
            let is_kept = !has_score(block, row) || lane_key(block, i) > bracket.low;
            let is_tie = !is_kept && lane_key(block, i) == bracket.low;
            if (is_kept || (is_tie && ties >= bracket.skip)) {
                list_block(list, kept + max(ties, bracket.skip) - bracket.skip, block, i);
            }
            if (is_kept) { kept++; }
            if (is_tie) { ties++; }
        }
    }
}
