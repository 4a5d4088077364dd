"""Measures how far the recorded float32 classification logits are from the same network in float64.

Run with numpy:  python3 tests/golden/classify_float64.py
Writes tests/golden/classify_float64.json: by length, the largest absolute difference over the documents; the yardstick of
the f32 bounds. Two minutes a document on two cores.
"""
import json
import pathlib
import struct

import numpy as np

root = pathlib.Path(__file__).parent


def tensors(path):
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    kinds = {"F16": np.float16, "F32": np.float32, "I32": np.int32, "U16": np.uint16}
    for name, info in json.loads(raw[8:8 + size]).items():
        if name == "__metadata__":
            continue
        begin, end = (8 + size + offset for offset in info["data_offsets"])
        yield name, np.frombuffer(raw[begin:end], kinds[info["dtype"]]).reshape(info["shape"])


folder = root / "../../weights/classics-16k"
config = json.loads((folder / "config.json").read_text())
weights = {name.removeprefix("transformer."): value.astype(np.float64)
           for name, value in tensors(folder / "model.safetensors")}
heads, width = config["n_head"], config["n_embd"]
size = width // heads


def norm(x, name):
    x = x - x.mean(-1, keepdims=True)
    x /= np.sqrt((x * x).mean(-1, keepdims=True) + config["layer_norm_epsilon"])
    return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x, name):
    return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def attention(qkv, rows=1024):
    out = np.empty((len(qkv), width))
    for head in range(heads):
        q, k, v = (qkv[:, part * width + head * size:][:, :size] for part in range(3))
        for first in range(0, len(q), rows):
            end = min(first + rows, len(q))
            scores = q[first:end] @ k[:end].T / np.sqrt(size)
            scores[np.arange(first, end)[:, None] < np.arange(end)] = -np.inf
            scores -= scores.max(-1, keepdims=True)
            np.exp(scores, out=scores)
            out[first:end, head * size:][:, :size] = scores @ v[:end] / scores.sum(-1, keepdims=True)
    return out


def logits(ids, lengths):
    x = weights["wte.weight"][ids] + weights["wpe.weight"][:len(ids)]
    for i in range(config["n_layer"]):
        h = f"h.{i}"
        x = x + linear(attention(linear(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn")), f"{h}.attn.c_proj")
        x = x + linear(gelu(linear(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc")), f"{h}.mlp.c_proj")
    return norm(x[np.array(lengths) - 1], "ln_f") @ weights["score.weight"].T


golden = json.loads((root / "classify.json").read_text())
documents = dict(tensors(root / "classify.safetensors"))
drift = {}
for text, ids in documents.items():
    cases = [case for case in golden["cases"] if case["text"] == text]
    rows = logits(ids.astype(np.int64), [case["tokens"] for case in cases])
    for case, row in zip(cases, rows):
        key = str(case["tokens"])
        drift[key] = max(drift.get(key, 0.0), float(np.abs(row - case["logits"]).max()))
    print(text, drift, flush=True)
(root / "classify_float64.json").write_text(json.dumps(drift, indent=1) + "\n")
