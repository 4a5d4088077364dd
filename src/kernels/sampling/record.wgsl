const NO_PROBLEM = 0u;
const HAS_NAN = 1u;
const HAS_INFINITY = 2u;
const ALL_MINUS_INFINITY = 3u;

fn problem_of(best: Best) -> Result {
    let bits = bitcast<u32>(best.token.score);
    if (best.nan_id != NO_TOKEN) { return Result(0u, HAS_NAN, best.nan_id); }
    if (bits == INFINITY_BITS) { return Result(0u, HAS_INFINITY, best.token.id); }
    if (bits == (INFINITY_BITS | 0x80000000u)) { return Result(0u, ALL_MINUS_INFINITY, best.token.id); }
    return Result(best.token.id, NO_PROBLEM, 0u);
}

// Hands a drawn token to the host and to the next step. The caller is a single lane, behind a barrier.
fn record(sequence: u32, result: Result) {
    results[params.slot * params.sequence_count + sequence] = result;
    seen[sequence * seen_words() + result.id / 32u] |= 1u << (result.id % 32u);
    let length = min(sequences[sequence].length + 1u, params.capacity - 1u);
    sequences[sequence].length = length;
    sequences[sequence].step += 1u;
    tokens[sequence] = Token(result.id, places[length].place, places[length].weight);
}
