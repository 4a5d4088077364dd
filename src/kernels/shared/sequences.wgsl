// A sequence that is being decoded. Whatever draws its next token counts it on, so that a step asks nothing of the host.
struct Sequence {
    length: u32,        // tokens in the cache, without the one that this step runs
    step: u32,          // tokens drawn so far: the counter of its random numbers
    seed_low: u32,      // the key of its random numbers
    seed_high: u32,
}
