// The trip count of a hot loop. With UNROLL it is a constant: GPU compilers then unroll the loop and keep the arrays it
// indexes in registers. Software Vulkan expands every load into code for each lane, and its compiler may take over ten
// seconds for such a loop unrolled, so there the count hides behind a parameter (`one`, which is 1).
fn trips(count: u32) -> u32 {
    return select(count * params.one, count, UNROLL == 1u);
}
