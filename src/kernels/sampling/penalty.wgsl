// Scores: logits after the repetition penalty (Keskar et al. 2019, CTRL), which makes tokens seen before less likely.
fn penalised(row: Row, logit: u32, id: u32) -> u32 {
    let word = seen[(params.first_sequence + row.index) * seen_words() + id / 32u];
    let x = bitcast<f32>(logit);
    // A product, not a quotient: it is rounded the same on every device.
    let product = x * select(params.repeat_penalty, params.inverse_penalty, x > 0.0);
    return select(logit, bitcast<u32>(product), ((word >> (id % 32u)) & 1u) == 1u);
}

fn load_scores(row: Row, first: u32, end: u32) -> array<vec4u, LOADS> {
    var scores = load_logits(row, first, end);
    if (params.repeat_penalty != 1.0) {
        for (var c = 0u; c < LOADS; c++) {
            let id = id_of(row, block_at(first, c, end));
            for (var i = 0u; i < trips(4u); i++) { scores[c][i] = penalised(row, scores[c][i], id + i); }
        }
    }
    return scores;
}

fn load_score(row: Row, id: u32) -> u32 {
    let logit = load_logit(row, id);
    if (params.repeat_penalty != 1.0) { return penalised(row, logit, id); }
    return logit;
}
