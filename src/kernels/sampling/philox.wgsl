// Word 0 of Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
fn multiply_high(a: u32, b: u32) -> u32 {
    let middle = (a >> 16u) * (b & 0xffffu) + (((a & 0xffffu) * (b & 0xffffu)) >> 16u);
    let low = (a & 0xffffu) * (b >> 16u) + (middle & 0xffffu);
    return (a >> 16u) * (b >> 16u) + (middle >> 16u) + (low >> 16u);
}

fn philox(step: u32, key: vec2u) -> u32 {
    var c = vec4u(step, 0u, 0u, 0u);
    var k = key;
    for (var i = 0u; i < trips(10u); i++) {
        let high0 = multiply_high(0xd2511f53u, c.x);
        let high1 = multiply_high(0xcd9e8d57u, c.z);
        c = vec4u(high1 ^ c.y ^ k.x, 0xcd9e8d57u * c.z, high0 ^ c.w ^ k.y, 0xd2511f53u * c.x);
        k += vec2u(0x9e3779b9u, 0xbb67ae85u);
    }
    return c.x;
}

// Uniform on the multiples of 2^-24 in [0, 1): exact in f32, so the same as on the host.
fn uniform_number(sequence: Sequence) -> f32 {
    return f32(philox(sequence.step, vec2u(sequence.seed_low, sequence.seed_high)) >> 8u) * 0x1p-24f;
}
