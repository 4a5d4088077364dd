// Draws a token of each row, one workgroup a sequence: temperature, top-k, top-p and min-p as src/model/sampling.ts
// defines them. Tokens rank by key and id, and each filter keeps those up to some token in that order, so what is kept
// is known by its last token. That one is found without sorting the row: what lies above a guess that the lanes' largest
// keys give fits a list, which as a rule has all that is kept: filters and draw then take place in it. Otherwise passes
// over the row measure how much (tokens, or their weights) lies above each of a few keys, which narrows the bracket that
// must hold the last token, until what is in the bracket fits the list; a bracket of equal keys is narrowed by id. All
// sums have a fixed order.
const LIST = 384u;

const PIVOTS = 4u;          // keys that a pass measures at, the last the bracket's own end
const FLOAT_MIN = 0x1p-126f;
const FLOAT_MAX = 0x1.fffffep127f;

var<workgroup> lane_words: array<vec4u, LANES>;
var<workgroup> sums: array<f32, LANES + GROUPS>;        // of lanes, then of groups
var<workgroup> random: f32;
var<workgroup> listed: u32;
var<workgroup> list_sum: f32;

// What is in a bracket, in the order in which the lanes found it.
var<workgroup> list_keys: array<u32, LIST>;
var<workgroup> list_ids: array<u32, LIST>;
var<workgroup> list_weights: array<f32, LIST>;

// The same by rank.
var<workgroup> ranked_keys: array<u32, LIST>;
var<workgroup> ranked_ids: array<u32, LIST>;

fn weight_of(score: f32, largest: f32) -> f32 {
    return exp((score - largest) * params.inverse_temperature);
}

// Whether a token is among those up to `last`.
fn is_kept(token: Ranked, last: Ranked) -> bool {
    return token.key > last.key || (token.key == last.key && token.id <= last.id);
}

// The sum over all lanes, for all of them.
fn total(value: vec4f, lane: u32) -> vec4f {
    lane_words[lane] = bitcast<vec4u>(value);
    workgroupBarrier();
    if (lane < GROUP) {
        var sum = vec4f(0.0);
        for (var i = 0u; i < trips(GROUPS); i++) { sum += bitcast<vec4f>(lane_words[lane + i * GROUP]); }
        lane_words[lane] = bitcast<vec4u>(sum);
    }
    workgroupBarrier();
    if (lane == 0u) {
        var sum = vec4f(0.0);
        for (var i = 0u; i < trips(GROUP); i++) { sum += bitcast<vec4f>(lane_words[i]); }
        picked = bitcast<vec4u>(sum);
    }
    return bitcast<vec4f>(workgroupUniformLoad(&picked));
}

// Where a lane's entries of a list begin if it has `count`: for each lane slots of its own, without a gap. How many slots
// all lanes have is in `listed`.
fn first_slot(count: u32, lane: u32) -> u32 {
    lane_keys[lane] = count;
    workgroupBarrier();
    if (lane < GROUP) {
        var slot = 0u;
        for (var i = 0u; i < trips(GROUPS); i++) {
            let here = lane_keys[lane + i * GROUP];
            lane_keys[lane + i * GROUP] = slot;
            slot += here;
        }
        column_words[lane] = slot;
    }
    workgroupBarrier();
    if (lane < GROUP) {
        var slot = 0u;
        var all = 0u;
        for (var i = 0u; i < trips(GROUP); i++) {
            let here = column_words[i];
            slot += select(0u, here, i < lane);
            all += here;
        }
        column_words[GROUP + lane] = slot;
        if (lane == 0u) { listed = all; }
    }
    workgroupBarrier();
    return column_words[GROUP + lane % GROUP] + lane_keys[lane];
}

// What a lane knows of its share of the row.
struct Own {
    edge: Ranked,       // with NO_KEY if it has none
    key: u32,           // the largest
    sum: f32,           // of weights, if they have been summed
}

struct Weighed { largest: f32, sum: f32 }

