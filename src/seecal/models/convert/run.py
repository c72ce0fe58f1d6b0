"""``seecal.convert``: a checkpoint of the original LLaVA or CAL code as a transformers model, and back."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import assembly
from ..chat_templates import chat_template_for
from ..new_folder import new_folder
from . import configs, names
from .folders import VOCABULARY_FILES, folder_of, original_tokenizer, read_source
from .tensors import Lazy, weights_of, write_weights

PROJECTOR_FILE = "mm_projector.bin"


@dataclass
class Converted:
    """What :func:`convert` wrote.

    Attributes:
        folder: where.
        model: its model_type there.
        tensors: how many.
        notes: what was left out, taken from elsewhere, or made up; a line each.
    """

    folder: Path
    model: str
    tensors: int
    notes: list[str] = field(default_factory=list)


def convert(
    source: str | Path,
    out: str | Path,
    *,
    to: str = "transformers",
    language_model: str | None = None,
    vision_tower: str | None = None,
    images: str | None = None,
    template: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> Converted:
    """Convert a checkpoint between the original LLaVA code's layout (also LLaVA-NeXT's and CAL's) and transformers'.

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
    if to not in ("transformers", "original", "projector"):
        raise ValueError(f"to: {to}: known are transformers, original, projector")
    if images is not None and images not in configs.IMAGES:
        raise ValueError(f"images: {images}: known are {', '.join(configs.IMAGES)}")
    if not source.exists():
        raise ValueError(f"{source}: no such folder. Give a checkpoint's folder, or its mm_projector.bin.")
    with new_folder(out, overwrite=overwrite, sources=(source, language_model, vision_tower)) as part:
        if to == "transformers":
            made = _Import(source, language_model, vision_tower, images, template).write(part, max_shard_size)
        else:
            export = _Export(source, language_model, vision_tower, images)
            made = export.write(part, max_shard_size) if to == "original" else export.write_projector(part)
    made.folder = Path(out)
    return made


class _Import:
    """Original → transformers."""

    def __init__(
        self,
        source: Path,
        language_model: str | None,
        vision_tower: str | None,
        images: str | None,
        template: str | None,
    ) -> None:
        self.notes: list[str] = []
        self.source, self.template = source, template
        self.found = read_source(source, language_model)
        self.original = self.found.config
        if images is not None:
            merge = "spatial_unpad" if images == "anyres" else "flat"
            self.original = {**self.original, "image_aspect_ratio": images, "mm_patch_merge_type": merge}
        configs.check_original(self.original, source)
        self.tower = folder_of(vision_tower) if vision_tower else None

    def write(self, part: Path, max_shard_size: str) -> Converted:
        state, computed = names.original_to_hub(self.found.state, self.source)
        if computed:
            self.notes.append(f"{len(computed)} computed buffers left out ({computed[0]})")
        if names.EMBEDDINGS not in state:
            raise ValueError(
                f"{self.source}: lacks model.embed_tokens.weight, so it is no whole checkpoint. Copy it again, or give its "
                "mm_projector.bin and language_model."
            )
        before = state[names.EMBEDDINGS].shape[0]
        tokenizer = assembly.tokenizer_of(str(self.found.tokenizer))
        assembly.add_tokens(tokenizer)
        rows = assembly.padded_rows(before, len(tokenizer))
        vision = configs.vision_config_of(None if self.tower is None else str(self.tower), self.original, self.source)
        config = configs.to_transformers(
            {**self.original, "vocab_size": before},
            vision,
            rows=rows,
            image_token=tokenizer.convert_tokens_to_ids(assembly.PLACEHOLDER),
            pad_token=tokenizer.pad_token_id,
        )
        self._add_tower(state)
        self._settle_newline(state, config)
        for name in (names.EMBEDDINGS, names.HEAD):
            if name in state and rows != before:
                shape = (rows, *state[name].shape[1:])
                state[name] = state[name].then(lambda matrix: assembly.pad_rows(matrix, rows), shape)
        names.check_complete(state, config, self.source)
        if config.dtype is None:
            config.dtype = state[names.EMBEDDINGS].dtype
        self._save_beside(part, config, tokenizer)
        write_weights(state, part, max_shard_size)
        return Converted(part, config.model_type, len(state), self.notes)

    def _add_tower(self, state: dict[str, Lazy]) -> None:
        if any(name.startswith(names.TOWER) for name in state):
            self.notes.append("vision tower: the checkpoint's own")
            return
        named = str(self.original.get("mm_vision_tower"))
        folder = self.tower or (Path(named) if Path(named).is_dir() else None)
        if folder is None:
            raise ValueError(
                f"{self.source}: no vision tower in it; it was not trained, and is {named}. Give its folder or hub id: "
                "vision_tower (--vision-tower)."
            )
        state |= names.tower_to_hub(
            {name: one for name, one in weights_of(folder).items() if not name.startswith(_CLIPS_OTHER_HALF)}
        )
        self.notes.append(f"vision tower: from {folder}")

    def _settle_newline(self, state: dict[str, Lazy], config: Any) -> None:
        """LLaVA-NeXT has an image_newline and LLaVA-1.5 none, whatever the files hold."""
        anyres = config.model_type == "llava_next"
        if not anyres and names.NEWLINE in state:
            del state[names.NEWLINE]
            self.notes.append("image_newline left out: without tiles nothing reads it")
        elif anyres and names.NEWLINE not in state and self.found.projector_only:
            width = config.text_config.hidden_size
            state[names.NEWLINE] = Lazy.of(assembly.random_newline(width, state[names.EMBEDDINGS].dtype))
            self.notes.append("image_newline: random (seed 0), since a projector's file has none")

    def _save_beside(self, part: Path, config: Any, tokenizer: Any) -> None:
        from transformers import GenerationConfig

        vision = config.vision_config
        strategy = config.vision_feature_select_strategy
        processor = assembly.llava_processor(
            tokenizer,
            side=vision.image_size,
            patch=vision.patch_size,
            images=configs.images_of(self.original),
            template=chat_template_for(tokenizer, self.template),
            strategy=strategy,
            grid=getattr(config, "image_grid_pinpoints", None),
        )
        processor.save_pretrained(part)
        config.architectures = [_CLASSES[config.model_type]]
        config.save_pretrained(part)
        text = config.text_config
        GenerationConfig(
            bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=tokenizer.pad_token_id
        ).save_pretrained(part)
        for name in VOCABULARY_FILES:  # the original code's tokenizer is made from it: the way back copies it
            if (self.found.tokenizer / name).is_file() and not (part / name).exists():
                shutil.copyfile(self.found.tokenizer / name, part / name)


