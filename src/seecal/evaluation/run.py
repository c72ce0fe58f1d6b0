"""``seecal eval``: a model's answers to a data set, measured; another model's beside them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from ..constants import AS_JSON
from ..data.options import check_on_bad
from ..models.generate import generated, prompt_of
from ..scoring.manifest import versions
from ..scoring.run import loaded
from ..verbosity import Progress
from .bootstrap import RESAMPLES, interval, paired
from .examples import Example, Examples
from .metrics.table import Metric, metric_named
from .predictions import RESULT, Line, Predictions, is_predictions, read_manifest, read_predictions, write_json
from .result import Comparison, Evaluation

SCORES = "scores.jsonl"
AGAINST = "against"  # the folder of the other model's answers, inside the first one's
_NAMED = 20


def evaluate(
    model: Any,
    data: Any,
    metric: str,
    *,
    processor: Any = None,
    adapter: str | Path | None = None,
    against: Any = None,
    against_processor: Any = None,
    out: str | Path | None = None,
    answers: str | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 128,
    generation: Mapping[str, Any] | None = None,
    limit: int | None = None,
    on_bad: str = "error",
    dtype: Any = "auto",
    seed: int = 0,
    resamples: int = RESAMPLES,
    console: Any = None,
    **reading: Any,
) -> Evaluation:
    """A model's greedy answers to the questions of a data set, compared with the true ones.

    With ``out`` the answers are written as they come, one line a record, and a call that was stopped goes on where it was;
    another metric on the same folder asks nothing again.

    Args:
        model: a folder, a hub id, or a loaded vision-language model (then ``processor`` too; it is left as it was).
        data: what :func:`seecal.load_records` takes. Rows of an image and a ``question`` will do where ``answers`` names a
            column.
        metric: a name in ``seecal.evaluation.METRICS``.
        processor, adapter, dtype: as of :func:`seecal.score`.
        against: another model, or a folder that another evaluation of the same data wrote: the difference of both, with
            its 95 % interval and p-value by the paired bootstrap over records. ``against_processor``: of a loaded one.
        out: the folder for ``predictions.jsonl``, ``scores.jsonl``, ``result.json`` and ``_manifest.json``; None: nothing
            is written.
        answers: the column with the true answers, a text or a list; None: the last turn of each record.
        batch_size: records in one call of ``generate``.
        max_new_tokens: longest answer, in tokens.
        generation: more arguments of ``generate``, such as ``{"num_beams": 3}``.
        limit: of the data's rows the first so many.
        on_bad: records that cannot be asked: "error" stops and names the first; "skip" leaves them out, names and counts
            them. What the model fails on is always an error.
        seed, resamples: of the bootstrap.
        console: a rich console for the progress.
        reading: ``format``, ``image_root``, ``split``, ``columns``, as of :func:`seecal.load_records`.

    Raises:
        ValueError: an argument out of its range, a model or data that cannot be used, an ``out`` that holds answers of
            something else, an ``against`` that answered other questions.
        FileNotFoundError: no such data.
    """
    row = metric_named(metric)
    asked = _Asked(Examples(data, row, answers=answers, limit=limit, **reading), on_bad)
    settings = _Settings(max_new_tokens, batch_size, dict(generation or {}))
    models, written = [lambda: loaded(model, processor, adapter, dtype)], is_predictions(against)
    if against is not None and not written:
        models.append(lambda: loaded(against, against_processor, None, dtype))
    figures = partial(_Figures, metric, row, seed, resamples)
    return _run(
        asked, settings, models, against if written else None, None if out is None else Path(out), figures, console
    )


def _run(
    asked: _Asked,
    settings: _Settings,
    models: Sequence[Callable[[], Any]],
    written: Any,
    folder: Path | None,
    figures_of: Callable[[Sequence[_Known]], _Figures],
    console: Any,
) -> Evaluation:
    """Asks each of the ``models``, one or two, and measures. ``written``: the folder of the other one's answers."""
    with Progress(console) as progress:
        with progress.task("read the data") as task:
            known = asked.known(task.advance)
        beside = [] if written is None else [(_name_of(written), _of_the_same(known, written))]
        folders = [None, None] if folder is None else [folder, folder / AGAINST]
        told = [
            _answered(asked, known, settings, load, place, progress)
            for load, place in zip(models, folders, strict=False)
        ]
    figures = figures_of(known)
    (name, lines), *others = [*told, *beside]
    result = replace(figures.measured(lines), model=name, data=asked.examples.name, folder=folder)
    if others:
        result = replace(result, against=figures.compared(lines, *others[0]))
    if folder is not None:
        _write(folder, result)
    return result


