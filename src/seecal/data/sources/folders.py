"""Which data files a path means: a file, or a folder of one of the shapes that people and the Hub use."""

from __future__ import annotations

import json
import re
from pathlib import Path

import datasets

from .readers import READERS

_LISTING = 12
# What describes the images of a folder, in the order in which it is looked for.
_CAPTIONS = tuple(
    f"{stem}{suffix}" for stem in ("metadata", "captions") for suffix in (".jsonl", ".csv", ".json", ".tsv")
)
# Several files of these kinds are parts of one set
_SHARDS = (".parquet", ".tar")
_NO_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_SHARD_NAME = re.compile(r"(.+?)-\d{5}-of-\d{5}(?:-\w+)?")


def files_of(path: Path, split: str | None = None) -> list[Path]:
    """The data files that ``path`` means: itself, or a folder's.

    Args:
        split: which split, where the names of files or of their folders tell several apart.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: no file that a reader knows, or more than one that could be meant; several splits, or none of that name;
            lists what is there.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder. Check the path of the data.")
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise ValueError(
                f"{path}: no reader for {path.suffix or 'a file without suffix'!r}. Known: {', '.join(READERS)}."
            )
        if split is not None and split_of(path.name) not in (split, _SPLITS.get(split, split)):
            raise ValueError(f"{path}: this is one file, so split={split!r} chooses nothing. Leave it out.")
        return [path]
    for name in _CAPTIONS:
        if (path / name).is_file() and split is None:
            return [path / name]
    return _of_split(path, split)


def _of_split(path: Path, split: str | None) -> list[Path]:
    groups = _by_split(path)
    if split is None and len(groups) > 1 and any(name is not None for name in groups):
        raise ValueError(
            f"{path}: it holds several splits, {_listed(groups)}, and training on all of them would be training on test "
            f"data. Choose one: split={next(filter(None, groups))!r}."
        )
    if split is None:
        return _one_set(path, next(iter(groups.values()), []), several=any(name is not None for name in groups))
    wanted = next((name for name in (split, _SPLITS.get(split, split)) if name in groups), None)
    if wanted is None:
        raise ValueError(f"{path}: no split {split!r}. There are {_listed(groups) or 'no data files'}.")
    return _one_set(path, groups[wanted], several=True)


def _one_set(path: Path, known: list[Path], several: bool) -> list[Path]:
    """``known`` if they are one set; ``several`` files are, if their names say so."""
    suffixes = {entry.suffix.lower() for entry in known}
    if known and (len(known) == 1 or (len(suffixes) == 1 and (several or suffixes <= {*_SHARDS}))):
        return known
    here = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    found = ", ".join(entry.name for entry in (known or here)[:_LISTING]) or "nothing"
    if known:
        raise ValueError(f"{path}: several data files ({found}). Name one; seecal.mix makes one set of several.")
    raise ValueError(
        f"{path}: found {found}; known are {', '.join(_CAPTIONS)}, Parquet files, WebDataset shards (.tar), one file of "
        f"{', '.join(READERS)}, or what Dataset.save_to_disk writes."
    )


def _by_split(path: Path) -> dict[str | None, list[Path]]:
    """The data files of a folder by their split; if it has none, of ``data`` in it or of folders called like splits."""
    groups: dict[str | None, list[Path]] = {}
    for file in _data_files(path):
        groups.setdefault(split_of(file.name), []).append(file)
    if groups:
        return groups
    if (path / "data").is_dir():
        return _by_split(path / "data")
    for folder in sorted(entry for entry in path.iterdir() if entry.is_dir()):
        name = _SPLITS.get(folder.name.lower())
        captions = [folder / caption for caption in _CAPTIONS if (folder / caption).is_file()]
        if name and (files := captions[:1] or _data_files(folder)):
            groups[name] = files
    return groups


def _data_files(folder: Path) -> list[Path]:
    here = sorted(entry for entry in folder.iterdir() if not entry.name.startswith(".") and entry.name not in _NO_DATA)
    return [entry for entry in here if entry.suffix.lower() in READERS and entry.is_file()]


def split_of(name: str) -> str | None:
    """The split that a file's name tells: ``train`` of train-00000-of-00002.parquet and of my_train.json; else None."""
    stem = Path(name).stem
    shard = _SHARD_NAME.fullmatch(stem)
    words = re.split(r"[^a-z]+", (shard[1] if shard else stem).lower())
    known = next((_SPLITS[word] for word in words if word in _SPLITS), None)
    return known or (shard[1] if shard else None)


def _listed(groups: dict[str | None, list[Path]]) -> str:
    return ", ".join(
        f"{name or 'no split in the name'} ({len(files)} file{'s' * (len(files) != 1)})"
        for name, files in groups.items()
    )


def saved_dataset(path: Path, split: str | None = None) -> datasets.Dataset | None:
    """The set that ``Dataset.save_to_disk`` wrote to the folder ``path``; None if it is something else."""
    if (path / "dataset_dict.json").is_file():
        splits = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        if split in splits:
            return saved_dataset(path / str(split))
        if split is not None:
            raise ValueError(f"{path}: no split {split!r}. There are {', '.join(splits)}.")
        raise ValueError(
            f"{path}: a DatasetDict with {', '.join(splits)}. Name the folder of one of them, or set split=..."
        )
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        _check_saved(path)
        return datasets.Dataset.load_from_disk(str(path))
    return None


def _check_saved(path: Path) -> None:
    """ValueError where what ``save_to_disk`` wrote names files outside of its folder, which `datasets` would read."""
    try:
        state = json.loads((path / "state.json").read_text("utf8"))
        names = [entry["filename"] for entry in state["_data_files"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{path / 'state.json'}: cannot be read; the folder is damaged. Save the set again.") from None
    for name in names:
        if not isinstance(name, str) or name != Path(name).name or (path / name).is_symlink():
            raise ValueError(
                f"{path / 'state.json'}: it names {name!r}, which is no file of this folder. Save it again."
            )
