// Sum of one value per lane over a workgroup of LANES lanes (a multiple of 8), in an order that never changes.
var<workgroup> lane_values: array<f32, LANES>;

fn workgroup_sum(value: f32, lane: u32) -> f32 {
    lane_values[lane] = value;
    workgroupBarrier();
    if (lane < 8u) {
        var sum = 0.0;
        for (var i = lane; i < LANES; i += 8u) { sum += lane_values[i]; }
        lane_values[lane] = sum;
    }
    workgroupBarrier();
    var total = 0.0;
    for (var i = 0u; i < 8u; i++) { total += lane_values[i]; }
    workgroupBarrier();
    return total;
}
