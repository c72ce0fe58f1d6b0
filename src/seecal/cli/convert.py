"""``seecal convert``: the options, nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import verbosity


def convert(
    source: Annotated[
        Path, typer.Argument(help="Folder of a checkpoint; for --to transformers also a stage 1's mm_projector.bin.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[str, typer.Option(help="transformers, original, or projector (mm_projector.bin).")] = "transformers",
    language_model: Annotated[
        str | None,
        typer.Option(help="Folder or hub id, where SOURCE has none: a projector, LLaVA's LoRA.", show_default=False),
    ] = None,
    vision_tower: Annotated[
        str | None, typer.Option(help="CLIP's folder or hub id, where SOURCE has none.", show_default=False)
    ] = None,
    aux_tower: Annotated[
        str | None, typer.Option(help="Mini-Gemini's ConvNeXt: its folder, where SOURCE has none.", show_default=False)
    ] = None,
    images: Annotated[
        str | None, typer.Option(help="square, pad or anyres, in place of what SOURCE says.", show_default=False)
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="Chat template, as for seecal build-start.", show_default=False)
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Of one file of weights.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="A model that lies in OUT may go.")] = False,
) -> None:
    """Convert a LLaVA, LLaVA-NeXT, CAL or Mini-Gemini checkpoint to transformers, or a transformers model back."""
    verbosity.quiet()
    from ..models.convert.run import convert as run

    made = run(
        source,
        out,
        to=to,
        language_model=language_model,
        vision_tower=vision_tower,
        aux_tower=aux_tower,
        images=images,
        template=template,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
    )
    print(f"{made.folder}: {made.model}, {made.tensors} tensors")
    for note in made.notes:
        print(f"  {note}")
