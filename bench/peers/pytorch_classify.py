"""Classifies the documents of a JSONL file with transformers' GPT2ForSequenceClassification in float16 (SDPA): one by one, and
in batches of documents of like length, padded. Prints documents and tokens a second with and without tokenization, and how
far the logits are from another run's results, if they are given.

  python3 -P bench/peers/pytorch_classify.py DOCUMENTS.jsonl [--model weights/classics-16k] [--most 16384]
      [--batch-tokens 65536] [--how one_by_one,bucketed] [--results OURS.jsonl] [--out FILE.json]

-P keeps pytorch.py in this folder from being taken for a package of that name.
"""
import argparse
import json
import time

import torch
import transformers
from transformers import GPT2ForSequenceClassification, PreTrainedTokenizerFast

parser = argparse.ArgumentParser()
parser.add_argument("documents")
parser.add_argument("--model", default="weights/classics-16k")
parser.add_argument("--most", type=int, default=16384)
parser.add_argument("--batch-tokens", type=int, default=65536)
parser.add_argument("--how", default="one_by_one,bucketed")
parser.add_argument("--results")
parser.add_argument("--out")
args = parser.parse_args()

model = GPT2ForSequenceClassification.from_pretrained(args.model, dtype=torch.float16, attn_implementation="sdpa")
model = model.cuda().eval()
tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{args.model}/tokenizer.json")
texts = [json.loads(line)["text"] for line in open(args.documents)]

starting = time.perf_counter()
documents = [ids[:args.most] for ids in tokenizer(texts)["input_ids"]]  # Rust, on all cores
tokenize_s = time.perf_counter() - starting
tokens = sum(map(len, documents))


@torch.inference_mode()
def logits_of(batch):
    longest = max(map(len, batch))
    ids = torch.full((len(batch), longest), model.config.pad_token_id)
    mask = torch.zeros_like(ids)
    for i, one in enumerate(batch):
        ids[i, :len(one)] = torch.tensor(one)
        mask[i, :len(one)] = 1
    options = {} if len(batch) == 1 else {"attention_mask": mask.cuda()}
    return model(ids.cuda(), use_cache=False, **options).logits.float().cpu()


def one_by_one():
    return torch.cat([logits_of([ids]) for ids in documents])


def bucketed():
    order = sorted(range(len(documents)), key=lambda i: len(documents[i]))
    out = torch.empty(len(documents), model.config.num_labels)
    while order:
        longest = len(documents[order[-1]])
        batch = order[-max(1, args.batch_tokens // longest):]
        del order[-len(batch):]
        out[batch] = logits_of([documents[i] for i in batch])
    return out


result = {
    "adapter": torch.cuda.get_device_name(), "torch": torch.__version__, "transformers": transformers.__version__,
    "documents": len(documents), "tokens": tokens, "tokenize_s": tokenize_s, "rows": [],
}
for how in [{"one_by_one": one_by_one, "bucketed": bucketed}[name] for name in args.how.split(",")]:
    logits_of([documents[0]])
    torch.cuda.synchronize()
    starting = time.perf_counter()
    logits = how()
    s = time.perf_counter() - starting
    row = {
        "how": how.__name__, "s": s, "documents_per_s": len(documents) / s, "tokens_per_s": tokens / s,
        "documents_per_s_with_tokenization": len(documents) / (s + tokenize_s),
        "tokens_per_s_with_tokenization": tokens / (s + tokenize_s),
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }
    if args.results:
        ours = [list(json.loads(line)["logits"].values()) for line in open(args.results)]
        row["largest_difference"] = (logits - torch.tensor(ours)).abs().max().item()
        row["same_label"] = (logits.argmax(-1) == torch.tensor(ours).argmax(-1)).sum().item()
    result["rows"].append(row)
    print(row, flush=True)
print(f"tokenization {tokenize_s:.2f} s")
if args.out:
    with open(args.out, "w") as file:
        json.dump(result, file, indent=1)
