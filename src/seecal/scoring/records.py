"""The rows of a data set with their places, and what tells two versions of a data set apart."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..data.paths import ImageFolders, LostImage, show
from ..data.sources.load import Located, LocatedRecords
from ..data.sources.records import FEATURES
from .manifest import read_manifest
from .shards import whole


class Data:
    """A data set to be scored.

    Args:
        data: what :func:`seecal.load_records` takes, or a set of records that it or :func:`seecal.mix` has returned.
        format, image_root: as there.
        keep_lost: rows whose image files are missing or damaged stay records, and say so in ``lost``.

    Attributes:
        name: its path; "the data set" for one in memory.
        format: the name of its format; "records" for a set of records.

    Raises:
        FileNotFoundError, ValueError: as :func:`seecal.load_records`.
    """

    def __init__(
        self, data: Any, format: str | None = None, image_root: str | Path | None = None, keep_lost: bool = False
    ) -> None:
        self._keep_lost = keep_lost
        self._records = data if isinstance(data, Dataset) and FEATURES.items() <= data.features.items() else None
        self._folders = ImageFolders(())
        if self._records is not None:
            self.name, self.format = "the data set", "records"
            return
        self._located = LocatedRecords(data, format=format, image_root=image_root, keep_lost=keep_lost)
        self.name, self.format = self._located.where, self._located.format
        self._folders = self._located.root

    @property
    def roots(self) -> tuple[str, ...]:
        """The folders that image paths start from."""
        return self._folders.roots

    def rows(self, wanted: Callable[[int], bool] = lambda number: True) -> Iterator[Located]:
        """The rows in order, each with its place; see :meth:`LocatedRecords.rows`."""
        if self._records is None:
            yield from self._located.rows(wanted)
            return
        has_source = "source" in self._records.column_names
        for number in range(len(self._records)):
            if not wanted(number):
                yield Located("dataset", number)
                continue
            row = self._records[number]
            record = {name: row[name] for name in FEATURES}
            name = row["source"] if has_source else "dataset"
            yield Located(name, number, record, lost=_lost(record, name, number) if self._keep_lost else ())

    def fingerprint(
        self,
        on_bad: str = "error",
        counted: Callable[[], Any] = lambda: None,
        without: Callable[[Located], bool] = lambda row: False,
    ) -> tuple[str, int]:
        """(a digest of every row's place, id, messages, image names and embedded images; how many rows there are).

        The contents of image files are not read: they would have to be read twice.

        Args:
            on_bad: "error": ValueError at the first row that cannot be used.
            counted: called after each row.
            without: whether a row counts as one that cannot be used, whatever it became.
        """
        digest, count = hashlib.blake2b(digest_size=16), 0
        for located in self.rows():
            if located.error is not None and on_bad == "error":
                raise ValueError(f"{located.error} Or set on_bad to skip.")
            digest.update(self._essence(located, located.record is None or without(located)))
            count += 1
            counted()
        if not count:
            raise ValueError(f"{self.name}: holds no records.")
        return digest.hexdigest(), count

    def _essence(self, located: Located, unusable: bool) -> bytes:
        if unusable or located.record is None:
            return json.dumps([located.source, located.row, "cannot be used"]).encode()
        record = located.record
        # Names below the image folder: scores stay valid when the folder is moved
        images = [
            self._folders.below(str(image["path"]))
            if image["bytes"] is None
            else hashlib.blake2b(image["bytes"], digest_size=16).hexdigest()
            for image in record["images"]
        ]
        return json.dumps([located.source, located.row, record["id"], record["messages"], images]).encode()


def scored_data(
    scores: str | Path,
    told: dict[str, Any],
    data: Any = None,
    image_root: str | Path | None = None,
    *,
    keep_lost: bool = False,
) -> tuple[Any, Data]:
    """(the data as it was given or as its scores name it, its rows).

    Args:
        scores: the folder of scores, for errors.
        told: what its manifest says of the data.
        data, image_root: where the data lies now; None: where the scores say it lay.
        keep_lost: rows whose images have gone or been damaged since stay, and say so; else the first is an error.

    Raises:
        ValueError: the scores are of a set in memory and ``data`` is None; the data is not what was scored.
        FileNotFoundError: no such data.
    """
    if data is None:
        if told["format"] == "records" or told["name"] == "the data set":
            raise ValueError(f"{scores}: the data was a set in memory. Pass it as data=...")
        data, image_root = told["name"], image_root or told["image_root"]
    source = Data(data, None if told["format"] == "records" else told["format"], image_root, keep_lost=True)
    since = _LostSince(scores)
    if source.fingerprint(on_bad="skip", without=since) != (told["fingerprint"], told["rows"]):
        also = f" Also, an image cannot be used: {since.first.line}" if since.first else ""
        raise ValueError(
            f"{scores}: these are scores of another version of {source.name}: its rows, texts or image names have changed. "
            f"Score it again into an empty folder.{also}"
        )
    if since.first is not None and not keep_lost:
        raise ValueError(f"{scores}: an image has gone or been damaged since it was scored: {since.first.line}")
    return data, source


class _LostSince:
    """Whether a row that has lost an image could not be used when it was scored either. Keeps the first image that a row
    with scores has lost."""

    def __init__(self, scores: str | Path) -> None:
        self.first: LostImage | None = None
        self._scores = Path(scores)
        self._skipped: dict[tuple[str, int], str | None] | None = None  # rows without scores, and their ids

    def __call__(self, row: Located) -> bool:
        if not row.lost:
            return False
        if self._skipped is None:
            notes = [note for _, note in whole(self._scores, read_manifest(self._scores))]
            self._skipped = {(one.source, one.row): one.record for note in notes for one in note.skipped}
        if (row.source, row.row) in self._skipped:
            return self._skipped[row.source, row.row] is None  # with an id it was read, and left out after that
        self.first = self.first or row.lost[0]
        return False


def _lost(record: dict[str, Any], name: str, number: int) -> tuple[LostImage, ...]:
    """The image files of a record in memory that are not there."""
    paths = [image["path"] for image in record["images"] if image["bytes"] is None]
    called = f"{name}: record {show(record['id'])} (row {number})"
    return tuple(
        LostImage(path, True, f"{called}: image {show(path)} is not there. Put it there.")
        for path in paths
        if not os.path.isfile(path)
    )
