"""From a JPEG file to what the image processor resizes, with fewer copies on the way and the same values at its end.

Three things that the plain way (Pillow's decoder, then the processor) spends time on and that change no value:

- Pillow hands its pixels on as bytes, which are copied twice more before they are a tensor. torchvision decodes straight
  into one. Both call libjpeg-turbo, and :func:`decoders_agree` looks that the two copies of it that are installed agree.
- transformers copies each image from [H, W, 3] to [3, H, W] before it resizes it. torch's resize is faster on the first
  order, and gives the same bits.
- Images become floats one by one, are stacked, and a DataLoader worker then copies the stack into memory that it shares
  with the training process. Here they become floats in that memory.

H, W are an image's height and width.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import get_worker_info
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
    take, resize, prepare = image_processor.process_image, image_processor.resize, image_processor._preprocess

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

    def preprocess_and_share(*args: Any, return_tensors: Any = None, do_pad: Any = None, **kwargs: Any) -> Any:
        scaled = image_processor.rescale_and_normalize
        waiting: list[tuple[Any, ...]] = []

        def later(image: Tensor, *settings: Any) -> Tensor:
            waiting.append(settings)
            return image

        if not do_pad:  # what is padded is padded with zeros after it was normalised
            image_processor.rescale_and_normalize = later
        try:
            made = prepare(*args, return_tensors=None, do_pad=do_pad, **kwargs)
        finally:
            image_processor.__dict__.pop("rescale_and_normalize", None)
        images, settings = made["pixel_values"], waiting[0] if waiting else None
        as_tensors = str(getattr(return_tensors, "value", return_tensors)) == "pt"
        if settings is not None and as_tensors and _alike(images) and settings[2] is True:  # do_normalize
            made["pixel_values"] = _normalised_batch(image_processor, images, *settings)
            return made
        if settings is not None:
            made["pixel_values"] = [scaled(image, *settings) for image in images]
        return made.convert_to_tensors(return_tensors)

    changed: dict[str, Any] = {"process_image": process_image, "resize": resize_and_reorder}
    if type(image_processor)._preprocess is TorchvisionBackend._preprocess:  # it has one output, a list of images
        changed["_preprocess"] = preprocess_and_share
    for name, function in changed.items():
        setattr(image_processor, name, function)
    try:
        yield
    finally:
        for name in changed:
            delattr(image_processor, name)


def _alike(images: list[Tensor]) -> bool:
    return len({(image.shape, image.dtype) for image in images}) == 1 and images[0].dtype == torch.uint8


def _normalised_batch(
    image_processor: Any,
    images: list[Tensor],
    do_rescale: bool,
    rescale_factor: float,
    do_normalize: bool,
    image_mean: Any,
    image_std: Any,
) -> Tensor:
    """[n, 3, H, W] float32: what the image processor's ``rescale_and_normalize`` gives for each, in one memory."""
    batch = _shared_where_it_pays((len(images), *images[0].shape))
    mean, std, _ = image_processor._fuse_mean_std_and_rescale_factor(
        do_normalize=do_normalize,
        image_mean=image_mean,
        image_std=image_std,
        do_rescale=do_rescale,
        rescale_factor=rescale_factor,
        device=batch.device,
    )
    for place, image in zip(batch, images, strict=True):
        place.copy_(image)
        done = image_processor.normalize(place, mean, std, inplace=True)
        if done.data_ptr() != place.data_ptr():  # transformers 5.17 pays no heed to inplace
            place.copy_(done)
    return batch


def _shared_where_it_pays(shape: tuple[int, ...]) -> Tensor:
    """An empty float32 tensor; in a DataLoader worker in the memory that the training process will read it from, as
    torch's own collate function has it."""
    if get_worker_info() is None:
        return torch.empty(shape)
    storage = torch.UntypedStorage._new_shared(4 * math.prod(shape), device="cpu")
    return torch.empty(0).set_(storage, 0, shape)  # type: ignore[call-overload]


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
