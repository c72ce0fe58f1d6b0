"""One training step, forward and backward: what people run today, CAL as published, and ours (see variants.py).

Every variant works on the same parameters and the same batch, in interleaved rounds of one process. ``of_hf`` and
``of_mle`` are ratios of medians; ``of_hf_p20``, ``of_hf_p50`` and ``of_hf_p80`` are of the ratios of single rounds;
``floor_of_hf`` and ``floor_of_mle`` beside them are what counting operations says (flops.py), known before anything is
measured. ``peak_mib`` is beyond ``held_mib``, the weights and the batch; gradients are part of the peak.

A CPU's time is no user's time, but a ratio of one run is a measurement: the shapes 135m, 135m-next and 60m-152k are for
two cores, and their CSVs are called step-SHAPE-cpu.csv there.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from common import Runs, arguments, device, held_mib, peak_mib, round_times, runnable, spread, summary, write
from flops import floors, work_of
from shapes import CPU_SHAPES, SHAPES, Shape, batch_of, build, draw
from variants import DEFAULT, EXTRA, NAMES, ON_CPU, Variant, make, missing


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
    steps, peaks, notes = _first_round(steps, model, where)
    times = round_times(steps, rounds, warmup=0, seconds=seconds)
    counted = floors(shape, work_of(draw(shape)[0]))
    rows = []
    for name in names:
        row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
        row.update(variant=name, note=left_out.get(name) or notes.get(name, ""))
        row.update(floor_of_hf=counted[name] / counted["hf"], floor_of_mle=counted[name] / counted["mle"])
        if name in times:
            row.update(_ratios(name, {other: _of_a_step(times[other], variants[other]) for other in times}))
            model.zero_grad(set_to_none=True)
            peak = peaks[name] if name in peaks else peak_mib(steps[name])
            row.update(held_mib=held_mib(model, batch), peak_mib=peak)
            row["main_tokens"], row["contrast_tokens"] = variants[name].tokens(batch)
        rows.append(row)
    return rows, model


def _first_round(steps: Runs, model: Any, where: torch.device) -> tuple[Runs, dict[str, float], dict[str, str]]:
    """(the steps that can run, their peaks in MiB, why the others cannot): the round that is not counted.

    A CPU's peak is what the operators ask for, the same in every round, so it is watched here. A GPU's holds what
    libraries keep from their first call on: no peaks, they are for later.
    """
    peaks: dict[str, float] = {}

    def watched(name: str) -> None:
        peaks[name] = peak_mib(steps[name])

    first = {name: lambda name=name: watched(name) for name in steps} if where.type == "cpu" else steps
    able, notes = runnable(first, lambda: model.zero_grad(set_to_none=True))
    return {name: steps[name] for name in able}, peaks, notes


def _of_a_step(times: list[float], variant: Variant) -> list[float]:
    return [value / variant.every for value in times]


def _ratios(name: str, times: dict[str, list[float]]) -> dict[str, float]:
    """The times of one variant and its ratios to the two that it is compared with, where those ran."""
    found = summary(times[name])
    for other in {"hf", "mle"} & set(times):
        found[f"of_{other}"] = found["p50_ms"] / summary(times[other])["p50_ms"]
    if "hf" in times:
        found |= {f"of_hf_{key}": value for key, value in spread(times[name], times["hf"]).items()}
    return found


COLUMNS = (
    "variant", "rounds", "p20_ms", "p50_ms", "p80_ms", "of_hf", "of_hf_p20", "of_hf_p50", "of_hf_p80", "floor_of_hf",
    "of_mle", "floor_of_mle", "held_mib", "peak_mib", "main_tokens", "contrast_tokens", "note",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument(
        "--variants",
        default=None,
        help=f"comma-separated, of {', '.join(NAMES)} "
        f"(all but {', '.join(EXTRA)}; of a shape for CPUs {', '.join(ON_CPU)})",
    )
    parser.add_argument("--name", default=None, help="name of the CSV (step-SHAPE; on a CPU step-SHAPE-cpu)")
    arguments(parser)
    options = parser.parse_args()
    usual = ON_CPU if options.shape in CPU_SHAPES else DEFAULT
    names = list(usual) if options.variants is None else options.variants.split(",")
    if unknown := sorted(set(names) - set(NAMES)):
        parser.error(f"--variants: there is no {', '.join(unknown)}; there are {', '.join(NAMES)}")
    rows, _ = measure(SHAPES[options.shape], names, options.rounds, options.seconds)
    on_cpu = options.shape in CPU_SHAPES and device().type == "cpu"
    name = options.name or f"step-{options.shape}{'-cpu' if on_cpu else ''}"
    write(name, [{"shape": options.shape, **row} for row in rows], options.out)
    for row in rows:
        if row["note"]:
            print(f"{row['variant']}: {row['note']}")
    sys.exit(any(row["note"].startswith("failed") for row in rows))


if __name__ == "__main__":
    main()
