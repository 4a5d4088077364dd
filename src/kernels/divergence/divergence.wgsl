// How far Q = softmax(other[row]) is from P = softmax(logits[row]): one workgroup of LANES lanes a row. The
// first pass is that of nll/nll.wgsl for both rows, operation by operation. The second adds up
//
//   KL(P || Q) = Σ p (log p - log q) = Σ (p (log p - log q) - p + q),
//
// which is the same because p and q both sum to 1 (Boyd and Vandenberghe 2004, exercise 3.13). None of the
// terms on the right is negative, so nothing cancels in their sum; and an error of Q's log-sum-exp, which all
// terms share, cancels to first order, while one of P's is only relative. The sum on the left is off by as much
// as the log-sum-exps are, in either direction: by more than the divergence itself where P and Q are close.
struct Divergence { nll: f32, other_nll: f32, kl: f32, agrees: u32 }

@group(0) @binding(0) var<storage, read> logits: array<f32>;                // [rows, vocab], of P
@group(0) @binding(1) var<storage, read> other: array<f32>;                 // [rows, vocab], of Q
@group(0) @binding(2) var<storage, read> targets: array<u32>;               // [..], from first_row
@group(0) @binding(3) var<storage, read_write> results: array<Divergence>;  // [..], from first_row

const MERGERS = 8u;
const NO_TOKEN = 0xffffffffu;

// What a lane knows of each row: P's lanes come first, then Q's.
var<workgroup> lane_max: array<f32, 2u * LANES>;
var<workgroup> lane_sum: array<f32, 2u * LANES>;
var<workgroup> lane_bits: array<u32, 2u * LANES>;
var<workgroup> lane_first: array<u32, 2u * LANES>;    // where the row's maximum is first

fn four_logits(i: u32) -> vec4f {
    return vec4f(logits[i], logits[i + LANES], logits[i + 2u * LANES], logits[i + 3u * LANES]);
}

fn four_others(i: u32) -> vec4f {
    return vec4f(other[i], other[i + LANES], other[i + 2u * LANES], other[i + 3u * LANES]);
}

struct Running { m: f32, sum: f32, bits: vec4u }

fn with_eight(r: Running, a: vec4f, b: vec4f) -> Running {
    let larger = max(a, b);
    let new_m = max(max(r.m, max(larger.x, larger.y)), max(larger.z, larger.w));
    let p = exp(a - new_m) + exp(b - new_m);
    let sum = r.sum * exp(r.m - new_m) + ((p.x + p.y) + (p.z + p.w));
    return Running(new_m, sum, max(r.bits, max(unsigned_bits(a), unsigned_bits(b))));
}

fn with_one(r: Running, x: f32) -> Running {
    let new_m = max(r.m, x);
    let sum = r.sum * exp(r.m - new_m) + exp(x - new_m);
    return Running(new_m, sum, max(r.bits, unsigned_bits(vec4f(x))));
}

fn keep(at: u32, r: Running) {
    lane_max[at] = r.m;
    lane_sum[at] = r.sum;
    lane_bits[at] = max(max(r.bits.x, r.bits.y), max(r.bits.z, r.bits.w));
}

fn merge_firsts(first: u32, stride: u32, end: u32) {
    var token = NO_TOKEN;
    for (var i = first; i < end; i += stride) { token = min(token, lane_first[i]); }
    lane_first[first] = token;
}

// (exp(-d) - 1 + d) / d² of |d| <= 1, as its series up to d⁸ / 10!: what is left out is below 7e-8 of the
// value.
fn curvature(d: vec4f) -> vec4f {
    let high = 1.0 / 5040.0 - d * (1.0 / 40320.0 - d * (1.0 / 362880.0 - d * (1.0 / 3628800.0)));
    return 0.5 - d * (1.0 / 6.0 - d * (1.0 / 24.0 - d * (1.0 / 120.0 - d * (1.0 / 720.0 - d * high))));
}

// p (log p - log q) - p + q, which is p (exp(-d) - 1 + d) with d = log p - log q. Close probabilities need the
// series: there the three summands are far larger than their sum.
fn terms(log_p: vec4f, log_q: vec4f) -> vec4f {
    let d = log_p - log_q;
    let p = exp(log_p);
    // Where p is 0, d may be anything: -inf, or NaN if q is 0 too.
    let far = select(p * d, vec4f(0.0), p == vec4f(0.0)) + (exp(log_q) - p);
    let near = p * (d * d) * curvature(d);
    return select(far, near, abs(d) <= vec4f(1.0));
}

