"""Which file an image path in a record means. Only files inside the image folders: data is not trusted to name others."""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
from dataclasses import dataclass, field

_URL = re.compile(r"\s*(?:[a-z][a-z0-9+.-]*://|data:)", re.IGNORECASE)
_DATA_URI = re.compile(r"\s*data:(?:image/[\w.+-]+|application/octet-stream)?(?:;[\w=-]+)*;base64,", re.IGNORECASE)
# How JPEG, PNG, GIF and WebP files begin in base64; a path that begins so is shorter than any of them
_BASE64 = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")
_SHORTEST_BASE64 = 128
# An image's header is in its first kilobytes, unless a profile or a camera's notes come first
_HEADER = 4096
_FOLDERS_KEPT = 4096
# Of one image. 50 million pixels of 16-bit colours with transparency, uncompressed, are 400 MB
MAX_FILE_BYTES = 1 << 29


class RecordError(ValueError):
    """One record cannot be used; the message is one line that says why and what to do."""


class NoAnswer(RecordError):
    """There is nothing to learn from it."""


class UnusableImage(RecordError):
    """An image of a record cannot be used."""


class MissingImage(UnusableImage, FileNotFoundError):
    """The image file of a record is not there."""


@dataclass(frozen=True)
class LostImage:
    """An image file that a record had and that can no longer be used.

    Attributes:
        path: as the record names it.
        missing: nothing is there; else what is there cannot be used.
        line: one line that says what is wrong and what to do.
    """

    path: str
    missing: bool
    line: str


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


