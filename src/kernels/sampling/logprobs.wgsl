// Log-probabilities of the logits as they are: of the drawn token, and of the likeliest ones, in order. One workgroup a
// sequence, which reads its row once for the largest logit, once for the sum, and once for each of the others.
struct Logprob { id: u32, logprob: f32 }

@group(0) @binding(0) var<storage, read> logits: array<vec4u>;               // [rows, vocab] of f32
@group(0) @binding(1) var<storage, read> results: array<Result>;             // [slots, sequences]
@group(0) @binding(2) var<storage, read_write> logprobs: array<Logprob>;     // [slots, sequences, 1 + top]

fn load_scores(row: Row, first: u32, end: u32) -> array<vec4u, LOADS> {
    return load_logits(row, first, end);
}

fn load_score(row: Row, id: u32) -> u32 {
    return load_logit(row, id);
}

fn sum_of_exponentials(row: Row, lane: u32, largest: f32) -> f32 {
    let share = share_of(row, lane);
    let edge = edge_of(row, lane);
    var sums = vec4f(0.0);
    for (var block = share.first; block < share.end; block += LOADS * GROUP) {
        let scores = load_scores(row, block, share.end);
        for (var c = 0u; c < LOADS; c++) {
            if (block + c * GROUP < share.end) { sums += exp(bitcast<vec4f>(scores[c]) - largest); }
        }
    }
    if (edge != NO_TOKEN) { sums.x += exp(bitcast<f32>(load_score(row, edge)) - largest); }
    return workgroup_sum((sums.x + sums.y) + (sums.z + sums.w), lane);
}

// `token` if it is the best so far of those behind `previous`.
fn better(token: Ranked, best: Ranked, previous: Ranked) -> Ranked {
    if (is_before(previous, token) && is_before(token, best)) { return token; }
    return best;
}

// The token behind `previous`, which must not be the last.
fn next_token(row: Row, lane: u32, previous: Ranked) -> Ranked {
    let share = share_of(row, lane);
    let edge = edge_of(row, lane);
    var best = Ranked(NO_KEY, NO_TOKEN);
    for (var block = share.first; block < share.end; block += LOADS * GROUP) {
        let scores = load_scores(row, block, share.end);
        for (var c = 0u; c < LOADS; c++) {
            let id = id_of(row, block_at(block, c, share.end));
            for (var i = 0u; i < trips(4u); i++) { best = better(Ranked(key_of(scores[c][i]), id + i), best, previous); }
        }
    }
    if (edge != NO_TOKEN) { best = better(Ranked(key_of(load_score(row, edge)), edge), best, previous); }
    let key = largest_key(best.key, lane);
    return Ranked(key, lowest_id(select(NO_TOKEN, best.id, best.key == key), lane));
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) workgroup: vec3u, @builtin(local_invocation_index) lane: u32) {
    let row = row_of(workgroup.x);
    let sequence = params.slot * params.sequence_count + params.first_sequence + row.index;
    let first = sequence * (1u + params.top);
    let key = lane_key(row, lane);
    let largest_of_row = largest_key(key, lane);
    var token = Ranked(largest_of_row, first_token(row, lane, key, largest_of_row));
    let largest = score_of(token.key);
    let log_sum = log(sum_of_exponentials(row, lane, largest));
    if (lane == 0u) {
        let id = results[sequence].id;
        // The difference first: of large logits it is exact, while their log-sum-exp is not.
        logprobs[first] = Logprob(id, (bitcast<f32>(load_logit(row, id)) - largest) - log_sum);
    }
    for (var i = 0u; i < params.top; i++) {
        if (i > 0u && i < params.vocab) { token = next_token(row, lane, token); }
        let id = select(NO_TOKEN, token.id, i < params.vocab);
        if (lane == 0u) { logprobs[first + 1u + i] = Logprob(id, (score_of(token.key) - largest) - log_sum); }
    }
}
