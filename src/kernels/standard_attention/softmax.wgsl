// scores[h, i, ..] = softmax(scores[h, i, 0 ..= i]) in place, zero behind that up to the end of the tile that the values
// kernel reads: one workgroup of LANES lanes a row. The first pass finds the maximum and the sum of exponentials (online
// softmax, Milakov & Gimelshein 2018), the second writes. A lane only ever touches its own vectors.
@group(0) @binding(0) var<storage, read_write> scores: array<vec4<elem>>;   // [heads here, tokens, tokens4]

// A score no real one reaches, and finite: the difference of two masked scores is 0, not NaN.
const MASKED = -3.0e38;

var<workgroup> lane_max: array<f32, LANES>;
var<workgroup> lane_sum: array<f32, LANES>;     // Σ exp(score - lane_max)

fn visible(i: u32, row: u32) -> vec4<bool> {
    return 4u * i + vec4u(0u, 1u, 2u, 3u) <= vec4u(row);
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) workgroup: vec3u, @builtin(local_invocation_index) lane: u32) {
    let row = folded_row(workgroup);
    if (row >= params.tokens) { return; }
    let base = (workgroup.z * params.tokens + row) * params.tokens4;

    var m = MASKED;
    var sum = 0.0;
    for (var i = lane; 4u * i <= row; i += LANES) {
        let s = select(vec4f(MASKED), vec4f(scores[base + i]), visible(i, row));
        let m_new = max(m, max(max(s.x, s.y), max(s.z, s.w)));
        let p = exp(s - m_new);
        sum = sum * exp(m - m_new) + ((p.x + p.y) + (p.z + p.w));
        m = m_new;
    }
    lane_max[lane] = m;
    lane_sum[lane] = sum;
    workgroupBarrier();
    for (var stride = LANES / 2u; stride > 0u; stride /= 2u) {
        if (lane < stride) {
            let other = lane_max[lane + stride];
            let m_new = max(lane_max[lane], other);
            lane_sum[lane] = lane_sum[lane] * exp(lane_max[lane] - m_new) +
                lane_sum[lane + stride] * exp(other - m_new);
            lane_max[lane] = m_new;
        }
        workgroupBarrier();
    }
    m = lane_max[0];
    sum = lane_sum[0];

    let end = min((row / TILE + 1u) * TILE / 4u, params.tokens4);
    for (var i = lane; i < end; i += LANES) {
        let p = exp(vec4f(scores[base + i]) - m) / sum;
        scores[base + i] = vec4<elem>(select(vec4f(0.0), p, visible(i, row)));
    }
}
