"""``seecal.convert``: a checkpoint of the original LLaVA, CAL or Mini-Gemini code as a transformers model, and back."""

from __future__ import annotations

from pathlib import Path

from ..new_folder import new_folder
from . import configs, llava, mgm
from .folders import Converted, read_source

_TO = ("transformers", "original", "projector")
_OF_TRANSFORMERS: dict[str, type[llava.Export | mgm.Export]] = {
    "llava": llava.Export,
    "llava_next": llava.Export,
    "mgm": mgm.Export,
}


def convert(
    source: str | Path,
    out: str | Path,
    *,
    to: str = "transformers",
    language_model: str | None = None,
    vision_tower: str | None = None,
    aux_tower: str | None = None,
    images: str | None = None,
    template: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> Converted:
    """Convert a checkpoint between the layout of the original code (LLaVA, LLaVA-NeXT, CAL, MGM) and transformers'.

    Every tensor of the source is in the result, or the error names it. A trained vision tower stays in both directions.

    Args:
        source: the folder of a checkpoint (.bin or safetensors, in shards or not); for ``to="transformers"`` also the
            projector of a first stage: ``mm_projector.bin`` or its folder; or LLaVA's LoRA folder.
        out: the folder to write.
        to: "transformers", "original", or "projector": a transformers model's projector as ``mm_projector.bin``.
        language_model: folder or hub id, where the source has none of its own (projector, LoRA). For ``to="original"``:
            whose tokenizer the result gets; without it the source's own, its added tokens taken out.
        vision_tower: CLIP's folder or hub id, where the source has no tower, or its config.json names one that is not
            known here. For ``to="original"``: what ``mm_vision_tower`` says.
        aux_tower: Mini-Gemini's ConvNeXt, where the source has none: a folder of OpenCLIP's, timm's or transformers' files.
        images: "square", "pad" or "anyres", in place of the source's image_aspect_ratio.
        template: chat template of the processor, as for :func:`seecal.build_start`.
        max_shard_size: of one file of weights.
        overwrite: whether a model that lies in ``out`` may go.

    Returns:
        What was written, with notes on everything that was not simply renamed.

    Raises:
        ValueError: a tensor that is missing, unknown or of another shape, a pickle that is more than tensors, a config
            that the other side cannot compute, or files in ``out``.
    """
    source = Path(source)
    if to not in _TO:
        raise ValueError(f"to: {to}: known are {', '.join(_TO)}")
    if images is not None and images not in configs.IMAGES:
        raise ValueError(f"images: {images}: known are {', '.join(configs.IMAGES)}")
    if not source.exists():
        raise ValueError(f"{source}: no such folder. Give a checkpoint's folder, or its mm_projector.bin.")
    with new_folder(out, overwrite=overwrite, sources=(source, language_model, vision_tower, aux_tower)) as part:
        if to == "transformers":
            made = _imported(source, language_model, vision_tower, aux_tower, images, template).write(
                part, max_shard_size
            )
        else:
            export = _exported(source, language_model, vision_tower, images)
            made = export.write(part, max_shard_size) if to == "original" else export.write_projector(part)
    made.folder = Path(out)
    return made


def _imported(
    source: Path,
    language_model: str | None,
    vision_tower: str | None,
    aux_tower: str | None,
    images: str | None,
    template: str | None,
) -> llava.Import | mgm.Import:
    found = read_source(source, language_model)
    if found.config.get("model_type") in mgm.ORIGINALS:
        return mgm.Import(source, found, vision_tower, aux_tower, images, template)
    if aux_tower is not None:
        raise ValueError(f"aux_tower: {source} is no Mini-Gemini, which alone has a second tower. Leave it out.")
    return llava.Import(source, found, vision_tower, images, template)


def _exported(
    source: Path, language_model: str | None, vision_tower: str | None, images: str | None
) -> llava.Export | mgm.Export:
    if not source.is_dir():
        raise ValueError(f"{source}: this is a file. Give the folder of a transformers model.")
    raw = configs.read_json(source / "config.json")
    kind = _OF_TRANSFORMERS.get(str(raw.get("model_type")))
    if kind is None or "text_config" not in raw:
        raise ValueError(
            f"{source}: a {raw.get('model_type')} model; to the original layout go transformers models of "
            f"{', '.join(_OF_TRANSFORMERS)}."
        )
    return kind(source, language_model, vision_tower, images)