// -log of a token's probability in the row whose lanes begin at `first`.
fn nll_of(first: u32, logit: f32) -> f32 {
    // The difference first: of large logits it is exact, while their log-sum-exp is not.
    let value = log(lane_sum[first]) + (lane_max[first] - logit);
    let a_nan = bitcast<f32>(lane_bits[first] >> 1u);
    return select(value, a_nan, lane_bits[first] > INFINITY_BITS);
}

// Whether the log-sum-exp of that row is finite; the exponential of the largest logit alone adds 1 to the sum.
fn is_distribution(first: u32) -> bool {
    let is_number = lane_bits[first] <= INFINITY_BITS;
    return is_number && bitcast<u32>(lane_max[first]) != INFINITY_BITS >> 1u && lane_sum[first] > 0.5;
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) workgroup: vec3u, @builtin(local_invocation_index) lane: u32) {
    let row = folded_row(workgroup);
    if (row >= params.rows) { return; }
    let base = row * params.vocab;
    let end = base + params.vocab;

    var p = Running(LOWEST, 0.0, vec4u(0u));
    var q = p;
    var i = base + lane;
    // Eight at a time: as many loads under way, and one rescaling of the sum for all of them.
    for (; i + 7u * LANES < end; i += 8u * LANES) {
        p = with_eight(p, four_logits(i), four_logits(i + 4u * LANES));
        q = with_eight(q, four_others(i), four_others(i + 4u * LANES));
    }
    for (; i < end; i += LANES) {
        p = with_one(p, logits[i]);
        q = with_one(q, other[i]);
    }
    keep(lane, p);
    keep(LANES + lane, q);
    // The lanes that merge: MERGERS for each row, then one.
    let side = lane / MERGERS * LANES;
    workgroupBarrier();
    if (lane < 2u * MERGERS) { merge_lanes(side + lane % MERGERS, MERGERS, side + LANES); }
    workgroupBarrier();
    if (lane < 2u) { merge_lanes(lane * LANES, 1u, lane * LANES + MERGERS); }
    workgroupBarrier();

    let max_p = lane_max[0];
    let max_q = lane_max[LANES];
    let log_sum_p = log(lane_sum[0]);
    let log_sum_q = log(lane_sum[LANES]);
    var sums = vec4f(0.0);
    var first_p = vec4u(NO_TOKEN);
    var first_q = vec4u(NO_TOKEN);
    i = base + lane;
    for (; i + 3u * LANES < end; i += 4u * LANES) {
        let a = four_logits(i);
        let b = four_others(i);
        sums += terms((a - max_p) - log_sum_p, (b - max_q) - log_sum_q);
        let tokens = vec4u(i, i + LANES, i + 2u * LANES, i + 3u * LANES);
        first_p = min(first_p, select(vec4u(NO_TOKEN), tokens, a == vec4f(max_p)));
        first_q = min(first_q, select(vec4u(NO_TOKEN), tokens, b == vec4f(max_q)));
    }
    for (; i < end; i += LANES) {
        let a = logits[i];
        let b = other[i];
        sums.x += terms(vec4f((a - max_p) - log_sum_p), vec4f((b - max_q) - log_sum_q)).x;
        first_p.x = min(first_p.x, select(NO_TOKEN, i, a == max_p));
        first_q.x = min(first_q.x, select(NO_TOKEN, i, b == max_q));
    }
    lane_first[lane] = min(min(first_p.x, first_p.y), min(first_p.z, first_p.w));
    lane_first[LANES + lane] = min(min(first_q.x, first_q.y), min(first_q.z, first_q.w));
    let kl = workgroup_sum((sums.x + sums.y) + (sums.z + sums.w), lane);
    if (lane < 2u * MERGERS) { merge_firsts(side + lane % MERGERS, MERGERS, side + LANES); }
    workgroupBarrier();
    if (lane == 0u) {
        merge_firsts(0u, 1u, MERGERS);
        merge_firsts(LANES, 1u, LANES + MERGERS);
        let token = base + min(targets[params.first_row + row], params.vocab - 1u);
        let are_distributions = is_distribution(0u) && is_distribution(LANES);
        // A row that is no distribution has an infinity or a NaN: the largest bits are one of those.
        let not_finite = bitcast<f32>(max(lane_bits[0], lane_bits[LANES]) >> 1u);
        results[params.first_row + row] = Divergence(
            nll_of(0u, logits[token]),
            nll_of(LANES, other[token]),
            select(not_finite, kl, are_distributions),
            select(0u, 1u, are_distributions && lane_first[0] == lane_first[LANES]),
        );
    }
}
