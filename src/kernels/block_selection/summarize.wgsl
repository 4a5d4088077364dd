// Summaries of complete blocks of one sequence: one workgroup a (block, head).
//
// k is [heads here, blocks, KV_BLOCK, HEAD_DIM4], block_table [sequences, table_blocks], summaries [heads here,
// blocks, 2, HEAD_DIM4].
@group(0) @binding(0) var<storage, read> k: array<vec4<elem>>;
@group(0) @binding(1) var<storage, read> block_table: array<u32>;
@group(0) @binding(2) var<storage, read_write> summaries: array<vec4<elem>>;

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) workgroup: vec3u, @builtin(local_invocation_index) lane: u32) {
    let entry = params.sequence * params.table_blocks + params.first_block + workgroup.x;
    summarize_block(workgroup.y, block_table[entry], lane);
}
