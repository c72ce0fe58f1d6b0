"""``seecal train --dry-run``: a whole recipe tried on the CPU, before a GPU is rented.

The recipe's model with few layers and random weights, its classes, image sizes, grids and templates as they are; the first
records of its data, or made-up ones in its format; every stage through the ordinary code, two steps each; then the result
is loaded again with plain transformers and asked one question. What only the real size can show is looked at beside that
(``real_size``). What was replaced for that is told: nothing is quietly different.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..families.module_groups import group_of, module_groups
from ..models.loading import load_vlm
from ..models.shrunk import random_model, shrunk
from ..models.stand_in import stand_in_processor
from ..verbosity import Progress
from .folder import RunFolder
from .preview import heard
from .real_size import RealSize
from .recipe import Recipe, Stage, arguments, read
from .run import Run
from .small_recipe import RECORDS, SmallRecipe, missing_weights, model_of, packages, placeholders, texts_of
from .synthetic_data import draw

_QUESTION = "What is in this picture?"


@dataclass
class TriedStage:
    """One stage as it was tried.

    Attributes:
        name: what messages call it.
        trains: group → parameters of the model in its real size that train; None: adapters.
        moved: the groups whose weights were others afterwards.
        label_tokens: of its steps.
        delta: mean Δ in logits, or None where nothing had a contrast.
        losses: of its steps, CAL's, in nats.
        seconds: of its steps.
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
        notes: what was said on the way.
        answer: what the trained model said to one question, its weights being random.
        seconds: of all of it.
    """

    config: str
    model: str = ""
    problems: list[str] = field(default_factory=list)
    to_provide: list[str] = field(default_factory=list)
    replaced: list[tuple[str, str, str]] = field(default_factory=list)
    stages: list[TriedStage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    answer: str | None = None
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def dry_run(config: str | Path | None, *, overrides: Sequence[str] = (), console: Any = None) -> DryRun:
    """Try a whole recipe on the CPU: few layers, random weights, two steps a stage. Needs no GPU, network, model or data.

    The model's classes come from its folder where that is there, else from ``architecture``, or from what is known of its
    hub id. With the folder its own processor is used, else one of the family's classes with a small tokenizer. Of data that
    is there the first 32 records of each source are used, else made-up ones in its format.

    Args:
        config: a recipe's file, or the name of one of ours: what ``seecal train --config`` takes; None: overrides alone.
        overrides: more settings, as on the command line of ``seecal train``.
        console: a rich console for the progress; None: one on stderr.

    Returns:
        What was found. This process has trained on the CPU then: train on GPUs in another.

    Raises:
        FileNotFoundError, ValueError: a recipe that cannot be read, in the words of training; a model about whose classes
            nothing is known; more than one process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--dry-run tries a recipe in one process: start it without accelerate launch")
    from rich.console import Console

    started = time.perf_counter()
    recipe = read(None if config is None else str(config), arguments(overrides))
    found = DryRun("the command line" if config is None else str(config))
    console = Console(stderr=True) if console is None else console
    with tempfile.TemporaryDirectory(prefix="seecal-dry-run-") as folder, Progress(console) as progress:
        _Trial(found, recipe, placeholders(config), Path(folder), progress).go()
    found.seconds = time.perf_counter() - started
    return found


def run(argv: Sequence[str]) -> int:
    """``seecal train --dry-run`` with the other arguments. Prints what was found. Returns 0, or 2 with problems."""
    from ..verbosity import say

    config, overrides = None, list[str]()
    for key, values in arguments(argv):
        if key == "resume":
            raise ValueError("--resume: a dry run begins anew and leaves nothing behind. Leave it out")
        if key == "config" and (len(values) != 1 or config is not None):
            raise ValueError("--config takes one file")
        if key == "config":
            config = values[0]
        else:
            overrides += [f"--{key}", *values]
    found = dry_run(config, overrides=overrides)
    say(str(found))
    return 0 if found.passed else 2


