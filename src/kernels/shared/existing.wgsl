// 1 for the columns of vector i that exist, 0 for those that pad WIDTH to a multiple of 4.
fn existing(i: u32) -> vec4f {
    return select(vec4f(0.0), vec4f(1.0), vec4u(0u, 1u, 2u, 3u) + 4u * i < vec4u(WIDTH));
}
