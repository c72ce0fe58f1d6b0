"""How large an image is, by the first bytes of its file: what can be told of it without decoding, in a few microseconds.

    with PIL.Image.open(path) as image: image.size                 # a hundred microseconds; the same size

JPEG, PNG, GIF and WebP; for anything else nothing is told, and Pillow is asked.
"""

from __future__ import annotations

from collections.abc import Callable

Size = tuple[int, int]
# Reads `size` bytes at an offset of the file
ReadAt = Callable[[int, int], bytes]

_PNG = b"\x89PNG\r\n\x1a\n"
# Start of frame: every JPEG marker C0 to CF but those of Huffman tables, of extensions and of arithmetic coding
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_ALONE = frozenset((0x00, 0x01, *range(0xD0, 0xDA)))  # markers without a length behind them
# Markers and bytes between them. Pillow looks at any number, a microsecond each
_STEPS = 1 << 16
_WINDOW = 4096


def header_size(start: bytes, read_at: ReadAt) -> Size | None:
    """(width, height) in pixels as the header says, not turned; None where it is not told here.

    Args:
        start: the file's first bytes, 32 or more where it has them.
        read_at: for a JPEG file whose size stands further back.

    Raises:
        ValueError: a JPEG file with so much padding before its size that it would take minutes to find out.
    """
    if start.startswith(b"\xff\xd8"):
        return _jpeg_size(start, read_at)
    if len(start) < 30:
        return None
    if start.startswith(_PNG) and start[12:16] == b"IHDR":
        return _big(start[16:20]), _big(start[20:24])
    if start[:6] in (b"GIF87a", b"GIF89a"):
        return _little(start[6:8]), _little(start[8:10])
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return _webp_size(start)
    return None


def _jpeg_size(start: bytes, read_at: ReadAt) -> Size | None:
    window, begin, place = start, 0, 2
    for _ in range(_STEPS):
        if place + 9 > begin + len(window):
            window, begin = read_at(place, _WINDOW), place
        piece = window[place - begin : place - begin + 9]
        if len(piece) < 9:
            return None
        marker = piece[1] if piece[0] == 0xFF else None
        if marker in _FRAMES:
            return _big(piece[7:9]), _big(piece[5:7])
        if marker is None or marker == 0xFF:  # what Pillow passes over, too, and padding
            place += 1
        elif marker in _ALONE:
            place += 2
        elif marker == 0xDA:  # pixels before any size
            return None
        else:
            place += 2 + (piece[2] << 8 | piece[3])
    raise ValueError(
        f"no size among the first {_STEPS:,} markers and bytes of padding of the JPEG file. Save it again, or leave it out."
    )


def _webp_size(start: bytes) -> Size | None:
    kind = start[12:16]
    if kind == b"VP8X":
        return 1 + _little(start[24:27]), 1 + _little(start[27:30])
    if kind == b"VP8L" and start[20] == 0x2F:
        bits = _little(start[21:25])
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 " and start[23:26] == b"\x9d\x01\x2a":
        return _little(start[26:28]) & 0x3FFF, _little(start[28:30]) & 0x3FFF
    return None


def _big(piece: bytes) -> int:
    return int.from_bytes(piece, "big")


def _little(piece: bytes) -> int:
    return int.from_bytes(piece, "little")
