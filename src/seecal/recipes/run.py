"""``seecal train``: a recipe's stages one after another, from the command line or under ``accelerate launch``."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.options import DataOptions
from ..data.sources.quarantine_file import QuarantineFile
from ..verbosity import Progress, quiet_training
from .folder import RunFolder
from .recipe import Recipe, Source, Stage, arguments, read
from .stage_checks import check_files, check_launch


def run(argv: Sequence[str]) -> int:
    """``seecal train`` with these arguments. Returns the exit code: 0; 143 or 130 after SIGTERM or Ctrl-C, with all saved.

    Raises:
        ValueError, FileNotFoundError: something in the recipe, the data or the output folder that the user can mend.
    """
    if "--help" in argv or "-h" in argv or "--help-all" in argv:
        from .help import text

        print(text(everything="--help-all" in argv))
        return 0
    options = {"config": None, "resume": None}
    overrides = []
    for key, values in arguments(argv):
        if key not in options:
            overrides.append((key, values))
        elif len(values) != (key == "config") or (key == "config" and options[key]):
            raise ValueError("--config takes one file" if key == "config" else "--resume takes no value")
        else:
            options[key] = values[0] if values else "yes"  # type: ignore[assignment]
    quiet_training()
    recipe = read(options["config"], overrides)
    try:
        return Run(recipe).go(resume=options["resume"] is not None)
    except FloatingPointError as error:
        print(f"seecal: {error}", file=sys.stderr)
        return 1


class Run:
    """One run of a recipe in its output folder.

    Args:
        recipe: what to do.
        progress: where to show how far it is; None: bars in a terminal, lines elsewhere.
        quiet: show the progress and say nothing else; the caller does.
        first: read no more than so many records of each source; None: all.
    """

    def __init__(
        self, recipe: Recipe, progress: Progress | None = None, *, quiet: bool = False, first: int | None = None
    ):
        self.recipe, self.folder = recipe, RunFolder(recipe)
        self._progress, self._quiet, self._first = progress, quiet, first
        self._data: dict[Any, Any] = {}

    def go(self, resume: bool) -> int:
        """Train all stages that are not finished; with ``resume`` go on where the run in the folder stopped.

        Returns the exit code: 0; 143 or 130 after SIGTERM or Ctrl-C, with all saved.
        """
        final = self.folder.final
        if resume and final.exists():
            self._say(f"{final} is there already: this run is finished")
            return 0
        for line in self.folder.check(resume):
            self._say(line)
        # All that can be wrong is looked at before anything trains for hours
        configs = [stage.config(self.folder.of_stage(stage)) for stage in self.recipe.stages]
        for stage, config in zip(self.recipe.stages, configs, strict=True):
            if not self.folder.output_of(stage).exists():
                check_files(stage)
                check_launch(stage, config)
        if self._progress is not None:
            return self._go(configs, self._progress)
        bars = False if any(config.disable_tqdm for config in configs) else None
        with Progress(bars=bars, shown=configs[0].process_index == 0) as progress:
            return self._go(configs, progress)

    def _go(self, configs: list[Any], progress: Progress) -> int:
        from .stage_runner import Speech, StageRunner

        speech = Speech(self._say, progress, logs=not self._quiet)
        try:
            self._check_quarantine()
            with progress.task("reading the data"):
                data = [
                    (self._load(stage.data, stage), self._load(stage.eval_data, stage)) for stage in self.recipe.stages
                ]
            for stage, config, (train, evaluation) in zip(self.recipe.stages, configs, data, strict=True):
                if not self.folder.output_of(stage).exists():
                    code = StageRunner(self.folder, stage, config, speech).run(train, evaluation)
                    if code:
                        return code
        except (ValueError, OSError) as error:
            if str(error).startswith("Caught "):  # in a worker of the data loader, with its traceback as text
                raise ValueError(re.sub(r"^[A-Za-z_][\w.]*: ", "", str(error).strip().splitlines()[-1])) from None
            raise
        self._say(f"done: {self.folder.final}")
        return 0

    def _check_quarantine(self) -> None:
        """Loading is going to say again what it refuses; no list may be read that is written meanwhile."""
        file = self.folder.quarantine()
        for stage in self.recipe.stages:
            if stage.skip_records is not None and Path(stage.skip_records).resolve() == file.path.resolve():
                raise ValueError(f"skip_records: {file.path} is the list that this run writes. Name a copy of it")
        from accelerate import PartialState

        state = PartialState()
        if state.is_main_process:
            file.forget_loading()
        state.wait_for_everyone()

    def _load(self, sources: tuple[Source, ...], stage: Stage) -> Any:
        if not sources:
            return None
        seed = stage.settings.get("seed", 42)
        train_on = stage.settings.get("train_on", "all")
        skip = stage.skip_records if sources is stage.data else None
        most = stage.settings.get("max_bad_records", DataOptions.max_bad_records)
        key = (sources, stage.streaming, stage.on_bad, skip, seed, stage.chat_template, train_on, most)
        if key not in self._data:
            self._data[key] = load_data(
                sources,
                streaming=stage.streaming,
                on_bad=stage.on_bad,
                seed=seed,
                collator=self._collator(stage.chat_template, train_on),
                skip_records=skip,
                quarantine=self.folder.quarantine(),
                max_bad_records=most,
                first=self._first,
            )
        return self._data[key]

    def _collator(self, chat_template: str | None, train_on: str) -> Any:
        """One that tells while the data is loaded what the model's processor would stop at; None where there is none to be
        had, which loading the model will tell."""
        from transformers import AutoProcessor

        from ..data.collators.vision import VisionCollator

        try:
            local = Path(self.recipe.model).is_dir()
            processor = AutoProcessor.from_pretrained(
                self.recipe.model, local_files_only=local, trust_remote_code=False
            )
            return VisionCollator(processor, chat_template=chat_template, train_on=train_on)
        except (OSError, ValueError, AttributeError, KeyError, TypeError):
            return None

    def _say(self, text: str) -> None:
        from accelerate import PartialState

        if not self._quiet and PartialState().is_main_process:
            print(text, flush=True)


def load_data(
    sources: Sequence[Source],
    *,
    streaming: bool,
    on_bad: str,
    seed: int,
    collator: Any = None,
    skip_records: str | None = None,
    quarantine: QuarantineFile | None = None,
    max_bad_records: float | None = None,
    first: int | None = None,
) -> Any:
    """One data set, or the mixture of several: by their weights, or without weights every record once.

    Args:
        collator: the one that the records are for, whose check they go through.
        skip_records: names what is left out without being looked at.
        quarantine: where refused records are written.
        max_bad_records: of each source, before ValueError.
        first: how many records of each source, those at its beginning; None: all. No more is read of it.
    """
    from datasets import Dataset

    from ..data.sources.load import load_records
    from ..data.sources.mixture import mix
    from ..data.sources.reports import FileReport

    loaded = {}
    for number, source in enumerate(sources):
        name = source.path if source.path not in loaded else f"{source.path} ({number})"
        report = FileReport(file=quarantine, most=max_bad_records, where=f"of {source.path}", as_it_comes=streaming)
        loaded[name] = load_records(
            source.path,
            streaming=streaming or first is not None,
            on_bad=on_bad,
            collator=collator,
            report=report,
            skip_records=skip_records,
            **source.options(),
        )
        if first is not None:
            some = loaded[name].take(first)
            loaded[name] = some if streaming else Dataset.from_list(list(some), features=some.features)
        report.stop_at_too_many()
    if len(loaded) == 1:
        return next(iter(loaded.values()))
    if sources[0].weight is None:
        return mix(loaded, seed=seed, stopping="all_exhausted_without_replacement")
    return mix(loaded, [source.weight for source in sources if source.weight is not None], seed=seed)
