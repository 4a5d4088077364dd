// The trip count of a hot loop. With UNROLL it is a constant: GPU compilers then unroll the loop and keep the arrays it
// indexes in registers. Software Vulkan expands every load into a branch for each lane, and its compiler takes half a
// minute over such loops unrolled, so there the count hides behind a parameter (`one`, which is 1).
fn trips(count: u32) -> u32 {
    return select(count * params.one, count, UNROLL == 1u);
}
