"""Times Hugging Face GPT-2 on the same checkpoint and prompt: python3 bench/peers/pytorch.py DIR IDS.json N [OUT.json]

float16, SDPA attention, batch 1. Prefill and decode are timed apart, with a synchronisation around each, median of 5.
"""
import json
import statistics
import sys
import time

import torch
import transformers

model_dir, ids_file, new_tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = transformers.GPT2LMHeadModel.from_pretrained(model_dir, dtype=torch.float16, attn_implementation="sdpa")
model = model.cuda().eval()
ids = torch.tensor([json.load(open(ids_file))]).cuda()


def timed(work):
    torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    torch.cuda.synchronize()
    return result, 1000 * (time.perf_counter() - start)


@torch.no_grad()
def run():
    out, prefill_ms = timed(lambda: model(ids, use_cache=True, logits_to_keep=1))

    def decode():
        past, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        for _ in range(new_tokens - 1):
            step = model(token, past_key_values=past, use_cache=True)
            past, token = step.past_key_values, step.logits[:, -1:].argmax(-1)
    _, decode_ms = timed(decode)
    return prefill_ms, decode_ms


run()
torch.cuda.reset_peak_memory_stats()
runs = [run() for _ in range(5)]
prefill = sorted(r[0] for r in runs)
decode = sorted(r[1] for r in runs)
result = {
    "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "transformers": transformers.__version__,
    "prompt_tokens": ids.shape[1], "generated": new_tokens,
    "prefill_ms": {"median": statistics.median(prefill), "min": prefill[0], "max": prefill[-1]},
    "prefill_tokens_per_s": 1000 * ids.shape[1] / statistics.median(prefill),
    "decode_tokens_per_s": 1000 * (new_tokens - 1) / statistics.median(decode),
    "peak_bytes": torch.cuda.max_memory_allocated(),
}
print(json.dumps(result, indent=1))
if len(sys.argv) > 4:
    open(sys.argv[4], "w").write(json.dumps(result, indent=1) + "\n")
