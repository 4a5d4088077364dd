// logits[r, v] = x[r] · w[v] for many rows without workgroup memory or barriers: one subgroup, which is the whole
// workgroup, SUBGROUP rows of x by SUBGROUP tokens. A lane loads its own token's weights and its own row of x, and the
// rows of the others come by broadcast. For software Vulkan, for the reasons given in matmul/subgroup.wgsl.
fn store(row: u32, token: u32, sum: vec4f) {
    if (row < params.rows && token < params.piece_rows) {
        logits[row * params.vocab + params.first_token + token] = (sum.x + sum.y) + (sum.z + sum.w);
    }
}

@compute @workgroup_size(SUBGROUP)
fn main(@builtin(workgroup_id) workgroup: vec3u, @builtin(subgroup_invocation_id) lane: u32) {
    let token = folded_tile(workgroup) * SUBGROUP + lane;
    let first_row = workgroup.y * SUBGROUP;
    // Lanes past the end repeat the last row or token, and store nothing.
    let x_base = min(first_row + lane, params.rows - 1u) * params.inner4;
    let w_base = min(token, params.piece_rows - 1u) * params.inner4;
    var sums: array<vec4f, 8>;
    for (var i = 0u; i < params.inner4; i++) {
        let a = x[x_base + i];
        let weight = vec4f(w[w_base + i]);
        sums[0] = fma(weight, subgroupBroadcast(a, 0u), sums[0]);
        sums[1] = fma(weight, subgroupBroadcast(a, 1u), sums[1]);
        sums[2] = fma(weight, subgroupBroadcast(a, 2u), sums[2]);
        sums[3] = fma(weight, subgroupBroadcast(a, 3u), sums[3]);
        if (SUBGROUP == 8u) {
            sums[4] = fma(weight, subgroupBroadcast(a, 4u), sums[4]);
            sums[5] = fma(weight, subgroupBroadcast(a, 5u), sums[5]);
            sums[6] = fma(weight, subgroupBroadcast(a, 6u), sums[6]);
            sums[7] = fma(weight, subgroupBroadcast(a, 7u), sums[7]);
        }
    }
    for (var r = 0u; r < trips(SUBGROUP); r++) { store(first_row + r, token, sums[r]); }
}
