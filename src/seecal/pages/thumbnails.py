"""Which records of a page have their image, and the images small."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image

from ..data.images.decode import decode_image

SIDE = 224  # pixels of the longer side
_EXTREMES = 60  # records from either end of each order
_TYPICAL = 7000  # bytes of one thumbnail as text, for the first guess of how many fit


def chosen(orders: Sequence[Sequence[int]], count: int, budget: int) -> list[int]:
    """Records in the order in which they get an image while there is room: both ends of each order, then an even sample.

    Args:
        orders: records (places in the page) sorted by something, each.
        count: how many records there are.
        budget: bytes for all images.
    """
    found: dict[int, None] = {}
    for place in range(_EXTREMES):
        for order in orders:
            for end in (place, -1 - place):
                if place < len(order):
                    found[order[end]] = None
    wanted = min(count, max(2 * budget // _TYPICAL, 1))
    for place in range(wanted):  # an even sample, also where it is all of them
        found[place * count // wanted] = None
    for place in range(count if wanted >= count // 2 else 0):
        found[place] = None
    return list(found)


def thumbnail(image: Any, name: str) -> str:
    """The image as a data address.

    Raises:
        ValueError, OSError: it cannot be opened; the message names it.
    """
    opened = decode_image(image, name)
    opened.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    opened.convert("RGB").save(buffer, "WEBP", quality=72)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


class Thumbnails:
    """Thumbnails within a budget, and the count of those that are not there.

    Args:
        budget: bytes, as text in the page.
    """

    def __init__(self, budget: int) -> None:
        self.room = budget
        self.bytes = 0
        self.of_record: dict[int, list[str]] = {}
        self.damaged: list[str] = []

    @property
    def full(self) -> bool:
        return self.room <= 0

    def add(self, number: int, images: Iterator[Any] | Sequence[Any], name: str) -> None:
        """Those of a record, all or none."""
        try:
            made = [thumbnail(image, name) for image in images]
        except (ValueError, OSError) as error:
            self.damaged.append(" ".join(str(error).split())[:200])
            return
        size = sum(map(len, made))
        if made and size <= self.room:
            self.room -= size
            self.bytes += size
            self.of_record[number] = made
        elif made:
            self.room = 0
