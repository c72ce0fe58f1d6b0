"""``seecal.merge``, and a model's folder that is loaded again and computes the same before it is called done."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..families.synthetic_batch import synthetic_batch
from .compared import difference, rounding_of
from .hub_layout import FAMILIES, has_level, hub_name, save_in_hub_layout
from .loading import adapted, is_adapter, load_vlm, merge_in, processor_beside, source_of
from .new_folder import new_folder


@dataclass(frozen=True)
class Saved:
    """A folder that was checked.

    Attributes:
        folder: where it lies.
        tensors: how many it holds.
        parameters: how many numbers those are.
        moved: of a merged adapter: by how much its logits moved, of the largest logit; else None.
    """

    folder: Path
    tensors: int
    parameters: int
    moved: float | None = None


def merge(
    adapter: str | Path,
    out: str | Path,
    *,
    base: str | None = None,
    dtype: Any = "auto",
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> Saved:
    """Write the model that an adapter was trained on with the adapter in its weights, and its processor.

    Before the folder is there, three forwards over a made-up batch are compared: adapter and merged model (within the
    rounding of their precision), merged model and what its folder loads as (equal).

    Args:
        adapter: folder of a PEFT adapter.
        out: the folder to write.
        base: folder or hub id of its model; None: what its adapter_config.json names.
        dtype: to merge in, and of the result; "auto": the base's.
        max_shard_size: of one file of weights.
        overwrite: whether a model that lies in ``out`` may go.

    Raises:
        ValueError: no adapter, one of another model, logits that moved too far, or files in ``out``.
    """
    adapter = Path(adapter)
    if not is_adapter(adapter):
        raise ValueError(
            f"{adapter}: no adapter here (adapter_config.json, and no config.json). Give an adapter's folder."
        )
    with new_folder(out, overwrite=overwrite, sources=(adapter, base)) as part:
        return save_checked(lambda: merged(adapter, base, dtype), part, Path(out), max_shard_size)


def merged(adapter: Path, base: str | None, dtype: Any) -> tuple[Any, Any, float]:
    """(model with the adapter in it, processor, by how much the logits moved). ValueError if that is more than rounding."""
    source = base or source_of(adapter)
    model = adapted(source, adapter, dtype=dtype).eval()
    batch = synthetic_batch(model.base_model.model)
    before = logits_of(model, batch)
    model = merge_in(model)
    moved = difference(before, logits_of(model, batch))
    limit = rounding_of(model.dtype)
    if not moved <= limit:
        raise ValueError(
            f"{adapter}: merged, its logits differ by {moved:.1e} of the largest, more than rounding in {model.dtype} "
            f"({limit:.0e}). Merge in float32 (--dtype float32); if that differs too, it was not trained on {source}."
        )
    return model, processor_beside(adapter, source), moved


def loaded(folder: str, dtype: Any) -> tuple[Any, Any, None]:
    """(model, processor, None) of a whole model."""
    return (*load_vlm(folder, dtype=dtype), None)


def save_checked(
    load: Callable[[], tuple[Any, Any, float | None]], part: Path, out: Path, max_shard_size: str
) -> Saved:
    """Save what ``load`` gives into ``part``, load it from there again, and compare.

    Only one of both models is in memory at a time.

    Args:
        load: gives (model, processor, by how much a merge moved it).
        part: an empty folder.
        out: what it will be called.
        max_shard_size: of one file of weights.

    Raises:
        ValueError: tensors, logits or the processor come back as others than were saved.
    """
    model, processor, moved = load()
    model.eval()
    batch = synthetic_batch(model)
    before, names = logits_of(model, batch), _names_of(model)
    parameters = sum(one.numel() for one in model.parameters())
    save_in_hub_layout(model, part, max_shard_size)
    save_processor(processor, part)
    dtype = model.dtype
    del model
    again, report = _load_again(part, dtype)
    odd = sorted(
        {*report["missing_keys"], *report["unexpected_keys"]} | {str(one) for one in report["mismatched_keys"]}
    )
    if odd:
        raise ValueError(f"{out}: loaded again, {odd[0]} is not as it was saved. Say so, with the model's name.")
    written = names_in(part)
    if names is not None and written != names:
        raise ValueError(f"{out}: written as {sorted(written ^ names)[0]}, which is no name of the published layout.")
    if (apart := difference(before, logits_of(again, batch))) > 1e-6:
        raise ValueError(
            f"{out}: loaded again, its logits differ by {apart:.1e} of the largest. Say so, with the model's name."
        )
    check_processor(processor, part, out)
    return Saved(out, len(written), parameters, moved)


def save_processor(processor: Any, folder: Path) -> None:
    """The processor's files: transformers' own, and the image processor alone, which older versions and servers read."""
    processor.save_pretrained(folder)
    if (images := getattr(processor, "image_processor", None)) is not None:
        images.save_pretrained(folder)


def check_processor(processor: Any, part: Path, out: Path) -> None:
    """ValueError unless the processor in ``part`` is the one that was saved: settings, template, vocabulary."""
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    again = AutoProcessor.from_pretrained(part, local_files_only=True, trust_remote_code=False)
    if type(again) is not type(processor) or _settings(again) != _settings(processor):
        raise ValueError(f"{out}: loaded again, its {type(processor).__name__} has other settings than were saved.")
    if again.chat_template != processor.chat_template:
        raise ValueError(f"{out}: loaded again, it has another chat template than was saved.")
    alone = AutoTokenizer.from_pretrained(part, local_files_only=True, trust_remote_code=False)
    if alone.get_vocab() != processor.tokenizer.get_vocab():
        raise ValueError(f"{out}: loaded again, its tokenizer has another vocabulary than was saved.")
    if getattr(processor, "image_processor", None) is not None:
        images = AutoImageProcessor.from_pretrained(part, local_files_only=True, trust_remote_code=False)
        if _plain(images.to_dict()) != _plain(processor.image_processor.to_dict()):
            raise ValueError(f"{out}: loaded again, its image processor has other settings than were saved.")


def logits_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Logits of the made-up batch, in float32 on the host."""
    device = next(model.parameters()).device
    given = {
        name: one.to(device, model.dtype) if one.is_floating_point() else one.to(device)
        for name, one in batch.items()
        if name != "labels"
    }
    with torch.no_grad():
        return model(**given).logits.float().cpu()


def names_in(folder: Path) -> set[str]:
    """The names of all tensors in a folder's safetensors files."""
    from safetensors import safe_open

    found: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= set(file.keys())
    return found


def _names_of(model: Any) -> set[str] | None:
    """What the published layout calls the model's tensors, where that is known here."""
    if model.config.model_type not in FAMILIES:
        return None
    level = has_level(model.config)
    held, ties = model.state_dict(), getattr(model, "all_tied_weights_keys", None) or {}
    twice = {one for one, other in ties.items() if held[one].data_ptr() == held[other].data_ptr()}
    return {hub_name(name, level) for name in held if name not in twice}


def _load_again(folder: Path, dtype: Any) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoModelForImageTextToText

    made: Any = AutoModelForImageTextToText.from_pretrained(
        folder,
        dtype=dtype,
        output_loading_info=True,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
    )
    model, report = made
    return model.eval(), report


def _settings(processor: Any) -> Any:
    return _plain(processor.to_dict())


def _plain(value: Any) -> Any:
    """As JSON has it: tuples are lists, enums numbers."""
    return json.loads(json.dumps(value, default=str, sort_keys=True))
