"""The loss alone: weighted_linear_cross_entropy against the lines that it replaces, over N rows and V words.

Times on a CPU are noise; the peak memory is not: the naive version holds N × V logits several times, ours one chunk.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import device, interleaved, peak_mib, write

from seecal import weighted_linear_cross_entropy

SIZES = {
    "cpu": {"rows": [256, 1024], "vocabulary": [4096, 16384], "width": 256},
    "gpu": {"rows": [1024, 4096, 16384], "vocabulary": [32064, 151936], "width": 4096},
}


def naive(hidden, weight, labels, token_weights):
    logits = (hidden @ weight.T).float()
    ce = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return (token_weights * ce).sum() / token_weights.sum()


def ours(hidden, weight, labels, token_weights):
    return weighted_linear_cross_entropy(hidden, weight, labels, token_weights, chunk_size=128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="gpu" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None, help="folder of the CSV (benchmarks/results)")
    options = parser.parse_args()
    size, where = SIZES[options.size], device()
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    rows = []
    for vocabulary in size["vocabulary"]:
        for count in size["rows"]:
            draw = {"dtype": dtype, "device": where}
            hidden = torch.randn(count, size["width"], **draw).requires_grad_()
            weight = torch.randn(vocabulary, size["width"], **draw).div_(size["width"] ** 0.5).requires_grad_()
            labels = torch.randint(vocabulary, (count,), device=where)
            token_weights = torch.rand(count, device=where) + 1

            def step(function, hidden=hidden, weight=weight, labels=labels, token_weights=token_weights):
                hidden.grad = weight.grad = None
                function(hidden, weight, labels, token_weights).backward()

            variants = {"naive": lambda step=step: step(naive), "seecal": lambda step=step: step(ours)}
            times = interleaved(variants, options.rounds)
            for name, run in variants.items():
                shape = {"variant": name, "rows": count, "vocabulary": vocabulary, "width": size["width"]}
                rows.append({**shape, **times[name], "peak_mib": peak_mib(run), "dtype": str(dtype).split(".")[1]})
    write(f"loss-{options.size}", rows, options.out)


if __name__ == "__main__":
    main()