// A sum of weights relative to another largest score.
fn rescaled(weighed: Weighed, largest: f32) -> f32 {
    return select(weighed.sum * weight_of(weighed.largest, largest), 0.0, weighed.sum == 0.0);
}

// A lane's largest key, and in the same pass the sum of weights relative to the largest score so far: one that is not
// infinite, as the difference of infinities is no number.
fn weighed_share(row: Row, lane: u32, edge: Ranked) -> Own {
    let share = share_of(row, lane);
    var weighed = Weighed(max(score_of(edge.key), -FLOAT_MAX), 1.0);
    if (edge.key == NO_KEY) { weighed = Weighed(-FLOAT_MAX, 0.0); }
    if (edge.key == LOWEST_KEY) { weighed.sum = 0.0; }
    var key = edge.key;
    for (var block = share.first; block < share.end; block += LOADS * GROUP) {
        let scores = load_scores(row, block, share.end);
        var extent = no_extent();
        for (var c = 0u; c < LOADS; c++) { extent = extended(extent, scores[c]); }
        key = max(key, key_of_extent(extent));
        let largest = max(score_of(key), -FLOAT_MAX);
        var weights = vec4f(0.0);
        for (var c = 0u; c < LOADS; c++) {
            if (block + c * GROUP < share.end) {
                weights += exp((bitcast<vec4f>(scores[c]) - largest) * params.inverse_temperature);
            }
        }
        let sum = (weights.x + weights.y) + (weights.z + weights.w);
        weighed = Weighed(largest, rescaled(weighed, largest) + sum);
    }
    return Own(edge, key, weighed.sum);
}

// A key that about `rank` tokens or a few more exceed, and at least that many reach: the largest keys of SPREAD parts
// of the row are put in order. `lane_keys` has those of the lanes.
fn key_near_rank(rank: u32, lane: u32) -> u32 {
    if (lane < SPREAD) {
        var largest = NO_KEY;
        for (var i = 0u; i < trips(LANES / SPREAD); i++) { largest = max(largest, lane_keys[lane + i * SPREAD]); }
        list_keys[lane] = largest;
    }
    workgroupBarrier();
    // Lanes with the same part compare it with different others.
    let part = lane % SPREAD;
    let key = list_keys[part];
    let first = lane / SPREAD * (SPREAD * SPREAD / LANES);
    var before = 0u;
    for (var i = 0u; i < trips(SPREAD * SPREAD / LANES); i++) {
        let other = list_keys[first + i];
        before += select(0u, 1u, other > key || (other == key && first + i < part));
    }
    lane_keys[lane] = before;
    workgroupBarrier();
    if (lane < SPREAD) {
        var parts_before = 0u;
        for (var i = 0u; i < trips(LANES / SPREAD); i++) { parts_before += lane_keys[lane + i * SPREAD]; }
        if (parts_before == rank) { picked.x = key; }
    }
    return workgroupUniformLoad(&picked).x;
}

// Places from low on and below high, in the order that is sought through: keys, or, among tokens of one key, what is
// left of the vocabulary behind an id.
struct Bracket {
    low: u32,
    high: u32,
    is_by_id: bool,
    key: u32,           // by id: that of all
}

fn is_within(bracket: Bracket, token: Ranked) -> bool {
    let place = select(token.key, params.vocab - token.id, bracket.is_by_id);
    return place >= bracket.low && place < bracket.high && (!bracket.is_by_id || token.key == bracket.key);
}

