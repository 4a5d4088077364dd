// out = epilogue(x · w + bias) without workgroup memory or barriers: one subgroup, which is the whole workgroup, a tile
// of SUBGROUP rows × 4 · SUBGROUP columns. A lane loads its own four columns of w and its own row of x, and the rows of
// the others come by broadcast, so SUBGROUP rows share every load of w.
// For software Vulkan: a load there costs as much as dozens of multiplications, a barrier saves all registers, and a
// broadcast is one instruction. Sums run over `inner` in ascending order, as in tiled.wgsl, to the same bits.
fn add_row(sum: vec4f, a: vec4f, w0: vec4f, w1: vec4f, w2: vec4f, w3: vec4f) -> vec4f {
    return fma(vec4f(a.w), w3, fma(vec4f(a.z), w2, fma(vec4f(a.y), w1, fma(vec4f(a.x), w0, sum))));
}

@compute @workgroup_size(SUBGROUP)
fn main(@builtin(workgroup_id) workgroup: vec3u, @builtin(subgroup_invocation_id) lane: u32) {
    let first_row = workgroup.y * SUBGROUP;
    let c4 = workgroup.x * SUBGROUP + lane;
    // Lanes past the end repeat the last row or column, and store nothing.
    let x_base = min(first_row + lane, params.rows - 1u) * params.inner4;
    let column4 = min(c4, params.columns4 - 1u);
    var sums: array<vec4f, 8>;
    for (var k4 = 0u; k4 < params.inner4; k4++) {
        let a = vec4f(x[x_base + k4]);
        let base = 4u * k4 * params.columns4 + column4;
        let w0 = vec4f(w[base]);
        let w1 = vec4f(w[base + params.columns4]);
        let w2 = vec4f(w[base + 2u * params.columns4]);
        let w3 = vec4f(w[base + 3u * params.columns4]);
        sums[0] = add_row(sums[0], subgroupBroadcast(a, 0u), w0, w1, w2, w3);
        sums[1] = add_row(sums[1], subgroupBroadcast(a, 1u), w0, w1, w2, w3);
        sums[2] = add_row(sums[2], subgroupBroadcast(a, 2u), w0, w1, w2, w3);
        sums[3] = add_row(sums[3], subgroupBroadcast(a, 3u), w0, w1, w2, w3);
        if (SUBGROUP == 8u) {
            sums[4] = add_row(sums[4], subgroupBroadcast(a, 4u), w0, w1, w2, w3);
            sums[5] = add_row(sums[5], subgroupBroadcast(a, 5u), w0, w1, w2, w3);
            sums[6] = add_row(sums[6], subgroupBroadcast(a, 6u), w0, w1, w2, w3);
            sums[7] = add_row(sums[7], subgroupBroadcast(a, 7u), w0, w1, w2, w3);
        }
    }
    if (c4 >= params.columns4) { return; }
    let shift = bias[c4];
    for (var r = 0u; r < trips(SUBGROUP); r++) {
        let row = first_row + r;
        if (row < params.rows) { store(row * params.columns4 + c4, sums[r] + shift); }
    }
}
