"""``seecal build-start``: the options, nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import verbosity


def build_start(
    family: Annotated[str, typer.Argument(help="llava, llava_next (tiles), mgm or mgm_hd (Mini-Gemini).")],
    language_model: Annotated[str, typer.Argument(help="Folder or hub id of a causal language model.")],
    vision_tower: Annotated[str, typer.Argument(help="Folder or hub id of a vision tower: CLIP, SigLIP, …")],
    out: Annotated[Path, typer.Argument(help="Folder to write: a transformers model with its processor.")],
    aux_tower: Annotated[
        str | None, typer.Option(help="mgm: folder or hub id of its ConvNeXt.", show_default=False)
    ] = None,
    images: Annotated[str, typer.Option(help="pad (the whole image on a square) or square (its middle).")] = "pad",
    template: Annotated[
        str | None,
        typer.Option(
            help="vicuna_v1, gemma, own (the language model's), or a file; else own, or vicuna_v1 where it has none.",
            show_default=False,
        ),
    ] = None,
    vision_feature_layer: Annotated[int, typer.Option(help="The tower's layer that the projector reads.")] = -2,
    seed: Annotated[int, typer.Option(help="Of the projector's first numbers.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, …; auto: as the language model was saved.")] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Of one file of weights.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="A model that lies in OUT may go.")] = False,
) -> None:
    """Put a model to train together: a language model and a vision tower, joined by a new projector."""
    verbosity.quiet()
    from ..models.build_start import build_start as run

    folder = run(
        family,
        language_model,
        vision_tower,
        out,
        aux_tower=aux_tower,
        images=images,
        template=template,
        vision_feature_layer=vision_feature_layer,
        seed=seed,
        dtype=dtype,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
    )
    print(f"{folder}: a {family} to train, its projector untrained")
