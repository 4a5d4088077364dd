// Four finished sums of a row, the bias among them.
fn store(index: u32, sum: vec4f) {
    if (EPILOGUE == BIAS_GELU) {
        out[index] = vec4<out_elem>(gelu_new(sum));
    } else if (EPILOGUE == RESIDUAL) {
        out[index] = out[index] + vec4<out_elem>(sum);
    } else {
        out[index] = vec4<out_elem>(sum);
    }
}
