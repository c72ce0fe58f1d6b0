"""A folder of answers: a manifest written first, one line a record as they come, the result last."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..constants import AS_JSON

MANIFEST, LINES, RESULT = "_manifest.json", "predictions.jsonl", "result.json"
_KIND = "seecal eval"
# What of a manifest may differ: names and places, and how much is done at once
_FREE = {"model": ("name", "adapter"), "data": ("name",)}


@dataclass(frozen=True)
class Line:
    """One record's answer, or why it has none.

    Attributes:
        id: of the record.
        key: of its version (:attr:`seecal.evaluation.examples.Example.key`).
        prediction: the answer; None where the record could not be asked.
        error: why not.
    """

    id: str
    key: str
    prediction: str | None
    error: str | None = None


class Predictions:
    """The answers of one model to one data set. A torn last line, which a kill leaves, is taken off; the rest stays.

    Args:
        folder: made if it is not there. None: nothing is written.
        manifest: what was asked of what and how, as JSON.

    Raises:
        ValueError: the folder holds answers of something else, naming what differs.
    """

    def __init__(self, folder: Path | None, manifest: Mapping[str, Any]) -> None:
        self.folder, self.lines = folder, list[Line]()
        self._file: Any = None
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / MANIFEST).is_file():
            _agree(folder, read_manifest(folder), manifest)
            self.lines = list(_whole_lines(folder / LINES, cut=True))
        elif any(folder.iterdir()):
            raise ValueError(f"{folder}: no {MANIFEST} here, and it is not empty. Set --out to a new folder.")
        else:
            write_json(folder / MANIFEST, {"kind": _KIND, **manifest})
        self._file = (folder / LINES).open("a", encoding="utf-8", errors=AS_JSON)

    def add(self, lines: list[Line], beside: list[dict[str, Any]]) -> None:
        """Writes lines, each with what else is to be seen of it (``references``, ``columns``)."""
        self.lines += lines
        if self._file is not None:
            for line, more in zip(lines, beside, strict=True):
                self._file.write(json.dumps({**vars(line), **more}, ensure_ascii=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        """No more lines come. What was written is on the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()


def is_predictions(path: Any) -> bool:
    """Whether a path is a folder of answers, and not of a model."""
    return isinstance(path, (str, Path)) and (Path(path) / MANIFEST).is_file() and (Path(path) / LINES).is_file()


def read_predictions(folder: Path) -> list[Line]:
    """The answers of a folder, in order. ValueError for a line that cannot be read."""
    return list(_whole_lines(folder / LINES, cut=False))


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a folder of answers holds. ValueError where it holds none."""
    try:
        found = json.loads((folder / MANIFEST).read_text("utf8"))
        if not isinstance(found, dict) or found.get("kind") != _KIND:
            raise ValueError("it is of something else")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder / MANIFEST}: cannot be read ({error}). Set --out to a new folder.") from None
    return found


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file, whole or not at all."""
    aside = path.with_name(f".{path.name}.part")
    with aside.open("w", encoding="utf-8", errors=AS_JSON) as file:
        json.dump(content, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def _agree(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for part in ("data", "model", "settings", "versions"):
        was, new = before.get(part) or {}, now[part]
        for name in sorted({*was, *new} - {*_FREE.get(part, ())}):
            if was.get(name) != new.get(name):
                raise ValueError(
                    f"{folder}: these answers were begun with another {part}: {name} was {was.get(name)!r} and is "
                    f"{new.get(name)!r}. Set --out to a new folder, or all else as it was."
                )


def _whole_lines(path: Path, cut: bool) -> Iterator[Line]:
    """The lines of a file. ``cut``: what stands behind its last line end is taken off, else it is an error."""
    content = path.read_bytes() if path.is_file() else b""
    end = content.rfind(b"\n") + 1
    if end < len(content) and cut:
        with path.open("r+b") as file:
            file.truncate(end)
        content = content[:end]
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            found = json.loads(line)
            yield Line(str(found["id"]), str(found["key"]), found["prediction"], found["error"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{path}: line {number} cannot be read ({error}). Take it and all behind it out."
            ) from None
