// One workgroup per row, for more rows than a grid dimension allows: the host folds the row number into x and y.
fn folded_row(workgroup: vec3u) -> u32 {
    return workgroup.x + workgroup.y * GRID_FOLD;
}
