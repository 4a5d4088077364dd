@group(0) @binding(0) var<storage, read> x: array<vec4f>;                       // [rows, INNER4]: the residual stream
@group(0) @binding(1) var<storage, read> gain: array<vec4f>;                    // [INNER4]
@group(0) @binding(2) var<storage, read> shift: array<vec4f>;                   // [INNER4]
@group(0) @binding(3) var<storage, read> w: array<vec4<elem>>;                  // [inner, columns4]
@group(0) @binding(4) var<storage, read> bias: array<vec4f>;                    // [columns4]
@group(0) @binding(5) var<storage, read_write> out: array<vec4<out_elem>>;      // [rows, columns4]
