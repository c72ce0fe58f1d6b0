"""A plan as one screen of text."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from .memory import ENGINES, GB

if TYPE_CHECKING:
    from .plan import Plan, StagePlan


def text_of(plan: Plan) -> str:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=118, highlight=False, color_system=None)
    console.print(
        f"{plan.config}: {plan.architecture} on {plan.gpus} × {plan.memory:g} GB, {plan.mfu:.0%} of {plan.peak_tflops:g} TFLOP/s. "
        f"Nothing here is measured on a GPU."
    )
    for stage in plan.stages:
        _show(console, stage, plan)
    console.print(f"{plan.hours:,.1f} hours in all, {plan.hours * plan.gpus:,.0f} GPU-hours.")
    return str(console.file.getvalue()).rstrip()  # type: ignore[attr-defined]


def _show(console: object, stage: StagePlan, plan: Plan) -> None:
    from rich import box
    from rich.table import Table

    def say(text: str) -> None:
        console.print(text, markup=False)  # type: ignore[attr-defined]

    say(f"\nStage {stage.number}, {stage.name}: {stage.trained / 1e6:,.0f} M of {stage.parameters / 1e6:,.0f} M numbers train")
    say(
        f"  {stage.steps:,} steps of {stage.batch:,} records; {_short(stage.image_tokens)} image tokens, "
        f"{_short(stage.text_tokens)} of text, {_short(stage.label_tokens)} of them labels"
    )
    flops = stage.flops
    say(
        f"  {flops.total:.2e} operations: forward {flops.forward / flops.total:.0%}, backward {flops.backward / flops.total:.0%}, "
        f"computed again {flops.recomputed / flops.total:.0%}, CAL's pass without the image {flops.cal_share:.1%}"
    )
    say(f"  {stage.hours:,.1f} hours")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for column in ("GB a GPU", "weights", "gradients", "optimizer", "communication", "activations", "images", "at the peak", "total", ""):
        table.add_column(column, justify="left" if column in ("GB a GPU", "") else "right")
    for name in ENGINES:
        one = stage.engines[name]
        if one.why_not in ("one GPU", "more than one GPU"):
            continue
        held, live = one.held, one.activations
        parts = (held.weights, held.gradients, held.optimizer, held.communication, live.decoder, live.images)
        peak = max(live.layer, live.contrast, live.head)
        free = plan.memory * GB - one.total
        verdict = one.why_not or ("too much" if free < 0 else f"{free / GB:.0f} free")
        if name == stage.chosen:
            verdict += f" <- seecal accelerate-config {name}"
        table.add_row(name, *(_gb(part) for part in (*parts, peak, one.total)), verdict)
    console.print(table)  # type: ignore[attr-defined]
    if stage.chosen is None:
        say("  None fits: more GPUs, a smaller per_device_train_batch_size, or lora.")
    for note in stage.notes:
        say(f"  {note}")


def _gb(value: float) -> str:
    return f"{value / GB:.1f}"


def _short(value: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f}"
