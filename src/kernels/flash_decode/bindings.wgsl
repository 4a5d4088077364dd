// partial_out is not yet divided by the sum; partial_ml has the maximum (base 2) and the sum.
@group(0) @binding(0) var<storage, read> qkv: array<vec4<elem>>;           // [sequences, 3, HEADS, HEAD_DIM4]
@group(0) @binding(1) var<storage, read_write> k: array<vec4<elem>>;       // [heads here, blocks, KV_BLOCK, HEAD_DIM4]
@group(0) @binding(2) var<storage, read_write> v: array<vec4<elem>>;       // [heads here, blocks, KV_BLOCK, HEAD_DIM4]
@group(0) @binding(3) var<storage, read> block_table: array<u32>;          // [sequences, table_blocks]
@group(0) @binding(4) var<storage, read> sequences: array<Sequence>;
@group(0) @binding(5) var<storage, read_write> partial_out: array<vec4f>;  // [sequences, MAX_SPLITS, HEADS, HEAD_DIM4]
@group(0) @binding(6) var<storage, read_write> partial_ml: array<vec2f>;   // [sequences, MAX_SPLITS, HEADS]

// A score no real one reaches, and finite: the difference of two masked scores is 0, not NaN.
const MASKED = -3.0e38;

// The keys of one workgroup: rows [first, end) of the cache, and in the last slice also the new token, which
// is row `end`.
struct Slice {
    exists: bool,
    is_last: bool,
    first: u32,
    end: u32,
}

fn slice_of(length: u32, split: u32) -> Slice {
    let kv_len = length + 1u;
    let splits = split_count(kv_len);
    let keys = blocks_per_split(kv_len) * KV_BLOCK;
    return Slice(split < splits, split + 1u == splits, split * keys, min((split + 1u) * keys, length));
}

// As kv_row of shared/kv_blocks.wgsl, for a table with a line for each sequence.
fn kv_row_of(sequence: u32, head: u32, position: u32) -> u32 {
    let block = block_table[sequence * params.table_blocks + position / KV_BLOCK];
    return (head * params.blocks + block) * KV_BLOCK + position % KV_BLOCK;
}
