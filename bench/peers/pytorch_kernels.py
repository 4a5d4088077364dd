"""Times PyTorch on the shapes of GPT-2: python3 bench/peers/pytorch_kernels.py SHAPE CONTEXTS OUT.json

SHAPE is gpt2, gpt2-medium, gpt2-large or gpt2-xl, CONTEXTS such as 1k,4k,16k,64k. Causal, batch 1, random values:
attention alone, the four matrix products of a layer (cuBLAS), and the prefill of a whole Hugging Face model.

Attention and matrix products are GPU time between CUDA events: median, minimum and maximum of 10 samples after 3
warm-ups. A sample of a short kernel is several calls in a row, queued behind a GPU sleep, so that the host's launches
are not in it. Prefill is wall time with a synchronisation around it, 5 runs after 2 warm-ups. What cannot run becomes a
row with `error`. Rows have the keys of `longform bench --json`. Ends with 3 where there is no PyTorch or no CUDA GPU.
"""
import gc
import json
import statistics
import sys
import time
import warnings

# The folder of this script holds a pytorch.py, which a library that asks whether there is a `pytorch` would run.
sys.path.pop(0)
try:
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel
except ImportError as error:
    print(f"no PyTorch: {error}", file=sys.stderr)
    sys.exit(3)
if not torch.cuda.is_available():
    print(f"no CUDA GPU: torch {torch.__version__} finds none", file=sys.stderr)
    sys.exit(3)
try:
    import transformers
except ImportError:
    transformers = None

SHAPES = {"gpt2": (12, 12), "gpt2-medium": (24, 16), "gpt2-large": (36, 20), "gpt2-xl": (48, 25)}
HEAD_DIM, VOCAB = 64, 50257
SAMPLES, WARM_UPS = 10, 3
PREFILL_SAMPLES, PREFILL_WARM_UPS = 5, 2

if len(sys.argv) != 4 or sys.argv[1] not in SHAPES:
    sys.exit(f"usage: pytorch_kernels.py {'|'.join(SHAPES)} CONTEXTS OUT.json")
layers, heads = SHAPES[sys.argv[1]]
width = heads * HEAD_DIM
contexts = [int(c[:-1]) * 1024 if c[-1] in "kK" else int(c) for c in sys.argv[2].split(",")]
out_file = sys.argv[3]
warnings.filterwarnings("ignore")  # SDPA warns of each reason why a backend cannot run; the error names it too
torch.set_grad_enabled(False)

result = {
    "device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda,
    "cudnn": torch.backends.cudnn.version(), "transformers": transformers and transformers.__version__,
    "shape": sys.argv[1], "rows": [],
}


def spread(ms):
    return {"min": min(ms), "median": statistics.median(ms), "max": max(ms)}


def gpu_ms(work, calls):
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(2_000_000)  # cycles, about 1 ms: the host queues all calls meanwhile
    start.record()
    for _ in range(calls):
        work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def measured(work):
    for _ in range(WARM_UPS):
        once = gpu_ms(work, 1)
    calls = max(1, min(20, int(1 / once)))  # about 1 ms a sample
    return spread([gpu_ms(work, calls) for _ in range(SAMPLES)])


def free_memory():
    """Back to nothing held, the workspaces of cuBLAS included, so that each row counts its own."""
    gc.collect()
    torch.cuda.synchronize()
    if hasattr(torch._C, "_cuda_clearCublasWorkspaces"):
        torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def record(phase, kernel, variant, context, dtype, flops, least_bytes, time_it):
    """Runs `time_it`, which allocates what it needs, and writes its row; a failure leaves an error in the row."""
    row = {
        "phase": phase, "kernel": kernel, "variant": variant, "context": context,
        "dtype": "f16" if dtype == torch.float16 else "f32", "ms": None, "tokens_per_s": None, "tflops": None,
        "gb_per_s": None, "peak_bytes": None,
    }
    try:
        held = free_memory()
        row["ms"] = time_it()
        row["peak_bytes"] = torch.cuda.max_memory_allocated() - held
        seconds = row["ms"]["median"] / 1000
        row["tflops"] = flops / seconds / 1e12
        if least_bytes is not None:
            row["gb_per_s"] = least_bytes / seconds / 1e9
        if phase == "prefill":
            row["tokens_per_s"] = context / seconds
    except Exception as error:
        row["error"] = (str(error).strip() or type(error).__name__).split("\n")[0][:300]
    result["rows"].append(row)
    with open(out_file, "w") as file:  # after every row: a lost device does not lose what was measured
        file.write(json.dumps(result, indent=1) + "\n")
    shown = row.get("error") or f"{row['ms']['median']:.3f} ms, {row['tflops']:.1f} TFLOP/s"
    print(f"{kernel or phase} {variant} {row['dtype']} {context}: {shown}", file=sys.stderr)


