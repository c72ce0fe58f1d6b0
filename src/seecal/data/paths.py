"""Which file an image path in a record means. Only files inside one folder: data is not trusted to name others."""

from __future__ import annotations

import os
import re
import stat

_URL = re.compile(r"\s*(?:[a-z][a-z0-9+.-]*://|data:)", re.IGNORECASE)


class RecordError(ValueError):
    """One record cannot be used; the message is one line that says why and what to do."""


class MissingImage(RecordError, FileNotFoundError):
    """The image file of a record is not there."""


def show(value: object, limit: int = 80) -> str:
    """``value`` as errors quote it: on one line, cut to ``limit`` characters."""
    try:
        text = repr(value[: 4 * limit]) if isinstance(value, (str, bytes)) else repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, lists within lists without end
        text = f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= limit else text[: limit - 1] + "…"


def refuse_url(path: str) -> None:
    """RecordError for anything that would have to be fetched (http://, ftp://, file://, data: and the like)."""
    if _URL.match(path):
        raise RecordError(
            f"image {show(path)} is a URL, and seecal fetches nothing while it reads data. Download the image into the "
            "image folder and write its file name."
        )


def resolve_inside(path: str, root: str | None) -> str:
    """The real path of the image file ``path``, relative to ``root`` unless absolute.

    Args:
        root: the folder that the real path, symbolic links followed, must lie in.

    Raises:
        RecordError: a URL, a path out of the folder, no regular file, or no ``root`` to start from.
        MissingImage: nothing is there.
    """
    refuse_url(path)
    if not path.strip():
        raise RecordError("image '' names no file. Leave the key out of a record without an image.")
    if root is None:
        raise RecordError(
            f"image {show(path)} is a path, and this data set has no folder to look in. Set image_root=..."
        )
    try:
        real = os.path.realpath(os.path.join(root, path))
        folder = os.path.dirname(real)
        # A folder that a real path starts with is real itself: asking for its real path is only needed otherwise.
        inside = _inside(folder, root) or _inside(folder, os.path.realpath(root))
        mode = os.stat(real).st_mode if inside else 0
    except FileNotFoundError:
        raise MissingImage(
            f"image {show(path)} is not in {show(root)}. Put it there, correct the path, or set image_root=..."
        ) from None
    except (OSError, ValueError) as error:  # a NUL or a lone surrogate in the name, one too long, a loop of links
        reason = getattr(error, "strerror", None) or error
        raise RecordError(f"image {show(path)} is no usable path ({reason}). Correct it.") from None
    if not inside:
        raise RecordError(
            f"image {show(path)} leads out of {show(root)} (to {show(real)}). Move the file there, or set image_root=... "
            "to a folder that holds all images."
        )
    if not stat.S_ISREG(mode):
        raise RecordError(f"image {show(path)} is not a file. Name one image file.")
    return real


def _inside(folder: str, root: str) -> bool:
    return folder == root or folder.startswith(root.rstrip(os.sep) + os.sep)