class _Trial:
    """One dry run, in the order of its methods."""

    def __init__(self, found: DryRun, recipe: Recipe, left_open: set[str], folder: Path, progress: Progress) -> None:
        self.found, self.recipe, self.left_open, self.folder = found, recipe, left_open, folder
        self.progress = progress

    def go(self) -> None:
        with self.progress.task("looking at the model in its real size"):
            self.look_at_the_model()
        small = SmallRecipe(self.recipe, self.folder, self.processor)
        recipe = small.made()
        self.names = {str(path): name for path, name in small.names.items()}
        self.names[str(self.folder / "model")] = self.recipe.model
        self.write_the_model()
        self.found.replaced += small.replaced
        self.note_missing(small.missing)
        with heard() as notes:
            try:
                self.train(recipe)
                with self.progress.task("loading the result"):
                    self.ask(recipe)
            except Exception as error:  # whatever training would have stopped at
                self.note_problem(error, recipe)
        self.found.notes += dict.fromkeys(notes)

    # ---- Before ----

    def look_at_the_model(self) -> None:
        """The real model's classes and sizes, its processor, and what the stages want of them."""
        original = model_of(self.recipe)
        self.config, self.found.model = original.config, original.source
        self.ids, self.processor = None, original.processor
        if self.processor is None:
            stand_in = stand_in_processor(self.config, texts_of(self.recipe))
            self.ids, self.processor = stand_in.ids, stand_in.processor
            words = len(self.processor.tokenizer)
            kind = type(self.processor).__name__
            self.found.replaced.append(("processor", "of the model", f"a {kind} with a tokenizer of {words:,} tokens"))
        real = RealSize(self.recipe, self.config, self.processor, own=original.processor is not None)
        self.real, self.real_problems = real, real.problems()
        self.found.problems += self.real_problems
        if not Path(self.recipe.model).is_dir():
            self.note_missing([("model", self.recipe.model)])
        if (name := missing_weights(self.recipe)) is not None:
            self.found.problems.append(f"model: {self.recipe.model}: it lacks {name}. Copy the folder again")
        self.found.to_provide += packages(self.recipe)

    def note_missing(self, paths: Sequence[tuple[str, str]]) -> None:
        for what, path in paths:
            if path in self.left_open:
                self.found.to_provide.append(f"{what}: {path}")
            elif what == "model" and path.count("/") == 1 and not Path(path).parent.is_dir():
                self.found.to_provide.append(f"model: {path} (taken for a hub id: training downloads it)")
            else:
                self.found.problems.append(
                    f"{what}: {path}: not there, so training would stop at once. Correct the path"
                )

    def write_the_model(self) -> None:
        """The model at small width with random weights, and the processor, as training reads them."""
        vocabulary = None if self.ids is None else len(self.processor.tokenizer)
        small = shrunk(self.config, vocabulary=vocabulary, ids=self.ids)
        model = random_model(small)
        model.save_pretrained(self.folder / "model")
        self.processor.save_pretrained(self.folder / "model")
        counts = [sum(parameter.numel() for parameter in one.parameters()) for one in (self.real.model, model)]
        layers = [one.get_text_config().num_hidden_layers for one in (self.config, small)]
        widths = [one.get_text_config().hidden_size for one in (self.config, small)]
        shown = [f"{c:,} parameters, {n} layers of width {w}" for c, n, w in zip(counts, layers, widths, strict=True)]
        self.found.replaced.insert(0, ("model", shown[0], f"{shown[1]}, random weights"))

    # ---- Training ----

    def train(self, recipe: Recipe) -> None:
        run = Run(recipe, self.progress, quiet=True, first=RECORDS)
        if run.go(resume=False):  # it was stopped by a signal
            raise KeyboardInterrupt
        for stage in recipe.stages:
            self.found.stages.append(self.tried(run.folder, stage))

    def tried(self, folder: RunFolder, stage: Stage) -> TriedStage:
        """What the stage left: its log, and which weights it has changed."""
        state = json.loads((folder.of_stage(stage) / "trainer_state.json").read_text("utf8"))
        log = [entry for entry in state["log_history"] if "loss" in entry]
        deltas = [entry["delta_mean"] for entry in log if "delta_mean" in entry]
        trains: dict[str, int | None] = dict(self.real.trains.get(stage.number, {}))
        tried = TriedStage(
            name=stage.name,
            trains={group: trains.get(group) for group in stage.train},
            label_tokens=int(sum(entry.get("label_tokens", 0) for entry in log)),
            delta=sum(deltas) / len(deltas) if deltas else None,
            losses=[float(entry["loss"]) for entry in log],
            seconds=float(next((e["train_runtime"] for e in state["log_history"] if "train_runtime" in e), 0.0)),
        )
        tried.moved = self.moved(folder, stage)
        return tried

    def moved(self, folder: RunFolder, stage: Stage) -> list[str]:
        """The groups whose weights the stage changed. Notes groups that train and did not, and frozen ones that did."""
        before, _ = load_vlm(str(folder.source_of(stage)), processor=False, dtype="float32")
        after, _ = load_vlm(str(folder.output_of(stage)), processor=False, dtype="float32")
        adapted = stage.lora.targets if stage.lora is not None and "lora" in stage.train else ()
        wanted = [*(group for group in stage.train if group != "lora"), *adapted]
        groups, old = module_groups(after), dict(before.named_parameters())
        changed: dict[str, str] = {}
        for name, parameter in after.named_parameters():
            if not bool((parameter == old[name]).all()):
                changed.setdefault(group_of(name, groups, wanted) or "", name)
        where = f"stage {stage.number}: " if len(self.recipe.stages) > 1 else ""
        if "" in changed:
            self.found.problems.append(f"{where}{changed.pop('')} was to stay frozen, and has changed")
        still = [group for group in wanted if group not in changed]
        if still:
            self.found.problems.append(
                f"{where}train: {', '.join(still)}: nothing of it changed in the steps of this stage: the loss does "
                "not reach it"
            )
        return list(dict.fromkeys("lora" if group in adapted else group for group in changed))

    # ---- After ----

    def ask(self, recipe: Recipe) -> None:
        """Load the result as any user of transformers would, and let it answer one question."""
        from ..models.generate import reply

        model, processor = load_vlm(str(RunFolder(recipe).final))
        draw(0)[0].save(self.folder / "picture.png")
        self.found.answer = reply(model, processor, self.folder / "picture.png", _QUESTION, max_new_tokens=8)

    def note_problem(self, error: Exception, recipe: Recipe) -> None:
        text = " ".join(str(error).split())
        if not isinstance(error, (ValueError, OSError, ImportError)):
            text = f"{type(error).__name__}: {text}"
        for path, name in sorted(self.names.items(), key=lambda one: -len(one[0])):
            text = text.replace(path, name)
        done = sum(RunFolder(recipe).output_of(stage).exists() for stage in recipe.stages)
        where = f"stage {done + 1}: " if done < len(recipe.stages) > 1 else ""
        where = where if done < len(recipe.stages) else "the result: "
        # The same may have been found beside the run, there of another record
        if not any(text.rpartition("): ")[2] in one for one in self.found.problems):
            perhaps = " (perhaps because of what stands above)" if self.real_problems else ""
            self.found.problems.append(where + text + perhaps)


