// How a workgroup shares a row of logits, and its largest one. GROUP lanes take a run of ids and step through it side by
// side: loads are coalesced, and the sums of groups are sums over ids in order. GROUPS divides LANES.
const GROUP = 32u;
const GROUPS = LANES / GROUP;

const NO_TOKEN = 0xffffffffu;
const INFINITY_BITS = 0x7f800000u;

struct Share { first: u32, end: u32 }       // ids first, first + GROUP, ... below end

// A lane's share of the `length` ids from `first` on. Every lane has ceil(length / LANES) of them or fewer.
fn share_of(first: u32, length: u32, lane: u32) -> Share {
    let run = (length + LANES - 1u) / LANES * GROUP;
    let start = first + lane / GROUP * run;
    return Share(start + lane % GROUP, min(start + run, first + length));
}

// Logits of the ids first, first + GROUP, ...: LOADS of them, all under way at once. Those that are not below `end`, as
// `first` is, repeat the last one that is, whichever lane's it may be.
fn load_logits(row: u32, first: u32, end: u32) -> array<f32, LOADS> {
    var loaded = array<f32, LOADS>();
    for (var c = 0u; c < LOADS; c++) { loaded[c] = logits[row * params.vocab + min(first + c * GROUP, end - 1u)]; }
    return loaded;
}

// The order of floats as integers: that of NaN is nobody's business.
fn key_of(score: f32) -> u32 {
    let bits = bitcast<u32>(score);
    return select(bits | 0x80000000u, ~bits, bits >= 0x80000000u);
}

fn score_of(key: u32) -> f32 {
    return bitcast<f32>(select(~key, key ^ 0x80000000u, key >= 0x80000000u));
}

// Shaders cannot spell it.
fn minus_infinity() -> f32 {
    return score_of(~(INFINITY_BITS | 0x80000000u));
}

// Tokens rank by decreasing score, equal ones by id.
struct Ranked { score: f32, id: u32 }

fn is_before(a: Ranked, b: Ranked) -> bool {
    return a.score > b.score || (a.score == b.score && a.id < b.id);
}

// The first of a row's tokens, and what else reading them all can tell.
struct Best {
    token: Ranked,
    nan_id: u32,        // the first NaN, or NO_TOKEN
    lowest: f32,        // the lowest of the lanes' largest scores: about as many tokens as there are lanes reach it
}

// What lanes tell each other, one thing after the other.
var<workgroup> lane_words: array<vec4u, LANES>;

fn pack_best(best: Best) -> vec4u {
    return vec4u(bitcast<u32>(best.token.score), best.token.id, best.nan_id, bitcast<u32>(best.lowest));
}

fn unpack_best(words: vec4u) -> Best {
    return Best(Ranked(bitcast<f32>(words.x), words.y), words.z, bitcast<f32>(words.w));
}

fn merged_bests(first: u32, stride: u32, count: u32) -> Best {
    var best = unpack_best(lane_words[first]);
    for (var i = 1u; i < trips(count); i++) {
        let other = unpack_best(lane_words[first + i * stride]);
        if (is_before(other.token, best.token)) { best.token = other.token; }
        best.nan_id = min(best.nan_id, other.nan_id);
        // A lane without tokens says nothing about the others.
        if (other.token.id != NO_TOKEN) { best.lowest = min(best.lowest, other.lowest); }
    }
    return best;
}

// The best of all lanes' tokens, for all of them. Lane 0 must have a token if any has.
fn best_of_lanes(best: Best, lane: u32) -> Best {
    lane_words[lane] = pack_best(best);
    workgroupBarrier();
    if (lane < GROUP) { lane_words[lane] = pack_best(merged_bests(lane, GROUP, GROUPS)); }
    workgroupBarrier();
    if (lane == 0u) { lane_words[0] = pack_best(merged_bests(0u, 1u, GROUP)); }
    return unpack_best(workgroupUniformLoad(&lane_words[0]));
}

// The first token of a row of scores. NaN is told by its bits: no comparison finds it, and not every device lets it be.
fn best_token(row: u32, lane: u32) -> Best {
    let share = share_of(0u, params.vocab, lane);
    var best = Ranked(minus_infinity(), NO_TOKEN);
    var nan_id = NO_TOKEN;
    if (share.first < share.end) { best.id = share.first; }
    for (var id = share.first; id < share.end; id += LOADS * GROUP) {
        let scores = load_scores(row, id, share.end);
        for (var c = 0u; c < LOADS; c++) {
            let token = Ranked(scores[c], min(id + c * GROUP, share.end - 1u));
            if (token.score > best.score) { best = token; }
            if ((bitcast<u32>(token.score) & 0x7fffffffu) > INFINITY_BITS) { nan_id = min(nan_id, token.id); }
        }
    }
    return best_of_lanes(Best(best, nan_id, best.score), lane);
}
