"""One way to open an image file: upright, RGB, refused in one line when it cannot be used.

The conversion, defined once: EXIF orientation applied; the first frame of an animation; transparency on white; palettes
through their colours (with transparency, on white); 16-bit grey scaled from its full range (65,535 is white); CMYK, YCbCr
and LAB by Pillow's conversion, without colour profiles.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

MAX_PIXELS = 50_000_000
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")


def open_image(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image at ``path``, upright and in RGB mode.

    Args:
        max_pixels: width × height above which a file is refused. Read from the header, before anything is decoded, so
            that a small file that unpacks to gigabytes costs nothing.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a folder, no image, too large, or damaged; the message names the file and what to do.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file. Check the path of the image.")
    if path.is_dir():
        raise ValueError(f"{path}: this is a folder. Name one image file in it.")
    try:
        with warnings.catch_warnings():
            # Our own limit below is the check; Pillow's would warn beside it.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
    except UnidentifiedImageError:
        raise ValueError(
            f"{path}: not an image that Pillow can read{_looks_like(path)}. Give a PNG or JPEG file."
        ) from None
    except Image.DecompressionBombError:
        raise ValueError(f"{path}: too large: over {max_pixels:,} pixels. Scale it down first.") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path}: cannot be opened ({error}). Save it again as a PNG or JPEG file.") from None
    with image:
        width, height = image.size
        if width * height > max_pixels:
            size = f"{width} × {height} pixels are over the limit of {max_pixels:,}"
            raise ValueError(f"{path}: too large: {size}. Scale it down first.")
        if ImageFile.LOAD_TRUNCATED_IMAGES:
            raise ValueError(
                "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on: damaged images would pass unseen. Set it to False."
            )
        try:
            return to_rgb(ImageOps.exif_transpose(image))
        except (OSError, SyntaxError, ValueError, EOFError) as error:
            message = f"{path}: damaged or cut off ({error}). Copy or download it again, or leave it out."
            raise ValueError(message) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image in RGB mode, as this module's first lines define it."""
    if image.mode in _SIXTEEN_BIT:
        # Pillow's own conversion clips at 255 and so turns nearly every 16-bit image white.
        return image.convert("I").point(lambda value: value / 257, "L").convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _looks_like(path: Path) -> str:
    """What a file that is no image starts with, where that can be told."""
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        return " (the file is empty)"
    if start.lstrip().startswith((b"<svg", b"<?xml")):
        return " (it is an SVG drawing)"
    if b"\0" not in start and start.isascii():
        return " (it holds text)"
    return ""
