"""``seecal preview``: the options, nothing else. What looks and draws is loaded when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import verbosity


def preview(
    context: typer.Context,
    config: Annotated[str, typer.Argument(help="A recipe's file, or the name of one of ours, as for seecal train.")],
    records: Annotated[int, typer.Option("--records", "-n", min=0, help="How many records to show.")] = 4,
    model: Annotated[
        str | None, typer.Option(help="Put in place of the recipe's model, and loaded, for Δ and weights.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="A page to write too: one file with everything in it.")] = None,
    stage: Annotated[int | None, typer.Option(help="Which stage, from 1; else the last.")] = None,
    check: Annotated[int, typer.Option(min=1, help="How many rows of the data to check; Ctrl-C ends it early.")] = 1000,
) -> None:
    """Before training: the first records of a recipe as the model will see them, and which others cannot be used.

    After CONFIG every key of the recipe can be set as for seecal train: --max_length 512, --stages.2.train_on last.
    """
    from rich.console import Console

    from ..pages.preview_text import show
    from ..recipes.preview import preview as run

    verbosity.quiet()
    found = run(
        config,
        records=records,
        model=model,
        html=html,
        stage=stage,
        check=check,
        overrides=context.args,
        console=Console(stderr=True),
    )
    show(found, Console(highlight=False))
    if html is not None:
        print(f"{html}: the same as a page")
    if found.stopped:
        raise typer.Exit(130)
