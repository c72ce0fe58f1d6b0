"""``seecal.plan``: what a recipe will need on so many GPUs, from configs alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..recipes.recipe import Recipe, Stage, arguments, read
from .activations import Activations, activations_of
from .flops import StageFlops, flops_of
from .memory import ENGINES, GB, Held, Precision, held
from .stage_model import StageModel, architecture_of, stage_model
from .workload import Wanted, Workload, workload_of

# Of a GPU's memory: what CUDA, NCCL and fragmentation take is not counted, so it is left free. An assumption.
HEADROOM = 0.1


@dataclass(frozen=True)
class EnginePlan:
    """One way of launching.

    Attributes:
        held: bytes on a GPU of weights, gradients, optimizer and communication.
        activations: bytes on a GPU of a micro-batch as large as there can be.
        why_not: why this stage cannot be launched so; None: it can.
        for_other_counts: it is for one GPU and there are several, or the reverse.
    """

    held: Held
    activations: Activations
    why_not: str | None
    for_other_counts: bool = False

    @property
    def total(self) -> float:
        return self.held.total + self.activations.total


@dataclass(frozen=True)
class StagePlan:
    """One stage.

    Attributes:
        name, number: of the stage.
        trained, parameters: numbers that train, and all.
        batch: records of an optimizer step.
        steps: optimizer steps.
        records: that are trained on, over all epochs.
        image_tokens, text_tokens, label_tokens: over all of them.
        flops: of all steps on all GPUs.
        hours: of the stage, at the rate asked for.
        engines: name → what each GPU holds.
        chosen: the first engine that fits; None: none does.
        notes: where figures are from, and what is assumed.
    """

    number: int
    name: str
    trained: int
    parameters: int
    batch: int
    steps: int
    records: int
    image_tokens: float
    text_tokens: float
    label_tokens: float
    flops: StageFlops
    hours: float
    engines: Mapping[str, EnginePlan]
    chosen: str | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What :func:`seecal.plan` found. As text it is one screen.

    Attributes:
        config: the recipe.
        architecture: the model whose sizes were taken.
        gpus, memory, mfu, peak_tflops: as asked for.
        stages: in their order.
    """

    config: str
    architecture: str
    gpus: int
    memory: float
    mfu: float
    peak_tflops: float
    stages: tuple[StagePlan, ...] = field(repr=False)

    @property
    def room(self) -> float:
        """Bytes that may be filled on a GPU."""
        return self.memory * GB * (1 - HEADROOM)

    @property
    def hours(self) -> float:
        return sum(stage.hours for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it; bytes are bytes, operations are operations."""
        found = asdict(self)
        for stage, shown in zip(self.stages, found["stages"], strict=True):
            shown["flops"]["total"] = stage.flops.total
            for name, engine in stage.engines.items():
                shown["engines"][name]["total"] = engine.total
        return {**found, "hours": self.hours}

    def __str__(self) -> str:
        from .table import text_of

        return text_of(self)


def plan(
    config: str | Path,
    *,
    gpus: int = 8,
    memory: float = 80,
    mfu: float = 0.4,
    peak_tflops: float = 989,
    records: int | None = None,
    text_tokens: int | None = None,
    image_size: tuple[int, int] | None = None,
    overrides: Sequence[str] = (),
) -> Plan:
    """Memory on each GPU, steps, tokens, operations and hours of a recipe, before anything is downloaded or rented.

    The model is built without storage from its folder's config.json or, where that is not there, from the sizes of a known
    model (the recipe's ``architecture``). Its decoder and tower are run without numbers to count operations and what is
    kept for the backward. Data that are there are counted; of others what is published or given is taken, and the rest
    assumed, which the plan says.

    Args:
        config: a recipe's file, or the name of one of ours: what ``seecal train --config`` takes.
        gpus: of all machines together.
        memory: of one, in GB (10⁹ bytes).
        mfu: the share of the peak that the step reaches. An assumption: measure your own with ``tokens_per_second``.
        peak_tflops: of one GPU, in TFLOP/s; 989 is an H100's for dense bfloat16 (NVIDIA's data sheet), 312 an A100's.
        records: in an epoch, of every stage; None: those of the data.
        text_tokens: of a record; None: those of the data.
        image_size: (width, height) in pixels; None: those of the data.
        overrides: more settings, as on the command line of ``seecal train``.

    Raises:
        FileNotFoundError: no such recipe.
        ValueError: something in the recipe that training would refuse too; a model or data of which nothing is known; a
            number out of range.
    """
    for name, value in (("gpus", gpus), ("memory", memory), ("peak_tflops", peak_tflops)):
        if value <= 0:
            raise ValueError(f"{name}={value}: expected more than 0")
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu={mfu}: expected a share of the peak, above 0 and at most 1")
    recipe = read(str(config), arguments(overrides))
    name = architecture_of(recipe)
    wanted = Wanted(records, text_tokens, image_size)
    speed = gpus * peak_tflops * 1e12 * mfu
    stages = tuple(_stage_plan(recipe, stage, name, gpus, memory, speed, wanted) for stage in recipe.stages)
    return Plan(str(config), name, gpus, memory, mfu, peak_tflops, stages)


def _stage_plan(
    recipe: Recipe, stage: Stage, name: str, gpus: int, memory: float, speed: float, wanted: Wanted
) -> StagePlan:
    found = stage_model(recipe, stage, name)
    settings = found.settings
    work = workload_of(stage, settings, found.model, name, found.processor, wanted)
    found.prepare(stage, work.images)
    batch = gpus * settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    steps = _steps(settings, work.records, gpus)
    epoch = work.records
    if settings.dataloader_drop_last:
        epoch = _batches(settings, epoch, gpus) * gpus * settings.per_device_train_batch_size
    trained_on = steps * batch if settings.max_steps > 0 else math.ceil(epoch * settings.num_train_epochs)
    flops = flops_of(found, work, trained_on)
    engines = {engine: _engine_plan(engine, found, stage, work, gpus) for engine in ENGINES}
    return StagePlan(
        number=stage.number,
        name=stage.name,
        trained=found.counts.trained,
        parameters=found.counts.all,
        batch=batch,
        steps=steps,
        records=trained_on,
        image_tokens=work.mean("image") * trained_on,
        text_tokens=work.mean("text") * trained_on,
        label_tokens=work.mean("labels") * trained_on,
        flops=flops,
        hours=flops.total / speed / 3600,
        engines=engines,
        chosen=first_that_fits(engines, memory * GB * (1 - HEADROOM)),
        notes=(*work.notes, *found.notes),
    )


def first_that_fits(engines: Mapping[str, EnginePlan], room: float) -> str | None:
    """The name of the first of :data:`memory.ENGINES` that can be launched and fills at most ``room`` bytes."""
    return next((name for name in ENGINES if engines[name].why_not is None and engines[name].total <= room), None)


def _steps(settings: Any, records: int, gpus: int) -> int:
    """Optimizer steps as Trainer counts them: each rank's batches in groups of the accumulation, rounded up."""
    if settings.max_steps > 0:
        return int(settings.max_steps)
    each = max(math.ceil(_batches(settings, records, gpus) / settings.gradient_accumulation_steps), 1)
    return math.ceil(settings.num_train_epochs * each)


def _batches(settings: Any, records: int, gpus: int) -> int:
    """Of each rank in an epoch: what does not fill one is filled up, or left out with ``dataloader_drop_last``."""
    size = settings.per_device_train_batch_size
    if settings.dataloader_drop_last:
        return records // size // gpus
    return math.ceil(math.ceil(records / size) / gpus)


def _engine_plan(engine: str, found: StageModel, stage: Stage, work: Workload, gpus: int) -> EnginePlan:
    precision = Precision(found.width, found.bf16, found.optimizer)
    return EnginePlan(
        held(engine, found.counts, gpus, precision),
        activations_of(engine, found, work, precision),
        _why_not(engine, found, stage, gpus),
        for_other_counts=(engine == "single") != (gpus == 1),
    )


def _why_not(engine: str, found: StageModel, stage: Stage, gpus: int) -> str | None:
    settings = found.settings
    if (engine == "single") != (gpus == 1):
        return "one GPU" if engine == "single" else "more than one GPU"
    shards = engine in ("fsdp2", "zero2", "zero3")
    if shards and found.counts.packed:
        return "not in 4 bits"
    if shards and stage.cache_vision_features:
        return "not with cached features"
    if engine.startswith("zero") and settings.normalize == "global" and settings.gradient_accumulation_steps > 1:
        return "refuses accumulation"
    return None
