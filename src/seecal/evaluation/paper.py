"""The paper's figures (arXiv 2405.17871), to stand beside one's own; kept in ``paper_tables.json``."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any


@cache
def paper_tables() -> dict[str, Any]:
    """What the file holds: ``source``, ``benchmarks`` (name → what it is and its metric here) and ``figures`` (system →
    benchmark → ``baseline`` and ``cal``)."""
    return json.loads((files(__package__) / "paper_tables.json").read_text("utf8"))


def paper_rows(benchmark: str) -> list[tuple[str, str, str]]:
    """(system, baseline, with CAL) of each system that the paper measured on a benchmark.

    Raises:
        ValueError: a benchmark that the tables do not have, naming those they have.
    """
    tables = paper_tables()
    if benchmark not in tables["benchmarks"]:
        raise ValueError(f"paper={benchmark!r}: no such benchmark. Known: {', '.join(tables['benchmarks'])}.")
    rows = [(system, of_system.get(benchmark)) for system, of_system in tables["figures"].items()]
    return [(system, _shown(found["baseline"]), _shown(found["cal"])) for system, found in rows if found]


def _shown(figure: float) -> str:
    return f"{figure:g}"
