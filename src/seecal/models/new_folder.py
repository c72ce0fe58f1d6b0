"""A folder that appears when it is whole, and takes the place of no other without being asked."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def new_folder(
    out: str | Path, *, overwrite: bool = False, sources: tuple[str | Path | None, ...] = ()
) -> Iterator[Path]:
    """Yields an empty folder beside ``out``, which takes its place when the block ends without an error.

    Args:
        out: the folder that is wanted.
        overwrite: whether a model that lies there already may go.
        sources: what is read to write it, which must not lie there.

    Raises:
        ValueError: ``out`` is a file, holds something, or one of ``sources`` lies there.
    """
    out = Path(out)
    for source in sources:
        if source is None or not Path(source).exists():
            continue  # a hub id
        read = Path(source).resolve()
        if out.resolve() == read or (out.exists() and out.resolve() in read.parents):
            raise ValueError(f"{out}: {source} is what is read, and lies there. Give another folder to write.")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: this is a file. Give a folder to write.")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise ValueError(
                f"{out}: it holds files already. Give another folder, or say --overwrite (overwrite=True)."
            )
        if not any((out / name).exists() for name in ("config.json", "adapter_config.json")):
            raise ValueError(f"{out}: it holds files, and no model that could be overwritten. Give another folder.")
    part = out.with_name(out.name + ".part")
    try:
        part.mkdir(parents=True)
    except FileExistsError:
        raise ValueError(f"{part}: it is left from a run that was killed, or is written just now. Remove it.") from None
    try:
        yield part
        if out.exists():
            shutil.rmtree(out)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
