// The summary of a complete block: of each column of its KV_BLOCK keys the mean and the standard deviation
// (population), by all lanes of a workgroup. COLUMNS lanes stand side by side on a row, every ROW_GROUPS-th
// row is a lane's own.
//
// Sums are over differences from the block's first key, of which a mean far larger than the spread is no
// part. Where that key is itself far from the others, so is the spread: no key is further than √63 standard
// deviations from the mean (Samuelson 1968), so differences are less than 16. Equal keys have a spread of
// exactly 0.
const COLUMN_LANES = ROW_GROUPS * COLUMNS;

var<workgroup> column_sums: array<vec4f, COLUMN_LANES>;     // [ROW_GROUPS, COLUMNS]

// The sum over all lanes of a column, for each of them.
fn column_sum(x: vec4f, lane: u32) -> vec4f {
    if (lane < COLUMN_LANES) { column_sums[lane] = x; }
    workgroupBarrier();
    var sum = vec4f(0.0);
    for (var i = 0u; i < trips(ROW_GROUPS); i++) { sum += column_sums[i * COLUMNS + lane % COLUMNS]; }
    workgroupBarrier();
    return sum;
}

// `head` counts within the bound buffers, `block` is where the table says.
fn summarize_block(head: u32, block: u32, lane: u32) {
    let place = head * params.blocks + block;
    for (var first = 0u; first < HEAD_DIM4; first += COLUMNS) {
        // Lanes that are left over do what others do and keep it to themselves.
        let column = min(first + lane % COLUMNS, HEAD_DIM4 - 1u);
        let base = place * KV_BLOCK * HEAD_DIM4 + column;
        let own = base + lane / COLUMNS % ROW_GROUPS * HEAD_DIM4;
        let origin = vec4f(k[base]);
        var sum = vec4f(0.0);
        for (var i = 0u; i < trips(KV_BLOCK / ROW_GROUPS); i++) {
            sum += vec4f(k[own + i * ROW_GROUPS * HEAD_DIM4]) - origin;
        }
        let offset = column_sum(sum, lane) / f32(KV_BLOCK);
        var squares = vec4f(0.0);
        for (var i = 0u; i < trips(KV_BLOCK / ROW_GROUPS); i++) {
            let deviation = (vec4f(k[own + i * ROW_GROUPS * HEAD_DIM4]) - origin) - offset;
            squares = fma(deviation, deviation, squares);
        }
        let spread = sqrt(column_sum(squares, lane) / f32(KV_BLOCK));
        if (lane < COLUMNS && first + lane < HEAD_DIM4) {
            let to = place * 2u * HEAD_DIM4 + column;
            summaries[to] = vec4<elem>(origin + offset);
            summaries[to + HEAD_DIM4] = vec4<elem>(spread);
        }
    }
}
