// Scores: logits after the repetition penalty (Keskar et al. 2019, CTRL), which makes tokens seen before less likely.
fn load_scores(row: u32, first: u32, end: u32) -> array<f32, LOADS> {
    var scores = load_logits(row, first, end);
    if (params.repeat_penalty != 1.0) {
        let words = (params.first_sequence + row) * seen_words();
        for (var c = 0u; c < LOADS; c++) {
            let id = min(first + c * GROUP, end - 1u);
            let x = scores[c];
            // A product, not a quotient: it is rounded the same on every device.
            let penalised = x * select(params.repeat_penalty, params.inverse_penalty, x > 0.0);
            scores[c] = select(x, penalised, ((seen[words + id / 32u] >> (id % 32u)) & 1u) == 1u);
        }
    }
    return scores;
}
