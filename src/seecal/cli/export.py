"""``seecal merge`` and ``seecal export``: the options, nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import verbosity

_Base = Annotated[
    str | None,
    typer.Option(help="Of an adapter: its model's folder or hub id; else what it names.", show_default=False),
]
_Dtype = Annotated[str, typer.Option(help="float32, bfloat16, …; auto: as it was saved.")]
_Shard = Annotated[str, typer.Option(help="Of one file of weights.")]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="A model that lies in OUT may go.")]


def merge(
    adapter: Annotated[Path, typer.Argument(help="Folder of an adapter.")],
    out: Annotated[Path, typer.Argument(help="Folder to write: the whole model with the adapter in it.")],
    base: _Base = None,
    dtype: _Dtype = "auto",
    max_shard_size: _Shard = "5GB",
    overwrite: _Overwrite = False,
) -> None:
    """Put an adapter into its model's weights, and check that it computes the same."""
    verbosity.quiet()
    from ..models.export import merge as run

    saved = run(adapter, out, base=base, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite)
    print(f"{saved.folder}: {saved.tensors} tensors; merging moved the logits by {saved.moved:.1e} of the largest")


def export(
    source: Annotated[Path, typer.Argument(help="Folder of a run, of a model, or of an adapter.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    base: _Base = None,
    name: Annotated[
        str | None, typer.Option(help="Of the model, in README.md; else OUT's.", show_default=False)
    ] = None,
    dtype: _Dtype = "auto",
    max_shard_size: _Shard = "5GB",
    overwrite: _Overwrite = False,
) -> None:
    """Write a trained model to publish or serve: safetensors, processor and model card, loaded again and checked."""
    verbosity.quiet()
    from ..recipes.export import export as run

    saved = run(source, out, base=base, name=name, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite)
    print(
        f"{saved.folder}: {saved.tensors} tensors, {saved.parameters:,} parameters; loaded again, the logits are equal"
    )
