"""Images with their content taken away, for the contrasts that keep an image in place (Tables 8 and 9 of the paper).

Made on the pixel images, so that they work with every processor, and seeded by record and epoch.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from typing import Any

from PIL import Image, ImageFilter

# Sides of the grid that patch_mask covers cells of: CLIP ViT-L/14 at 336 px, the paper's tower, has 24 × 24 patches.
GRID = 24
_GREY = (127, 127, 127)

# (image, strength, random numbers) → the image without what it shows
_CHANGES: dict[str, Callable[[Image.Image, float, random.Random], Image.Image]] = {}


def _change(function: Callable[..., Image.Image]) -> Callable[..., Image.Image]:
    _CHANGES[function.__name__] = function
    return function


@_change
def patch_mask(image: Image.Image, strength: float, rng: random.Random) -> Image.Image:
    """Grey over a share ``strength`` of the cells of a 24 × 24 grid, chosen at random."""
    covered = set(rng.sample(range(GRID * GRID), round(strength * GRID * GRID)))
    mask = Image.new("L", (GRID, GRID))
    mask.putdata([255 if cell in covered else 0 for cell in range(GRID * GRID)])
    out = image.copy()
    out.paste(_GREY, (0, 0, *image.size), mask.resize(image.size, Image.Resampling.NEAREST))
    return out


@_change
def blur(image: Image.Image, strength: float, rng: random.Random) -> Image.Image:
    """Gaussian blur of standard deviation ``strength``, in pixels of the image as it is."""
    return image.filter(ImageFilter.GaussianBlur(strength))


@_change
def noise(image: Image.Image, strength: float, rng: random.Random) -> Image.Image:
    """Gaussian noise of standard deviation ``strength`` (1 is the whole range from black to white) added to every value."""
    import numpy as np

    generator = np.random.default_rng(rng.getrandbits(64))
    values = np.asarray(image, dtype=np.float32)
    changed = values + generator.normal(0, 255 * strength, values.shape)
    return Image.fromarray(changed.round().clip(0, 255).astype(np.uint8), image.mode)


def contrast_images(
    images: list[list[Any]], names: list[str], contrast: str, strength: float, epoch: int, spare: Any = None
) -> list[list[Any]]:
    """The images of a batch as the pass "without" them sees them, each of the size of its original.

    Args:
        images: those of each record, RGB Pillow images.
        names: one a record; with the epoch they seed what is random.
        contrast: ``patch_mask``, ``blur``, ``noise``, or ``swap``: another record's image, resized to this one's size.
        strength: of the contrast; swap has none.
        spare: for swap, an image to take when no other record of the batch has one.

    Raises:
        ValueError: images that are not Pillow's; nothing to swap with.
    """
    for name, of_record in zip(names, images, strict=True):
        for image in of_record:
            if not isinstance(image, Image.Image):
                raise ValueError(
                    f"{name}: contrast={contrast!r} changes Pillow images, not a {type(image).__name__}. Give the image as "
                    "a file or a Pillow image, or set contrast='drop'."
                )
    changed = []
    for row, (name, of_record) in enumerate(zip(names, images, strict=True)):
        rng = random.Random(zlib.crc32(f"{name}\n{epoch}".encode()))
        others = [image for other, of_other in enumerate(images) if other != row for image in of_other]
        others = others or ([spare] if spare is not None else [])
        changed.append([_swapped(image, others, name, rng) if contrast == "swap" else
                        _CHANGES[contrast](image, strength, rng) for image in of_record])  # fmt: skip
    return changed


def _swapped(image: Image.Image, others: list[Image.Image], name: str, rng: random.Random) -> Image.Image:
    if not others:
        raise ValueError(
            f"{name}: contrast='swap' takes another record's image, and no other record of the batch has one. Set "
            "per_device_train_batch_size to 2 or more, or another contrast."
        )
    return rng.choice(others).resize(image.size, Image.Resampling.BICUBIC)
