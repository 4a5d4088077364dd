// Sums of up to eight rows, one for each lane of a subgroup. Indices are constants throughout: on software Vulkan a variable
// one is a load or store for every lane, and as much again to compile.
alias Rows = array<vec4f, 8>;

// Takes the first row off and moves the others up.
fn pop_row(rows: ptr<function, Rows>) -> vec4f {
    let r = *rows;
    *rows = Rows(r[1], r[2], r[3], r[4], r[5], r[6], r[7], vec4f(0.0));
    return r[0];
}