// Lists the tokens up to `last` that are in a bracket, unless there are more than LIST; returns how many there are.
fn gathered(row: Row, lane: u32, own: Own, bracket: Bracket, last: Ranked) -> u32 {
    let share = share_of(row, lane);
    let steps_a_bit = (run_length(row) / GROUP + 31u) / 32u;
    var count = 0u;
    var steps_with_any = 0u;        // a bit for some of the lane's blocks
    // Of most lanes no token is as large as that.
    if (own.key >= select(bracket.low, bracket.key, bracket.is_by_id)) {
        var step = 0u;
        for (var block = share.first; block < share.end; block += LOADS * GROUP) {
            let scores = load_scores(row, block, share.end);
            for (var c = 0u; c < LOADS; c++) {
                if (block + c * GROUP < share.end) {
                    let id = id_of(row, block + c * GROUP);
                    var count_here = 0u;
                    for (var i = 0u; i < trips(4u); i++) {
                        let token = Ranked(key_of(scores[c][i]), id + i);
                        count_here += select(0u, 1u, is_within(bracket, token) && is_kept(token, last));
                    }
                    count += count_here;
                    steps_with_any |= select(0u, 1u << ((step + c) / steps_a_bit), count_here > 0u);
                }
            }
            step += LOADS;
        }
    }
    let is_edge_listed = own.edge.key != NO_KEY && is_within(bracket, own.edge) && is_kept(own.edge, last);
    count += select(0u, 1u, is_edge_listed);
    var slot = first_slot(count, lane);
    let all = workgroupUniformLoad(&listed);
    if (all <= LIST) {
        if (is_edge_listed) {
            list_keys[slot] = own.edge.key;
            list_ids[slot] = own.edge.id;
            slot++;
        }
        while (steps_with_any != 0u) {
            let first = share.first + firstTrailingBit(steps_with_any) * steps_a_bit * GROUP;
            steps_with_any &= steps_with_any - 1u;
            for (var block = first; block < min(first + steps_a_bit * GROUP, share.end); block += GROUP) {
                for (var i = 0u; i < trips(4u); i++) {
                    let id = id_of(row, block) + i;
                    let token = Ranked(key_of(load_score(row, id)), id);
                    if (is_within(bracket, token) && is_kept(token, last)) {
                        list_keys[slot] = token.key;
                        list_ids[slot] = token.id;
                        slot++;
                    }
                }
            }
        }
    }
    workgroupBarrier();
    return all;
}

struct Choice { token: u32, sum: f32 }

// Filters and draws among `count` listed tokens, before which no other ranks. The sum that top-p is to reach is `goal`,
// or if that is 0 a part of what top-k leaves. If the list ends before it is reached, the last token is the last that is
// kept, or with `is_partial` there is NO_TOKEN and the sum of the list.
fn drawn_in_list(count: u32, goal: f32, is_partial: bool, lane: u32, largest: f32) -> Choice {
    for (var i = lane; i < count; i += LANES) {
        let token = Ranked(list_keys[i], list_ids[i]);
        var rank = 0u;
        for (var j = 0u; j < count; j++) {
            rank += select(0u, 1u, is_before(Ranked(list_keys[j], list_ids[j]), token));
        }
        ranked_keys[rank] = token.key;
        ranked_ids[rank] = token.id;
        list_weights[rank] = weight_of(score_of(token.key), largest);
    }
    workgroupBarrier();
    // All lanes add weights up in the same order: the sums grow to the last bit, so exactly one token is the first with
    // which they reach the goal.
    var kept = min(count, params.top_k);
    if (params.top_p < 1.0) {
        if (lane == 0u) { picked.x = NO_TOKEN; }
        workgroupBarrier();
        for (var i = lane; i < kept; i += LANES) {
            var sum = 0.0;
            var before = 0.0;
            var through = 0.0;
            for (var j = 0u; j < kept; j++) {
                if (j == i) { before = sum; }
                sum += list_weights[j];
                if (j == i) { through = sum; }
            }
            let end = select(goal, max(params.top_p * sum, FLOAT_MIN), goal == 0.0);
            if (before < end && (through >= end || (i == kept - 1u && !is_partial))) { picked.x = i; }
            if (i == 0u) { list_sum = sum; }
        }
        let end = workgroupUniformLoad(&picked).x;
        if (end == NO_TOKEN) { return Choice(NO_TOKEN, workgroupUniformLoad(&list_sum)); }
        kept = end + 1u;
    }
    // In order of ids; the list is no longer needed.
    for (var i = lane; i < kept; i += LANES) {
        let id = ranked_ids[i];
        var place = 0u;
        for (var j = 0u; j < kept; j++) { place += select(0u, 1u, ranked_ids[j] < id); }
        let is_likely = score_of(ranked_keys[i]) - largest >= params.min_p_distance;
        list_ids[place] = id;
        list_keys[place] = bitcast<u32>(select(0.0, list_weights[i], is_likely));
    }
    workgroupBarrier();
    for (var i = lane; i < kept; i += LANES) {
        var sum = 0.0;
        var before = 0.0;
        var through = 0.0;
        for (var j = 0u; j < kept; j++) {
            if (j == i) { before = sum; }
            sum += bitcast<f32>(list_keys[j]);
            if (j == i) { through = sum; }
        }
        let end = random * sum;
        if (before <= end && through > end) { picked.x = list_ids[i]; }
    }
    return Choice(workgroupUniformLoad(&picked).x, 0.0);
}

