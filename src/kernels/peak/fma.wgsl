// Multiply-adds of numbers that stay in registers: x = fma(x, factor, addend), over and over. How fast that goes is what
// arithmetic outside of tensor cores is measured by. The eight vectors of an invocation do not depend on each other, so
// one is computed while another is under way; trips, factor and addend are parameters, so nothing is known beforehand.
@group(0) @binding(0) var<storage, read_write> out: array<f32>;      // [workgroups, LANES], sums over an invocation

// Eight multiply-adds: beside 256 of them the loop's own instructions do not show.
fn eight(x: vec4f) -> vec4f {
    let factor = vec4f(params.factor);
    let addend = vec4f(params.addend);
    let y = fma(fma(fma(fma(x, factor, addend), factor, addend), factor, addend), factor, addend);
    return fma(fma(fma(fma(y, factor, addend), factor, addend), factor, addend), factor, addend);
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) workgroup: vec3u, @builtin(local_invocation_index) lane: u32) {
    var x0 = f32(lane) + vec4f(0.0, 1.0, 2.0, 3.0);
    var x1 = x0 + 4.0;
    var x2 = x0 + 8.0;
    var x3 = x0 + 12.0;
    var x4 = x0 + 16.0;
    var x5 = x0 + 20.0;
    var x6 = x0 + 24.0;
    var x7 = x0 + 28.0;
    for (var trip = 0u; trip < params.trips; trip++) {
        x0 = eight(x0);
        x1 = eight(x1);
        x2 = eight(x2);
        x3 = eight(x3);
        x4 = eight(x4);
        x5 = eight(x5);
        x6 = eight(x6);
        x7 = eight(x7);
    }
    let sums = ((x0 + x1) + (x2 + x3)) + ((x4 + x5) + (x6 + x7));
    out[workgroup.x * LANES + lane] = (sums.x + sums.y) + (sums.z + sums.w);
}
