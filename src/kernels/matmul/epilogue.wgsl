// What happens to a finished sum before it is stored: EPILOGUE is one of these.
const BIAS = 0u;        // out = sum + bias
const BIAS_GELU = 1u;   // out = gelu_new(sum + bias)
const RESIDUAL = 2u;    // out = out + sum + bias, in place

// GPT-2's gelu_new, x/2 · (1 + tanh(u)) with u = √(2/π) (x + 0.044715 x³) (Hendrycks & Gimpel 2016, eq. 2), written
// as x · sigmoid(2u): it has no tanh, whose WGSL form may overflow to NaN. exp's argument is capped where the sigmoid
// is zero in f32, so that no infinity appears.
fn gelu_new(x: vec4f) -> vec4f {
    let u = 0.7978845608028654 * (x + 0.044715 * x * x * x);
    return x / (1.0 + exp(min(-2.0 * u, vec4f(80.0))));
}
