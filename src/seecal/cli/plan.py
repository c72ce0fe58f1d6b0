"""``seecal plan``: the options, nothing else. What measures is loaded when it runs."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from .. import verbosity


def plan(
    context: typer.Context,
    config: Annotated[str, typer.Option(help="A recipe's file, or the name of one of ours, as for seecal train.")],
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of all machines together.")] = 8,
    memory: Annotated[float, typer.Option(help="Of one GPU, in GB.")] = 80,
    mfu: Annotated[float, typer.Option(help="Share of the peak that a step reaches. Measure your own.")] = 0.4,
    peak_tflops: Annotated[float, typer.Option(help="Peak of one GPU, TFLOP/s: H100 989, A100 312.")] = 989,
    records: Annotated[
        int | None, typer.Option(min=1, help="In an epoch, where the data are not there.", show_default=False)
    ] = None,
    text_tokens: Annotated[
        int | None, typer.Option(min=1, help="Text of a record, where the data are not there.", show_default=False)
    ] = None,
    image_size: Annotated[
        str | None, typer.Option(help="WIDTHxHEIGHT of images, where the data are not there.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All of it as JSON: bytes, operations, hours.")] = False,
) -> None:
    """What a recipe needs: memory on each GPU, steps, tokens, operations, hours, and how to launch it. No download.

    Other options are settings of the recipe, as for seecal train. Exit code 1 where a stage fits in no way.
    """
    from ..planning.plan import plan as run
    from ..planning.workload import size_named

    verbosity.quiet()
    found = run(
        config,
        gpus=gpus,
        memory=memory,
        mfu=mfu,
        peak_tflops=peak_tflops,
        records=records,
        text_tokens=text_tokens,
        image_size=None if image_size is None else size_named(image_size),
        overrides=context.args,
    )
    print(json.dumps(found.to_dict(), indent=2) if as_json else str(found))
    raise typer.Exit(0 if all(stage.chosen for stage in found.stages) else 1)
