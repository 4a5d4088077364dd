// x[t] += (1 - weight) · wpe[place] + weight · wpe[place + 1]: one workgroup a token. The two rows may be in different
// pieces of the table; each piece adds what it has. With weight 0 the second row is not read: it may not exist.
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) workgroup: vec3u, @builtin(local_invocation_index) lane: u32) {
    let t = folded_row(workgroup);
    if (t >= params.token_count) { return; }
    let token = tokens[t];
    // Unsigned: a row before the piece wraps around to a number no piece reaches.
    let low = token.place - params.first_row;
    let high = low + 1u;
    let has_low = low < params.piece_rows;
    let has_high = token.weight > 0.0 && high < params.piece_rows;
    for (var i = lane; i < WIDTH4; i += 64u) {
        if (has_low) { x[t * WIDTH4 + i] += (1.0 - token.weight) * vec4f(rows[low * WIDTH4 + i]); }
        if (has_high) { x[t * WIDTH4 + i] += token.weight * vec4f(rows[high * WIDTH4 + i]); }
    }
}
