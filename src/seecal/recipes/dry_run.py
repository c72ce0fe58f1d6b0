"""``seecal train --dry-run``: a whole recipe tried on the CPU, before a GPU is rented.

The recipe's model with few layers and random weights, its classes, image sizes, grids and templates as they are; the first
records of its data, or made-up ones in its format; every stage through the ordinary code, two steps each; then the result
is loaded again with plain transformers and asked one question. What only the real size can show is looked at beside that
(``real_size``). What was replaced for that is told: nothing is quietly different.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..verbosity import Progress
from .recipe import RUN_WIDE, SHIPPED, Recipe, Source, Stage, arguments, read

RECORDS = 32  # of each source
STEPS = 2


@dataclass
class TriedStage:
    """One stage as it was tried.

    Attributes:
        name: what messages call it.
        trains: group → parameters of the model in its real size that train; of adapters, None.
        moved: the groups whose weights were others afterwards.
        label_tokens: of its steps.
        delta: mean Δ in logits, or None where nothing had a contrast.
        losses: of its steps, CAL's, in nats.
        seconds: loading, steps and saving.
    """

    name: str
    trains: dict[str, int | None]
    moved: list[str] = field(default_factory=list)
    label_tokens: int = 0
    delta: float | None = None
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class DryRun:
    """What :func:`seecal.dry_run` found. ``print`` shows it.

    Attributes:
        config: the recipe, as it was named.
        model: what the model's classes and sizes were taken from.
        problems: what training would stop at or do wrong, a line each; empty: nothing was found.
        to_provide: what a shipped recipe leaves to its user: folders and files that are not there yet.
        replaced: (what, in the recipe, here) of all that is different here.
        stages: as they were tried.
        answer: what the trained model said to one question, its weights being random.
        seconds: of all of it.
    """

    config: str
    model: str = ""
    problems: list[str] = field(default_factory=list)
    to_provide: list[str] = field(default_factory=list)
    replaced: list[tuple[str, str, str]] = field(default_factory=list)
    stages: list[TriedStage] = field(default_factory=list)
    answer: str | None = None
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        from .dry_run_text import text_of

        return text_of(self)


def dry_run(config: str | Path | None, *, overrides: Sequence[str] = (), console: Any = None) -> DryRun:
    """Try a whole recipe on the CPU: few layers, random weights, two steps a stage. Needs no GPU, network, model or data.

    The model's classes come from its folder where that is there, else from ``architecture``, or from what is known of its
    hub id. With the folder its own processor is used, else one of the family's classes with a small tokenizer. Of data that
    is there the first 32 records of each source are used, else made-up ones in its format.

    Args:
        config: a recipe's file, or the name of one of ours: what ``seecal train --config`` takes; None: ``overrides`` are all.
        overrides: more settings, as on the command line of ``seecal train``.
        console: a rich console for the progress; None: stderr.

    Returns:
        :class:`DryRun`. The process has trained on the CPU then: train on GPUs in another.

    Raises:
        FileNotFoundError, ValueError: a recipe that cannot be read at all, as training would say it; a model about whose
            classes nothing is known; more than one process.
    """
    from .dry_run_parts import Trial

    started = time.perf_counter()
    given = arguments(overrides)
    recipe = read(None if config is None else str(config), given)
    found = DryRun("the command line" if config is None else str(config))
    with tempfile.TemporaryDirectory(prefix="seecal-dry-run-") as folder, _progress(console) as progress:
        Trial(found, recipe, placeholders(config), Path(folder), progress).go()
    found.seconds = time.perf_counter() - started
    return found
