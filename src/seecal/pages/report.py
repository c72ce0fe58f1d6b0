"""``seecal report``: one HTML page with the scores of a data set, to be looked at beside its images."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from ..scoring.manifest import Manifest, read_manifest
from ..scoring.read import RecordScores, read_scores
from ..scoring.records import Data, scored_data
from ..scoring.shards import Skipped
from ..scoring.summary import EDGES, Summary, answers_of
from ..verbosity import Progress
from .charts import distribution, require_altair
from .report_data import PageData, script_json
from .templates import HERE, templates
from .thumbnails import Thumbnails, chosen

_COLUMNS = ("token_id", "token", "turn", "start", "stop", "has_contrast", "delta", "weight", "logit_with")


@dataclass
class PageReport:
    """What a page holds.

    Attributes:
        path: the page.
        records: how many records it shows.
        images: how many of them have their images.
        without_room: how many have none because the budget was used up.
        damaged: images that could not be opened, one line each.
        skipped: rows of the data without scores.
        bytes: of the page.
        notes: what there is to say, one line each; they stand on the page too.
    """

    path: Path
    records: int = 0
    images: int = 0
    without_room: int = 0
    damaged: list[str] = field(default_factory=list)
    skipped: int = 0
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
        ValueError: scores that are not whole, of another version of the data, or that cannot be compared.
        ImportError: altair or vl-convert-python is not installed (``pip install 'seecal[report]'``).
    """
    require_altair()
    sides = [_Side.of(scores), *([_Side.of(other)] if other is not None else [])]
    _check_same_data(sides)
    made, page = PageReport(Path(out)), PageData()
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
        thumbnails = Thumbnails(int(budget_mb * 1e6))
        if source is not None:
            _add_rows(page, source, turns, thumbnails, made, progress)
    made.images, made.damaged = len(thumbnails.of_record), thumbnails.damaged
    _note(made, sides)
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
    """The scores of each record, one of each side. ValueError where they are not of the same tokens."""
    readers = [read_scores(side.folder, _COLUMNS) for side in sides]
    for records in zip(*readers, strict=True):
        if len({(type(record), record.source, record.row) for record in records}) > 1:
            raise ValueError(
                f"{sides[1].folder}: other records were left out than in {sides[0].folder}. Score both alike."
            )
        first = records[0]
        if isinstance(first, RecordScores):
            for side, record in zip(sides[1:], records[1:], strict=True):
                if not np.array_equal(first.columns["token_id"], record.columns["token_id"]):
                    raise ValueError(
                        f"{side.folder}: record {record.record!r} has other label tokens than in {sides[0].folder}. "
                        "Compare models of one tokenizer, with the same chat template and max_length."
                    )
        yield records


def _data_of(side: _Side, data: Any, image_root: str | Path | None, made: PageReport) -> Data | None:
    """The data that was scored; None, with a note, where it is not at hand and nobody named it."""
    told = side.manifest.data
    if data is None and (told["format"] == "records" or told["name"] == "the data set"):
        made.notes.append("The data was a set in memory: pass it as data= to see questions and images.")
        return None
    try:
        return scored_data(side.folder, told, data, image_root)[1]
    except FileNotFoundError:
        if data is not None:
            raise
        made.notes.append(f"The data is no longer at {told['name']}: name it with --data to see questions and images.")
        return None


def _add_rows(
    page: PageData, source: Data, turns: list[list[int]], thumbnails: Thumbnails, made: PageReport, progress: Progress
) -> None:
    """Questions of all records, and images of those that there is room for."""
    images: dict[int, int] = {}  # record -> its row, of those that have any
    with progress.task("read the data", total=len(page), unit="record") as task:
        for place, row in enumerate(source.rows()):
            number = page.places.get((row.source, row.row))
            if number is None or row.record is None:
                continue
            page.add_row(number, row, turns[number])
            if row.record["images"]:
                images[number] = place
            task.advance()
    if not images:
        return
    means = {number: page.index["mean"][number] for number in images if page.index["mean"][number] is not None}
    orders = [sorted(means, key=lambda number: means[number])]
    orders += [sorted(means, key=lambda number: page.index["least"][number])]
    if "mean2" in page.index:
        gain = {number: page.index["mean2"][number] - means[number] for number in means}
        orders.append(sorted(gain, key=lambda number: gain[number]))
    wanted = [number for number in chosen(orders, len(page), thumbnails.room) if number in images]
    with progress.task("images", total=len(wanted), unit="record") as task:
        for number, record in _records_of(source, {number: images[number] for number in wanted}):
            if thumbnails.full:
                break
            thumbnails.add(number, record["images"], record["id"])
            task.advance()
    made.without_room = len(images) - len(thumbnails.of_record) - len(thumbnails.damaged)


def _records_of(source: Data, rows: dict[int, int]) -> Iterator[tuple[int, Any]]:
    """Records in the order of ``rows`` (record -> its row), read 200 at a time: embedded images stay out of memory."""
    numbers = list(rows)
    for begin in range(0, len(numbers), 200):
        part = numbers[begin : begin + 200]
        wanted = {rows[number] for number in part}
        found = {place: row for place, row in enumerate(source.rows(wanted.__contains__)) if place in wanted}
        yield from ((number, found[rows[number]].record) for number in part)


def _note(made: PageReport, sides: list[_Side]) -> None:
    if not any(side.summary.seen for side in sides):
        made.notes.append("No token has an image before it, so Δ is 0 everywhere and nothing is coloured.")
    if made.without_room:
        made.notes.append(
            f"{made.without_room} of {made.records} records are shown without their image: the page's budget for images is "
            "used up (--budget-mb)."
        )
    if made.damaged:
        made.notes.append(
            f"{len(made.damaged)} records have an image that cannot be opened, the first: {made.damaged[0]}"
        )
    if made.skipped:
        made.notes.append(f"{made.skipped} rows of the data have no scores.")


def _rendered(sides: list[_Side], page: PageData, thumbnails: Thumbnails, made: PageReport) -> str:
    environment = templates()
    environment.filters["percent"] = lambda share: f"{100 * share:.0f} %"
    environment.filters["signed"] = lambda value: f"{value:+.2f}".replace("-", "−")
    summary = sides[0].summary
    least = max(2, min(20, made.records // 100))
    high, low = summary.words.extremes(least)
    settings = {
        "alpha": summary.alpha, "beta": summary.beta, "compared": len(sides) > 1,
        "against": [[number, token, round(delta, 2)] for delta, number, token in summary.against],
    }  # fmt: skip
    charts = []
    for side in sides if summary.seen else ():
        of_side = side.summary
        for what, counts in (("kind of token", of_side.by_kind), ("source", of_side.by_source)):
            pictures = distribution(counts, EDGES, of_side.alpha, of_side.beta)
            pictures = {theme: Markup(svg) for theme, svg in pictures.items()}
            charts.append({"side": side, "what": what, "rows": list(of_side.rows(counts)), **pictures})
    scripts = {name: Markup((HERE / name).read_text("utf8")) for name in ("report.js", "report_view.js")}
    return environment.get_template("report.html.j2").render(
        sides=sides, made=made, charts=charts, high=high, low=low, least=least,
        css=Markup((HERE / "report.css").read_text("utf8")), scripts=scripts,
        parts=[(name, Markup(text)) for name, text in page.scripts()],
        thumbnails=Markup(script_json(thumbnails.of_record)), settings=Markup(script_json(settings)),
    )  # fmt: skip


def _write(path: Path, html: str) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        aside.write_text(html, "utf8")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return path.stat().st_size
