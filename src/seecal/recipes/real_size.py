"""What a recipe's stages want of the model in its real size, looked at without a single weight.

Every stage is looked at, whatever is wrong with the one before: what the checks raise is collected.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

from ..data.collators.image_tokens import check_processor, image_token_ids
from ..data.collators.processors import configure
from ..families.module_groups import group_of, module_groups
from ..families.table import image_ids
from ..models.shrunk import on_meta
from ..trainer.collators import vision_collator
from ..trainer.samples import check_token_ids
from .preview import settings_of
from .recipe import Recipe, Stage, unknown
from .stage_checks import check_files
from .trainable import check_groups

# Towers whose table of positions is for one size of picture
_FIXED = ("clip_vision_model", "siglip_vision_model", "internvl_vision")
_TEXT = 64  # tokens of a short question and answer, with what the template writes around them
# Sizes of pictures whose tokens are counted, (width, height): a large square one, a wide and a high one
PICTURES = ((1344, 1344), (2016, 672), (672, 2016))


def _record(size: tuple[int, int]) -> dict[str, Any]:
    words = {"type": "text", "text": "What is in this picture?"}
    messages = [
        {"role": "user", "content": [{"type": "image"}, words]},
        {"role": "assistant", "content": [{"type": "text", "text": "There is a square."}]},
    ]
    return {"id": "made up", "messages": messages, "images": [Image.new("RGB", size)]}


class RealSize:
    """A recipe beside the model that it names.

    Args:
        recipe: what is to be trained.
        config: of the model.
        processor: the model's, or one that stands in for it.
        own: whether it is the model's: then its ids are looked at too.

    Attributes:
        trains: number of a stage → group → how many parameters of the real model train, adapters aside.
    """

    def __init__(self, recipe: Recipe, config: Any, processor: Any, *, own: bool) -> None:
        self.recipe, self.config, self.processor, self.own = recipe, config, processor, own
        self.model = on_meta(config)
        self.trains: dict[int, dict[str, int]] = {}

    def problems(self) -> list[str]:
        """One line for each thing that cannot work, in the order of the stages."""
        found: list[str] = []

        def note(check: Callable[[Stage], None], stage: Stage) -> None:
            try:
                check(stage)
            except (ValueError, OSError, ImportError) as error:
                text = " ".join(str(error).split())
                found.append(text if text.startswith(f"stage {stage.number}: ") else self._where(stage) + text)

        for stage in self.recipe.stages:
            for check in (self.settings, self.files, self.attention, self.groups):
                note(check, stage)
            before = len(found)
            for check in (self.grid, self.ids, self.pictures):
                if len(found) == before:  # else it would fail for the same reason
                    note(check, stage)
        return list(dict.fromkeys(found))

    def _where(self, stage: Stage) -> str:
        return f"stage {stage.number}: " if len(self.recipe.stages) > 1 else ""

    # ---- What is looked at ----

    def settings(self, stage: Stage) -> None:
        """Values that contradict each other, those of the device aside."""
        if stage.settings.get("bf16") and stage.settings.get("fp16"):
            raise ValueError("bf16 and fp16 are both true. Set one of them")
        settings_of(stage)

    def files(self, stage: Stage) -> None:
        """Files that the settings name."""
        check_files(stage)

    def attention(self, stage: Stage) -> None:
        """A name that no attention has; whether its package is there, only the machine that trains can tell."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        name = self.recipe.model_init_kwargs.get("attn_implementation")
        known = ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
        if isinstance(name, str) and "/" not in name and name not in known:
            raise unknown(f"model_init_kwargs.attn_implementation: {name}", name, known, "attention")

    def groups(self, stage: Stage) -> None:
        """Groups that the model does not have, or that do not go together; counts what trains."""
        check_groups(self.model, stage.train, stage.freeze)
        groups = module_groups(self.model)
        word_table = self.model.get_input_embeddings().weight if "embeddings" in stage.freeze else None
        counts: dict[str, int] = {}
        for name, parameter in self.model.named_parameters():
            group = group_of(name, groups, stage.train)
            if group is not None and parameter is not word_table:
                counts[group] = counts.get(group, 0) + parameter.numel()
        self.trains[stage.number] = counts

    def grid(self, stage: Stage) -> None:
        """Sizes of tiles that the tower does not see, or that model and processor understand differently."""
        of_model = getattr(self.config, "image_grid_pinpoints", None)
        images = self._processor_of(stage).image_processor
        of_images = getattr(images, "image_grid_pinpoints", None)
        if of_model is None or of_images is None:
            return
        side = self.config.vision_config.image_size
        lists = {"the processor's": of_images, "the model's": of_model}
        for whose, pinpoints in lists.items():
            for size in pinpoints:
                if any(one % side for one in size):
                    raise ValueError(
                        f"image_grid_pinpoints: {whose} {list(size)} is no whole number of tiles: the vision tower sees "
                        f"squares of {side} pixels. Give multiples of {side}"
                    )
        if [list(size) for size in of_images] != [list(size) for size in of_model]:
            raise ValueError(
                f"image_grid_pinpoints: the processor cuts images at {[list(size) for size in of_images]}, and the model's "
                f"config says {[list(size) for size in of_model]}. They have to be the same, in the same order: "
                "processor_kwargs sets the processor's alone"
            )

    def ids(self, stage: Stage) -> None:
        """A processor whose tokens are not those that the model knows."""
        if self.own:
            ids = image_ids(self.config)
            check_processor(vision_collator(settings_of(stage), self._processor_of(stage)), self.model, ids)
            check_token_ids(self.model, self.processor.tokenizer, ids)

    def pictures(self, stage: Stage) -> None:
        """Pictures of a size that the tower does not see, and a ``max_length`` into which their tokens do not go."""
        settings = settings_of(stage)
        most, on_long = settings.max_length, settings.on_long
        settings.max_length, settings.on_long = None, "truncate"
        settings.contrast = "drop"  # one on pixels may need another record's
        collator = vision_collator(settings, self._processor_of(stage))
        of_images = torch.tensor(sorted(image_token_ids(collator.processor)[1]))
        longest, its_size = 0, PICTURES[0]
        for size in PICTURES:
            batch = collator([_record(size)])
            self._check_pixels(batch.get("pixel_values"))
            tokens = int(torch.isin(batch["input_ids"], of_images).sum())
            if tokens > longest:
                longest, its_size = tokens, size
        if most is not None and longest + _TEXT > most:
            fate = "such records are left out" if on_long == "drop" else "training stops at such a record"
            raise ValueError(
                f"max_length={most}: a picture of {its_size[0]} × {its_size[1]} pixels is {longest:,} image tokens, which "
                f"cannot be cut, and leaves {max(most - longest, 0)} for text: {fate}. Set max_length to "
                f"{longest + _TEXT} or more, or make images smaller (processor_kwargs)"
            )

    def _check_pixels(self, pixels: Any) -> None:
        vision = self.config.vision_config
        if vision.model_type not in _FIXED or pixels is None:
            return
        side = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
        high, wide = pixels.shape[-2:]
        if (high, wide) != (side, side):
            raise ValueError(
                f"the processor makes pictures of {wide} × {high} pixels, and the vision tower sees {side} × {side}. Set "
                f"size and crop_size in processor_kwargs to {side}, or take them out"
            )

    def _processor_of(self, stage: Stage) -> Any:
        """As the stage sets it."""
        processor = copy.deepcopy(self.processor)
        if stage.chat_template is not None:
            processor.chat_template = stage.chat_template
        return configure(processor, settings_of(stage).processor_kwargs)
