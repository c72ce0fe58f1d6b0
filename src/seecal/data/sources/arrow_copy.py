"""Arrow files of what was read: written once on each machine, whatever the number of its ranks, and mapped by all.

The ranks need not talk to each other, and so cannot wait for each other in vain: the one that comes first holds a lock
while it writes, and a lock goes with its process. The others then find the file's name and take a hard link of it. So
it also works inside ``with PartialState().local_main_process_first()`` and where only some ranks read.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import gc
import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
from filelock import FileLock

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Rows, and bytes of images in them, that are written at once
_WRITE = 1000
_WRITE_BYTES = 1 << 26
# Where launchers tell how many processes run on this machine, or in all
_LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_OF_A_LAUNCH = ("MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID", "SLURM_STEP_ID")

# Folders of this process. Their files are mapped, not read, and removed when Python ends.
_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []
# How often this process has asked for each key: the n-th time belongs to the n-th of the other ranks
_ASKED: Counter[str] = Counter()


def write_arrow(name: str, schema: pyarrow.Schema, rows: Iterable[dict[str, Any]], advice: str) -> Path:
    """The rows in an Arrow stream of their own, gone when this process ends.

    Args:
        name: of the file, "records" or "weights".
        advice: what to set where the temporary folder has no room, after "Set TMPDIR to a folder with room".

    Raises:
        ValueError: no room.
    """
    folder = tempfile.TemporaryDirectory(prefix=f"seecal-{name}-")
    path = Path(folder.name) / f"{name}.arrow"
    try:
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
            for batch in _without_collecting(_batches(rows)):
                writer.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema=schema))
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise ValueError(
            f"the {name} cannot be written to {folder.name} ({os.strerror(error.errno)}). Set TMPDIR to a folder with "
            f"room{advice}."
        ) from None
    _FOLDERS.append(folder)
    return path


def _without_collecting(batches: Iterator[Any]) -> Iterator[Any]:
    """The batches; the search for cycles waits while one is made. Rows are many small objects without any, which it looks
    through again and again: a tenth of the time and more."""
    while True:
        was = gc.isenabled()
        gc.disable()
        try:
            batch = next(batches, None)
        finally:
            if was:
                gc.enable()
        if batch is None:
            return
        yield batch


def _batches(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += sum(len(image["bytes"] or b"") for image in row.get("images", ()))
        if len(batch) == _WRITE or size >= _WRITE_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def once_per_machine(key: Callable[[], Any], write: Callable[[], tuple[Path, Any]]) -> tuple[Path, Any]:
    """What ``write`` returns, (a file, facts about it); called by one rank of those that ask with the same key.

    Args:
        key: gives what the file is made of, as JSON; None where that cannot be told, and each process then writes its own.
        write: the file must last as long as this process; the facts must be JSON.

    Raises:
        what ``write`` raises, in each rank: where one fails the next tries.
    """
    place = _meeting_place()
    made_of = None if place is None else key()
    if place is None or made_of is None:
        return write()
    digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]
    note = place / f"{digest}-{_ASKED[digest]}.json"
    _ASKED[digest] += 1
    atexit.register(_leave, note)
    with FileLock(note.with_suffix(".lock")):
        found = _linked(note)
        if found is not None:
            return found
        path, facts = write()
        aside = note.with_suffix(".new")
        aside.write_text(json.dumps({"pid": os.getpid(), "path": str(path), "facts": facts}))
        aside.replace(note)
        atexit.register(note.unlink, missing_ok=True)
    return path, facts


def _linked(note: Path) -> tuple[Path, Any] | None:
    """The file that another rank wrote, under a name of our own; None if there is none or it cannot be linked."""
    try:
        told = json.loads(note.read_text())
        os.kill(told["pid"], 0)  # what a process that is gone has left may be of another launch
        folder = tempfile.TemporaryDirectory(prefix="seecal-linked-")
        path = Path(folder.name) / Path(told["path"]).name
        path.hardlink_to(told["path"])
    except (OSError, NotImplementedError):  # the latter where the system has no hard links
        return None
    _FOLDERS.append(folder)
    return path, told["facts"]


def _meeting_place() -> Path | None:
    """The folder that the ranks of this launch on this machine have in common; None for a process alone."""
    if (_first(_LOCAL_SIZES) or _first(_SIZES)) in (None, "", "0", "1") or not hasattr(os, "getuid"):
        return None
    launch = [os.getuid(), os.getppid(), os.uname().nodename, *(os.environ.get(name, "") for name in _OF_A_LAUNCH)]
    name = hashlib.sha256(repr(launch).encode()).hexdigest()[:16]
    place = Path(tempfile.gettempdir()) / f"seecal-launch-{name}"
    try:
        place.mkdir(mode=0o700, exist_ok=True)
        status = place.lstat()
    except OSError:
        return None
    # Its name can be guessed: only a folder that nobody else can write to will do
    return place if status.st_uid == os.getuid() and status.st_mode & 0o777 == 0o700 and place.is_dir() else None


def _first(names: Iterable[str]) -> str | None:
    return next((os.environ[name] for name in names if name in os.environ), None)


def _leave(note: Path) -> None:
    """The last one out takes lock and folder with it. Who waits for that lock just then writes a file of its own."""
    note.with_suffix(".lock").unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # another rank has notes of its own there
        note.parent.rmdir()
