@group(0) @binding(0) var<storage, read> x: array<vec4u>;                       // [rows, inner8]: eight f16 a vector
@group(0) @binding(1) var<storage, read> w: array<vec4u>;                       // [inner, columns8], Conv1D's layout
@group(0) @binding(2) var<storage, read> bias: array<vec4f>;                    // [columns4]
@group(0) @binding(3) var<storage, read_write> out: array<vec4u>;               // [rows, columns8], in f32 twice as many