// Where a filter ends, as far as that is known.
struct Search {
    bracket: Bracket,
    count_above: u32,   // tokens above the bracket
    above: f32,         // what is measured of them: less than the goal
    goal: f32,          // 0 while it is unknown
    found: u32,         // tokens in the bracket
}

// Places to measure at, in decreasing order, all within the bracket. Equal steps of the score soon separate the scores
// of a usual row; equal steps of the key do for any, so they take turns. The first time, the score that a filter ends at
// is likely to be nearer to the upper end than to the lower, which is within `depth` of it.
fn pivots_of(bracket: Bracket, pass_number: u32, depth: f32) -> vec4u {
    let low = bracket.low;
    let length = bracket.high - low;
    let steps = vec3u(3u, 2u, 1u);
    var pivots = low + min(steps * max(length / PIVOTS, 1u), vec3u(length - 1u));
    if (!bracket.is_by_id && (pass_number == 0u || pass_number % 2u == 1u)) {
        let high_score = score_of(bracket.high);
        let from_low = mix(vec3f(score_of(low)), vec3f(high_score), vec3f(steps) / f32(PIVOTS));
        let from_high = high_score - depth * vec3f(0.1, 0.2, 0.5);
        let scores = bitcast<vec3u>(select(from_low, from_high, pass_number == 0u));
        pivots = clamp(
            vec3u(key_of(scores.x), key_of(scores.y), key_of(scores.z)),
            vec3u(low + 1u),
            vec3u(bracket.high - 1u),
        );
    }
    return vec4u(pivots, low);
}

struct Measured { counts: vec4f, weights: vec4f }

fn measured(row: Measured, token: Ranked, search: Search, pivots: vec4u, is_by_weight: bool, largest: f32) -> Measured {
    let place = select(token.key, params.vocab - token.id, search.bracket.is_by_id);
    let is_reached = vec4u(place) >= pivots;
    var weights = row.weights;
    if (is_by_weight) {
        weights += select(vec4f(0.0), vec4f(weight_of(score_of(token.key), largest)), is_reached);
    }
    // As f32 they are exact: a vocabulary has less than 2^24 tokens.
    return Measured(row.counts + select(vec4f(0.0), vec4f(1.0), is_reached), weights);
}

