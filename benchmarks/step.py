"""One training step, forward and backward: what people run today, CAL as published, and ours (see variants.py).

Every variant works on the same parameters and the same batch, in interleaved rounds of one process. ``of_hf`` and
``of_mle`` are ratios of medians; ``floor_of_hf`` and ``floor_of_mle`` beside them are what counting operations says
(flops.py), known before anything is measured. ``peak_mib`` is beyond ``held_mib``, the weights and the batch; gradients
are part of the peak. On a CPU only the counts and the peak mean something.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from common import arguments, device, held_mib, interleaved, peak_mib, runnable, write
from flops import floors, work_of
from shapes import SHAPES, Shape, batch_of, build, draw
from variants import DEFAULT, NAMES, Variant, make, missing


def measure(
    shape: Shape, names: list[str], rounds: int, seconds: float | None, model: Any = None
) -> tuple[list[dict[str, Any]], Any]:
    """(a row a variant, the model). ``model``: of an earlier shape that differs in its batch only."""
    where = device()
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    model = model or build(shape, where, dtype)
    batch = batch_of(shape, where, dtype)
    left_out = {name: why for name in names if (why := missing(name, where))}
    variants = {name: make(name, model, batch) for name in names if name not in left_out}

    def run(variant: Variant) -> None:
        for _ in range(variant.every):
            model.zero_grad(set_to_none=True)
            variant.loss().backward()

    steps = {name: lambda variant=variant: run(variant) for name, variant in variants.items()}
    steps, notes = runnable(steps, lambda: model.zero_grad(set_to_none=True))
    times = interleaved(steps, rounds, warmup=0, seconds=seconds)
    counted = floors(shape, work_of(draw(shape)[0]))
    rows = []
    for name in names:
        row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
        row.update(variant=name, note=left_out.get(name) or notes.get(name, ""))
        row.update(floor_of_hf=counted[name] / counted["hf"], floor_of_mle=counted[name] / counted["mle"])
        if name in times:
            variant = variants[name]
            row.update({key: value / variant.every for key, value in times[name].items()}, rounds=times[name]["rounds"])
            for other in ("hf", "mle"):
                if other in times:
                    row[f"of_{other}"] = row["p50_ms"] / times[other]["p50_ms"]
            model.zero_grad(set_to_none=True)
            row.update(held_mib=held_mib(model, batch), peak_mib=peak_mib(steps[name]))
            row["main_tokens"], row["contrast_tokens"] = variant.tokens(batch)
        rows.append(row)
    return rows, model


COLUMNS = (
    "variant", "rounds", "p20_ms", "p50_ms", "p80_ms", "of_hf", "floor_of_hf", "of_mle", "floor_of_mle",
    "held_mib", "peak_mib", "main_tokens", "contrast_tokens", "note",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument(
        "--variants", default=",".join(DEFAULT), help=f"comma-separated, of {', '.join(NAMES)} (all but the last two)"
    )
    parser.add_argument("--name", default=None, help="name of the CSV (step-SHAPE)")
    arguments(parser)
    options = parser.parse_args()
    names = options.variants.split(",")
    if unknown := sorted(set(names) - set(NAMES)):
        parser.error(f"--variants: there is no {', '.join(unknown)}; there are {', '.join(NAMES)}")
    rows, _ = measure(SHAPES[options.shape], names, options.rounds, options.seconds)
    write(options.name or f"step-{options.shape}", [{"shape": options.shape, **row} for row in rows], options.out)
    for row in rows:
        if row["note"]:
            print(f"{row['variant']}: {row['note']}")
    sys.exit(any(row["note"].startswith("failed") for row in rows))


if __name__ == "__main__":
    main()
