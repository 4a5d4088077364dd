// What the host reads of a drawn token.
struct Result {
    id: u32,
    problem: u32,       // 0, or which of PROBLEMS (sampling.ts) makes the logits useless
    at: u32,            // the first token at which they have it
}
