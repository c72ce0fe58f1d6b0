"""A Mini-Gemini (MGM, MGM-HD) checkpoint of the original code as a transformers model, and back.

``seecal.models.mgm.original_keys`` knows the names; here are the files around them.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch

from .. import assembly
from ..chat_templates import chat_template_for
from ..mgm import MGMConfig
from ..mgm.original_keys import (
    config_from_original,
    config_to_original,
    convnext_from_timm,
    to_original,
    to_transformers,
)
from ..towers import clip_tensors, convnext_sizes, convnext_tensors
from ..weight_files import Lazy, folder_of, weights_of, write_weights
from . import configs, names
from .folders import (
    PROJECTOR_FILE,
    Converted,
    Source,
    copy_vocabulary,
    original_tokenizer,
    resized,
    rows_of_original,
)

ORIGINALS = ("mgm", "mgm_gemma")
_VOCABULARY = ("model.language_model.embed_tokens.weight", "lm_head.weight")
_TOWER, _AUX, _TIMM = "model.vision_tower.", "model.vision_tower_aux.", "model.vision_tower_aux.vision_"
# What stage 1 trains, beside which its file has the towers
_STAGE_1 = ("model.mm_projector.", "model.vlm_uni_")
_TEMPLATES = {"mgm": None, "mgm_gemma": "gemma"}


class Import:
    """Original → transformers."""

    def __init__(
        self,
        source: Path,
        found: Source,
        vision_tower: str | None,
        aux_tower: str | None,
        images: str | None,
        template: str | None,
    ) -> None:
        self.notes: list[str] = []
        self.source, self.found, self.original = source, found, found.config
        if images is not None:
            self.original = {**self.original, "image_aspect_ratio": images}
        if (found_images := self.original.get("image_aspect_ratio") or "pad") not in ("square", "pad"):
            raise ValueError(f"images: {found_images}: Mini-Gemini has square and pad")
        self.images = found_images
        self.template = template or _TEMPLATES[self.original["model_type"]]
        self.tower, self.aux = (None if one is None else folder_of(one) for one in (vision_tower, aux_tower))
        for prefix, folder, option in ((_TOWER, self.tower, "vision-tower"), (_AUX, self.aux, "aux-tower")):
            if folder is None and not any(name.startswith(prefix) for name in found.state):
                named = self.original.get("mm_vision_tower" if prefix == _TOWER else "mm_vision_tower_aux")
                raise ValueError(f"{source}: the tower {named} is not in it. Give its folder or hub id: --{option}.")

    def write(self, part: Path, max_shard_size: str) -> Converted:
        try:
            config = config_from_original(self.original, **self._tower_configs())
            state = self._renamed(config)
        except ValueError as error:
            raise ValueError(f"{self.source}: {error}") from None
        self._add_towers(state)
        if _VOCABULARY[0] not in state:
            raise ValueError(
                f"{self.source}: lacks model.embed_tokens.weight, so it is no whole checkpoint. Copy it again."
            )
        tokenizer = assembly.tokenizer_of(str(self.found.tokenizer))
        assembly.add_tokens(tokenizer)
        rows = assembly.padded_rows(before := state[_VOCABULARY[0]].shape[0], tokenizer.pad_token_id + 1)
        if rows != before:
            self.notes.append(f"vocabulary: {before} rows padded to {rows}, for {tokenizer.pad_token}")
        text: Any = config.text_config
        text.vocab_size, text.pad_token_id = rows, tokenizer.pad_token_id
        config.image_token_id = tokenizer.convert_tokens_to_ids(assembly.PLACEHOLDER)
        config.dtype = self.original.get("torch_dtype") or state[_VOCABULARY[0]].dtype
        state = resized(state, _VOCABULARY, rows)
        names.check_complete(state, config, self.source, hub=False)
        assembly.mgm_processor(
            tokenizer, config, images=self.images, template=chat_template_for(tokenizer, self.template)
        ).save_pretrained(part)
        config.architectures = ["MGMForConditionalGeneration"]
        config.save_pretrained(part)
        copy_vocabulary(self.found.tokenizer, part)
        write_weights(state, part, max_shard_size)
        return Converted(part, config.model_type, len(state), self.notes)

    def _tower_configs(self) -> dict[str, Any]:
        """Of the towers: CLIP's from its folder where that is given, ConvNeXt's as its tensors tell."""
        found: dict[str, Any] = {}
        if self.tower is not None:
            found["vision_config"] = configs.vision_config_of(str(self.tower), self.original, self.source).to_dict()
        held = {n.removeprefix(_TIMM): one for n, one in self.found.state.items() if n.startswith(_TIMM)}
        state = {new: one for name, one in held.items() if (new := convnext_from_timm(name)) is not None}
        if not state and self.aux is not None:
            state = convnext_tensors(self.aux)
        if state:
            found["vision_aux_config"] = dict(zip(("hidden_sizes", "depths"), convnext_sizes(state), strict=True))
        return found

    def _renamed(self, config: MGMConfig) -> dict[str, Lazy]:
        made: dict[str, Any] = to_transformers(self.found.state, config)  # type: ignore[arg-type]
        return {name: one if isinstance(one, Lazy) else Lazy.of(one) for name, one in made.items()}

    def _add_towers(self, state: dict[str, Lazy]) -> None:
        parts = ((_TOWER, self.tower, "vision_tower", clip_tensors), (_AUX, self.aux, "aux_tower", convnext_tensors))
        for prefix, folder, option, read in parts:
            if any(name.startswith(prefix) for name in state):
                self.notes.append(f"{option}: the checkpoint's own")
            elif folder is not None:
                state |= {prefix + name: one for name, one in read(folder).items()}
                self.notes.append(f"{option}: from {folder}")


class Export:
    """transformers → original."""

    def __init__(self, source: Path, language_model: str | None, vision_tower: str | None, images: str | None) -> None:
        from transformers import AutoConfig

        self.source, self.tower, self.images = source, vision_tower, images
        self.language_model = None if language_model is None else folder_of(language_model)
        self.config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        self.state = weights_of(source)
        names.check_complete(self.state, self.config, source, hub=False)

    def write(self, part: Path, max_shard_size: str) -> Converted:
        before = self.state[_VOCABULARY[0]].shape[0]
        kept = self.config.original_config
        rows = rows_of_original(kept, self.source, before)
        try:
            original = {**self._original_config(rows, kept or {}), "optimize_vision_tower_aux": True}
            state: dict[str, Any] = to_original(resized(self.state, _VOCABULARY, rows), self.config)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"{self.source}: {error}") from None
        notes = original_tokenizer(self.language_model or self.source, part, rows, self.language_model is None)
        (part / "config.json").write_text(json.dumps(original, indent=2) + "\n", "utf8")
        # Its loader wants each tower whole in one shard, and in one that has the mining
        first = sorted(state, key=lambda name: not name.startswith(("model.vision_tower", "model.vlm_uni")))
        write_weights({name: state[name] for name in first}, part, max_shard_size, pickled=True)
        if rows != before:
            notes.append(f"vocabulary: {rows} of {before} rows; the others stand for tokens the original has not")
        notes.append(
            "towers: in it; optimize_vision_tower_aux: true, without which the original would not read the second"
        )
        return Converted(part, original["model_type"], len(state), notes)

    def _original_config(self, rows: int, kept: dict[str, Any]) -> dict[str, Any]:
        """As the original's code wrote it, with the vocabulary and padding that it had."""
        config = copy.deepcopy(self.config)
        text: Any = config.text_config
        text.vocab_size, text.pad_token_id = rows, kept.get("pad_token_id", text.pad_token_id)
        found = config_to_original(config)
        if self.images is not None:
            found["image_aspect_ratio"] = self.images
        if self.tower is not None:
            found["mm_vision_tower"] = self.tower
        return found

    def write_projector(self, part: Path) -> Converted:
        """``mm_projector.bin``: the projector and the mining. The towers are read from their own folders."""
        try:
            state: dict[str, Any] = to_original(self.state, self.config)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"{self.source}: {error}") from None
        tensors = {name: one.read().clone() for name, one in state.items() if name.startswith(_STAGE_1)}
        torch.save(tensors, part / PROJECTOR_FILE)
        return Converted(
            part, self.config.model_type, len(tensors), ["only projector and mining: no other tensor is in it"]
        )
