@group(0) @binding(0) var<storage, read> x: array<vec4<elem>>;                  // [rows, INNER4]
@group(0) @binding(1) var<storage, read> w: array<vec4<elem>>;                  // [inner, columns4]
@group(0) @binding(2) var<storage, read> bias: array<vec4f>;                    // [columns4]
@group(0) @binding(3) var<storage, read_write> out: array<vec4<out_elem>>;      // [rows, columns4]
