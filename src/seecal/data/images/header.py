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
_ALONE = frozenset((0x01, *range(0xD0, 0xD8)))  # markers without a length behind them


def header_size(start: bytes, read_at: ReadAt) -> Size | None:
    """(width, height) in pixels as the header says, not turned; None where it is not told here.

    Args:
        start: the file's first bytes, 32 or more where it has them.
        read_at: for a JPEG file whose size stands further back.
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
    place = 2
    while True:
        piece = start[place : place + 9] if place + 9 <= len(start) else read_at(place, 9)
        if len(piece) < 9 or piece[0] != 0xFF:
            return None
        marker = piece[1]
        if marker in _FRAMES:
            return _big(piece[7:9]), _big(piece[5:7])
        if marker == 0xFF:  # padding
            place += 1
        elif marker in _ALONE:
            place += 2
        elif marker in (0xD9, 0xDA):  # pixels, or the end, before any size
            return None
        else:
            place += 2 + (piece[2] << 8 | piece[3])


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
