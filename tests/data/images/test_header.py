"""Sizes by the first bytes of a file are Pillow's sizes."""

import io

import pytest
from PIL import Image

from seecal import load_records
from seecal.data.images.decode import check_header, check_start
from seecal.data.images.header import header_size
from tests.support.sources import row


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
    "padding before the size": b"\xff\xd8" + b"\xff" * 60_000 + encoded("JPEG")[2:],
    "zeros before the size": encoded("JPEG")[:20] + b"\0" * 60_000 + encoded("JPEG")[20:],
    "an escaped byte before the size": encoded("JPEG")[:20] + b"\xff\0" + encoded("JPEG")[20:],
    "an end before the size": encoded("JPEG")[:20] + b"\xff\xd9" + encoded("JPEG")[20:],
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


ENDLESS = {
    "padding": b"\xff",
    "zeros": b"\0",
    "escaped bytes": b"\xff\0",
    "restarts": b"\xff\xd0",
    "ends": b"\xff\xd9",
    "empty segments": b"\xff\xe5\0\x02",
    "segments without a length": b"\xff\xe5\0\0",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_jpeg_file_without_an_end_of_padding_is_refused(tmp_path, name):
    """Pillow would take minutes for a file of the size that is allowed; here each read is counted."""
    file, reads = b"\xff\xd8" + ENDLESS[name] * 200_000, []

    def read(offset, size):
        reads.append(size)
        return file[offset : offset + size]

    with pytest.raises(
        ValueError, match=r"it: no size among the first 65,536 markers and bytes of padding of the JPEG"
    ):
        check_start(file[:64], read, "it")
    assert len(reads) < 100
    (tmp_path / "bad.jpg").write_bytes(file)
    rows = [row(image="bad.jpg"), row(image={"bytes": file, "path": None}), row(image={"bytes": FILES["jpeg"]})]
    assert len(load_records(rows, image_root=tmp_path, on_bad="skip")) == 1
