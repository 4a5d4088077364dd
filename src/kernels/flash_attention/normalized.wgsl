// An output that is added up, as it is stored: zeros for a query that attends to nothing.
fn normalized(o: vec4f, l: f32) -> vec4f {
    return select(o / l, vec4f(0.0), l == 0.0);
}
