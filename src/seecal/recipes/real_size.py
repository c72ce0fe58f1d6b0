"""What a recipe's stages want of the model in its real size, looked at without a single weight.

Every stage is looked at, whatever is wrong with the one before: a function here raises ValueError, and what all of them raise
is collected.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.collators.image_tokens import check_processor
from ..data.collators.processors import configure
from ..families.module_groups import group_of, module_groups
from ..families.table import image_ids
from ..models.shrunk import on_meta
from ..trainer.collators import vision_collator
from ..trainer.samples import check_token_ids
from .preview import settings_of
from .recipe import Recipe, Stage
from .trainable import check_groups

# Sizes of pictures whose tokens are counted, (width, height): a large square one, a wide and a high one
PICTURES = ((1344, 1344), (2016, 672), (672, 2016))


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
                found.append(f"{self._where(stage)}{' '.join(str(error).split())}")

        for stage in self.recipe.stages:
            for check in (self.settings, self.files, self.groups, self.grid, self.ids, self.length):
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
        for name in ("deepspeed", "fsdp_config", "accelerator_config"):
            value = stage.settings.get(name)
            if isinstance(value, str) and not value.lstrip().startswith("{") and not Path(value).is_file():
                raise FileNotFoundError(f"{name}: {value}: no such file")

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
        if missing := [name for name in stage.learning_rates if name not in {*counts, *stage.train}]:
            trained = ", ".join(stage.train)
            raise ValueError(f"learning_rates: {', '.join(missing)} does not train here; what trains is {trained}")

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

    def length(self, stage: Stage) -> None:
        """A ``max_length`` into which a picture does not go."""
        settings = settings_of(stage)
        if settings.max_length is None:
            return
        for size, length in self._lengths(stage):
            if length > settings.max_length:
                fate = {"error": "training would stop at it", "drop": "such records would be left out"}
                raise ValueError(
                    f"max_length={settings.max_length}: a picture of {size[0]} × {size[1]} pixels makes a record of {length:,} "
                    f"tokens with ten words of text, and an image cannot be cut; with on_long: {settings.on_long} "
                    f"{fate.get(settings.on_long, 'training would stop at it')}. Set max_length to {length} or more, or "
                    "smaller images (processor_kwargs)"
                )

    def _lengths(self, stage: Stage) -> Iterator[tuple[tuple[int, int], int]]:
        """(size of a picture, tokens of a record with it), the longest first."""
        settings = settings_of(stage)
        settings.max_length, settings.on_long = None, "truncate"
        collator = vision_collator(settings, self._processor_of(stage))
        words = [{"type": "text", "text": "What is in this picture?"}]
        messages = [
            {"role": "user", "content": [{"type": "image"}, *words]},
            {"role": "assistant", "content": [{"type": "text", "text": "There is a square."}]},
        ]
        found = []
        for size in PICTURES:
            batch: Mapping[str, Any] = collator([{"messages": messages, "images": [Image.new("RGB", size)]}])
            found.append((size, int(batch["attention_mask"].sum())))
        yield from sorted(found, key=lambda one: -one[1])

    def _processor_of(self, stage: Stage) -> Any:
        """As the stage sets it."""
        processor = copy.deepcopy(self.processor)
        if stage.chat_template is not None:
            processor.chat_template = stage.chat_template
        return configure(processor, settings_of(stage).processor_kwargs)