@dataclass(frozen=True)
class _Settings:
    """How answers are made. ``batch_size`` changes none of them."""

    max_new_tokens: int
    batch_size: int
    generation: dict[str, Any]

    def __post_init__(self) -> None:
        for name, unit in (("max_new_tokens", "tokens"), ("batch_size", "records")):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: expected a whole number of {unit}, 1 or more")


@dataclass(frozen=True)
class _Known:
    """An example without its texts and images."""

    id: str
    key: str
    references: list[Any]
    columns: dict[str, Any]
    group: str
    error: str | None


@dataclass(frozen=True)
class _Asked:
    """The questions, and what becomes of those that cannot be asked."""

    examples: Examples
    on_bad: str

    def __post_init__(self) -> None:
        check_on_bad(self.on_bad)

    def known(self, counted: Callable[[], Any]) -> list[_Known]:
        """All of them. ValueError for a bad one that is an error, or without any that can be asked."""
        found = []
        for one in self.examples:
            self.refuse(one.error)
            found.append(_Known(one.id, one.key, one.references, one.columns, one.group, one.error))
            counted()
        if not any(one.error is None for one in found):
            first = f" The first: {found[0].error}" if found else ""
            raise ValueError(f"{self.examples.name}: not one of {len(found)} records can be asked.{first}")
        return found

    def refuse(self, error: str | None) -> None:
        if error is not None and self.on_bad == "error":
            raise ValueError(f"{error} Or set on_bad to skip.")


def _answered(
    asked: _Asked,
    known: Sequence[_Known],
    settings: _Settings,
    load: Callable[[], Any],
    folder: Path | None,
    progress: Progress,
) -> tuple[str, list[Line]]:
    """(the model's name, a line for each question)."""
    network, processor, told = load()
    keys = hashlib.blake2b(json.dumps([one.key for one in known]).encode(), digest_size=16).hexdigest()
    manifest = {
        "model": told,
        "data": {"name": asked.examples.name, "fingerprint": keys, "records": len(known)},
        "settings": {"max_new_tokens": settings.max_new_tokens, "generation": settings.generation},
        "versions": versions(),
    }
    written = Predictions(folder, json.loads(json.dumps(manifest, default=str)))
    done = len(written.lines)
    try:
        with progress.task("answer", total=len(known), unit="record", done=done) as task:
            if done < len(known):
                _ask_the_rest(network, processor, asked, settings, written, task.advance)
    finally:
        written.close()
    return str(told["name"]), written.lines


def _ask_the_rest(
    model: Any, processor: Any, asked: _Asked, settings: _Settings, written: Predictions, advance: Callable[[int], Any]
) -> None:
    """Asks what has no line yet, a batch at a time; the lines stay in the order of the data."""
    waiting: list[tuple[Example, Any]] = []

    def ask() -> None:
        prompts = [prompt for _, prompt in waiting if not isinstance(prompt, str)]
        options: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens, "generation": settings.generation}
        said = iter(generated(model, processor, prompts, **options) if prompts else [])
        lines = [
            Line(one.id, one.key, None, prompt) if isinstance(prompt, str) else Line(one.id, one.key, next(said))
            for one, prompt in waiting
        ]
        written.add(lines, [{"references": one.references, "columns": one.columns} for one, _ in waiting])
        advance(len(waiting))
        waiting.clear()

    for one in islice(asked.examples, len(written.lines), None):
        waiting.append((one, _prompt(asked, processor, one)))
        if sum(not isinstance(prompt, str) for _, prompt in waiting) == settings.batch_size:
            ask()
    if waiting:
        ask()


def _prompt(asked: _Asked, processor: Any, one: Example) -> Any:
    """The prompt of a question, or why it cannot be asked."""
    error = one.error
    if one.record is not None:
        try:
            return prompt_of(processor, one.record, f"record {one.id!r}")
        except (ValueError, OSError) as found:
            error = " ".join(str(found).split())
    asked.refuse(error)
    return error


def _name_of(folder: Any) -> str:
    return str(read_manifest(Path(folder))["model"]["name"])


