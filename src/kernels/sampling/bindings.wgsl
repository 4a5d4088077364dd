// What a token's position takes of the table of position embeddings, as in embedding/bindings.wgsl.
struct Place { place: u32, weight: f32 }
struct Token { id: u32, place: u32, weight: f32 }

@group(0) @binding(0) var<storage, read> logits: array<f32>;                 // [rows, vocab]
@group(0) @binding(1) var<storage, read_write> seen: array<u32>;             // [sequences, seen_words()], a bit a token
@group(0) @binding(2) var<storage, read_write> sequences: array<Sequence>;   // [sequences]
@group(0) @binding(3) var<storage, read> places: array<Place>;               // [capacity], of each position
@group(0) @binding(4) var<storage, read_write> tokens: array<Token>;         // [sequences], what the next step embeds
@group(0) @binding(5) var<storage, read_write> results: array<Result>;       // [slots, sequences]

fn seen_words() -> u32 {
    return (params.vocab + 31u) / 32u;
}
