"""Images with their content taken away, for the contrasts on pixels (Tables 8 and 9 of the paper).

Made on the pixel images, so that they work with every processor, and seeded by record and epoch.
"""

from __future__ import annotations

import logging
import random
import zlib
from collections.abc import Callable
from typing import Any

from PIL import Image

from ...core.contrasts import Contrast, contrast_named

logger = logging.getLogger(__name__)

_TRIES = 16  # records that are looked at for an image


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
        changed.append([_changed(image, row_of_table, strength, rng, others, name) for image in of_record])
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


class Spares:
    """Images of other records of a data set, for contrasts that take one where a batch has no other.

    Which one is drawn by the record's name and the epoch alone, so that it is the same in any process and after a resume.

    Args:
        dataset: with ``len``; None: a stream, of which nothing can be drawn.
        image_of: record → its first image, a Pillow image; None: it has none.
    """

    def __init__(self, dataset: Any, image_of: Callable[[Any], Any]) -> None:
        self._dataset, self._image_of = dataset, image_of
        self._said = False

    def draw(self, image: Image.Image, name: str, epoch: int) -> Any:
        """Another image than ``image``, for the record of that name; None where none is found, which is said once."""
        rng = random.Random(zlib.crc32(f"{name}\n{epoch}\nspare".encode()))
        for _ in range(_TRIES if self._dataset is not None else 0):
            try:
                other = self._image_of(self._dataset[rng.randrange(len(self._dataset))])
            except Exception:  # a bad record, which its own batch names
                continue
            if other is not None and other != image:  # several records may have the same
                return other
        if not self._said:
            where = "a stream" if self._dataset is None else f"{_TRIES} others of the data"
            logger.warning(
                "%s: neither its batch nor %s has another image to swap with: it has no contrast, as have others like it",
                name,
                where,
            )
            self._said = True
        return None
