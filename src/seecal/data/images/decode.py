"""One way to open an image file: upright, RGB, refused in one line when it cannot be used.

The conversion, defined once: EXIF orientation applied; the first frame of an animation; transparency on white; palettes
through their colours (with transparency, on white); 16-bit grey of PNG and JPEG 2000 files, and in memory, scaled from its
full range (65,535 is white); other numbers that are no 8-bit pixels (floats, 16- and 32-bit whole numbers of TIFF files
and the like) from the image's own range, the least black, the greatest white, infinities the nearer of the two, NaN black;
CMYK, YCbCr and LAB by Pillow's conversion, without colour profiles.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from ..paths import MAX_FILE_BYTES, embedded_image, refuse_url, resolve_inside, show
from .header import ReadAt, header_size

MAX_PIXELS = 50_000_000
# What is opened. Pillow knows more: EPS files are programs, which it hands to Ghostscript; icons hold an image of another
# size than their header says; others have no use here. HEIF and JXL are there where somebody has installed their plugin.
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "HEIF", "JXL")
# Each decoder has its own idea of what to raise about damage
_DECODERS_RAISE = (
    *(OSError, SyntaxError, ValueError, EOFError, RuntimeError, LookupError, TypeError, ArithmeticError, MemoryError),
    struct.error,
)
_FULL_RANGE = ("PNG", "JPEG2000")  # their 16 bits are all of the grey scale
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
_ORIENTATION = 0x0112  # the EXIF tag; 1 is upright

Size = tuple[int, int]
# The (width, height) that is enough, of the upright image: always the same, or from its full size; None: all of it
AtLeast = Size | Callable[[Size], Size | None] | None


def open_image(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS, at_least: AtLeast = None) -> Image.Image:
    """The image at ``path``, upright and in RGB mode.

    Args:
        max_pixels: width × height above which a file is refused. Read from the header, before anything is decoded, so
            that a small file that unpacks to gigabytes costs nothing.
        at_least: (width, height) that is enough. A JPEG file is then decoded to 1/8, 1/4 or 1/2 of its size if that is no
            smaller; other values than resizing the full image would give. Other formats are decoded in full.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a folder, no image, too large, or damaged; the message names the file and what to do.
    """
    return _opened(path, max_pixels, at_least)


def _opened(
    path: str | os.PathLike[str], max_pixels: int, at_least: AtLeast, jpeg: Callable[[bytes], Any] | None = None
) -> Any:
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file. Check the path of the image.")
    if path.is_dir():
        raise ValueError(f"{path}: this is a folder. Name one image file in it.")
    try:
        file = path.open("rb")
    except OSError as error:
        raise ValueError(f"{path}: cannot be opened ({error.strerror}). Check the file and its rights.") from None
    with file:
        return _decoded(file, str(path), max_pixels, at_least, jpeg)


def decode_image(
    value: Any,
    name: str,
    root: str | os.PathLike[str] | None = None,
    *,
    max_pixels: int = MAX_PIXELS,
    at_least: AtLeast = None,
    jpeg: Callable[[bytes], Any] | None = None,
) -> Any:
    """The image that a record holds as a path, encoded bytes, ``{"path", "bytes"}`` or a Pillow image: upright, in RGB.

    Arrays and tensors are pixels already and returned as they are.

    Args:
        name: how errors call the record.
        root: the folder that paths start from and may not leave; None: paths are taken as they are. URLs never are.
        at_least: as in :func:`open_image`.
        jpeg: decodes whole JPEG files that need no turning and no reducing (``fast_jpeg.jpeg_pixels``); what it gives is
            returned, unless it is None.

    Raises:
        FileNotFoundError: no such file.
        ValueError: what :func:`open_image` refuses, a URL, a path out of ``root``, or nothing that holds an image.
    """
    if isinstance(value, Mapping):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
        if value is None:
            raise ValueError(f"{name}: an image without bytes and path. Put one in, or leave the record out.")
    if isinstance(value, (str, os.PathLike)):
        path = os.fspath(value)
        try:
            held = embedded_image(path)
            if held is not None:
                return decode_image(held, name, max_pixels=max_pixels, at_least=at_least, jpeg=jpeg)
            if root is not None:
                path = resolve_inside(path, os.fspath(root))
            refuse_url(path)
            return _opened(path, max_pixels, at_least, jpeg)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{name}: {error}") from None
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        except OSError as error:  # such as a name that is too long
            raise ValueError(f"{name}: {show(path)} is no usable path ({error.strerror}). Correct it.") from None
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _decoded(io.BytesIO(value), f"{name}: its image of {len(value):,} bytes", max_pixels, at_least, jpeg)
    if isinstance(value, Image.Image):
        return upright(value, f"{name}: its {value.format or value.mode} image", max_pixels)
    _refuse_other_numbers(value, name)
    return value


def _refuse_other_numbers(value: Any, name: str) -> None:
    """ValueError for an array that holds something else than 8-bit pixels, which would come out all black or all white."""
    dtype = str(getattr(value, "dtype", "")).removeprefix("torch.")
    if dtype not in ("", "uint8"):
        raise ValueError(
            f"{name}: its image is an array of {dtype}, but pixels are whole numbers from 0 to 255 (uint8). Scale it to "
            "that range and convert it, or give a Pillow image, whose numbers are scaled from their own range."
        )


def check_start(start: bytes, read_at: ReadAt, path: str, max_pixels: int = MAX_PIXELS) -> bool:
    """Whether the header of an image file tells enough; ValueError, calling it ``path``, if the image is too large or has
    no end of padding.

    False: :func:`check_header` has to look at it.
    """
    try:
        size = header_size(start, read_at)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if size is None or not all(size):
        return False
    _refuse_too_large(size, path, max_pixels)
    return True


def check_header(file: BinaryIO, path: str, max_pixels: int = MAX_PIXELS) -> None:
    """ValueError where the header of an image ``file`` shows that it cannot be used; nothing is decoded."""
    with _opened_by_pillow(file, path, max_pixels) as image:
        _refuse_too_large(image.size, path, max_pixels)


def _refuse_too_large(size: Size, path: str, max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise ValueError(
            f"{path}: too large: {width} × {height} pixels are over the limit of {max_pixels:,}. Scale it down first."
        )


def _decoded(
    file: BinaryIO, path: str, max_pixels: int, at_least: AtLeast, jpeg: Callable[[bytes], Any] | None = None
) -> Any:
    """The image in ``file``; errors call it ``path``."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if size > MAX_FILE_BYTES:
        raise ValueError(
            f"{path}: too large: {size:,} bytes are over the limit of {MAX_FILE_BYTES:,}. Save it smaller first."
        )
    with _opened_by_pillow(file, path, max_pixels) as image:
        _refuse_too_large(image.size, path, max_pixels)
        if ImageFile.LOAD_TRUNCATED_IMAGES:
            raise ValueError(
                "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on: damaged images would pass unseen. Set it to False."
            )
        with _damage_named(path):
            reduced = _reduce(image, at_least)
            if jpeg is not None and not reduced and _is_plain_jpeg(image):
                file.seek(0)
                pixels = jpeg(file.read())
                if pixels is not None:
                    return pixels
                file.seek(0)
        return upright(image, path, max_pixels)