# ---- What is printed ----


def _lines(found: DryRun) -> list[str]:
    lines = [f"{found.config}, with the classes and sizes of {found.model}"]
    lines += _section(
        "Replaced here, in nothing else:", [f"{what}: {real} → {here}" for what, real, here in found.replaced]
    )
    for number, stage in enumerate(found.stages, 1):
        trains = ", ".join(
            group if count is None else f"{group} ({count:,} parameters)" for group, count in stage.trains.items()
        )
        delta = "no label had an image before it" if stage.delta is None else f"mean Δ {stage.delta:+.4f}"
        losses = ", ".join(f"{one:.3f}" for one in stage.losses)
        lines += [
            f"Stage {number} of {len(found.stages)} ({stage.name}): {stage.seconds:.1f} s",
            f"  trains: {trains}",
            f"  changed: {', '.join(stage.moved) or 'nothing'}",
            f"  {stage.label_tokens:,} label tokens, {delta}, loss {losses}",
        ]
    if found.answer is not None:
        lines.append(f"The result, loaded again and asked {_QUESTION!r}: {found.answer!r} (its weights are random)")
    lines += _section("Said on the way:", found.notes)
    lines += _section("To be provided:", found.to_provide)
    if found.problems:
        count = f"{len(found.problems)} problem{'s' * (len(found.problems) != 1)}"
        return [*lines, f"{count} in {found.seconds:.0f} s:", *(f"  {one}" for one in found.problems)]
    return [*lines, f"Nothing found that training would stop at, in {found.seconds:.0f} s"]


def _section(title: str, entries: Sequence[str]) -> list[str]:
    return [title, *(f"  {entry}" for entry in entries)] if entries else []
