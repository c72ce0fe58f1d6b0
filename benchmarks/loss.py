"""The loss alone, forward and backward, over N rows and V words.

naive   the lines that weighted_linear_cross_entropy replaces: N × V logits, several times
ours    weighted_linear_cross_entropy with its default chunk of about 2**25 logits
ours-128  the same with chunks of 128 rows
trl     TRL's tiles of rows × words (its Triton kernel on a GPU)
liger   Liger-Kernel's fused linear cross-entropy, where it is installed; it knows no token weights

``mib_per_row`` is what the peak holds beyond the gradients that anybody must hold, per row: flat in N × V where it falls as
1/N. Times on a CPU are noise; the peak is not.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from common import arguments, device, interleaved, lacks, peak_mib, runnable, write

from seecal import weighted_linear_cross_entropy

SIZES = {
    "tiny": {"rows": [64, 256], "vocabulary": [4096], "width": 64},
    "cpu": {"rows": [512, 2048, 8192], "vocabulary": [16384, 65536], "width": 128},
    "gpu": {"rows": [1024, 4096, 16384], "vocabulary": [32064, 151936], "width": 4096},
}
LIBRARIES = {
    "trl": ("trl.kernels", "ChunkedLogProbFunction"),
    "liger": ("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss"),
}
COLUMNS = ("p20_ms", "p50_ms", "p80_ms", "rounds", "peak_mib", "grads_mib", "mib_per_row", "note")


def naive(hidden, weight, labels, token_weights):
    logits = (hidden @ weight.T).float()
    ce = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return (token_weights * ce).sum() / token_weights.sum()


def ours(hidden, weight, labels, token_weights):
    return weighted_linear_cross_entropy(hidden, weight, labels, token_weights)


def ours_128(hidden, weight, labels, token_weights):
    return weighted_linear_cross_entropy(hidden, weight, labels, token_weights, chunk_size=128)


def trl(hidden, weight, labels, token_weights):
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer import utils

    words = utils._CHUNKED_LOGPROB_CHUNK_SIZE
    outputs = ("log_probs", "entropy", "is_top1")
    log_probs = ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, words, None, 1.0, outputs)[0]
    return -(token_weights * log_probs).sum() / token_weights.sum()


def liger(hidden, weight, labels, token_weights):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, hidden, labels)


LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "naive": naive,
    "ours": ours,
    "ours-128": ours_128,
    "trl": trl,
    "liger": liger,
}


def measure(count: int, vocabulary: int, width: int, rounds: int) -> list[dict[str, Any]]:
    """A row a variant, of ``count`` rows and ``vocabulary`` words."""
    where = device()
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    draw = {"dtype": dtype, "device": where}
    hidden = torch.randn(count, width, **draw).requires_grad_()
    weight = torch.randn(vocabulary, width, **draw).div_(width**0.5).requires_grad_()
    labels = torch.randint(vocabulary, (count,), device=where)
    token_weights = torch.rand(count, device=where) + 1

    def clear() -> None:
        hidden.grad = weight.grad = None

    def step(function: Callable[..., torch.Tensor]) -> None:
        clear()
        function(hidden, weight, labels, token_weights).backward()

    left_out = {name: why for name, library in LIBRARIES.items() if (why := lacks(*library))}
    steps = {name: lambda one=one: step(one) for name, one in LOSSES.items() if name not in left_out}
    steps, notes = runnable(steps, clear)
    times = interleaved(steps, rounds, warmup=0)
    grads = (hidden.nbytes + weight.nbytes) / 2**20
    rows = []
    for name in LOSSES:
        row = {"variant": name, "rows": count, "vocabulary": vocabulary, "width": width}
        row |= {**dict.fromkeys(COLUMNS, ""), "grads_mib": grads, "note": left_out.get(name) or notes.get(name, "")}
        if name in steps:
            clear()
            peak = peak_mib(steps[name])
            row |= {**times[name], "peak_mib": peak, "mib_per_row": (peak - grads) / count}
        rows.append({**row, "dtype": str(dtype).split(".")[1]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="gpu" if torch.cuda.is_available() else "cpu")
    arguments(parser)
    options = parser.parse_args()
    size = SIZES[options.size]
    rows: list[dict[str, Any]] = []
    begin = time.monotonic()
    for vocabulary, count in itertools.product(size["vocabulary"], size["rows"]):
        if options.seconds is not None and time.monotonic() - begin > options.seconds:
            print(f"time was up before {count} rows of {vocabulary} words")
            break
        rows += measure(count, vocabulary, size["width"], options.rounds)
        write(f"loss-{options.size}", rows, options.out, show=False)  # a run that is cut off leaves what it has
    write(f"loss-{options.size}", rows, options.out)


if __name__ == "__main__":
    main()