def fused(backend):
    def time_it(q, k, v):
        with sdpa_kernel(backend):
            return measured(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    return time_it


def textbook(q, k, v):
    """Scores and probabilities in memory, one matrix each."""
    n = q.shape[-2]
    future = torch.ones(n, n, dtype=torch.bool, device="cuda").triu_(1)

    def work():
        scores = torch.matmul(q * HEAD_DIM**-0.5, k.transpose(-1, -2)).masked_fill_(future, float("-inf"))
        return torch.matmul(torch.softmax(scores, dim=-1), v)
    return measured(work)


ATTENTION = [
    ("pytorch flash", torch.float16, fused(SDPBackend.FLASH_ATTENTION)),
    ("pytorch cudnn", torch.float16, fused(SDPBackend.CUDNN_ATTENTION)),
    ("pytorch textbook", torch.float16, textbook),
    ("pytorch f32 efficient", torch.float32, fused(SDPBackend.EFFICIENT_ATTENTION)),
]


def attention(context):
    flops = 2 * context * context * width  # two products over half the square
    for variant, dtype, time_one in ATTENTION:
        def time_it():
            q, k, v = (torch.randn(1, heads, context, HEAD_DIM, dtype=dtype, device="cuda") for _ in range(3))
            return time_one(q, k, v)
        least_bytes = 4 * context * width * dtype.itemsize  # q, k, v and the result
        record("attention", None, variant, context, dtype, flops, least_bytes, time_it)


def gemms(context):
    shapes = [
        ("c_attn", width, 3 * width), ("c_proj", width, width),
        ("c_fc", width, 4 * width), ("mlp_c_proj", 4 * width, width),
    ]
    for name, k, n in shapes:
        def time_it():
            x, w, bias = (torch.randn(s, dtype=torch.float16, device="cuda") for s in ((context, k), (k, n), (n,)))
            return measured(lambda: torch.addmm(bias, x, w))
        least_bytes = 2 * (context * k + k * n + n + context * n)
        record("gemm", name, "cublas", context, torch.float16, 2 * context * k * n, least_bytes, time_it)


def prefill(context):
    def time_it():
        if transformers is None:
            raise RuntimeError("transformers is not installed")
        config = transformers.GPT2Config(
            n_positions=context, n_embd=width, n_layer=layers, n_head=heads, vocab_size=VOCAB,
        )
        with torch.device("cuda"):
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=torch.float16, attn_implementation="sdpa",
            ).eval()
        ids = torch.randint(VOCAB, (1, context), device="cuda")

        def run():
            torch.cuda.synchronize()
            start = time.perf_counter()
            model(ids, use_cache=True, **last_row)
            torch.cuda.synchronize()
            return 1000 * (time.perf_counter() - start)

        last_row = {"logits_to_keep": 1}
        try:
            run()
        except TypeError:  # older releases compute the logits of every token
            last_row = {}
            run()
        for _ in range(PREFILL_WARM_UPS - 1):
            run()
        torch.cuda.reset_peak_memory_stats()
        return spread([run() for _ in range(PREFILL_SAMPLES)])

    # Matrix products of the layers, causal attention over half the square, one row of logits.
    flops = layers * (24 * context * width**2 + 2 * context**2 * width) + 2 * width * VOCAB
    record("prefill", None, "transformers sdpa", context, torch.float16, flops, None, time_it)


for context in contexts:
    attention(context)
    gemms(context)
    prefill(context)
