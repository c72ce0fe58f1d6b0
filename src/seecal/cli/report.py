"""``seecal report``: the options, nothing else. What draws is loaded when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import verbosity
from . import alignment as options


def report(
    scores: Annotated[Path | None, typer.Argument(help="Folder that seecal score wrote.")] = None,
    against: Annotated[Path | None, typer.Argument(help="Scores of another model on the same data.")] = None,
    out: Annotated[Path | None, typer.Option(help="The page; else report.html, or alignment.html.")] = None,
    budget_mb: Annotated[float, typer.Option(min=0, help="Megabytes of images in the page.")] = 8.0,
    alignment: options.Alignment = False,
    model: options.Model = None,
    data: Annotated[
        str | None, typer.Option(help="The data, if it was moved; for --alignment: what to look at.")
    ] = None,
    ids: options.Ids = None,
    other: options.Other = None,
    layer: options.Layer = None,
    max_tokens: options.MaxTokens = 64,
    image_root: Annotated[
        Path | None, typer.Option(help="Folder that image paths start from; else the data's.")
    ] = None,
    format: options.Format = None,
) -> None:
    """Draw one page to look at: the scores of a data set beside its images, or with --alignment what answers look at."""
    if alignment:
        options.alignment(
            model, data, ids, out, other=other, layer=layer, max_tokens=max_tokens, image_root=image_root, format=format
        )
        return
    given = {"--model": model, "--ids": ids, "--other": other, "--layer": layer, "--format": format}
    if wrong := [name for name, value in given.items() if value is not None]:
        raise ValueError(f"{wrong[0]} is for --alignment. A second model's scores are a second folder.")
    if scores is None:
        raise ValueError("report: name a folder that seecal score wrote, or set --alignment")
    from rich.console import Console

    from ..pages.report import report as run

    verbosity.quiet()
    made = run(
        scores, against, out=out or Path("report.html"), data=data, image_root=image_root, budget_mb=budget_mb,
        console=Console(stderr=True),
    )  # fmt: skip
    verbosity.say(made.sentence())
