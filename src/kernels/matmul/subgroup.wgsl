// out = epilogue(x · w + bias) without workgroup memory or barriers: one subgroup, which is the whole workgroup, a tile
// of TILE_ROWS rows (one or four for each lane) × 4 · SUBGROUP columns. A lane loads its own four columns of w and its
// own rows of x, and the rows of the others come by broadcast, so TILE_ROWS rows share every load of w.
// For software Vulkan: a load there is some 350 instructions and as many branches as lanes, a barrier saves all
// registers, and a broadcast is one instruction. All loads stand before the arithmetic, whose half-done sums would
// otherwise be saved around each branch. Sums run over `inner` in ascending order, as in tiled.wgsl, to the same bits.

fn add_row(sum: vec4f, a: vec4f, w0: vec4f, w1: vec4f, w2: vec4f, w3: vec4f) -> vec4f {
    return fma(vec4f(a.w), w3, fma(vec4f(a.z), w2, fma(vec4f(a.y), w1, fma(vec4f(a.x), w0, sum))));
}

// Adds four terms to each sum; lane r has the factors of row r.
fn add_rows(sums: ptr<function, Rows>, a: vec4f, w0: vec4f, w1: vec4f, w2: vec4f, w3: vec4f) {
    (*sums)[0] = add_row((*sums)[0], subgroupBroadcast(a, 0u), w0, w1, w2, w3);
    (*sums)[1] = add_row((*sums)[1], subgroupBroadcast(a, 1u), w0, w1, w2, w3);
    (*sums)[2] = add_row((*sums)[2], subgroupBroadcast(a, 2u), w0, w1, w2, w3);
    (*sums)[3] = add_row((*sums)[3], subgroupBroadcast(a, 3u), w0, w1, w2, w3);
    if (SUBGROUP == 8u) {
        (*sums)[4] = add_row((*sums)[4], subgroupBroadcast(a, 4u), w0, w1, w2, w3);
        (*sums)[5] = add_row((*sums)[5], subgroupBroadcast(a, 5u), w0, w1, w2, w3);
        (*sums)[6] = add_row((*sums)[6], subgroupBroadcast(a, 6u), w0, w1, w2, w3);
        (*sums)[7] = add_row((*sums)[7], subgroupBroadcast(a, 7u), w0, w1, w2, w3);
    }
}

@compute @workgroup_size(SUBGROUP)
fn main(@builtin(workgroup_id) workgroup: vec3u, @builtin(subgroup_invocation_id) lane: u32) {
    let first_row = workgroup.y * TILE_ROWS;
    let c4 = workgroup.x * SUBGROUP + lane;
    // Lanes past the end repeat the last row or column, and store nothing.
    let last_row = params.rows - 1u;
    let x0 = min(first_row + lane, last_row) * params.inner4;
    let x1 = min(first_row + SUBGROUP + lane, last_row) * params.inner4;
    let x2 = min(first_row + 2u * SUBGROUP + lane, last_row) * params.inner4;
    let x3 = min(first_row + 3u * SUBGROUP + lane, last_row) * params.inner4;
    let column4 = min(c4, params.columns4 - 1u);
    var sums0: Rows;
    var sums1: Rows;
    var sums2: Rows;
    var sums3: Rows;
    for (var k4 = 0u; k4 < params.inner4; k4++) {
        let a0 = vec4f(x[x0 + k4]);
        var a1 = vec4f(0.0);
        var a2 = vec4f(0.0);
        var a3 = vec4f(0.0);
        if (TILE_ROWS > SUBGROUP) {
            a1 = vec4f(x[x1 + k4]);
            a2 = vec4f(x[x2 + k4]);
            a3 = vec4f(x[x3 + k4]);
        }
        let base = 4u * k4 * params.columns4 + column4;
        let w0 = vec4f(w[base]);
        let w1 = vec4f(w[base + params.columns4]);
        let w2 = vec4f(w[base + 2u * params.columns4]);
        let w3 = vec4f(w[base + 3u * params.columns4]);
        add_rows(&sums0, a0, w0, w1, w2, w3);
        if (TILE_ROWS > SUBGROUP) {
            add_rows(&sums1, a1, w0, w1, w2, w3);
            add_rows(&sums2, a2, w0, w1, w2, w3);
            add_rows(&sums3, a3, w0, w1, w2, w3);
        }
    }
    if (c4 >= params.columns4) { return; }
    let shift = bias[c4];
    for (var first = first_row; first < first_row + trips(TILE_ROWS); first += SUBGROUP) {
        for (var row = first; row < first + trips(SUBGROUP); row++) {
            let sum = pop_row(&sums0);
            if (row < params.rows) { store(row * params.columns4 + c4, sum + shift); }
        }
        sums0 = sums1;
        sums1 = sums2;
        sums2 = sums3;
    }
}
