"""``seecal check-data``: the options, nothing else. What looks is loaded when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import verbosity


def check_data(
    context: typer.Context,
    config: Annotated[str, typer.Argument(help="A recipe's file, or the name of one of ours, as for seecal train.")],
    out: Annotated[Path, typer.Option(help="The list of bad records, for --skip_records.")] = Path("bad-records.jsonl"),
    workers: Annotated[int | None, typer.Option(min=1, help="How many processes; else one for each core.")] = None,
) -> None:
    """Before training: look at every record of a recipe's data, open every image, and list what cannot be used.

    Run again after an interruption it goes on where it was. After CONFIG every key of the recipe can be set as for seecal
    train. Exit code 1 if there are bad records.
    """
    from rich.console import Console

    from ..recipes.check_data import check_data as run

    verbosity.quiet()
    found = run(config, out=out, workers=workers, overrides=context.args, console=Console(stderr=True))
    if found.before:
        print(f"(went on after {found.before:,} records)")
    verbosity.say(str(found))
    raise typer.Exit(1 if found.bad else 0)
