"""What a stage's data asks for: how many records, and how many tokens of which kind in each.

From the data itself where it is there, else from what is published and from assumptions, which the plan names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..constants import IGNORE_INDEX
from ..families.dummy_images import picture
from ..families.table import family_of, image_ids
from ..models.known import known_image_processor
from ..recipes.preview import in_turn
from ..recipes.recipe import Source, Stage
from .cost import image_tokens
from .published import MIX, PUBLISHED, Published

SAMPLE = 512  # records that are looked at for their lengths; all are counted
PICTURE = (640, 480)  # what is taken for an image whose size nobody knows: COCO's usual one
_SHARES = 16  # rows that stand for a set of which only shares are known


@dataclass(frozen=True)
class Row:
    """A record as it is trained on, in tokens.

    Attributes:
        image: image tokens.
        before: text before the first image; in a record without one all its text.
        after: text after it, up to the token that predicts the last label: what the pass without the image runs over.
        rest: text after that.
        labels: label tokens.
    """

    image: float
    before: float
    after: float
    rest: float
    labels: float

    @property
    def text(self) -> float:
        return self.before + self.after + self.rest

    @property
    def tokens(self) -> float:
        return self.image + self.text


@dataclass(frozen=True)
class Workload:
    """A stage's data.

    Attributes:
        records: how many an epoch has.
        rows: records that stand for all.
        images: the vision inputs of one record's images, on the CPU.
        longest: the records of the largest batch that there can be, the longest first; one stands for any number.
        notes: where this is from, and what is assumed.
        stand_for: how many records each of the rows stands for; empty: each for as many as any other.
    """

    records: int
    rows: tuple[Row, ...]
    images: Mapping[str, Tensor]
    longest: tuple[Row, ...]
    notes: tuple[str, ...]
    stand_for: tuple[float, ...] = ()

    def mean(self, name: str) -> float:
        return self.average([getattr(row, name) for row in self.rows])

    def average(self, values: Sequence[float]) -> float:
        """Of a value of each row, over all records."""
        counts = self.stand_for or (1.0,) * len(self.rows)
        return sum(value * count for value, count in zip(values, counts, strict=True)) / sum(counts)

    def largest_batch(self, size: int) -> tuple[Row, ...]:
        """The longest records that can stand in a batch of ``size``."""
        return self.longest[:size] if len(self.longest) > 1 else self.longest * size


@dataclass(frozen=True)
class Wanted:
    """What the caller says of the data, which wins over what is found. None: not said.

    Attributes:
        records: how many an epoch has.
        text_tokens: of a record.
        image_size: (width, height) of a picture.
    """

    records: int | None = None
    text_tokens: int | None = None
    image_size: tuple[int, int] | None = None


def workload_of(stage: Stage, settings: Any, model: Any, name: str, processor: Any, wanted: Wanted) -> Workload:
    """The data of a stage.

    Args:
        settings: the stage's CALConfig.
        model: without storage.
        name: of a known model whose sizes it has; of a folder, nothing is known beside its processor.
        processor: the model's; None: it is not there.
        wanted: what the caller says.

    Raises:
        ValueError: nothing is there to count, nothing is published, and the caller said nothing.
    """
    if processor is not None and wanted == Wanted() and all(_is_there(source) for source in stage.data):
        return _measured(stage, settings, model, processor)
    known = [one for source in stage.data if (one := _known(source, stage.on_bad)) is not None]
    if wanted.records is None and len(known) < len(stage.data):
        lacking = next(source.path for source in stage.data if _known(source, stage.on_bad) is None)
        raise ValueError(
            f"stage {stage.number}: data {lacking}: not there, and nothing is published of it. Give --records, or the "
            "data's path"
        )
    if len(known) == len(stage.data):
        counts = _trained_on(stage, [one.records for one in known])
        known = [replace(one, records=count) for one, count in zip(known, counts, strict=True)]
    return _assumed(known, settings, model, name, processor, wanted)


def _trained_on(stage: Stage, records: Sequence[int]) -> list[int]:
    """How many records of each source an epoch has, of sources that hold so many: by weight, small ones are repeated."""
    from ..data.sources.mixture import drawn

    weights = [source.weight for source in stage.data if source.weight is not None]
    if len(records) == 1 or not weights:
        return list(records)
    return drawn(records, weights, seed=stage.settings.get("seed", 42))


def _assumed(known: list[Published], settings: Any, model: Any, name: str, processor: Any, wanted: Wanted) -> Workload:
    known = known or [Published(wanted.records or 0, 1.0, *MIX, "")]
    total = sum(one.records for one in known)

    def mean(of: str) -> float:
        return sum(getattr(one, of) * one.records for one in known) / max(total, 1)

    text, width_height = wanted.text_tokens or mean("text"), wanted.image_size or PICTURE
    labels = text * mean("labels") / mean("text")
    images = vision_inputs(model, name, processor, settings.processor_kwargs, width_height)
    features = image_tokens(model, images)
    limit = settings.max_length or features + text
    with_image = _limited(Row(features, text - labels - 1, labels, 1, labels), limit)
    without = _limited(Row(0, text, 0, 0, labels), limit)
    many = round(_SHARES * mean("with_image"))
    records = wanted.records or total
    sources = "as given" if wanted.records else "; ".join(one.source for one in known)
    notes = [f"{records:,} records ({sources})"]
    given = "given" if wanted.text_tokens else "ASSUMED, --text-tokens"
    notes.append(f"a record has {text:.0f} tokens of text ({given}), {labels:.0f} of them labels (ASSUMED)")
    if processor is not None or known_image_processor(name) is not None:
        notes.append(
            f"images of {width_height[0]} × {width_height[1]} pixels "
            f"({'given' if wanted.image_size else 'ASSUMED, --image-size'})"
        )
    longest = Row(features, 0, max(limit - features - 1, 0), 1, max(limit - features, 0))
    return Workload(records, (with_image,) * many + (without,) * (_SHARES - many), images, (longest,), tuple(notes))


def _limited(row: Row, limit: float) -> Row:
    """Cut at ``limit`` tokens, at its end."""
    over = row.tokens - limit
    if over <= 0:
        return row
    if row.image == 0:
        return Row(0, limit, 0, 0, max(row.labels - over, 0))
    after = max(row.after - over, 0)
    return Row(row.image, row.before, after, row.rest, min(row.labels, after))


# ---- Vision inputs ----


def size_named(text: str) -> tuple[int, int]:
    """(width, height) of "640x480". ValueError for anything else."""
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise ValueError(f"--image-size {text}: expected WIDTHxHEIGHT in pixels, such as 640x480")
    return int(width), int(height)


def vision_inputs(model: Any, name: str, processor: Any, settings: Any, size: tuple[int, int]) -> dict[str, Tensor]:
    """The tensors of one grey picture of ``size`` (width, height) on the CPU, as the image processor makes them.

    ``processor``: the model's, or None: then a known model's image processor, else the one size that the config names.
    """
    from PIL import Image

    from ..data.collators.processors import configure

    images = getattr(processor, "image_processor", None) or known_image_processor(name)
    if images is None:
        return _of_one_size(model)
    if settings and processor is None:
        images = configure(SimpleNamespace(image_processor=images), settings).image_processor
    made = images(images=[Image.new("RGB", size, (128, 128, 128))], return_tensors="pt")
    return {key: value for key, value in made.items() if isinstance(value, Tensor)}


def _of_one_size(model: Any) -> dict[str, Tensor]:
    stand_in = SimpleNamespace(config=model.config, device="cpu", dtype=torch.float32)
    made = (family_of(model).dummy_image or picture)(stand_in)
    if "pixel_values_aux" in made:  # Mini-Gemini: its dummy is smaller than what it is trained on
        side = model.config.image_size_aux
        made["pixel_values_aux"] = torch.full((1, 3, side, side), 0.5)
    return made


# ---- Data that is there ----


def _is_there(source: Source) -> bool:
    return Path(source.path).exists()


def _located(source: Source) -> Any:
    from ..data.sources.load import LocatedRecords

    return LocatedRecords(source.path, **source.options())


def _known(source: Source, on_bad: str) -> Published | None:
    """What is known of a set without a processor: counted if it is there, else published."""
    if not _is_there(source):
        return PUBLISHED.get(Path(source.path).name)
    rows = _located(source).rows(lambda number: number < SAMPLE)
    found = [row.record for row in rows]
    looked = [record for record in found[:SAMPLE] if record is not None]
    if not looked:
        raise ValueError(f"{source.path}: none of its first records can be used; seecal check-data says why")
    parts = [part for record in looked for message in record["messages"] for part in _text_of(message)]
    answers = sum(len(text) for role, text in parts if role == "assistant")
    letters = sum(len(text) for _, text in parts)
    with_image = sum(bool(record["images"]) for record in looked) / len(looked)
    # About four characters a token
    return Published(
        _Counted(len(found), min(len(found), SAMPLE), len(looked)).usable(on_bad),
        with_image,
        letters // (4 * len(looked)) + 1,
        answers // (4 * len(looked)) + 1,
        f"{source.path}, counted",
    )


def _text_of(message: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for part in message["content"]:
        if part["type"] == "text":
            yield message["role"], part["text"] or ""


@dataclass
class _Counted:
    """A source so far: all its records, those that were looked at, those of them that can be used, those with a length."""

    records: int = 0
    looked_at: int = 0
    good: int = 0
    rows: int = 0

    def usable(self, on_bad: str) -> int:
        """How many of all training uses, by the share of those looked at."""
        return round(self.records * self.good / max(self.looked_at, 1)) if on_bad == "skip" else self.records


def _measured(stage: Stage, settings: Any, model: Any, processor: Any) -> Workload:
    """Lengths of the first records as training's own collator makes them."""
    from ..trainer.collators import vision_collator

    if stage.chat_template is not None:
        processor.chat_template = stage.chat_template
    collator = vision_collator(settings, processor)
    counted, rows, images = [_Counted() for _ in stage.data], list[tuple[int, Row]](), dict[str, Tensor]()
    ids = torch.tensor(sorted(image_ids(model.config)))
    for number, is_looked_at, located in in_turn([_numbered(number, stage) for number in range(len(stage.data))]):
        source = counted[number]
        source.records += 1
        source.looked_at += is_looked_at
        source.good += located.record is not None
        if located.record is None or len(rows) == SAMPLE:
            continue
        batch = dict(collator([located.record]))
        rows.append((number, row_of(batch, ids)))
        source.rows += 1
        if rows[-1][1].image and rows[-1][1].image >= max(row.image for _, row in rows):
            images = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
    if not rows:
        raise ValueError(f"{stage.data[0].path}: none of its first records can be used; seecal check-data says why")
    there = [source.usable(stage.on_bad) for source in counted]
    records = _trained_on(stage, there)
    by_length = sorted((row for _, row in rows), key=lambda row: row.tokens, reverse=True)
    if len(rows) < sum(there) and settings.max_length:
        longest = by_length[0]
        room = max(settings.max_length - longest.image - 1, 0)
        by_length = [Row(longest.image, 0, room, 1, room + 1)]
    return Workload(
        sum(records),
        tuple(row for _, row in rows),
        images,
        tuple(by_length),
        _said_of(counted, there, records, len(rows)),
        tuple(records[number] / counted[number].rows for number, _ in rows),
    )


