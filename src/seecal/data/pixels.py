"""From a JPEG file to what the image processor resizes, with fewer copies on the way and the same values at its end.

Two things that the plain way (Pillow's decoder, then the processor) spends time on and that change no value:

- Pillow hands its pixels on as bytes, which are copied twice more before they are a tensor. torchvision decodes straight
  into one. Both call libjpeg-turbo, and :func:`decoders_agree` looks that the two copies of it that are installed agree.
- transformers copies each image from [H, W, 3] to [3, H, W] before it resizes it. torch's resize is faster on the first
  order, and gives the same bits.

H, W are an image's height and width.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from transformers.image_processing_backends import TorchvisionBackend

logger = logging.getLogger(__name__)


def jpeg_pixels(data: bytes) -> Tensor | None:
    """The RGB pixels [3, H, W] uint8 of a JPEG file, as Pillow decodes them; None: leave it to Pillow.

    ``data`` is a whole file whose colours are RGB or grey and that needs no turning. What torchvision cannot decode is
    left to Pillow, which either can or says what is wrong.
    """
    return _torchvision(data) if decoders_agree() else None


def _torchvision(data: bytes) -> Tensor | None:
    try:
        # A copy, because torch warns of memory that it must not write; the file is small beside its pixels
        return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    except (RuntimeError, ValueError):
        return None


@functools.cache
def decoders_agree() -> bool:
    """Whether torchvision gives Pillow's pixels on small images of every kind that :func:`jpeg_pixels` is given.

    A Pillow built on another JPEG library would round differently. Sizes are no multiples of a JPEG block.
    """
    values = np.random.default_rng(0).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    coarse = Image.fromarray(values).resize((61, 43), Image.Resampling.BICUBIC)
    for image in (coarse, coarse.convert("L")):
        for subsampling in ("4:4:4", "4:2:2", "4:2:0"):
            for progressive in (False, True):
                file = io.BytesIO()
                image.save(file, "JPEG", quality=90, subsampling=subsampling, progressive=progressive)
                pixels = _torchvision(file.getvalue())
                if pixels is None or not torch.equal(pixels, _as_it_is(Image.open(file).convert("RGB"))):
                    logger.warning(
                        "torchvision %s JPEG files as Pillow does here, so Pillow decodes them, which is slower",
                        "cannot decode" if pixels is None else "does not decode",
                    )
                    return False
    return True


@contextlib.contextmanager
def fewer_copies(image_processor: Any) -> Iterator[None]:
    """While it is open, ``image_processor`` takes RGB pixels in the order they lie in. Its output is the same.

    Nothing changes for image processors that are not transformers' torchvision ones, or have their own way of taking an
    image.
    """
    if getattr(type(image_processor), "process_image", None) is not TorchvisionBackend.process_image:
        yield
        return
    take, resize = image_processor.process_image, image_processor.resize

    def process_image(image: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if device is None and isinstance(image, Image.Image) and image.mode == "RGB":
            return _as_it_is(image)
        if device is None and _is_decoded(image):
            return image
        return take(image, *args, device=device, **kwargs)

    def resize_and_reorder(*args: Any, **kwargs: Any) -> Any:
        made = resize(*args, **kwargs)
        if isinstance(made, tuple):  # Mllama: the image, and how many tiles it fills
            return made[0].contiguous(), *made[1:]
        return made.contiguous()  # what follows is faster on [3, H, W]; here it is small

    image_processor.process_image, image_processor.resize = process_image, resize_and_reorder
    try:
        yield
    finally:
        del image_processor.process_image, image_processor.resize


def takes_pixels(image_processor: Any) -> bool:
    """Whether ``image_processor`` works on tensors, so that a tensor and the Pillow image of the same values are one."""
    return isinstance(image_processor, TorchvisionBackend)


def _is_decoded(image: Any) -> bool:
    """Whether it is what :func:`jpeg_pixels` returns: uint8, three channels, those of a pixel side by side."""
    return (
        isinstance(image, Tensor)
        and image.dtype == torch.uint8
        and image.ndim == 3
        and len(image) == 3
        and image.stride(0) == 1
    )


def _as_it_is(image: Image.Image) -> Tensor:
    """[3, H, W] over the memory of [H, W, 3]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
