"""A LLaVA, LLaVA-NeXT or CAL checkpoint of the original code as a transformers model, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from .. import assembly
from ..chat_templates import chat_template_for
from ..towers import clip_tensors
from ..weight_files import Lazy, folder_of, weights_of, write_weights
from . import configs, names
from .folders import (
    PROJECTOR_FILE,
    Converted,
    Source,
    copy_vocabulary,
    longest,
    original_tokenizer,
    resized,
    rows_of_original,
)

_CLASSES = {"llava": "LlavaForConditionalGeneration", "llava_next": "LlavaNextForConditionalGeneration"}


class Import:
    """Original → transformers."""

    def __init__(
        self,
        source: Path,
        found: Source,
        vision_tower: str | None,
        images: str | None,
        template: str | None,
    ) -> None:
        self.notes: list[str] = []
        self.source, self.template = source, template
        self.found, self.original = found, found.config
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
        state = resized(state, (names.EMBEDDINGS, names.HEAD), rows)
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
        state |= {f"{names.TOWER}vision_model.{name}": one for name, one in clip_tensors(folder).items()}
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
        copy_vocabulary(self.found.tokenizer, part)


class Export:
    """transformers → original."""

    def __init__(self, source: Path, language_model: str | None, vision_tower: str | None, images: str | None) -> None:
        from transformers import AutoConfig

        self.source, self.tower = source, vision_tower
        self.language_model = None if language_model is None else folder_of(language_model)
        self.config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        self.state = names.transformers_to_hub(weights_of(source))
        names.check_complete(self.state, self.config, source)
        self.images = images or self._images()
        if (self.images == "anyres") != (self.config.model_type == "llava_next"):
            raise ValueError(f"images: {self.images}: a {self.config.model_type} model has {self._images()}")

    def write(self, part: Path, max_shard_size: str) -> Converted:
        before = self.state[names.EMBEDDINGS].shape[0]
        rows = rows_of_original(getattr(self.config, configs.KEPT, None), self.source, before)
        state = resized(self.state, (names.EMBEDDINGS, names.HEAD), rows)
        notes = original_tokenizer(self.language_model or self.source, part, rows, self.language_model is None)
        limit = longest(self.source, self.config)
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
