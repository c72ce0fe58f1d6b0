"""``seecal preview``: before training, the first records of a recipe as the model will see them, and which cannot be used.

Recipe, stage settings, processor and collator are those of ``seecal train``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import html as html_
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..scoring.previewed import Bad, Preview, checks_of
from ..verbosity import Progress
from .folder import RunFolder
from .recipe import RUN_WIDE, Recipe, Stage, arguments, read

# Fields of CALConfig that decide what is learnt of a record
_SHOWN = (
    *("train_on", "max_length", "on_long", "on_bad", "image_decoding", "processor_kwargs"),
    *("weighting", "contrast", "alpha", "beta", "weights"),
)


class Previewed(Preview):
    """What :func:`seecal.preview` found. ``print`` writes what a terminal without colours shows, a notebook the page."""

    def __str__(self) -> str:
        from ..pages.preview_text import text_of

        return text_of(self)

    def _repr_html_(self) -> str:
        from ..pages.preview import page_of

        return (
            f'<iframe sandbox srcdoc="{html_.escape(page_of(self))}" style="width:100%;height:40rem;border:0"></iframe>'
        )


def preview(
    config: str | Path,
    *,
    records: int = 4,
    model: str | Path | None = None,
    html: str | Path | None = None,
    stage: int | None = None,
    check: int = 1000,
    overrides: Sequence[str] = (),
    console: Any = None,
) -> Previewed:
    """The first records of a recipe as the model will see them, before training; what is wrong with others is counted.

    Each record has its images, the rendered template with its special tokens, which tokens are labels, and with ``model``
    Δ and weight of each label. Batches are made by the collator, the chat template and the settings of the stage that
    training would use. Data is read as far as it is looked at; of several sets one row each in turn. No weights are loaded
    without ``model``.

    Args:
        config: a recipe's file, or the name of one of ours: what ``seecal train --config`` takes.
        records: how many to show, the first that training can use.
        model: a folder or hub id, put in place of the recipe's as ``seecal train --model`` does, and loaded for Δ.
        html: a page to write: one file that needs nothing beside it; it is written over.
        stage: which of the recipe's stages, from 1; None: the last.
        check: how many rows to check, at least ``records``; Ctrl-C ends it early with what was found.
        overrides: more settings, as on the command line of ``seecal train``: ``["--max_length", "512"]``.
        console: a rich console for the progress.

    Raises:
        FileNotFoundError: no such recipe, or no such data.
        ValueError: something in the recipe or the settings that training would refuse too, a stage that it does not have,
            a model that does not fit its processor.
    """
    for name, value, least in (("records", records, 0), ("check", check, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r}: expected a whole number, {least} or more")
    given = arguments(overrides) + ([] if model is None else [("model", [str(model)])])
    recipe = read(str(config), given)
    chosen = _stage(recipe, stage)
    settings = settings_of(chosen, RunFolder(recipe).of_stage(chosen))
    with Progress(console) as progress, heard() as notes:
        looker = _Looker(recipe, chosen, settings, progress)
        found = looker.look(str(config), records, check)
        if model is not None:
            looker.measure(found)
    found.notes += dict.fromkeys(notes)
    if settings.weights is not None:
        found.notes.append(f"weights: {settings.weights}: training takes the weights there, which are not read here.")
    if html is not None:
        from ..pages.preview import page_of

        found.html = Path(html)
        found.html.parent.mkdir(parents=True, exist_ok=True)
        found.html.write_text(page_of(found), "utf8")
    return found


class _Looker:
    """Rows, collator and model of one stage."""

    def __init__(self, recipe: Recipe, stage: Stage, settings: Any, progress: Progress) -> None:
        from ..data.sources.load import LocatedRecords

        self._recipe, self._stage, self._settings, self._progress = recipe, stage, settings, progress
        # A wrong path should not take a processor's loading to show
        self._sources = [LocatedRecords(source.path, **source.options()) for source in stage.data]
        self._previewer = previewer_of(recipe.model, stage, settings)
        self._rows: list[Any] = []  # of the records that are shown

    def look(self, name: str, wanted: int, check: int) -> Previewed:
        """The first ``wanted`` records, and the checks of ``check`` rows."""
        total = len(self._recipe.stages)
        called = f"stage {self._stage.number} of {total}"
        if self._stage.name != f"stage {self._stage.number}":
            called += f" ({self._stage.name})"
        shown = {key: getattr(self._settings, key) for key in _SHOWN}
        if self._stage.chat_template is not None:
            shown["chat_template"] = "the recipe's own"
        shown = {key: value for key, value in shown.items() if value is not None}
        found = Previewed(name, called, self._recipe.model, shown)
        limit, bad = max(check, wanted), list[Bad]()
        rows = in_turn([source.rows() for source in self._sources])
        with self._progress.task("checking records") as task:
            try:
                for row in rows:
                    if found.looked_at == limit:
                        found.more = True
                        break
                    record, wrong = self._previewer.look(row, len(found.records) < wanted)
                    found.looked_at += 1
                    if wrong is not None:
                        bad.append(wrong)
                    if record is not None:
                        found.records.append(record)
                        self._rows.append(row)
                    task.advance(note=f"{found.looked_at:,} of {limit:,} at most")
            except KeyboardInterrupt:
                if not found.looked_at:
                    raise
                found.stopped = found.more = True
        if not found.looked_at:
            raise ValueError(f"{self._sources[0].where}: holds no records.")
        found.checks = checks_of(bad)
        for source in self._sources:
            if unused := ", ".join(f"{key!r} ({count:,})" for key, count in sorted(source.unused.items())):
                found.notes.append(
                    f"{source.where}: keys that {source.format} has no use for, in how many records: {unused}"
                )
        return found

    def measure(self, found: Preview) -> None:
        """Δ and weights of the records that are shown."""
        import torch

        from ..data.collators.image_tokens import check_processor, explain_processor_mismatch
        from ..families.table import image_ids
        from ..models.loading import load_vlm
        from ..trainer.samples import check_token_ids

        with self._progress.task(f"loading {self._recipe.model}"):
            options = {"dtype": "auto", **self._recipe.model_init_kwargs}
            model, _ = load_vlm(self._recipe.model, processor=False, **options)
        collator = self._previewer.collator
        ids = image_ids(model.config)
        oddity = check_processor(collator, model, ids)
        check_token_ids(model, collator.tokenizer, ids)
        if torch.cuda.is_available():
            model = model.to("cuda")
        with explain_processor_mismatch(oddity), self._progress.task("measuring"):
            found.records = self._previewer.measure(model, self._rows, found.records, self._settings.cal_options())
        found.measured = True


def previewer_of(model: str, stage: Stage, settings: Any) -> Any:
    """The :class:`seecal.scoring.previewer.Previewer` that looks at records as the stage's training will see them.

    Args:
        model: whose processor makes the batches.
        settings: the stage's CALConfig.
    """
    from ..models.loading import load_processor
    from ..scoring.previewer import Previewer
    from ..trainer.collators import vision_collator

    processor = load_processor(model)
    if stage.chat_template is not None:
        processor.chat_template = stage.chat_template  # as the stage's training sets it
    return Previewer(vision_collator(settings, processor), stage.on_bad)


def in_turn(sources: Sequence[Iterator[Any]]) -> Iterator[Any]:
    """One of each source, then the next of each; a source that has run out is left out."""
    running = list(sources)
    while running:
        for source in list(running):
            try:
                yield next(source)
            except StopIteration:
                running.remove(source)


def _stage(recipe: Recipe, number: int | None) -> Stage:
    stages = recipe.stages
    if number is None:
        return stages[-1]
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= len(stages):
        raise ValueError(f"stage={number!r}: this recipe has {len(stages)}. Give a number from 1 to {len(stages)}")
    return stages[number - 1]


def settings_of(stage: Stage, output_dir: str | Path = "out") -> Any:
    """The stage's CALConfig, with this machine's device: a recipe for many GPUs is looked at on any computer."""
    import torch

    here = {"bf16": False, "use_cpu": not torch.cuda.is_available(), "report_to": "none"}
    settings = {name: value for name, value in stage.settings.items() if name not in RUN_WIDE}
    return dataclasses.replace(stage, settings={**settings, **here}).config(Path(output_dir))


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """What seecal's loggers warn of inside the block, instead of on stderr. What becomes of single records is counted."""
    logger = logging.getLogger("seecal")
    lines: list[str] = []

    class _Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if not record.name.endswith("record_counts"):
                lines.append(" ".join(record.getMessage().split()).removesuffix(". This is said once"))

    ear, level, propagate = _Ear(logging.WARNING), logger.level, logger.propagate
    logger.addHandler(ear)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield lines
    finally:
        logger.removeHandler(ear)
        logger.setLevel(level)
        logger.propagate = propagate
