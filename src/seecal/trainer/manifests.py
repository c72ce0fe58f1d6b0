"""What a folder of files should hold: sizes and checksums, written when all else is on the disk."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_THREADS = 4  # hashing lets other threads run, and a checkpoint's large files are few
_BLOCK = 16 << 20  # bytes that are hashed between two signs of progress
# Files, and folders with all that is in them, that a resume or a loaded model reads. Whoever likes to may add others.
_READ = (
    "model*.safetensors*", "pytorch_model*", "adapter_model*", "adapter_config.json", "config.json",
    "generation_config.json", "optimizer*", "scheduler*", "scaler*", "rng_state*", "random_states*", "trainer_state*",
    "*.distcp", ".metadata", "global_step*", "latest", "mp_rank*", "zero_pp_rank*", "bf16_zero*",  # FSDP, DeepSpeed
)  # fmt: skip


def _nothing() -> None:
    pass


def write_manifest(folder: Path, about: Mapping[str, Any], beat: Callable[[], Any] = _nothing) -> None:
    """Bring all files below ``folder`` to the disk, then ``manifest.json`` with the size and SHA-256 of each.

    Where the manifest is, everything that it names is on the disk, whatever happens to the machine.

    Args:
        folder: what is described; a manifest that is there already is replaced.
        about: what else it should say, JSON.
        beat: called whenever some more of a file is read.
    """
    names = _names(folder)
    with ThreadPoolExecutor(_THREADS) as pool:
        found = dict(zip(names, pool.map(lambda name: _synced(folder / name, beat), names), strict=True))
    part = folder / f"{MANIFEST}.part"
    told = {**about, "files": found}
    part.write_text(json.dumps({**told, "sha256": _digest_of(told)}, indent=1), "utf8")
    for last in (part, *{folder / above for name in names for above in Path(name).parents} - {folder}):
        _sync(last)
        beat()
    part.replace(folder / MANIFEST)
    _sync(folder)
    beat()


def check_manifest(folder: Path, beat: Callable[[], Any] = _nothing) -> str | None:
    """What differs between ``folder`` and its manifest, in one line; None if every byte is as it was written.

    A file that somebody has added, a callback's notes say, is a difference where loading reads files of its name or folder;
    the others are said. ``beat``: called whenever some more of a file is read.
    """
    try:
        told = json.loads((folder / MANIFEST).read_text("utf8"))
        own = told.pop("sha256")
        expected = {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in told["files"].items()}
    except FileNotFoundError:
        return f"{MANIFEST}, which is written last, is not there"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError):
        return f"{MANIFEST} cannot be read"
    if own != _digest_of(told):
        return f"{MANIFEST} is not as it was written"
    if links := sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink()):
        return f"{', '.join(links)} is a link, and what it leads to can change"
    present = {*_names(folder)}
    if missing := sorted(expected.keys() - present):
        return f"{', '.join(missing)} is not there"
    extra = sorted(present - expected.keys())
    if read := [name for name in extra if _is_read(name)]:
        return f"{', '.join(read)} was not written with it"
    if extra:
        logger.warning("%s: %s was added later; nothing reads it", folder, ", ".join(extra))
    for name, (size, _) in expected.items():
        if (now := (folder / name).stat().st_size) != size:
            return f"{name} has {now} bytes and had {size}"
    with ThreadPoolExecutor(_THREADS) as pool:
        for name, digest in zip(expected, pool.map(lambda name: _digest(folder / name, beat), expected), strict=True):
            if digest != expected[name][1]:
                return f"{name} has other bytes than were written"
    return None


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum((folder / name).stat().st_size for name in _names(folder))


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk: a rename in it is then final."""
    _sync(folder)


def _names(folder: Path) -> list[str]:
    """All files below the folder, as paths from it. The manifest itself is not among them."""
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in files if name not in (MANIFEST, f"{MANIFEST}.part"))


def _is_read(name: str) -> bool:
    return any(fnmatch.fnmatchcase(part.lower(), pattern) for part in PurePosixPath(name).parts for pattern in _READ)


def _synced(path: Path, beat: Callable[[], Any]) -> dict[str, Any]:
    _sync(path)
    beat()
    return {"size": path.stat().st_size, "sha256": _digest(path, beat)}


def _digest_of(told: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _digest(path: Path, beat: Callable[[], Any]) -> str:
    digest, block = hashlib.sha256(), bytearray(min(_BLOCK, max(path.stat().st_size, 1)))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(memoryview(block)[:count])
            beat()
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
