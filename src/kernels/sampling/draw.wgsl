// Draws a token of each row, one workgroup a sequence: temperature, top-k, top-p and min-p as src/model/sampling.ts
// defines them. Tokens rank by score and id, and each filter keeps those up to some token in that order, so what is kept
// is known by its last token. That one is found without sorting: a pass over the row measures how much (tokens, or
// their weights) lies above each of a few scores, which narrows the bracket that must hold it, until what is in the
// bracket fits a list; a bracket of equal scores is narrowed by id. All sums have a fixed order.
const LIST = 256u;

const PIVOTS = 4u;          // scores that a pass measures at, the last the bracket's own end
const LOWEST_KEY = ~(INFINITY_BITS | 0x80000000u);      // that of -infinity
const FLOAT_MIN = 0x1p-126f;

var<workgroup> sums: array<f32, LANES + GROUPS>;        // of lanes, then of groups
var<workgroup> picked: vec4u;
var<workgroup> random: f32;
var<workgroup> last_kept: vec4u;

// What is in the bracket, in the order in which the lanes found it.
var<workgroup> list_scores: array<f32, LIST>;
var<workgroup> list_ids: array<u32, LIST>;
var<workgroup> list_weights: array<f32, LIST>;

fn weight_of(score: f32, largest: f32) -> f32 {
    return exp((score - largest) * params.inverse_temperature);
}

// Whether a token is among those up to `last`.
fn is_kept(token: Ranked, last: Ranked) -> bool {
    return token.score > last.score || (token.score == last.score && token.id <= last.id);
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
        lane_words[0] = bitcast<vec4u>(sum);
    }
    return bitcast<vec4f>(workgroupUniformLoad(&lane_words[0]));
}

// Where a lane's entries of a list begin if it has `count`: for each lane slots of its own, without a gap.
fn first_slot(count: u32, lane: u32) -> u32 {
    lane_words[lane].x = count;
    workgroupBarrier();
    if (lane < GROUP) {
        var slot = 0u;
        for (var i = 0u; i < trips(GROUPS); i++) {
            let here = lane_words[lane + i * GROUP].x;
            lane_words[lane + i * GROUP].x = slot;
            slot += here;
        }
        lane_words[lane].y = slot;
    }
    workgroupBarrier();
    var slot = lane_words[lane].x;
    for (var i = 0u; i < lane % GROUP; i++) { slot += lane_words[i].y; }
    workgroupBarrier();
    return slot;
}

// Positions from low on and below high, in the order that is sought through: keys of scores, or, among tokens whose
// scores are equal, what is left of the vocabulary behind an id. Floats stand for both, so one comparison serves.
struct Bracket {
    low: u32,
    high: u32,
    is_by_id: bool,
    ties_from: f32,     // by id, the scores that count as equal: not below this, and below ties_below
    ties_below: f32,
}

struct Range { low: f32, high: f32 }

fn place_of(bracket: Bracket, position: u32) -> f32 {
    return select(score_of(position), f32(position), bracket.is_by_id);
}

// What is behind all there is stands for infinity: the float next to the largest score may be one that is taken for 0.
fn high_score(bracket: Bracket, top: u32) -> f32 {
    return score_of(select(bracket.high, INFINITY_BITS | 0x80000000u, bracket.high == top));
}

fn range_of(bracket: Bracket, top: u32) -> Range {
    let high = select(high_score(bracket, top), f32(bracket.high), bracket.is_by_id);
    return Range(place_of(bracket, bracket.low), high);
}

fn place_in(bracket: Bracket, token: Ranked) -> f32 {
    return select(token.score, f32(params.vocab - token.id), bracket.is_by_id);
}

// Of most tokens the first comparison says that they are not.
fn is_within(bracket: Bracket, range: Range, token: Ranked) -> bool {
    let place = place_in(bracket, token);
    return place >= range.low && place < range.high &&
        (!bracket.is_by_id || (token.score >= bracket.ties_from && token.score < bracket.ties_below));
}