def _of_the_same(known: Sequence[_Known], folder: Any) -> list[Line]:
    """The lines of a folder. ValueError where they do not answer these questions."""
    lines = read_predictions(Path(folder))
    where = "Evaluate it on this data, with the same limit."
    if len(lines) != len(known):
        raise ValueError(f"{folder}: it has {len(lines)} answers, and there are {len(known)} questions. {where}")
    for one, line in zip(known, lines, strict=True):
        if one.id != line.id or (one.key != line.key and one.error is None):
            raise ValueError(f"{folder}: its answer to {line.id!r} is not one to this data's {one.id!r}. {where}")
    return lines


# ---- Figures ----


@dataclass(frozen=True)
class _Figures:
    """What is made of answers to the questions ``known``."""

    name: str
    metric: Metric
    seed: int
    resamples: int
    known: Sequence[_Known]

    def measured(self, lines: Sequence[Line]) -> Evaluation:
        """The figures of one model. ValueError where it answered nothing."""
        metric, bad = self.metric, [line.error or "" for line in lines if line.prediction is None]
        pairs = [(one, line) for one, line in zip(self.known, lines, strict=True) if line.prediction is not None]
        if not pairs:
            raise ValueError(f"not one of {len(lines)} records could be asked. The first: {bad[0]}")
        scores, groups = _scores(metric, pairs), _groups(pairs)
        of_mean = groups if metric.mean_of_groups else None
        low, high = interval(scores, of_mean, seed=self.seed, resamples=self.resamples)
        by_group = {} if groups is None else metric.by_group(scores, groups)
        counts = Counter(groups or ())
        details, each = _details(metric, pairs)
        samples = [
            {"id": one.id, "prediction": line.prediction, "references": one.references, "score": score, **more}
            | ({"group": one.group} if groups else {})
            for (one, line), score, more in zip(pairs, scores, each, strict=True)
        ]
        return Evaluation(
            metric=self.name,
            about=metric.about,
            model="",
            data="",
            value=metric.figure(scores, groups),
            low=metric.scale * low,
            high=metric.scale * high,
            records=len(pairs),
            bad=len(bad),
            first_bad=bad[:_NAMED],
            details=details,
            groups={group: (value, counts[group]) for group, value in by_group.items()},
            samples=samples,
        )

    def compared(self, lines: Sequence[Line], other: str, others: Sequence[Line]) -> Comparison:
        """One model against the one called ``other``, on what both answered. ValueError where that is nothing."""
        both = [
            (one, line, with_other)
            for one, line, with_other in zip(self.known, lines, others, strict=True)
            if line.prediction is not None and with_other.prediction is not None
        ]
        if not both:
            raise ValueError(f"{other}: it answered none of the records that the model answered")
        metric, pairs = self.metric, [(one, line) for one, line, _ in both]
        groups = _groups(pairs) if metric.mean_of_groups else None
        theirs = _scores(metric, [(one, with_other) for one, _, with_other in both])
        found = paired(_scores(metric, pairs), theirs, groups, seed=self.seed, resamples=self.resamples)
        value, low, high = (metric.scale * number for number in (found.value, found.low, found.high))
        return Comparison(other, len(both), metric.figure(theirs, groups), value, low, high, found.p)


def _scores(metric: Metric, pairs: Sequence[tuple[_Known, Line]]) -> list[float]:
    said = [str(line.prediction) for _, line in pairs]
    return metric.scores(said, [one.references for one, _ in pairs], [one.columns for one, _ in pairs])


def _groups(pairs: Sequence[tuple[_Known, Line]]) -> list[str] | None:
    """The kind of each record; None where the data tells none."""
    groups = [one.group for one, _ in pairs]
    return groups if any(groups) else None


def _details(metric: Metric, pairs: Sequence[tuple[_Known, Line]]) -> tuple[dict[str, float], list[dict[str, float]]]:
    """(further figures, those of each record)."""
    if metric.details is None:
        return {}, [{} for _ in pairs]
    each = [metric.details(str(line.prediction), one.references) for one, line in pairs]
    return {name: metric.scale * sum(of[name] for of in each) / len(each) for name in each[0]}, each


def _write(folder: Path, result: Evaluation) -> None:
    aside = folder / f".{SCORES}.part"
    with aside.open("w", encoding="utf-8", errors=AS_JSON) as file:
        for sample in result.samples:
            file.write(json.dumps(sample, ensure_ascii=False) + "\n")
    aside.replace(folder / SCORES)
    write_json(folder / RESULT, result.to_json())
