"""A plan as one screen of text."""

from __future__ import annotations

import io
from typing import Any

from .memory import ENGINES, GB

_COLUMNS = ("GB a GPU", "weights", "gradients", "optimizer", "network", "kept", "images", "moment", "total")


def text_of(plan: Any) -> str:
    """A :class:`seecal.Plan` in lines of at most 118 characters."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=118, highlight=False, color_system=None, markup=False)
    console.print(
        f"{plan.config}: {plan.architecture} on {plan.gpus} × {plan.memory:g} GB, at {plan.mfu:.0%} of "
        f"{plan.peak_tflops:g} TFLOP/s. Computed, not measured on GPUs."
    )
    for stage in plan.stages:
        _show(console, stage, plan)
    console.print(f"\n{plan.hours:,.1f} hours in all, {plan.hours * plan.gpus:,.0f} GPU-hours.")
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]


def _show(console: Any, stage: Any, plan: Any) -> None:
    flops = stage.flops
    console.print(
        f"\nStage {stage.number} ({stage.name}): {_short(stage.trained)} of {_short(stage.parameters)} numbers train. "
        f"{stage.steps:,} steps of {stage.batch:,} records, {stage.hours:,.1f} hours\n"
        f"  tokens: {_short(stage.image_tokens)} of images, {_short(stage.text_tokens)} of text, "
        f"{_short(stage.label_tokens)} of those labels\n"
        f"  {flops.total:.2e} operations: forward {flops.forward / flops.total:.0%}, backward "
        f"{flops.backward / flops.total:.0%}, computed again {flops.recomputed / flops.total:.0%}, "
        f"CAL's pass without the image {flops.cal_share:.1%}"
    )
    for note in stage.notes:
        console.print(f"  {note}")
    console.print(_memory(stage, plan))
    if stage.chosen is None:
        console.print("  None fits: more GPUs, a smaller per_device_train_batch_size, gradient_checkpointing, or lora.")
    else:
        console.print(f'  Launch with --config_file "$(seecal accelerate-config {stage.chosen})"')


def _memory(stage: Any, plan: Any) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for column in (*_COLUMNS, ""):
        table.add_column(column, justify="left" if column in (_COLUMNS[0], "") else "right", no_wrap=True)
    for name in ENGINES:
        one = stage.engines[name]
        if one.for_other_counts:
            continue
        held, live = one.held, one.activations
        parts = (held.weights, held.gradients, held.optimizer, held.communication, live.decoder, live.images)
        free = plan.memory * GB - one.total
        verdict = one.why_not or ("too much" if free < 0 else f"{free / GB:.0f} free")
        if one.why_not is None and 0 <= free < plan.memory * GB - plan.room:
            verdict += ", too little to be sure"
        table.add_row(name, *(f"{part / GB:.1f}" for part in (*parts, live.momentary, one.total)), verdict)
    return table


def _short(value: float) -> str:
    for unit, size in ((" B", 1e9), (" M", 1e6), (" k", 1e3)):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.0f}"
