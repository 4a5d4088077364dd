// Which rows of the tables a token takes: wte[id], and wpe at `place + weight`, between two rows unless weight is 0.
struct Token { id: u32, place: u32, weight: f32 }

// Tables too large for one binding come in pieces of whole rows; there is one dispatch a piece.
@group(0) @binding(0) var<storage, read> tokens: array<Token>;         // [token_count]
@group(0) @binding(1) var<storage, read> rows: array<vec4<elem>>;      // [piece_rows, WIDTH4], from row first_row
@group(0) @binding(2) var<storage, read_write> x: array<vec4f>;        // [token_count, WIDTH4]
