"""Made-up records in a recipe's own data format, as files: for a run without the data.

Drawn images of several sizes, modes and file types, one a record; records of one turn and of several; every eighth without
an image, where the format has such records.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from ..data.image_placement import PLACEHOLDER
from ..data.sources.formats import FORMATS
from .recipe import Source

_COLOURS = {"red": (215, 40, 40), "green": (40, 170, 60), "blue": (40, 70, 210), "yellow": (230, 210, 50)}
_SHAPES = ("square", "circle", "bar")
_SIZES = ((336, 336), (640, 480), (480, 640), (700, 700), (900, 300), (300, 900), (64, 48), (1024, 768))
_MODES = (("RGB", "jpg"), ("RGB", "png"), ("L", "png"), ("RGBA", "png"), ("P", "png"), ("CMYK", "jpg"))
_TEXT_ONLY = 8  # every how-manieth record has no image


@dataclasses.dataclass(frozen=True)
class _Drawn:
    """One record before it is written in a format: turns of (question, answer), and its image as the bytes of a file."""

    name: str
    turns: Sequence[tuple[str, str]]
    image: bytes | None
    suffix: str


def write_synthetic(source: Source, folder: Path, count: int = 32, *, one_turn: bool = False) -> Source:
    """Write made-up records in the format of ``source``. Returns it with the path, and the image root, of what was written.

    The kind of file is told by the suffix of its path (a path without one is a folder of Parquet files, as on the hub), the
    format by ``format`` or, without it, by what such files mostly hold: LLaVA's conversations, in tables captions. Keys are
    called as ``columns`` has them.

    Args:
        one_turn: no record has several turns.

    Raises:
        ValueError: a kind of file or a format that is not known.
    """
    suffix = Path(source.path).suffix.lower()
    kind = suffix if suffix in _WRITERS else "" if not suffix or suffix[1:].isdigit() else None
    if kind is None:
        raise ValueError(f"data: {source.path}: no reader for {suffix!r}. Known: {', '.join(filter(None, _WRITERS))}.")
    chosen = source.format or ("captions" if kind in (".csv", ".tsv") else "llava")
    if chosen not in _ROWS:
        raise ValueError(f"data.format: {chosen!r} is not known. Known formats are {', '.join(FORMATS)}.")
    folder.mkdir(parents=True, exist_ok=True)
    only_images = chosen == "captions"
    records = [_drawn(number, one_turn=one_turn, text_only=not only_images) for number in range(count)]
    name = f"{source.split or 'data'}{kind}" if kind else f"{source.split or 'train'}-00000-of-00001.parquet"
    path = folder / name
    columns = dict(source.columns or {})
    image_key = next((ours for ours in columns.values() if ours in _IMAGE_KEYS), None) or _IMAGES_OF.get(
        chosen, "image"
    )
    used = set[str]()

    def row(record: _Drawn, image: Any) -> dict[str, Any]:
        made = _ROWS[chosen](record)
        if image is not None:
            key = "image" if image_key == "file_name" and not isinstance(image, str) else image_key
            made[key] = [image] if key == "images" else image
        for theirs, ours in columns.items():
            if ours is None:
                made[theirs] = "not used"
            elif ours in made:
                made[theirs] = made.pop(ours)
                used.add(theirs)
        return made

    _WRITERS[kind](path, records, row)
    # A key that made-up records have no use for would be an error: no record has it
    kept = {theirs: ours for theirs, ours in columns.items() if ours is None or theirs in used}
    root = str(folder) if source.image_root is not None else None
    return dataclasses.replace(source, path=str(path if kind else folder), image_root=root, columns=kept or None)


def draw(number: int, size: tuple[int, int] = (336, 336)) -> tuple[Image.Image, str, str]:
    """(a picture, its colour, its shape), the same for the same number."""
    colour, shape = sorted(_COLOURS)[number % 4], _SHAPES[number % 3]
    image = Image.new("RGB", size, (245 - number % 7, 245, 240))
    wide, high = size
    box = [wide // 5, high // 5, 4 * wide // 5, 4 * high // 5]
    if shape == "circle":
        ImageDraw.Draw(image).ellipse(box, fill=_COLOURS[colour])
    else:
        box[1] = box[1] if shape == "square" else 2 * high // 5
        ImageDraw.Draw(image).rectangle(box, fill=_COLOURS[colour])
    return image, colour, shape


def _drawn(number: int, *, one_turn: bool, text_only: bool) -> _Drawn:
    image, colour, shape = draw(number, _SIZES[number % len(_SIZES)])
    mode, suffix = _MODES[number % len(_MODES)]
    turns = [
        ("What is in this picture?", f"There is a {colour} {shape} in it, on a light ground."),
        ("Where?", "In the middle."),
    ]
    turns = turns[: 1 if one_turn else 1 + number % 3 // 2]
    if text_only and number % _TEXT_ONLY == _TEXT_ONLY - 1:
        return _Drawn(f"made-up-{number:03}", [(f"What is {number} and 1?", f"It is {number + 1}.")], None, "")
    file = io.BytesIO()
    image.convert(mode).save(file, {"jpg": "JPEG", "png": "PNG"}[suffix])
    return _Drawn(f"made-up-{number:03}", turns, file.getvalue(), suffix)


# ---- Formats: what a row has beside its image ----

_IMAGE_KEYS = ("image", "images", "file_name")
_IMAGES_OF = {"sharegpt": "images", "messages": "images", "prompt_completion": "images"}


def _marked(record: _Drawn) -> list[tuple[str, str]]:
    """The turns with the mark of the image before the first question."""
    if record.image is None:
        return list(record.turns)
    (question, answer), *rest = record.turns
    return [(f"{PLACEHOLDER}\n{question}", answer), *rest]


def _turns(record: _Drawn, who: str, what: str, roles: tuple[str, str]) -> list[dict[str, str]]:
    return [{who: role, what: text} for turn in _marked(record) for role, text in zip(roles, turn, strict=True)]


def _conversations(record: _Drawn) -> dict[str, Any]:
    return {"id": record.name, "conversations": _turns(record, "from", "value", ("human", "gpt"))}


def _messages(record: _Drawn) -> dict[str, Any]:
    return {"id": record.name, "messages": _turns(record, "role", "content", ("user", "assistant"))}


def _prompt_completion(record: _Drawn) -> dict[str, Any]:
    question, answer = _marked(record)[0]
    return {"id": record.name, "prompt": question, "completion": answer}


def _caption(record: _Drawn) -> dict[str, Any]:
    return {"text": record.turns[0][1]}


_ROWS: dict[str, Callable[[_Drawn], dict[str, Any]]] = {
    "llava": _conversations,
    "sharegpt": _conversations,
    "messages": _messages,
    "prompt_completion": _prompt_completion,
    "captions": _caption,
}


# ---- Kinds of files ----

Row = Callable[[_Drawn, Any], dict[str, Any]]


def _with_files(path: Path, records: Sequence[_Drawn], row: Row) -> list[dict[str, Any]]:
    """Rows that name files beside ``path``."""
    rows = []
    for record in records:
        name = None
        if record.image is not None:
            name = f"{record.name}.{record.suffix}"
            (path.parent / name).write_bytes(record.image)
        rows.append(row(record, name))
    return rows


def _write_json(path: Path, records: Sequence[_Drawn], row: Row) -> None:
    path.write_text(json.dumps(_with_files(path, records, row), indent=1), "utf8")


def _write_jsonl(path: Path, records: Sequence[_Drawn], row: Row) -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in _with_files(path, records, row)), "utf8")


def _write_table(path: Path, records: Sequence[_Drawn], row: Row) -> None:
    rows = _with_files(path, records, row)
    cells = [{k: v if isinstance(v, str) else json.dumps(v) for k, v in one.items()} for one in rows]
    with path.open("w", encoding="utf8", newline="") as file:
        names = list(dict.fromkeys(key for one in cells for key in one))
        writer = csv.DictWriter(file, names, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(cells)


def _write_parquet(path: Path, records: Sequence[_Drawn], row: Row) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [row(one, None if one.image is None else {"bytes": one.image, "path": None}) for one in records]
    names = list(dict.fromkeys(key for one in rows for key in one))
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{name: one.get(name) for name in names} for one in rows]), path
    )


def _write_tar(path: Path, records: Sequence[_Drawn], row: Row) -> None:
    with tarfile.open(path, "w") as tar:
        for record in records:
            text = json.dumps(row(record, None)).encode()
            files = [("json", text), *([(record.suffix, record.image)] if record.image is not None else [])]
            for suffix, content in files:
                entry = tarfile.TarInfo(f"{record.name}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


_WRITERS: dict[str, Callable[[Path, Sequence[_Drawn], Row], None]] = {
    ".json": _write_json,
    ".jsonl": _write_jsonl,
    ".ndjson": _write_jsonl,
    ".csv": _write_table,
    ".tsv": _write_table,
    ".parquet": _write_parquet,
    ".tar": _write_tar,
    "": _write_parquet,
}
