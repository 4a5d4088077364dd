// logits[r, v] = x[r] · w[v]: the tied output head, whose rows are wte's. One workgroup ROWS rows of x by VOCAB_TILE
// tokens; LANES_PER_TOKEN lanes share each dot product and are added in a fixed order.
const LANES = VOCAB_TILE * LANES_PER_TOKEN;

var<workgroup> partial: array<f32, ROWS * LANES>;       // [ROWS, VOCAB_TILE, LANES_PER_TOKEN]

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) workgroup: vec3u, @builtin(local_invocation_index) lane: u32) {
    let first_token = folded_tile(workgroup) * VOCAB_TILE;
    let token = first_token + lane / LANES_PER_TOKEN;
    let first_row = workgroup.y * ROWS;
    var sums: array<f32, ROWS>;
    if (token < params.piece_rows) {
        for (var i = lane % LANES_PER_TOKEN; i < params.inner4; i += LANES_PER_TOKEN) {
            let weight = vec4f(w[token * params.inner4 + i]);
            for (var r = 0u; r < ROWS; r++) {
                // Rows past the end repeat the last one, and are not stored.
                let row = min(first_row + r, params.rows - 1u);
                sums[r] += dot(weight, x[row * params.inner4 + i]);
            }
        }
    }
    for (var r = 0u; r < ROWS; r++) { partial[r * LANES + lane] = sums[r]; }
    workgroupBarrier();
    for (var i = lane; i < ROWS * VOCAB_TILE; i += LANES) {
        let row = first_row + i / VOCAB_TILE;
        let piece_row = first_token + i % VOCAB_TILE;
        if (row < params.rows && piece_row < params.piece_rows) {
            var logit = 0.0;
            for (var j = 0u; j < LANES_PER_TOKEN; j++) {
                logit += partial[i / VOCAB_TILE * LANES + i % VOCAB_TILE * LANES_PER_TOKEN + j];
            }
            logits[row * params.vocab + params.first_token + piece_row] = logit;
        }
    }
}