// Narrows a bracket, among the tokens up to `last`, until what is in it fits the list.
fn narrowed(row: Row, lane: u32, own: Own, start: Search, is_by_weight: bool, largest: f32, last: Ranked) -> Search {
    let share = share_of(row, lane);
    var search = start;
    var goal = select(f32(params.top_k), start.goal, is_by_weight);
    for (var pass_number = 0u; ; pass_number++) {
        let pivots = pivots_of(search.bracket, pass_number, params.top_p_depth);
        var of_lane = Measured(vec4f(0.0), vec4f(0.0));
        for (var block = share.first; block < share.end; block += LOADS * GROUP) {
            let scores = load_scores(row, block, share.end);
            for (var c = 0u; c < LOADS; c++) {
                if (block + c * GROUP < share.end) {
                    let id = id_of(row, block + c * GROUP);
                    for (var i = 0u; i < trips(4u); i++) {
                        let token = Ranked(key_of(scores[c][i]), id + i);
                        if (is_within(search.bracket, token) && is_kept(token, last)) {
                            of_lane = measured(of_lane, token, search, pivots, is_by_weight, largest);
                        }
                    }
                }
            }
        }
        if (own.edge.key != NO_KEY && is_within(search.bracket, own.edge) && is_kept(own.edge, last)) {
            of_lane = measured(of_lane, own.edge, search, pivots, is_by_weight, largest);
        }
        let counts = total(of_lane.counts, lane);
        var sums_of_row = counts;
        if (is_by_weight) {
            sums_of_row = total(of_lane.weights, lane);
            // At least the largest, whose weight is 1.
            if (goal == 0.0) { goal = max(params.top_p * sums_of_row.w, FLOAT_MIN); }
            search.goal = goal;
        }
        // The highest pivot that reaches the goal, or the bracket's end, which does but for rounding.
        var p = 0u;
        while (p < PIVOTS - 1u && search.above + sums_of_row[p] < goal) { p++; }
        search.found = u32(counts[p]);
        if (p > 0u) {
            search.above += sums_of_row[p - 1u];
            search.count_above += u32(counts[p - 1u]);
            search.found -= u32(counts[p - 1u]);
            search.bracket.high = pivots[p - 1u];
        }
        search.bracket.low = pivots[p];
        if (search.found <= LIST) { break; }
        if (search.bracket.high - search.bracket.low == 1u && !search.bracket.is_by_id) {
            search.bracket = Bracket(1u, params.vocab + 1u, true, search.bracket.low);
        }
    }
    return search;
}

// The last token that a filter keeps, of those up to `last`: the listed one with which their number or weight reaches its
// goal.
fn last_in_list(search: Search, is_by_weight: bool, lane: u32, largest: f32, last: Ranked) -> Ranked {
    if (search.found == 0u) {       // rounding: all that is above the bracket just fails to reach the goal
        var end = Ranked(search.bracket.low, NO_TOKEN);
        if (search.bracket.is_by_id) { end = Ranked(search.bracket.key, params.vocab - search.bracket.low); }
        if (is_before(last, end)) { return last; }
        return end;
    }
    for (var i = lane; i < search.found; i += LANES) {
        list_weights[i] = select(1.0, weight_of(score_of(list_keys[i]), largest), is_by_weight);
    }
    workgroupBarrier();
    let goal = select(f32(params.top_k), search.goal, is_by_weight);
    // `through` and `before` are sums over the list in its own order: they grow with the rank to the last bit, so that
    // exactly one token is the first to reach the goal. If rounding keeps all from it, the last will do.
    for (var i = lane; i < search.found; i += LANES) {
        let token = Ranked(list_keys[i], list_ids[i]);
        var rank = 0u;
        var before = 0.0;
        var through = 0.0;
        for (var j = 0u; j < search.found; j++) {
            let is_earlier = is_before(Ranked(list_keys[j], list_ids[j]), token);
            rank += select(0u, 1u, is_earlier);
            before += select(0.0, list_weights[j], is_earlier);
            through += select(0.0, list_weights[j], is_earlier || i == j);
        }
        let is_first = search.above + before < goal && search.above + through >= goal;
        if (is_first || (search.above + through < goal && rank == search.found - 1u)) {
            picked = vec4u(token.key, token.id, 0u, 0u);
        }
    }
    let words = workgroupUniformLoad(&picked);
    return Ranked(words.x, words.y);
}

struct Run { index: u32, before: f32 }

