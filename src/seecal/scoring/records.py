"""The rows of a data set with their places, and what tells two versions of a data set apart."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..data.sources.load import Located, LocatedRecords
from ..data.sources.records import FEATURES


class Data:
    """A data set to be scored.

    Args:
        data: what :func:`seecal.load_records` takes, or a set of records that it or :func:`seecal.mix` has returned.
        format, image_root: as there.

    Attributes:
        name: its path; "the data set" for one in memory.
        format: the name of its format; "records" for a set of records.

    Raises:
        FileNotFoundError, ValueError: as :func:`seecal.load_records`.
    """

    def __init__(self, data: Any, format: str | None = None, image_root: str | Path | None = None) -> None:
        self._records = data if isinstance(data, Dataset) and FEATURES.items() <= data.features.items() else None
        self.roots: tuple[str, ...] = ()
        if self._records is not None:
            self.name, self.format = "the data set", "records"
            return
        self._located = LocatedRecords(data, format=format, image_root=image_root)
        self.name, self.format = self._located.where, self._located.format
        self.roots = self._located.root.roots

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
            yield Located(row["source"] if has_source else "dataset", number, record)

    def fingerprint(self, on_bad: str = "error", counted: Callable[[], Any] = lambda: None) -> tuple[str, int]:
        """(a digest of every row's place, id, messages, image names and embedded images; how many rows there are).

        The contents of image files are not read: they would have to be read twice.

        Args:
            on_bad: "error": ValueError at the first row that cannot be used.
            counted: called after each row.
        """
        digest, count = hashlib.blake2b(digest_size=16), 0
        for located in self.rows():
            if located.error is not None and on_bad == "error":
                raise ValueError(f"{located.error} Or set on_bad to skip.")
            digest.update(self._essence(located))
            count += 1
            counted()
        if not count:
            raise ValueError(f"{self.name}: holds no records.")
        return digest.hexdigest(), count

    def _below_its_folder(self, path: str) -> str:
        root = next((root for root in self.roots if path.startswith(root.rstrip(os.sep) + os.sep)), "")
        return path.removeprefix(root)

    def _essence(self, located: Located) -> bytes:
        if located.record is None:
            return json.dumps([located.source, located.row, "cannot be used"]).encode()
        record = located.record
        # Names below the image folder: scores stay valid when the folder is moved
        images = [
            self._below_its_folder(str(image["path"]))
            if image["bytes"] is None
            else hashlib.blake2b(image["bytes"], digest_size=16).hexdigest()
            for image in record["images"]
        ]
        return json.dumps([located.source, located.row, record["id"], record["messages"], images]).encode()


def scored_data(
    scores: str | Path, told: dict[str, Any], data: Any = None, image_root: str | Path | None = None
) -> tuple[Any, Data]:
    """(the data as it was given or as its scores name it, its rows).

    Args:
        scores: the folder of scores, for errors.
        told: what its manifest says of the data.
        data, image_root: where the data lies now; None: where the scores say it lay.

    Raises:
        ValueError: the scores are of a set in memory and ``data`` is None; the data is not what was scored.
        FileNotFoundError: no such data.
    """
    if data is None:
        if told["format"] == "records" or told["name"] == "the data set":
            raise ValueError(f"{scores}: the data was a set in memory. Pass it as data=...")
        data, image_root = told["name"], image_root or told["image_root"]
    source = Data(data, None if told["format"] == "records" else told["format"], image_root)
    if source.fingerprint(on_bad="skip") != (told["fingerprint"], told["rows"]):
        raise ValueError(
            f"{scores}: these are scores of another version of {source.name}: its rows, texts or image names have changed. "
            "Score it again into an empty folder."
        )
    return data, source
