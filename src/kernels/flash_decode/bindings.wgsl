// partial_out is not yet divided by the sum; partial_ml has the maximum (base 2) and the sum, which is 0 for a slice that a
// sequence does not have and never for another.
@group(0) @binding(0) var<storage, read> qkv: array<vec4<elem>>;           // [sequences, 3, HEADS, HEAD_DIM4]
@group(0) @binding(1) var<storage, read_write> k: array<vec4<elem>>;       // [heads here, blocks, KV_BLOCK, HEAD_DIM4]
@group(0) @binding(2) var<storage, read_write> v: array<vec4<elem>>;       // [heads here, blocks, KV_BLOCK, HEAD_DIM4]
@group(0) @binding(3) var<storage, read> block_table: array<u32>;          // [sequences, table_blocks]
@group(0) @binding(4) var<storage, read> sequences: array<Sequence>;
@group(0) @binding(5) var<storage, read_write> partial_out: array<vec4f>;  // [sequences, MAX_SPLITS, HEADS, HEAD_DIM4]
@group(0) @binding(6) var<storage, read_write> partial_ml: array<vec2f>;   // [sequences, MAX_SPLITS, HEADS]

// A score no real one reaches, and finite: the difference of two masked scores is 0, not NaN.
const MASKED = -3.0e38;

// The blocks of one workgroup, [first, end) of those that its query attends to. The last slice also has the new token,
// which is row `length` of the sequence, and is attended to unless a mask leaves its block out.
struct Slice {
    first: u32,
    end: u32,
    is_last: bool,
    sees_new: bool,
}

// Slices that there are not have no blocks; whoever sees nothing at all has one such slice, which is its last.
fn slice_of(kept: Kept, split: u32) -> Slice {
    let blocks = blocks_per_split(kept.count);
    let first = min(split * blocks, kept.count);
    let end = min(first + blocks, kept.count);
    let is_last = end == kept.count && (first < end || split == 0u);
    return Slice(first, end, is_last, is_last && kept.sees_new);
}

// As kv_row of shared/kv_blocks.wgsl, for a table with a line for each sequence.
fn kv_row_of(sequence: u32, head: u32, position: u32) -> u32 {
    let block = block_table[sequence * params.table_blocks + position / KV_BLOCK];
    return (head * params.blocks + block) * KV_BLOCK + position % KV_BLOCK;
}
