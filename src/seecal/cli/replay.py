"""``seecal replay``: the options, nothing else. What runs the step is loaded when it does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import verbosity


def replay(
    folder: Annotated[Path, typer.Argument(help="The folder that the error names: output_dir/bad_steps/STEP.")],
    model: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of a model to run it on as it is, instead of the weights of the step."),
    ] = None,
) -> None:
    """Run a step that was stopped for bad numbers again, alone. Exit code 1 if they are bad again, 0 if finite."""
    from ..trainer.replay import replay as run

    verbosity.quiet()
    found = run(folder, model)
    print("\n".join(found.lines()))
    raise typer.Exit(0 if found.finite else 1)
