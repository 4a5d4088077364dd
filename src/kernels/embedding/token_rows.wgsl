// x[t] = wte[id of t]: one workgroup a token. Over all pieces of the table each token is written exactly once.
@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) workgroup: vec3u, @builtin(local_invocation_index) lane: u32) {
    let t = folded_row(workgroup);
    if (t >= params.token_count) { return; }
    // Unsigned: a row before the piece wraps around to a number no piece reaches.
    let row = tokens[t].id - params.first_row;
    if (row >= params.piece_rows) { return; }
    for (var i = lane; i < WIDTH4; i += 64u) {
        x[t * WIDTH4 + i] = vec4f(rows[row * WIDTH4 + i]);
    }
}
