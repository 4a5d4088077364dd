// Merges the slices of split_kv.wgsl: with M the largest of their maxima, out = Σ 2^(m_s - M) o_s / Σ 2^(m_s - M) l_s.
// One workgroup a head.
@group(0) @binding(0) var<storage, read> partial_out: array<vec4f>;          // [splits, HEADS, HEAD_DIM4]
@group(0) @binding(1) var<storage, read> partial_ml: array<vec2f>;           // [splits, HEADS]
@group(0) @binding(2) var<storage, read_write> out: array<vec4<elem>>;       // [HEADS, HEAD_DIM4]

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) workgroup: vec3u, @builtin(local_invocation_index) lane: u32) {
    let head = workgroup.x;
    var m = -3.0e38;
    for (var s = 0u; s < params.splits; s++) { m = max(m, partial_ml[s * HEADS + head].x); }
    for (var d = lane; d < HEAD_DIM4; d += 64u) {
        var sum = vec4f(0.0);
        var l = 0.0;
        for (var s = 0u; s < params.splits; s++) {
            let row = s * HEADS + head;
            let weight = exp2(partial_ml[row].x - m);
            l += weight * partial_ml[row].y;
            sum += weight * partial_out[row * HEAD_DIM4 + d];
        }
        out[head * HEAD_DIM4 + d] = vec4<elem>(sum / l);
    }
}
