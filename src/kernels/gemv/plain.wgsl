// x is a tensor.
fn prepare(first_row: u32, lane: u32) {}

fn stage(row: u32, r: u32, k4: u32) -> vec4f {
    return vec4f(x[row * INNER4 + k4]);
}
