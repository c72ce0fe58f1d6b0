"""What a stage's data asks for: how many records, and how many tokens of which kind in each.

From the data itself where it is there, else from what is known of published sets and from assumptions, which are said.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..families.dummy_images import picture
from ..families.table import family_of, image_ids
from ..models.known import known_image_processor, known_model
from ..recipes.recipe import Recipe, Source, Stage

# Records of a set that are looked at for their lengths; all are counted
SAMPLE = 512
# What is taken for an image whose size nobody knows: COCO's usual one
PICTURE = (640, 480)


@dataclass(frozen=True)
class Published:
    """A data set by the name of its file: records, the share of them with an image, and where that is from."""

    records: int
    with_image: float
    source: str


# No lengths are published of any: see ASSUMED
PUBLISHED = {
    "blip_laion_cc_sbu_558k.json": Published(558_128, 1.0, "liuhaotian/LLaVA-Pretrain"),
    "llava_v1_5_mix665k.json": Published(665_298, 624_610 / 665_298, "liuhaotian/LLaVA-Instruct-150K; 40,688 without an image"),
    "llava_next_mixture.json": Published(779_289, 1.0, "lmms-lab/LLaVA-NeXT-Data, the nearest to a set that was not released"),
    "mgm_pretrain.json": Published(1_200_000, 1.0, "the MGM paper: 1.2M"),
    "mgm_instruction.json": Published(1_500_000, 1.0, "the MGM paper: 1.5M"),
}


@dataclass(frozen=True)
class Row:
    """One record as it is trained on, in tokens.

    Attributes:
        image: image tokens.
        before: text before the first image; of a record without one all its text.
        after: text after it, up to the token that predicts the last label: what the pass without the image runs over.
        rest: what comes after that.
        labels: label tokens.
    """

    image: float
    before: float
    after: float
    rest: float
    labels: float

    @property
    def text(self) -> float:
        return self.before + self.after + self.rest

    @property
    def tokens(self) -> float:
        return self.image + self.text


# A record of which nothing is known: how long its question and answer are is a guess that the table of the plan names
ASSUMED = {"text": 300, "before": 40, "labels": 150}


@dataclass(frozen=True)
class Workload:
    """A stage's data.

    Attributes:
        records: how many, each epoch.
        rows: records that stand for all; each for as many as any other.
        images: the vision inputs of one record's images, on the CPU.
        image_tokens: of those images; None: not counted yet.
        longest: tokens of the longest record that a batch can hold.
        notes: what was assumed.
    """

    records: int
    rows: tuple[Row, ...]
    images: dict[str, Tensor]
    longest: float
    notes: tuple[str, ...]

    def mean(self, name: str) -> float:
        return sum(getattr(row, name) for row in self.rows) / len(self.rows)


def vision_inputs(model: Any, name: str, processor: Any, processor_kwargs: Any, size: tuple[int, int]) -> dict[str, Tensor]:
    """The tensors of one grey picture of ``size`` (width, height), on the CPU, as the model's image processor makes them.

    ``processor``: the model's, or None. Then a known model's image processor, then the one size that its config names.
    """
    from PIL import Image

    from ..data.collators.processors import configure

    images = getattr(processor, "image_processor", None) or known_image_processor(name)
    if images is None:
        return _of_one_size(model)
    settings = dict(processor_kwargs or {})
    if processor is None and settings:
        images = configure(SimpleNamespace(image_processor=images), settings).image_processor
    made = images(images=[Image.new("RGB", size, (128, 128, 128))], return_tensors="pt")
    return {key: value for key, value in made.items() if isinstance(value, Tensor)}


def _of_one_size(model: Any) -> dict[str, Tensor]:
    stand_in = SimpleNamespace(config=model.config, device="cpu", dtype=torch.float32)
    made = (family_of(model).dummy_image or picture)(stand_in)
    if "pixel_values_aux" in made:  # Mini-Gemini: the dummy is smaller than what it is trained on
        side = model.config.image_size_aux
        made["pixel_values_aux"] = torch.full((1, 3, side, side), 0.5)
    return made