_CLASSES = {"llava": "LlavaForConditionalGeneration", "llava_next": "LlavaNextForConditionalGeneration"}
_CLIPS_OTHER_HALF = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias")


class _Export:
    """transformers → original."""

    def __init__(self, source: Path, language_model: str | None, vision_tower: str | None, images: str | None) -> None:
        from transformers import AutoConfig

        self.source, self.tower = source, vision_tower
        self.language_model = None if language_model is None else folder_of(language_model)
        if not source.is_dir():
            raise ValueError(f"{source}: this is a file. Give the folder of a transformers model.")
        raw = configs.read_json(source / "config.json")
        if raw.get("model_type") not in _CLASSES or "vision_config" not in raw:
            raise ValueError(
                f"{source}: a {raw.get('model_type')} model; to the original layout go transformers models of "
                f"{' and '.join(_CLASSES)}."
            )
        self.config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        self.state = names.transformers_to_hub(weights_of(source))
        names.check_complete(self.state, self.config, source)
        self.images = images or self._images()
        if (self.images == "anyres") != (self.config.model_type == "llava_next"):
            raise ValueError(f"images: {self.images}: a {self.config.model_type} model has {self._images()}")

    def write(self, part: Path, max_shard_size: str) -> Converted:
        rows, before = self._original_rows()
        state = dict(self.state)
        if names.HEAD not in state:
            state[names.HEAD] = state[names.EMBEDDINGS]  # tied
        for name in (names.EMBEDDINGS, names.HEAD):
            if rows != before:
                shape = (rows, *state[name].shape[1:])
                state[name] = state[name].then(lambda matrix: matrix[:rows], shape)
        notes = original_tokenizer(self.language_model or self.source, part, rows, self.language_model is None)
        try:
            limit = int(configs.read_json(self.source / "tokenizer_config.json").get("model_max_length") or 0)
        except (ValueError, OverflowError):
            limit = 0
        if not 0 < limit <= 1_000_000:  # none is written as a very large number
            limit = int(self.config.text_config.max_position_embeddings)
        try:
            original = configs.to_original(
                self.config, rows=rows, images=self.images, tower=self.tower, max_length=limit
            )
        except ValueError as error:
            raise ValueError(f"{self.source}: {error}") from None
        (part / "config.json").write_text(json.dumps(original, indent=2) + "\n", "utf8")
        state = names.hub_to_original(state, self.source)
        write_weights(state, part, max_shard_size)
        if rows != before:
            notes.append(f"vocabulary: {rows} of {before} rows; the others stand for tokens the original has not")
        notes.append("vision tower: in it, and unfreeze_mm_vision_tower: true, without which LLaVA would not read it")
        return Converted(part, original["model_type"], len(state), notes)

    def write_projector(self, part: Path) -> Converted:
        """``mm_projector.bin``, as the original code's first stage leaves it and its second reads it."""
        state = {name: one for name, one in self.state.items() if name.startswith(names.PROJECTOR)}
        tensors = {name: one.read().clone() for name, one in names.hub_to_original(state, self.source).items()}
        torch.save(tensors, part / PROJECTOR_FILE)
        return Converted(part, self.config.model_type, len(tensors), ["only the projector: no other tensor is in it"])

    def _images(self) -> str:
        if self.config.model_type == "llava_next":
            return "anyres"
        for name in ("processor_config.json", "preprocessor_config.json"):
            if (self.source / name).is_file():
                found = configs.read_json(self.source / name)
                return "pad" if found.get("image_processor", found).get("do_pad") else "square"
        raise ValueError(
            f"{self.source}: no processor here, which would say whether images are padded. Set images: square or pad."
        )

    def _original_rows(self) -> tuple[int, int]:
        """(rows of the vocabulary in the original, in the source)."""
        before = self.state[names.EMBEDDINGS].shape[0]
        kept = (getattr(self.config, configs.KEPT, None) or {}).get("vocab_size")
        if kept is not None:
            return min(int(kept), before), before
        tokenizer = assembly.tokenizer_of(str(self.source))
        added = [tokenizer.convert_tokens_to_ids(one) for one in (assembly.PLACEHOLDER, assembly.PAD)]
        return min(one for one in (*added, before) if one), before
