"""The smallest size at which a JPEG may be decoded so that its processor still only makes it smaller.

A JPEG decoder can leave out the finer half, three quarters or seven eighths of each block of 8 × 8 and so give an image of
1/2, 1/4 or 1/8 of the size at a part of the work. Which of them is enough depends on what the image processor resizes to:
it is asked, with tensors that have a size and no values. Sizes are (width, height), as Pillow writes them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import SizeDict

from ...core.contrasts import contrast_named

logger = logging.getLogger(__name__)

DECODINGS = ("exact", "reduced")

# What an image processor resizes an image to: the largest (width, height), and anything else that depends on the size of
# the image and must come out the same for the smaller one (such as its grid of tiles).
Target = tuple[tuple[int, int], Any]


def check_decoding(decoding: str, contrast: str | None) -> None:
    """ValueError for a way of decoding that is none, or under which the contrast would mean something else."""
    if decoding not in DECODINGS:
        raise ValueError(f"image_decoding={decoding!r}: expected one of {', '.join(DECODINGS)}")
    if decoding == "reduced" and contrast is not None and contrast_named(contrast).in_pixels:
        raise ValueError(
            f"image_decoding='reduced' with contrast={contrast!r}: its strength is measured on the pixels of the full "
            "image, and would take away more of a smaller one. Set image_decoding='exact', or another contrast."
        )


_KNOWN_SIZES = 10_000  # a data set of more sizes than this starts over


def box_for(image_processor: Any) -> Callable[[tuple[int, int]], tuple[int, int] | None] | None:
    """A function from an image's size to the smallest box that it may be decoded to, None for its full size.

    The box is 1/2, 1/4 or 1/8 of the image (rounded down) and no smaller than what the processor resizes the image to;
    and the processor resizes the smaller image to that same size, so that a record keeps its number of tokens.

    Returns None, and says so, for image processors whose sizes are not known here.
    """
    target = _target_of(image_processor)
    if target is None:
        _say_unknown(type(image_processor).__name__)
        return None

    return _Box(target)


class _Box:
    """What :func:`box_for` returns; not a closure, because DataLoader workers that are spawned get it by pickle."""

    def __init__(self, target: Callable[[int, int], Target]) -> None:
        self._target = target
        self._known: dict[tuple[int, int], tuple[int, int] | None] = {}

    def __call__(self, size: tuple[int, int]) -> tuple[int, int] | None:
        if size not in self._known:
            if len(self._known) >= _KNOWN_SIZES:
                self._known.clear()
            self._known[size] = self._box(size)
        return self._known[size]

    def _box(self, size: tuple[int, int]) -> tuple[int, int] | None:
        needed, rest = self._target(*size)
        for factor in (8, 4, 2):
            # What the decoder gives is rounded up: never smaller than the box
            smaller = -(-size[0] // factor), -(-size[1] // factor)
            least = size[0] // factor, size[1] // factor
            if least[0] >= needed[0] and least[1] >= needed[1] and self._target(*smaller) == (needed, rest):
                return least
        return None


@functools.cache
def _say_unknown(kind: str) -> None:
    """Once, though training and evaluation have a collator each."""
    logger.warning(
        "image_decoding='reduced': the sizes that %s resizes to are not known here, so images are decoded in full", kind
    )


def _target_of(image_processor: Any) -> Callable[[int, int], Target] | None:
    """The row of the table for an image processor; transformers' own way where its class leaves that as it is."""
    kind = type(image_processor)
    if not isinstance(image_processor, TorchvisionBackend) or not getattr(image_processor, "do_resize", False):
        return None
    row = _TARGETS.get(kind.__name__)
    own = TorchvisionBackend
    if row is None and kind._preprocess is own._preprocess and kind.resize is own.resize:
        row = _plain
    return None if row is None else functools.partial(row, image_processor)


def _empty(width: int, height: int) -> torch.Tensor:
    return torch.empty(3, height, width, dtype=torch.uint8, device="meta")


def _size_of(resized: torch.Tensor) -> tuple[int, int]:
    return resized.shape[-1], resized.shape[-2]


def _plain(processor: Any, width: int, height: int) -> Target:
    return _size_of(processor.resize(_empty(width, height), size=SizeDict(**dict(processor.size)))), None


def _gemma3(processor: Any, width: int, height: int) -> Target:
    # Pan and scan cuts crops out of the full image: what is enough depends on the crops
    return _plain(processor, width, height) if not processor.do_pan_and_scan else ((width, height), None)


def _pixtral(processor: Any, width: int, height: int) -> Target:
    sizes = {"size": SizeDict(**dict(processor.size)), "patch_size": SizeDict(**dict(processor.patch_size))}
    return _size_of(processor.resize(_empty(width, height), **sizes)), None


def _qwen2_vl(processor: Any, width: int, height: int) -> Target:
    factor, size = processor.patch_size * processor.merge_size, SizeDict(**dict(processor.size))
    return _size_of(processor.resize(_empty(width, height), size=size, resample=None, factor=factor)), None


def _any_resolution(processor: Any, width: int, height: int) -> Target:
    from transformers.image_processing_utils import select_best_resolution

    grid = select_best_resolution((height, width), processor.image_grid_pinpoints)
    tiled = _size_of(
        processor._resize_for_patching(_empty(width, height), grid, resample=None, input_data_format="channels_first")
    )
    size = dict(processor.size)
    base = size.get("shortest_edge")
    base = (base, base) if base else (size["width"], size["height"])
    # The padding that is taken off the features again is computed from the ratio of the sides
    return (max(tiled[0], base[0]), max(tiled[1], base[1])), (grid, Fraction(width, height))


def _got_ocr2(processor: Any, width: int, height: int) -> Target:
    from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

    size = dict(processor.size)
    # Whether there are tiles may be said by the processor around it: as many as there could be
    grid = get_optimal_tiled_canvas(
        (height, width), (size["height"], size["width"]), processor.min_patches, processor.max_patches
    )
    return (size["width"] * grid[0], size["height"] * grid[1]), grid


# By the name of the class, because importing the image processors of all families takes seconds.
_TARGETS: dict[str, Callable[[Any, int, int], Target]] = {
    "Gemma3ImageProcessor": _gemma3,
    "PixtralImageProcessor": _pixtral,
    "Qwen2VLImageProcessor": _qwen2_vl,
    "LlavaNextImageProcessor": _any_resolution,
    "LlavaOnevisionImageProcessor": _any_resolution,
    "GotOcr2ImageProcessor": _got_ocr2,
}
