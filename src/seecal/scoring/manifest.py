"""What a folder of scores is made of: ``_manifest.json``, written before the first shard and checked by all that follow."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .. import __version__

NAME = "_manifest.json"  # what reads a folder of Parquet files leaves out names that begin so
VERSION = 1
_LIBRARIES = ("torch", "transformers", "tokenizers", "peft", "pillow")


@dataclass(frozen=True)
class Manifest:
    """What was scored, by what and how. Two runs with equal ones (names aside) write the same shards.

    Attributes:
        model: ``name`` and ``adapter`` as they were given, ``weights`` (a digest of 64 numbers of every tensor),
            ``processor`` (a digest of tokenizer, template and image processor), ``dtype``.
        data: ``name`` as it was given, ``format``, ``image_root``, ``fingerprint``, ``rows``.
        options: those of :class:`seecal.CALOptions`, and those of :func:`seecal.score` that change a number or a row.
        columns: of the shards.
        records_per_shard: rows of the data that one shard is made of.
        versions: of seecal and of the libraries that the numbers come from.
        version: of this layout.
    """

    model: dict[str, Any]
    data: dict[str, Any]
    options: dict[str, Any]
    columns: list[str]
    records_per_shard: int
    versions: dict[str, str]
    version: int = VERSION

    @property
    def shards(self) -> int:
        """How many shards the whole set has."""
        return -(-int(self.data["rows"]) // self.records_per_shard)

    @property
    def key(self) -> str:
        """What every shard carries, so that one of another run is told."""
        return hashlib.blake2b(json.dumps(_checked(self), sort_keys=True).encode(), digest_size=16).hexdigest()

    def write(self, folder: Path) -> None:
        """Writes it, whole or not at all."""
        aside = _aside(folder)
        with aside.open("w", encoding="utf-8") as file:
            json.dump(asdict(self), file, indent=1, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(folder / NAME)


def _aside(folder: Path) -> Path:
    """Where this rank writes it first. What a kill leaves there is the same rank's next time, and no other's."""
    return folder / f".{NAME}.{os.environ.get('RANK', '0')}.part"


def _checked(manifest: Manifest) -> dict[str, Any]:
    """What must agree: all but names and places, which may change with the folder that things lie in."""
    every = asdict(manifest)
    every["model"] = {name: every["model"][name] for name in ("weights", "processor", "dtype")}
    every["data"] = {name: every["data"][name] for name in ("format", "fingerprint", "rows")}
    return every


def versions() -> dict[str, str]:
    """The versions that the numbers depend on."""
    return {"seecal": __version__, **{name: importlib.metadata.version(name) for name in _LIBRARIES}}


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a folder of scores. ValueError where there is none that can be read."""
    path = Path(folder) / NAME
    if not path.is_file():
        raise ValueError(
            f"{folder}: no {NAME} here, so these are no scores. Make them with seecal score --out {folder}"
        )
    try:
        found = json.loads(path.read_text("utf8"))
        if found.get("version") != VERSION:
            raise ValueError(f"of layout {found.get('version')!r}, this version reads {VERSION}")
        manifest = Manifest(**{field.name: found[field.name] for field in fields(Manifest)})
        _check_types(manifest)
        return manifest
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read ({error}). Score again into an empty folder.") from None


def _check_types(manifest: Manifest) -> None:
    """ValueError or KeyError where a manifest is not of the types that are written: it may come from somebody else."""
    for part, names in (
        ("model", ("name", "weights", "processor", "dtype")),
        ("data", ("name", "format", "fingerprint")),
    ):
        for name in names:
            if not isinstance(getattr(manifest, part)[name], str):
                raise ValueError(f"its {part}.{name} is no text")
    rows, size = manifest.data["rows"], manifest.records_per_shard
    if not (type(rows) is int and type(size) is int and rows >= 0 and size >= 1):
        raise ValueError(f"it has {rows!r} rows in shards of {size!r}")
    if not (isinstance(manifest.options, dict) and isinstance(manifest.versions, dict)):
        raise ValueError("its options or versions are no mapping")
    if not (isinstance(manifest.columns, list) and all(isinstance(name, str) for name in manifest.columns)):
        raise ValueError("its columns are no list of names")


def begin(folder: Path, manifest: Manifest) -> None:
    """Makes the folder a set of scores with this manifest, or checks that it is one.

    Raises:
        ValueError: the folder has scores of something else, naming what differs; or Parquet files that are no scores.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / NAME).is_file():
        if others := sorted(folder.glob("*.parquet")):
            raise ValueError(
                f"{folder}: {others[0].name} lies here without {NAME}: nothing says what it is. Set --out to a new folder."
            )
        manifest.write(folder)
        return
    _aside(folder).unlink(missing_ok=True)
    agree(folder, read_manifest(folder), manifest)


def agree(folder: Path, before: Manifest, now: Manifest) -> None:
    """ValueError naming the first thing in which two manifests differ."""
    other = "Set --out to an empty folder, or"
    if before.model["weights"] != now.model["weights"]:
        raise ValueError(
            f"{folder}: these are scores of another model ({_named(before.model)}; its weights are not those of "
            f"{_named(now.model)}). {other} score with the model that they were begun with."
        )
    if before.model["processor"] != now.model["processor"]:
        raise ValueError(
            f"{folder}: these scores were begun with another tokenizer, chat template or image processor than that of "
            f"{_named(now.model)}. {other} use that one."
        )
    if _checked(before)["data"] != _checked(now)["data"]:
        raise ValueError(
            f"{folder}: these are scores of another version of the data: {before.data['name']} had {before.data['rows']} "
            f"rows, {now.data['name']} has {now.data['rows']}, and their contents differ. {other} use the data that they "
            "were begun with."
        )
    for part in ("model", "options", "versions"):
        was, new = _checked(before)[part], _checked(now)[part]
        for name in sorted(was.keys() | new.keys()):
            if was.get(name) != new.get(name):
                raise ValueError(
                    f"{folder}: these scores were begun with {name}={was.get(name)!r}, not {new.get(name)!r}. {other} set "
                    "it as it was."
                )
    if before.key != now.key:
        raise ValueError(
            f"{folder}: these scores were begun with {before.records_per_shard} records a shard and the columns "
            f"{', '.join(before.columns)}. {other} set records_per_shard and logprobs as they were."
        )


def _named(model: dict[str, Any]) -> str:
    return f"{model['name']} with {model['adapter']}" if model.get("adapter") else str(model["name"])


def digest_of_weights(model: Any) -> str:
    """A digest of the names and shapes of all parameters and of up to 64 numbers of each, evenly spaced.

    Training changes every number of a tensor that it changes at all, so a few tell one model from another without the
    minute that all of them would take.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in sorted(model.named_parameters()):
        values = parameter.detach().flatten()
        some = values[:: max(1, -(-len(values) // 64))]
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        digest.update(some.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def digest_of_processor(processor: Any) -> str:
    """A digest of the tokenizer, the chat templates and the settings of the image processor."""
    tokenizer = processor.tokenizer
    images = getattr(processor, "image_processor", None)
    settings = None if images is None else images.to_dict()
    templates = [getattr(part, "chat_template", None) for part in (processor, tokenizer)]
    words = json.loads(tokenizer.backend_tokenizer.to_str())
    words.update(padding=None, truncation=None)  # how it was called last
    parts = [words, templates, settings, type(processor).__name__]
    return hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
