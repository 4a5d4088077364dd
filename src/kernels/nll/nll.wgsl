// nll[first_row + row] = log Σ exp(logits[row]) - logits[row, target]: one workgroup of LANES lanes a row, which is read
// once. Each lane keeps the maximum and the sum of exponentials of every LANES-th logit (online softmax, Milakov and
// Gimelshein 2018); then the lanes are merged in a fixed order.
@group(0) @binding(0) var<storage, read> logits: array<f32>;                 // [rows, vocab]
@group(0) @binding(1) var<storage, read> targets: array<u32>;                // [..], from first_row
@group(0) @binding(2) var<storage, read_write> nll: array<f32>;              // [..], from first_row

const MERGERS = 8u;

var<workgroup> lane_max: array<f32, LANES>;
var<workgroup> lane_sum: array<f32, LANES>;
var<workgroup> lane_bits: array<u32, LANES>;

fn four_logits(i: u32) -> vec4f {
    return vec4f(logits[i], logits[i + LANES], logits[i + 2u * LANES], logits[i + 3u * LANES]);
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) workgroup: vec3u, @builtin(local_invocation_index) lane: u32) {
    let row = folded_row(workgroup);
    if (row >= params.rows) { return; }
    let base = row * params.vocab;
    let end = base + params.vocab;

    var m = LOWEST;
    var sum = 0.0;
    var bits = vec4u(0u);
    var i = base + lane;
    // Eight at a time: as many loads under way, and one rescaling of the sum for all of them.
    for (; i + 7u * LANES < end; i += 8u * LANES) {
        let a = four_logits(i);
        let b = four_logits(i + 4u * LANES);
        let larger = max(a, b);
        let new_m = max(max(m, max(larger.x, larger.y)), max(larger.z, larger.w));
        let p = exp(a - new_m) + exp(b - new_m);
        sum = sum * exp(m - new_m) + ((p.x + p.y) + (p.z + p.w));
        m = new_m;
        bits = max(bits, max(unsigned_bits(a), unsigned_bits(b)));
    }
    for (; i < end; i += LANES) {
        let x = logits[i];
        let new_m = max(m, x);
        sum = sum * exp(m - new_m) + exp(x - new_m);
        m = new_m;
        bits = max(bits, unsigned_bits(vec4f(x)));
    }
    lane_max[lane] = m;
    lane_sum[lane] = sum;
    lane_bits[lane] = max(max(bits.x, bits.y), max(bits.z, bits.w));
    workgroupBarrier();
    if (lane < MERGERS) { merge_lanes(lane, MERGERS, LANES); }
    workgroupBarrier();
    if (lane == 0u) {
        merge_lanes(0u, 1u, MERGERS);
        let target_logit = logits[base + min(targets[params.first_row + row], params.vocab - 1u)];
        // The difference first: of large logits it is exact, while their log-sum-exp is not.
        let value = log(lane_sum[0]) + (lane_max[0] - target_logit);
        let a_nan = bitcast<f32>(lane_bits[0] >> 1u);
        nll[params.first_row + row] = select(value, a_nan, lane_bits[0] > INFINITY_BITS);
    }
}
