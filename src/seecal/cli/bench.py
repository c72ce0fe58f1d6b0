"""``seecal bench NAME``: runs one of the scripts under benchmarks/ of the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[3] / "benchmarks"
_PARTS = {"common", "shapes", "targets", "variants"}  # what the scripts share


def names() -> list[str]:
    """The benchmarks there are; empty where seecal was installed without its checkout."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in _PARTS)


def run(name: str, arguments: list[str]) -> int:
    """Becomes the benchmark's process, so that a signal reaches it; where a process cannot (Windows), starts it and
    returns its exit code. ValueError for a name that is none."""
    known = names()
    if not known:
        raise ValueError(
            "the benchmarks are scripts of the source checkout (benchmarks/), which a wheel does not hold: clone the "
            "repository and install it from there, with pip install --editable ."
        )
    if name not in known:
        raise ValueError(f"there is no benchmark {name!r}; there are {', '.join(known)}")
    command = [sys.executable, str(FOLDER / f"{name}.py"), *arguments]
    if os.name == "posix":
        sys.stdout.flush()
        os.execv(sys.executable, command)
    return subprocess.run(command, check=False).returncode