def embedded_image(text: str) -> bytes | None:
    """The file that a text holds in base64, as ``data:image/png;base64,...`` or bare; None where the text is a path or URL.

    RecordError where it is no valid base64.
    """
    head = text[:_SHORTEST_BASE64]
    uri = _DATA_URI.match(head)
    if uri is None and not (len(text) > _SHORTEST_BASE64 and head.startswith(_BASE64)):
        return None
    try:
        return base64.b64decode("".join(text[uri.end() if uri else 0 :].split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RecordError(f"image {show(text)} is not valid base64 ({error}). Encode it again.") from None


@dataclass
class ImageFolders:
    """Where image paths start from, and what they may not leave.

    Args:
        roots: the folders, in the order in which an image is looked for; their real paths.
        follow_links: whether symbolic links below them may lead anywhere. A path still has to begin inside a root.
        lost: None: an image file that is missing or damaged is an error. A list: what was wrong with it is put there, and
            it counts as if it lay in the first root.
    """

    roots: tuple[str, ...]
    follow_links: bool = False
    lost: list[LostImage] | None = None
    # Folders seen, with their real paths and whether those are inside: a data set has few, and each is many system calls
    _real: dict[str, tuple[str, bool]] = field(default_factory=dict, init=False, repr=False)

    def find(self, path: str) -> str:
        """The real path of the image file ``path``, relative to the first root that has it, unless absolute.

        Raises:
            RecordError: a URL, a path out of the folders, or no folder to start from.
            MissingImage: nothing is there, or no regular file.
        """
        return self.found(path)[0]

    def found(self, path: str, read: bool = False) -> tuple[str, bytes]:
        """(its real path, its first 4 KiB if ``read``): as :meth:`find`, opening the file once."""
        refuse_url(path)
        if not path.strip():
            raise RecordError("image '' names no file. Leave the key out of a record without an image.")
        if not self.roots:
            raise RecordError(
                f"image {show(path)} is a path, and this data set has no folder to look in. Set image_root=..."
            )
        missing: RecordError | None = None
        for root in self.roots:
            try:
                return self._in(root, path, read)
            except MissingImage as error:
                missing = missing or error
        assert missing is not None
        if len(self.roots) > 1:
            raise MissingImage(f"image {show(path)} is in none of {self._shown()}. Put it there, or correct the path.")
        raise missing

    def below(self, real: str) -> str:
        """A real path without the folder that holds it: the same after the folder is moved. Whole where none does."""
        return real.removeprefix(next((root for root in self.roots if _inside(real, root)), ""))

    def without(self, path: str, error: RecordError) -> str:
        """Where ``path`` would lie that cannot be used; the error itself is raised unless such images are kept."""
        if self.lost is None:
            raise error
        self.lost.append(LostImage(path, isinstance(error, MissingImage), str(error)))
        folder, name = os.path.split(os.path.join(self.roots[0], path))
        return os.path.join(os.path.realpath(folder), name)

    def _in(self, root: str, path: str, read: bool) -> tuple[str, bytes]:
        try:
            real = self._resolved(root, path)
            inside = real is not None
            mode, size, start = _looked_at(real, read) if real is not None else (0, 0, b"")
        except (FileNotFoundError, NotADirectoryError):  # the latter where a folder of the path is a file here
            raise MissingImage(
                f"image {show(path)} is not in {show(root)}. Put it there, correct the path, or set image_root=..."
            ) from None
        except (OSError, ValueError) as error:  # a NUL or a lone surrogate in the name, one too long, a loop of links
            reason = getattr(error, "strerror", None) or error
            raise RecordError(f"image {show(path)} is no usable path ({reason}). Correct it.") from None
        if not inside:
            where = os.path.realpath(os.path.join(root, path))
            raise RecordError(
                f"image {show(path)} leads out of {self._shown()} (to {show(where)}). Move the file there, set "
                "image_root=... to a folder or a list of folders that hold all images, or follow_links=True if links "
                "below it are meant."
            )
        if not stat.S_ISREG(mode):
            raise MissingImage(f"image {show(path)} is not a file. Name one image file.")
        if size > MAX_FILE_BYTES:
            raise RecordError(
                f"image {show(path)} is too large: {size:,} bytes are over the limit of {MAX_FILE_BYTES:,}. Scale it."
            )
        assert real is not None
        return real, start

    def _resolved(self, root: str, path: str) -> str | None:
        """The path with its links followed; None if it leaves the folders."""
        if self.follow_links:
            # Where it begins is told by its letters: "..", which a link would give another meaning, is gone before
            whole = os.path.normpath(os.path.join(root, path))
            if any(_inside(whole, known) for known in self.roots):
                return whole
        folder, name = os.path.split(os.path.join(root, path))
        if name in ("", ".", ".."):
            real = os.path.realpath(os.path.join(folder, name))
        else:
            known = self._real.get(folder)
            if known is None:
                if len(self._real) >= _FOLDERS_KEPT:  # a folder for each image
                    self._real.clear()
                real = os.path.realpath(folder)
                known = self._real[folder] = real, self._holds(real)
            real = os.path.join(known[0], name)
            if not os.path.islink(real):
                return real if known[1] else None
            real = os.path.realpath(real)
        return real if self._holds(os.path.dirname(real)) else None

    def _holds(self, folder: str) -> bool:
        """Whether a real path is inside. Where it starts with a folder as that was given, that folder is real itself."""
        given = any(_inside(folder, root) for root in self.roots)
        return given or any(_inside(folder, os.path.realpath(root)) for root in self.roots)

    def _shown(self) -> str:
        return " and ".join(map(show, self.roots))


def resolve_inside(path: str, root: str | None) -> str:
    """The real path of the image file ``path``, relative to the one folder ``root`` unless absolute.

    Raises:
        RecordError, MissingImage: as :meth:`ImageFolders.find` does.
    """
    return ImageFolders(() if root is None else (root,)).find(path)


def _looked_at(path: str, read: bool) -> tuple[int, int, bytes]:
    """(the mode of the file, its size, its first bytes)."""
    if not read:
        found = os.stat(path)
        return found.st_mode, found.st_size, b""
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe without a writer would wait
    try:
        found = os.fstat(file)
        return found.st_mode, found.st_size, os.read(file, _HEADER) if stat.S_ISREG(found.st_mode) else b""
    finally:
        os.close(file)


def _inside(folder: str, root: str) -> bool:
    return folder == root or folder.startswith(root.rstrip(os.sep) + os.sep)
