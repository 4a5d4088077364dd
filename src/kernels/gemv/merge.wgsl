// x is the attention of split-KV, merged from its slices: with M the largest of their maxima, a slice weighs
// 2^(m_s - M) / Σ 2^(m_t - M) l_t (Flash-Decoding, Dao et al. 2023). `prepare` leaves the weights, 0 for slices that a row
// does not have, and how many it has: those whose sum is not 0. A row without any has zeros in its first.
var<workgroup> slice_weights: array<f32, ROWS * HEADS * MAX_SPLITS>;        // [ROWS, HEADS, MAX_SPLITS]
var<workgroup> slice_counts: array<u32, ROWS * HEADS>;                      // [ROWS, HEADS]

// Slices that are read at a time.
const GROUP = 4u;
const_assert MAX_SPLITS % GROUP == 0u;

fn stage(row: u32, r: u32, k4: u32) -> vec4f {
    let head = k4 / HEAD_DIM4;
    // As many as there can be with any choice of blocks: a trip count that all lanes share, while heads may keep different
    // blocks. With their own counts the kernel took a third longer on an H100.
    let splits = min(sequences[row].length / KV_BLOCK + 1u, MAX_SPLITS);
    let last = max(slice_counts[r * HEADS + head], 1u) - 1u;
    let first = (row * MAX_SPLITS * HEADS + head) * HEAD_DIM4 + k4 % HEAD_DIM4;
    let weights = (r * HEADS + head) * MAX_SPLITS;
    var sum = vec4f(0.0);
    for (var s = 0u; s < splits; s += GROUP) {
        // Past the last slice it is read again, with the weight 0.
        for (var i = s; i < s + GROUP; i++) {
            let slice = partial_out[first + min(i, last) * HEADS * HEAD_DIM4];
            sum = fma(vec4f(slice_weights[weights + i]), slice, sum);
        }
    }
    return sum;
}
