// out = epilogue(x · w + bias) for a single row x, the case of decoding: limited by reading w once.
// One workgroup a strip of 4 · STRIP4 columns; SLICES groups of lanes share the sum over `inner`, four rows of w at a
// time, and are added in a fixed order.
var<workgroup> partial: array<vec4f, STRIP4 * SLICES>;      // [SLICES, STRIP4]

@compute @workgroup_size(STRIP4 * SLICES)
fn main(@builtin(workgroup_id) workgroup: vec3u, @builtin(local_invocation_index) lane: u32) {
    let c4 = workgroup.x * STRIP4 + lane % STRIP4;
    var sum = vec4f(0.0);
    if (c4 < params.columns4) {
        for (var k4 = lane / STRIP4; k4 < params.inner4; k4 += SLICES) {
            let a = vec4f(x[k4]);
            let base = 4u * k4 * params.columns4 + c4;
            sum = fma(vec4f(a.x), vec4f(w[base]), sum);
            sum = fma(vec4f(a.y), vec4f(w[base + params.columns4]), sum);
            sum = fma(vec4f(a.z), vec4f(w[base + 2u * params.columns4]), sum);
            sum = fma(vec4f(a.w), vec4f(w[base + 3u * params.columns4]), sum);
        }
    }
    partial[lane] = sum;
    workgroupBarrier();
    if (lane < STRIP4 && c4 < params.columns4) {
        var total = bias[c4];
        for (var s = 0u; s < trips(SLICES); s++) { total += partial[s * STRIP4 + lane]; }
        store(c4, total);
    }
}
