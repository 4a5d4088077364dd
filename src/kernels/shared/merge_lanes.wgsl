// Maxima and sums of exponentials that lanes keep of a row of logits (online softmax, Milakov and Gimelshein 2018), merged in a
// fixed order. The text that this is joined to declares lane_max, lane_sum (Σ exp(logit - lane_max)) and lane_bits, the
// largest bits without the sign: a NaN is told by its bits, because on some devices (SwiftShader) max and exp make a number
// of it.

// Not above any finite logit, so the difference to a maximum is never positive: one of -inf becomes exp(-inf) = 0.
const LOWEST = -0x1.fffffep127f;
// Bits of an infinity without its sign, which is shifted out: those of a NaN are larger.
const INFINITY_BITS = 0xff000000u;

fn unsigned_bits(x: vec4f) -> vec4u {
    return bitcast<vec4u>(x) << vec4u(1u);
}

// Replaces what `first` knows by what first, first + stride, ... before `end` know together.
fn merge_lanes(first: u32, stride: u32, end: u32) {
    var m = LOWEST;
    var bits = 0u;
    for (var i = first; i < end; i += stride) {
        m = max(m, lane_max[i]);
        bits = max(bits, lane_bits[i]);
    }
    var sum = 0.0;
    for (var i = first; i < end; i += stride) { sum += lane_sum[i] * exp(lane_max[i] - m); }
    lane_max[first] = m;
    lane_sum[first] = sum;
    lane_bits[first] = bits;
}
