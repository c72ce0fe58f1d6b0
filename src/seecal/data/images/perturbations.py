"""Images with their content taken away, for the contrasts on pixels (Tables 8 and 9 of the paper).

Made on the pixel images, so that they work with every processor, and seeded by record and epoch.
"""

from __future__ import annotations

import random
import zlib
from typing import Any

from PIL import Image

from ...core.contrasts import Contrast, contrast_named


def contrast_images(
    images: list[list[Any]], names: list[str], contrast: str, strength: float, epoch: int, spare: Any = None
) -> list[list[Any]]:
    """The images of a batch as the pass "without" them sees them, each of the size of its original.

    Args:
        images: those of each record, RGB Pillow images.
        names: one a record; with the epoch they seed what is random.
        contrast: the name of a contrast on pixels in ``seecal.CONTRASTS``.
        strength: of the contrast.
        spare: an image for contrasts that take another record's, when no other record of the batch has one.

    Raises:
        ValueError: a contrast that is not on pixels; images that are not Pillow's; nothing to swap with; a function that
            gives an image of another size.
    """
    row_of_table = contrast_named(contrast)
    if not row_of_table.on_pixels:
        raise ValueError(
            f"contrast={contrast!r} does not change pixels: the collator makes nothing for it. Leave it out."
        )
    for name, mine in zip(names, images, strict=True):
        for image in mine:
            if not isinstance(image, Image.Image):
                raise ValueError(
                    f"{name}: contrast={contrast!r} changes Pillow images, not a {type(image).__name__}. Give the image as "
                    "a file or a Pillow image, or set contrast='drop'."
                )
    changed = []
    for row, (name, mine) in enumerate(zip(names, images, strict=True)):
        rng = random.Random(zlib.crc32(f"{name}\n{epoch}".encode()))
        others = [image for other, theirs in enumerate(images) if other != row for image in theirs]
        others = others or ([spare] if spare is not None else [])
        changed.append([_changed(image, row_of_table, strength, rng, others, name) for image in mine])
    return changed


def _changed(
    image: Image.Image, contrast: Contrast, strength: float, rng: random.Random, others: list[Image.Image], name: str
) -> Image.Image:
    try:
        changed: Image.Image = contrast.function(image, strength, rng, others)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if changed.size != image.size:
        raise ValueError(
            f"{name}: contrast={contrast.name!r} made an image of {changed.size} from one of {image.size}. Its function "
            "must keep the size, or the processor would make another number of image tokens."
        )
    return changed
