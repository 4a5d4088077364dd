// Log-probabilities of the logits as they are: of the drawn token, and of the likeliest ones, in order. One workgroup a
// sequence, which reads its row once for the largest logit, once for the sum, and once for each of the others.
struct Logprob { id: u32, logprob: f32 }

@group(0) @binding(0) var<storage, read> logits: array<f32>;                 // [rows, vocab]
@group(0) @binding(1) var<storage, read> results: array<Result>;             // [slots, sequences]
@group(0) @binding(2) var<storage, read_write> logprobs: array<Logprob>;     // [slots, sequences, 1 + top]

fn load_scores(row: u32, first: u32, end: u32) -> array<f32, LOADS> {
    return load_logits(row, first, end);
}

fn sum_of_exponentials(row: u32, lane: u32, largest: f32) -> f32 {
    let share = share_of(0u, params.vocab, lane);
    var sum = 0.0;
    for (var id = share.first; id < share.end; id += LOADS * GROUP) {
        let scores = load_scores(row, id, share.end);
        for (var c = 0u; c < LOADS; c++) { sum += select(0.0, exp(scores[c] - largest), id + c * GROUP < share.end); }
    }
    return workgroup_sum(sum, lane);
}

// The token behind `previous`, which must not be the last.
fn next_token(row: u32, lane: u32, previous: Ranked) -> Ranked {
    let share = share_of(0u, params.vocab, lane);
    var best = Ranked(minus_infinity(), NO_TOKEN);
    for (var id = share.first; id < share.end; id += LOADS * GROUP) {
        let scores = load_scores(row, id, share.end);
        for (var c = 0u; c < LOADS; c++) {
            let token = Ranked(scores[c], min(id + c * GROUP, share.end - 1u));
            if (is_before(previous, token) && is_before(token, best)) { best = token; }
        }
    }
    return best_of_lanes(Best(best, NO_TOKEN, 0.0), lane).token;
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) workgroup: vec3u, @builtin(local_invocation_index) lane: u32) {
    let row = workgroup.x;
    let sequence = params.slot * params.sequence_count + params.first_sequence + row;
    let first = sequence * (1u + params.top);
    var token = best_token(row, lane).token;
    let largest = token.score;
    let log_sum = log(sum_of_exponentials(row, lane, largest));
    if (lane == 0u) {
        let id = results[sequence].id;
        // The difference first: of large logits it is exact, while their log-sum-exp is not.
        logprobs[first] = Logprob(id, (logits[row * params.vocab + id] - largest) - log_sum);
    }
    for (var i = 0u; i < params.top; i++) {
        if (i > 0u && i < params.vocab) { token = next_token(row, lane, token); }
        let id = select(NO_TOKEN, token.id, i < params.vocab);
        if (lane == 0u) { logprobs[first + 1u + i] = Logprob(id, (token.score - largest) - log_sum); }
    }
}
