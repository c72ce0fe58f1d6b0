"""Sizes by the first bytes of a file are Pillow's sizes."""

import io

import pytest
from PIL import Image

from seecal.data.images.decode import check_header, check_start
from seecal.data.images.header import header_size


def encoded(format, size=(300, 200), mode="RGB", **options):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, format, **options)
    return buffer.getvalue()


LONG = b"a" * 60_000
FILES = {
    "jpeg": encoded("JPEG"),
    "progressive": encoded("JPEG", progressive=True),
    "grey": encoded("JPEG", mode="L"),
    "a profile before the size": encoded("JPEG", icc_profile=LONG * 3),
    "a comment before the size": encoded("JPEG", comment=LONG),
    "png": encoded("PNG"),
    "gif": encoded("GIF", mode="P"),
    "webp": encoded("WEBP"),
    "webp without loss": encoded("WEBP", lossless=True),
    "webp with alpha": encoded("WEBP", mode="RGBA", exif=b"Exif\0\0"),
    "large": encoded("PNG", size=(70_000, 3)),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("first", [64, 4096])
def test_the_size_is_pillows(name, first):
    file = FILES[name]
    with Image.open(io.BytesIO(file)) as image:
        assert header_size(file[:first], lambda offset, size: file[offset : offset + size]) == image.size


@pytest.mark.parametrize("file", [b"", b"hello", b"\xff\xd8\xff\xe0\0", b"\xff\xd8\xff\xda" + b"\0" * 20, encoded("BMP"),
                                  encoded("TIFF"), b"RIFF" + b"\0" * 40])  # fmt: skip
def test_nothing_is_told_of_others(file):
    assert header_size(file, lambda offset, size: file[offset : offset + size]) is None
    assert not check_start(file, lambda offset, size: file[offset : offset + size], "it")


def test_limits_and_what_pillow_finds():
    def read(offset, size):
        return FILES["jpeg"][offset : offset + size]

    assert check_start(FILES["jpeg"], read, "it")
    with pytest.raises(ValueError, match="it: too large: 300 × 200 pixels are over the limit of 59,999"):
        check_start(FILES["jpeg"], read, "it", 59_999)
    check_header(io.BytesIO(encoded("TIFF")), "it", 60_000)
    with pytest.raises(ValueError, match="it: too large: 300 × 200"):
        check_header(io.BytesIO(encoded("TIFF")), "it", 59_999)
    with pytest.raises(ValueError, match="it: not an image that Pillow can read"):
        check_header(io.BytesIO(b"\0" * 100), "it")
