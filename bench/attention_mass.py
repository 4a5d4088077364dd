"""How much of dense attention's probability a choice of blocks keeps, by layer: what any sparse pattern is up against.

    python3 bench/attention_mass.py IDS.json [--model weights/classics-16k] [--tokens 8192] [--keep 16,32] [--out FILE.txt]

The last 128 queries of a text attend to blocks of 64 keys: to the first and the latest ones (window), to those that `topk`
chooses by mean and spread of their keys (chosen: the first, the two latest, and the best), or to those that really hold the
most probability, which no method can know beforehand (best possible). Means over heads and queries. numpy, float32.
"""
import argparse
import json
import struct
import sys

import numpy as np

BLOCK = 64
QUERIES = 128
RECENT = 2

parser = argparse.ArgumentParser()
parser.add_argument("ids")
parser.add_argument("--model", default="weights/classics-16k")
parser.add_argument("--tokens", type=int, default=8192)
parser.add_argument("--keep", default="16,32")
parser.add_argument("--out")
args = parser.parse_args()

with open(f"{args.model}/config.json") as file:
    config = json.load(file)
layers, heads, width = config["n_layer"], config["n_head"], config["n_embd"]
size = width // heads
with open(f"{args.model}/model.safetensors", "rb") as file:
    data = file.read()
start = 8 + struct.unpack("<Q", data[:8])[0]
header = json.loads(data[8:start])


def tensor(name):
    info = next(value for key, value in header.items() if key in (name, f"transformer.{name}"))
    first, end = (start + offset for offset in info["data_offsets"])
    dtype = {"F16": np.float16, "F32": np.float32}[info["dtype"]]
    return np.frombuffer(data[first:end], dtype).astype(np.float32).reshape(info["shape"])


def linear(x, name):
    return x @ tensor(f"{name}.weight") + tensor(f"{name}.bias")


def norm(x, name):
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + config["layer_norm_epsilon"])
    return y * tensor(f"{name}.weight") + tensor(f"{name}.bias")


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def probabilities(q, k, first):
    scores = q @ k.T / np.sqrt(size)
    scores[np.arange(len(k)) > first + np.arange(len(q))[:, None]] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def kept_mass(mass, scores, rows, keep, recent):
    """The probability in `keep` blocks: the first, the `recent` latest, and the best by score."""
    scores = scores.copy()
    scores[:, 0] = np.inf
    for i, row in enumerate(rows):
        scores[i, row + 1 :] = -np.inf
        scores[i, row - recent + 1 : row + 1] = np.inf
    chosen = np.argsort(-scores, 1)[:, :keep]
    return np.take_along_axis(mass, chosen, 1).sum(-1).mean()


with open(args.ids) as file:
    ids = np.array(json.load(file)[: args.tokens])
tokens = len(ids)
blocks = tokens // BLOCK
rows = np.arange(tokens - QUERIES, tokens) // BLOCK
keeps = [int(keep) for keep in args.keep.split(",")]
kinds = ["window", "chosen", "best possible"]
table = {(keep, kind): [] for keep in keeps for kind in kinds}
x = tensor("wte.weight")[ids] + tensor("wpe.weight")[:tokens]
for layer in range(layers):
    qkv = linear(norm(x, f"h.{layer}.ln_1"), f"h.{layer}.attn.c_attn").reshape(tokens, 3, heads, size)
    attended = np.empty((tokens, heads, size), np.float32)
    masses = {cell: [] for cell in table}
    for head in range(heads):
        q, k, v = qkv[:, 0, head], qkv[:, 1, head], qkv[:, 2, head]
        for first in range(0, tokens, 1024):
            end = first + 1024
            attended[first:end, head] = probabilities(q[first:end], k[:end], first) @ v[:end]
        last = q[-QUERIES:]
        mass = probabilities(last, k, tokens - QUERIES).reshape(QUERIES, blocks, BLOCK).sum(-1)
        by_block = k.reshape(blocks, BLOCK, size)
        summary = last @ by_block.mean(1).T + np.abs(last) @ by_block.std(1).T
        for keep in keeps:
            masses[keep, "window"].append(kept_mass(mass, summary, rows, keep, keep - 1))
            masses[keep, "chosen"].append(kept_mass(mass, summary, rows, keep, RECENT))
            masses[keep, "best possible"].append(kept_mass(mass, mass, rows, keep, RECENT))
    for cell, values in masses.items():
        table[cell].append(np.mean(values))
    x = x + linear(attended.reshape(tokens, width), f"h.{layer}.attn.c_proj")
    x = x + linear(gelu(linear(norm(x, f"h.{layer}.ln_2"), f"h.{layer}.mlp.c_fc")), f"h.{layer}.mlp.c_proj")

lines = [f"{args.model}, {args.ids.split('/')[-1]}, {tokens} tokens, {blocks} blocks of {BLOCK}; {sys.argv[0]}, numpy {np.__version__}"]
lines.append(f"{'kept':>5} {'blocks':<14} {'all':>6}  layers 0 to {layers - 1}")
for (keep, kind), values in table.items():
    by_layer = " ".join(f"{value:.3f}" for value in values)
    lines.append(f"{keep:>5} {kind:<14} {np.mean(values):>6.3f}  {by_layer}")
print("\n".join(lines))
if args.out:
    with open(args.out, "w") as file:
        file.write("\n".join(lines) + "\n")