// Positions to measure at, in decreasing order, all within the bracket. Equal steps of the score soon separate the
// scores of a usual row; equal steps of the key do for any, so they take turns. The first time, the score that a filter
// ends at is likely to be within `depth` of the largest.
fn pivots_of(bracket: Bracket, pass_number: u32, largest: f32, depth: f32) -> vec4u {
    let low = bracket.low;
    let length = bracket.high - low;
    let steps = vec3u(3u, 2u, 1u);
    var pivots = low + min(steps * max(length / PIVOTS, 1u), vec3u(length - 1u));
    if (!bracket.is_by_id && (pass_number == 0u || pass_number % 2u == 1u)) {
        let from_low = mix(vec3f(score_of(low)), vec3f(score_of(bracket.high)), vec3f(steps) / f32(PIVOTS));
        let from_largest = largest - depth * vec3f(0.25, 0.5, 1.0);
        let scores = select(from_low, from_largest, pass_number == 0u);
        let keys = vec3u(key_of(scores.x), key_of(scores.y), key_of(scores.z));
        pivots = clamp(keys, vec3u(low + 1u), vec3u(bracket.high - 1u));
    }
    return vec4u(pivots, low);
}

// The last token that a filter keeps of those up to `last`: the one with which their number or weight reaches its goal.
fn last_token(row: u32, lane: u32, is_by_weight: bool, best: Best, last: Ranked) -> Ranked {
    let largest = best.token.score;
    let share = share_of(0u, params.vocab, lane);
    let top = key_of(largest) + 1u;
    let depth = select(largest - best.lowest, params.top_p_depth, is_by_weight);
    var bracket = Bracket(LOWEST_KEY, top, false, 0.0, 0.0);
    var goal = f32(params.top_k);
    var above = 0.0;        // what is measured above the bracket: less than the goal
    var found = 0u;         // tokens in the bracket
    var found_here = 0u;    // those of this lane's share
    for (var pass_number = 0u; ; pass_number++) {
        let range = range_of(bracket, top);
        let pivots = pivots_of(bracket, pass_number, largest, depth);
        let ends = vec4f(
            place_of(bracket, pivots.x),
            place_of(bracket, pivots.y),
            place_of(bracket, pivots.z),
            place_of(bracket, pivots.w),
        );
        var lane_counts = vec4f(0.0);
        var lane_weights = vec4f(0.0);
        for (var id = share.first; id < share.end; id += LOADS * GROUP) {
            let scores = load_scores(row, id, share.end);
            for (var c = 0u; c < LOADS; c++) {
                let token = Ranked(scores[c], id + c * GROUP);
                if (is_within(bracket, range, token) && token.id < share.end && is_kept(token, last)) {
                    let is_reached = vec4f(place_in(bracket, token)) >= ends;
                    lane_counts += select(vec4f(0.0), vec4f(1.0), is_reached);
                    if (is_by_weight) {
                        lane_weights += select(vec4f(0.0), vec4f(weight_of(token.score, largest)), is_reached);
                    }
                }
            }
        }
        // As f32 they are exact: a vocabulary has less than 2^24 tokens.
        let counts = total(lane_counts, lane);
        var measured = counts;
        if (is_by_weight) {
            measured = total(lane_weights, lane);
            // At least the largest, whose weight is 1.
            if (pass_number == 0u) { goal = max(params.top_p * measured.w, FLOAT_MIN); }
        }
        // The highest pivot that reaches the goal, or the bracket's end, which does but for rounding.
        var p = 0u;
        while (p < PIVOTS - 1u && above + measured[p] < goal) { p++; }
        found = u32(counts[p]);
        found_here = u32(lane_counts[p]);
        if (p > 0u) {
            above += measured[p - 1u];
            found -= u32(counts[p - 1u]);
            found_here -= u32(lane_counts[p - 1u]);
            bracket.high = pivots[p - 1u];
        }
        bracket.low = pivots[p];
        if (found <= LIST) { break; }
        if (bracket.high - bracket.low == 1u && !bracket.is_by_id) {
            bracket = Bracket(1u, params.vocab + 1u, true, score_of(bracket.low), high_score(bracket, top));
        }
    }
    if (found == 0u) {      // rounding: all that is above the bracket just fails to reach the goal
        var end = Ranked(score_of(bracket.low), NO_TOKEN);
        if (bracket.is_by_id) { end = Ranked(bracket.ties_from, params.vocab - bracket.low); }
        if (is_before(last, end)) { return last; }
        return end;
    }

    let range = range_of(bracket, top);
    var slot = first_slot(found_here, lane);
    let end_slot = slot + found_here;
    for (var id = share.first; id < share.end && slot < end_slot; id += LOADS * GROUP) {
        let scores = load_scores(row, id, share.end);
        for (var c = 0u; c < LOADS; c++) {
            let token = Ranked(scores[c], id + c * GROUP);
            if (is_within(bracket, range, token) && token.id < share.end && is_kept(token, last)) {
                list_scores[slot] = token.score;
                list_ids[slot] = token.id;
                list_weights[slot] = select(1.0, weight_of(token.score, largest), is_by_weight);
                slot++;
            }
        }
    }
    workgroupBarrier();
    // `through` and `before` are sums over the list in its own order: they grow with the rank to the last bit, so that
    // exactly one token is the first to reach the goal. If rounding keeps all from it, the last will do.
    for (var i = lane; i < found; i += LANES) {
        let token = Ranked(list_scores[i], list_ids[i]);
        var rank = 0u;
        var before = 0.0;
        var through = 0.0;
        for (var j = 0u; j < found; j++) {
            let is_earlier = is_before(Ranked(list_scores[j], list_ids[j]), token);
            rank += select(0u, 1u, is_earlier);
            before += select(0.0, list_weights[j], is_earlier);
            through += select(0.0, list_weights[j], is_earlier || i == j);
        }
        let is_first = above + before < goal && above + through >= goal;
        if (is_first || (above + through < goal && rank == found - 1u)) {
            last_kept = vec4u(bitcast<u32>(token.score), token.id, 0u, 0u);
        }
    }
    let words = workgroupUniformLoad(&last_kept);
    return Ranked(bitcast<f32>(words.x), words.y);
}

