"""A stage's model without storage: with its sizes, what trains in it, and what its parts cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.contrasts import contrast_named
from ..core.weighting import passes_read
from ..families.table import decoder_of
from ..models.known import known_config, known_model
from ..recipes.preview import settings_of
from ..recipes.recipe import Recipe, Stage
from ..recipes.trainable import prepare
from .cost import DecoderCost, HeadCost, ImageCost, decoder_cost, head_cost, image_cost, layer_list
from .memory import Counts, optimizer_named
from .storageless import storageless, storageless_model

_BLOCK, _SCALES_BLOCK = (
    64,
    256,
)  # weights that share a scale in 4 bits, and scales that share one when quantised themselves


@dataclass
class StageModel:
    """What a stage trains.

    Attributes:
        model: without storage, in the precision in which it computes.
        processor: the model's; None: it is not there.
        settings: the stage's CALConfig.
        bf16: whether the stage computes in bfloat16.
        width: bytes of a weight as it is loaded.
        optimizer: as ``memory.optimizer_named`` calls it.
        quantised: arguments of the quantisation; None: none.
        counts, decoder, images, head: set by :meth:`prepare`.
        notes: what is not as asked for.
    """

    model: Any
    processor: Any
    settings: Any
    bf16: bool
    width: int
    optimizer: str
    quantised: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()
    counts: Counts = field(init=False)
    decoder: DecoderCost = field(init=False)
    images: ImageCost = field(init=False)
    head: HeadCost = field(init=False)

    @property
    def size(self) -> int:
        """Bytes of a number in what is computed."""
        return 2 if self.bf16 else self.width

    @property
    def checkpointed(self) -> bool:
        """Whether layers are computed again in the backward. transformers renamed the setting in 5.23."""
        return bool(getattr(self.settings, "activation_checkpointing", None) or self.settings.gradient_checkpointing)

    @property
    def contrast(self) -> str | None:
        """How the image is taken away: drop, mask, or pixels; None: it is not."""
        if "without" not in passes_read(self.settings.weighting):
            return None
        name = self.settings.contrast
        return "pixels" if contrast_named(name).on_pixels else str(name)

    def prepare(self, stage: Stage, images: Mapping[str, Tensor]) -> None:
        """Freeze and adapt as training does, and measure. ``images``: the vision inputs of one record."""
        base, dtype = self.model, next(self.model.parameters()).dtype
        with storageless():
            prepared = prepare(base, stage.train, stage.lora, stage.freeze, image=images)
        self.counts = self._counted(prepared.model)
        prepared.model.to(dtype)  # adapters are made in float32, and compute under autocast
        self.decoder = decoder_cost(base)
        self.images = image_cost(base, images)
        self.head = head_cost(base)

    def _counted(self, model: Any) -> Counts:
        decoder = decoder_of(self.model)
        trained = [(name, one.numel()) for name, one in model.named_parameters() if one.requires_grad]
        total = sum(one.numel() for one in model.parameters())
        layers = layer_list(decoder)[1]
        inside = sum(one.numel() for one in layers.parameters())
        packed = self._packed(decoder) if self.quantised else 0
        each = 0.5 + 4 / _BLOCK
        if self.quantised and self.quantised.get("bnb_4bit_use_double_quant"):
            each = 0.5 + 1 / _BLOCK + 4 / (_BLOCK * _SCALES_BLOCK)
        return Counts(
            all=total,
            trained=sum(count for _, count in trained),
            layer=inside // max(len(layers), 1),
            outside=total - inside,
            adapters=sum(count for name, count in trained if ".lora_" in name),
            packed=packed,
            packed_bytes=packed * each,
        )

    def _packed(self, decoder: nn.Module) -> int:
        """Weights of the decoder's linear layers whose rows are whole blocks."""
        return sum(
            module.weight.numel()
            for name, module in decoder.named_modules()
            if isinstance(module, nn.Linear) and ".lora_" not in name and module.in_features % _BLOCK == 0
        )


def architecture_of(recipe: Recipe) -> str:
    """Whose sizes are taken: the model's own folder, else the recipe's ``architecture``, else what the hub id stands for.

    Raises:
        ValueError: none of these.
    """
    if (Path(recipe.model) / "config.json").is_file():
        return recipe.model
    named = recipe.resolved.get("architecture")
    for name in (named, recipe.model):
        if name and ((Path(name) / "config.json").is_file() or known_model(name)):
            return str(name)
    known_config(str(named or recipe.model))  # its error lists the names
    raise AssertionError("unreachable")


def stage_model(recipe: Recipe, stage: Stage, name: str) -> StageModel:
    """The model of a stage, before anything of it is frozen."""
    from ..models.loading import load_processor

    settings = settings_of(stage)
    given = dict(recipe.model_init_kwargs)
    bf16 = bool(stage.settings.get("bf16", not stage.settings.get("use_cpu") and not stage.settings.get("fp16")))
    wanted = str(given.pop("dtype", "float32")).removeprefix("torch.")
    width = 2 if wanted in ("bfloat16", "float16") else 4
    quantised = given.pop("quantization_config", None) if "lora" in stage.train else None
    config = known_config(name)
    for key, value in given.items():
        if hasattr(config, key):
            setattr(config, key, value)
    model = storageless_model(config, torch.bfloat16 if bf16 or width == 2 else torch.float32)
    here = (Path(recipe.model) / "config.json").is_file()
    processor = load_processor(recipe.model) if here else None
    notes = []
    optim = str(getattr(settings.optim, "value", settings.optim))
    known = optimizer_named(optim)
    if known is None:
        notes.append(f"optim: {optim}: what it keeps is not known here, so it is counted as AdamW")
    if wanted == "auto":
        notes.append("dtype: auto: counted as float32")
    return StageModel(model, processor, settings, bf16, width, known or "adamw", quantised, tuple(notes))
