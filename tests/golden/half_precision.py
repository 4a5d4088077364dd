"""Measures how far PyTorch's own float16 GPT-2 drifts from the recorded float32 references.

Run on a machine with CUDA, PyTorch and transformers:  python3 tests/golden/half_precision.py
Writes tests/golden/half_precision.json: largest absolute differences, and for each prompt the relative one of the mean
NLL; the yardstick for every f16 bound.
"""
import json
import pathlib

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel

root = pathlib.Path(__file__).parent
model = GPT2LMHeadModel.from_pretrained(root / "../../weights/classics-16k", dtype=torch.float16, attn_implementation="eager")
model = model.cuda().eval()


def diff(a, b):
    return (a.float().cpu() - b.float()).abs().max().item()


@torch.no_grad()
def run(ids, hidden=False):
    return model(torch.as_tensor(ids).long()[None].cuda(), output_hidden_states=hidden, use_cache=False)


short = load_file(root / "short.safetensors")
out = run(short["input_ids"], hidden=True)
states = out.hidden_states  # embedding, blocks but the last, then the last block after ln_f
captured = []
handle = model.transformer.h[-1].register_forward_hook(
    lambda _, __, output: captured.append(output[0] if isinstance(output, tuple) else output))
run(short["input_ids"])
handle.remove()
last = captured[0].reshape(-1, captured[0].shape[-1])
blocks = [states[i + 1][0] for i in range(7)] + [last]
positions = short["logit_positions"].long()
result = {
    "short": {
        "embedding": diff(states[0][0], short["embedding"]),
        "blocks": [diff(block, short[f"block_{i}"]) for i, block in enumerate(blocks)],
        "lnF": diff(states[-1][0], short["ln_f"]),
        "logits": diff(out.logits[0].cpu()[positions], short["logits"]),
    },
    "prompt": {},
}
for tokens in (1024, 4096, 16384):
    golden = load_file(root / f"prompt_{tokens}.safetensors")
    ids = golden["input_ids"]
    logits = run(ids).logits[0].float().cpu()
    nll = F.cross_entropy(logits[:-1], ids[1:].long(), reduction="none")
    result["prompt"][str(tokens)] = {
        "logits": diff(logits[golden["positions"].long()], golden["logits"]),
        "nll": diff(nll, golden["nll"]),
        "meanNllRelative": abs(nll.double().mean() / golden["nll"].double().mean() - 1).item(),
    }
classes = json.loads((root / "classify.json").read_text())
documents = load_file(root / "classify.safetensors")
classifier = GPT2ForSequenceClassification.from_pretrained(
    root / "../../weights/classics-16k", dtype=torch.float16, attn_implementation="eager")
classifier = classifier.cuda().eval()
result["classify"] = {}
for case in classes["cases"]:
    ids = documents[case["text"]][:case["tokens"]].long()[None].cuda()
    with torch.no_grad():
        logits = classifier(ids, use_cache=False).logits[0]
    key = str(case["tokens"])
    error = diff(logits, torch.tensor(case["logits"]))
    result["classify"][key] = max(result["classify"].get(key, 0.0), error)
(root / "half_precision.json").write_text(json.dumps(result, indent=1) + "\n")
print(json.dumps(result))
