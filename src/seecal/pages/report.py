"""``seecal report``: one HTML page with the scores of a data set, to be looked at beside its images."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from ..data.paths import show
from ..scoring.manifest import Manifest, read_manifest
from ..scoring.read import RecordScores, read_scores
from ..scoring.records import Data, scored_data
from ..scoring.shards import Skipped
from ..scoring.summary import EDGES, Summary, answers_of
from ..verbosity import Progress, written_out
from .charts import distribution, require_altair, tallest
from .report_data import PageData, script_json
from .templates import HERE, templates
from .thumbnails import Thumbnails, even, extremes

_COLUMNS = ("token_id", "token", "turn", "start", "stop", "has_contrast", "delta", "weight", "logit_with")
_WORDS = 24  # in a list


@dataclass
class PageReport:
    """What a page holds.

    Attributes:
        path: the page.
        records: how many records it shows.
        images: how many of them have their images.
        without_room: how many have none because the budget was used up.
        missing, damaged: records with an image that is not there, or cannot be opened, one line each. Of the latter only
            those whose header is damaged are all found; of the others those that there was room for.
        not_finite: tokens with a number that is NaN or infinite.
        skipped: rows of the data without scores.
        budget: bytes for images.
        bytes: of the page.
        notes: what there is to say, one line each; they stand on the page too.
    """

    path: Path
    records: int = 0
    images: int = 0
    without_room: int = 0
    missing: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    not_finite: int = 0
    skipped: int = 0
    budget: int = 0
    bytes: int = 0
    notes: list[str] = field(default_factory=list)

    def sentence(self) -> str:
        """One line for people, and one for each note."""
        line = f"{self.path}: {self.records} records, {self.images} with their image, {self.bytes / 1e6:.1f} MB"
        return "\n".join([line, *(f"  {note}" for note in self.notes)])


def report(
    scores: str | Path,
    other: str | Path | None = None,
    *,
    out: str | Path = "report.html",
    data: Any = None,
    image_root: str | Path | None = None,
    budget_mb: float = 8.0,
    console: Any = None,
) -> PageReport:
    """Writes one HTML page that shows the scores of a data set: Δ over each answer beside its image, where Δ lies, which
    words the image makes likelier, which tokens it speaks against. It needs no network and nothing beside it.

    Args:
        scores: what :func:`seecal.score` wrote.
        other: scores of another model on the same data, to be compared (before and after CAL).
        out: the page.
        data, image_root: the data that was scored; None: where the scores say it lay. Without it the page has no images
            and no questions.
        budget_mb: megabytes of images; extremes and an even sample come first.
        console: a rich console for the progress.

    Raises:
        ValueError: scores that are not whole, of another version of the data, or that cannot be compared; an ``image_root``
            that has none of the images.
        ImportError: altair or vl-convert-python is not installed (``pip install 'seecal[report]'``).
    """
    require_altair()
    sides = [_Side.of(scores), *([_Side.of(other)] if other is not None else [])]
    _check_same_data(sides)
    made, page = PageReport(Path(out), budget=int(budget_mb * 1e6)), PageData()
    with Progress(console) as progress:
        with progress.task("read the scores", total=int(sides[0].manifest.data["rows"]), unit="record") as task:
            turns = []
            for records in _together(sides):
                task.advance()
                if isinstance(records[0], Skipped):
                    made.skipped += 1
                    continue
                answers = answers_of(records[0])
                number = page.add(records[0], answers, records[1] if len(records) > 1 else None)
                turns.append(answers.turns)
                for side, record in zip(sides, records, strict=True):
                    side.summary.add(number, record, answers_of(record) if record is not records[0] else answers)
        made.records = len(page)
        if not page:
            raise ValueError(f"{scores}: no record has scores, so there is nothing to show.")
        source = _data_of(sides[0], data, image_root, made)
        thumbnails = Thumbnails(made.budget)
        if source is not None:
            _add_rows(page, source, turns, thumbnails, made, progress)
    made.images, made.missing, made.damaged = len(thumbnails.of_record), thumbnails.missing, thumbnails.damaged
    if image_root is not None and made.missing and not made.images and not made.without_room:
        raise ValueError(
            f"image_root={str(image_root)!r} has none of the images of {len(made.missing)} records, the first: "
            f"{made.missing[0]}"
        )
    _note(made, sides, page, thumbnails)
    html = _rendered(sides, page, thumbnails, made)
    made.bytes = _write(made.path, html)
    return made


@dataclass
class _Side:
    """One of the models that a page shows."""

    folder: str
    manifest: Manifest
    summary: Summary

    @classmethod
    def of(cls, folder: str | Path) -> _Side:
        manifest = read_manifest(folder)
        options = manifest.options
        return cls(str(folder), manifest, Summary(float(options["alpha"]), float(options["beta"])))

    @property
    def name(self) -> str:
        adapter = self.manifest.model["adapter"]
        return str(self.manifest.model["name"]) + (f" + {adapter}" if adapter else "")


def _check_same_data(sides: list[_Side]) -> None:
    prints = {str(side.manifest.data["fingerprint"]) for side in sides}
    if len(prints) > 1:
        raise ValueError(
            f"{sides[1].folder}: scores of other data ({sides[1].manifest.data['name']}) than {sides[0].folder} "
            f"({sides[0].manifest.data['name']}). Compare two models on the same data."
        )


def _together(sides: list[_Side]) -> Iterator[tuple[Any, ...]]:
    """The scores of each record, one of each side, and then each row without scores, alone. ValueError where the sides are
    not of the same tokens."""
    skipped: list[dict[tuple[str, int], Skipped]] = [{} for _ in sides]  # how early they come hangs on the shards' size
    readers = [
        _without(left_out, read_scores(side.folder, _COLUMNS)) for side, left_out in zip(sides, skipped, strict=True)
    ]
    for records in zip_longest(*readers):
        if len({None if record is None else (record.source, record.row) for record in records}) > 1:
            raise _left_out(sides)
        first = records[0]
        for side, record in zip(sides[1:], records[1:], strict=True):
            if not np.array_equal(first.columns["token_id"], record.columns["token_id"]):
                raise ValueError(
                    f"{side.folder}: record {record.record!r} has other label tokens than in {sides[0].folder}. "
                    "Compare models of one tokenizer, with the same chat template and max_length."
                )
        yield records
    if any(left_out.keys() != skipped[0].keys() for left_out in skipped):
        raise _left_out(sides)
    yield from ((one,) for one in skipped[0].values())


def _without(skipped: dict[tuple[str, int], Skipped], read: Iterator[RecordScores | Skipped]) -> Iterator[RecordScores]:
    """The records with scores; rows without any go into ``skipped``."""
    for one in read:
        if isinstance(one, Skipped):
            skipped[one.source, one.row] = one
        else:
            yield one


def _left_out(sides: list[_Side]) -> ValueError:
    return ValueError(f"{sides[1].folder}: other records were left out than in {sides[0].folder}. Score both alike.")


def _data_of(side: _Side, data: Any, image_root: str | Path | None, made: PageReport) -> Data | None:
    """The data that was scored; None, with a note, where it is not at hand and nobody named it."""
    told = side.manifest.data
    if data is None and (told["format"] == "records" or told["name"] == "the data set"):
        made.notes.append("The data was a set in memory: pass it as data= to see questions and images.")
        return None
    try:
        return scored_data(side.folder, told, data, image_root, keep_lost=True)[1]
    except FileNotFoundError:
        if data is not None:
            raise
        made.notes.append(f"The data is no longer at {told['name']}: name it with --data to see questions and images.")
        return None


def _add_rows(
    page: PageData, source: Data, turns: list[list[int]], thumbnails: Thumbnails, made: PageReport, progress: Progress
) -> None:
    """Questions of all records, and images of those that there is room for."""
    images: dict[int, int] = {}  # record -> its row, of those whose images are there
    with progress.task("read the data", total=len(page), unit="record") as task:
        for place, row in enumerate(source.rows()):
            number = page.places.get((row.source, row.row))
            if number is None or row.record is None:
                continue
            page.add_row(number, row, turns[number])
            if row.lost:
                thumbnails.lose(number, row.lost)
            elif row.record["images"]:
                images[number] = place
            task.advance()
    rest = dict.fromkeys(images)
    wanted = extremes(_orders(page, images))
    while wanted:
        with progress.task("images", total=len(wanted), unit="record") as task:
            for number, row in _rows_of(source, {number: images[number] for number in wanted}):
                rest.pop(number)
                if thumbnails.full:
                    break
                thumbnails.add(number, row.record["images"], f"{row.source}: record {show(row.record['id'])}")
                task.advance()
        # Of what is left as many as there is room for: how large thumbnails of these images are is known by now
        wanted = even(list(rest), thumbnails.fits)
    made.without_room = len(images.keys() - thumbnails.of_record.keys() - thumbnails.lost.keys())


def _orders(page: PageData, images: dict[int, int]) -> list[list[int]]:
    """Records with images, sorted by mean Δ, by their lowest Δ, and by how much Δ rose."""
    mean, other = page.index["mean"], page.index.get("mean2")
    known = [number for number in images if mean[number] is not None]
    orders = [sorted(known, key=lambda number: mean[number])]
    orders += [sorted(known, key=lambda number: page.index["least"][number])]
    if other is not None:
        both = [number for number in known if other[number] is not None]
        orders.append(sorted(both, key=lambda number: other[number] - mean[number]))
    return [order for order in orders if order] or [list(images)]


def _rows_of(source: Data, rows: dict[int, int]) -> Iterator[tuple[int, Any]]:
    """Rows of the data in the order of ``rows`` (record -> its row), read 200 at a time: embedded images stay out of
    memory."""
    numbers = list(rows)
    for begin in range(0, len(numbers), 200):
        part = numbers[begin : begin + 200]
        wanted = {rows[number] for number in part}
        found = {place: row for place, row in enumerate(source.rows(wanted.__contains__)) if place in wanted}
        yield from ((number, found[rows[number]]) for number in part)


def _note(made: PageReport, sides: list[_Side], page: PageData, thumbnails: Thumbnails) -> None:
    if not any(side.summary.seen for side in sides):
        made.notes.append("No token has an image before it, so Δ is 0 everywhere and nothing is coloured.")
    if page.not_finite:
        first = page.index["id"][next(iter(page.not_finite))]
        made.not_finite = sum(page.not_finite.values())
        made.notes.append(
            f"{_counted(made.not_finite, 'token')} of {_counted(len(page.not_finite), 'record')} with a Δ, logit or weight "
            f"that is not finite, the first in record {show(first)}. Left out of charts, means, lists and sorting."
        )
    if made.without_room:
        all_of_them = made.budget - thumbnails.room + made.without_room * thumbnails.size
        made.notes.append(
            f"{made.without_room} of {made.records} records are shown without their image: the page's budget for images is "
            f"used up. Those of a record take {thumbnails.size / 1000:.1f} kB here, so all need about --budget-mb "
            f"{math.ceil(all_of_them / 1e5) / 10:g}."
        )
    for lines, what in ((made.missing, "is missing"), (made.damaged, "cannot be opened")):
        if lines:
            verb = "has" if len(lines) == 1 else "have"
            made.notes.append(
                f"{len(lines)} of {made.records} records {verb} an image that {what}, the first: {lines[0]}"
            )
    if made.skipped:
        made.notes.append(f"{_counted(made.skipped, 'row')} of the data without scores.")
    made.notes = [written_out(note) for note in made.notes]


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _rendered(sides: list[_Side], page: PageData, thumbnails: Thumbnails, made: PageReport) -> str:
    environment = templates()
    environment.filters["percent"] = lambda share: f"{100 * share:.0f} %"
    environment.filters["signed"] = _signed
    environment.filters["written_out"] = written_out
    summary = sides[0].summary
    least = max(2, min(20, made.records // 100))
    settings = {
        "alpha": summary.alpha, "beta": summary.beta, "compared": len(sides) > 1, "notFinite": page.not_finite,
        "against": [
            [[number, token, round(delta, 2)] for delta, number, token in side.summary.against] for side in sides
        ],
    }  # fmt: skip
    scripts = {name: Markup((HERE / name).read_text("utf8")) for name in ("report.js", "report_view.js")}
    return environment.get_template("report.html.j2").render(
        sides=sides, made=made, charts=_charts(sides), lists=_word_lists(sides, least), least=least,
        css=Markup((HERE / "report.css").read_text("utf8")), scripts=scripts, not_finite=made.not_finite,
        parts=[(name, Markup(text)) for name, text in page.scripts()], lost=Markup(script_json(thumbnails.lost)),
        thumbnails=Markup(script_json(thumbnails.of_record)), settings=Markup(script_json(settings)),
    )  # fmt: skip


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _charts(sides: list[_Side]) -> list[dict[str, Any]]:
    """Where Δ lies, for each model by kind and by source; both models' pictures of the same have the same scale."""
    charts = []
    for side, letter in zip(sides, "AB", strict=False):
        for what in ("kind of token", "source"):
            every = [one.summary.by_kind if what != "source" else one.summary.by_source for one in sides]
            counts = every[sides.index(side)]
            if not counts:
                continue
            pictures = distribution(counts, EDGES, side.summary.alpha, side.summary.beta, max(map(tallest, every)))
            pictures = {theme: Markup(svg) for theme, svg in pictures.items()}
            charts.append({"letter": letter, "what": what, "rows": list(side.summary.rows(counts)), **pictures})
    return charts


def _word_lists(sides: list[_Side], least: int) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """(letter of the model or "", title, (word, its figures)) of each list of words."""
    lists = []
    if len(sides) > 1:
        changes = sides[0].summary.words.changes(sides[1].summary.words, least)
        for title, words in zip(("Words that rose most", "Words that fell most"), changes, strict=True):
            shown = [
                (word, f"{_signed(after - before)}: {_signed(before)} → {_signed(after)} · {count}×")
                for word, count, before, after in words[:_WORDS]
            ]
            lists.append(("B − A", title, shown))
    titles = ("Most visual words", "Least visual words")
    for side, letter in zip(sides, ("A", "B") if len(sides) > 1 else ("",), strict=True):
        for title, most in zip(titles, side.summary.words.extremes(least), strict=True):
            shown = [(word, f"{_signed(mean)} · {count}×") for word, count, mean in most[:_WORDS]]
            lists.append((letter, title, shown))
    return lists


def _write(path: Path, html: str) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        aside.write_text(html, "utf8")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return path.stat().st_size