// The first of `count` sums with which their running total exceeds `goal`; the last that is not 0 if rounding keeps it
// below.
fn choose(start: u32, count: u32, goal: f32) -> Run {
    var run = Run(0u, 0.0);
    var running = 0.0;
    for (var i = 0u; i < trips(count); i++) {
        let sum = sums[start + i];
        if (sum > 0.0 && running <= goal) { run = Run(i, running); }
        running += sum;
    }
    return run;
}

// Behind it, and a barrier, `sums` has the lanes' sums and those of groups.
fn add_groups(sum: f32, lane: u32) {
    sums[lane] = sum;
    workgroupBarrier();
    if (lane < GROUPS) {
        var group_sum = 0.0;
        // Each begins with another column: the banks of workgroup memory are then read side by side.
        for (var i = 0u; i < trips(GROUP); i++) { group_sum += sums[lane * GROUP + (lane + i) % GROUP]; }
        sums[LANES + lane] = group_sum;
    }
    workgroupBarrier();
}

// 0 for those that the filters do not keep.
fn kept_weight(token: Ranked, largest: f32, last: Ranked) -> f32 {
    let score = score_of(token.key);
    let is_likely = score - largest >= params.min_p_distance;
    return select(0.0, weight_of(score, largest), is_likely && is_kept(token, last));
}

fn kept_weights(row: Row, lane: u32, own: Own, largest: f32, last: Ranked) -> f32 {
    let share = share_of(row, lane);
    var sum = 0.0;
    for (var block = share.first; block < share.end; block += LOADS * GROUP) {
        let scores = load_scores(row, block, share.end);
        for (var c = 0u; c < LOADS; c++) {
            if (block + c * GROUP < share.end) {
                let id = id_of(row, block + c * GROUP);
                for (var i = 0u; i < trips(4u); i++) {
                    sum += kept_weight(Ranked(key_of(scores[c][i]), id + i), largest, last);
                }
            }
        }
    }
    if (own.edge.key != NO_KEY) { sum += kept_weight(own.edge, largest, last); }
    return sum;
}

