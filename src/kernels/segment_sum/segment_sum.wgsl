// out[s.row] = s.scale · Σ x[s.first … s.first + s.rows - 1] for every segment s, one lane four columns, rows added in
// order: a single row with a scale of 1 is copied bit for bit. One workgroup a (segment, strip of LANES vectors).
struct Segment {
    first: u32,
    rows: u32,
    row: u32,
    scale: f32,
}

@group(0) @binding(0) var<storage, read> x: array<vec4f>;                   // [.., width4]
@group(0) @binding(1) var<storage, read> segments: array<Segment>;          // [.., from first_segment]
@group(0) @binding(2) var<storage, read_write> out: array<vec4f>;           // [.., width4]

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) workgroup: vec3u, @builtin(local_invocation_index) lane: u32) {
    let index = folded_row(workgroup);
    let column = workgroup.z * LANES + lane;
    if (index >= params.segments || column >= params.width4) { return; }
    let segment = segments[params.first_segment + index];
    var sum = x[segment.first * params.width4 + column];
    for (var r = 1u; r < segment.rows; r++) { sum += x[(segment.first + r) * params.width4 + column]; }
    out[segment.row * params.width4 + column] = sum * segment.scale;
}