def _numbered(number: int, stage: Stage) -> Iterator[tuple[int, bool, Any]]:
    """(the source's number, whether its record was looked at, the row) of all rows but those of ``skip_records``."""
    from ..data.sources.quarantine_file import KnownBad

    known = KnownBad(stage.skip_records) if stage.skip_records and Path(stage.skip_records).is_file() else ()
    for place, row in enumerate(_located(stage.data[number]).rows(lambda place: place < SAMPLE)):
        if not known or (row.path, row.row, row.id) not in known:
            yield number, place < SAMPLE, row


def _said_of(
    counted: Sequence[_Counted], there: Sequence[int], records: Sequence[int], lengths: int
) -> tuple[str, ...]:
    """The notes on what was counted."""
    by_weight = f" drawn by weight from {sum(there):,}" if list(records) != list(there) else ""
    of = "all" if lengths == sum(there) else f"the first {lengths}"
    notes = [f"{sum(records):,} records{by_weight}, lengths of {of}"]
    looked_at = sum(one.looked_at for one in counted)
    bad = looked_at - sum(one.good for one in counted)
    if bad:
        notes.append(f"{bad:,} of the first {looked_at:,} cannot be used")
    return tuple(notes)


def row_of(batch: Mapping[str, Tensor], image_ids_I: Tensor) -> Row:
    """A batch of one record as tokens. ``image_ids_I``: the ids that stand for images."""
    valid = batch["attention_mask"][0].bool()
    ids, labels = batch["input_ids"][0][valid], batch["labels"][0][valid]
    image = torch.isin(ids, image_ids_I)
    text = ~image
    columns = (labels[1:] != IGNORE_INDEX).nonzero()[:, 0] + 1
    count = len(columns)
    if not image.any() or not count:
        return Row(int(image.sum()), int(text.sum()), 0, 0, count)
    first, last = int(image.nonzero()[0]), int(columns[-1])
    before, until = int(text[:first].sum()), int(text[:last].sum())
    return Row(int(image.sum()), before, max(until - before, 0), int(text.sum()) - max(until, before), count)


def sums(rows: tuple[Row, ...]) -> Row:
    """All of them together."""
    return Row(*(sum(getattr(row, one.name) for row in rows) for one in fields(Row)))