struct Choice { index: u32, before: f32 }

// The first of `count` sums with which their running total exceeds `goal`; the last that is not 0 if rounding keeps it
// below.
fn choose(start: u32, count: u32, goal: f32) -> Choice {
    var choice = Choice(0u, 0.0);
    var running = 0.0;
    for (var i = 0u; i < trips(count); i++) {
        let sum = sums[start + i];
        if (sum > 0.0 && running <= goal) { choice = Choice(i, running); }
        running += sum;
    }
    return choice;
}

// The first token, in order of ids, whose cumulative weight exceeds a random part of all: the run of ids in which that
// happens is divided among the groups until each has one id a lane.
fn drawn_token(row: u32, lane: u32, largest: f32, last: Ranked) -> u32 {
    // By a lane whose group has nothing else to do afterwards.
    if (lane == LANES - 1u) { random = uniform_number(sequences[params.first_sequence + row]); }
    var first = 0u;
    var length = params.vocab;
    var goal = 0.0;
    for (var level = 0u; ; level++) {
        let share = share_of(first, length, lane);
        var sum = 0.0;
        for (var id = share.first; id < share.end; id += LOADS * GROUP) {
            let scores = load_scores(row, id, share.end);
            for (var c = 0u; c < LOADS; c++) {
                let token = Ranked(scores[c], id + c * GROUP);
                let is_likely = token.score - largest >= params.min_p_distance;
                if (token.id < share.end && is_likely && is_kept(token, last)) {
                    sum += weight_of(token.score, largest);
                }
            }
        }
        sums[lane] = sum;
        workgroupBarrier();
        if (lane < GROUPS) {
            var group_sum = 0.0;
            // Each begins with another column: the banks of workgroup memory are then read side by side.
            for (var i = 0u; i < trips(GROUP); i++) { group_sum += sums[lane * GROUP + (lane + i) % GROUP]; }
            sums[LANES + lane] = group_sum;
        }
        workgroupBarrier();
        let run = (length + LANES - 1u) / LANES * GROUP;
        if (lane == 0u) {
            if (level == 0u) {
                for (var g = 0u; g < trips(GROUPS); g++) { goal += sums[LANES + g]; }
                goal *= random;
            }
            let group = choose(LANES, GROUPS, goal);
            var chosen = group.index * run;
            if (run == GROUP) { chosen += choose(group.index * GROUP, GROUP, goal - group.before).index; }
            goal -= group.before;
            picked = vec4u(first + chosen, 0u, 0u, 0u);
        }
        let id = workgroupUniformLoad(&picked).x;
        if (run == GROUP) { return id; }
        length = min(run, first + length - id);
        first = id;
    }
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) workgroup: vec3u, @builtin(local_invocation_index) lane: u32) {
    let row = workgroup.x;
    let best = best_token(row, lane);
    var result = problem_of(best);
    if (result.problem == NO_PROBLEM) {
        var last = Ranked(minus_infinity(), NO_TOKEN);
        for (var filter_number = 0u; filter_number < trips(2u); filter_number++) {
            let is_by_weight = filter_number == 1u;
            if (select(params.top_k < params.vocab, params.top_p < 1.0, is_by_weight)) {
                last = last_token(row, lane, is_by_weight, best, last);
            }
        }
        result.id = drawn_token(row, lane, best.token.score, last);
    }
    if (lane == 0u) { record(params.first_sequence + row, result); }
}
