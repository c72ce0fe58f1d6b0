"""The folder of a run: what lies where in it, and whether a run may begin or go on there.

output_dir/recipe.yaml      the resolved recipe, written first
output_dir/quarantine.jsonl the records that were put aside (on_bad: skip)
output_dir/stage-N/         checkpoints, trainer_state.json and metrics.json of stage N
output_dir/stage-N/model/   what stage N hands to stage N + 1
output_dir/final/           the last stage's model, processor, chat template, recipe.yaml, metrics.json
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.sources.quarantine_file import NAME, QuarantineFile
from .recipe import Recipe, Stage
from .yaml_text import read_yaml

# What may differ when a run is resumed: it does not change what is learned.
_HARMLESS = {
    *("name", "run_name", "report_to", "log_level", "logging_steps", "logging_strategy", "logging_first_step"),
    *("logging_tokens_steps", "max_bad_records", "cache_vision_features"),
    *("disable_tqdm", "save_steps", "save_total_limit", "per_device_eval_batch_size"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"),
    "hang_timeout",
    "architecture",  # of a model that was not there yet
    "ignore_data_skip",  # asked for, to go on with other data
}
# How a step is cut into ranks' batches, and TrainingArguments' defaults: may differ where the step is the same
_CUTS = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}


class RunFolder:
    """Paths of a recipe's run."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.path = recipe, recipe.output_dir
        self.final = self.path / "final"

    def of_stage(self, stage: Stage) -> Path:
        """Its checkpoints and figures."""
        return self.path / f"stage-{stage.number}"

    def output_of(self, stage: Stage) -> Path:
        """Where the stage's model goes."""
        last = stage.number == len(self.recipe.stages)
        return self.final if last else self.of_stage(stage) / "model"

    def source_of(self, stage: Stage) -> Path | str:
        """What the stage starts from: the recipe's model, or what the stage before it wrote."""
        return self.recipe.model if stage.number == 1 else self.output_of(self.recipe.stages[stage.number - 2])

    def quarantine(self, stage: Stage | None = None) -> QuarantineFile:
        """One file for loading and all stages."""
        return QuarantineFile(self.path / NAME, None if stage is None else stage.number)

    def write_recipe(self) -> None:
        """Before anything else is in the folder, so that it can be told from others."""
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "recipe.yaml").write_text(_header() + self.recipe.to_yaml(), "utf8")

    def check(self, resume: bool) -> list[str]:
        """ValueError unless a run of the recipe may begin here, or with ``resume`` go on. Returns lines to say."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"output_dir: {self.path}: this is a file. Give a folder.")
        before = self.path / "recipe.yaml"
        if not before.exists():
            if self.path.exists() and any(one.name != NAME for one in self.path.iterdir()):
                raise ValueError(
                    f"output_dir: {self.path} holds other files. Give an empty folder, or one that is not there"
                )
            return []
        kept = ("stage-*/checkpoint-*", "stage-*/model", "final")
        if not any(any(self.path.glob(pattern)) for pattern in kept):
            return []  # it stopped before it had anything to keep
        if not resume:
            state = "a finished run" if self.final.exists() else "an unfinished run"
            remedy = (
                "Give another folder" if self.final.exists() else "Continue it with --resume, or give another folder"
            )
            raise ValueError(f"output_dir: {self.path} holds {state}. {remedy}")
        return self._check_recipe(before)

    def _has_begun(self, stage: Stage) -> bool:
        """Whether anything of it is kept: a checkpoint or its model."""
        return self.output_of(stage).exists() or any(self.of_stage(stage).glob("checkpoint-*"))

    def _check_recipe(self, before: Path) -> list[str]:
        try:
            started = read_yaml(before)
        except ValueError:
            started = None
        if not isinstance(started, dict) or "stages" not in started:
            raise ValueError(
                f"--resume: {before} is damaged, so what the run was started with is not known. Put it back"
            )
        now = self.recipe.resolved
        ranks = _ranks_before(self.path)
        steps = [] if ranks is None else [_steps(started, ranks), _steps(now, int(os.environ.get("WORLD_SIZE", "1")))]
        same = [one == other for one, other in zip(*steps, strict=False)] if steps else []
        changed = _differences(started, now, same)
        begun = {stage.number for stage in self.recipe.stages if self._has_begun(stage)}
        refused = [text for number, texts in changed.items() if number in {0, *begun} for text in texts]
        if refused:
            raise ValueError(
                f"--resume: the run in {self.path} was started with another recipe: {'; '.join(refused)}. Go on with the "
                "same settings, or give another output_dir"
            )
        return [
            f"stage {number} has not begun, so it goes by its new settings: {'; '.join(texts)}"
            for number, texts in changed.items()
            if texts
        ]


def _ranks_before(folder: Path) -> int | None:
    """How many ranks wrote the run's checkpoints; None where there is none that says it."""
    for manifest in sorted(folder.glob("stage-*/checkpoint-*/manifest.json"), reverse=True):
        try:
            return int(json.loads(manifest.read_text("utf8"))["ranks"])
        except (ValueError, KeyError, TypeError, OSError):
            continue  # a damaged one is named where it would be read
    return None


def _steps(recipe: dict[str, Any], ranks: int) -> list[int]:
    """How many records an optimizer step of each stage has."""
    merged = [{**_CUTS, **recipe, **stage} for stage in recipe["stages"]]
    return [ranks * math.prod(int(stage[name]) for name in _CUTS) for stage in merged]


def _differences(before: dict[str, Any], now: dict[str, Any], same_steps: Sequence[bool]) -> dict[int, list[str]]:
    """Number of a stage → 'key was X, is Y' for all that matters; 0: what all stages share."""
    pairs = [({k: v for k, v in r.items() if k not in ("stages", "output_dir")}, r["stages"]) for r in (before, now)]
    several = len(pairs[0][1]) > 1
    if len(pairs[0][1]) != len(pairs[1][1]):
        return {0: [f"it had {len(pairs[0][1])} stages, now {len(pairs[1][1])}"]}
    found: dict[int, list[str]] = {}
    for number, (old, new) in enumerate(zip(*[[top, *stages] for top, stages in pairs], strict=True)):
        cut_alike = bool(same_steps) and (same_steps[number - 1] if number else all(same_steps))
        where = f"stages.{number}." if number and several else ""
        found[number] = [
            f"{where}{name} was {old.get(name)}, is {new.get(name)}"
            for name in sorted({*old, *new} - _HARMLESS - ({*_CUTS} if cut_alike else set()))
            if old.get(name) != new.get(name)
        ]
    return found


def _header() -> str:
    import transformers
    import trl

    from .. import __version__

    return f"# seecal {__version__}, transformers {transformers.__version__}, trl {trl.__version__}\n"