// The first token, in order of ids, whose cumulative weight exceeds a random part of all: the run of the group in which
// that happens is divided among all lanes, then one of them looks for it. `sum` is that of the lane's share.
fn drawn_in_row(row: Row, lane: u32, sum: f32, largest: f32, last: Ranked) -> u32 {
    add_groups(sum, lane);
    if (lane == 0u) {
        var goal = 0.0;
        for (var g = 0u; g < trips(GROUPS); g++) { goal += sums[LANES + g]; }
        goal *= random;
        let run = choose(LANES, GROUPS, goal);
        picked = vec4u(run.index, bitcast<u32>(goal - run.before), 0u, 0u);
    }
    let of_row = workgroupUniformLoad(&picked);
    // The edges belong to the first and to the last group.
    let first_block = of_row.x * run_length(row);
    let first = select(id_of(row, min(first_block, row.blocks)), 0u, of_row.x == 0u);
    let behind = id_of(row, min(first_block + run_length(row), row.blocks));
    let end = select(behind, params.vocab, of_row.x == GROUPS - 1u);
    let length = (end - first + LANES - 1u) / LANES;
    var running = 0.0;
    for (var i = 0u; i < length; i++) {
        let id = first + lane * length + i;
        if (id < end) { running += kept_weight(Ranked(key_of(load_score(row, id)), id), largest, last); }
    }
    add_groups(running, lane);
    if (lane == 0u) {
        let goal = bitcast<f32>(of_row.y);
        let group = choose(LANES, GROUPS, goal);
        let of_group = choose(group.index * GROUP, GROUP, goal - group.before);
        picked = vec4u(group.index * GROUP + of_group.index, bitcast<u32>(goal - group.before - of_group.before), 0u, 0u);
    }
    let of_run = workgroupUniformLoad(&picked);
    if (lane == of_run.x) {
        running = 0.0;
        for (var i = 0u; i < length; i++) {
            let id = first + lane * length + i;
            if (id < end) {
                let weight = kept_weight(Ranked(key_of(load_score(row, id)), id), largest, last);
                if (weight > 0.0 && running <= bitcast<f32>(of_run.y)) { picked.x = id; }
                running += weight;
            }
        }
    }
    return workgroupUniformLoad(&picked).x;
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) workgroup: vec3u, @builtin(local_invocation_index) lane: u32) {
    let row = row_of(workgroup.x);
    let sequence = params.first_sequence + row.index;
    let has_top_k = params.top_k < params.vocab;
    let has_top_p = params.top_p < 1.0;
    let has_min_p = params.min_p_distance > -FLOAT_MAX;
    // By a lane whose group has nothing else to do.
    if (lane == LANES - 1u) { random = uniform_number(sequences[sequence]); }

    var edge = Ranked(NO_KEY, edge_of(row, lane));
    if (edge.id != NO_TOKEN) { edge.key = key_of_extent(extended(no_extent(), vec4u(load_score(row, edge.id)))); }
    var own = Own(edge, NO_KEY, 0.0);
    // Without top-k the sum of all weights is needed.
    if (has_top_k || (has_min_p && !has_top_p)) {
        own.key = lane_key(row, lane);
    } else {
        own = weighed_share(row, lane, edge);
    }
    let largest_of_row = largest_key(own.key, lane);
    if (largest_of_row == NAN_KEY || largest_of_row == key_of(INFINITY_BITS) || largest_of_row == LOWEST_KEY) {
        let id = first_token(row, lane, own.key, largest_of_row);
        if (lane == 0u) { record(sequence, result_of(Ranked(largest_of_row, id))); }
        return;
    }
    let largest = score_of(largest_of_row);
    own.sum = rescaled(Weighed(max(score_of(own.key), -FLOAT_MAX), own.sum), largest);

    let all = Search(Bracket(LOWEST_KEY, largest_of_row + 1u, false, NO_KEY), 0u, 0.0, 0.0, 0u);
    var search = all;
    var is_by_weight = !has_top_k;
    if (has_top_p && is_by_weight) { search.goal = max(params.top_p * total(vec4f(own.sum), lane).x, FLOAT_MIN); }
    // With top-p alone, a guess of which the list is likely to hold twice what it leaves.
    let rank = select(SPREAD / 8u * 7u, params.top_k - 1u, has_top_k);
    var is_guess = rank < SPREAD;
    var last = Ranked(NO_KEY, NO_TOKEN);
    var id = NO_TOKEN;
    while (id == NO_TOKEN && (has_top_k || has_top_p)) {
        if (is_guess) {
            search.bracket.low = max(key_near_rank(rank, lane), LOWEST_KEY);
        } else {
            search = narrowed(row, lane, own, search, is_by_weight, largest, last);
        }
        // Whether the list has room for all that is kept.
        let is_whole = is_guess || (!search.bracket.is_by_id && search.count_above + search.found <= LIST);
        if (is_whole) { search.bracket.high = all.bracket.high; }
        let count = gathered(row, lane, own, search.bracket, last);
        if (!is_whole) {
            last = last_in_list(search, is_by_weight, lane, largest, last);
            if (is_by_weight || !has_top_p) { break; }
            is_by_weight = true;
            search = all;
        } else if (count <= LIST) {
            let is_partial = is_guess && is_by_weight && search.bracket.low > LOWEST_KEY;
            let choice = drawn_in_list(count, search.goal, is_partial, lane, largest);
            id = choice.token;
            search.count_above = count;
            search.above = choice.sum;
            search.bracket.high = search.bracket.low;
            search.bracket.low = LOWEST_KEY;
        } else if (is_by_weight) {
            search.bracket.low = LOWEST_KEY;
        }
        is_guess = false;
    }
    if (id == NO_TOKEN) {
        if (has_top_k || has_top_p || has_min_p) { own.sum = kept_weights(row, lane, own, largest, last); }
        id = drawn_in_row(row, lane, own.sum, largest, last);
    }
    if (lane == 0u) { record(sequence, Result(id, NO_PROBLEM, 0u)); }
}
