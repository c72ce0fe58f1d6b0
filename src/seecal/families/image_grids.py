"""Which part of an image each of its tokens is: the grid that its features form in the text, family by family.

A family's row names one of these functions. Each takes what stands in a batch of one record and gives a grid an image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ImageGrid:
    """The cells of one image.

    Attributes:
        rows, columns: of the grid; cell ``row * columns + column`` is the ``first + row * columns + column``-th of the
            image's tokens.
        tokens: how many tokens the image has in all; those outside the grid are a class token, tiles of a finer grid or
            the ends of their lines.
        first: where the grid begins among them.
        pixels: where in ``pixel_values`` the picture [3, H, W] that it lies over stands; None: over the whole image.
        size: height and width of that picture in pixels, where ``pixel_values`` is padded beyond it.
    """

    rows: int
    columns: int
    tokens: int
    first: int = 0
    pixels: tuple[int, ...] | None = None
    size: tuple[int, int] | None = None


def square(config: Any, inputs: Mapping[str, Any], runs: Sequence[int], images: int) -> list[ImageGrid]:
    """Every image has the same number of tokens, a square row by row, perhaps after a class token. LLaVA with a Pixtral
    tower (``image_sizes``) is as :func:`sized`.

    Args:
        config: the model's.
        inputs: a batch of one record.
        runs: lengths of its runs of image tokens without another between.
        images: how many images the record has.

    Raises:
        ValueError: tokens that form no such grid.
    """
    if inputs.get("image_sizes") is not None:
        return sized(config, inputs, runs, images)
    each, rest = divmod(sum(runs), images)
    pictures = len(inputs["pixel_values"])
    if rest or pictures != images:
        raise ValueError(f"{pictures} pictures and {sum(runs)} image tokens for {images} images: a picture was cut up")
    side = math.isqrt(each)
    first = each - side * side
    if first > 1:  # one is CLIP's class token (vision_feature_select_strategy="full")
        raise ValueError(f"{each} tokens an image are no square")
    return [ImageGrid(side, side, each, first, (number,)) for number in range(images)]


def sized(config: Any, inputs: Mapping[str, Any], runs: Sequence[int], images: int) -> list[ImageGrid]:
    """Pixtral's: as many rows and columns as the image has patches, the ends of rows being text tokens."""
    patch = config.vision_config.patch_size * (getattr(config, "spatial_merge_size", None) or 1)
    grids = []
    for number, (height, width) in enumerate(inputs["image_sizes"].tolist()):
        rows, columns = height // patch, width // patch
        grids.append(ImageGrid(rows, columns, rows * columns, 0, (number,), (height, width)))
    return grids


def whole_first(config: Any, inputs: Mapping[str, Any], runs: Sequence[int], images: int) -> list[ImageGrid]:
    """LLaVA-NeXT and its kin: the whole picture, a square, then tiles of a finer grid, which are left out."""
    if len(runs) != images:
        raise ValueError(f"{len(runs)} runs of image tokens for {images} images: they cannot be told apart")
    side = config.vision_config.image_size // config.vision_config.patch_size
    return [ImageGrid(side, side, run, 0, (number, 0)) for number, run in enumerate(runs)]


def whole_last(config: Any, inputs: Mapping[str, Any], runs: Sequence[int], images: int) -> list[ImageGrid]:
    """InternVL and its kin: tiles of a finer grid, which are left out, then the whole picture, a square. Text tokens may
    stand between tiles where the record has one image. Idefics: ``pixel_values`` [1, pictures, 3, H, W]."""
    if images == 1:
        runs = [sum(runs)]
    if len(runs) != images:
        raise ValueError(f"{len(runs)} runs of image tokens for {images} images: they cannot be told apart")
    pixels = inputs["pixel_values"]
    before = (0,) if pixels.ndim == 5 else ()
    each, rest = divmod(sum(runs), pixels.shape[len(before)])
    side = math.isqrt(each)
    if rest or side * side != each:
        raise ValueError(f"{sum(runs)} tokens of {pixels.shape[len(before)]} pictures are no squares")
    grids, pictures = [], 0
    for run in runs:
        pictures += run // each
        grids.append(ImageGrid(side, side, run, run - each, (*before, pictures - 1)))
    return grids


def mined(config: Any, inputs: Mapping[str, Any], runs: Sequence[int], images: int) -> list[ImageGrid]:
    """Mini-Gemini: every image has the same number of tokens, a square; with tiles the whole picture's square comes first
    and the tiles' are left out, while in ``pixel_values`` the whole picture comes last."""
    each, rest = divmod(sum(runs), images)
    if rest or each != config.image_seq_length:
        raise ValueError(f"{sum(runs)} image tokens for {images} images, which have {config.image_seq_length} each")
    if config.pictures > 1 and not config.image_global:
        raise ValueError("this model reads tiles alone (image_global is false): no square of tokens is a whole picture")
    side, last = config.tokens_per_side, config.pictures - 1
    return [ImageGrid(side, side, each, 0, (number, last) if last else (number,)) for number in range(images)]


def merged(config: Any, inputs: Mapping[str, Any], runs: Sequence[int], images: int) -> list[ImageGrid]:
    """Qwen-VL and GLM-4V: ``image_grid_thw``, merged."""
    merge = config.vision_config.spatial_merge_size
    grids = []
    for _, height, width in inputs["image_grid_thw"].tolist():
        rows, columns = height // merge, width // merge
        grids.append(ImageGrid(rows, columns, rows * columns))
    return grids
