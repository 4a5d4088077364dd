@group(0) @binding(5) var<storage, read> block_lists: array<u32>;            // see shared/block_lists.wgsl
