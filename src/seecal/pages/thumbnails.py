"""Which records of a page have their image, and the images small."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image

from ..data.images.decode import decode_image
from ..data.paths import LostImage, show

SIDE = 224  # pixels of the longer side
_EXTREMES = 60  # records from either end of each order


def extremes(orders: Sequence[Sequence[int]]) -> list[int]:
    """The records at both ends of each order, the outermost first."""
    found: dict[int, None] = {}
    for place in range(_EXTREMES):
        for order in orders:
            if place < len(order):
                found[order[place]] = found[order[-1 - place]] = None
    return list(found)


def even(numbers: Sequence[int], count: int) -> list[int]:
    """``count`` of the numbers, evenly spread; all of them where that is more."""
    count = min(count, len(numbers))
    return [numbers[place * len(numbers) // count] for place in range(count)]


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
    """Thumbnails within a budget, and why others are not there.

    Args:
        budget: bytes, as text in the page.

    Attributes:
        room: bytes that are left.
        of_record: record -> its images as data addresses.
        lost: record -> what stands in their place: an image of it is missing, or cannot be opened.
        missing, damaged: a line for each such record.
    """

    def __init__(self, budget: int) -> None:
        self.room = budget
        self.of_record: dict[int, list[str]] = {}
        self.lost: dict[int, str] = {}
        self.missing: list[str] = []
        self.damaged: list[str] = []
        self._sizes: list[int] = []  # of records, whether they had room or not

    @property
    def size(self) -> float:
        """Bytes that the images of a record take, the mean of those that were opened."""
        return sum(self._sizes) / max(len(self._sizes), 1)

    @property
    def fits(self) -> int:
        """For how many more records there is room, by the size of those that were opened; some, while none was."""
        return int(self.room // self.size) if self._sizes else _EXTREMES

    @property
    def full(self) -> bool:
        return self.room < min(self._sizes, default=0)

    def add(self, number: int, images: Iterator[Any] | Sequence[Any], name: str) -> None:
        """Those of a record, all or none."""
        made = []
        for image in images:
            try:
                made.append(thumbnail(image, name))
            except (ValueError, OSError) as error:
                path = (image.get("path") if isinstance(image, dict) else None) or "in the data"
                line = " ".join(str(error).split())[:300]
                self.lose(number, [LostImage(path, isinstance(error, FileNotFoundError), line)])
                return
        size = sum(map(len, made))
        if not made:
            return
        self._sizes.append(size)
        if size <= self.room:
            self.room -= size
            self.of_record[number] = made

    def lose(self, number: int, lost: Sequence[LostImage]) -> None:
        """The record has no images here: of these it is known that they cannot be used."""
        first = next((one for one in lost if one.missing), lost[0])
        (self.missing if first.missing else self.damaged).append(first.line)
        what = "image missing" if first.missing else "image cannot be opened"
        self.lost[number] = f"{what}: {show(os.path.basename(first.path) or first.path)}"