def _opened_by_pillow(file: BinaryIO, path: str, max_pixels: int) -> Image.Image:
    """The image with only its header read."""
    try:
        with warnings.catch_warnings():
            # Our own limit below is the check; Pillow's would warn beside it.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(file, formats=_formats())
    except UnidentifiedImageError:
        raise ValueError(
            f"{path}: not an image that Pillow can read{_looks_like(file)}. Give a PNG or JPEG file."
        ) from None
    except Image.DecompressionBombError:
        raise ValueError(f"{path}: too large: over {max_pixels:,} pixels. Scale it down first.") from None
    except _DECODERS_RAISE as error:
        raise ValueError(f"{path}: cannot be opened ({error}). Save it again as a PNG or JPEG file.") from None


def _formats() -> tuple[str, ...]:
    if "PPM" not in Image.OPEN or "AVIF" not in Image.OPEN:
        Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _is_plain_jpeg(image: Image.Image) -> bool:
    return image.format == "JPEG" and image.mode in ("RGB", "L") and not _turned(image)


def _turned(image: Image.Image) -> bool:
    return image.getexif().get(_ORIENTATION, 1) in range(2, 9)


def _reduce(image: Image.Image, at_least: AtLeast) -> bool:
    """Has a JPEG image decoded at the smallest size that is enough; whether that is less than all of it."""
    if at_least is None or image.format != "JPEG":
        return False
    sideways = image.getexif().get(_ORIENTATION, 1) in range(5, 9)
    full = image.size
    box = at_least(full[::-1] if sideways else full) if callable(at_least) else at_least
    if box is not None:
        image.draft(None, box[::-1] if sideways else box)  # type: ignore[arg-type]  # None: the mode stays
    return image.size != full


@contextlib.contextmanager
def _damage_named(path: str) -> Iterator[None]:
    try:
        yield
    except _DECODERS_RAISE as error:
        message = (
            f"{path}: damaged or cut off ({' '.join(str(error).split())}). Copy or download it again, or leave it out."
        )
        raise ValueError(message) from None


def upright(image: Image.Image, path: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A Pillow image turned as its EXIF orientation says, in RGB; ValueError calling it ``path`` if it is damaged or too
    large."""
    _refuse_too_large(image.size, path, max_pixels)
    with _damage_named(path):
        image.load()  # a PNG file's orientation may stand behind its pixels
    _refuse_too_large(image.size, path, max_pixels)  # some decoders correct what the header said
    with _damage_named(path):
        # exif_transpose copies what needs no turning, too
        full_range = image.format in _FULL_RANGE or (image.format is None and image.mode in _SIXTEEN_BIT)
        return to_rgb(ImageOps.exif_transpose(image) if _turned(image) else image, full_range)


def to_rgb(image: Image.Image, full_range: bool = True) -> Image.Image:
    """Any Pillow image in RGB mode, as this module's first lines define it; ``full_range``: that of 16-bit grey is used."""
    if image.mode == "F" or (image.mode.startswith("I") and not full_range):
        return _from_own_range(image)
    if image.mode.startswith("I"):
        # Pillow's own conversion clips at 255 and so turns nearly every 16-bit image white.
        return image.convert("I").point(lambda value: value / 257, "L").convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_own_range(image: Image.Image) -> Image.Image:
    """Grey from numbers of any size: Pillow's own conversion clips at 0 and 255. One value everywhere is black."""
    values = np.asarray(image, dtype=np.float64)
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise ValueError("none of its numbers is finite")
    low, high = float(finite.min()), float(finite.max())
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    grey = (values - low) * (255 / (high - low) if high > low else 0)
    return Image.fromarray(grey.round().astype(np.uint8)).convert("RGB")


def _looks_like(file: BinaryIO) -> str:
    """What a file that is no image starts with, where that can be told."""
    file.seek(0)
    start = file.read(512)
    if not start:
        return " (the file is empty)"
    if start.startswith((b"%!PS", b"\xc5\xd0\xd3\xc6")):
        return " (it is a PostScript program)"
    if start.lstrip().startswith((b"<svg", b"<?xml")):
        return " (it is an SVG drawing)"
    if b"\0" not in start and start.isascii():
        return " (it holds text)"
    return ""
