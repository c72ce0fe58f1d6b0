"""``seecal.export``: a trained model as a folder to publish or to serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..models.export import Saved, loaded, merged, save_checked
from ..models.loading import is_adapter
from ..models.new_folder import new_folder
from .model_card import model_card


def export(
    source: str | Path,
    out: str | Path,
    *,
    base: str | None = None,
    name: str | None = None,
    dtype: Any = "auto",
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> Saved:
    """Write a model as vLLM, SGLang and transformers load it: sharded safetensors, processor, template, README.md.

    Tensors get the names of published checkpoints where seecal knows the family (LLaVA, LLaVA-NeXT), else those of
    transformers' own saving. An adapter is merged. What was written is loaded again and must give the same tensors,
    processor and logits, before the folder is there.

    Args:
        source: a run's folder, its final one, a model's, or an adapter's.
        out: the folder to write.
        base: of an adapter: folder or hub id of its model; None: what its adapter_config.json names.
        name: of the model in its README.md; None: the folder's.
        dtype: of the weights, as "bfloat16"; "auto": as they were saved.
        max_shard_size: of one file of weights.
        overwrite: whether a model that lies in ``out`` may go.

    Returns:
        The folder, how many tensors and parameters it has, and by how much a merge moved the logits.

    Raises:
        ValueError: no model there, a check that failed, or files in ``out``.
    """
    from transformers import AutoConfig

    source, out = Path(source), Path(out)
    folder = source / "final" if (source / "final").is_dir() else source
    adapter = is_adapter(folder)
    with new_folder(out, overwrite=overwrite, sources=(source, folder, base)) as part:
        saved = save_checked(
            lambda: merged(folder, base, dtype) if adapter else loaded(str(folder), dtype), part, out, max_shard_size
        )
        config = AutoConfig.from_pretrained(part, local_files_only=True, trust_remote_code=False)
        text = model_card(name or out.name, _run_of(source, folder), config, saved.parameters, saved.moved)
        (part / "README.md").write_text(text, "utf8")
    return saved


def _run_of(source: Path, folder: Path) -> Path | None:
    """Where the recipe lies: in the final folder, in the run's, or beside an adapter's."""
    for one in (folder, source, folder.parent):
        if (one / "recipe.yaml").is_file():
            return one
    return None
