// Products of 16×16 matrices that stay in registers: f16 factors, f32 sums. How fast that goes is what kernels for tensor
// cores are measured by. Each subgroup of 32 lanes holds four left and four right matrices and the sums of all sixteen
// products, c12 of left 1 times right 2, to which it adds the same products again in every trip.
alias Left = subgroup_matrix_left<elem, 16, 16>;
alias Right = subgroup_matrix_right<elem, 16, 16>;
alias Sum = subgroup_matrix_result<f32, 16, 16>;

const LANES = 32u * SUBGROUPS;
const MATRIX = 256u;

@group(0) @binding(0) var<storage, read> left: array<elem>;          // [4, 16, 16]
@group(0) @binding(1) var<storage, read> right: array<elem>;         // [4, 16, 16]
@group(0) @binding(2) var<storage, read_write> out: array<f32>;      // [workgroups, SUBGROUPS, 16, 16]

fn multiply(a: Left, b: Right, sum: Sum) -> Sum {
    return subgroupMatrixMultiplyAccumulate(a, b, sum);
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) workgroup: vec3u, @builtin(subgroup_id) subgroup: u32) {
    let a0 = subgroupMatrixLoad<Left, row_major>(&left, 0u * MATRIX, 16u);
    let a1 = subgroupMatrixLoad<Left, row_major>(&left, 1u * MATRIX, 16u);
    let a2 = subgroupMatrixLoad<Left, row_major>(&left, 2u * MATRIX, 16u);
    let a3 = subgroupMatrixLoad<Left, row_major>(&left, 3u * MATRIX, 16u);
    let b0 = subgroupMatrixLoad<Right, row_major>(&right, 0u * MATRIX, 16u);
    let b1 = subgroupMatrixLoad<Right, row_major>(&right, 1u * MATRIX, 16u);
    let b2 = subgroupMatrixLoad<Right, row_major>(&right, 2u * MATRIX, 16u);
    let b3 = subgroupMatrixLoad<Right, row_major>(&right, 3u * MATRIX, 16u);
    var c00 = Sum();
    var c01 = Sum();
    var c02 = Sum();
    var c03 = Sum();
    var c10 = Sum();
    var c11 = Sum();
    var c12 = Sum();
    var c13 = Sum();
    var c20 = Sum();
    var c21 = Sum();
    var c22 = Sum();
    var c23 = Sum();
    var c30 = Sum();
    var c31 = Sum();
    var c32 = Sum();
    var c33 = Sum();
    for (var trip = 0u; trip < params.trips; trip++) {
        c00 = multiply(a0, b0, c00);
        c01 = multiply(a0, b1, c01);
        c02 = multiply(a0, b2, c02);
        c03 = multiply(a0, b3, c03);
        c10 = multiply(a1, b0, c10);
        c11 = multiply(a1, b1, c11);
        c12 = multiply(a1, b2, c12);
        c13 = multiply(a1, b3, c13);
        c20 = multiply(a2, b0, c20);
        c21 = multiply(a2, b1, c21);
        c22 = multiply(a2, b2, c22);
        c23 = multiply(a2, b3, c23);
        c30 = multiply(a3, b0, c30);
        c31 = multiply(a3, b1, c31);
        c32 = multiply(a3, b2, c32);
        c33 = multiply(a3, b3, c33);
    }
    // One of the sums is stored, and which one is not known before it runs: all of them have to be computed.
    let at = MATRIX * (workgroup.x * SUBGROUPS + subgroup);
    switch params.kept {
        case 0u: { subgroupMatrixStore<row_major>(&out, at, c00, 16u); }
        case 1u: { subgroupMatrixStore<row_major>(&out, at, c01, 16u); }
        case 2u: { subgroupMatrixStore<row_major>(&out, at, c02, 16u); }
        case 3u: { subgroupMatrixStore<row_major>(&out, at, c03, 16u); }
        case 4u: { subgroupMatrixStore<row_major>(&out, at, c10, 16u); }
        case 5u: { subgroupMatrixStore<row_major>(&out, at, c11, 16u); }
        case 6u: { subgroupMatrixStore<row_major>(&out, at, c12, 16u); }
        case 7u: { subgroupMatrixStore<row_major>(&out, at, c13, 16u); }
        case 8u: { subgroupMatrixStore<row_major>(&out, at, c20, 16u); }
        case 9u: { subgroupMatrixStore<row_major>(&out, at, c21, 16u); }
        case 10u: { subgroupMatrixStore<row_major>(&out, at, c22, 16u); }
        case 11u: { subgroupMatrixStore<row_major>(&out, at, c23, 16u); }
        case 12u: { subgroupMatrixStore<row_major>(&out, at, c30, 16u); }
        case 13u: { subgroupMatrixStore<row_major>(&out, at, c31, 16u); }
        case 14u: { subgroupMatrixStore<row_major>(&out, at, c32, 16u); }
        default: { subgroupMatrixStore<row_major>(&out, at, c33, 16u); }
    }
}
