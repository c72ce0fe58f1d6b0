"""The page that ``seecal demo`` ends with: held-out drawings beside their true descriptions, before CAL and after it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..core.options import CALOptions
from . import emoji, files

DRAWINGS = 24  # of each split


def write_described(path: Path, items: Sequence[emoji.Emoji], images: Mapping[str, Path]) -> None:
    """``held_out.json``: the same drawings and descriptions whatever was trained."""
    asked = {}
    for split in files.HELD_OUT:
        for item in files.held_out(items, split, DRAWINGS):
            asked[f"{split}/{item.hexcode}"] = item, emoji.described(item)
    files.write_records(path, {name: (images[item.hexcode], answer) for name, (item, answer) in asked.items()})


def held_out_page(out: Path, models: Mapping[str, Path], precision: Any, console: Console) -> Path:
    """Scores ``out/held_out.json`` into ``out/scores/NAME`` with each model and draws the first two in ``out/report.html``.

    Args:
        models: name -> folder.
        precision: makes the context in which they run.
        console: for the progress.

    Raises:
        ImportError: what draws the page is not installed.
    """
    from ..pages.charts import require_altair
    from ..pages.report import report
    from ..scoring.run import score

    require_altair()
    folders = []
    for name, model in models.items():
        folder = out / "scores" / name
        shutil.rmtree(folder, ignore_errors=True)  # of another training
        with precision():
            score(str(model), str(out / "held_out.json"), folder, options=CALOptions(), batch_size=12, console=console)
        folders.append(folder)
    return report(*folders[:2], out=out / "report.html", console=console).path
