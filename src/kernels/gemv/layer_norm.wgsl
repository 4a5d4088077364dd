// x is the layer norm of the residual stream: every workgroup normalises its rows again, which costs less than a dispatch.
// As in layer_norm/layer_norm.wgsl the variance is that of the centred row. WIDTH counts the columns that exist.
var<workgroup> moments: array<vec2f, ROWS>;     // mean, 1 / standard deviation

fn stage(row: u32, r: u32, k4: u32) -> vec4f {
    return (x[row * INNER4 + k4] - moments[r].x) * moments[r].y * gain[k4] + shift[k4];
}
