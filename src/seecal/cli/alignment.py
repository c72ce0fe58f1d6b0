"""``seecal report --alignment``: the options, nothing else. torch is loaded when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import verbosity

Alignment = Annotated[
    bool, typer.Option("--alignment", help="What answers look at and what patches say, with --model, --data and --ids.")
]
Model = Annotated[str | None, typer.Option(help="For --alignment: folder of a vision-language model, or its hub id.")]
Other = Annotated[str | None, typer.Option("--other", "--model2", help="For --alignment: a second model beside it.")]
Data = Annotated[str | None, typer.Option(help="For --alignment: a file or folder that seecal train reads.")]
Ids = Annotated[str | None, typer.Option(help="For --alignment: ids of the records, with commas between.")]
Layer = Annotated[
    int | None, typer.Option(help="For --alignment: decoder layer from 0, negative from the end; else the middle one.")
]
MaxTokens = Annotated[int, typer.Option(min=1, help="For --alignment: label tokens of a record, its first.")]
ImageRoot = Annotated[Path | None, typer.Option(help="For --alignment: folder that image paths start from.")]
Format = Annotated[str | None, typer.Option(help="For --alignment: format of the data, where its keys do not tell.")]


def alignment(
    model: str | None,
    data: str | None,
    ids: str | None,
    out: Path | None,
    *,
    other: str | None = None,
    layer: int | None = None,
    max_tokens: int = 64,
    image_root: Path | None = None,
    format: str | None = None,
) -> None:
    """Draw attention and nearest words of chosen records; what the command report does with --alignment."""
    for name, value in (("--model", model), ("--data", data), ("--ids", ids)):
        if not value:
            raise ValueError(f"--alignment needs {name}, as in: --alignment --model M --data D --ids a,b")
    from rich.console import Console

    from ..pages.alignment import alignment as run

    verbosity.quiet()
    assert ids is not None
    names = [name.strip() for name in ids.split(",") if name.strip()]
    report = run(
        model,
        data,
        names,
        other=other,
        out=out or Path("alignment.html"),
        layer=layer,
        max_tokens=max_tokens,
        image_root=image_root,
        format=format,
        console=Console(stderr=True),
    )
    verbosity.say(report.sentence())
